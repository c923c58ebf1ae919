"""`read_committed` consumers that tell when each event was read: of few partitions, or of very many."""

import contextlib
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, TopicPartition
from refold.eventstore.catalog import Stream

#: Seconds by which a partition is announced before its event is sent: a consumer asks for it in its next request.
AHEAD = 0.4
_LONGEST_REQUEST = 0.1
#: A request lists all partitions of its consumer, and each event that arrives ends one: few partitions make it cheap.
_CONSUMERS = 4

_Partition = tuple[str, int]


def _consumer(bootstrap: str, settings: Mapping[str, str | int]) -> Consumer:
    return Consumer({
        "bootstrap.servers": bootstrap, "group.id": "bench", "enable.auto.commit": False,
        "isolation.level": "read_committed", "fetch.error.backoff.ms": 10, **settings,
    })  # fmt: skip


class _Threads:
    """Reads in threads while entered as a context; `seen` tells when each event was read, by its id."""

    def __init__(self, *reads: Callable[[], None]) -> None:
        self.seen: dict[str, float] = {}
        self._reads = reads
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def _saw(self, message: Message) -> None:
        headers: dict[str, Any] = dict(message.headers() or [])
        self.seen[headers["ce_id"].decode()] = time.perf_counter()

    def __enter__(self) -> Self:
        self._ended.clear()
        self._threads = [threading.Thread(target=read) for read in self._reads]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)


class Readers(_Threads):
    """One consumer of all partitions of some streams."""

    def __init__(self, bootstrap: str, streams: Sequence[Stream]) -> None:
        """Begin at the beginning of the topics, when entered as a context."""
        super().__init__(self._read)
        self._bootstrap, self._streams = bootstrap, streams

    def _read(self) -> None:
        consumer = _consumer(self._bootstrap, {})
        consumer.assign([
            TopicPartition(stream.topic, partition, OFFSET_BEGINNING)
            for stream in self._streams for partition in range(stream.partitions)
        ])  # fmt: skip
        with contextlib.closing(consumer):
            while not self._ended.is_set():
                message = consumer.poll(0.5)
                if message is not None and message.error() is None:
                    self._saw(message)


class Followers(_Threads):
    """Consumers of very many partitions, each read while an event of it is announced and unread.

    A consumer of thousands of partitions asks the broker for all of them again after every event, which would take
    more time than what is measured; services don't read like that either. `seen` tells when each event was read, by
    its id. Offsets are kept here, and stay for the next use: topics must be new at the first one.
    """

    def __init__(self, bootstrap: str) -> None:
        """Read when entered as a context."""
        self._announced: list[deque[_Partition]] = [deque() for _ in range(_CONSUMERS)]
        super().__init__(*(functools.partial(self._read, announced) for announced in self._announced))
        self._bootstrap = bootstrap
        self._offsets: dict[_Partition, int] = {}

    def announce(self, topic: str, partition: int) -> None:
        """Tell that an event of a partition is sent in `AHEAD` seconds."""
        # by topic: librdkafka asks about topics that are new to a consumer once a second only
        self._announced[hash(topic) % _CONSUMERS].append((topic, partition))

    def _read(self, announced: deque[_Partition]) -> None:
        consumer = _consumer(
            self._bootstrap, {"fetch.wait.max.ms": int(_LONGEST_REQUEST * 1000), "auto.offset.reset": "error"}
        )
        unread: dict[_Partition, int] = {}
        with contextlib.closing(consumer):
            for turn in itertools.count():
                if self._ended.is_set():
                    return
                if announced:
                    new = list(_taken(announced))
                    started = {at for at in new if at not in unread}
                    for at in new:
                        unread[at] = unread.get(at, 0) + 1
                    if started:
                        consumer.incremental_assign([TopicPartition(*at, self._offsets.get(at, 0)) for at in started])
                elif turn % 100 == 0 and (read := [at for at, events in unread.items() if events <= 0]):
                    consumer.incremental_unassign([TopicPartition(*at) for at in read])
                    for at in read:
                        del unread[at]
                message = consumer.poll(0.02)
                if message is None:
                    continue
                if message.error() is not None:
                    raise RuntimeError(f"{message.topic()}[{message.partition()}]: {message.error()}")
                self._saw(message)
                at = (str(message.topic()), message.partition() or 0)
                self._offsets[at] = (message.offset() or 0) + 1
                unread[at] -= 1


def _taken(announced: deque[_Partition]) -> Iterator[_Partition]:
    with contextlib.suppress(IndexError):
        while True:
            yield announced.popleft()
