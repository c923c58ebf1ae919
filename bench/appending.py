"""What the workloads of appends share: the events as callers hold them, and a check of what stands in history."""

import asyncio
import datetime as dt
import time
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from psycopg import sql
from refold import names
from refold.eventstore import EventStore, NewEvent
from refold.eventstore.catalog import Stream
from refold.partitioning import partition_of

from bench.orders import OrderEvent
from bench.servers import Servers


class Append(NamedTuple):
    """One append to come; `expected` is the subject's revision before it."""

    subject: str
    expected: int
    events: list[NewEvent]


def new_event(event: OrderEvent) -> NewEvent:
    """Return what a caller appends, with a new id."""
    return NewEvent(id=str(uuid.uuid4()), type=event.type, data=msgspec.Raw(event.data))


def written_stream(servers: Servers, events: Sequence[OrderEvent]) -> Stream:
    """Make a stream with `events` as its history of which nobody knows yet: its heads stand at 0 until `reveal`.

    They stand as if they had been appended, which would take several times as long.
    """
    stream = servers.stream()
    heads = [0] * stream.partitions
    begin = dt.datetime.now(dt.UTC) - dt.timedelta(microseconds=len(events))
    target = sql.Identifier(stream.schema, "events")
    with (
        servers.events() as conn,
        conn.transaction(),
        conn.cursor().copy(
            sql.SQL("copy {} (partition, position, subject, revision, id, type, data, recorded_at) from stdin").format(
                target
            )
        ) as copy,
    ):
        for number, event in enumerate(events):
            partition = partition_of(event.subject, stream.partitions)
            heads[partition] += 1
            copy.write_row((
                partition, heads[partition], event.subject, event.revision, str(uuid.uuid4()), event.type,
                event.data.decode(), begin + dt.timedelta(microseconds=number),
            ))  # fmt: skip
    _vacuum(servers, target)
    return stream


def filled_stream(servers: Servers, events: Sequence[OrderEvent]) -> Stream:
    """Make a stream that holds `events`."""
    stream = written_stream(servers, events)
    reveal(servers, stream)
    check_history(servers, stream, len(events))
    return stream


def copied_stream(servers: Servers, source: Stream) -> Stream:
    """Make a stream with the history of `source` of which nobody knows yet: its heads stand at 0 until `reveal`."""
    stream = servers.stream(partitions=source.partitions)
    target, origin = sql.Identifier(stream.schema, "events"), sql.Identifier(source.schema, "events")
    with servers.events() as conn:
        conn.execute(sql.SQL("insert into {} select * from {} order by partition, position").format(target, origin))
    _vacuum(servers, target)
    return stream


def _vacuum(servers: Servers, table: sql.Identifier) -> None:
    """Leave nothing to autovacuum, which would come at a time of its own."""
    with servers.events() as conn:
        conn.execute(sql.SQL("vacuum analyze {}").format(table))


def reveal(servers: Servers, stream: Stream) -> None:
    """Set the heads of a copied stream and tell listeners, as if its events had just been appended."""
    with servers.events() as conn, conn.transaction():
        conn.execute(
            sql.SQL(
                "update refold.heads h set head = e.head, recorded_at = e.recorded_at from ("
                "select partition, max(position) as head, max(recorded_at) as recorded_at from {} group by partition"
                ") e where h.stream = {} and h.partition = e.partition"
            ).format(sql.Identifier(stream.schema, "events"), sql.Literal(stream.stream))
        )
        conn.execute("select pg_notify(%s, %s)", [names.APPENDED_CHANNEL, str(stream.stream)])


def by_subject(events: Sequence[OrderEvent], count: int) -> list[list[Append]]:
    """Give each subject to one of `count` lanes by turns, so that its events are appended in order."""
    lanes: list[list[Append]] = [[] for _ in range(count)]
    places: dict[str, int] = {}
    for event in events:
        place = places.setdefault(event.subject, len(places) % count)
        lanes[place].append(Append(event.subject, event.revision - 1, [new_event(event)]))
    return lanes


async def append_all(store: EventStore, stream: Stream, lanes: Sequence[Sequence[Append]]) -> tuple[float, list[float]]:
    """Append lane by lane at once, in each one after the other; return seconds and each append's ms."""
    latencies: list[float] = []

    async def work(lane: Sequence[Append]) -> None:
        for append in lane:
            start = time.perf_counter()
            await store.append(
                stream.namespace, stream.name, append.subject, append.events, expected_revision=append.expected
            )
            latencies.append((time.perf_counter() - start) * 1000)

    began = time.perf_counter()
    await asyncio.gather(*map(work, lanes))
    return time.perf_counter() - began, latencies


def check_history(servers: Servers, stream: Stream, least: int, most: int | None = None) -> int:
    """Return how many events `stream` holds.

    Raises:
        RuntimeError: they aren't between `least` and `most` (default: `least`), or positions, revisions or heads don't
            fit them.
    """
    table = sql.Identifier(stream.schema, "events")
    query = sql.SQL(
        "select coalesce(sum(n), 0)::bigint, coalesce(bool_and(n = last and n = head), true) from ("
        "  select count(*) as n, max(position) as last, (select head from refold.heads h where h.stream = {stream} "
        "  and h.partition = e.partition) as head from {table} e group by partition) p"
    ).format(stream=sql.Literal(stream.stream), table=table)
    gaps = sql.SQL(
        "select count(*) from (select from {table} group by subject having count(*) <> max(revision)) s"
    ).format(table=table)
    with servers.events() as conn:
        found = conn.execute(query).fetchone()
        wrong = conn.execute(gaps).fetchone()
    assert found is not None
    count, whole = int(found[0]), bool(found[1])
    if not (least <= count <= (least if most is None else most) and whole and wrong == (0,)):
        raise RuntimeError(
            f"{stream.schema} holds {count} events where {least} to {most or least} were acknowledged, positions "
            f"{'fit' if whole else 'do not fit'}, subjects with gaps: {wrong}"
        )
    return count


def check_heads(servers: Servers, streams: Sequence[Stream], count: int) -> None:
    """Raise RuntimeError unless the heads of `streams` count `count` events: where `check_history` would take long."""
    with servers.events() as conn:
        found = conn.execute(
            "select sum(head)::bigint from refold.heads where stream = any (%s)",
            [[stream.stream for stream in streams]],
        ).fetchone()
    if found != (count,):
        raise RuntimeError(f"the streams' heads count {found} events, {count} were acknowledged")
