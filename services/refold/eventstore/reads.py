"""A stream's events, read in pages: each in a short transaction of its own, with nothing held between two.

A page's statement also looks whether the catalog still has the stream, so a page is never of another history than it
was asked for: a stream that was dropped and made again has another number there.
"""

import datetime as dt
import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any, LiteralString

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import args_row, scalar_row
from psycopg.types.numeric import Int4, Int8

from refold.events import Event
from refold.eventstore import appends
from refold.eventstore.catalog import Stream
from refold.eventstore.connections import Connections
from refold.eventstore.errors import InactiveStreamError, UnknownStreamError

#: A page has at most this many events, and about this many bytes as they are stored.
PAGE_EVENTS = 1000
FIRST_PAGE_EVENTS = 250
PAGE_BYTES = 2 * 1024 * 1024
#: The last number that an event could have.
MAX_NUMBER = 2**63 - 1


class Source:
    """The events of one subject or of one partition, in order of their numbers, which have no gaps.

    Args:
        stream: of the catalog.
        partition: whose events; their numbers are positions.
        subject: None, or of which subject in that partition; then their numbers are revisions.
    """

    def __init__(self, stream: Stream, partition: int, subject: str | None = None) -> None:
        self.stream = stream
        self.partition = partition
        self.subject = subject
        self._where: LiteralString
        if subject is None:
            self._key, self._where = "position", "partition = %b"
            self._arguments: list[Any] = [Int4(partition)]
        else:
            self._key, self._where = "revision", "partition = %b and subject = %b"
            self._arguments = [Int4(partition), subject]

    @classmethod
    def of_subject(cls, stream: Stream, subject: str) -> "Source":
        """Return the source of a subject's events.

        Raises:
            InvalidAppendError: it can't be a subject.
        """
        appends.check_text("subject", subject, appends.MAX_SUBJECT_BYTES)
        return cls(stream, appends.partition(subject, stream.partitions), subject)

    @classmethod
    def of_partition(cls, stream: Stream, partition: int) -> "Source":
        """Return the source of a partition's events.

        Raises:
            UnknownStreamError: the stream has no such partition.
        """
        if not 0 <= partition < stream.partitions:
            raise UnknownStreamError(
                f"stream {stream.namespace}/{stream.name} has the partitions 0 to {stream.partitions - 1}, "
                f"not {partition}"
            )
        return cls(stream, partition)

    @property
    def what(self) -> str:
        """What it is the events of, for people."""
        return f"partition {self.partition}" if self.subject is None else f"subject {self.subject!r}"

    def number(self, event: Event) -> int:
        """Return the event's number in this source."""
        return event.position if self.subject is None else event.revision

    async def page(
        self, connections: Connections, first: int, last: int, *, events: int, size: int, backward: bool = False
    ) -> list[Event]:
        """Return the first events numbered `first` to `last` (or the last ones, the last of them first).

        Args:
            connections: to the store.
            first: at least 1.
            last: at most `MAX_NUMBER`.
            events: at most this many.
            size: about this many bytes as they are stored; one event is always returned, where there is one.
            backward: from `last` to `first`.

        Raises:
            InactiveStreamError: the stream isn't there any more.
            UnavailableError: PostgreSQL can't be reached.
        """
        query = _page(self.stream.schema, self._where, self._key, backward)
        arguments = [*self._arguments, Int8(first), Int8(last), Int8(events), Int8(size), Int4(self.stream.stream)]
        found = await self._ask(connections, query, arguments, args_row(Event))
        if not found:
            raise InactiveStreamError(self.stream.namespace, self.stream.name)
        return [] if found[0].position is None else found

    async def last_until(self, connections: Connections, time: dt.datetime) -> int:
        """Return the number of the last event recorded at or before `time`, 0 where none was.

        Raises:
            InactiveStreamError: the stream isn't there any more.
            UnavailableError: PostgreSQL can't be reached.
        """
        return await self._last(connections, "recorded_at", time)

    async def last_at(self, connections: Connections, position: int) -> int:
        """Return the number of the last event at or before `position`, 0 where there is none.

        Raises:
            InactiveStreamError: the stream isn't there any more.
            UnavailableError: PostgreSQL can't be reached.
        """
        return await self._last(connections, "position", Int8(position))

    async def _last(self, connections: Connections, column: str, value: object) -> int:
        """Search by halves, since `column` never decreases from an event to the next one of a source."""
        query = _search(self.stream.schema, self._where, self._key, column)
        arguments = [*self._arguments, value, value, *self._arguments]
        found: list[int] = await self._ask(connections, query, arguments, scalar_row)
        return found[0]

    async def _ask(
        self, connections: Connections, query: bytes, arguments: Sequence[Any], row_factory: Any
    ) -> list[Any]:
        async def fetch(conn: AsyncConnection[Any]) -> list[Any]:
            cursor = conn.cursor(binary=True, row_factory=row_factory)
            await cursor.execute(query, arguments, prepare=True)
            return await cursor.fetchall()

        try:
            return await connections.ask(fetch, seconds=30)
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName) as error:
            raise InactiveStreamError(self.stream.namespace, self.stream.name) from error


async def pages(
    connections: Connections,
    source: Source,
    *,
    first: int = 1,
    last: int | None = None,
    until: dt.datetime | None = None,
    limit: int | None = None,
    backward: bool = False,
) -> AsyncIterator[list[Event]]:
    """Yield the events of `source` in pages that aren't empty; see `EventStore.subject_pages`.

    Args:
        connections: to the store.
        source: whose events.
        first: the lowest number that is wanted.
        last: the highest, or None for all.
        until: the last `recorded_at` that is wanted, or None for all.
        limit: how many events at most.
        backward: the highest number first.
    """
    first = max(1, first)
    last = MAX_NUMBER if last is None else min(last, MAX_NUMBER)
    left = MAX_NUMBER if limit is None else limit
    if until is not None:
        last = min(last, await source.last_until(connections, _utc(until)))
    wanted = FIRST_PAGE_EVENTS
    while first <= last and left > 0:
        asked = min(wanted, PAGE_EVENTS, last - first + 1, left)
        page = await source.page(connections, first, last, events=asked, size=PAGE_BYTES, backward=backward)
        if not page:
            return
        yield page
        left -= len(page)
        if backward:
            last = source.number(page[-1]) - 1
        else:
            first = source.number(page[-1]) + 1
        if len(page) == asked:
            wanted = 4 * asked
            continue
        if size_of(page) * 8 < PAGE_BYTES:
            return  # the end cut the page, not its bytes: jsonb is at most 4 times as large as its text
        wanted = 2 * len(page)


def _utc(time: dt.datetime) -> dt.datetime:
    """Return `time` in UTC; one without a time zone is taken as UTC."""
    if time.tzinfo is None:
        return time.replace(tzinfo=dt.UTC)
    try:
        return time.astimezone(dt.UTC)
    except OverflowError:  # in UTC it is before the year 1 or after the year 9999
        return (dt.datetime.min if time.year == 1 else dt.datetime.max).replace(tzinfo=dt.UTC)


def size_of(events: Sequence[Event]) -> int:
    """Return the bytes of the events' data and metadata."""
    return sum(memoryview(event.data).nbytes + memoryview(event.metadata or b"").nbytes for event in events)


@functools.lru_cache(maxsize=4096)
def _page(schema: str, where: LiteralString, key: str, backward: bool) -> bytes:
    """Return the query for a page: no rows without the stream, one without a position where it has no such events."""
    # Sizes are those in storage, where only large values are compressed; those are unpacked to be measured.
    size = sql.SQL(
        "case when pg_column_compression({0}) is null then pg_column_size({0}) else octet_length({0}::text) end"
    )
    return (
        sql.SQL(
            "select page.partition, position, subject, revision, id, type, recorded_at, data, metadata "
            "from refold.streams left join ("
            "select *, sum(size) over (order by {key} {order} rows between unbounded preceding and 1 preceding) "
            "as before from (select *, {data} + coalesce({metadata}, 0) as size from {schema}.events where {where} "
            "and {key} between %b and %b order by {key} {order} limit %b) candidates"
            ") page on before is null or before < %b where stream = %b order by {key} {order}"
        )
        .format(
            key=sql.Identifier(key),
            order=sql.SQL("desc" if backward else "asc"),
            data=size.format(sql.Identifier("data")),
            metadata=size.format(sql.Identifier("metadata")),
            schema=sql.Identifier(schema),
            where=sql.SQL(where),
        )
        .as_string()
        .encode()
    )


@functools.lru_cache(maxsize=4096)
def _search(schema: str, where: LiteralString, key: str, column: str) -> bytes:
    """Return the query for the number of the last event whose `column` is at most a value."""
    return (
        sql.SQL(
            "with recursive search (low, high) as ("
            "select 0::bigint, coalesce("
            "(select {key} from {schema}.events where {where} order by {key} desc limit 1), 0) union all "
            "select case when seen <= %b then middle else low end, case when seen <= %b then high else middle - 1 end "
            # A scalar subquery is one look at an index for each halving, and its order names which: before the first
            # statistics the planner takes a subject to have one event, and any index to do.
            "from (select low, high, middle, (select {column} from {schema}.events where {where} "
            "and {key} >= middle order by {key} limit 1) "
            "as seen from (select low, high, low + (high - low + 1) / 2 as middle from search where low < high) half "
            "offset 0) looked"
            ") select low from search where low = high"
        )
        .format(
            key=sql.Identifier(key),
            column=sql.Identifier(column),
            schema=sql.Identifier(schema),
            where=sql.SQL(where),
        )
        .as_string()
        .encode()
    )
