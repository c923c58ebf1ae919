"""One stream's appends: group commit.

Appends that wait for a stream go together in its next transaction; one transaction is in flight per stream and
process, and no timer delays a lone append. Each append has its own outcome. A group that the database refuses as a
whole is split until the guilty append stands alone. A group whose connection breaks is run again, also where its
outcome is unknown: events carry ids, so what was committed is found and answered with its first outcome.

An atomic append (to many subjects, all or none) is a group of its own, in its turn.
"""

import asyncio
import collections
import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self, cast

import psycopg
import structlog

from refold import tokens
from refold.eventstore import arrays, group_call, metrics
from refold.eventstore.appends import Append, ExpectedRevision
from refold.eventstore.catalog import Stream
from refold.eventstore.connections import Connections, StoreConnection
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


class Lane:
    """One stream: the appends that wait for it, and the one transaction that is in flight."""

    def __init__(
        self,
        stream: Stream,
        connections: Connections,
        guard: Guard,
        *,
        running: set[asyncio.Task[None]],
        appended: Callable[[Stream], None],
        gone: Callable[["Lane"], None],
    ) -> None:
        """Make the lane of `stream`, which may be replaced by what the catalog says later.

        Args:
            stream: the stream.
            connections: on which it appends.
            guard: the stream's event types.
            running: where the lane's task stands while appends wait or are under way.
            appended: is told when new events were committed.
            gone: is told when the database says that the stream isn't active any more.
        """
        self.stream = stream
        self.guard = guard
        self._connections = connections
        self._tasks = running
        self._told = appended
        self._gone = gone
        self._running = False
        self._pace = Pace()
        self._connection: StoreConnection | None = None  # the one used last
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
        if not self._running:
            self._running = True
            task = asyncio.create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        """Commit group after group until nobody waits."""
        group: _Group = []
        former = 0  # how many appends were in the group before
        try:
            while self._waiting:
                most = self._pace.share(former, len(self._waiting), worked=time.thread_time())
                group = self._take(most)
                await self._settle(group)
                former = len(group)
        finally:
            self._running = False
            # Nobody is left waiting, whatever went wrong here or in `_answer`.
            self._fail([*group, *self._waiting], EventStoreError("the event store failed unexpectedly, see its log"))
            self._waiting.clear()

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

    async def _settle(self, group: _Group) -> None:
        """Give each append of the group its outcome."""
        attempt = 0
        careful = stale = False
        while group:
            try:
                group = await self._vet(group, stale=stale)
                if not group:
                    return
                begin = time.perf_counter()
                columns = await self._commit(group, careful=careful)
                seconds = time.perf_counter() - begin
                self._pace.took(len(group), seconds)
                metrics.COMMIT.observe(seconds)
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
                if self._waiting:  # the database begins with the next group before this one's callers go on
                    asyncio.get_running_loop().call_soon(self._answer, group, columns)
                else:
                    self._answer(group, columns)
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

    async def _commit(self, group: _Group, *, careful: bool) -> list[tuple[int, ...]]:
        """Run the group's transaction; return outcomes, revisions and positions."""
        first = group[0]
        one = False
        arguments: Sequence[bytes | None]
        if isinstance(first, WaitingAll):
            name, query = self._append_all_name, self._append_all
            arguments = group_call.arguments(self.stream.stream, first.appends, careful=careful)
        else:
            metrics.GROUP.observe(len(group))
            one = len(group) == len(first.append.ids) == 1 and not careful
            one = one and self.stream.migration >= _APPEND_ONE_MIGRATION
            if one:
                name, query = self._append_one_name, self._append_one
                arguments = group_call.arguments_of_one(self.stream.stream, first.append)
            else:
                name, query = self._append_name, self._append
                parts = [waiting.append for waiting in cast("Sequence[Waiting]", group)]
                arguments = group_call.arguments(self.stream.stream, parts, careful=careful)
        async with self._connections.lend(self._connection) as conn:
            self._connection = conn
            result = await conn.call(name, query, arguments)
        if one:
            return [(value,) for value in arrays.int8_values(result.get_value(0, 0) or b"")]
        return [arrays.int8_values(result.get_value(0, column) or b"") for column in range(3)]

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
    def _fail(group: _Group, error: EventStoreError) -> None:
        for waiting in group:
            if not waiting.outcome.done():
                waiting.outcome.set_exception(error)
