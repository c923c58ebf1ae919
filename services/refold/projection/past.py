"""One row as it was at a moment: the history of its subject folded again, by the same definition. Pure.

Only a row that one partition feeds has such a history: one stream, keyed by subject. A row that several partitions feed
has events under many subjects, and code (a handler) runs in projectors alone; `why_not` says so.

A row is what the read model's would be. An event that fails is parked there, and so are the later ones of its row, so
here the row stops before it. What is parked or discarded in a version is known where the read store is (`Aside`).

Events are folded as they come, page by page, and what is kept is one row and the last few events, so memory doesn't
grow with the history.
"""

import datetime as dt
import functools
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from refold.events import Event
from refold.projection.cel.errors import EvaluationError
from refold.projection.definition import Definition, VersionDefinition, default_of, merges, single_partition
from refold.projection.fold import Fold, Parked, RowChange, compile_fold, joined
from refold.projection.texts import to_json
from refold.projection.values import Value

#: The most events of which an answer tells what each did.
MOST_STEPS = 1000
#: Bytes of the events, and of the differences, that an answer is made of; beyond, it tells of fewer events.
_STEPS_BYTES = 4 * 2**20
_REVISION = re.compile(r"[0-9]{1,18}")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ].*([Zz]|[+-]\d\d:\d\d)")

#: What an event did to the row: `none` where the row is as before, `parked` where it failed.
Effect = Literal["created", "changed", "deleted", "none", "parked", "discarded"]


class Bad(msgspec.Struct, frozen=True):
    """The event before which a row stops, since it failed, and why."""

    revision: int
    error: str


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one event did to the row; `changes` has the columns that differ, each with its values before and after."""

    revision: int
    type: str
    time: dt.datetime
    effect: Effect
    changes: dict[str, tuple[msgspec.Raw, msgspec.Raw]] = {}
    error: str | None = None


class RowAt(msgspec.Struct, frozen=True):
    """A row as it was once the event `revision` of its subject, recorded at `time`, was folded.

    `revision` is 0, and `time` null, where no event was. `data` is the row (JSON), null where there was none. `parked`
    is the event before which it stops, null where it doesn't. `steps` are the last events, in order.
    """

    key: str
    version: str
    revision: int
    time: dt.datetime | None
    data: msgspec.Raw | None
    parked: Bad | None
    steps: list[Step]


class Aside(NamedTuple):
    """What a version has set aside of a row, by position: the first parked event with its error; discarded ones."""

    parked: tuple[int, str] | None = None
    discarded: frozenset[int] = frozenset()


class At(NamedTuple):
    """A moment of a subject's history: a revision, or a time; all of it where neither is given."""

    revision: int | None = None
    time: dt.datetime | None = None


def parse_at(text: str) -> At:
    """Return the moment that `text` names.

    Raises:
        ValueError: it names none.
    """
    if _REVISION.fullmatch(text):
        if int(text) == 0:
            raise ValueError("is a revision, which begin with 1, or a time, not 0")
        return At(revision=int(text))
    try:
        if _TIME.fullmatch(text):
            return At(time=msgspec.convert(text, dt.datetime))
    except msgspec.ValidationError:
        pass
    raise ValueError(
        "is a revision such as 3, or a time of RFC 3339 with its offset such as 2026-01-31T23:59:59Z (a + is sent as "
        f"%2B), not {text[:100]!r}"
    )


def why_not(version: VersionDefinition) -> str | None:
    """Return why rows of a version can't be folded at a moment; None where they can."""
    definition = version.definition
    if not definition.fold:
        return "its events are folded by code (spec.handler), which runs in projectors alone: only a fold can be"
    if single_partition(definition):
        return None
    cause = "several streams feed a row" if len(definition.streams) > 1 else "its key is not the subject"
    return (
        f"{cause}, so a row's events come from several partitions, and no one subject's history is the row's: use a "
        "Projection with one stream and key: subject, or build the whole read model as it was with spec.asOf"
    )


class RowFold:
    """Folds one row; all is given once to `take`, in order, then `result` tells what came of it.

    Args:
        version: its name.
        definition: of which `why_not` is None.
        key: the row's, which is the subject.
        aside: what the version has set aside of the row.
        steps: of how many of the last events it is to be told what each did.
    """

    def __init__(
        self, version: str, definition: VersionDefinition, key: str, *, aside: Aside | None = None, steps: int = 0
    ) -> None:
        [stream] = definition.streams
        columns = definition.definition.columns
        self._fold = compiled(definition.definition.model_dump_json(exclude={"as_of"}))
        self._incarnation = stream.incarnation
        self._ends = definition.ends.get(stream.incarnation)
        self._types = {column.name: column.type for column in columns}
        self._defaults: Mapping[str, Value] = {column.name: default_of(column) for column in columns}
        self._merges = merges(definition.definition)
        self._version, self._key = version, key
        self._aside = aside or Aside()
        self._wanted = steps
        self._held: deque[Event] = deque()
        self._held_bytes = 0
        self._row: dict[str, Value] | None = None
        self._last: Event | None = None
        self._bad: Bad | None = None

    def take(self, events: Sequence[Event]) -> bool:
        """Fold the next events; return whether later ones count."""
        if self._ends is not None:
            within = [event for event in events if event.position <= self._ends[event.partition]]
        else:
            within = list(events)
        self._held.extend(within)
        self._held_bytes += sum(map(_size, within))
        due = []
        while len(self._held) > self._wanted or (self._held_bytes > _STEPS_BYTES and len(self._held) > 1):
            due.append(self._held.popleft())
            self._held_bytes -= _size(due[-1])
        self._take(due)
        return self._bad is None and len(within) == len(events)

    def result(self) -> RowAt:
        """Return the row."""
        steps: deque[tuple[Step, int]] = deque()
        total = 0
        while self._held and self._bad is None:
            step = self._step(self._held.popleft())
            size = sum(len(bytes(text)) for change in step.changes.values() for text in change)
            steps.append((step, size))
            total += size
            while total > _STEPS_BYTES and len(steps) > 1:
                total -= steps.popleft()[1]
        row = None
        if self._row is not None:
            texts = (f'"{name}":{to_json(self._row[name], type_)}' for name, type_ in self._types.items())
            row = _raw("{" + ",".join(texts) + "}")
        return RowAt(
            key=self._key,
            version=self._version,
            revision=0 if self._last is None else self._last.revision,
            time=None if self._last is None else self._last.time,
            data=row,
            parked=self._bad,
            steps=[step for step, _ in steps],
        )

    def _step(self, event: Event) -> Step:
        """Fold one event, and tell what it did."""
        before = self._row
        self._take([event])
        after = self._row
        if self._bad is not None:
            return Step(event.revision, event.type, event.time, "parked", error=self._bad.error)
        if event.position in self._aside.discarded:
            return Step(event.revision, event.type, event.time, "discarded")
        old, new = before or {}, after or {}
        changes = {
            name: (_raw(to_json(old.get(name), type_)), _raw(to_json(new.get(name), type_)))
            for name, type_ in self._types.items()
            if old.get(name) != new.get(name)
        }
        effect: Effect = "changed" if changes else "none"
        if before is None and after is not None:
            effect = "created"
        elif before is not None and after is None:
            effect = "deleted"
        return Step(event.revision, event.type, event.time, effect, changes)

    def _take(self, events: Sequence[Event]) -> None:
        """Fold events up to the first that is bad, and note how far that is."""
        if self._bad is not None or not events:
            return
        parked, discarded = self._aside
        due = [event for event in events if event.position not in discarded]
        stops = next((event for event in due if parked is not None and event.position == parked[0]), None)
        self._apply([event for event in due if stops is None or event.position < stops.position])
        if stops is not None and parked is not None and self._bad is None:
            self._bad = Bad(stops.revision, parked[1])
        for event in reversed(events):
            if self._bad is None or event.revision < self._bad.revision:
                self._last = event
                break

    def _apply(self, events: Sequence[Event]) -> None:
        batch = self._fold.batch(Parked(), {} if self._row is None else {self._key: self._row})
        batch.fold(self._incarnation, events)
        try:
            self._row = self._after(batch.changes.get(self._key))
        except EvaluationError as error:
            if len(events) == 1:
                self._bad = Bad(events[0].revision, str(error))
                return
            for event in events:  # a projector, too, looks for the one that is to blame
                if self._bad is None:
                    self._apply([event])
            return
        if batch.parked:
            self._bad = Bad(batch.parked[0].event.revision, batch.parked[0].error)

    def _after(self, change: RowChange | None) -> dict[str, Value] | None:
        """Return the row after a batch; `refold.projection.fold` tells what a change means."""
        if change is None:
            return self._row
        if not change.exists_after:
            return None
        before = None if change.deleted_first else self._row
        row = {**(self._defaults if before is None else before), **change.set}
        for name, value in change.merge.items():
            row[name] = joined(self._merges[name], self._types[name], row[name], value)
        return row


@functools.lru_cache(maxsize=64)
def compiled(definition: str) -> Fold:
    """Return the compiled fold of a definition (JSON), which takes some milliseconds the first time."""
    return compile_fold(Definition.model_validate_json(definition))


def _size(event: Event) -> int:
    return memoryview(event.data).nbytes


def _raw(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())
