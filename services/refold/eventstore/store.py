"""The event store as a library: append with group commit, read in pages.

Appends that wait for a stream go together in its next transaction; one transaction is in flight per stream and
process, and no timer delays a lone append. Each append has its own outcome. A group that the database refuses as a
whole is split until the guilty append stands alone. A group whose connection breaks is run again, also where its
outcome is unknown: events carry ids, so what was committed is found and answered with its first outcome.
"""

import asyncio
import collections
import contextlib
import datetime as dt
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import psycopg
import structlog
from psycopg import AsyncConnection, sql
from psycopg.rows import args_row
from psycopg.types.numeric import Int4, Int8

from refold import names, tokens
from refold.events import Event
from refold.eventstore import appends, arrays, catalog, metrics
from refold.eventstore.appends import Append, ExpectedRevision, Limits, NewEvent
from refold.eventstore.catalog import Stream
from refold.eventstore.connections import Connections, StoreConnection
from refold.eventstore.errors import (
    EventStoreError,
    IdConflictError,
    InvalidAppendError,
    OverloadedError,
    RevisionConflictError,
    UnavailableError,
    UnknownStreamError,
)

log = structlog.get_logger(__name__)
_T = TypeVar("_T")

#: Appends and bytes that may wait in one process; beyond, appends are refused at once.
MAX_WAITING = 10_000
MAX_WAITING_BYTES = 128 * 1024 * 1024
#: A group has at most this many events and bytes (but always one append).
GROUP_EVENTS = 2000
GROUP_BYTES = 4 * 1024 * 1024
#: Seconds that an append may wait for PostgreSQL before it is given up as unavailable.
PATIENCE = 10.0
#: A page of a read has at most this many events, and about this many bytes as they are stored.
PAGE_EVENTS = 1000
FIRST_PAGE_EVENTS = 250
PAGE_BYTES = 2 * 1024 * 1024
#: Seconds between two looks at the catalog, and the least between two that unknown names ask for.
REFRESH = 5.0
REFRESH_ON_MISS = 0.25
#: Seconds that notifications are held together after one was sent.
_NOTIFY_GAP = 0.005
#: Seconds before a group is tried again: at first, and at most.
_BACK_OFF = (0.05, 1.0)
_MAX = 2**63 - 1

_NOT_SERVED = "RF001"
#: Errors that a later attempt may not meet: the server stops, starts, fails over, is full, or ended a deadlock.
_TRANSIENT = ("08", "40", "53", "57")
#: Errors that lie in what was sent.
_GUILTY = ("22", "23", "54", "RF")


class AppendResult(NamedTuple):
    """What an append did.

    `revision` and `position` are its last event's; `replayed` says that the events were there already, from an earlier
    attempt; `incarnation` is the stream's.
    """

    revision: int
    partition: int
    position: int
    replayed: bool
    incarnation: str

    @property
    def token(self) -> str:
        """The token that makes a query wait until it has seen this append."""
        return tokens.encode([tokens.Position(self.incarnation, self.partition, self.position)])


class _Waiting(NamedTuple):
    append: Append
    expected: ExpectedRevision
    since: float
    outcome: asyncio.Future[AppendResult]


class EventStore:
    """Appends to and reads from the streams of one store.

    Get one by `await EventStore.open(dsn)`; it is an async context manager. All methods may be called concurrently.
    """

    def __init__(self, dsn: str, *, limits: Limits, write_connections: int = 8, read_connections: int = 4) -> None:
        self.limits = limits
        self._write = Connections(dsn, size=write_connections, application="refold-eventstore-append")
        self._read = Connections(dsn, size=read_connections, application="refold-eventstore-read")
        self._control = Connections(dsn, size=2, application="refold-eventstore")
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self._refreshed = -REFRESH
        self._refused: str | None = None
        self._refreshing = asyncio.Lock()
        self._waiting = 0
        self._waiting_bytes = 0
        self._appended: set[int] = set()
        self._appended_some = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._running: set[asyncio.Task[None]] = set()
        self._closing = False
        metrics.WAITING.set_function(lambda: self._waiting)

    @classmethod
    async def open(
        cls, dsn: str, *, limits: Limits | None = None, write_connections: int = 8, read_connections: int = 4
    ) -> Self:
        """Return a store that is connected to the database of `dsn` as the store's service role.

        Raises:
            NotInstalledError: the database holds no store.
            UnavailableError: the database can't be reached.
        """
        store = cls(
            dsn, limits=limits or Limits(), write_connections=write_connections, read_connections=read_connections
        )
        try:
            await store._refresh()
        except BaseException:
            await store.close()
            raise
        store.start()
        return store

    def start(self) -> None:
        """Begin the work in the background; for a store that wasn't made by `open` and may find its database later."""
        self._tasks = [asyncio.create_task(self._refresh_for_ever()), asyncio.create_task(self._notify_for_ever())]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Finish the appends that wait, refuse new ones, and close the connections."""
        self._closing = True
        if self._running:
            await asyncio.wait(self._running)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._appended:
            with contextlib.suppress(psycopg.Error, TimeoutError):
                async with asyncio.timeout(1):
                    await self._notify()
        for connections in (self._write, self._read, self._control):
            await connections.close()

    async def append(
        self,
        namespace: str,
        name: str,
        subject: str,
        events: Sequence[NewEvent],
        *,
        expected_revision: ExpectedRevision = "any",
    ) -> AppendResult:
        """Append `events` to `subject`, all or none, and return when they are committed.

        Repeated with the same ids, types and data it changes nothing and returns the first outcome as `replayed`.
        Cancelling the caller takes the append back only while it waits for its transaction.

        Args:
            namespace: the stream's namespace.
            name: the stream's name.
            subject: what the events are about, 1 to 512 bytes.
            events: at least one, at most `limits.append_events`.
            expected_revision: the subject's revision before the append, or `none` (0), `exists` (over 0) or `any`.

        Raises:
            UnknownStreamError: there is no active stream of that name.
            InvalidAppendError: a field isn't what it must be (TooLargeError: is over a limit).
            RevisionConflictError: the subject isn't at the expected revision.
            IdConflictError: ids are known with other content.
            OverloadedError: too many appends wait.
            UnavailableError: PostgreSQL couldn't be asked in time; whether it was appended is unknown.
        """
        return await self.submit(
            await self.stream(namespace, name), subject, events, expected_revision=expected_revision
        )

    def submit(
        self,
        stream: Stream,
        subject: str,
        events: Sequence[NewEvent],
        *,
        expected_revision: ExpectedRevision = "any",
    ) -> asyncio.Future[AppendResult]:
        """Take an append and return its outcome to come; appends are applied in the order of these calls.

        Args:
            stream: as `self.stream` returned it.
            subject: see `append`, also for the rest.
            events: see `append`.
            expected_revision: see `append`.

        Raises:
            EventStoreError: those of `append` that are known before the database is asked.
        """
        try:
            lane = self._lanes.get((stream.namespace, stream.name))
            if lane is None:
                raise UnknownStreamError(f"the stream {stream.namespace}/{stream.name} isn't active any more")
            checked = appends.check(
                subject,
                events,
                expected_revision=expected_revision,
                partitions=lane.stream.partitions,
                limits=self.limits,
            )
            if self._closing:
                raise UnavailableError("the event store is stopping; the append wasn't taken, send it to another")
            if self._waiting >= MAX_WAITING or self._waiting_bytes >= MAX_WAITING_BYTES:
                raise OverloadedError(
                    f"{self._waiting} appends of {self._waiting_bytes} bytes are waiting; this one wasn't taken, "
                    "try again a little later"
                )
        except EventStoreError as error:
            _count_refusal(error)
            raise
        self._waiting += 1
        self._waiting_bytes += checked.size
        outcome: asyncio.Future[AppendResult] = asyncio.get_running_loop().create_future()

        def settled(outcome: asyncio.Future[AppendResult]) -> None:
            self._waiting -= 1
            self._waiting_bytes -= checked.size
            if not outcome.cancelled() and (error := outcome.exception()) is not None:
                _count_refusal(error)

        outcome.add_done_callback(settled)
        lane.add(_Waiting(checked, expected_revision, time.monotonic(), outcome))
        return outcome

    async def subject_pages(
        self,
        namespace: str,
        name: str,
        subject: str,
        *,
        from_revision: int = 1,
        to_revision: int | None = None,
        until: dt.datetime | None = None,
    ) -> AsyncIterator[list[Event]]:
        """Yield the subject's events in order of their revisions, in pages that aren't empty.

        Each page is read in a short transaction of its own; nothing is held in the database between two.

        Args:
            namespace: the stream's namespace.
            name: the stream's name.
            subject: whose events.
            from_revision: the first.
            to_revision: the last, or None for all.
            until: the last `recorded_at` that is wanted, or None for all.

        Raises:
            UnknownStreamError: there is no active stream of that name.
            InvalidAppendError: the subject can't be one.
            UnavailableError: PostgreSQL can't be reached.
        """
        lane = await self._lane(namespace, name)
        appends.check_text("subject", subject, appends.MAX_SUBJECT_BYTES)
        partition = appends.partition(subject, lane.stream.partitions)
        limit = None if until is None else appends.utc(until)
        last = _MAX if to_revision is None else min(to_revision, _MAX)
        arguments = [Int4(partition), subject]
        pages = self._pages(lane, lane.subject_page, arguments, max(0, from_revision - 1), last, lambda e: e.revision)
        async for page in pages:
            if limit is not None and page[-1].time > limit:
                # The later ones are later still: recorded_at never decreases in a partition.
                if wanted := [event for event in page if event.time <= limit]:
                    yield wanted
                return
            yield page

    async def read_subject(
        self,
        namespace: str,
        name: str,
        subject: str,
        *,
        from_revision: int = 1,
        to_revision: int | None = None,
        until: dt.datetime | None = None,
    ) -> AsyncIterator[Event]:
        """Yield the subject's events one by one; see `subject_pages`."""
        pages = self.subject_pages(
            namespace, name, subject, from_revision=from_revision, to_revision=to_revision, until=until
        )
        async for page in pages:
            for event in page:
                yield event

    async def partition_pages(
        self, namespace: str, name: str, partition: int, *, after: int = 0, limit: int | None = None
    ) -> AsyncIterator[list[Event]]:
        """Yield the partition's events after position `after`, at most `limit`, up to the head, in pages; all in order.

        Raises:
            UnknownStreamError: there is no active stream of that name, or no such partition of it.
            UnavailableError: PostgreSQL can't be reached.
        """
        lane = await self._lane(namespace, name)
        if not 0 <= partition < lane.stream.partitions:
            raise UnknownStreamError(
                f"stream {namespace}/{name} has the partitions 0 to {lane.stream.partitions - 1}, not {partition}"
            )
        first = min(max(0, after), _MAX)
        last = _MAX if limit is None else min(first + limit, _MAX)
        async for page in self._pages(lane, lane.partition_page, [Int4(partition)], first, last, lambda e: e.position):
            yield page

    @staticmethod
    async def _pages(
        lane: "_Lane", query: str, arguments: Sequence[Any], after: int, last: int, number: Callable[[Event], int]
    ) -> AsyncIterator[list[Event]]:
        """Yield the events numbered over `after` up to `last`, in pages; the numbers have no gaps."""
        wanted = FIRST_PAGE_EVENTS
        while after < last:
            asked = min(wanted, PAGE_EVENTS, last - after)
            page = await lane.read(query, [*arguments, Int8(after), Int8(asked)])
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

    async def read_partition(
        self, namespace: str, name: str, partition: int, *, after: int = 0, limit: int | None = None
    ) -> AsyncIterator[Event]:
        """Yield the partition's events one by one; see `partition_pages`."""
        async for page in self.partition_pages(namespace, name, partition, after=after, limit=limit):
            for event in page:
                yield event

    async def stream(self, namespace: str, name: str) -> Stream:
        """Return the active stream of that name.

        Raises:
            UnknownStreamError: there is none.
            UnavailableError: it isn't known, and PostgreSQL can't be reached.
        """
        return (await self._lane(namespace, name)).stream

    async def ping(self) -> None:
        """Return if the database answers now and holds a store.

        Raises:
            NotInstalledError: it holds none.
            UnavailableError: it doesn't answer.
        """
        await self.ask(self._control, catalog.store_id, seconds=3)

    async def _lane(self, namespace: str, name: str) -> "_Lane":
        lane = self._lanes.get((namespace, name))
        if lane is None:
            asked = time.monotonic()
            async with self._refreshing:
                # All that wait here are answered by one look that began after they asked.
                if self._refreshed < asked:
                    await asyncio.sleep(self._refreshed + REFRESH_ON_MISS - asked)
                    await self._refresh()
                elif self._refused is not None:
                    raise UnavailableError(self._refused)
            lane = self._lanes.get((namespace, name))
        if lane is None:
            raise UnknownStreamError(f"the store has no active stream {namespace}/{name}; is its EventStream Ready?")
        return lane

    async def _refresh(self) -> None:
        """Read the catalog; remember when, and what came of it, since every unknown name asks for it."""
        self._refreshed = time.monotonic()
        try:
            found = await self.ask(self._control, catalog.list_streams, seconds=10)
            self._refused = None
        except EventStoreError as error:
            self._refused = str(error)
            raise
        streams = {(stream.namespace, stream.name): stream for stream in found if stream.state == "active"}
        for key in self._lanes.keys() - streams.keys():
            del self._lanes[key]  # appends that wait in the lane are still answered by it
        for key, stream in streams.items():
            lane = self._lanes.get(key)
            if lane is None or lane.stream.stream != stream.stream:
                self._lanes[key] = _Lane(self, stream)
            else:
                lane.stream = stream

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH * random.uniform(0.8, 1.2))  # noqa: S311 (spreads load, guards nothing)
            try:
                async with self._refreshing:
                    await self._refresh()
            except EventStoreError as error:
                log.warning("The catalog can't be read; the known streams are served on", error=str(error))

    def appended(self, stream: Stream) -> None:
        """Note that `stream` has new events, committed now."""
        self._appended.add(stream.stream)
        self._appended_some.set()

    async def _notify_for_ever(self) -> None:
        """Tell listeners of appends, after commit and on another connection.

        Inside the appends' transactions NOTIFY would serialise the commits of the whole database. A notification that
        is lost costs the listener one interval of its slow poll.
        """
        while True:
            await self._appended_some.wait()
            try:
                await self._notify()
                await asyncio.sleep(_NOTIFY_GAP)
            except psycopg.Error as error:
                log.warning("Listeners can't be told of appends; they find them by their poll", error=str(error))
                await asyncio.sleep(1)

    async def _notify(self) -> None:
        streams = [str(stream) for stream in self._appended]
        self._appended.clear()
        self._appended_some.clear()
        async with self._control.lend() as conn:
            await conn.execute(
                "select pg_notify(%s, payload) from unnest(%s::text[]) as payload",
                [names.APPENDED_CHANNEL, streams if len(streams) <= 100 else [""]],
            )

    async def ask(
        self, connections: Connections, read: Callable[[AsyncConnection[Any]], Awaitable[_T]], *, seconds: float
    ) -> _T:
        """Return what `read` reads, asked once more where a connection had broken while it was idle.

        Raises:
            UnavailableError: PostgreSQL can't be reached, or doesn't answer in `seconds`.
        """
        try:
            async with asyncio.timeout(seconds):
                try:
                    async with connections.lend() as conn:
                        return await read(conn)
                except psycopg.OperationalError:
                    async with connections.lend() as conn:
                        return await read(conn)
        except (psycopg.OperationalError, TimeoutError, OSError) as error:
            raise UnavailableError(
                f"the event store's PostgreSQL can't be asked: {str(error) or f'no answer in {seconds:g} s'}"
            ) from error


def _count_refusal(error: BaseException) -> None:
    metrics.REFUSED.labels(type(error).__name__.removesuffix("Error")).inc()


class _Lane:
    """One stream: the appends that wait for it, and the one transaction that is in flight."""

    def __init__(self, store: EventStore, stream: Stream) -> None:
        self.stream = stream
        self._running = False
        self._connection: StoreConnection | None = None  # the one used last
        self._store = store
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._append_name = f"refold_append_{stream.stream}".encode()
        self._append = (
            sql.SQL("select outcomes, revisions, positions from {}.append_group({})")
            .format(sql.Identifier(stream.schema), sql.SQL(", ").join(sql.SQL(f"${n}") for n in range(1, 19)))
            .as_string()
            .encode()
        )
        self.subject_page = _page(stream.schema, sql.SQL("partition = %b and subject = %b and"), "revision")
        self.partition_page = _page(stream.schema, sql.SQL("partition = %b and"), "position")
        label = f"{stream.namespace}/{stream.name}"
        self._appended = metrics.APPENDED.labels(label)
        self._replayed = metrics.REPLAYED.labels(label)

    def add(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        if not self._running:
            self._running = True
            task = asyncio.create_task(self._run())
            self._store._running.add(task)
            task.add_done_callback(self._store._running.discard)

    async def read(self, query: str, arguments: Sequence[Any]) -> list[Event]:
        """Return one page, read in a transaction of its own."""

        async def fetch(conn: AsyncConnection[Any]) -> list[Event]:
            cursor = conn.cursor(binary=True, row_factory=args_row(Event))
            await cursor.execute(query.encode(), arguments, prepare=True)
            return await cursor.fetchall()

        try:
            return await self._store.ask(self._store._read, fetch, seconds=30)
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName) as error:
            raise self._gone() from error

    def _gone(self) -> UnknownStreamError:
        return UnknownStreamError(
            f"stream {self.stream.namespace}/{self.stream.name} isn't active any more; is its EventStream Ready?"
        )

    async def _run(self) -> None:
        """Commit group after group until nobody waits."""
        group: list[_Waiting] = []
        try:
            while self._waiting:
                group = self._take()
                await self._settle(group)
        finally:
            self._running = False
            # Nobody is left waiting, whatever went wrong here.
            self._fail([*group, *self._waiting], EventStoreError("the event store failed unexpectedly, see its log"))
            self._waiting.clear()

    def _take(self) -> list[_Waiting]:
        """Take the appends of the next group, in the order in which they came."""
        group: list[_Waiting] = []
        events = size = 0
        while self._waiting:
            if self._waiting[0].outcome.cancelled():
                self._waiting.popleft()  # its caller left before the transaction
                continue
            append = self._waiting[0].append
            events += len(append.ids)
            size += append.size
            if group and (events > GROUP_EVENTS or size > GROUP_BYTES):
                break
            group.append(self._waiting.popleft())
        return group

    async def _settle(self, group: list[_Waiting]) -> None:
        """Give each append of the group its outcome."""
        attempt = 0
        careful = False
        while group:
            try:
                begin = time.perf_counter()
                columns = await self._commit(group, careful=careful)
                metrics.COMMIT.observe(time.perf_counter() - begin)
            except (psycopg.Error, OSError) as error:
                state = getattr(error, "sqlstate", None) or ""
                if state == _NOT_SERVED or isinstance(
                    error, psycopg.errors.InvalidSchemaName | psycopg.errors.UndefinedFunction
                ):
                    self._fail(group, self._gone())
                    self._store._lanes.pop((self.stream.namespace, self.stream.name), None)
                    return
                if isinstance(error, psycopg.errors.UniqueViolation) and not careful:
                    careful = True  # an id is known although the expected revision is right: look for ids first
                    continue
                if state.startswith(_GUILTY):
                    if len(group) == 1:
                        self._fail(group, InvalidAppendError("events", f"PostgreSQL refused it: {error}"))
                        return
                    middle = len(group) // 2
                    await self._settle(group[:middle])
                    group = group[middle:]
                    continue
                if not isinstance(error, psycopg.OperationalError | OSError) and not state.startswith(_TRANSIENT):
                    log.error("A group of appends failed unexpectedly", stream=self.stream.schema, exc_info=error)
                    self._fail(group, EventStoreError(f"PostgreSQL answered what was not foreseen ({state or error})"))
                    return
                metrics.RETRIES.inc()
                late = time.monotonic() - PATIENCE
                self._fail(
                    [waiting for waiting in group if waiting.since < late],
                    UnavailableError(
                        f"PostgreSQL couldn't be asked for {PATIENCE:g} s: {error}; whether the events were appended "
                        "is unknown, repeat the append with the same ids"
                    ),
                )
                group = [waiting for waiting in group if waiting.since >= late]
                if attempt:  # not before the first: a connection that broke while it was idle is no reason to wait
                    least, most = _BACK_OFF
                    pause = min(most, least * 2**attempt) * random.uniform(0.5, 1)  # noqa: S311 (spreads load)
                    await asyncio.sleep(pause)
                attempt += 1
            else:
                self._answer(group, columns)
                return

    async def _commit(self, group: list[_Waiting], *, careful: bool) -> list[tuple[int, ...]]:
        """Run the group's transaction; return outcomes, revisions and positions."""
        metrics.GROUP.observe(len(group))
        parts = [waiting.append for waiting in group]
        arguments = _arguments(self.stream.stream, parts, careful=careful)
        async with self._store._write.lend(self._connection) as conn:
            self._connection = conn
            result = await conn.call(self._append_name, self._append, arguments)
        return [arrays.int8_values(result.get_value(0, column) or b"") for column in range(3)]

    def _answer(self, group: list[_Waiting], columns: list[tuple[int, ...]]) -> None:
        appended = replayed = 0
        for waiting, outcome, revision, position in zip(group, *columns, strict=True):
            append = waiting.append
            if outcome <= 1:
                if outcome == 0:
                    appended += len(append.ids)
                else:
                    replayed += 1
                if not waiting.outcome.done():
                    waiting.outcome.set_result(
                        AppendResult(revision, append.partition, position, outcome == 1, self.stream.incarnation)
                    )
            elif outcome == 2:
                self._fail([waiting], RevisionConflictError(append.subject, waiting.expected, revision))
            else:
                self._fail([waiting], IdConflictError(append.subject, revision))
        if appended:
            self._appended.inc(appended)
            self._store.appended(self.stream)
        if replayed:
            self._replayed.inc(replayed)
            # It may be this group's own first attempt that nobody told of.
            self._store.appended(self.stream)

    @staticmethod
    def _fail(group: Sequence[_Waiting], error: EventStoreError) -> None:
        for waiting in group:
            if not waiting.outcome.done():
                waiting.outcome.set_exception(error)


def _arguments(stream: int, parts: Sequence[Append], *, careful: bool) -> list[bytes]:
    """Return the arguments of append_group for one group; see migrations/stream/0002_append.sql for what they are."""
    after = 0
    numbers: list[int] = []
    afters: list[int] = []
    partition_after: dict[int, int] = {}
    partition_afters: list[int] = []
    subject_before: dict[bytes, int] = {}
    subject_befores: list[int] = []
    keys: dict[bytes, int] = {}
    again: list[bool] = []
    ids: dict[bytes, set[bytes]] = {}
    for number, part in enumerate(parts, 1):
        count = len(part.ids)
        after += count
        afters.append(after)
        numbers += [number] * count
        partition_after[part.partition] = partition_after.get(part.partition, 0) + count
        partition_afters.append(partition_after[part.partition])
        subject = part.subject_element
        before = subject_before.get(subject, 0)
        subject_befores.append(before)
        subject_before[subject] = before + count
        keys.setdefault(subject, number)
        known = ids.get(subject)
        if known is None:
            ids[subject] = set(part.ids)
            again.append(False)
        else:
            again.append(not known.isdisjoint(part.ids))
            known.update(part.ids)
    return [
        stream.to_bytes(4, "big"),
        arrays.int4_array(sorted(partition_after)),
        careful.to_bytes(1, "big"),
        arrays.text_array([part.subject_element for part in parts]),
        arrays.int4_array([part.partition for part in parts]),
        arrays.int8_array([part.expected for part in parts]),
        arrays.int4_array([len(part.ids) for part in parts]),
        arrays.int4_array(afters),
        arrays.int4_array(partition_afters),
        arrays.int4_array(subject_befores),
        arrays.int4_array([keys[part.subject_element] for part in parts]),
        arrays.bool_array(again),
        arrays.int4_array(numbers),
        arrays.text_array([part.subject_element for part in parts for _ in part.ids]),
        arrays.text_array([element for part in parts for element in part.ids]),
        arrays.text_array([element for part in parts for element in part.types]),
        arrays.jsonb_array([element for part in parts for element in part.data]),
        arrays.jsonb_array([element for part in parts for element in part.metadata]),
    ]


def _page(schema: str, where: sql.Composable, key: str) -> str:
    """Return the query for a page: at least one event, and no more once `PAGE_BYTES` are reached."""
    # Sizes are those in storage, where only large values are compressed; those are unpacked to be measured.
    size = sql.SQL(
        "case when pg_column_compression({0}) is null then pg_column_size({0}) else octet_length({0}::text) end"
    )
    return (
        sql.SQL(
            "select partition, position, subject, revision, id, type, recorded_at, data, metadata from ("
            "select *, sum(size) over (order by {key} rows between unbounded preceding and 1 preceding) as before "
            "from (select *, {data} + coalesce({metadata}, 0) as size from {schema}.events where {where} {key} > %b "
            "order by {key} limit %b) candidates) page where before is null or before < {bytes} order by {key}"
        )
        .format(
            key=sql.Identifier(key),
            data=size.format(sql.Identifier("data")),
            metadata=size.format(sql.Identifier("metadata")),
            schema=sql.Identifier(schema),
            where=where,
            bytes=PAGE_BYTES,
        )
        .as_string()
    )
