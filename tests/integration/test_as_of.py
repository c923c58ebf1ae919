"""A read model as it was at a moment: where each partition ended then, and a projector that stops there."""

import asyncio
import datetime as dt
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection
from refold.eventstore import catalog
from refold.projection.definition import Definition

from tests.projecting import (
    CUSTOMERS,
    NAMESPACE,
    ORDERS,
    ReadModel,
    World,
    fold_customers,
    fold_orders,
    random_events,
    until,
)


def as_of(definition: Definition, moment: dt.datetime) -> Definition:
    return definition.model_copy(update={"as_of": moment})


def forget_later(world: World, moment: dt.datetime) -> None:
    """Let the reference know only what was recorded until `moment`."""
    for log in world.events["orders"]:
        log[:] = [event for event in log if event.time <= moment]


async def test_positions_at_a_moment_are_those_of_the_last_events_until_then(world: World) -> None:
    assert await world.positions_at(dt.datetime.now(dt.UTC)) == [0, 0, 0]
    for seed in range(3):
        world.store(random_events(40, seed=seed))
        await asyncio.sleep(0.01)
    times = sorted(event.time for log in world.events["orders"] for event in log)
    tick = dt.timedelta(microseconds=1)
    for moment in (times[0] - tick, times[0], times[39], times[40] - tick, times[57], times[-1], times[-1] + tick):
        expected = [sum(event.time <= moment for event in log) for log in world.events["orders"]]
        assert await world.positions_at(moment) == expected


async def test_a_moment_that_has_not_passed_has_no_positions_yet(world: World) -> None:
    async with await AsyncConnection.connect(world.dsn, autocommit=True) as conn:
        stream = await catalog.get_stream(conn, NAMESPACE, "orders")
        assert stream is not None
        later = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
        assert await catalog.positions_at(conn, stream, later) is None


async def test_an_append_that_is_recorded_before_the_moment_and_commits_after_it_counts(world: World) -> None:
    world.store(random_events(30))
    before = await world.positions_at(dt.datetime.now(dt.UTC))
    with psycopg.connect(world.dsn) as append:
        # as an append does: the head's lock, then the time
        append.execute(
            "update refold.heads h set head = head + 1, recorded_at = clock_timestamp() from refold.streams s "
            "where s.stream = h.stream and s.name = 'orders' and partition = 1"
        )
        append.execute(
            f'insert into "{world.streams["orders"].event_schema}".events '
            "(partition, position, subject, revision, id, type, data, recorded_at) "
            "select 1, head, 's', 1, 'i', 'Placed', '{}', recorded_at from refold.heads where partition = 1"
        )
        await asyncio.sleep(0.01)
        asked = asyncio.create_task(world.positions_at(dt.datetime.now(dt.UTC)))
        await asyncio.sleep(0.3)
        assert not asked.done(), "the answer would lack what is about to be committed"
        append.commit()
    assert await asked == [before[0], before[1] + 1, before[2]]


async def test_an_append_that_waited_while_the_answer_was_read_is_recorded_after_the_moment(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = world.streams["orders"].event_schema
    lock_heads = catalog._lock_heads
    appends: list[asyncio.Task[None]] = []
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)

    def append() -> None:
        with psycopg.connect(world.dsn, autocommit=True) as conn:
            conn.execute(
                f"select \"{schema}\".append_one(stream, 1, 's', 0, 'i', 'Placed', '{{}}', null) "
                "from refold.streams where name = 'orders'"
            )

    async def hold(conn: AsyncConnection[Any], streams: Sequence[catalog.Stream]) -> None:
        await lock_heads(conn, streams)
        appends.append(asyncio.create_task(asyncio.to_thread(append)))
        waiting = "select from pg_stat_activity where wait_event_type = 'Lock' and query like '%append_one(%'"
        async with await AsyncConnection.connect(world.dsn, autocommit=True) as other:
            while not await (await other.execute(waiting)).fetchall():
                assert not appends[0].done()
        assert dt.datetime.now(dt.UTC) < moment, "its clock was read before the moment"
        await asyncio.sleep((moment - dt.datetime.now(dt.UTC)).total_seconds() + 0.01)

    monkeypatch.setattr(catalog, "_lock_heads", hold)
    assert await world.positions_at(moment) == [0, 0, 0]
    await appends[0]
    monkeypatch.undo()
    assert await world.positions_at(moment) == [0, 0, 0], "the answer was final"
    assert await world.positions_at(dt.datetime.now(dt.UTC)) == [0, 1, 0]


@pytest.mark.parametrize(("definition", "reference"), [(ORDERS, fold_orders), (CUSTOMERS, fold_customers)])
async def test_the_read_model_is_the_fold_until_the_moment_and_stays_so(
    world: World, definition: Definition, reference: object
) -> None:
    world.append(random_events(500, purge=False))
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(milliseconds=5)  # events have a microsecond each
    await asyncio.sleep(0.05)
    world.append(random_events(300, seed=2, purge=False))
    model = await world.projection(as_of(definition, moment), "then")
    with model.projector(batch_events=37):
        until(lambda: complete(model), "the read model to be complete")
        world.append(random_events(200, seed=3, purge=False))
        await asyncio.sleep(3)  # it looks at the heads and hears the topic's events
    forget_later(world, moment)
    assert sum(model.applied().values()) == sum(len(log) for log in world.events["orders"]) == 500
    assert model.rows() == reference(world)  # type: ignore[operator]
    status = (await model.status()).versions[model.version]
    assert status.complete
    assert status.lag_events == 0


async def test_projectors_that_are_killed_while_they_build_it_leave_the_same(world: World) -> None:
    world.append(random_events(4000))
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(milliseconds=10)
    await asyncio.sleep(0.05)
    world.append(random_events(1000, seed=2))
    model = await world.projection(as_of(ORDERS, moment), "then")
    reached = 0
    for _ in range(2):
        process = model.process(batch_events=20)
        until(lambda reached=reached: sum(model.applied().values()) > reached, "some to be folded")
        process.kill()
        reached = sum(model.applied().values())
    with model.projector():
        until(lambda: complete(model), "the read model to be complete")
    forget_later(world, moment)
    assert sum(model.applied().values()) == 4000
    assert model.rows() == fold_orders(world)


async def test_what_ended_before_the_first_event_is_complete_and_empty(world: World) -> None:
    moment = dt.datetime.now(dt.UTC)
    await asyncio.sleep(0.01)
    world.append(random_events(50))
    model = await world.projection(as_of(ORDERS, moment), "then")
    assert (await model.status()).versions[model.version].complete, "before any projector ran"
    with model.projector():
        await asyncio.sleep(8)
    assert model.rows() == {}


def complete(model: ReadModel) -> bool:
    found = model.execute(
        "select bool_and(position >= head), sum(head) from {schema}.positions where version = %s", model.version
    )
    return bool(found[0][0]) and found[0][1] > 0
