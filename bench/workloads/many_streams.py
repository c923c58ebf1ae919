"""`many-streams`: a thousand streams in one store beside one stream, with the processes that a store has."""

import asyncio
import contextlib
import subprocess
import time
import urllib.parse
import uuid
from collections.abc import Sequence

import aiohttp
import httpx
import uvloop
from refold.eventstore.catalog import Stream
from refold.partitioning import partition_of

from bench.appending import check_heads
from bench.following import AHEAD, Followers
from bench.orders import OrderEvent
from bench.relaying import running_relay
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers
from bench.waiting import until
from bench.workloads.append_http import started
from hack.servers.callers import TOKEN
from hack.servers.platform import Service

_STREAMS = 1_000
#: Events a second, over all streams.
_RATE = 200


def many_streams(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """One event an append over HTTP, 200 a second over all streams; until a `read_committed` consumer has it."""
    servers.warm(events)
    count = min(_STREAMS, max(2, len(events) // 2))
    alone = servers.beside()
    many, one = _Store(servers, count), _Store(alone, 1)
    return Comparison(
        workload="many-streams",
        params={"events": len(events), "events_a_second": _RATE, "streams": count, "partitions": PARTITIONS},
        measured=lambda: many.run(events),
        limit=lambda: one.run(events),
        limit_name="the same with one stream",
        usual=_RATE,
        latency=True,
    )


class _Store:
    """A store with its streams; each run has new processes."""

    def __init__(self, servers: Servers, count: int) -> None:
        self._servers = servers
        self._streams = servers.streams(count)
        self._sent = 0
        self._followers = Followers(servers.kafka.bootstrap)

    def run(self, events: Sequence[OrderEvent]) -> Run:
        """Send the events; the first ones, one a stream, go before and aren't counted: all is at work then."""
        first = [f"first {uuid.uuid4()}" for _ in self._streams]
        ids = [str(uuid.uuid4()) for _ in events]
        with contextlib.ExitStack() as running:
            store = started(self._servers)
            running.callback(store.stop)
            relay = running.enter_context(running_relay(self._servers))
            reader = running.enter_context(self._followers)
            uvloop.run(_send(store.url, self._streams, first, [b"{}"] * len(first), reader, at_once=8))
            until(lambda: reader.seen.keys() >= set(first), "each stream's first event is read", log=relay.log)
            data = [event.data for event in events]
            seconds, begun = uvloop.run(_send(store.url, self._streams, ids, data, reader, rate=_RATE))
            until(lambda: reader.seen.keys() >= set(ids), "all events are read", log=relay.log)
            rss = {"eventstore": _rss(store), "relay": _rss(relay)}
        self._sent += len(first) + len(ids)
        check_heads(self._servers, self._streams, self._sent)
        return Run(
            events_per_s=len(events) / seconds,
            latencies_ms=[(reader.seen[id_] - at) * 1000 for id_, at in begun.items()],
            rss_mb=rss,
        )


async def _send(
    url: str, streams: Sequence[Stream], ids: Sequence[str], data: Sequence[bytes], reader: Followers, *,
    rate: float | None = None, at_once: int = 100,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """Append an event for each id, to the streams by turns, `rate` a second; return seconds, and when each began."""
    begun: dict[str, float] = {}
    free = asyncio.Semaphore(at_once)

    def announce(number: int) -> None:
        if number < len(ids):
            stream = streams[number % len(streams)]
            reader.announce(stream.topic, partition_of(ids[number], stream.partitions))

    async def send(client: aiohttp.ClientSession, number: int) -> None:
        stream, id_ = streams[number % len(streams)], ids[number]
        body = b'{"expectedRevision":"none","events":[{"id":"%b","type":"Sent","data":%b}]}'
        path = f"/v1/streams/{stream.namespace}/{stream.name}/subjects/{urllib.parse.quote(id_)}/events"
        async with free:
            begun[id_] = time.perf_counter()
            async with client.post(path, data=body % (id_.encode(), data[number])) as answer:
                text = await answer.text()
        if answer.status != httpx.codes.CREATED:
            raise RuntimeError(f"an append to {stream.name} was answered with {text}")

    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    # aiohttp, since httpx takes some 3 ms of a core a request: the sender would fill the machine itself
    async with aiohttp.ClientSession(url, headers=headers, timeout=aiohttp.ClientTimeout(60)) as client:
        ahead = len(ids) if rate is None else int(AHEAD * rate)
        for number in range(ahead):
            announce(number)
        await asyncio.sleep(AHEAD)
        start = time.perf_counter()
        async with asyncio.TaskGroup() as sending:
            for number in range(len(ids)):
                announce(number + ahead)
                if rate is not None:
                    await asyncio.sleep(start + number / rate - time.perf_counter())
                sending.create_task(send(client, number))
        return time.perf_counter() - start, begun


def _rss(process: Service) -> float:
    """Return the memory of a process in MB."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(process.pid)], check=True, capture_output=True, text=True)
    return int(shown.stdout) / 1024
