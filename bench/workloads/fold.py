"""`fold`: both read models folded in memory by the compiled definitions, in batches as the projector's."""

import datetime as dt
import time
from collections.abc import Sequence

import msgspec
from refold.events import Event
from refold.partitioning import partition_of
from refold.projection import definition as definitions
from refold.projection.fold import JOINS, Fold, RowChange, compile_fold

from bench.limits import folding
from bench.models import CUSTOMERS, ORDERS, Model, compare
from bench.orders import OrderEvent
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers

_BATCH = 10_000
_BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def fold(_: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """Each model decodes and folds all events, as its projector would; rows are put together off the clock."""
    stored = _stored(events)
    plain = [(event.subject, event.type, event.time, bytes(event.data)) for event in stored]
    folds = [(model, compile_fold(definitions.parse({**model.spec, "streams": ["orders"]}))) for model in _MODELS]
    return Comparison(
        workload="fold",
        params={"events": len(events), "batch": _BATCH, "models": len(_MODELS)},
        measured=lambda: _run(folds, stored),
        limit=lambda: folding.in_memory(plain, len(plain)),
        limit_name="msgspec and a hand-written dict fold in Python",
        usual=600_000,
    )


_MODELS = (ORDERS, CUSTOMERS)


def _stored(events: Sequence[OrderEvent]) -> list[Event]:
    """Return the events as they would be read from the store."""
    heads = [0] * PARTITIONS
    stored = []
    for number, event in enumerate(events):
        partition = partition_of(event.subject, PARTITIONS)
        heads[partition] += 1
        stored.append(
            Event(
                partition=partition, position=heads[partition], subject=event.subject, revision=event.revision,
                id=str(number), type=event.type, time=_BEGIN + dt.timedelta(microseconds=number + 1),
                data=msgspec.Raw(event.data),
            )
        )  # fmt: skip
    return stored


def _run(folds: Sequence[tuple[Model, Fold]], events: Sequence[Event]) -> Run:
    batches = [events[start : start + _BATCH] for start in range(0, len(events), _BATCH)]
    reference: dict[str, folding.Rows] = {ORDERS.name: {}, CUSTOMERS.name: {}}
    folding.fold(
        ((event.subject, event.type, event.time, event.data) for event in events),
        reference[ORDERS.name], reference[CUSTOMERS.name], decode=folding.decode_exactly,
    )  # fmt: skip
    seconds = 0.0
    for model, compiled in folds:
        rows: folding.Rows = {}
        for events_of_batch in batches:
            began = time.perf_counter()
            batch = compiled.batch()
            batch.fold("0" * 16, events_of_batch)
            changes = batch.changes
            seconds += time.perf_counter() - began
            if batch.parked:
                raise RuntimeError(f"{model.name}: {batch.parked[0].error}")
            _apply(rows, changes, model.columns)
        compare(model, rows, reference[model.name])
    return Run(events_per_s=len(events) / seconds)


def _apply(rows: folding.Rows, changes: dict[str, RowChange], columns: Sequence[str]) -> None:
    """Do to `rows` what the read store would; these models delete nothing."""
    for key, change in changes.items():
        row = rows.setdefault(key, [None] * len(columns))
        for column, value in change.set.items():
            row[columns.index(column)] = value
        for column, added in change.merge.items():
            place = columns.index(column)
            row[place] = JOINS["add"](row[place], added)
