"""The compiled fold: events in, one change per row out. Pure: no I/O, no clock.

How the projector uses it, once per transaction:

    fold = compile_fold(version.definition)                  # once per process
    batch = fold.batch(parked)                               # what is parked already, see `Parked`
    batch.fold(incarnation, events)                          # as often as wanted; the events of a partition in order
    batch.changes                                            # {key: RowChange}: one upsert or delete each
    batch.parked                                             # [ParkedEvent]: to be written in the same transaction

A batch whose transaction failed is thrown away; `fold` itself holds no state.

How a `RowChange` becomes SQL (`old` is the row before, which the fold never needs to know):

    not exists_after                      delete
    exists_after and deleted_first        the new row is `set`, all other columns NULL (`add` is empty)
    exists_after and not deleted_first    column in `set`: that value; in `add`: coalesce(old, 0) + value; else old or NULL

A row fed by several partitions (`not fold.single_partition`) is never deleted, and each of its set columns has a stamp
in `stamps`: the column takes the value only where the stamp is greater than the one kept beside it (or none is kept).
"""

import datetime as dt
from collections.abc import Iterable
from decimal import Decimal
from typing import NamedTuple

import msgspec

from refold.events import Event
from refold.projection.definition import Definition

#: A column's value: text, integer (int64), numeric (int or Decimal), boolean, timestamp (aware), json (its text), NULL.
Value = str | int | Decimal | bool | dt.datetime | None


class Stamp(NamedTuple):
    """Which event set a column; of two, the greater one wins."""

    recorded_at: dt.datetime
    incarnation: str
    partition: int
    position: int


class RowChange(msgspec.Struct):
    """What one batch does to one row; the module's docstring tells how to apply it."""

    key: str
    deleted_first: bool = False
    exists_after: bool = True
    set: dict[str, Value] = {}
    add: dict[str, int | Decimal] = {}
    stamps: dict[str, Stamp] = {}


class ParkedEvent(msgspec.Struct, frozen=True):
    """An event without effect on a row, since it failed, or follows one of the row and partition that did.

    `key` is None where the key itself failed: then the subject is parked, and its later events follow.
    """

    incarnation: str
    event: Event
    key: str | None
    error: str


class Parked(msgspec.Struct):
    """What is parked already, by (incarnation, partition, key) and by (incarnation, partition, subject)."""

    rows: set[tuple[str, int, str]] = msgspec.field(default_factory=set)
    subjects: set[tuple[str, int, str]] = msgspec.field(default_factory=set)


class Batch:
    """The events of one transaction, folded to one change a row."""

    def __init__(self, parked: Parked) -> None:
        self.changes: dict[str, RowChange] = {}
        self.parked: list[ParkedEvent] = []

    def fold(self, incarnation: str, events: Iterable[Event]) -> None:
        """Fold `events` of the stream `incarnation`; those of one partition in order of position."""
        raise NotImplementedError


class Fold:
    """A compiled definition, free of state."""

    single_partition: bool

    def batch(self, parked: Parked | None = None) -> Batch:
        """Return an empty batch that respects what is `parked` (which is read only)."""
        raise NotImplementedError


def compile_fold(definition: Definition) -> Fold:
    """Return the compiled fold of `definition`.

    Raises:
        InvalidDefinitionError: `check` finds problems.
    """
    raise NotImplementedError
