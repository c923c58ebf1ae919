"""Kafka's own rates for records of one event each, without Refold: confluent-kafka alone."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Self

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


def transactions(bootstrap: str, topic: str, events: Sequence[OrderEvent], *, rate: float) -> Run:
    """Send `rate` events a second, each in a transaction of its own; latency: from its begin until it is read."""
    producer = Producer({"bootstrap.servers": bootstrap, "transactional.id": topic, "linger.ms": 0})
    producer.init_transactions(30)
    began: dict[bytes, float] = {}

    def send(number: int) -> None:
        event = events[number]
        began[b"%d" % number] = time.perf_counter()
        producer.begin_transaction()
        producer.produce(topic, event.data, b"%d" % number)
        producer.commit_transaction(30)

    with Reader(bootstrap, topic, len(events), lambda message: message.key()) as reader:
        seconds = paced(send, len(events), rate=rate)
    return Run(
        events_per_s=len(events) / seconds,
        latencies_ms=[(reader.seen[key] - start) * 1000 for key, start in began.items()],
    )


def paced(send: Callable[[int], object], count: int, *, rate: float) -> float:
    """Call `send` with 0 to `count` - 1, at most `rate` times a second; return the seconds that it took."""
    began = time.perf_counter()
    for number in range(count):
        time.sleep(max(0.0, began + number / rate - time.perf_counter()))
        send(number)
    return time.perf_counter() - began


class Reader(threading.Thread):
    """Notes in `seen` when a `read_committed` consumer got each of `count` records, by what `key` makes of them.

    As a context manager it has begun at the topic's end on entry, and on exit it has read all.
    """

    def __init__(self, bootstrap: str, topic: str, count: int, key: Callable[[Any], Any]) -> None:
        super().__init__(daemon=True)
        self.seen: dict[Any, float] = {}
        self._key = key
        self._messages = consume(bootstrap, topic, count, isolation="read_committed", at_once=1)
        self._error: BaseException | None = None

    def run(self) -> None:
        """Read until all have come."""
        try:
            for messages in self._messages:
                now = time.perf_counter()
                for message in messages:
                    self.seen[self._key(message)] = now
        except RuntimeError as error:
            self._error = error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join(60)
        if self._error is not None:
            raise self._error


def consume(
    bootstrap: str, topic: str, count: int, *, isolation: str = "read_uncommitted", at_once: int = 10_000
) -> Iterator[list[Message]]:
    """Yield the first `count` records of `topic`, all partitions, in lists of up to `at_once` as they come.

    Raises:
        RuntimeError: nothing came for 30 s.
    """
    consumer = Consumer({
        "bootstrap.servers": bootstrap, "group.id": "bench", "enable.auto.commit": False, "isolation.level": isolation,
        "fetch.error.backoff.ms": 10,
    })  # fmt: skip
    try:
        partitions = range(len(_described(consumer, topic)))
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in partitions])
        while count > 0:
            found = consumer.consume(at_once, 0.2)
            deadline = time.monotonic() + 30
            while not found:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{count} records of {topic} did not come for 30 s")
                found = consumer.consume(at_once, 0.2)
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
