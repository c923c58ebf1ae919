"""Try out a projection without servers: events in, rows out, by the rules that hold in a cluster.

    from refold.testing import event, fold

    def test_an_order_has_the_total_of_its_items() -> None:
        rows = fold("projection.yaml", [
            event("order-1", "OrderPlaced", {"total": 12.50}),
            event("order-1", "ItemAdded", {"price": 2, "qty": 3}),
        ])
        assert rows == {"order-1": {"status": "placed", "total": Decimal("18.5")}}

It works for code (`spec.handler`) and for expressions (`spec.fold`) alike. Values of rows are those that `Table.get`
gives. See docs/handlers.md.
"""

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import yaml

from refold.events import Event
from refold.partitioning import partition_of
from refold.projection import fold as folds
from refold.projection.definition import ColumnType, Definition, default_of, merges, parse
from refold.projection.fold import JOINS, Fold, RowChange, Stamp, compile_fold
from refold.projection.handler import Function, HandlerFold, Row, load, seen
from refold.projection.values import Value, integer_total, to_numeric

_PARTITIONS = 3
_FIRST = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
_encode = msgspec.json.Encoder(decimal_format="number").encode


class Given(NamedTuple):
    """An event of a test; `event` makes it."""

    subject: str
    type: str
    data: Any
    metadata: Any
    stream: str | None
    time: dt.datetime | None


class Parked(NamedTuple):
    """An event without effect on a row: its number in the list (from 0), the row's key (None: all), and why."""

    number: int
    key: str | None
    error: str


class Outcome(NamedTuple):
    """Rows by key, and what was parked, in order."""

    rows: dict[str, Row]
    parked: list[Parked]


class BadEventError(AssertionError):
    """An event would be parked; the message says which and why. `parked` holds all of them."""

    def __init__(self, parked: Sequence[Parked]) -> None:
        self.parked = list(parked)
        super().__init__("; ".join(f"event {one.number} is bad: {one.error}" for one in parked))


class NotDeterministicError(AssertionError):
    """The same events gave other rows in one batch than one by one, as in a cluster they may come."""


def event(
    subject: str,
    type: str,  # noqa: A002 - what it is called everywhere
    data: Any = None,
    *,
    metadata: Any = None,
    stream: str | None = None,
    time: dt.datetime | None = None,
) -> Given:
    """Return an event for `fold`.

    Args:
        subject: the entity that it is about.
        type: its type.
        data: what JSON can hold; Decimal or float for fractions.
        metadata: the same, None: there is none.
        stream: name of its EventStream; None: the projection's first.
        time: when it was recorded (aware); None: a second after the one before.
    """
    return Given(subject, type, data, metadata, stream, time)


def fold(
    projection: str | Path | Mapping[str, Any], events: Sequence[Given], *, function: Function | None = None
) -> dict[str, Row]:
    """Return the rows after `events`, by key.

    Args:
        projection: a Projection: the path of its YAML file, or the resource itself.
        events: in the order in which they were appended.
        function: in place of the one that `spec.handler.function` names, which is imported otherwise.

    Raises:
        BadEventError: an event would be parked.
        NotDeterministicError: the rows depend on something else than the events.
        InvalidDefinitionError: the projection would be refused.
        HandlerError: its function can't be imported or called.
    """
    outcome = fold_and_park(projection, events, function=function)
    if outcome.parked:
        raise BadEventError(outcome.parked)
    return outcome.rows


def fold_and_park(
    projection: str | Path | Mapping[str, Any], events: Sequence[Given], *, function: Function | None = None
) -> Outcome:
    """Return the rows after `events` and what is parked; else as `fold`."""
    definition = parse(_spec(projection))
    incarnations = {name: f"{number:016x}" for number, name in enumerate(definition.streams, 1)}
    compiled: Fold | HandlerFold
    if definition.handler is None:
        compiled = compile_fold(definition)
    else:
        found = function or load(definition.handler.function)
        compiled = HandlerFold(definition, found, {key: name for name, key in incarnations.items()})
    history = _history(definition, incarnations, events)
    alone, refused = _run(compiled, [[one] for one in history])
    together, refused_together = _run(compiled, [history])
    # Where a sum leaves its column's range and comes back, the batch decides whether an event is to blame.
    if alone != together and not (refused or refused_together):
        raise NotDeterministicError(
            f"one by one the events give {alone}, in one batch {together}: a function may depend on its event and "
            "table only, not on the clock, chance, or what it has seen before"
        )
    return alone


def _spec(projection: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(projection, (str, Path)):
        documents = list(yaml.safe_load_all(Path(projection).read_text()))
        found = [one for one in documents if isinstance(one, dict) and one.get("kind") == "Projection"]
        if len(found) != 1:
            raise ValueError(f"{projection} holds {len(found)} Projections: give one of them as a dict")
        projection = found[0]
    return cast("Mapping[str, Any]", projection["spec"])


class _Placed(NamedTuple):
    number: int
    incarnation: str
    event: Event


def _history(definition: Definition, incarnations: Mapping[str, str], events: Sequence[Given]) -> list[_Placed]:
    """Return the events as their streams have them."""
    positions: dict[tuple[str, int], int] = {}
    revisions: dict[tuple[str, str], int] = {}
    latest: dict[tuple[str, int], dt.datetime] = {}
    now = _FIRST
    placed = []
    for number, one in enumerate(events):
        stream = one.stream or definition.streams[0]
        if stream not in incarnations:
            raise ValueError(f"event {number}: {stream} is not in spec.streams ({', '.join(definition.streams)})")
        partition = partition_of(one.subject, _PARTITIONS)
        place, subject = (stream, partition), (stream, one.subject)
        positions[place] = positions.get(place, 0) + 1
        revisions[subject] = revisions.get(subject, 0) + 1
        now = one.time.astimezone(dt.UTC) if one.time is not None else now + dt.timedelta(seconds=1)
        latest[place] = time = max(now, latest.get(place, now))  # it never decreases in a partition
        made = Event(
            partition, positions[place], one.subject, revisions[subject], f"event-{number}", one.type, time,
            msgspec.Raw(_encode(one.data)), None if one.metadata is None else msgspec.Raw(_encode(one.metadata)),
        )  # fmt: skip
        placed.append(_Placed(number, incarnations[stream], made))
    return placed


class _Run:
    """A read model in memory, written batch by batch as the projector does it."""

    def __init__(self, compiled: Fold | HandlerFold) -> None:
        self.parked: list[Parked] = []
        #: Whether a row couldn't be stored.
        self.refused = False
        self._compiled = compiled
        self._known = folds.Parked()
        definition = compiled.definition
        self._types = {column.name: column.type for column in definition.columns}
        self._defaults = {column.name: default_of(column) for column in definition.columns}
        self._merges = merges(definition)
        self._rows: dict[str, dict[str, Value]] = {}
        self._stamps: dict[tuple[str, str], Stamp] = {}

    def write(self, placed: Sequence[_Placed]) -> None:
        """Fold and write a batch; in halves where a row can't be stored, until the event to blame stands alone."""
        batch = self._compiled.batch(self._known, self._rows)
        for one in placed:
            batch.fold(one.incarnation, [one.event])
        bad = [(one.event, one.incarnation, one.key, one.error) for one in batch.parked]
        try:
            after = {change.key: self._after(change) for change in batch.changes.values()}
        except ValueError as error:
            self.refused = True
            if len(placed) > 1:
                half = len(placed) // 2
                self.write(placed[:half])
                self.write(placed[half:])
                return
            bad += [(placed[0].event, placed[0].incarnation, key, str(error)) for key in batch.changes]
            after = {}
        for key, row in after.items():
            if row is None:
                self._rows.pop(key, None)
            else:
                self._rows[key] = row
                for column, stamp in batch.changes[key].stamps.items():
                    self._stamps[key, column] = max(stamp, self._stamps.get((key, column), stamp))
        numbers = {(one.incarnation, one.event.partition, one.event.position): one.number for one in placed}
        for event_, incarnation, key_, error_ in bad:
            place = (incarnation, event_.partition)
            if key_ is None:
                self._known.subjects.add((*place, event_.subject))
            else:
                self._known.rows.add((*place, key_))
            self.parked.append(Parked(numbers[*place, event_.position], key_, error_))

    def outcome(self) -> Outcome:
        """Return what stands there."""
        rows = {
            key: {name: seen(value, self._types[name]) for name, value in row.items()}
            for key, row in self._rows.items()
        }
        return Outcome(rows, self.parked)

    def _after(self, change: RowChange) -> dict[str, Value] | None:
        """Return the row after a change, as the docstring of `refold.projection.fold` says; None where there is none.

        Raises:
            ValueError: a sum is out of its column's range.
        """
        if not change.exists_after:
            return None
        row = dict((None if change.deleted_first else self._rows.get(change.key)) or self._defaults)
        for name, value in change.set.items():
            stamp, former = change.stamps.get(name), self._stamps.get((change.key, name))
            if stamp is None or former is None or stamp > former:
                row[name] = value
        for name, value in change.merge.items():
            joined = JOINS[self._merges[name]](row[name], value)
            if self._merges[name] == "add":
                joined = integer_total(0, joined) if self._types[name] is ColumnType.INTEGER else to_numeric(joined)
            row[name] = joined
        return row


def _run(compiled: Fold | HandlerFold, batches: Sequence[Sequence[_Placed]]) -> tuple[Outcome, bool]:
    """Return what comes of batches, and whether a row couldn't be stored."""
    run = _Run(compiled)
    for placed in batches:
        run.write(placed)
    return run.outcome(), run.refused
