"""Kafka's own rates for records of one event each, without Refold: confluent-kafka alone."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, Producer, TopicPartition

from bench.orders import OrderEvent
from bench.result import Run


def produce(bootstrap: str, topic: str, events: Sequence[OrderEvent], *, typed: bool = False) -> Run:
    """Send all events by one idempotent producer (acks=all), key: the subject, and wait until all are acknowledged.

    With `typed`, each record has its event's type as a header.
    """
    producer = Producer({
        "bootstrap.servers": bootstrap, "enable.idempotence": True, "acks": "all", "partitioner": "murmur2_random",
    })  # fmt: skip
    producer.list_topics(topic, timeout=30)  # connected, and the partitions known, before the clock starts
    began = time.perf_counter()
    for event in events:
        headers: list[tuple[str, str | bytes | None]] | None = [("type", event.type)] if typed else None
        while True:
            with suppress(BufferError):
                producer.produce(topic, event.data, event.subject, headers=headers)
                break
            producer.poll(0.01)
    left = producer.flush(120)
    seconds = time.perf_counter() - began
    stored = sum(_ends(bootstrap, topic))
    if left or stored != len(events):
        raise RuntimeError(f"the limit sent {len(events)} records, {left} weren't answered, the topic holds {stored}")
    return Run(events_per_s=len(events) / seconds)


def consume(bootstrap: str, topic: str, count: int, *, isolation: str = "read_uncommitted") -> Iterator[list[Message]]:
    """Yield the first `count` records of `topic`, all partitions, in lists as they come.

    Raises:
        RuntimeError: nothing came for 30 s.
    """
    consumer = Consumer({
        "bootstrap.servers": bootstrap, "group.id": "bench", "enable.auto.commit": False, "isolation.level": isolation,
    })  # fmt: skip
    try:
        partitions = range(len(_described(consumer, topic)))
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in partitions])
        while count > 0:
            found = consumer.consume(10_000, 0.2)
            deadline = time.monotonic() + 30
            while not found:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{count} records of {topic} did not come for 30 s")
                found = consumer.consume(10_000, 0.2)
            for message in found:
                if (error := message.error()) is not None:
                    raise RuntimeError(f"{topic} can't be read: {error}")
            count -= len(found)
            yield found
    finally:
        consumer.close()


def _described(client: Any, topic: str) -> dict[int, Any]:
    partitions: dict[int, Any] = client.list_topics(topic, timeout=30).topics[topic].partitions
    return partitions


def _ends(bootstrap: str, topic: str) -> list[int]:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench"})
    try:
        return [
            consumer.get_watermark_offsets(TopicPartition(topic, partition), 30)[1]
            for partition in _described(consumer, topic)
        ]
    finally:
        consumer.close()
