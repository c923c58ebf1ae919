"""Random definitions and histories in random batches give the rows of a plain fold."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refold.projection import values
from refold.projection.definition import Definition, check
from refold.projection.fold import Parked, compile_fold

from tests.folding import Reference, Store, definitions, events_of, steps


def check_against_reference(definition: Definition, history: list[Any], *, several: bool) -> None:
    assert check(definition) == []
    compiled = compile_fold(definition)
    assert compiled.single_partition is not several
    reference, store, parked = Reference(definition, several=several), Store(definition), Parked()
    found: list[tuple[str, int, int, str]] = []
    keys = {event.subject for _, event, _ in events_of(history, several=several)}
    batch = compiled.batch(parked, {})
    for stream, event, ends in [*events_of(history, several=several), (None, None, True)]:
        if event is not None:
            reference.fold(stream, event)
            batch.fold(stream, [event])
        if ends:
            for change in batch.changes.values():
                store.apply(change)
            for one in batch.parked:
                assert one.key is not None
                parked.rows.add((one.incarnation, one.event.partition, one.key))
                found.append((one.incarnation, one.event.partition, one.event.position, one.key))
            batch = compiled.batch(parked, store.read(keys, compiled.reads))
    assert store.rows == reference.rows
    assert found == reference.parked


@settings(max_examples=150, deadline=None)
@given(definitions(several=False), st.lists(steps, max_size=25))
def test_rows_fed_by_one_partition_equal_the_plain_fold(definition: Definition, history: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "MAX_ARRAY", 3)
        check_against_reference(definition, history, several=False)


@settings(max_examples=150, deadline=None)
@given(definitions(several=True), st.lists(steps, max_size=25))
def test_rows_fed_by_several_partitions_equal_the_plain_fold(definition: Definition, history: list[Any]) -> None:
    check_against_reference(definition, history, several=True)
