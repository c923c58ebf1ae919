"""One projector: whatever the topic holds, the rows equal a plain fold of the history."""

import json
import threading
import time

import psycopg
import pytest
from prometheus_client import REGISTRY
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from refold import names
from refold.eventstore import roles
from refold.projection.definition import Column, Definition, FoldRule
from refold.projection.readstore import postgres as readstore

from hack.servers import Kafka, Postgres
from tests.projecting import (
    CUSTOMERS,
    HISTORIES,
    ORDERS,
    ReadModel,
    World,
    fold_customers,
    fold_histories,
    fold_orders,
    random_events,
    until,
)
from tests.records import headers


@pytest.fixture
async def orders(world: World) -> ReadModel:
    return await world.projection(ORDERS, "order-status")


def counted(name: str, **labels: str) -> float:
    """Return a counter of the projectors that ran in this process."""
    return REGISTRY.get_sample_value(f"refold_projector_{name}_total", {"stream": "shop/orders", **labels}) or 0.0


async def test_a_first_load_from_the_store_goes_over_into_the_topic(world: World, orders: ReadModel) -> None:
    world.append(random_events(500))
    with orders.projector(batch_events=70):
        orders.wait()
        world.append(random_events(300, seed=3))
        orders.wait()
    assert orders.rows() == fold_orders(world)


async def test_a_gap_in_the_topic_is_filled_from_the_store_at_once(world: World, orders: ReadModel) -> None:
    with orders.projector():
        world.append(random_events(30))
        orders.wait()
        before = counted("gaps", reason="gap")
        world.store(random_events(100, seed=2))  # never relayed
        world.append(random_events(300, seed=3))
        orders.wait()
    assert counted("gaps", reason="gap") - before == len(world.events["orders"])
    assert orders.rows() == fold_orders(world)


async def test_records_that_come_again_count_once_and_foreign_ones_not_at_all(world: World, orders: ReadModel) -> None:
    skipped, ignored = counted("skipped"), counted("ignored")
    with orders.projector():
        world.append([("before", "Placed", {"items": 1, "total": 1})])
        orders.wait()  # from here on everything comes from the topic
        events = world.store(random_events(60))
        world.relay(events)
        world.relay(events)  # again, as a relay never would
        world.produce_raw(0, b"{}", [])
        world.produce_raw(1, b'{"items": 5}', [("ce_position", b"x")])
        forged = headers(events[0], namespace="shop", name="orders", incarnation="f" * 16)
        world.produce_raw(2, b'{"items": 5}', forged)
        world.append(random_events(60, seed=2))
        orders.wait()
        assert orders.rows() == fold_orders(world)
    assert sum(orders.applied().values()) == 121
    assert counted("skipped") - skipped >= 60
    assert counted("ignored") - ignored == 3


async def test_the_logins_that_the_operator_makes_are_enough(world: World, orders: ReadModel) -> None:
    stream = world.streams["orders"]
    password = "p" * 32
    async with await AsyncConnection.connect(world.dsn, autocommit=True) as conn:
        database = conn.info.dbname
        reader = names.resource_role(database, stream.event_schema, "reader")
        login = f"{database}:store-login"
        await roles.ensure_login(conn, login, password, member_of=[reader, names.store_role(database, "heads")])
        await readstore.ensure_logins(
            conn, namespace="shop", name=orders.name, projector_password=password, query_password=password
        )
    projector = names.resource_role(database, orders.schema, "projector")
    world.append(random_events(100))
    world.append([("bad", "Placed", {})])
    with orders.projector(
        store_dsn=make_conninfo(world.dsn, user=login, password=password),
        readstore_dsn=make_conninfo(world.dsn, user=projector, password=password),
    ):
        orders.wait()
        world.append(random_events(100, seed=2))
        orders.wait()
    for log in world.events["orders"]:
        log[:] = [event for event in log if event.subject != "bad"]
    assert orders.rows() == fold_orders(world)
    assert [key for key, _, _ in orders.parked()] == ["bad"]


async def test_an_idle_group_shows_no_lag_in_kafka(world: World, orders: ReadModel) -> None:
    topic = world.streams["orders"].topic
    with orders.projector():
        for seed in range(3):
            world.append(random_events(20, seed=seed))
        orders.wait()

        def no_lag() -> bool:
            return all(offset == world.end_offset(topic, number) for (_, number), offset in orders.committed().items())

        until(no_lag, "committed offsets to reach the end, past transaction markers")


async def test_what_the_retention_took_from_the_topic_comes_from_the_store(world: World, orders: ReadModel) -> None:
    world.append(random_events(200))
    with orders.projector():
        orders.wait()
    world.append(random_events(300, seed=2))
    world.delete_records(keep=10)
    with orders.projector():
        orders.wait()
        world.append(random_events(20, seed=3))
        orders.wait()
    assert orders.rows() == fold_orders(world)


@pytest.mark.parametrize("hint", ["kafka_offset - 7", "kafka_offset + 9", "1000000", "null"])
async def test_a_wrong_hint_costs_time_only(world: World, orders: ReadModel, hint: str) -> None:
    world.append(random_events(60))
    with orders.projector():
        orders.wait()
    orders.execute(f"update {{schema}}.positions set kafka_offset = {hint}")
    world.append(random_events(60, seed=2))
    with orders.projector():
        orders.wait()
        world.append(random_events(30, seed=3))
        orders.wait()
    assert orders.rows() == fold_orders(world)


async def test_a_recreated_topic_loses_nothing(world: World, orders: ReadModel) -> None:
    world.append(random_events(200))
    with orders.projector():
        orders.wait()
    world.drop_topic()
    world.make_topic()
    world.append(random_events(30, seed=2))  # the new topic begins in the middle of history
    with orders.projector():
        orders.wait()
        world.drop_topic()  # while it is read
        world.make_topic()
        world.append(random_events(50, seed=3))
        orders.wait(60)
    assert orders.rows() == fold_orders(world)


async def test_events_that_never_reach_the_topic_are_read_from_the_store(world: World, orders: ReadModel) -> None:
    world.append(random_events(30))
    with orders.projector():
        orders.wait()
        late = world.store(random_events(30, seed=2))
        orders.wait(15)
        world.relay(late)
        world.append(random_events(30, seed=3))
        orders.wait()
    assert orders.rows() == fold_orders(world)


async def test_the_latest_event_decides_in_a_row_fed_by_several_partitions(world: World) -> None:
    model = await world.projection(CUSTOMERS, "customers")
    world.store(random_events(600))  # read one partition after the other, so the latest events don't come last
    with model.projector(batch_events=100):
        model.wait()
    assert model.rows() == fold_customers(world)


async def test_a_fold_that_looks_at_the_row_before_equals_the_plain_fold(world: World) -> None:
    model = await world.projection(HISTORIES, "histories")
    world.append(random_events(500))
    with model.projector(batch_events=70):
        model.wait()
        world.append(random_events(300, seed=3))
        model.wait()
    assert model.rows() == fold_histories(world)
    assert not model.parked()


async def test_one_event_changes_each_row_of_a_list_of_keys(world: World) -> None:
    both = CUSTOMERS.model_copy(update={"key": "[data.customer, data.customer + '/' + subject, data.customer]"})
    model = await world.projection(both, "both")
    world.append(random_events(200))
    with model.projector(batch_events=30):
        world.append(random_events(100, seed=2))
        model.wait()
    rows = model.rows()
    assert {key: row for key, row in rows.items() if "/" not in key} == fold_customers(world)
    for key, row in fold_customers(world).items():
        parts = [part for other, part in rows.items() if other.startswith(f"{key}/")]
        assert sum(part["events"] for part in parts) == row["events"]
        assert sum(part["spent"] for part in parts) == row["spent"]


async def test_one_process_folds_several_streams(world: World) -> None:
    await world.stream("returns", partitions=2)
    model = await world.projection(CUSTOMERS.model_copy(update={"streams": ["orders", "returns"]}), "customers")
    world.append(random_events(100))
    with model.projector():
        world.append(random_events(100, seed=2), "returns")
        model.wait()
    both = [fold_customers(world), fold_customers(world, "returns")]
    assert {key: row["events"] for key, row in model.rows().items()} == {
        key: sum(part.get(key, {"events": 0})["events"] for part in both) for key in both[0] | both[1]
    }


async def test_a_bad_event_parks_its_row_and_nothing_else(world: World, orders: ReadModel) -> None:
    world.append(random_events(50))
    bad = [
        ("order-1", "Placed", {"items": 1}),  # no total: the expression fails
        (
            "order-2",
            "Changed",
            {"items": 2**63 - 1, "total": 1},
        ),  # beyond 64 bits once it is added: refused by PostgreSQL
        ("order-2", "Changed", {"items": 2**63 - 1, "total": 1}),
    ]
    with orders.projector():
        orders.wait()
        before = fold_orders(world)
        world.append([*bad, *random_events(200, seed=2)])
        orders.wait()
    rows = orders.rows()
    for log in world.events["orders"]:
        log[:] = [event for event in log if event.subject not in ("order-1", "order-2")]
    expected = fold_orders(world)
    assert {key: row for key, row in rows.items() if key not in ("order-1", "order-2")} == expected
    assert rows["order-1"] == before["order-1"]
    parked = orders.parked()
    assert {key for key, _, _ in parked} == {"order-1", "order-2"}
    status = (await orders.status()).versions[orders.version]
    assert status.parked == len(parked) > 3
    assert not status.stopped


async def test_a_row_stays_parked_for_the_next_projector(world: World, orders: ReadModel) -> None:
    world.append([("a", "Placed", {"items": 1})])
    with orders.projector():
        orders.wait()
    world.append([("a", "Placed", {"items": 1, "total": 1}), ("b", "Placed", {"items": 1, "total": 1})])
    with orders.projector():
        orders.wait()
    assert list(orders.rows()) == ["b"]
    assert [key for key, _, _ in orders.parked()] == ["a", "a"]


async def test_beyond_the_bound_a_partition_stops_visibly_and_the_others_go_on(world: World, orders: ReadModel) -> None:
    world.append([("a", "Placed", {"items": 1})] * 3)
    here = world.events["orders"].index(next(log for log in world.events["orders"] if log))
    incarnation = world.streams["orders"].incarnation
    with orders.projector(parked_limit=5):
        orders.wait()
        world.append([("a", "Placed", {"items": 1})] * 5)
        world.append(random_events(100))
        until(
            lambda: all(
                orders.applied()[incarnation, number] == len(log)
                for number, log in enumerate(world.events["orders"])
                if number != here
            ),
            "the other partitions to go on",
        )
        until(lambda: orders.applied()[incarnation, here] == 5, "the partition to stop after its fifth parked event")

    status = (await orders.status()).versions[orders.version]
    assert len(status.stopped) == 1
    assert "more than 5 events" in status.stopped[0]
    assert "position 6" in status.stopped[0]
    with orders.projector(parked_limit=1000):  # more room lets it go on
        orders.wait()
    assert not (await orders.status()).versions[orders.version].stopped


async def test_heads_and_lag_stand_in_the_read_store(world: World, orders: ReadModel) -> None:
    world.append(random_events(60))

    def seen() -> bool:
        found = orders.execute(
            "select bool_and(head = position and lag_seconds = 0 and seen_at is not null) from {schema}.positions"
        )
        return bool(found[0][0])

    with orders.projector():
        orders.wait()
        until(seen, "heads")
        before = orders.execute("select seen_at from {schema}.positions order by partition")
        world.append([("a", "Placed", {"items": 1})])
        orders.wait()
        until(seen, "heads")
        after = orders.execute("select seen_at from {schema}.positions order by partition")
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 1, "idle partitions aren't written"


async def test_a_look_at_idle_heads_is_stored_now_and_then(world: World, orders: ReadModel) -> None:
    world.append(random_events(10))
    with orders.projector():
        orders.wait()
        unseen = "select count(*) from {schema}.positions where seen_at is null"
        until(lambda: orders.execute(unseen)[0][0] == 0, "a first look")
        (before,) = orders.execute("select max(seen_at) from {schema}.positions")[0]
        until(
            lambda: orders.execute("select min(seen_at) from {schema}.positions")[0][0] > before,
            "a look at every partition, though nothing changed",
        )


async def test_outages_of_postgresql_and_kafka_are_waited_out(
    world: World, orders: ReadModel, postgres: Postgres, kafka: Kafka
) -> None:
    with orders.projector():
        world.append(random_events(100))
        orders.wait()
        postgres.kill()
        postgres.start()
        world.append(random_events(100, seed=2))
        orders.wait()
        kafka.kill()
        world.store(random_events(50, seed=3))
        kafka.start()
        world.append(random_events(100, seed=4))
        orders.wait(60)
        postgres.restart()
        world.append(random_events(100, seed=5))
        orders.wait()
    assert orders.rows() == fold_orders(world)


async def test_text_of_every_kind_arrives_as_it_was(world: World) -> None:
    definition = Definition(
        streams=["orders"],
        columns=[
            Column(name="note", type="text"),
            Column(name="done", type="boolean"),
            Column(name="at", type="timestamp"),
            Column(name="raw", type="json"),
        ],
        fold=[
            FoldRule(type="Noted", set={"note": "data.note", "done": "data.done", "at": "event.time", "raw": "data"})
        ],
    )
    model = await world.projection(definition, "notes")
    notes = ["", "\\N", "tab\tand\nnewline\r\\", "ünï→💶", "'\"{}(),"]
    world.append([(f"s{number}", "Noted", {"note": note, "done": True}) for number, note in enumerate(notes)])
    world.append([("null", "Noted", {"note": None, "done": None})])
    with model.projector():
        model.wait()
    rows = model.rows()
    assert [rows[f"s{number}"]["note"] for number in range(len(notes))] == notes
    assert rows["null"]["note"] is None
    assert rows["s2"]["raw"] == {"note": notes[2], "done": True}
    times = {event.subject: event.time for log in world.events["orders"] for event in log}
    assert {key: row["at"] for key, row in rows.items()} == times
    assert json.dumps(rows["s4"]["done"]) == "true"


def share() -> float:
    return REGISTRY.get_sample_value("refold_projector_backfill_share") or 0.0


async def test_a_build_gives_way_to_a_live_version_that_lags_goes_on_all_the_same_and_catches_up(
    world: World, orders: ReadModel
) -> None:
    world.append(random_events(15_000))
    build = await world.projection(ORDERS, orders.name, rebuild="again")
    lagging = threading.Event()

    def live_version() -> None:
        """Behind and getting on, as its projectors would tell."""
        while lagging.is_set():
            orders.execute(
                "update {schema}.positions set position = position + 1, head = position + 100, lag_seconds = 5 "
                "where version = %s",
                orders.version,
            )
            time.sleep(0.1)

    lagging.set()
    thread = threading.Thread(target=live_version)
    thread.start()
    try:
        with build.projector(batch_events=10):
            until(lambda: share() == 0.125, "the build to give way")
            assert not build.caught_up(), "too few events for this test"
            slow = sum(build.applied().values())
            until(lambda: sum(build.applied().values()) > slow, "the build to go on")
            lagging.clear()
            until(lambda: share() == 1, "full speed")
            build.wait()
    finally:
        lagging.clear()
        thread.join()
    assert build.rows() == fold_orders(world)


async def test_reading_history_holds_no_transaction(world: World, orders: ReadModel) -> None:
    world.append(random_events(20_000))
    longest = 0.0
    with orders.projector(batch_events=500), psycopg.connect(world.dsn, autocommit=True) as conn:
        while not orders.caught_up():
            row = conn.execute(
                "select max(extract(epoch from clock_timestamp() - xact_start))::float8, count(distinct xact_start) "
                "from pg_stat_activity where application_name = 'refold projector history' and xact_start is not null"
            ).fetchone()
            assert row is not None
            longest = max(longest, row[0] or 0.0)
    began = orders.execute("select extract(epoch from clock_timestamp() - created_at)::float8 from {schema}.versions")
    assert longest < began[0][0] / 2, "a page a transaction, not one for the whole history"
