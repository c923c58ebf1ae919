"""The largest event that the event store accepts gets into a topic that takes no byte more than it must."""

import asyncio
import random
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from refold.eventstore import EventStore, Limits, NewEvent, records
from refold.eventstore.catalog import Stream
from refold.eventstore.errors import TooLargeError

from hack.servers import Kafka, Postgres
from hack.servers.platform import Platform, Service
from tests.stores import raw

LIMITS = Limits()
TRACE = '{"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01","digits":['


@pytest.fixture(scope="module")
def platform(postgres: Postgres, kafka: Kafka) -> Platform:
    return Platform(postgres, kafka, store_database="largest_store", read_database="largest_read")


@pytest.fixture
def relay(platform: Platform) -> Iterator[Service]:
    service = platform.relay()
    service.up()
    yield service
    service.stop()


def digits(size: int, opening: str, closing: str) -> str:
    """Return a JSON text of `size` bytes that jsonb makes half as large again, for each comma gets a blank."""
    numbers = random.Random(1)
    room = size - len(opening) - len(closing)
    text = ",".join(str(numbers.randrange(1, 10)) for _ in range((room + 1) // 2))
    return f"{opening}{text}{'' if room % 2 else '1'}{closing}"


def tighten(kafka: Kafka, topic: str) -> None:
    """Let the topic take records of the size that an event needs at least, measured as they are, not compressed."""
    wanted = {"max.message.bytes": str(records.message_bytes(LIMITS.event_bytes)), "compression.type": "uncompressed"}
    entries = [ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in wanted.items()]
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.incremental_alter_configs([resource])[resource].result(30)


def one_message(kafka: Kafka, topic: str) -> tuple[bytes, dict[str, bytes]]:
    """Return value and headers of the topic's first message."""
    settings = {"bootstrap.servers": kafka.bootstrap, "group.id": topic, "isolation.level": "read_committed"}
    consumer = Consumer({**settings, "auto.offset.reset": "earliest"})
    try:
        consumer.subscribe([topic])
        message = consumer.poll(60)
        assert message is not None
        assert message.error() is None
        return message.value(), dict(message.headers())
    finally:
        consumer.close()


def test_the_largest_event_that_is_accepted_is_relayed(platform: Platform, kafka: Kafka, relay: Service) -> None:
    stream = platform.stream("shop", "largest", partitions=1)
    tighten(kafka, stream.topic)
    metadata = digits(LIMITS.metadata_bytes, TRACE, "]}")
    data = digits(LIMITS.event_bytes - LIMITS.metadata_bytes, "[", "]")
    assert len(data) + len(metadata) == LIMITS.event_bytes

    async def append(stream: Stream) -> None:
        async with await EventStore.open(platform.store_dsn()) as store:
            name = stream.namespace, stream.name
            with pytest.raises(TooLargeError, match="eventBytes is 524288"):
                await store.append(*name, "s", [NewEvent("i", "t", raw(data + " "), raw(metadata))])
            with pytest.raises(TooLargeError, match="metadataBytes is 65536"):
                await store.append(*name, "s", [NewEvent("i", "t", raw("1"), raw(metadata + " "))])
            # 3 bytes each, which are 9 in ce_source
            await store.append(*name, "é日" * 102, [NewEvent("日" * 85, "日" * 85, raw(data), raw(metadata))])

    asyncio.run(append(stream))
    value, headers = one_message(kafka, stream.topic)
    assert len(value) > 1.49 * len(data)
    assert len(headers["ce_metadata"]) > 1.49 * (len(metadata) - len(TRACE))
    assert headers["traceparent"].startswith(b"00-0af7")


def test_a_long_text_for_a_trace_context_makes_the_record_no_larger(
    platform: Platform, kafka: Kafka, relay: Service
) -> None:
    stream = platform.stream("shop", "traced", partitions=1)
    tighten(kafka, stream.topic)
    data = digits(LIMITS.event_bytes - LIMITS.metadata_bytes, "[", "]")
    metadata = '{"traceparent":"' + "0" * (LIMITS.metadata_bytes - 18) + '"}'

    async def append() -> None:
        async with await EventStore.open(platform.store_dsn()) as store:
            await store.append("shop", "traced", "s", [NewEvent("i", "t", raw(data), raw(metadata))])

    asyncio.run(append())
    _, headers = one_message(kafka, stream.topic)
    assert "traceparent" not in headers
    assert len(headers["ce_metadata"]) == len(metadata) + 1
