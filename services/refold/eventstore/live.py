"""Live reads: each reader gets the events after its position, and those that come, in order, without gap or repeat.

What all readers of a process share is one look at the heads (woken by appends of this process, by NOTIFY on one
connection, and slowly by itself, so that a lost notification costs a moment and nothing else) and one `_Tail` a
watched partition, which reads each new event once and offers it to the readers that want it.

A reader is behind or up to date. One that is behind reads the history page by page at its own speed. It has caught up
when a page is empty: the tail's offers have been kept since before that page was read, so no event lies between. One
that is up to date takes the offers. A reader that doesn't take them is behind again as soon as they are over a page,
and they are forgotten: it holds no more than that, and delays nobody. Numbers have no gaps, so what isn't the next
event is noticed.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, NamedTuple

import psycopg
import structlog
from psycopg import AsyncConnection

from refold import names, tokens
from refold.events import Event
from refold.eventstore import metrics, reads
from refold.eventstore.catalog import Stream
from refold.eventstore.connections import Connections, connect
from refold.eventstore.errors import EventStoreError, InactiveStreamError, OtherHistoryError, OverloadedError

log = structlog.get_logger(__name__)

#: Where a live read begins: after a revision or position (0: at the beginning), "now", or after a token's positions.
After = int | str

#: Seconds between two looks at the heads that nothing asked for.
POLL = 1.0
#: Seconds between two looks, so that what is appended meanwhile is read at once.
_GAP = 0.005
#: A page: events, and bytes of them, that are read at once, and that may wait for one reader.
WAITING_EVENTS = 250
WAITING_BYTES = 256 * 1024
#: Seconds that the connection that listens is kept after the last reader left.
_LINGER = 30.0
_RETRY = 1.0


class LiveEvent(NamedTuple):
    """An event, and the token with which a reader goes on after it."""

    event: Event
    token: str


class _Tail:
    """The end of one partition: up to which position events were offered, and to whom they are."""

    def __init__(self, source: reads.Source, position: int) -> None:
        self.source = source
        self.position = position
        self._of_all: dict[_Feed, None] = {}
        self._of_subject: dict[str, dict[_Feed, None]] = {}

    def add(self, feed: "_Feed") -> None:
        self._feeds(feed)[feed] = None

    def remove(self, feed: "_Feed") -> bool:
        """Take `feed` out; tell whether nobody is left."""
        feeds = self._feeds(feed)
        feeds.pop(feed, None)
        if not feeds and feed.source.subject is not None:
            del self._of_subject[feed.source.subject]
        return not self._of_all and not self._of_subject

    def _feeds(self, feed: "_Feed") -> "dict[_Feed, None]":
        subject = feed.source.subject
        return self._of_all if subject is None else self._of_subject.setdefault(subject, {})

    async def advance(self, connections: Connections, head: int) -> None:
        """Read and offer the events up to `head`."""
        while self.position < head:
            page = await self.source.page(
                connections, self.position + 1, head, events=WAITING_EVENTS, size=WAITING_BYTES
            )
            if not page:
                return
            self.position = page[-1].position
            for feed in self._of_all:
                feed.offer(page)
            if self._of_subject:
                for event in page:
                    for feed in self._of_subject.get(event.subject, ()):
                        feed.offer((event,))


class _Feed:
    """What one reader gets from one subject or partition.

    Args:
        source: of its events.
        number: of the last event that the reader has.
        reader: whose.
    """

    def __init__(self, source: reads.Source, number: int, reader: "Reader") -> None:
        self.source = source
        self._number = number
        self._reader = reader
        self._behind = True
        self._keeping = False  # offers are kept
        self._offered: list[Event] = []
        self._size = 0

    @property
    def ready(self) -> bool:
        """Whether there is something to take."""
        return self._behind or bool(self._offered)

    def offer(self, events: Sequence[Event]) -> None:
        """Keep events for the reader, or know that they must be read again."""
        if not self._keeping:
            return
        size = reads.size_of(events)
        if self._reader.has_room(len(events), size):
            self._offered += events
            self._size += size
            self._reader.hold(len(events), size)
        else:
            self._forget()
            self._keeping = False
            if not self._behind:
                self._behind = True
                metrics.LIVE_BEHIND.inc()
        self._reader.wake(self)

    async def take(self, connections: Connections) -> list[Event]:
        """Return the next events, at most a page; none where that showed that there are none now."""
        if self._behind:
            self._forget()
            self._keeping = True
            page = await self.source.page(
                connections, self._number + 1, reads.MAX_NUMBER, events=WAITING_EVENTS, size=WAITING_BYTES
            )
            if not page:
                self._behind = not self._keeping
        else:
            offered = self._offered
            self._forget()
            page = [event for event in offered if self.source.number(event) > self._number]
            if page and self.source.number(page[0]) != self._number + 1:
                log.error("Events were not offered to a live reader; it reads them again", number=self._number)
                self._behind = True
                return []
        if page:
            self._number = self.source.number(page[-1])
        return page

    def _forget(self) -> None:
        self._reader.hold(-len(self._offered), -self._size)
        self._offered = []
        self._size = 0


class Reader:
    """One live reader; get it from `Live.open`, and close it.

    Attributes:
        token: of where it begins.
    """

    def __init__(self, live: "Live", stream: Stream) -> None:
        self.token = ""
        self.stream = stream
        self._live = live
        self._feeds: list[_Feed] = []
        self._ready: dict[_Feed, None] = {}
        self._rung = asyncio.Event()
        self._held = 0
        self._held_bytes = 0
        self._positions: list[int] | None = None
        self._ended = False
        self._error: EventStoreError | None = None
        self._on_end: Callable[[], None] | None = None

    def begin(self, feeds: Sequence[_Feed], positions: Sequence[int], *, whole: bool) -> None:
        """Set where to begin: `positions` is one for each of `feeds`; `whole` says that these are all partitions."""
        self._feeds = list(feeds)
        self._ready = dict.fromkeys(feeds)
        if whole:
            self._positions = list(positions)
            self.token = tokens.encode_all(self.stream.incarnation, positions)
        else:
            self.token = self._token(feeds[0].source.partition, positions[0])

    def on_end(self, call: Callable[[], None]) -> None:
        """Have `call` called when the reader is ended by other than its own `close`; at once where it is."""
        self._on_end = call
        if self._ended:
            call()

    async def next(self, seconds: float | None = None) -> list[LiveEvent] | None:
        """Return the next events, in order within their partition; wait for them.

        Args:
            seconds: to wait at most; then the list is empty.

        Returns:
            None at the end, which comes when the store stops.

        Raises:
            InactiveStreamError: the stream isn't there any more.
            UnavailableError: the history was to be read and PostgreSQL can't be reached.
        """
        while not self._ended:
            if self._ready:
                feed = next(iter(self._ready))
                page = await feed.take(self._live.history)
                del self._ready[feed]
                if feed.ready:
                    self._ready[feed] = None  # after the others
                if page:
                    metrics.LIVE_EVENTS.inc(len(page))
                    return [LiveEvent(event, self._seen(event)) for event in page]
                continue
            self._rung.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._rung.wait()
            except TimeoutError:
                return []
        if self._error is not None:
            raise self._error
        return None

    def _seen(self, event: Event) -> str:
        if self._positions is None:
            return self._token(event.partition, event.position)
        self._positions[event.partition] = event.position
        return tokens.encode_all(self.stream.incarnation, self._positions)

    def _token(self, partition: int, position: int) -> str:
        return tokens.encode([tokens.Position(self.stream.incarnation, partition, position)])

    def has_room(self, events: int, size: int) -> bool:
        """Tell whether so much more may wait for it; one page always may."""
        return not self._held or (self._held + events <= WAITING_EVENTS and self._held_bytes + size <= WAITING_BYTES)

    def hold(self, events: int, size: int) -> None:
        """Count what waits for it."""
        self._held += events
        self._held_bytes += size

    def wake(self, feed: _Feed) -> None:
        """Have `feed` taken from."""
        self._ready[feed] = None
        self._rung.set()

    def end(self, error: EventStoreError | None = None) -> None:
        """Let `next` return None, or raise `error`."""
        if not self._ended:
            self._ended, self._error = True, error
            self._rung.set()
            if self._on_end is not None:
                self._on_end()

    def close(self) -> None:
        """Leave; events are no longer kept for it."""
        self._ended = True
        self._live.leave(self, self._feeds)
        self._feeds = []


class Live:
    """The live readers of one process.

    Args:
        dsn: of the store, for the connection that listens.
        history: connections on which events are read.
        control: connections on which heads are read.
        most: how many readers may be open.
    """

    def __init__(self, dsn: str, *, history: Connections, control: Connections, most: int) -> None:
        self.history = history
        self._dsn = dsn
        self._control = control
        self._most = most
        self._readers: set[Reader] = set()
        self._tails: dict[int, dict[int, _Tail]] = {}  # by stream and partition
        self._woken: set[int] = set()
        self._all_woken = False
        self._rung = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._used = 0.0
        self._stopping = False
        metrics.LIVE_READERS.set_function(lambda: len(self._readers))

    async def open(self, stream: Stream, after: After, *, subject: str | None, partition: int | None) -> Reader:
        """Return a reader of a subject, of a partition, or, with neither, of all partitions of `stream`.

        Raises:
            InvalidAppendError: the subject can't be one.
            UnknownStreamError: the stream has no such partition (InactiveStreamError: isn't there any more).
            OtherHistoryError: `after` is none of this history's.
            tokens.InvalidTokenError: `after` can't be understood.
            OverloadedError: too many readers are open, or the store is stopping.
            UnavailableError: PostgreSQL can't be reached.
        """
        if subject is not None:
            sources = [reads.Source.of_subject(stream, subject)]
        elif partition is not None:
            sources = [reads.Source.of_partition(stream, partition)]
        else:
            sources = [reads.Source.of_partition(stream, number) for number in range(stream.partitions)]
        if self._stopping:
            raise OverloadedError("the event store is stopping; watch at another")
        if len(self._readers) >= self._most:
            raise OverloadedError(f"{len(self._readers)} readers are watching, which is the limit; try again later")
        reader = Reader(self, stream)
        self._readers.add(reader)
        try:
            heads = (await self._heads([stream.stream])).get(stream.stream)
            if heads is None:
                raise InactiveStreamError(stream.namespace, stream.name)
            whole = subject is None and partition is None
            starts = [await self._start(source, after, heads, whole=whole) for source in sources]
        except BaseException:
            self._readers.discard(reader)
            raise
        feeds = [_Feed(source, number, reader) for source, (number, _) in zip(sources, starts, strict=True)]
        reader.begin(feeds, [position for _, position in starts], whole=whole)
        tails = self._tails.setdefault(stream.stream, {})
        for feed in feeds:
            number = feed.source.partition
            if number not in tails:
                # What is committed up to this head is in the history, which the reader reads first.
                tails[number] = _Tail(reads.Source.of_partition(stream, number), heads[number])
            tails[number].add(feed)
        if self._stopping:
            reader.end()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return reader

    async def _start(
        self, source: reads.Source, after: After, heads: dict[int, int], *, whole: bool
    ) -> tuple[int, int]:
        """Return after which number and position of `source` the reader begins."""
        stream, partition = source.stream, source.partition
        name, head = f"{stream.namespace}/{stream.name}", heads[partition]
        if isinstance(after, int):
            if after == 0 or whole:
                if after != 0:
                    raise tokens.InvalidTokenError(
                        "a number is a position in one partition; after what of a stream is told by a token"
                    )
                return 0, 0
            if source.subject is None:
                position = after
            else:
                known = 0 < after <= reads.MAX_NUMBER
                at = await source.page(self.history, after, after, events=1, size=1) if known else []
                position = at[0].position if at else head + 1
            if not 0 <= position <= head:
                raise OtherHistoryError(
                    f"there is no event {after} in {source.what} of stream {name} yet; watch after 0 or after now"
                )
            return after, position
        if after == "now":
            position = head
        else:
            found = [one for one in tokens.decode(after) if one.incarnation == stream.incarnation]
            if not found:
                raise OtherHistoryError(
                    f"the id isn't of the history of stream {name} as it is now; was the stream deleted and made "
                    "again? Watch without an id, from the beginning or after now"
                )
            positions = {one.partition: one.position for one in found}
            if not whole and partition not in positions:
                raise tokens.InvalidTokenError(f"it names no position of partition {partition}, in which this is")
            position = positions.get(partition, 0)
            if not 0 <= position <= head:
                raise OtherHistoryError(
                    f"the id is of position {position} of partition {partition}, but the history of stream {name} "
                    f"ends at {head}; was the store restored from a backup? Watch without an id"
                )
        return (position if source.subject is None else await source.last_at(self.history, position)), position

    def leave(self, reader: Reader, feeds: Iterable[_Feed]) -> None:
        """Forget a reader."""
        self._readers.discard(reader)
        self._used = time.monotonic()
        tails = self._tails.get(reader.stream.stream, {})
        for feed in feeds:
            if tails[feed.source.partition].remove(feed):
                del tails[feed.source.partition]
        if not tails:
            self._tails.pop(reader.stream.stream, None)

    def wake(self, stream: int) -> None:
        """Have a look at a stream that has new events."""
        if stream in self._tails:
            self._woken.add(stream)
            self._rung.set()

    def end(self) -> None:
        """Let all readers come to their end, and take no new ones."""
        self._stopping = True
        for reader in list(self._readers):
            reader.end()

    async def close(self) -> None:
        """End all readers and what works for them."""
        self.end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        listener = asyncio.create_task(self._listen())
        polled = time.monotonic()
        try:
            while self._readers or time.monotonic() < self._used + _LINGER:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(polled + POLL - time.monotonic()):
                        await self._rung.wait()
                self._rung.clear()
                if self._all_woken or time.monotonic() >= polled + POLL:
                    streams, polled = set(self._tails), time.monotonic()
                else:
                    streams = self._woken & self._tails.keys()
                self._all_woken = False
                self._woken.clear()
                try:
                    await self._look(streams)
                    await asyncio.sleep(_GAP)
                except EventStoreError as error:
                    log.warning("Watched streams can't be read; tried again", error=str(error))
                    self._all_woken = True
                    await asyncio.sleep(_RETRY)
        except Exception:
            log.exception("Live reads failed; the readers are ended and may come again")
            for reader in list(self._readers):
                reader.end()
        finally:
            self._task = None
            listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listener

    async def _look(self, streams: set[int]) -> None:
        """Offer what is new in `streams`."""
        if not streams:
            return
        heads = await self._heads(sorted(streams))
        advances = []
        for stream in streams:
            if stream not in heads:
                self._end(stream, InactiveStreamError)
                continue
            for partition, tail in self._tails.get(stream, {}).items():
                if heads[stream][partition] < tail.position:
                    self._end(stream, _went_back)
                advances.append(self._advance(tail, heads[stream][partition]))
        outcomes = await asyncio.gather(*advances, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _advance(self, tail: _Tail, head: int) -> None:
        try:
            await tail.advance(self.history, head)
        except InactiveStreamError:
            self._end(tail.source.stream.stream, InactiveStreamError)

    def _end(self, stream: int, error: Callable[[str, str], EventStoreError]) -> None:
        """End the readers of a stream with an error of its namespace and name."""
        for reader in list(self._readers):
            if reader.stream.stream == stream:
                reader.end(error(reader.stream.namespace, reader.stream.name))

    async def _heads(self, streams: Sequence[int]) -> dict[int, dict[int, int]]:
        """Return the heads of the active ones of `streams`, by stream and partition."""

        async def fetch(conn: AsyncConnection[Any]) -> list[Any]:
            cursor = await conn.execute(
                "select stream, partition, head from refold.heads where stream = any(%s) and active order by stream",
                [list(streams)],
            )
            return await cursor.fetchall()

        found = await self._control.ask(fetch, seconds=10)
        return {
            stream: {partition: head for _, partition, head in rows}
            for stream, rows in itertools.groupby(found, key=lambda row: row[0])
        }

    async def _listen(self) -> None:
        while True:
            try:
                async with await connect(self._dsn, "refold-eventstore-live") as conn:
                    await conn.execute(f"listen {names.APPENDED_CHANNEL}".encode())
                    self._look_at_all()  # at what came before it listened
                    async for notice in conn.notifies():
                        if notice.payload.isdecimal():
                            self.wake(int(notice.payload))
                        else:
                            self._look_at_all()
            except (psycopg.Error, OSError) as error:
                log.warning("Appends of other processes are noticed by the poll alone", error=str(error))
            await asyncio.sleep(_RETRY)

    def _look_at_all(self) -> None:
        self._all_woken = True
        self._rung.set()


def _went_back(namespace: str, name: str) -> OtherHistoryError:
    return OtherHistoryError(
        f"the history of stream {namespace}/{name} ends before events that were read; was the store restored?"
    )


async def events(reader: Reader) -> AsyncIterator[LiveEvent]:
    """Yield the reader's events one by one, until the store is closed; close the reader at the end."""
    try:
        while (page := await reader.next()) is not None:
            for one in page:
                yield one
    finally:
        reader.close()
