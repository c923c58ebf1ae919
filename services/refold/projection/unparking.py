"""Folding parked events again, or discarding them: what is asked, and what becomes of a row's parked events. Pure.

Nobody but the projector that owns the partition takes an event out of those that are parked: it alone writes the rows
of its partitions, and it must know from then on that the row isn't parked any more. So somebody who wants a parked
event to be *retried* or *discarded* leaves a mark at it (`Asked`); the projector looks for marks, and then settles the
row with all its parked events (`ParkedRow`) in the order of their positions:

- What is to be discarded is taken out, and leaves its trace.
- The others are folded again, from the first on up to the first that still fails: that one stays parked, and all behind
  it do. So no event ever overtakes an earlier one of its row and partition.
- An event that was discarded in another version of the read model, for a row of the same key, is discarded where it
  fails again, as if the same person had asked for it here: else each rebuild would wait for somebody to do it again.
- A mark at an event that stays is taken away; whoever left it finds the event there without its mark, and so learns
  that it was refused.

All of it is one transaction with what becomes of the row (several, where it is large or the read store refuses a part
of it), and it compares with the partition's position and with how often events left those parked before. A projector
that knows an older state, one that was frozen meanwhile say, can't write any more until it has read what is parked.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import msgspec

from refold.events import Event
from refold.projection.fold import Before, Fold, Parked, ParkedEvent, RowChange
from refold.projection.handler import HandlerFold

Verb = Literal["retry", "discard"]
#: Seconds after which a mark counts no more: whoever left it has gone away long ago.
ASKED_SECONDS = 30


class Asked(msgspec.Struct, frozen=True):
    """A mark at a parked event.

    Args:
        token: tells it from other marks.
        verb: what is to become of the event.
        by: who asked.
        live: only while the event's version is the one that readers see.
    """

    token: str
    verb: Verb
    by: str
    live: bool


class Entry(msgspec.Struct, frozen=True):
    """An event that is parked for a row, and what is asked of it; null: nothing, or too long ago."""

    id: int
    position: int
    error: str
    asked: Asked | None


class ParkedRow(msgspec.Struct, frozen=True):
    """All that one partition has parked for a row (`key`), or for a `subject` where the key failed, in order."""

    incarnation: str
    partition: int
    key: str | None
    subject: str | None
    entries: list[Entry]


class Settled(msgspec.Struct, frozen=True):
    """Which parked events leave in the transaction of a change.

    Args:
        incarnation: of the stream.
        partition: of which they are.
        folded: ids of those that took effect.
        discarded: ids of those that never will, each with who asked for it.
        live: whether the version must be the one that readers see.
    """

    incarnation: str
    partition: int
    folded: list[int]
    discarded: dict[int, str]
    live: bool


class Again(msgspec.Struct, frozen=True):
    """What folding a row's parked events again came to.

    Args:
        changes: of rows.
        parked: events that are parked for other rows, whose keys were not known before.
        folded: the entries that took effect: the first ones.
        error: why the next one fails; null where none does.
    """

    changes: list[RowChange]
    parked: list[ParkedEvent]
    folded: list[Entry]
    error: str | None


def fold_again(
    fold: Fold | HandlerFold,
    row: ParkedRow,
    entries: Sequence[Entry],
    events: Collection[Event],
    parked: Parked,
    before: Before,
) -> Again:
    """Fold parked events again.

    Args:
        fold: of the version.
        row: for which they are parked.
        entries: the first ones of it, without those that are discarded.
        events: theirs, in order.
        parked: what else is parked.
        before: the rows before, where the fold reads columns.
    """
    if row.key is None:
        # These went to no row at all, so each goes to all of its rows now, as far as those aren't parked themselves.
        others = parked.subjects - {(row.incarnation, row.partition, row.subject or "")}
        batch = fold.batch(Parked(parked.rows, others), before)
    else:
        # What these did to other rows they did when they came, or they are parked there too.
        batch = fold.batch(Parked(), before)
    batch.fold(row.incarnation, events)
    stays = next((one for one in batch.parked if one.key in (None, row.key)), None)
    end = None if stays is None else stays.event.position
    return Again(
        changes=[change for change in batch.changes.values() if row.key in (None, change.key)],
        parked=[one for one in batch.parked if row.key is None and one.key is not None],
        folded=[entry for entry in entries if end is None or entry.position < end],
        error=None if stays is None else stays.error,
    )
