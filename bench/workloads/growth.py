"""`growth`: appends and reads in a store of many events, and of a subject of many events, beside a small store's."""

import asyncio
import collections
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import uvloop
from refold.eventstore import EventStore
from refold.eventstore.catalog import Stream

from bench import filling
from bench.appending import Append, check_heads, check_history, new_event
from bench.orders import OrderEvent
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers

#: For each event that is given: how many stand in the large store, in the small one, and of the long subject.
_LARGE, _SMALL, _LONG = 1_000, 10, 10
#: A run appends, or reads, one of so many of the events that are given.
_SHARE = 2
_AT_ONCE = 32
_LONG_SUBJECT = "long"
_T = TypeVar("_T")


@dataclass
class _Filled:
    """A stream in a store of its own.

    `count` is how many events it has, `subjects` are some that have 5 each, `revisions` those of all that were
    appended to.
    """

    servers: Servers
    stream: Stream
    count: int
    subjects: list[str]
    revisions: collections.Counter[str]


def growth(servers: Servers, events: Sequence[OrderEvent]) -> list[Comparison]:
    """The library, 32 at once. A thousandfold of `events` stands in the large store, the tenfold in the small one."""
    long_count = _LONG * len(events)
    large = _filled(servers, events, _LARGE * len(events), long_count=long_count)
    small = _filled(servers.beside(), events, _SMALL * len(events), long_count=0)
    some = events[: -(-len(events) // _SHARE)]
    numbers = itertools.count(1)

    def compare(
        what: str, measured: Callable[[], Run], limit: Callable[[], Run], limited: str = "the same"
    ) -> Comparison:
        return Comparison(
            workload="growth",
            params={
                "what": what, "operations": len(some), "at_once": _AT_ONCE, "events": _LARGE * len(events),
                "long_subject": long_count, "partitions": PARTITIONS,
            },
            measured=measured, limit=limit, limit_name=f"{limited}, in a store of {_SMALL * len(events):,} events",
        )  # fmt: skip

    return [
        compare(
            "append to new subjects",
            lambda: _append(large, some, f"{next(numbers)} {{}}"),
            lambda: _append(small, some, f"{next(numbers)} {{}}"),
        ),
        compare(
            "append to the long subject",
            lambda: _append(large, some, _LONG_SUBJECT),
            lambda: _append(small, some, f"{next(numbers)}"),
            "append to a new subject",
        ),
        compare(
            "read subjects of 5 events", lambda: _read(large, len(some)), lambda: _read(small, len(some)),
        ),
        compare(
            "read 5 events of the long subject",
            lambda: _read(large, len(some), of_long=long_count),
            lambda: _read(small, len(some)),
            "read subjects of 5 events",
        ),
    ]  # fmt: skip


def _filled(servers: Servers, like: Sequence[OrderEvent], count: int, *, long_count: int) -> _Filled:
    stream = servers.stream()
    subjects = filling.fill(servers, stream, count, long=_LONG_SUBJECT, long_count=long_count, like=like)
    filled = check_history(servers, stream, count, count + filling.LIFE * stream.partitions)
    return _Filled(servers, stream, filled, subjects, collections.Counter({_LONG_SUBJECT: long_count}))


def _append(filled: _Filled, events: Sequence[OrderEvent], subject: str) -> Run:
    """Append each event with its expected revision to `subject`, where `{}` stands for the event's own."""
    appends = []
    for event in events:
        target = subject.format(event.subject)
        appends.append(Append(target, filled.revisions[target], [new_event(event)]))
        filled.revisions[target] += 1

    async def append(store: EventStore, append: Append) -> None:
        # taken in this order, so each finds the revision that the one before made
        await store.submit(known, append.subject, append.events, expected_revision=append.expected)

    known = filled.stream
    run = _timed(filled, append, appends)
    filled.count += len(appends)
    check_heads(filled.servers, [filled.stream], filled.count)
    return run


def _read(filled: _Filled, count: int, *, of_long: int | None = None) -> Run:
    """Read 5 events `count` times: of random subjects that have 5, or of the long subject's `of_long`."""
    draw = random.Random(count)
    if of_long is None:
        wanted = [(draw.choice(filled.subjects), 1) for _ in range(count)]
    else:
        wanted = [(_LONG_SUBJECT, draw.randrange(1, of_long - filling.LIFE)) for _ in range(count)]

    async def read(store: EventStore, asked: tuple[str, int]) -> None:
        subject, first = asked
        last = first + filling.LIFE - 1
        found = store.read_subject(
            filled.stream.namespace, filled.stream.name, subject, from_revision=first, to_revision=last
        )
        if [event.revision async for event in found] != list(range(first, last + 1)):
            raise RuntimeError(f"revisions {first} to {last} of {subject} were not what was read")

    return _timed(filled, read, wanted)


def _timed(filled: _Filled, operation: Callable[[EventStore, _T], Awaitable[None]], items: Iterable[_T]) -> Run:
    """Do the operation for each item, 32 at once, begun in their order."""
    latencies: list[float] = []

    async def run() -> float:
        async with await EventStore.open(filled.servers.platform.store_dsn()) as store:
            waiting = iter(items)

            async def work() -> None:
                for item in waiting:
                    start = time.perf_counter()
                    await operation(store, item)
                    latencies.append((time.perf_counter() - start) * 1000)

            began = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
            return time.perf_counter() - began

    seconds = uvloop.run(run())
    return Run(events_per_s=len(latencies) / seconds, latencies_ms=latencies)
