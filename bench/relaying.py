"""A relay process for the time that a stream needs, and consumers of many streams."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import httpx
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from refold.eventstore.catalog import Stream

from bench.appending import reveal
from bench.servers import Servers
from bench.waiting import until
from hack.servers.callers import get
from hack.servers.platform import Service

_MOST_SECONDS = 300


@contextlib.contextmanager
def running_relay(servers: Servers) -> Iterator[Service]:
    """Run a relay that is ready."""
    process = servers.platform.relay()
    process.up()
    try:
        until(
            lambda: get(f"{process.url}/readyz").status_code == httpx.codes.OK,
            "the relay is ready",
            log=process.log,
        )
        yield process
    finally:
        process.stop()


def relay_all(servers: Servers, stream: Stream, count: int) -> float:
    """Reveal `stream` to a relay that is ready; return the seconds until its `count` events are committed."""
    with running_relay(servers) as process, httpx.Client(base_url=process.url, trust_env=False) as client:
        began = time.perf_counter()
        reveal(servers, stream)
        while (relayed := _relayed(client, stream)) < count:
            passed = time.perf_counter() - began
            if passed > _MOST_SECONDS:
                raise TimeoutError(f"{relayed} of {count} events were relayed in {passed:.0f} s: {process.log}")
            # to ask takes the relay's own time: ask when a quarter of what is left may have passed
            left = passed * (count - relayed) / relayed if relayed else 0.0
            time.sleep(max(0.02, left / 4))
        return time.perf_counter() - began


def _relayed(client: httpx.Client, stream: Stream) -> float:
    name = re.escape(f'refold_relay_events_total{{stream="{stream.namespace}/{stream.name}"}}')
    found = re.search(rf"^{name} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0


#: A consumer asks for all its partitions in every request, of which thousands would take longer than what is measured.
_STREAMS_A_CONSUMER = 50


class Readers:
    """`read_committed` consumers of many streams: `seen` tells when each event was read, by its id."""

    def __init__(self, bootstrap: str, streams: Sequence[Stream]) -> None:
        """Begin at the beginning of the topics, when entered as a context."""
        self.seen: dict[str, float] = {}
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._read, args=(bootstrap, streams[start : start + _STREAMS_A_CONSUMER]))
            for start in range(0, len(streams), _STREAMS_A_CONSUMER)
        ]

    def _read(self, bootstrap: str, streams: Sequence[Stream]) -> None:
        consumer = Consumer({
            "bootstrap.servers": bootstrap, "group.id": "bench", "enable.auto.commit": False,
            "isolation.level": "read_committed", "fetch.error.backoff.ms": 10,
        })  # fmt: skip
        consumer.assign([
            TopicPartition(stream.topic, partition, OFFSET_BEGINNING)
            for stream in streams for partition in range(stream.partitions)
        ])  # fmt: skip
        with contextlib.closing(consumer):
            while not self._ended.is_set():
                message = consumer.poll(0.5)
                if message is not None and message.error() is None:
                    headers: dict[str, Any] = dict(message.headers() or [])
                    self.seen[headers["ce_id"].decode()] = time.perf_counter()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)
