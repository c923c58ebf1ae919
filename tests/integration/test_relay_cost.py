"""What relaying costs where nothing happens, and how fast it is after an outage of Kafka."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Consumer, TopicPartition
from refold import names

from hack.servers import Kafka, Postgres
from tests.relaying import World, ready, relay_world, until

_STREAMS = 100
_SECONDS = 10


@pytest.fixture
async def world(postgres: Postgres, database: str, kafka: Kafka, tmp_path: Path) -> AsyncIterator[World]:
    async with relay_world(postgres, database, kafka, tmp_path) as made:
        yield made


def ends(world: World, topics: list[str]) -> dict[tuple[str, int], int]:
    """Where each partition of the topics ends, markers of transactions included."""
    consumer = Consumer({"bootstrap.servers": world.kafka.bootstrap, "group.id": "test"})
    try:
        known = consumer.list_topics(timeout=10).topics
        return {
            (topic, partition): consumer.get_watermark_offsets(TopicPartition(topic, partition), 10)[1]
            for topic in topics
            for partition in known[topic].partitions
        }
    finally:
        consumer.close()


async def test_idle_streams_cost_a_query_a_second_and_nothing_in_kafka(world: World) -> None:
    streams = [await world.stream(f"idle{number}", partitions=1) for number in range(_STREAMS)]
    for stream in streams[:10]:
        world.append(stream, 10)
    relay = world.relay()
    ready(relay)
    world.verify(*streams[:10])
    async with world.admin.cursor() as cursor:
        await cursor.execute("select id from refold.store")
        row = await cursor.fetchone()
    assert row is not None
    topics = [*(stream.topic for stream in streams), names.checkpoint_topic(row[0])]

    def transactions() -> int:
        """Those of this database, each of which is a statement of the relay: nobody else is connected meanwhile."""
        with psycopg.connect(world.server_dsn, autocommit=True) as connection:
            found = connection.execute(
                "select xact_commit + xact_rollback from pg_stat_database where datname = %s",
                [world.admin.info.dbname],
            ).fetchone()
        assert found is not None
        return int(found[0])

    await asyncio.sleep(3)  # sessions report what they did with a delay of a second
    kafka_before = ends(world, topics)
    costs = []
    for _ in range(2):  # autovacuum may come into one of them
        before = transactions()
        await asyncio.sleep(_SECONDS)
        costs.append(transactions() - before)
    print(f"{costs} queries in {_SECONDS} s")
    assert 0 < min(costs) <= _SECONDS + 2
    assert ends(world, topics) == kafka_before


async def test_appends_go_on_while_kafka_is_away_and_are_relayed_at_full_speed_when_it_is_back(
    world: World, kafka: Kafka
) -> None:
    stream, other = await world.stream("outage"), await world.stream("quiet")
    relay = world.relay()
    ready(relay)

    def seconds(count: int) -> float:
        """Return how long it takes until `count` events are relayed in all."""
        began, label = time.monotonic(), f'refold_relay_events_total{{stream="{world.namespace}/outage"}}'
        until(lambda: relay.metric(label) >= count, f"{count} events are relayed", within=120)
        return time.monotonic() - began

    world.append(stream, 20_000, size=300)
    seconds(20_000)
    kafka.kill()
    world.append(stream, 10_000, size=300)
    await asyncio.sleep(5)  # long enough for the relay to back off
    world.append(stream, 10_000, size=300)
    world.append(other, 100)
    kafka.start()
    after = seconds(40_000)
    began = time.monotonic()
    world.append(stream, 20_000, size=300)
    appending = time.monotonic() - began
    seconds(60_000)
    usual = time.monotonic() - began
    print(f"20,000 events: {after:.1f} s after the outage, {usual:.1f} s without one ({appending:.1f} s of appending)")
    assert after < usual + 20  # the longest back-off, a login, and what else a broker needs that has just started
    world.verify(stream, other)
