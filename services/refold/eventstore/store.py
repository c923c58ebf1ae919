"""The event store as a library: its streams, appends with group commit, reads in pages."""

import asyncio
import contextlib
import datetime as dt
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self

from refold.events import Event
from refold.eventstore import appends, catalog, live, metrics, reads
from refold.eventstore.appends import ExpectedRevision, Limits, NewEvent, SubjectAppend
from refold.eventstore.catalog import Definition, Stream
from refold.eventstore.connections import Connections
from refold.eventstore.directory import Directory
from refold.eventstore.errors import (
    EventStoreError,
    InactiveStreamError,
    NotInstalledError,
    OverloadedError,
    UnavailableError,
)
from refold.eventstore.guard import Guard
from refold.eventstore.heads import Heads
from refold.eventstore.lane import AllAppended, AppendResult, Lane, Waiting, WaitingAll
from refold.eventstore.live import After, Live, LiveEvent, Reader
from refold.eventstore.notifier import Notifier

#: How many may watch at once in one process, by default.
LIVE_READERS = 1000
#: The stream migration that made `append_all`.
_APPEND_ALL_MIGRATION = 3


class EventStore:
    """Appends to and reads from the streams of one store.

    Get one by `await EventStore.open(dsn)`; it is an async context manager. All methods may be called concurrently.
    """

    def __init__(
        self,
        dsn: str,
        *,
        limits: Limits,
        write_connections: int = 8,
        read_connections: int = 4,
        live_readers: int = LIVE_READERS,
    ) -> None:
        self.limits = limits
        self._write = Connections(dsn, size=write_connections, application="refold-eventstore-append")
        self._read = Connections(dsn, size=read_connections, application="refold-eventstore-read")
        self._control = Connections(dsn, size=2, application="refold-eventstore")
        self._live = Live(dsn, history=self._read, control=self._control, most=live_readers)
        self._directory = Directory(self._control, self._make_lane)
        self._notifier = Notifier(self._control)
        self._waiting = 0
        self._waiting_bytes = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._running: set[asyncio.Future[None]] = set()
        self._closing = False
        metrics.WAITING.set_function(lambda: self._waiting)
        metrics.WAITING_BYTES.set_function(lambda: self._waiting_bytes)
        self._heads = Heads(self._control)

    @classmethod
    async def open(
        cls,
        dsn: str,
        *,
        limits: Limits | None = None,
        write_connections: int = 8,
        read_connections: int = 4,
        live_readers: int = LIVE_READERS,
    ) -> Self:
        """Return a store that is connected to the database of `dsn` as the store's service role.

        Args:
            dsn: of the database.
            limits: of appends.
            write_connections: at most, for appends.
            read_connections: at most, for reads; those that watch share them too.
            live_readers: how many may watch at once.

        Raises:
            NotInstalledError: the database holds no store.
            UnavailableError: the database can't be reached.
        """
        store = cls(
            dsn,
            limits=limits or Limits(),
            write_connections=write_connections,
            read_connections=read_connections,
            live_readers=live_readers,
        )
        try:
            await store._directory.refresh()
        except BaseException:
            await store.close()
            raise
        store.start()
        return store

    def start(self) -> None:
        """Begin the work in the background; for a store that wasn't made by `open` and may find its database later."""
        self._tasks = [asyncio.create_task(self._refresh_for_ever()), asyncio.create_task(self._notifier.run())]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Finish the appends that wait, refuse new ones, and close the connections."""
        self._closing = True
        await self._live.close()
        if self._running:
            await asyncio.wait(self._running)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._notifier.finish()
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
            InvalidAppendError: a field isn't what it must be (TooLargeError: is over a limit; UnknownTypeError,
                InvalidDataError: the stream's event types refuse an event).
            RevisionConflictError: the subject isn't at the expected revision.
            IdConflictError: ids are known with other content.
            OverloadedError: too many appends wait.
            UnavailableError: PostgreSQL couldn't be asked in time; whether it was appended is unknown.
        """
        stream = self._directory.find(namespace, name) or await self.stream(namespace, name)
        return await self.submit(stream, subject, events, expected_revision=expected_revision)

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
            lane = self._directory.known(stream)
            checked = lane.guard.check(
                appends.check(
                    subject,
                    events,
                    expected_revision=expected_revision,
                    partitions=lane.stream.partitions,
                    limits=self.limits,
                )
            )
            outcome: asyncio.Future[AppendResult] = self._admit(1, checked.size)
        except EventStoreError as error:
            _count_refusal(error)
            raise
        lane.add(Waiting(checked, expected_revision, time.monotonic(), outcome))
        return outcome

    async def append_all(self, namespace: str, name: str, parts: Sequence[SubjectAppend]) -> AllAppended:
        """Append to many subjects of one stream, all or none, and return when all is committed.

        Repeated with the same appends it changes nothing and returns the first outcome as `replayed`. The topic and
        read models get it partition by partition, so they may show it in parts; the result's token makes a query wait
        until it has seen all of it.

        Args:
            namespace: the stream's namespace.
            name: the stream's name.
            parts: at least one, each to another subject; together within what `limits` allow for one append.

        Raises:
            UnknownStreamError: there is no active stream of that name.
            InvalidAppendError: a field isn't what it must be, or a subject stands in two parts (TooLargeError: is over
                a limit; UnknownTypeError, InvalidDataError: the stream's event types refuse an event).
            RevisionConflictError: a subject isn't at the expected revision; `index` tells in which part.
            IdConflictError: ids of some part are known, and it isn't a retry of all the parts as they were.
            NotInstalledError: the stream's schema is of an earlier version and wasn't upgraded yet.
            OverloadedError: too many appends wait.
            UnavailableError: PostgreSQL couldn't be asked in time; whether it was appended is unknown.
        """
        stream = await self.stream(namespace, name)
        try:
            lane = self._directory.known(stream)
            if stream.migration < _APPEND_ALL_MIGRATION:
                raise NotInstalledError(
                    f"stream {namespace}/{name} takes no atomic appends before the operator has upgraded its schema "
                    f"from migration {stream.migration} to {_APPEND_ALL_MIGRATION}"
                )
            checked = [
                lane.guard.check(part)
                for part in appends.check_all(parts, partitions=lane.stream.partitions, limits=self.limits)
            ]
            outcome: asyncio.Future[AllAppended] = self._admit(len(checked), sum(part.size for part in checked))
        except EventStoreError as error:
            _count_refusal(error)
            raise
        lane.add(WaitingAll(checked, [part.expected_revision for part in parts], time.monotonic(), outcome))
        return await outcome

    def _admit(self, count: int, size: int) -> asyncio.Future[Any]:
        """Count `count` appends of `size` bytes as waiting until the outcome that is returned is there, or refuse."""
        if self._closing:
            raise UnavailableError("the event store is stopping; the append wasn't taken, send it to another")
        limits = self.limits
        if self._waiting >= limits.waiting_appends or self._waiting_bytes >= limits.waiting_bytes:
            raise OverloadedError(
                f"{self._waiting} appends of {self._waiting_bytes} bytes are waiting, eventstore.limits.waitingAppends "
                f"is {limits.waiting_appends}, waitingBytes {limits.waiting_bytes}; this one wasn't taken, try again a "
                "little later"
            )
        self._waiting += count
        self._waiting_bytes += size
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        outcome.add_done_callback(functools.partial(self._settled, count, size))
        return outcome

    def _settled(self, count: int, size: int, outcome: asyncio.Future[Any]) -> None:
        self._waiting -= count
        self._waiting_bytes -= size
        if not outcome.cancelled() and (error := outcome.exception()) is not None:
            _count_refusal(error)

    async def subject_pages(
        self,
        namespace: str,
        name: str,
        subject: str,
        *,
        from_revision: int = 1,
        to_revision: int | None = None,
        until: dt.datetime | None = None,
        limit: int | None = None,
        backward: bool = False,
    ) -> AsyncIterator[list[Event]]:
        """Yield the subject's events in order of their revisions, in pages that aren't empty.

        Each page is read in a short transaction of its own; nothing is held in the database between two.

        Args:
            namespace: the stream's namespace.
            name: the stream's name.
            subject: whose events.
            from_revision: the lowest that is wanted, in both directions.
            to_revision: the highest, or None for all.
            until: the last `recorded_at` that is wanted, or None for all.
            limit: how many events at most.
            backward: the highest revision first.

        Raises:
            UnknownStreamError: there is no active stream of that name.
            InvalidAppendError: the subject can't be one.
            UnavailableError: PostgreSQL can't be reached.
        """

        def read(stream: Stream) -> AsyncIterator[list[Event]]:
            return reads.pages(
                self._read,
                reads.Source.of_subject(stream, subject),
                first=from_revision,
                last=to_revision,
                until=until,
                limit=limit,
                backward=backward,
            )

        async for page in self._pages(namespace, name, read):
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
        limit: int | None = None,
        backward: bool = False,
    ) -> AsyncIterator[Event]:
        """Yield the subject's events one by one; see `subject_pages`."""
        pages = self.subject_pages(
            namespace,
            name,
            subject,
            from_revision=from_revision,
            to_revision=to_revision,
            until=until,
            limit=limit,
            backward=backward,
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

        def read(stream: Stream) -> AsyncIterator[list[Event]]:
            return reads.pages(self._read, reads.Source.of_partition(stream, partition), first=after + 1, limit=limit)

        async for page in self._pages(namespace, name, read):
            yield page

    async def read_partition(
        self, namespace: str, name: str, partition: int, *, after: int = 0, limit: int | None = None
    ) -> AsyncIterator[Event]:
        """Yield the partition's events one by one; see `partition_pages`."""
        async for page in self.partition_pages(namespace, name, partition, after=after, limit=limit):
            for event in page:
                yield event

    async def watch_subject(
        self, namespace: str, name: str, subject: str, *, after: After = 0
    ) -> AsyncIterator[LiveEvent]:
        """Yield the subject's events after `after`, in order, and then each as it is appended, by whomever.

        Nothing is left out or given twice. The end comes when the store is closed. Whoever leaves the loop early
        closes the iterator (`contextlib.aclosing`).

        Args:
            namespace: the stream's namespace.
            name: the stream's name.
            subject: whose events.
            after: a revision (0: from the beginning), "now", or the token of an event or an append, to go on after it.

        Raises:
            UnknownStreamError: there is no active stream of that name, or it was dropped while it was watched.
            InvalidAppendError: the subject can't be one.
            OtherHistoryError: `after` is none of this history's; the stream was made again, or the store restored.
            tokens.InvalidTokenError: `after` can't be understood.
            OverloadedError: too many are watching.
            UnavailableError: PostgreSQL can't be reached.
        """
        async for one in live.events(await self.watch(namespace, name, after, subject=subject)):
            yield one

    async def watch_partition(
        self, namespace: str, name: str, partition: int, *, after: After = 0
    ) -> AsyncIterator[LiveEvent]:
        """Yield the partition's events after a position, and as they are appended; see `watch_subject`."""
        async for one in live.events(await self.watch(namespace, name, after, partition=partition)):
            yield one

    async def watch_stream(self, namespace: str, name: str, *, after: After = 0) -> AsyncIterator[LiveEvent]:
        """Yield all the stream's events, each partition's in order, and as they are appended; see `watch_subject`.

        `after` is 0, "now" or a token; in partitions that a token doesn't name it begins at the beginning.
        """
        async for one in live.events(await self.watch(namespace, name, after)):
            yield one

    async def watch(
        self, namespace: str, name: str, after: After, *, subject: str | None = None, partition: int | None = None
    ) -> Reader:
        """Return a live reader of a subject, a partition or the whole stream, to be closed; see `watch_subject`."""
        lane = await self._directory.lane(namespace, name)
        try:
            return await self._live.open(lane.stream, after, subject=subject, partition=partition)
        except InactiveStreamError:
            self._directory.forget(lane)
        stream = await self.stream(namespace, name)
        return await self._live.open(stream, after, subject=subject, partition=partition)

    def end_watches(self) -> None:
        """Let all that watch come to their end, and take no new ones; for a stop that is near."""
        self._live.end()

    async def _pages(
        self, namespace: str, name: str, read: Callable[[Stream], AsyncIterator[list[Event]]]
    ) -> AsyncIterator[list[Event]]:
        """Yield what `read` reads; of the stream as it is now, where it was dropped and made again since it was known.

        All pages are of one history: a read under way breaks off where its stream is dropped.
        """
        lane = await self._directory.lane(namespace, name)
        begun = False
        try:
            async for page in read(lane.stream):
                begun = True
                yield page
        except InactiveStreamError:
            self._directory.forget(lane)
            if begun:
                raise
        else:
            return
        async for page in read((await self._directory.lane(namespace, name)).stream):
            yield page

    async def stream(self, namespace: str, name: str) -> Stream:
        """Return the active stream of that name.

        Raises:
            UnknownStreamError: there is none.
            UnavailableError: it isn't known, and PostgreSQL can't be reached.
        """
        return (await self._directory.lane(namespace, name)).stream

    async def definition(self, namespace: str, name: str) -> Definition | None:
        """Return what the live version of a Projection folds, as the operator wrote it; None where it wrote none.

        Raises:
            NotInstalledError: the operator hasn't upgraded the store yet.
            UnavailableError: PostgreSQL can't be reached.
        """
        return await self._control.ask(lambda conn: catalog.get_definition(conn, namespace, name), seconds=5)

    async def ping(self) -> None:
        """Return if the database answers now and holds a store.

        Raises:
            NotInstalledError: it holds none.
            UnavailableError: it doesn't answer.
        """
        await self._control.ask(catalog.store_id, seconds=3)

    def _make_lane(self, stream: Stream) -> Lane:
        return Lane(
            stream,
            self._write,
            Guard(stream, self._read),
            running=self._running,
            appended=self._note_appended,
            gone=self._directory.forget,
        )

    async def _refresh_for_ever(self) -> None:
        while True:
            if await self._directory.refresh_in_turn():
                with contextlib.suppress(EventStoreError):  # they are read again in the next turn
                    await self._heads.show(self._directory.streams)

    def _note_appended(self, stream: Stream) -> None:
        self._notifier.note(stream.stream)
        self._live.wake(stream.stream)


def _count_refusal(error: BaseException) -> None:
    metrics.REFUSED.labels(type(error).__name__.removesuffix("Error")).inc()
