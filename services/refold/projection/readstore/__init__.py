"""Read stores: where projections keep their rows, positions and parked events.

A read store has two sides. The operator's (`postgres.py`) claims a projection, makes, swaps and drops its versions and
tells how far they are. The projector's (`postgres_rows.py`) applies a batch: rows, positions and parked events change
in one transaction, or none of them does. What both sides speak of is here.
"""

import datetime as dt

import msgspec


class ReadStoreError(Exception):
    """Anything that a read store refuses."""


class ConflictError(ReadStoreError):
    """What was asked belongs to someone else, or is in use; the message says to whom and the way out."""


class NotFoundError(ReadStoreError):
    """The projection or version isn't in the read store."""


class MovedError(ReadStoreError):
    """Another projector has moved a partition on; the batch is to be dropped and the positions read again."""


class RefusedError(ReadStoreError):
    """The read store can't hold a value that a batch would write; the message is the store's."""


class UnavailableError(ReadStoreError):
    """The read store can't be reached, or failed in a way that isn't the data's fault; it may come back."""


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


class VersionStatus(msgspec.Struct, frozen=True):
    """How far one version of a projection is."""

    version: str
    live: bool
    created_at: dt.datetime
    #: Events without effect on a row since they failed, or follow one that did.
    parked: int
    #: Of these, the error of the first.
    parked_error: str | None
    partitions: list[PartitionStatus]

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
    def stopped(self) -> list[str]:
        """Why partitions stand still; empty where none does."""
        return [partition.stopped for partition in self.partitions if partition.stopped]


class ProjectionStatus(msgspec.Struct, frozen=True):
    """All versions of a projection; `live` names the one that readers see."""

    live: str | None
    versions: dict[str, VersionStatus]
