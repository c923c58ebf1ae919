"""`growth`: appends and reads in a store of many events, and of a subject of many events, beside a small store's."""

import functools
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import uvloop
from refold.eventstore import EventStore
from refold.eventstore.catalog import Stream

from bench import filling
from bench.appending import Append, append_all, check_history, new_event
from bench.orders import OrderEvent
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers

#: For each event that is given: how many there are in the large store, in the small one, and of the long subject.
_LARGE, _SMALL, _LONG = 1_000, 10, 10
#: How many are appended, or subjects read, in a run, of those that are given.
_SHARE = 2
_AT_ONCE = 32
_LONG_SUBJECT = "long"
_LIFE = 5


class _Filled(NamedTuple):
    """A stream with a store of its own; `subjects` have 5 events each."""

    servers: Servers
    stream: Stream
    subjects: list[str]
    long_count: int


def growth(servers: Servers, events: Sequence[OrderEvent]) -> list[Comparison]:
    """The library, 32 at once. A thousandfold of `events` stands in the large store, the tenfold in the small one."""
    large = _filled(servers, events, _LARGE * len(events), long_count=_LONG * len(events))
    small = _filled(servers.beside(), events, _SMALL * len(events), long_count=_LIFE)
    some = events[: max(1, len(events) // _SHARE)]
    numbers = itertools.count(1)

    def compare(what: str, measured: Callable[[], Run], limit: Callable[[], Run], limit_name: str) -> Comparison:
        return Comparison(
            workload="growth",
            params={
                "what": what, "operations": len(some), "at_once": _AT_ONCE, "events": _LARGE * len(events),
                "subject_events": large.long_count, "partitions": PARTITIONS,
            },
            measured=measured, limit=limit, limit_name=f"{limit_name} in a store of {_SMALL * len(events)} events",
        )  # fmt: skip

    append, one = functools.partial(_append, some, numbers), functools.partial(_append_to_one, some)
    return [
        compare("append", lambda: append(large), lambda: append(small), "the same"),
        compare("read subjects", lambda: _read(large, len(some)), lambda: _read(small, len(some)), "the same"),
        compare(
            "append to the long subject",
            lambda: one(large, _LONG_SUBJECT), lambda: one(small, f"new-{next(numbers)}"), "to a new subject",
        ),
        compare(
            "read 5 events of the long subject",
            lambda: _read_of_one(large, len(some)), lambda: _read_of_one(small, len(some)),
            "all 5 events of a subject",
        ),
    ]  # fmt: skip


def _filled(servers: Servers, like: Sequence[OrderEvent], count: int, *, long_count: int) -> _Filled:
    stream = servers.stream()
    subjects = filling.fill(servers, stream, count, long=_LONG_SUBJECT, long_count=long_count, like=like)
    check_history(servers, stream, count, count + _LIFE * stream.partitions)
    return _Filled(servers, stream, subjects, long_count)


def _append(events: Sequence[OrderEvent], numbers: "itertools.count[int]", filled: _Filled) -> Run:
    """Append to new subjects, each event with its expected revision."""
    number = next(numbers)
    lanes: list[list[Append]] = [[] for _ in range(_AT_ONCE)]
    places: dict[str, int] = {}
    for event in events:
        lane = lanes[places.setdefault(event.subject, len(places) % _AT_ONCE)]
        lane.append(Append(f"{number}-{event.subject}", event.revision - 1, [new_event(event)]))
    return _timed(filled, len(events), lambda store: append_all(store, filled.stream, lanes))


def _append_to_one(events: Sequence[OrderEvent], filled: _Filled, subject: str) -> Run:
    """Append to one subject, each event with its expected revision."""
    ...
