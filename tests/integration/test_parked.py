"""Parked events, folded again or discarded over HTTP beside projectors that fold: each takes effect once, in order."""

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from refold.projection.definition import Column, Definition, FoldRule
from refold.projection.fold import Parked, RowChange, compile_fold
from refold.projection.readstore import Advance, MovedError
from refold.projection.readstore.postgres_rows import PostgresRows
from refold.projection.unparking import Entry, ParkedRow, Settled, fold_again
from refold.query import parked
from refold.query.server import app
from refold.query.settings import Settings

from hack.servers.callers import tokens_file
from tests import served
from tests.parking import (
    NOTES,
    TOKEN,
    as_operator_makes_it,
    ask,
    drop_index,
    filled,
    kind,
    listed,
    make,
    noted,
    notes,
    serve,
)
from tests.projecting import CUSTOMERS, NAMESPACE, ORDERS, World, fold_orders, until
from tests.served import Answer, Served


async def test_a_row_is_folded_again_in_order_once_what_it_failed_by_is_gone(world: World) -> None:
    model = await make(world, NOTES, "notes")
    world.append([noted("a"), noted("b"), noted("a", bad=True), noted("a"), noted("b")])
    with model.projector(**as_operator_makes_it(model)), serve(model) as service:
        model.wait()
        first, second = listed(service)
        assert (first["stream"], first["key"], first["subject"]) == ("shop/orders", "a", "a")
        assert "index row size" in first["error"]
        assert "follows an event of its row" in second["error"]

        refused = ask(service, "retry", second["id"])
        assert kind(refused) == (409, "still-bad")
        assert refused.json()["first"]["id"] == first["id"]
        assert "index row size" in refused.json()["detail"]
        assert [one["id"] for one in listed(service)] == [first["id"], second["id"]], "they stay parked"
        assert model.rows()["a"]["log"] == [1]

        await drop_index(model)
        answer = ask(service, "retry", first["id"])
        assert (answer.status, answer.json()) == (
            200,
            {"id": first["id"], "outcome": "folded", "version": model.version},
        )
        assert listed(service) == []
        assert model.rows() == notes(world)
        world.append([noted("a"), noted("b")])
        model.wait()
        assert model.rows() == notes(world), "the row isn't parked any more"
        assert kind(ask(service, "retry", first["id"])) == (404, "not-parked")


async def test_a_discarded_event_leaves_its_trace_and_lets_those_behind_it_go_on(world: World) -> None:
    model = await make(world, ORDERS, "order-status")
    bad = {"items": 1}  # no total
    good = {"items": 2, "total": 1.5}
    world.append([("a", "Placed", good), ("a", "Changed", bad), ("a", "Changed", good), ("a", "Changed", bad)])
    world.append([("a", "Changed", good)])
    with model.projector(**as_operator_makes_it(model)), serve(model) as service:
        model.wait()
        parked_ = listed(service)
        assert len(parked_) == 4
        answer = ask(service, "discard", parked_[0]["id"])
        assert (answer.status, answer.json()["outcome"]) == (200, "discarded")
        left = listed(service)
        assert [one["id"] for one in left] == [parked_[2]["id"], parked_[3]["id"]], "the next bad one stops the row"
        assert "total" in left[0]["error"]
        assert model.rows()["a"]["items"] == 4
        assert ask(service, "discard", left[0]["id"]).status == 200
        assert model.rows()["a"]["items"] == 6
        world.append([("a", "Changed", good)])
        model.wait()
        assert model.rows()["a"]["items"] == 8
    for log in world.events["orders"]:
        log[:] = [event for event in log if b"total" in bytes(event.data)]
    assert model.rows() == fold_orders(world)
    trace = model.execute("select id, position, key, error, discarded_by from {schema}.discarded order by id")
    assert [(row[0], row[1], row[2], row[4]) for row in trace] == [
        (parked_[0]["id"], 2, "a", "test"),
        (parked_[2]["id"], 4, "a", "test"),
    ]
    assert all("total" in row[3] for row in trace)


async def test_an_event_whose_key_failed_goes_to_its_rows_once_what_is_before_it_is_discarded(world: World) -> None:
    both = CUSTOMERS.model_copy(update={"key": "[data.customer, 'all']"})
    model = await make(world, both, "customers")
    good = {"total": 2, "customer": "c1", "note": "n"}
    world.append([("a", "Placed", good), ("a", "Placed", {"total": 5, "note": "n"}), ("a", "Placed", good)])
    world.append([("b", "Placed", good)])
    with model.projector(), serve(model) as service:
        model.wait()
        first, second = listed(service)
        assert (first["key"], second["key"]) == (None, None)
        assert model.rows()["all"]["events"] == 2
        assert ask(service, "discard", first["id"]).status == 200
        assert listed(service) == []
    del world.events["orders"][0][:], world.events["orders"][1][:], world.events["orders"][2][:]
    assert {key: (row["events"], row["spent"]) for key, row in model.rows().items()} == {"c1": (3, 6), "all": (3, 6)}


async def test_a_sum_that_another_partition_brings_back_into_its_bounds_is_folded_again(world: World) -> None:
    model = await make(
        world,
        Definition(
            streams=["orders"],
            key="data.customer",
            columns=[Column(name="items", type="integer")],
            fold=[FoldRule(type="Changed", add={"items": "data.items"})],
        ),
        "items",
    )
    most = 2**63 - 1

    def change(subject: str, items: int) -> tuple[str, str, dict[str, Any]]:
        return subject, "Changed", {"customer": "c", "items": items}

    with model.projector(batch_events=1), serve(model) as service:
        world.append([change("a", most)])
        model.wait()
        world.append([change("b", 7), change("b", 1)])
        model.wait()
        first, second = listed(service)
        assert kind(ask(service, "retry", first["id"])) == (409, "still-bad")
        world.append([change("a", -10)])
        model.wait()
        assert ask(service, "retry", second["id"]).status == 200
        assert listed(service) == []
    assert model.rows() == {"c": {"items": most - 2}}


def retry_all(service: Served, stop: threading.Event, seed: int, unexpected: list[Answer]) -> None:
    """Retry whatever is parked, in any order, until told to stop."""
    chance = random.Random(seed)
    while not stop.is_set():
        ids = [one["id"] for one in listed(service, "?limit=1000")]
        for id_ in chance.sample(ids, min(4, len(ids))):
            answer = ask(service, "retry", id_)
            if answer.status not in (200, 404, 409, 503, 504):
                unexpected.append(answer)


async def test_many_who_retry_at_once_beside_events_of_the_same_rows_have_each_take_effect_once(world: World) -> None:
    model = await filled(world, subjects=30)
    stop, unexpected = threading.Event(), list[Answer]()
    with model.projector(batch_events=20), serve(model) as service, ThreadPoolExecutor() as pool:
        retrying = [pool.submit(retry_all, service, stop, seed, unexpected) for seed in range(4)]
        try:
            chance = random.Random(7)
            for _ in range(25):
                world.append([noted(f"s{chance.randrange(30)}") for _ in range(8)])
            until(lambda: not model.parked(), "all to be folded again")
        finally:
            stop.set()
        for one in retrying:
            one.result()
        model.wait()
    assert not unexpected
    assert model.rows() == notes(world)


async def test_projectors_that_are_killed_and_move_while_rows_are_folded_again_lose_and_double_nothing(
    world: World,
) -> None:
    model = await filled(world, subjects=60)
    stop, unexpected = threading.Event(), list[Answer]()
    processes = [model.process(batch_events=20) for _ in range(2)]
    try:
        with serve(model) as service, ThreadPoolExecutor() as pool:
            retrying = [pool.submit(retry_all, service, stop, seed, unexpected) for seed in range(3)]
            try:
                chance = random.Random(8)
                for number in range(6):
                    left = len(model.parked())
                    world.append([noted(f"s{chance.randrange(60)}") for _ in range(20)])
                    until(lambda left=left: len(model.parked()) < left or not left, "one more", 60)  # type: ignore[misc]
                    processes[number % 2].kill()
                    processes[number % 2] = model.process(batch_events=20)
                until(lambda: not model.parked(), "all to be folded again", 90)
            finally:
                stop.set()
            for one in retrying:
                one.result()
            model.wait()
    finally:
        for process in processes:
            process.kill()
    assert not unexpected
    assert model.rows() == notes(world)


async def test_a_projector_that_knows_an_older_state_of_what_is_parked_cannot_write(world: World) -> None:
    model = await filled(world, subjects=2)  # s1 is parked
    rows = PostgresRows(world.dsn, namespace=NAMESPACE, name=model.name, version=model.version)
    rows.open()
    incarnation, partition, at = model.execute(
        "select o.incarnation, o.partition, o.position from {schema}.positions o join {schema}.parked p "
        "on p.incarnation = o.incarnation and p.partition = o.partition limit 1"
    )[0]
    ids = [row[0] for row in model.execute("select id from {schema}.parked order by position")]
    assert rows.positions([(incarnation, partition)])[incarnation, partition].unparked == 0
    here = Advance(incarnation, partition, at, at, None, None, None)
    before = model.rows()
    with pytest.raises(MovedError, match="parked still"):  # one that isn't parked
        rows.apply(
            [RowChange("s1", set={"note": "x"})], [], [here], Settled(incarnation, partition, [ids[0], 999], {}, False)
        )
    model.execute("update {schema}.pointer set live = null")
    with pytest.raises(MovedError, match="live"):
        rows.apply([RowChange("s1", set={"note": "x"})], [], [here], Settled(incarnation, partition, ids, {}, True))
    assert model.rows() == before
    assert len(model.parked()) == 2
    rows.apply([RowChange("s1", set={"note": "x"})], [], [here], Settled(incarnation, partition, ids, {}, False))
    assert not model.parked()
    with pytest.raises(MovedError):
        rows.apply([], [], [here])
    with pytest.raises(MovedError):
        rows.apply([], [], [here], Settled(incarnation, partition, ids, {}, False))
    rows.apply([], [], [Advance(incarnation, partition, at, at, None, None, None, 1)])
    rows.close()


async def test_what_is_of_another_version_than_the_live_one_has_to_be_named(world: World) -> None:
    model = await filled(world, subjects=2)
    newer = await world.projection(NOTES, "notes", rebuild="again")
    model.execute("update {schema}.pointer set live = %s", newer.version)
    with model.projector(), serve(model) as service:
        assert listed(service) == []
        first, _ = listed(service, f"?version={model.version}")
        answer = ask(service, "retry", first["id"])
        assert kind(answer) == (409, "version-swapped")
        assert answer.json()["version"] == model.version
        assert ask(service, "retry", first["id"], f"?version={model.version}").status == 200
        assert listed(service, f"?version={model.version}") == []
        assert kind(service.ask("/v1/parked?version=gone")) == (404, "version-not-found")


async def test_a_swap_between_asking_and_doing_refuses(world: World) -> None:
    model = await filled(world, subjects=2)
    newer = await world.projection(NOTES, "notes", rebuild="again")
    with serve(model) as service, ThreadPoolExecutor() as pool:
        first, _ = listed(service)
        answer = pool.submit(ask, service, "retry", first["id"])
        until(lambda: model.execute("select 1 from {schema}.parked where asked is not null") != [], "the mark")
        model.execute("update {schema}.pointer set live = %s", newer.version)
        with model.projector():
            assert kind(answer.result()) == (409, "version-swapped")
    assert len(model.parked()) == 2


async def test_without_a_projector_it_says_so_and_nothing_is_done_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await filled(world, subjects=2)
    monkeypatch.setattr(parked, "_PATIENCE_SECONDS", 0.5)
    with serve(model) as service:
        first, second = listed(service)
        with ThreadPoolExecutor() as pool:
            both = list(pool.map(lambda _: kind(ask(service, "discard", first["id"])), range(2)))
        assert sorted(both) == [(409, "parked-event-busy"), (504, "not-settled")]
        model.execute(  # whoever asked here died
            """update {{schema}}.parked set asked_at = now() - interval '31 s', """
            """asked = '{{"token": "t", "verb": "discard", "by": "x", "live": false}}' where id = %s""".replace(
                "{{schema}}", "{schema}"
            ),
            second["id"],
        )
        monkeypatch.setattr(parked, "_PATIENCE_SECONDS", 25)
        with model.projector():
            world.append([noted("s0"), noted("s1")])
            model.wait()
            assert len(listed(service)) == 3, "what nobody waits for isn't done"
            assert ask(service, "retry", first["id"]).status == 200
    assert model.rows() == notes(world)


async def test_pages_keys_and_what_cannot_be_asked(world: World) -> None:
    model = await filled(world, subjects=6)
    with serve(model) as service:
        everything = listed(service)
        assert len(everything) == 8
        page = service.ask("/v1/parked?limit=5").json()
        assert (page["version"], page["next"]) == (model.version, everything[4]["id"])
        rest = service.ask(f"/v1/parked?limit=5&after={page['next']}").json()
        assert (page["parked"] + rest["parked"], rest["next"]) == (everything, None)
        assert {one["key"] for one in listed(service, "?key=s4")} == {"s4"}
        for query in ["?limit=0", "?after=x", "?key=%00", "?where=a:eq:1", "?limit=1&limit=2", "?version=%00"]:
            assert service.ask(f"/v1/parked{query}").status == 400, query
        for id_ in ["x", "1.5", "-1", "99999999", "9" * 30]:
            assert kind(ask(service, "retry", id_)) == (404, "not-parked")
        assert service.ask("/v1/parked", token="").status == 401
        assert service.ask("/v1/parked/1:retry").status == 405


async def test_retrying_and_discarding_need_a_right_of_their_own(world: World, tmp_path: Any) -> None:
    model = await filled(world, subjects=2)
    with serve(model) as service:
        first, _ = listed(service)
    only = tokens_file(TOKEN, tmp_path)
    file = tmp_path / "tokens.yaml"
    file.write_text(file.read_text().replace('"verbs": ["*"]', '"verbs": ["get", "watch", "create"]'))
    settings = Settings.model_validate({"projection": f"{NAMESPACE}/notes", "readstore_dsn": world.dsn, "auth": only})
    with served.serve(app(settings), TOKEN) as service:
        assert len(listed(service)) == 2
        for verb in ("retry", "discard"):
            answer = ask(service, verb, first["id"])
            assert answer.status == 403
            assert "update projections/rows" in answer.json()["detail"]


async def test_a_read_model_of_an_earlier_refold_gets_what_it_lacks(world: World) -> None:
    model = await make(world, ORDERS, "order-status")
    model.execute("drop table {schema}.discarded")
    model.execute("alter table {schema}.positions drop column unparked")
    model.execute("alter table {schema}.parked drop column asked, drop column asked_at")
    model = await make(world, ORDERS, "order-status")
    world.append([("a", "Placed", {"items": 1})])
    with model.projector(**as_operator_makes_it(model)), serve(model) as service:
        model.wait()
        (only,) = listed(service)
        assert ask(service, "discard", only["id"]).status == 200


def again(definition: Definition, row: ParkedRow, events: Sequence[Any], parked_: Parked | None = None) -> Any:
    return fold_again(compile_fold(definition), row, row.entries, events, parked_ or Parked(), {})


async def test_an_event_of_several_rows_changes_only_the_one_that_it_is_folded_again_for(world: World) -> None:
    both = CUSTOMERS.model_copy(update={"key": "[data.customer, 'all']"})
    good = {"total": 2, "customer": "c1", "note": "n"}
    events = world.store([("a", "Placed", good), ("a", "Placed", {"customer": "c1"}), ("a", "Placed", good)])
    incarnation = world.streams["orders"].incarnation
    entries = [Entry(10 + event.position, event.position, "bad", None) for event in events]
    found = again(both, ParkedRow(incarnation, events[0].partition, "all", None, entries), events)
    assert [change.key for change in found.changes] == ["all"]
    assert [entry.id for entry in found.folded] == [11]
    assert "note" in found.error
    assert found.parked == []
    # of a subject all rows are changed, but for those that are parked themselves
    subject = ParkedRow(incarnation, events[0].partition, None, "a", entries[:1])
    known = Parked(rows={(incarnation, events[0].partition, "all")}, subjects={(incarnation, events[0].partition, "a")})
    found = again(both, subject, events[:1], known)
    assert [change.key for change in found.changes] == ["c1"]
    assert [(one.key, one.event.position) for one in found.parked] == [("all", 1)]
    assert (found.folded, found.error) == (entries[:1], None)
