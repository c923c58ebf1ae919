"""Code in place of a definition, in projector processes: exactly once into every read store, and its failures told."""

import signal
from pathlib import Path

import pytest
import refold
from refold.projection.definition import Column, Definition, Handler
from refold_operator.projection import _failing

from tests.projecting import (
    CUSTOMERS,
    NAMESPACE,
    ORDERS,
    StoredModel,
    World,
    fold_customers,
    fold_orders,
    random_events,
    until,
)
from tests.readstores import Store

CODE = '''
def orders(event, table):
    """ORDERS as code; what is added to is looked up, so that a row that was read too early would show."""
    key = event.subject
    if event.type == "Purged":
        table.delete(key)
    if event.type in ("Placed", "Changed"):
        row = table.get(key) or {}
        for name in ("items", "total"):
            table.upsert(key, **{name: (row.get(name) or 0) + event.data[name]})
    if event.type in ("Placed", "Shipped"):
        table.upsert(key, status=event.type.lower())


def customers(event, table):
    """CUSTOMERS as code."""
    if event.type in ("Placed", "Changed"):
        table.upsert(event.data["customer"], last=event.data["note"])
        table.add(event.data["customer"], events=1, spent=event.data["total"])


def picky(event, table):
    """Takes no negative number, and never ends a process."""
    if event.data["n"] < 0:
        raise SystemExit("no")
    table.add(event.subject, n=event.data["n"])
'''


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module `shop_code`, as an image has it on its PYTHONPATH."""
    (tmp_path / "shop_code.py").write_text(CODE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def stops(model: StoredModel) -> list[str]:
    """Why partitions stand still."""
    rows = model.store.rows(namespace=NAMESPACE, name=model.name, version=model.version)
    found = rows.positions(model.applied())
    rows.close()
    return [one.stopped for one in found.values() if one.stopped]


def handled(columns: list[Column], function: str, **handler: object) -> Definition:
    given = {"image": "registry/shop:1", "version": "1", "function": f"shop_code:{function}", **handler}
    return Definition(streams=["orders"], columns=columns, handler=Handler.model_validate(given))


@pytest.mark.usefixtures("code")
async def test_rows_equal_the_fold_whatever_is_killed_and_comes_again(world: World, store: Store) -> None:
    orders = await world.projection_in(store, handled(ORDERS.columns, "orders"), "orders")
    adds = {"keys": "any", "adds": ["events", "spent"]}
    customers = await world.projection_in(store, handled(CUSTOMERS.columns, "customers", **adds), "customers")
    world.append(random_events(900, subjects=300))
    options = {"installed": refold.__version__, "batch_events": 70}
    with orders.process(**options) as one, customers.process(**options) as two:
        until(lambda: bool(orders.applied() and any(orders.applied().values())), "a batch to be written")
        one.send(signal.SIGKILL)
        two.send(signal.SIGKILL)
    with orders.process(**options), customers.process(**options), customers.process(**options):
        orders.wait()
        again = world.store(random_events(200, seed=2))
        world.relay(again)
        world.relay(again)  # as a relay never would
        world.append(random_events(200, seed=3))
        orders.wait()
        customers.wait()
    assert await orders.read() == fold_orders(world)
    assert await customers.read() == fold_customers(world)


@pytest.mark.usefixtures("code")
async def test_what_a_handler_does_not_take_parks_its_row_and_nothing_else(world: World, store: Store) -> None:
    model = await world.projection_in(store, handled([Column(name="n", type="integer")], "picky"), "picky")
    world.append([(key, "E", {"n": n}) for key, n in [("a", 1), ("a", -1), ("b", 1), ("a", 3), ("b", 2)]])
    with model.process():
        model.wait()
        world.append([("c", "E", {"n": 5}), ("a", "E", {"n": 5})])
        model.wait()
    assert await model.read() == {"a": {"n": 1}, "b": {"n": 3}, "c": {"n": 5}}
    [version] = (await model.status()).versions.values()
    assert version.parked == 3
    assert version.parked_error is not None
    assert version.parked_error.startswith("shop_code:picky: SystemExit: no (shop_code.py, line ")


@pytest.mark.usefixtures("code")
async def test_an_image_of_another_refold_fails_the_build_until_one_that_fits_folds(world: World, store: Store) -> None:
    model = await world.projection_in(store, handled([Column(name="n", type="integer")], "picky"), "picky")

    async def failing() -> str | None:
        [version] = (await model.status()).versions.values()
        return _failing(version, None, None)

    world.append([("a", "E", {"n": 1})])
    with model.process(installed="99.1.0") as process:
        until(lambda: "can't run" in process.text, "the refusal")
        until(lambda: bool(stops(model)), "the reason to be stored")
        reason = await failing()
        assert reason is not None
        assert reason.startswith("spec.handler.image: registry/shop:1 is built from Refold ")
        assert "installation's 99.1.0" in reason
        assert process.terminate() == 0, "it waits to be replaced"
    assert not any(model.applied().values())
    with model.process(installed=refold.__version__):
        model.wait()
        until(lambda: not stops(model), "the reason to be taken away, also where nothing is folded")
    assert await model.read() == {"a": {"n": 1}}
    assert await failing() is None
