"""Read stores: where projections keep their rows, positions and parked events.

A read store has three sides. The operator's claims a projection, makes, swaps and drops its versions and tells how far
they are. The projector's (`Rows`) applies a batch: rows, positions and parked events change in one transaction, or none
of them does. The query service's (`Reads`) reads rows together with the positions that they are of, from one snapshot.
What they speak of is here; each store has a module for each side, such as `postgres.py`, `postgres_rows.py` and
`postgres_reads.py`.
"""

import datetime as dt
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec
from pydantic import ValidationError

from refold.projection.definition import Column, ColumnType, VersionDefinition
from refold.projection.fold import Parked, ParkedEvent, RowChange
from refold.projection.past import Aside
from refold.projection.unparking import Asked, Entry, ParkedRow, Settled
from refold.projection.values import Value


class ReadStoreError(Exception):
    """Anything that a read store refuses."""


class ConflictError(ReadStoreError):
    """What was asked belongs to someone else, or is in use; the message says to whom and the way out."""


class BusyError(ReadStoreError):
    """Somebody else's transaction holds what has to be locked; it is tried again later."""


class NotFoundError(ReadStoreError):
    """The projection or version isn't in the read store."""


class MovedError(ReadStoreError):
    """Another projector has moved a partition on; the batch is to be dropped and the positions read again."""


class RefusedError(ReadStoreError):
    """The read store can't hold a value that a batch would write; the message is the store's."""


class UnavailableError(ReadStoreError):
    """The read store can't be reached, or failed in a way that isn't the data's fault; it may come back."""


class TooSlowError(UnavailableError):
    """The read store would take too long, or look at too many rows, for what was asked."""


class UnreadableError(UnavailableError):
    """The read store holds what this release of Refold doesn't read; the message is for callers."""


def live_definition(version: str, text: str | bytes) -> VersionDefinition:
    """Return the definition of the live `version`, which a read store keeps as `text`.

    Raises:
        UnreadableError: it isn't one that this release reads.
    """
    try:
        return VersionDefinition.from_json(text)
    except ValidationError as error:
        raise UnreadableError(
            f"the definition of the live version {version} isn't one that this release of Refold reads; it was "
            "made by a later one, with which this service has to be upgraded too"
        ) from error


class PartitionStatus(msgspec.Struct, frozen=True):
    """How far one version is in one partition of one stream."""

    incarnation: str
    partition: int
    #: The last applied position; 0 where nothing is.
    position: int
    #: When the last applied event was recorded (UTC).
    recorded_at: dt.datetime | None
    #: The last position in the event store, as the projector last saw it (at `seen_at`, null: never).
    head: int
    #: Seconds since the first event that isn't applied was recorded; 0 where all are (seen at `seen_at`).
    lag_seconds: float
    seen_at: dt.datetime | None
    #: Why the projector doesn't go on in this partition; null where it does.
    stopped: str | None

    @property
    def lag_events(self) -> int:
        """Events that the projector knew of and had not applied."""
        return max(0, self.head - self.position)


class Applied(msgspec.Struct, frozen=True):
    """How far one version is in one partition, with what else keeps its projector from having nothing to do.

    `head` is as the projector last saw it; `stopped`: it doesn't go on here; `parked`: the version has parked events.
    """

    incarnation: str
    partition: int
    position: int
    head: int
    stopped: bool
    parked: bool

    @property
    def place(self) -> tuple[str, int]:
        """The partition: incarnation of its stream, and its number."""
        return self.incarnation, self.partition


class VersionStatus(msgspec.Struct, frozen=True):
    """How far one version of a projection is."""

    version: str
    live: bool
    created_at: dt.datetime
    #: When another version took its place before readers, and how many seconds ago by the read store's clock; null
    #: where it is live or never was.
    retired_at: dt.datetime | None
    retired_seconds: float | None
    #: Events without effect on a row since they failed, or follow one that did.
    parked: int
    #: Of these, the error of the first.
    parked_error: str | None
    partitions: list[PartitionStatus]
    #: Events that were parked, and were discarded.
    discarded: int = 0

    @property
    def without_effect(self) -> int:
        """Events that readers don't see: those that are parked or discarded."""
        return self.parked + self.discarded

    @property
    def lag_events(self) -> int:
        """The sum of the partitions' lags in events."""
        return sum(partition.lag_events for partition in self.partitions)

    @property
    def lag_seconds(self) -> float:
        """The largest of the partitions' lags in seconds."""
        return max((partition.lag_seconds for partition in self.partitions), default=0.0)

    @property
    def position(self) -> int:
        """The sum of the applied positions: how many events are applied."""
        return sum(partition.position for partition in self.partitions)

    @property
    def head(self) -> int:
        """The sum of the heads that the projector saw (never below the applied positions)."""
        return sum(max(partition.head, partition.position) for partition in self.partitions)

    @property
    def complete(self) -> bool:
        """Whether all is applied up to the heads that are known; of a version as of a moment they are its ends."""
        return all(partition.position >= partition.head for partition in self.partitions)

    @property
    def stopped(self) -> list[str]:
        """Why partitions stand still; empty where none does."""
        return [partition.stopped for partition in self.partitions if partition.stopped]

    @property
    def applied(self) -> list[Applied]:
        """How far it is in each partition."""
        return [
            Applied(one.incarnation, one.partition, one.position, one.head, bool(one.stopped), bool(self.parked))
            for one in self.partitions
        ]


class ProjectionStatus(msgspec.Struct, frozen=True):
    """All versions of a projection; `live` names the one that readers see."""

    live: str | None
    versions: dict[str, VersionStatus]


# -- the projector's side ---------------------------------------------------------------------------------------------


class Position(msgspec.Struct, frozen=True):
    """Where one partition stands in the read store, and the hint where to seek in the topic.

    `unparked`: how often events left those that are parked.
    """

    incarnation: str
    partition: int
    position: int
    topic_id: str | None
    kafka_offset: int | None
    stopped: str | None
    unparked: int = 0


class Advance(msgspec.Struct, frozen=True):
    """A batch's step in one partition: from position `before` to `after`, which was recorded at `recorded_at`.

    `kafka_offset` is where to go on reading in the topic with id `topic_id`; both null where that isn't known.
    `unparked` is the position's, of when it was read what is parked.
    """

    incarnation: str
    partition: int
    before: int
    after: int
    recorded_at: dt.datetime | None
    topic_id: str | None
    kafka_offset: int | None
    unparked: int = 0


class Seen(msgspec.Struct, frozen=True):
    """What a projector saw of a partition in the event store; lag in seconds, 0 where all is applied."""

    incarnation: str
    partition: int
    head: int
    lag_seconds: float


class LiveProgress(msgspec.Struct, frozen=True):
    """How far the live version is: the sum of its positions, and its largest lag in seconds, 0 where it has none."""

    position: int
    lag_seconds: float


class Rows(Protocol):
    """One version of a projection as its projector writes it. Not for several threads.

    Every method but `close` raises `UnavailableError` where the store can't be reached or doesn't answer as it should;
    then nothing is known of a batch under way, and the next call connects anew.
    """

    @property
    def most_rows(self) -> int | None:
        """How many rows a batch of several events may change; None: any number."""

    def close(self) -> None:
        """Close the connection."""

    def open(self) -> VersionDefinition:
        """Return the version's definition and prepare for writing.

        Raises:
            NotFoundError: there is no such version.
        """

    def positions(self, partitions: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Position]:
        """Return where the partitions (incarnation, number) stand; one that isn't part of the version is left out."""

    def parked(self, partitions: Iterable[tuple[str, int]]) -> tuple[Parked, dict[tuple[str, int], int]]:
        """Return which rows and subjects are parked in the partitions, and how many events of each partition."""

    def read(self, keys: Iterable[str], columns: Sequence[str]) -> dict[str, dict[str, Value]]:
        """Return what stands in the rows, by key and column; a row that doesn't exist is left out.

        The next `apply` writes only where nobody else has written these rows until then.
        """

    def asked(self, partitions: Iterable[tuple[str, int]]) -> tuple[bool, list[ParkedRow]]:
        """Return whether the version is live, and the parked rows of the partitions of which something is asked.

        That is what marks ask for, and that what was discarded in another version is discarded here.
        """

    def refuse(self, entries: Sequence[Entry], error: str | None) -> None:
        """Do nothing of what is asked of `entries`; the first stays parked because of `error` (None: as before)."""

    def apply(
        self,
        changes: Iterable[RowChange],
        parked: Sequence[ParkedEvent],
        advances: Sequence[Advance],
        settled: Settled | None = None,
    ) -> None:
        """Write a batch: all of it in one transaction, or nothing.

        `settled` names parked events that leave; their partition is one of `advances`.

        Raises:
            MovedError: a partition isn't at its `before`, a row that was read has changed, or parked events left:
                another projector has written in the meantime. Or what is `settled` can't be any more.
            RefusedError: a row can't be stored (out of range, too large); smaller batches tell which event is to blame.
        """

    def see(self, seen: Sequence[Seen]) -> None:
        """Store what was seen of the heads; positions aren't touched."""

    def stop(self, incarnation: str, partition: int, reason: str | None) -> None:
        """Store why the projector doesn't go on in a partition; None where it does."""

    def live(self) -> LiveProgress | None:
        """Return how far the live version is; None where it is this one, or there is none."""


# -- the query service's side -----------------------------------------------------------------------------------------

#: The key as filters and orders know it: every row has one, and an index by it.
KEY = Column(name="key", type=ColumnType.TEXT, index=True)
#: How a column's value compares with another: `in` with any of a list. None holds for null.
Comparison = Literal["eq", "ne", "lt", "le", "gt", "ge", "in"]


class Condition(NamedTuple):
    """What must hold of a row: an indexed column, or the key, compares so with `value`, which is of its type."""

    column: Column
    comparison: Comparison
    value: object


class Order(NamedTuple):
    """By a column (or the key) and then by key, both ascending or both descending; null is the greatest value."""

    column: str
    descending: bool


class After(NamedTuple):
    """The place in an order after which a page begins: the column's value (null where by key) and the key."""

    value: object
    key: str


class Page(NamedTuple):
    """The first `most` rows beyond `after` that meet all `conditions`."""

    conditions: Sequence[Condition]
    order: Order
    after: After | None
    most: int


class AppliedPartition(msgspec.Struct, array_like=True, frozen=True):
    """How far a version is in one partition; `seen_at` (Unix time) is when the projector last saw the head.

    `unparked`: how often events left those that are parked.
    """

    incarnation: str
    partition: int
    position: int
    head: int
    lag_seconds: float
    seen_at: float | None
    stopped: str | None
    unparked: int = 0


class Snapshot(NamedTuple):
    """What was true when rows were read: the live version, how far the version that was read is, the store's clock.

    `partitions` are in the order of incarnation and number; `now` is Unix time. `parked`, how many events of the
    version are, is counted only where it was asked for.
    """

    live: str | None
    partitions: list[AppliedPartition]
    now: float
    parked: int = 0


class VersionReads(Protocol):
    """One version of a projection as queries read it; every answer is of one snapshot.

    Every method raises `NotFoundError` where the version is gone, `UnavailableError` where the store doesn't answer.
    """

    async def by_keys(self, keys: Sequence[str]) -> tuple[Snapshot, list[tuple[str, str]]]:
        """Return keys and data (JSON text) of the rows of `keys` that exist, in any order."""

    async def page(self, page: Page) -> tuple[Snapshot, list[tuple[str, str, str | None]]]:
        """Return the page's rows in order: key, data (JSON text), and a text of the value in the order's column.

        That text is null where the value is, and where the order is by key.

        Raises:
            TooSlowError: too many rows would have to be looked at.
        """

    async def state(self) -> Snapshot:
        """Return the snapshot alone."""

    async def status(self) -> Snapshot:
        """Return the snapshot with the number of parked events."""


class Listed(msgspec.Struct, frozen=True):
    """A parked event; `stream` is `namespace/name`, `key` null where the key failed."""

    id: int
    stream: str | None
    partition: int
    position: int
    subject: str
    key: str | None
    error: str
    parked_at: dt.datetime


class Marked(NamedTuple):
    """What leaving a mark came to.

    Args:
        wanted: the version that the event has to be of; null: none is live.
        version: the version that it is of; null: it isn't parked.
        done: whether the mark is there; not, where another is already.
    """

    wanted: str | None
    version: str | None
    done: bool


class Looked(NamedTuple):
    """What became of a parked event that was marked.

    Args:
        token: of its mark, null where it has none.
        first: the first parked event of its row, id, position and error; null where it isn't parked any more.
        live: whether its version is live.
        there: whether its version is in the read store.
        discarded: whether it was discarded.
    """

    token: str | None
    first: tuple[int, int, str] | None
    live: bool
    there: bool
    discarded: bool


class ParkedReads(Protocol):
    """A projection's parked events as its query service lists them, and marks those of which something is asked.

    Every method raises `NotFoundError` where the projection isn't there, `UnavailableError` where the store doesn't
    answer.
    """

    async def page(
        self, *, version: str | None, key: str | None, after: int, most: int
    ) -> tuple[str, list[Listed]] | None:
        """Return the version and its first `most` parked events with ids beyond `after`; None: no such version.

        They are of `version` (None: the live one) and of the row `key` (None: all).
        """

    async def aside(self, version: str, key: str) -> Aside:
        """Return what `version` has set aside of the row `key`, which one partition feeds."""

    async def ask(self, id_: int, asked: Asked, version: str | None) -> Marked:
        """Leave a mark at a parked event of `version` (None: the live one), where there is none."""

    async def look(self, id_: int, version: str) -> Looked:
        """Return what became of a parked event of `version`."""

    async def withdraw(self, id_: int, token: str) -> bool:
        """Take a mark away; return whether it was still there, so that nothing has happened and nothing will."""


class Reads(Protocol):
    """A projection as its query service reads it."""

    async def open(self) -> None:
        """Begin to connect, also while the store is away."""

    async def close(self) -> None:
        """Close all connections."""

    async def live(self) -> tuple[str, VersionDefinition] | None:
        """Return the live version's name and definition; None where there is none.

        Raises:
            UnavailableError: the store doesn't answer.
            UnreadableError: the definition isn't one that this release reads.
        """

    def version(self, name: str, definition: VersionDefinition) -> VersionReads:
        """Return what reads the version."""

    def parked(self) -> ParkedReads:
        """Return what lists and marks parked events."""
