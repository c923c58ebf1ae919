"""The projector's pure parts: bounds of parking, halving, the order of stamps, the text for COPY."""

import datetime as dt
import itertools
from decimal import Decimal

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql
from refold.events import Event
from refold.projection import parking
from refold.projection.definition import Column, Definition, FoldRule, StreamRef, VersionDefinition, stamped
from refold.projection.fold import ParkedEvent, RowChange, Stamp
from refold.projection.projector import Partition, Slice, _before, _halves
from refold.projection.readstore.postgres_rows import _Writer

NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
STREAM = StreamRef(namespace="n", name="s", incarnation="i" * 16, partitions=4, topic="t", schema="n.s")


def event(position: int, partition: int = 0) -> Event:
    return Event(partition, position, "s", position, str(position), "T", NOON, msgspec.Raw(b"{}"))


def parked(position: int, partition: int = 0) -> ParkedEvent:
    return ParkedEvent("i", event(position, partition), "k", "bad")


def slices(*sizes: int) -> list[Slice]:
    return [
        Slice(Partition(STREAM, number), [event(position) for position in range(1, size + 1)], 100 + number, "topic")
        for number, size in enumerate(sizes)
    ]


def test_no_partition_stops_while_all_fits_below_the_bound() -> None:
    assert parking.stops([parked(1), parked(2), parked(9, 1)], {("i", 0): 3}, 5) == {}


def test_a_partition_stops_at_its_first_event_beyond_the_bound() -> None:
    found = parking.stops([parked(1), parked(2), parked(3), parked(9, 1)], {("i", 0): 3}, 4)
    assert {key: one.event.position for key, one in found.items()} == {("i", 0): 2}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1))
def test_halves_hold_the_same_events_in_the_same_order_and_are_both_smaller(sizes: list[int]) -> None:
    whole = slices(*sizes)
    first, second = _halves(whole)
    both = sorted([*first, *second], key=lambda one: one.partition.number)
    assert first
    assert second
    for number, size in enumerate(sizes):
        parts = [one for one in both if one.partition.number == number]
        positions = list(itertools.chain.from_iterable([e.position for e in one.events] for one in parts))
        assert positions == list(range(1, size + 1))
        assert [one.offset for one in parts[:-1]] == [None] * (len(parts) - 1), "only the last part reaches the offset"
        assert parts[-1].offset == 100 + number


def test_a_slice_is_cut_before_the_event_that_is_one_too_many() -> None:
    cut = _before(slices(5, 5), {("i" * 16, 1): parked(4, 1)})
    assert [[e.position for e in one.events] for one in cut] == [[1, 2, 3, 4, 5], [1, 2, 3]]
    assert [one.offset for one in cut] == [100, None]


STAMPS = st.builds(
    Stamp,
    recorded_at=st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(2280, 1, 1), timezones=st.just(dt.UTC)),
    incarnation=st.text("0123456789abcdef", min_size=16, max_size=16),
    partition=st.integers(0, 511),
    position=st.integers(1, 10**15),
)


@given(STAMPS, STAMPS)
def test_stamps_are_ordered_as_text_as_they_are_as_values(one: Stamp, other: Stamp) -> None:
    assert (one < other) == (one.text.encode() < other.text.encode())
    assert (one == other) == (one.text == other.text)


def definition(*, single: bool) -> VersionDefinition:
    return VersionDefinition(
        definition=Definition(
            streams=["s"],
            key="subject" if single else "data.k",
            columns=[Column(name="text", type="text"), Column(name="sum", type="numeric")],
            fold=[FoldRule(type="T", set={"text": "'x'"}, add={"sum": "1"})],
        ),
        streams=[STREAM],
    )


def test_only_set_columns_of_rows_fed_by_several_partitions_have_stamps() -> None:
    assert stamped(definition(single=True).definition) == []
    assert stamped(definition(single=False).definition) == ["text"]


def test_copy_text_escapes_what_would_end_a_value() -> None:
    writer = _Writer(definition(single=True), sql.Identifier("rows"))
    changes = [
        RowChange("a\tb", set={"text": "x\\y\nz\r"}, merge={"sum": Decimal("1E+3")}),
        RowChange("gone", exists_after=False),
        RowChange("null", set={"text": None}),
    ]
    text, _ = writer.stage(changes)
    assert text.decode().split("\n") == [
        "0\ta\\tb\tx\\\\y\\nz\\r\t1E+3",
        "1\tgone\t\\N\t\\N",
        "2\tnull\t\\N\t\\N",
        "",
    ]


def test_nothing_to_change_is_no_statement() -> None:
    for single in (True, False):
        assert _Writer(definition(single=single), sql.Identifier("rows")).stage([]) == (b"", None)
