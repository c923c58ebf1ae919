"""One stream's appends: group commit.

Appends that wait for a stream go together in its next transaction; one transaction is in flight per stream and
process, and no timer delays a lone append. Each append has its own outcome. A group that the database refuses as a
whole is split until the guilty append stands alone. A group whose connection breaks is run again, also where its
outcome is unknown: events carry ids, so what was committed is found and answered with its first outcome.

Under load a second group is sent behind the one in flight, on its connection, so that PostgreSQL goes from one
transaction to the next without waiting for this process. It is applied only if the one before it was (see
group_call.py); else both are applied once more, in their order.

What is usual is sent and answered in callbacks of the event loop. What isn't (event types to be read, no connection
yet, an error) is settled in a task, in the order in which it was begun, and meanwhile nothing else is.

An atomic append (to many subjects, all or none) is a group of its own, in its turn.
"""

import asyncio
import collections
import itertools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Self, cast

import psycopg
import structlog
from psycopg.pq.abc import PGresult

from refold import tokens
from refold.eventstore import arrays, group_call, metrics
from refold.eventstore.appends import Append, ExpectedRevision
from refold.eventstore.catalog import Stream
from refold.eventstore.connections import Answer, Connections, Held, StoreConnection
from refold.eventstore.errors import (
    EventStoreError,
    IdConflictError,
    InactiveStreamError,
    InvalidAppendError,
    RevisionConflictError,
    UnavailableError,
)
from refold.eventstore.guard import Guard
from refold.eventstore.pace import Pace

log = structlog.get_logger(__name__)

#: A group has at most this many events and bytes (but always one append).
GROUP_EVENTS = 2000
GROUP_BYTES = 4 * 1024 * 1024
#: Seconds that an append may wait for PostgreSQL before it is given up as unavailable.
PATIENCE = 10.0
#: Seconds before a group is tried again: at first, and at most.
_BACK_OFF = (0.05, 1.0)

#: The stream migration that made `append_one`.
_APPEND_ONE_MIGRATION = 4

_NOT_SERVED = "RF001"
#: The group was checked with other event types than the stream's.
_UNCHECKED = "RF006"
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


class AllAppended(NamedTuple):
    """What an atomic append did: the results of its parts, in their order. All are new, or all `replayed`."""

    appends: list[AppendResult]

    @property
    def replayed(self) -> bool:
        """Whether the events were there already, from an earlier attempt."""
        return self.appends[0].replayed

    @property
    def token(self) -> str:
        """The token that makes a query wait until it has seen all of it: of each partition, the last position."""
        last: dict[int, int] = {}
        for part in self.appends:
            last[part.partition] = max(part.position, last.get(part.partition, 0))
        incarnation = self.appends[0].incarnation
        return tokens.encode([tokens.Position(incarnation, *place) for place in sorted(last.items())])


class Waiting(NamedTuple):
    """An append that waits for its transaction, `since` (time.monotonic), and its outcome to come."""

    append: Append
    expected: ExpectedRevision
    since: float
    outcome: asyncio.Future[AppendResult]

    def parts(self) -> Sequence[Append]:
        """Return the append alone."""
        return (self.append,)

    def checked(self, guard: Guard) -> Self:
        """Return it checked with the event types that are known now."""
        return self._replace(append=guard.check(self.append))


class WaitingAll(NamedTuple):
    """An atomic append, as `Waiting`; a group of its own."""

    appends: list[Append]
    expected: list[ExpectedRevision]
    since: float
    outcome: asyncio.Future[AllAppended]

    def parts(self) -> Sequence[Append]:
        """Return the appends to each subject."""
        return self.appends

    def checked(self, guard: Guard) -> Self:
        """Return it checked with the event types that are known now."""
        return self._replace(appends=[guard.check(append) for append in self.appends])


#: One `WaitingAll`, or any number of `Waiting`.
_Group = Sequence[Waiting | WaitingAll]

#: Marks of groups, so that one can be sent behind another; no two of a process are alike.
_MARKS = itertools.count(1)


class _Flight:
    """A group that is under way.

    Attributes:
        group: its appends.
        mark: what another group names to be sent behind this one; empty: none can be.
        behind: the group that it was sent behind.
        sent: when (time.perf_counter).
        failed: it is to be settled, because it couldn't be sent or came back with `error`.
        error: why, if PostgreSQL has refused it.
    """

    __slots__ = ("behind", "error", "failed", "group", "mark", "sent")

    def __init__(self, group: _Group) -> None:
        self.group = group
        self.mark = b""
        self.behind: _Flight | None = None
        self.sent = 0.0
        self.failed = False
        self.error: psycopg.Error | None = None


class Lane:
    """One stream: the appends that wait for it, and its groups that are under way."""

    def __init__(
        self,
        stream: Stream,
        connections: Connections,
        guard: Guard,
        *,
        running: set[asyncio.Future[None]],
        appended: Callable[[Stream], None],
        gone: Callable[["Lane"], None],
    ) -> None:
        """Make the lane of `stream`, which may be replaced by what the catalog says later.

        Args:
            stream: the stream.
            connections: on which it appends.
            guard: the stream's event types.
            running: where a future of the lane's stands while appends wait or are under way.
            appended: is told when new events were committed.
            gone: is told when the database says that the stream isn't active any more.
        """
        self.stream = stream
        self.guard = guard
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._busy_lanes = running
        self._told = appended
        self._gone = gone
        self._busy: asyncio.Future[None] | None = None  # this lane's among `running`
        self._beginning = False  # whether `_begin` is about to run
        self._mending: asyncio.Task[None] | None = None
        self._landing: asyncio.Future[None] | None = None  # a flight that the task waits for
        self._pace = Pace()
        self._connection: StoreConnection | None = None  # the one used last
        self._held: Held | None = None  # the one that flights are on
        self._in_air = 0  # how many flights are
        self._landed = 0.0  # when the last one came back (time.perf_counter)
        self._former = 0  # how many appends the last group had, whose callers go on now
        self._flights: collections.deque[_Flight] = collections.deque()  # in the order in which they were begun
        self._waiting: collections.deque[Waiting | WaitingAll] = collections.deque()
        self._append_as(0)
        label = f"{stream.namespace}/{stream.name}"
        self._appended = metrics.APPENDED.labels(label)
        self._replayed = metrics.REPLAYED.labels(label)

    def _append_as(self, types_revision: int) -> None:
        """Append from now on what was checked with this revision of the event types."""
        self._revision = types_revision
        number, schema = self.stream.stream, self.stream.schema
        self._append_name = f"refold_append_{number}_{types_revision}".encode()
        self._append = group_call.query(schema, "append_group", types_revision)
        self._append_all_name = f"refold_append_all_{number}_{types_revision}".encode()
        self._append_all = group_call.query(schema, "append_all", types_revision)
        self._append_one_name = f"refold_append_one_{number}_{types_revision}".encode()
        self._append_one = group_call.query(schema, "append_one", types_revision)

    def add(self, waiting: Waiting | WaitingAll) -> None:
        """Let an append wait for its transaction; they are applied in the order of these calls."""
        self._waiting.append(waiting)
        if self._busy is None:
            self._busy = self._loop.create_future()
            self._busy_lanes.add(self._busy)
        flights = self._flights  # one in flight is followed by one that is no smaller
        if not self._beginning and (not flights or (len(flights) == 1 and len(self._waiting) >= len(flights[0].group))):
            self._begin_soon()

    def _begin_soon(self) -> None:
        """Begin when those who run now have added their appends."""
        self._beginning = True
        self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        """Begin with what waits, as far as something is to be begun now."""
        self._beginning = False
        group: _Group = []
        try:
            while self._mending is None and self._waiting and (most := self._due()):
                group = self._take(most)
                if group:
                    self._send(group)
            self._rest()
        except Exception as error:
            log.exception("Appends failed unexpectedly", stream=self.stream.schema)
            self._abandon(group, error)

    def _due(self) -> int:
        """Return how many appends, at most, go into a group now; 0: none is to be begun now."""
        if not self._flights:
            return self._pace.share(self._former, len(self._waiting))
        ahead = self._flights[-1]
        if len(self._flights) > 1 or not ahead.mark or isinstance(self._waiting[0], WaitingAll):
            return 0
        if self._connections.wanted:
            return 0  # somebody else is to have the connection
        most = self._pace.share(len(ahead.group), len(self._waiting))
        return most if most <= len(self._waiting) else 0

    def _send(self, group: _Group) -> None:
        """Send the group, or let it be settled in a task."""
        flight = _Flight(group)
        ahead = self._flights[-1] if self._flights else None
        self._flights.append(flight)
        self._former = 0
        checked = self._known_as_checked(group)
        if checked and self._held is None:
            self._held = self._connections.take_now(self._connection)
        if not checked or self._held is None:
            self._mend(flight)
            return
        self._connection = conn = self._held.conn
        if isinstance(group[0], Waiting) and not (ahead is None and self._is_one(group)):
            flight.mark, flight.behind = b"%d" % next(_MARKS), ahead
        call = self._call(group, mark=flight.mark, behind=ahead.mark if ahead else b"")
        flight.sent = time.perf_counter()
        self._in_air += 1
        try:
            conn.send(*call, lambda answer: self._land(flight, answer))
        except psycopg.Error as error:
            self._land(flight, error)

    def _known_as_checked(self, group: _Group) -> bool:
        """Tell whether `_vet` has nothing to do."""
        guard = self.guard
        if not (guard.revision or self.stream.types_revision):
            return True  # as far as is known the stream never had any
        if guard.broken or self.stream.types_revision > guard.revision or self._revision != guard.revision:
            return False
        parts = (part for waiting in group for part in waiting.parts())
        return all(part.types_revision == guard.revision and part.refusal is None for part in parts)

    def _is_one(self, group: _Group) -> bool:
        """Tell whether the group is one append of one event."""
        first = group[0]
        return (
            len(group) == 1
            and isinstance(first, Waiting)
            and len(first.append.ids) == 1
            and self.stream.migration >= _APPEND_ONE_MIGRATION
        )

    def _land(self, flight: _Flight, answer: Answer) -> None:
        """Take what a group came to that was sent; the next one is sent before this one's callers go on."""
        now = time.perf_counter()
        self._in_air -= 1
        if self._landing is not None and not self._landing.done():
            self._landing.set_result(None)
        if self._in_air == 0 and self._held is not None:
            held, self._held = self._held, None
            self._connections.give_back(held)
        if isinstance(answer, psycopg.Error):
            # What was sent behind one that failed was refused for that alone, or for what that was.
            flight.error = None if flight.behind is not None and flight.behind.failed else answer
            self._mend(flight)
            return
        flight.behind = None  # or each would keep all that came before
        self._flights.remove(flight)
        seconds = now - max(flight.sent, self._landed)
        self._landed = now
        self._former = len(flight.group)
        self._pace.took(self._former, seconds, worked=time.thread_time())
        metrics.COMMIT.observe(seconds)
        try:
            columns = _columns(answer)
            # The database begins with the next group before this one's callers go on, unless they belong into it.
            if not self._flights and self._waiting and self._due() <= len(self._waiting):
                self._begin()
            self._answer(flight.group, columns)
            if self._waiting and not self._beginning:
                self._begin_soon()
            self._rest()
        except Exception as error:
            log.exception("Appends failed unexpectedly", stream=self.stream.schema)
            self._abandon(flight.group, error)

    def _mend(self, flight: _Flight) -> None:
        """Let a group be settled in a task, after those that were begun before it."""
        flight.failed = True
        if self._mending is None:
            self._mending = self._loop.create_task(self._mend_all())

    async def _mend_all(self) -> None:
        """Settle the groups that failed, in the order in which they were begun, until none is under way any more."""
        flight: _Flight | None = None
        try:
            while self._flights:
                flight = self._flights[0]
                if flight.failed:
                    await self._settle(flight.group, flight.error)
                    if self._flights and self._flights[0] is flight:
                        self._flights.popleft()
                else:
                    self._landing = self._loop.create_future()
                    await self._landing
        except Exception as error:
            log.exception("Appends failed unexpectedly", stream=self.stream.schema)
            self._abandon([] if flight is None else flight.group, error)
        finally:
            self._mending = None
            self._former = 0
        self._begin()

    def _rest(self) -> None:
        """Say so where nothing waits and nothing is under way."""
        if self._busy is not None and not self._waiting and not self._flights:
            self._busy_lanes.discard(self._busy)
            self._busy.set_result(None)
            self._busy = None
            self._former = 0

    def _abandon(self, group: _Group, error: Exception) -> None:
        """Leave nobody waiting after what must not happen."""
        unexpected = EventStoreError("the event store failed unexpectedly, see its log")
        unexpected.__cause__ = error
        self._fail([*group, *(waiting for flight in self._flights for waiting in flight.group)], unexpected)
        self._fail(self._waiting, unexpected)
        self._waiting.clear()
        self._flights = collections.deque(flight for flight in self._flights if flight.sent and not flight.failed)
        self._rest()

    def _take(self, most: int) -> _Group:
        """Take the next group, at most `most` appends in the order in which they came; an atomic one stands alone."""
        group: list[Waiting] = []
        events = size = 0
        while self._waiting and len(group) < most:
            waiting = self._waiting[0]
            if waiting.outcome.cancelled():
                self._waiting.popleft()  # its caller left before the transaction
                continue
            if isinstance(waiting, WaitingAll):
                if group:
                    break
                self._waiting.popleft()
                return [waiting]
            events += len(waiting.append.ids)
            size += waiting.append.size
            if group and (events > GROUP_EVENTS or size > GROUP_BYTES):
                break
            self._waiting.popleft()
            group.append(waiting)
        return group

    async def _settle(self, group: _Group, failed: psycopg.Error | None = None) -> None:
        """Give each append of the group its outcome; `failed` is why a first attempt did."""
        attempt = 0
        careful = stale = False
        while group:
            try:
                if failed is not None:
                    error, failed = failed, None
                    raise error
                group = await self._vet(group, stale=stale)
                if not group:
                    return
                begin = time.perf_counter()
                async with self._connections.lend(self._connection) as conn:
                    self._connection = conn
                    result = await conn.call(*self._call(group, mark=b"", careful=careful))
                metrics.COMMIT.observe(time.perf_counter() - begin)
            except (psycopg.Error, OSError) as error:
                state = getattr(error, "sqlstate", None) or ""
                if state == _NOT_SERVED or isinstance(
                    error, psycopg.errors.InvalidSchemaName | psycopg.errors.UndefinedFunction
                ):
                    self._fail(group, InactiveStreamError(self.stream.namespace, self.stream.name))
                    self._gone(self)
                    return
                if isinstance(error, psycopg.errors.UniqueViolation) and not careful:
                    careful = True  # an id is known although the expected revision is right: look for ids first
                    continue
                stale = state == _UNCHECKED
                if state.startswith(_GUILTY) and not stale:
                    if len(group) == 1:
                        self._fail(group, InvalidAppendError("events", f"PostgreSQL refused it: {error}"))
                        return
                    middle = len(group) // 2
                    await self._settle(group[:middle])
                    group = group[middle:]
                    continue
                passing = stale or isinstance(error, psycopg.OperationalError | OSError) or state.startswith(_TRANSIENT)
                if not passing:
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
                self._answer(group, _columns(result))
                return

    async def _vet(self, group: _Group, *, stale: bool) -> _Group:
        """Refuse what the stream's event types refuse; return the rest, checked with the latest that are known.

        `stale` says that the types must be read before anything else.
        """
        guard = self.guard
        if not (stale or guard.revision or self.stream.types_revision):
            return group  # as far as is known the stream never had any
        while True:
            if stale or guard.broken or self.stream.types_revision > guard.revision:
                await guard.read()
            if self._revision != guard.revision:
                self._append_as(guard.revision)
            parts = [part for waiting in group for part in waiting.parts()]
            if any(part.types_revision != guard.revision for part in parts):
                group = [waiting.checked(guard) for waiting in group]
                parts = [part for waiting in group for part in waiting.parts()]
            if not guard.broken and all(part.refusal is None for part in parts):
                return group
            refused = await guard.decide(parts)
            if refused is not None:
                break
            stale = True
        left: list[Waiting | WaitingAll] = []
        for waiting in group:
            error = next((refused[id(part)] for part in waiting.parts() if id(part) in refused), None)
            if error is None:
                left.append(waiting)
            else:
                self._fail([waiting], error)
        return left

    def _call(
        self, group: _Group, *, mark: bytes, behind: bytes = b"", careful: bool = False
    ) -> tuple[bytes, bytes, Sequence[bytes | None]]:
        """Return name, query and arguments of the group's transaction; without a `mark` a lone append's cheaper one."""
        first = group[0]
        stream = self.stream.stream
        if isinstance(first, WaitingAll):
            arguments = group_call.arguments(stream, first.appends, careful=careful)
            return self._append_all_name, self._append_all, arguments
        metrics.GROUP.observe(len(group))
        parts = [waiting.append for waiting in cast("Sequence[Waiting]", group)]
        if not mark and not careful and self._is_one(group):
            return self._append_one_name, self._append_one, group_call.arguments_of_one(stream, parts[0])
        arguments = group_call.arguments(stream, parts, careful=careful) + group_call.marks(mark, behind=behind)
        return self._append_name, self._append, arguments

    def _answer(self, group: _Group, columns: list[tuple[int, ...]]) -> None:
        try:
            first = group[0]
            if isinstance(first, WaitingAll):
                appended, replayed = self._answer_all(first, columns)
            else:
                appended, replayed = self._answer_each(cast("Sequence[Waiting]", group), columns)
        finally:
            self._fail(group, EventStoreError("the event store failed unexpectedly, see its log"))
        if appended:
            self._appended.inc(appended)
        if appended or replayed:
            self._told(self.stream)  # a replayed one may be this group's own first attempt that nobody told of
        if replayed:
            self._replayed.inc(replayed)

    def _answer_all(self, waiting: WaitingAll, columns: list[tuple[int, ...]]) -> tuple[int, int]:
        """Give the atomic append its outcome; return the events that were appended, and whether it was replayed."""
        outcomes, revisions, positions = columns
        if max(outcomes) <= 1:
            replayed = outcomes[0] == 1
            results = [
                AppendResult(revision, part.partition, position, replayed, self.stream.incarnation)
                for part, revision, position in zip(waiting.appends, revisions, positions, strict=True)
            ]
            if not waiting.outcome.done():
                waiting.outcome.set_result(AllAppended(results))
            return (0, 1) if replayed else (sum(len(part.ids) for part in waiting.appends), 0)
        # Ids come before revisions, as in a single append: others' content, then what is known in part, then revisions.
        index = next(outcomes.index(worst) for worst in (3, 1, 2) if worst in outcomes)
        subject, current = waiting.appends[index].subject, revisions[index]
        if outcomes[index] == 2:
            self._fail([waiting], RevisionConflictError(subject, waiting.expected[index], current, index=index))
        else:
            self._fail([waiting], IdConflictError(subject, current, index=index))
        return 0, 0

    def _answer_each(self, group: Sequence[Waiting], columns: list[tuple[int, ...]]) -> tuple[int, int]:
        """Give each append its outcome; return how many events were appended, and how many appends replayed."""
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
        return appended, replayed

    @staticmethod
    def _fail(group: Iterable[Waiting | WaitingAll], error: EventStoreError) -> None:
        for waiting in group:
            if not waiting.outcome.done():
                waiting.outcome.set_exception(error)


def _columns(result: PGresult) -> list[tuple[int, ...]]:
    """Return outcomes, revisions and positions."""
    if result.nfields == 1:
        return [(value,) for value in arrays.int8_values(result.get_value(0, 0) or b"")]
    return [arrays.int8_values(result.get_value(0, column) or b"") for column in range(3)]
