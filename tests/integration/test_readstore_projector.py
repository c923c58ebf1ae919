"""The projector folds into every read store: rows equal a plain fold, whatever crashes."""

import asyncio
import datetime as dt
import signal
from collections.abc import AsyncIterator

import pytest
from refold.projection.definition import Column, Definition, FoldRule
from refold.query.server import app
from refold.query.settings import Settings

from hack.servers import Redis
from hack.servers.callers import tokens_file
from tests import served
from tests.projecting import (
    CUSTOMERS,
    HISTORIES,
    NAMESPACE,
    ORDERS,
    StoredModel,
    World,
    fold_customers,
    fold_histories,
    fold_orders,
    random_events,
    until,
)
from tests.readstores import Store


@pytest.fixture
async def crashing() -> AsyncIterator[tuple[Redis, Store]]:
    """A Redis of the test's own."""
    server = Redis()
    server.start()
    store = Store(server.url())
    await store.open()
    yield server, store
    await store.close()
    server.remove()


async def test_a_first_load_from_the_store_goes_over_into_the_topic(world: World, store: Store) -> None:
    """With more rows than one script writes."""
    orders = await world.projection_in(store, ORDERS, "order-status")
    histories = await world.projection_in(store, HISTORIES, "histories")
    world.append(random_events(3000, subjects=1500))
    with orders.projector(), histories.projector():
        orders.wait()
        world.append(random_events(700, seed=3))
        orders.wait()
        histories.wait()
    assert await orders.read() == fold_orders(world)
    assert await histories.read() == fold_histories(world)


async def test_two_projectors_write_the_same_rows_and_lose_no_update(world: World, store: Store) -> None:
    customers = await world.projection_in(store, CUSTOMERS, "customers")
    with customers.process() as one, customers.process() as other:
        for seed in range(8):
            world.append(random_events(150, seed=seed, subjects=300))
            await asyncio.sleep(0.2)
            if seed == 5:
                one.send(signal.SIGKILL)
        customers.wait(90)
        assert other.terminate() == 0
    assert await customers.read() == fold_customers(world)


async def test_an_event_may_key_more_rows_than_one_script_writes_otherwise(world: World, store: Store) -> None:
    definition = Definition(
        streams=["orders"],
        key="data.all",
        columns=[Column(name="n", type="integer", index=True)],
        fold=[FoldRule(type="Placed", add={"n": "1"})],
    )
    model = await world.projection_in(store, definition, "many")
    world.append([(f"s{n}", "Placed", {"all": [f"k{i}" for i in range(0, 900, n + 1)]}) for n in range(9)])
    with model.projector():
        model.wait()
    expected = {f"k{i}": {"n": sum(i % (n + 1) == 0 for n in range(9))} for i in range(900)}
    assert await model.read() == {key: row for key, row in expected.items() if row["n"]}


async def test_what_a_column_cannot_hold_parks_its_row_and_nothing_else(world: World, store: Store) -> None:
    definition = Definition(
        streams=["orders"],
        columns=[Column(name="n", type="integer"), Column(name="note", type="text")],
        fold=[FoldRule(type="Placed", add={"n": "data.n"}, set={"note": "data.note"})],
    )
    model = await world.projection_in(store, definition, "sums")
    most = 2**63 - 1
    world.append([(key, "Placed", {"n": n, "note": key}) for key, n in [("a", most), ("b", 1), ("a", 1), ("b", 2)]])
    with model.projector():
        model.wait()
        world.append([("a", "Placed", {"n": -5, "note": "later"}), ("b", "Placed", {"n": 3, "note": "\u00fc"})])
        model.wait()
    assert await model.read() == {"a": {"n": most, "note": "a"}, "b": {"n": 6, "note": "\u00fc"}}
    [version] = (await model.status()).versions.values()
    assert version.parked == 2
    assert version.parked_error is not None


async def test_positions_that_a_crash_of_redis_took_back_are_refilled(
    world: World, crashing: tuple[Redis, Store]
) -> None:
    """Also where no event comes after it that would show a gap."""
    redis, store = crashing
    orders = await world.projection_in(store, ORDERS, "order-status")
    customers = await world.projection_in(store, CUSTOMERS, "customers")
    world.append(random_events(400))
    with orders.projector(batch_events=30), customers.projector(batch_events=30):
        for share in (0.3, 0.6):
            orders.wait()
            customers.wait()
            redis.lose(share)
            assert not (orders.caught_up() and customers.caught_up())
        orders.wait()
        customers.wait()
        redis.kill()
        world.append(random_events(200, seed=9))
        await asyncio.sleep(1)
        redis.start()
        until(lambda: orders.caught_up() and customers.caught_up(), "both to catch up", 60)
    assert await orders.read() == fold_orders(world)
    assert await customers.read() == fold_customers(world)


async def test_versions_that_a_crash_of_redis_took_back_are_made_again_and_filled_by_the_same_projectors(
    world: World, crashing: tuple[Redis, Store]
) -> None:
    """As the operator makes them, which looks at all of a Projection again and again."""
    redis, store = crashing
    world.append(random_events(400))
    orders = await world.projection_in(store, ORDERS, "order-status")
    customers = await world.projection_in(store, CUSTOMERS, "customers")
    with orders.projector(), customers.projector():
        orders.wait()
        customers.wait()
        redis.lose(1)
        world.append(random_events(100, seed=2))
        await asyncio.sleep(1)  # so that they have seen that nothing is there
        for definition, name in ((ORDERS, "order-status"), (CUSTOMERS, "customers")):
            await world.projection_in(store, definition, name)
        until(lambda: orders.caught_up() and customers.caught_up(), "both to catch up", 60)
    assert await orders.read() == fold_orders(world)
    assert await customers.read() == fold_customers(world)


async def test_a_former_version_in_redis_folds_on_through_a_crash_and_takes_its_place_back(
    world: World, crashing: tuple[Redis, Store]
) -> None:
    redis, store = crashing
    first = await world.projection_in(store, ORDERS, "order-status")
    second = await world.projection_in(store, ORDERS, "order-status", rebuild="again")
    for batch, model, former in ((1, second, first), (2, first, second)):
        world.append(random_events(700, seed=batch))
        with first.projector(), second.projector():
            redis.kill()
            world.append(random_events(300, seed=10 + batch))
            redis.start()
            for each in (first, second):
                each.wait(60)
        assert await store.admin.try_swap(namespace=NAMESPACE, name="order-status", version=model.version)
        found = await model.status()
        assert found.live == model.version
        assert [found.versions[one.version].retired_at is None for one in (model, former)] == [True, False]
        assert await model.read() == fold_orders(world)


async def test_a_moment_in_redis_is_the_fold_until_then_and_stays_so_through_a_crash(
    world: World, crashing: tuple[Redis, Store]
) -> None:
    redis, store = crashing
    world.append(random_events(500))
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(milliseconds=5)  # events have a microsecond each
    await asyncio.sleep(0.05)
    expected = fold_orders(world)
    world.append(random_events(300, seed=2))
    then = await world.projection_in(store, ORDERS.model_copy(update={"as_of": moment}), "then")
    now = await world.projection_in(store, ORDERS, "order-status")
    with then.projector(batch_events=37), now.projector():
        until(lambda: sum(then.applied().values()) > 0, "some to be folded")
        redis.lose(0.3)
        world.append(random_events(200, seed=3))
        now.wait(60)
        until(lambda: sum(then.applied().values()) >= 500, "the read model to be complete", 60)
        world.append(random_events(50, seed=4))
        now.wait(60)
    [version] = (await then.status()).versions.values()
    assert version.complete
    assert (version.position, version.lag_events) == (500, 0)
    assert await then.read() == expected


async def test_parked_events_are_listed_discarded_and_folded_again(world: World, store: Store) -> None:
    definition = Definition(
        streams=["orders"],
        columns=[Column(name="n", type="integer")],
        fold=[FoldRule(type="Placed", add={"n": "data.n"})],
    )
    model = await world.projection_in(store, definition, "sums")
    most = 2**63 - 1
    settings = Settings.model_validate(
        {"projection": "shop/sums", "readstore_dsn": store.url, "auth": tokens_file("secret")}
    )
    with model.projector(), served.serve(app(settings), "secret") as service:
        for subject, number in [("b", 1), ("a", most), ("c", most), ("a", 1), ("a", 2)]:
            world.append([(subject, "Placed", {"n": number})])
            model.wait()

        def listed() -> list[tuple[str, int]]:
            page = service.ask("/v1/parked").json()
            return [(one["key"], one["position"]) for one in page["parked"]]

        [first, second] = service.ask("/v1/parked").json()["parked"]
        assert {one["stream"] for one in (first, second)} == {"shop/orders"}
        assert "64 bits" in first["error"] or "range" in first["error"]
        assert service.ask(f"/v1/parked/{second['id']}:retry", "POST").status == 409  # behind one that still fails
        assert len(listed()) == 2
        world.append([("a", "Placed", {"n": -9})])
        model.wait()
        assert service.ask(f"/v1/parked/{second['id']}:retry", "POST").json()["outcome"] == "folded"
        assert listed() == []  # the first as well, since together they can be stored
        world.append([("c", "Placed", {"n": 1})])
        model.wait()
        [third] = service.ask("/v1/parked").json()["parked"]
        assert service.ask(f"/v1/parked/{third['id']}:discard", "POST").json()["outcome"] == "discarded"
        assert service.ask(f"/v1/parked/{third['id']}:discard", "POST").status == 404
        world.append([("a", "Placed", {"n": 2})])
        model.wait()
    assert await model.read() == {"a": {"n": most - 4}, "b": {"n": 1}, "c": {"n": most}}
    [version] = (await model.status()).versions.values()
    assert (version.parked, version.discarded) == (0, 1)


async def test_what_was_discarded_is_discarded_in_other_versions_too_where_it_fails_there(
    world: World, store: Store
) -> None:
    """Else nobody could build the same again without discarding all of it again."""
    definition = Definition(
        streams=["orders"],
        columns=[Column(name="n", type="integer")],
        fold=[FoldRule(type="Placed", add={"n": "data.n"})],
    )
    settings = Settings.model_validate(
        {"projection": "shop/sums", "readstore_dsn": store.url, "auth": tokens_file("secret")}
    )
    first = await world.projection_in(store, definition, "sums")
    with served.serve(app(settings), "secret") as service:

        def discard() -> None:
            [bad, *_] = service.ask("/v1/parked").json()["parked"]
            assert service.ask(f"/v1/parked/{bad['id']}:discard", "POST").json()["outcome"] == "discarded"

        with first.projector():
            world.append([(key, "Placed", data) for key, data in [("a", {"n": 1}), ("b", {"n": 1}), ("a", {})]])
            first.wait()
            discard()
            world.append([("a", "Placed", {"n": 2})])
            first.wait()
            second = await world.projection_in(store, definition, "sums", rebuild="again")
            with second.projector():
                await goes_live(second)
                # another one, while the version that is kept has it parked as well
                world.append([("b", "Placed", {}), ("b", "Placed", {"n": 5})])
                first.wait()
                second.wait()
                discard()
                await goes_live(first)
    assert await first.read() == {"a": {"n": 3}, "b": {"n": 6}}
    versions = (await first.status()).versions.values()
    assert [(version.parked, version.discarded) for version in versions] == [(0, 2), (0, 2)]


async def goes_live(model: StoredModel) -> None:
    for _ in range(600):
        if await model.store.admin.try_swap(namespace=NAMESPACE, name=model.name, version=model.version):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"the version doesn't go live: {await model.status()}")
