"""`append-32`, `append-1`, `append-100x8`: appends by the library, in this process."""

from collections.abc import Sequence

import uvloop
from refold.eventstore import EventStore

from bench.appending import Append, append_all, by_subject, check_history, new_event
from bench.limits import postgres
from bench.orders import OrderEvent
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers


def append_32(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """One event an append, 32 at once, each with the expected revision."""
    return Comparison(
        workload="append-32",
        params={"events": len(events), "at_once": 32, "events_an_append": 1, "partitions": PARTITIONS},
        measured=lambda: _run(servers, by_subject(events, 32)),
        limit=lambda: postgres.pgbench(servers.limit, events, clients=32),
        limit_name="pgbench -M prepared, 32 clients, one INSERT and commit each",
        usual=15_000,
    )


def append_1(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """One event an append, one at a time, each with the expected revision."""
    return Comparison(
        workload="append-1",
        params={"events": len(events), "at_once": 1, "events_an_append": 1, "partitions": PARTITIONS},
        measured=lambda: _run(servers, by_subject(events, 1)),
        limit=lambda: postgres.insert_and_commit(servers.limit, events),
        limit_name="psycopg, one INSERT and commit after another",
        usual=1000 / 0.31,
        latency=True,
    )


def append_100x8(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """100 events an append, each to a subject of its own, 8 at once."""
    return Comparison(
        workload="append-100x8",
        params={"events": len(events), "at_once": 8, "events_an_append": 100, "partitions": PARTITIONS},
        measured=lambda: _run(servers, _in_hundreds(events, 8)),
        limit=lambda: postgres.executemany(servers.limit, events, batch=100, connections=8),
        limit_name="psycopg, pipelined executemany, 100 rows a commit, 8 connections",
        usual=41_000,
    )


def _in_hundreds(events: Sequence[OrderEvent], count: int) -> list[list[Append]]:
    lanes: list[list[Append]] = [[] for _ in range(count)]
    for number, start in enumerate(range(0, len(events), 100)):
        hundred = [new_event(event) for event in events[start : start + 100]]
        lanes[number % count].append(Append(f"hundred-{number}", 0, hundred))
    return lanes


def _run(servers: Servers, lanes: list[list[Append]]) -> Run:
    stream = servers.stream()
    total = sum(len(append.events) for lane in lanes for append in lane)

    async def run() -> Run:
        async with await EventStore.open(servers.platform.store_dsn()) as store:
            seconds, latencies = await append_all(store, stream, lanes)
        return Run(events_per_s=total / seconds, latencies_ms=latencies)

    result = uvloop.run(run())
    check_history(servers, stream, total)
    servers.platform.drop_stream(stream)
    return result
