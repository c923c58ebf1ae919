"""The relay against a real PostgreSQL and a real Kafka, as processes that are killed, stopped and resumed."""

import asyncio
import random
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)
from psycopg import sql
from refold.eventstore import catalog

from hack.servers import Kafka, Postgres
from tests.relaying import RelayProcess, World, ready, relay_world, until


@pytest.fixture
async def world(postgres: Postgres, database: str, kafka: Kafka, tmp_path: Path) -> AsyncIterator[World]:
    async with relay_world(postgres, database, kafka, tmp_path) as made:
        yield made


async def test_every_event_reaches_the_topic_once_and_in_order(world: World) -> None:
    first, second = await world.stream("first"), await world.stream("second", partitions=1, topic_partitions=2)
    world.append(first, 5000)
    relay = world.relay()
    world.append(second, 100)
    world.verify(first, second)
    assert relay.metric(f'refold_relay_events_total{{stream="{world.namespace}/first"}}') == 5000
    until(lambda: relay.metric(f'refold_relay_lag_events{{stream="{world.namespace}/first"}}') == 0, "no lag is shown")
    assert relay.get("/readyz") == (200, "ok\n")


async def test_a_stream_that_appears_is_relayed_and_one_that_is_released_is_not(world: World) -> None:
    relay = world.relay()
    ready(relay)
    stream = await world.stream("late")
    world.append(stream, 10)
    world.verify(stream)
    await catalog.release_stream(world.admin, stream)
    lag = f'refold_relay_lag_events{{stream="{world.namespace}/late"}}'
    until(lambda: lag not in relay.get("/metrics")[1], "the stream is forgotten")


async def test_the_official_package_reads_a_record_as_a_cloud_event(world: World) -> None:
    stream = await world.stream("official", partitions=1)
    world.append(stream, 2)
    world.relay()
    world.verify(stream)
    for message, (position, subject, revision, id_, *_) in zip(
        world.messages(stream.topic), world.history(stream)[0], strict=True
    ):
        headers = dict(message.headers() or [])
        event = from_binary(KafkaMessage(headers, message.key(), message.value()), JSONFormat(), CloudEvent)
        assert event.get_specversion() == "1.0"
        assert event.get_type() == "Counted"
        assert event.get_id() == id_
        assert event.get_subject() == subject
        assert event.get_source() == f"/{world.namespace}/official/{subject.replace('/', '%2F').replace('ü', '%C3%BC')}"
        assert event.get_datacontenttype() == "application/json"
        assert event.get_extension("position") == str(position)
        assert event.get_extension("revision") == str(revision)
        assert event.get_data()["number"] in range(2)


async def test_relays_that_are_killed_at_any_time_lose_and_double_nothing(world: World) -> None:
    streams = [await world.stream(f"kill{number}") for number in range(3)]
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    running = [world.relay(), world.relay()]

    def owner() -> RelayProcess | None:
        return next((relay for relay in running if relay.metric('refold_relay_shard_held{shard="0"}')), None)

    for _ in range(6):
        until(owner, "a relay holds shard 0")
        for stream in streams:
            world.append(stream, 1000, size=300)
        await asyncio.sleep(chance.uniform(0, 0.3))
        victim = owner()
        if victim is not None:
            victim.kill()
            running.remove(victim)
            running.append(world.relay())
    world.verify(*streams)
    killed = [relay for relay in world.relays if relay not in running]
    assert len([relay for relay in killed if "The shard was taken over" in relay.log.read_text()]) >= 5


async def test_a_relay_that_was_stopped_past_its_lock_is_fenced_when_it_goes_on(world: World) -> None:
    streams = [await world.stream(f"stop{number}") for number in range(2)]
    zombie = world.relay()
    ready(zombie)
    heir = world.relay()
    for stream in streams:
        world.append(stream, 10000, size=300)
    await asyncio.sleep(0.2)
    zombie.send(signal.SIGSTOP)
    until(lambda: heir.held() == {0, 1}, "the other relay takes over", within=10)
    world.append(streams[0], 1000)
    zombie.send(signal.SIGCONT)
    for stream in streams:
        world.append(stream, 1000)
    world.verify(*streams)
    until(lambda: len(zombie.held()) == len(heir.held()) == 1, "the zombie has a fair share again")
    assert zombie.held() != heir.held()


async def test_it_outlives_restarts_of_kafka_and_postgresql(world: World, kafka: Kafka, postgres: Postgres) -> None:
    stream = await world.stream("outage")
    relay = world.relay()
    ready(relay)
    world.append(stream, 5000, size=300)
    await asyncio.sleep(0.1)
    kafka.kill()
    world.append(stream, 5000, size=300)
    kafka.start()
    world.append(stream, 5000, size=300)
    world.verify(stream)
    postgres.kill()
    postgres.start()
    world.append(stream, 5000)
    world.verify(stream)
    assert relay.process.poll() is None


async def test_sigterm_ends_it_with_0_and_frees_its_shards_at_once(world: World) -> None:
    stream = await world.stream("stopped")
    relay = world.relay()
    ready(relay)
    world.append(stream, 20000)
    await asyncio.sleep(0.1)
    relay.send(signal.SIGTERM)
    assert relay.process.wait(15) == 0
    world.relay()
    world.verify(stream)


async def test_a_topic_that_was_created_again_is_filled_from_the_beginning(world: World) -> None:
    stream, other = await world.stream("again"), await world.stream("other")
    relay = world.relay()
    world.append(stream, 1000)
    world.append(other, 1000)
    world.verify(stream, other)
    world.delete_topic(stream.topic)
    refused = f'refold_relay_refused{{reason="TopicMissing",stream="{stream.namespace}/again"}}'
    world.append(stream, 10)
    until(lambda: relay.metric(refused) == 1, "the missing topic is shown")
    world.append(other, 10)
    world.verify(other)
    world.create_topic(stream.topic, 3)
    world.verify(stream)
    until(lambda: refused not in relay.get("/metrics")[1], "the refusal is over")


async def test_a_topic_that_is_created_again_while_events_flow_never_gets_a_part(world: World) -> None:
    stream = await world.stream("swift")
    world.relay()
    for _ in range(3):
        world.append(stream, 3000)
        world.delete_topic(stream.topic)
        world.create_topic(stream.topic, 3)
        world.append(stream, 100)
    world.verify(stream)


async def test_a_record_that_its_topic_refuses_holds_up_its_own_stream_only(world: World) -> None:
    good, bad = await world.stream("good"), await world.stream("bad", partitions=1)
    world.delete_topic(bad.topic)
    world.create_topic(bad.topic, 1, **{"max.message.bytes": "20000"})
    world.append(bad, 300, size=500)  # one batch of them is too large, each is not
    world.append(good, 300)
    relay = world.relay()
    world.verify(bad, good)
    world.append(bad, 5)
    with psycopg.connect(world.dsn, autocommit=True) as connection:  # random, so that it isn't compressed
        large = {"id": "large", "type": "T", "data": secrets.token_hex(40000)}
        world.call_append(connection, bad, [{"subject": "s", "events": [large]}])
    world.append(bad, 5)
    world.append(good, 300)
    refused = f'refold_relay_refused{{reason="RecordTooLarge",stream="{bad.namespace}/bad"}}'
    until(lambda: relay.metric(refused) == 1, "the refusal is shown")
    world.verify(good)
    assert [fact[0] for fact in world.relayed(bad)[0]] == list(range(1, 306))
    held_back = [line for line in relay.logged() if line["event"] == "A stream is held back"]
    assert "position 306 of partition 0 (subject 's')" in held_back[-1]["message"]


async def test_a_topic_of_too_few_partitions_is_refused(world: World) -> None:
    stream = await world.stream("few", partitions=3, topic_partitions=2)
    relay = world.relay()
    world.append(stream, 100)
    refused = f'refold_relay_refused{{reason="TooFewPartitions",stream="{stream.namespace}/few"}}'
    until(lambda: relay.metric(refused) == 1, "the refusal is shown")
    assert world.messages(stream.topic) == []


async def test_a_store_behind_its_topic_stops_the_stream_until_the_topic_is_made_anew(world: World) -> None:
    stream, other = await world.stream("behind", partitions=1), await world.stream("sound")
    relay = world.relay()
    world.append(stream, 100)
    world.verify(stream)
    with psycopg.connect(world.dsn) as connection:  # as if the store had been restored from a backup
        connection.execute(
            sql.SQL(
                "alter table {0} disable trigger all; delete from {0} where position > 60; "
                "alter table {0} enable always trigger append_only"
            ).format(sql.Identifier(stream.schema, "events_0"))
        )
        connection.execute("update refold.heads set head = 60 where stream = %s", [stream.stream])
    refused = f'refold_relay_refused{{reason="StoreBehindTopic",stream="{stream.namespace}/behind"}}'
    until(lambda: relay.metric(refused) == 1, "the refusal is shown")
    world.append(stream, 100)  # the head is beyond the checkpoint again, with other events
    world.append(other, 100)
    relay.kill()
    heir = world.relay()
    until(lambda: heir.metric(refused) == 1, "the refusal is known to the next owner")
    world.verify(other)
    assert len(world.messages(stream.topic)) == 100
    world.delete_topic(stream.topic)
    world.create_topic(stream.topic, 1)
    world.verify(stream)


async def test_another_number_of_shards_than_the_store_has_is_refused(world: World) -> None:
    ready(world.relay())
    world.relays[0].kill()
    other = world.relay(REFOLD_RELAY_SHARDS="3")
    until(lambda: "REFOLD_RELAY_SHARDS is 3" in other.log.read_text(), "the log says what is wrong")
    assert other.get("/readyz")[0] == 503


async def test_a_topic_that_may_not_be_written_to_holds_up_its_own_stream_only(world: World) -> None:
    broker = Kafka(
        settings={
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "true",
        }
    )
    broker.start()
    try:
        world.use(broker)
        good, other, bad = [await world.stream(name) for name in ("good", "other", "forbidden")]
        for stream in (good, other, bad):
            world.append(stream, 100)

        def forbid() -> None:
            rules = [
                AclBinding(
                    ResourceType.TOPIC, bad.topic, ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", operation,
                    permission,
                )
                for operation, permission in [
                    (AclOperation.WRITE, AclPermissionType.DENY),
                    (AclOperation.READ, AclPermissionType.ALLOW),
                ]
            ]  # fmt: skip
            for made in world.kafka_admin.create_acls(rules).values():
                made.result(10)

        def allow() -> None:
            rule = AclBindingFilter(
                ResourceType.TOPIC, bad.topic, ResourcePatternType.LITERAL, None, None, AclOperation.ANY,
                AclPermissionType.ANY,
            )  # fmt: skip
            for deleted in world.kafka_admin.delete_acls([rule]).values():
                deleted.result(10)

        forbid()
        relay = world.relay()
        refused = f'refold_relay_refused{{reason="TopicForbidden",stream="{world.namespace}/forbidden"}}'
        until(lambda: relay.metric(refused) == 1, "the refusal is shown")
        world.append(good, 100)
        world.verify(good, other)
        assert world.messages(bad.topic) == []
        allow()
        world.verify(bad)

        # now the relay learns it in the middle of a transaction, together with another stream of the shard
        forbid()
        world.append(bad, 20000)  # so many that it is told while they are being sent
        for stream in (good, other):
            world.append(stream, 100)
        world.verify(good, other)
        until(lambda: relay.metric(refused) == 1, "the refusal is shown again")
        assert len(world.messages(bad.topic)) == 100
        allow()
        world.verify(bad)
    finally:
        broker.remove()


async def test_it_waits_for_a_store_that_is_not_installed_yet(
    database: str, postgres: Postgres, kafka: Kafka, tmp_path: Path
) -> None:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        world = World(database, database, kafka, tmp_path, admin)
        relay = world.relay()
        try:
            until(lambda: relay.get("/readyz")[0] == 503, "the relay isn't ready")
            assert "isn't installed" in relay.get("/readyz")[1]
            assert relay.get("/healthz")[0] == 200
            await catalog.install_store(admin)
            stream = await world.stream("early")
            world.append(stream, 10)
            world.verify(stream)
        finally:
            relay.kill()
