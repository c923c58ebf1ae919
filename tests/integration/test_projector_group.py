"""Several projectors of one version: killed, frozen, and writing the same rows."""

import asyncio
import signal
from contextlib import ExitStack

import psycopg
import pytest
from refold.projection.fold import RowChange
from refold.projection.readstore import Advance, MovedError
from refold.projection.readstore.postgres_rows import PostgresRows

from hack.servers import Kafka
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


@pytest.fixture
async def world(database: str, kafka: Kafka) -> World:
    world = World(database, kafka)
    await world.install()
    await world.stream(partitions=6)
    return world


@pytest.fixture
async def orders(world: World) -> ReadModel:
    return await world.projection(ORDERS, "order-status")


@pytest.fixture
async def customers(world: World) -> ReadModel:
    return await world.projection(CUSTOMERS, "customers")


async def test_rows_are_right_when_projectors_are_killed_and_come_back(
    world: World, orders: ReadModel, customers: ReadModel
) -> None:
    world.append(random_events(2000))
    with ExitStack() as stack:
        group = [stack.enter_context(model.process(batch_events=50)) for model in (orders, customers) for _ in "ab"]
        for step in range(4):
            world.append(random_events(1500, seed=step))
            await asyncio.sleep(0.7)
            group[step].kill()
            group.append(stack.enter_context((orders, customers)[step // 2].process(batch_events=50)))
        orders.wait(60)
        customers.wait(60)
        assert orders.rows() == fold_orders(world)
        assert customers.rows() == fold_customers(world)


async def test_rows_that_are_read_before_they_are_written_are_right_too(world: World) -> None:
    histories = await world.projection(HISTORIES, "histories")
    world.append(random_events(1000))
    with ExitStack() as stack:
        group = [stack.enter_context(histories.process(batch_events=50)) for _ in "ab"]
        for step in range(2):
            world.append(random_events(1000, seed=step))
            await asyncio.sleep(0.7)
            group[step].kill()
            group.append(stack.enter_context(histories.process(batch_events=50)))
        frozen = group[2]
        frozen.send(signal.SIGSTOP)
        world.append(random_events(500, seed=7))
        histories.wait(60)
        frozen.send(signal.SIGCONT)
        world.append(random_events(500, seed=8))
        histories.wait(60)
    assert histories.rows() == fold_histories(world)
    assert not histories.parked()


_WAITING = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%%insert into%%'"


async def test_a_projector_that_was_frozen_past_its_session_does_no_harm(world: World, customers: ReadModel) -> None:
    with customers.process(batch_events=20) as frozen:
        world.append(random_events(100))
        customers.wait()
        with psycopg.connect(world.dsn) as conn:
            # its next batch waits for this lock, and with the positions locked it is frozen in the middle of it
            conn.execute(f'select from "{customers.schema}".rows_{customers.version} for update')
            world.append(random_events(3000, seed=2))
            until(lambda: customers.execute(_WAITING)[0][0] > 0, "the projector to wait for a row")
            frozen.send(signal.SIGSTOP)
        with customers.process() as other:
            customers.wait(60)
            world.append(random_events(100, seed=3))
            customers.wait()
            assert customers.rows() == fold_customers(world)
            frozen.send(signal.SIGCONT)
            world.append(random_events(500, seed=4))
            customers.wait()
            await asyncio.sleep(1)
            assert customers.rows() == fold_customers(world)
            assert other.terminate() == 0
            world.append(random_events(100, seed=5))
            customers.wait()  # the frozen one is a member again
        assert frozen.terminate() == 0
    assert customers.rows() == fold_customers(world)


async def test_two_projectors_add_to_the_same_rows_without_losing_any(world: World, customers: ReadModel) -> None:
    with customers.process(batch_events=7), customers.process(batch_events=11) as second:
        for seed in range(15):
            world.append(random_events(300, seed=seed))
        customers.wait(60)
        assert "Traceback" not in second.text
    assert customers.rows() == fold_customers(world)


async def test_partitions_move_without_loss_when_projectors_come_and_go(world: World, orders: ReadModel) -> None:
    with orders.process(batch_events=50) as first:
        world.append(random_events(500))
        orders.wait()
        with orders.process(batch_events=50) as second, orders.process(batch_events=50) as third:
            until(lambda: "Partitions assigned" in second.text and "Partitions assigned" in third.text, "a share")
            world.append(random_events(500, seed=2))
            assert first.terminate() == 0
            world.append(random_events(500, seed=3))
            orders.wait()
            assert second.terminate() == 0
            world.append(random_events(500, seed=4))
            orders.wait()
    assert orders.rows() == fold_orders(world)


async def test_a_former_owner_is_refused_by_the_read_store(world: World, orders: ReadModel) -> None:
    incarnation = world.streams["orders"].incarnation
    owner, former = (
        PostgresRows(world.dsn, namespace="shop", name=orders.name, version=orders.version) for _ in range(2)
    )
    owner.open()
    former.open()

    def step(before: int, after: int) -> list[Advance]:
        return [
            Advance(incarnation, 0, before, after, None, None, None),
            Advance(incarnation, 1, 0, 0, None, None, None),
        ]

    owner.apply([RowChange("a", merge={"items": 1})], [], step(0, 5))
    with pytest.raises(MovedError):
        former.apply([RowChange("a", merge={"items": 100})], [], step(0, 5))
    owner.apply([RowChange("a", merge={"items": 1})], [], step(5, 6))
    assert orders.rows()["a"]["items"] == 2
    assert orders.applied()[incarnation, 0] == 6
    owner.close()
    former.close()
