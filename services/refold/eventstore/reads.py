"""A stream's events, read in pages: each in a short transaction of its own, with nothing held between two."""

import datetime as dt
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, LiteralString

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import args_row
from psycopg.types.numeric import Int4, Int8

from refold.events import Event
from refold.eventstore import appends
from refold.eventstore.catalog import Stream
from refold.eventstore.connections import Connections
from refold.eventstore.errors import UnknownStreamError

#: A page has at most this many events, and about this many bytes as they are stored.
PAGE_EVENTS = 1000
FIRST_PAGE_EVENTS = 250
PAGE_BYTES = 2 * 1024 * 1024
_MAX = 2**63 - 1


async def subject_pages(
    connections: Connections,
    stream: Stream,
    subject: str,
    *,
    from_revision: int,
    to_revision: int | None,
    until: dt.datetime | None,
) -> AsyncIterator[list[Event]]:
    """Yield pages of a subject's events; see `EventStore.subject_pages`."""
    appends.check_text("subject", subject, appends.MAX_SUBJECT_BYTES)
    limit = None if until is None else appends.utc(until)
    last = _MAX if to_revision is None else min(to_revision, _MAX)
    query = _page(stream.schema, "partition = %b and subject = %b", "revision", PAGE_BYTES)
    arguments = [Int4(appends.partition(subject, stream.partitions)), subject]
    async for page in _pages(
        connections, stream, query, arguments, max(0, from_revision - 1), last, lambda event: event.revision
    ):
        if limit is not None and page[-1].time > limit:
            # The later ones are later still: recorded_at never decreases in a partition.
            if wanted := [event for event in page if event.time <= limit]:
                yield wanted
            return
        yield page


async def partition_pages(
    connections: Connections, stream: Stream, partition: int, *, after: int, limit: int | None
) -> AsyncIterator[list[Event]]:
    """Yield pages of a partition's events; see `EventStore.partition_pages`."""
    if not 0 <= partition < stream.partitions:
        raise UnknownStreamError(
            f"stream {stream.namespace}/{stream.name} has the partitions 0 to {stream.partitions - 1}, not {partition}"
        )
    first = min(max(0, after), _MAX)
    last = _MAX if limit is None else min(first + limit, _MAX)
    query = _page(stream.schema, "partition = %b", "position", PAGE_BYTES)
    async for page in _pages(connections, stream, query, [Int4(partition)], first, last, lambda event: event.position):
        yield page


async def _pages(
    connections: Connections,
    stream: Stream,
    query: bytes,
    arguments: Sequence[Any],
    after: int,
    last: int,
    number: Callable[[Event], int],
) -> AsyncIterator[list[Event]]:
    """Yield the events numbered over `after` up to `last`, in pages; the numbers have no gaps."""
    wanted = FIRST_PAGE_EVENTS
    while after < last:
        asked = min(wanted, PAGE_EVENTS, last - after)
        page = await _read(connections, stream, query, [*arguments, Int8(after), Int8(asked)])
        if not page:
            return
        yield page
        after = number(page[-1])
        if len(page) == asked:
            wanted = 4 * asked
            continue
        size = sum(memoryview(event.data).nbytes + memoryview(event.metadata or b"").nbytes for event in page)
        if size * 8 < PAGE_BYTES:
            return  # the end cut the page, not its bytes: jsonb is at most 4 times as large as its text
        wanted = 2 * len(page)


async def _read(connections: Connections, stream: Stream, query: bytes, arguments: Sequence[Any]) -> list[Event]:
    """Return one page, read in a transaction of its own."""

    async def fetch(conn: AsyncConnection[Any]) -> list[Event]:
        cursor = conn.cursor(binary=True, row_factory=args_row(Event))
        await cursor.execute(query, arguments, prepare=True)
        return await cursor.fetchall()

    try:
        return await connections.ask(fetch, seconds=30)
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName) as error:
        raise UnknownStreamError.inactive(stream.namespace, stream.name) from error


@functools.lru_cache(maxsize=4096)
def _page(schema: str, where: LiteralString, key: str, most: int) -> bytes:
    """Return the query for a page: at least one event, and no more once `most` bytes are reached."""
    # Sizes are those in storage, where only large values are compressed; those are unpacked to be measured.
    size = sql.SQL(
        "case when pg_column_compression({0}) is null then pg_column_size({0}) else octet_length({0}::text) end"
    )
    return (
        sql.SQL(
            "select partition, position, subject, revision, id, type, recorded_at, data, metadata from ("
            "select *, sum(size) over (order by {key} rows between unbounded preceding and 1 preceding) as before "
            "from (select *, {data} + coalesce({metadata}, 0) as size from {schema}.events where {where} "
            "and {key} > %b order by {key} limit %b) candidates) page "
            "where before is null or before < {bytes} order by {key}"
        )
        .format(
            key=sql.Identifier(key),
            data=size.format(sql.Identifier("data")),
            metadata=size.format(sql.Identifier("metadata")),
            schema=sql.Identifier(schema),
            where=sql.SQL(where),
            bytes=most,
        )
        .as_string()
        .encode()
    )
