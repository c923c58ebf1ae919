"""`end-to-end`: from an append's begin until a query answers with a row that has the event in it."""

import asyncio
import contextlib
import itertools
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, Sequence

import aiohttp
import httpx
import uvloop
from refold.eventstore import EventStore, NewEvent
from refold.eventstore.catalog import Stream

from bench.appending import check_history, new_event
from bench.limits import pipeline
from bench.models import ORDERS, check_rows, exact_fold, fold_all, make
from bench.orders import OrderEvent
from bench.relaying import running_relay
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers
from hack.servers.callers import TOKEN

#: Events a second.
_RATE = 200
_numbers = itertools.count(1)


def end_to_end(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """One event an append, 200 a second; each caller then asks for its row with the append's token."""
    servers.warm(events)
    return Comparison(
        workload="end-to-end",
        params={"events": len(events), "events_a_second": _RATE, "partitions": PARTITIONS},
        measured=lambda: _run(servers, events),
        limit=lambda: pipeline.end_to_end(
            servers.limit, servers.kafka.bootstrap, servers.topic(), events, rate=_RATE
        ),
        limit_name="INSERT, transactional produce, consume and upsert in one process, one event after the other",
        usual=_RATE,
        latency=True,
    )  # fmt: skip


def _run(servers: Servers, events: Sequence[OrderEvent]) -> Run:
    stream = servers.stream()
    name = f"end-to-end-{next(_numbers)}"
    version = make(servers, stream, ORDERS, name)
    with running_relay(servers), contextlib.ExitStack() as running:
        projector = fold_all(servers, stream, name, version, 0)
        running.callback(projector.stop)
        query = servers.platform.query(stream.namespace, name)
        query.up()
        running.callback(query.stop)
        run = uvloop.run(append_and_ask(servers.platform.store_dsn(), query.url, stream, events))
    check_history(servers, stream, len(events) + 1)
    expected = exact_fold(servers, stream)[ORDERS.name]
    expected.pop("first")
    check_rows(servers, stream.namespace, name, version, ORDERS, expected)
    servers.platform.drop_stream(stream)
    return run


async def append_and_ask(
    dsn: str, url: str, stream: Stream, events: Iterable[OrderEvent], *,
    first: str = "first", begun: Callable[[], Awaitable[None]] | None = None,
) -> Run:  # fmt: skip
    """Append events, 200 a second; each caller then asks for its row with the append's token.

    Args:
        dsn: the event store's.
        url: of the query service.
        stream: what to append to.
        events: what to append; the end of it is the run's.
        first: the subject of an event that goes all the way before, so that everything is at work.
        begun: called between that one and the others.
    """
    latencies: list[float] = []
    last: dict[str, asyncio.Task[None]] = {}

    async with (
        await EventStore.open(dsn) as store,
        # aiohttp, since httpx takes some 3 ms of a core a request: the caller would fill the machine itself
        aiohttp.ClientSession(
            url, headers={"Authorization": f"Bearer {TOKEN}"}, connector=aiohttp.TCPConnector(limit=0)
        ) as client,
    ):

        async def send(event: OrderEvent, before: asyncio.Task[None] | None) -> None:
            if before is not None:  # the events of a subject go one after the other
                await before
            start = time.perf_counter()
            done = await store.append(
                stream.namespace, stream.name, event.subject, [new_event(event)], expected_revision=event.revision - 1
            )
            async with client.get(
                f"/v1/rows/{urllib.parse.quote(event.subject, safe='')}",
                headers={"Refold-Token": done.token, "Prefer": "wait=30"}, timeout=aiohttp.ClientTimeout(40),
            ) as answer:  # fmt: skip
                text = await answer.text()
            latencies.append((time.perf_counter() - start) * 1000)
            if answer.status != httpx.codes.OK:
                raise RuntimeError(f"the query for {event.subject} was answered with {text}")

        done = await store.append(stream.namespace, stream.name, first, [NewEvent.of("First", {})])
        token = {"Refold-Token": done.token, "Prefer": "wait=60"}
        (await client.get("/v1/rows", headers=token, timeout=aiohttp.ClientTimeout(70))).raise_for_status()
        if begun is not None:
            await begun()
        began = time.perf_counter()
        for number, event in enumerate(events):
            await asyncio.sleep(began + number / _RATE - time.perf_counter())
            last[event.subject] = asyncio.create_task(send(event, last.get(event.subject)))
        await asyncio.gather(*last.values())
        seconds = time.perf_counter() - began
    return Run(events_per_s=len(latencies) / seconds, latencies_ms=latencies)
