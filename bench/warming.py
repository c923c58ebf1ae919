"""A warm broker: one that was just started interprets its code, and compiles it beside what is measured."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

_TOPIC = "bench-warming"
_PARTITIONS = 6
#: Producers at once, each with a transaction after the other.
_PRODUCERS = 6


def warm(bootstrap: str, seconds: float) -> None:
    """Let the broker do for `seconds`, as fast as it can, what the latency workloads ask of it 200 times a second."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(_TOPIC, _PARTITIONS, 1)])[_TOPIC].result(30)
    until = time.monotonic() + seconds
    ended = threading.Event()
    with ThreadPoolExecutor(_PRODUCERS + 1) as workers:
        reading = workers.submit(_read, bootstrap, ended)
        writing = [workers.submit(_write, bootstrap, number, until) for number in range(_PRODUCERS)]
        for one in writing:
            one.result()
        ended.set()
        reading.result()
    admin.delete_topics([_TOPIC])[_TOPIC].result(30)


def _write(bootstrap: str, number: int, until: float) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "transactional.id": f"{_TOPIC}-{number}", "linger.ms": 0})
    producer.init_transactions(30)
    turn = 0
    while time.monotonic() < until:
        producer.begin_transaction()
        for partition in range(1 + turn % _PARTITIONS):
            producer.produce(_TOPIC, b"x" * 400, b"key", partition)
        producer.commit_transaction(30)
        time.sleep(0.003)  # else most requests are refused, since the transaction before isn't ended yet
        turn += 1


def _read(bootstrap: str, ended: threading.Event) -> None:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": _TOPIC, "isolation.level": "read_committed"})
    consumer.assign([TopicPartition(_TOPIC, partition) for partition in range(_PARTITIONS)])
    while not ended.is_set():
        consumer.consume(100, 0.1)
    consumer.close()
