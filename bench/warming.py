"""A warm broker: one that was just started compiles its code beside what is measured.

The JVM's second compiler takes half a core of two for some two minutes, whatever the load is: the first measurement of
latencies would have it beside it, and a later one, of the limit or of the measured thing, would not.
"""

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

_TOPIC = "bench-warming"
_PARTITIONS = 6
#: Producers at once, each with a transaction after the other; few, so that there is CPU left to compile with.
_PRODUCERS = 3
#: Warm is a broker whose compilers take less than this part of a core for so many seconds.
_RESTING, _LOOK_SECONDS = 0.06, 10.0
_LONGEST_SECONDS = 300.0


def warm(bootstrap: str, compiled: Callable[[], float]) -> None:
    """Let the broker do what the latency workloads ask of it, until it compiles hardly anything, or for 5 minutes.

    Args:
        bootstrap: the broker.
        compiled: returns the seconds of CPU that its compilers have taken so far.
    """
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(_TOPIC, _PARTITIONS, 1)])[_TOPIC].result(30)
    ended = threading.Event()
    with ThreadPoolExecutor(_PRODUCERS + 1) as workers:
        working = [workers.submit(_read, bootstrap, ended)]
        working += [workers.submit(_write, bootstrap, number, ended) for number in range(_PRODUCERS)]
        try:
            _wait(compiled, lambda: any(one.done() for one in working))
        finally:
            ended.set()
        for one in working:
            one.result()
    admin.delete_topics([_TOPIC])[_TOPIC].result(30)


def _wait(compiled: Callable[[], float], failed: Callable[[], bool]) -> None:
    longest, share = time.monotonic() + _LONGEST_SECONDS, 1.0
    while share > _RESTING and time.monotonic() < longest and not failed():
        before, began = compiled(), time.monotonic()
        time.sleep(_LOOK_SECONDS)
        share = (compiled() - before) / (time.monotonic() - began)
        print(f"warming the broker: its compilers take {share:.2f} of a core", file=sys.stderr, flush=True)


def _write(bootstrap: str, number: int, ended: threading.Event) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "transactional.id": f"{_TOPIC}-{number}", "linger.ms": 0})
    producer.init_transactions(30)
    turn = 0
    while not ended.is_set():
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
