"""A row folded again at a moment equals the plain fold of its events until then, page borders wherever they are."""

import datetime as dt
import json
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refold.events import Event
from refold.projection import past, values
from refold.projection.definition import Definition, StreamRef, VersionDefinition, parse
from refold.projection.past import Aside, At, RowAt, RowFold, parse_at, why_not

from tests.folding import TIME, Reference, as_json, definitions, events_of, steps

STREAM = StreamRef(namespace="n", name="s", incarnation="aa", partitions=2, topic="n.s", schema="n.s")
SUMS = parse(
    {
        "streams": ["s"],
        "columns": [{"name": "sum", "type": "integer", "default": "0"}, {"name": "last", "type": "text"}],
        "fold": [
            {"type": "Added", "add": {"sum": "data.n"}},
            {"type": "Named", "set": {"last": "data.name"}},
            {"type": "Gone", "delete": True},
        ],
    }
)


def version(definition: Definition, ends: list[int] | None = None) -> VersionDefinition:
    return VersionDefinition(definition=definition, streams=[STREAM], ends={} if ends is None else {"aa": ends})


def history(*events: tuple[str, dict[str, Any]]) -> list[Event]:
    """Events of one subject, each behind one of another in its partition."""
    return [
        Event(
            partition=1, position=2 * number, subject="x", revision=number, id=str(number), type=type_,
            time=TIME + dt.timedelta(seconds=number), data=msgspec.Raw(json.dumps(data).encode()),
        )
        for number, (type_, data) in enumerate(events, 1)
    ]  # fmt: skip


def folded(events: list[Event], definition: VersionDefinition | None = None, **how: Any) -> RowAt:
    fold = RowFold("v1", definition or version(SUMS), "x", **how)
    for begin in range(0, len(events), 2):
        if not fold.take(events[begin : begin + 2]):
            break
    return fold.result()


def plain(raw: msgspec.Raw | None) -> Any:
    return None if raw is None else json.loads(bytes(raw), parse_float=Decimal)


def shown(row: dict[str, Any] | None) -> Any:
    """A row of the reference as an answer has it."""
    if row is None:
        return None
    texts = {
        name: f"{value.astimezone(dt.UTC):%Y-%m-%dT%H:%M:%S.%f}Z" if isinstance(value, dt.datetime) else value
        for name, value in row.items()
    }
    return json.loads(as_json(texts), parse_float=Decimal)


@settings(max_examples=60, deadline=None)
@given(definitions(several=False), st.lists(steps, max_size=25), st.integers(0, 4))
def test_each_moment_of_each_row_equals_the_plain_fold(definition: Definition, events: list[Any], told: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "MAX_ARRAY", 3)
        rows: dict[str, list[Any]] = {}
        seen: dict[str, list[tuple[Event, bool]]] = {}
        reference = Reference(definition, several=False)
        for stream, event, ends in events_of(events, several=False):
            of_subject = seen.setdefault(event.subject, [])
            # what a partition's events are numbered by isn't what a subject's are
            event = msgspec.structs.replace(event, revision=len(of_subject) + 1)
            of_subject.append((event, ends))
            reference.fold(stream, event)
            rows.setdefault(event.subject, []).append(shown(reference.rows.get(event.subject)))
        bad = {key: position for _, _, position, key in reversed(reference.parked)}
        for subject, then in rows.items():
            for last in range(1, len(then) + 1):
                fold = RowFold("v1", version(definition), subject, steps=told)
                page: list[Event] = []
                for event, ends in seen[subject][:last]:
                    page.append(event)
                    if ends:
                        fold.take(page)
                        page = []
                fold.take(page)
                found = fold.result()
                assert plain(found.data) == then[last - 1]
                stops = next((e.revision for e, _ in seen[subject] if e.position == bad.get(subject)), None)
                if stops is not None and stops <= last:
                    assert (found.parked and found.parked.revision, found.revision) == (stops, stops - 1)
                else:
                    assert (found.parked, found.revision) == (None, last)
                for step in found.steps:
                    before = then[step.revision - 2] if step.revision > 1 else None
                    after = then[step.revision - 1]
                    if step.effect != "parked":
                        differs = {
                            name
                            for name in (before or {}) | (after or {})
                            if (before or {}).get(name) != (after or {}).get(name)
                        }
                        assert set(step.changes) == differs
                        for name, (old, new) in step.changes.items():
                            assert plain(old) == (before or {}).get(name)
                            assert plain(new) == (after or {}).get(name)


def test_the_last_events_tell_what_each_did() -> None:
    events = history(("Added", {"n": 2}), ("Named", {"name": "a"}), ("Other", {}), ("Gone", {}), ("Added", {"n": 1}))
    found = folded(events, steps=10)
    assert [(one.revision, one.type, one.effect) for one in found.steps] == [
        (1, "Added", "created"),
        (2, "Named", "changed"),
        (3, "Other", "none"),
        (4, "Gone", "deleted"),
        (5, "Added", "created"),
    ]
    assert [{name: (plain(a), plain(b)) for name, (a, b) in one.changes.items()} for one in found.steps] == [
        {"sum": (None, 2)},
        {"last": (None, "a")},
        {},
        {"sum": (2, None), "last": ("a", None)},
        {"sum": (None, 1)},
    ]
    assert (found.revision, found.time, plain(found.data)) == (5, events[-1].time, {"sum": 1, "last": None})
    assert [one.revision for one in folded(events, steps=2).steps] == [4, 5]
    assert folded(events).steps == []


def test_a_row_stops_before_the_first_event_that_fails() -> None:
    events = history(("Added", {"n": 2}), ("Named", {"name": "a"}), ("Added", {}), ("Added", {"n": 1}))
    found = folded(events, steps=3)
    assert (found.revision, plain(found.data)) == (2, {"sum": 2, "last": "a"})
    assert found.parked is not None
    assert found.parked.revision == 3
    assert "has no field 'n'" in found.parked.error
    assert [(one.revision, one.effect, one.error) for one in found.steps] == [
        (2, "changed", None),
        (3, "parked", found.parked.error),
    ]
    first = folded(history(("Added", {})))
    assert (first.revision, first.time, first.data) == (0, None, None)


def test_a_sum_beyond_its_column_is_an_event_that_fails() -> None:
    definition = parse(
        {"streams": ["s"], "columns": [{"name": "sum", "type": "integer"}],
         "fold": [{"type": "Added", "add": {"sum": "data.n"}}]}
    )  # fmt: skip
    events = history(("Added", {"n": 2**63 - 1}), ("Other", {}), ("Added", {"n": 1}), ("Added", {"n": -5}))
    fold = RowFold("v1", version(definition), "x")
    assert fold.take(events[:1])
    assert not fold.take([*events[1:3], *history(*[("Added", {"n": 1})] * 4)[3:]])
    found = fold.result()
    assert (found.revision, plain(found.data)) == (2, {"sum": 2**63 - 1})
    assert found.parked is not None
    assert "64 bits" in found.parked.error


def test_what_the_version_has_set_aside_is_set_aside_here() -> None:
    events = history(("Added", {"n": 1}), ("Added", {}), ("Added", {"n": 3}), ("Named", {"name": "a"}))
    found = folded(events, aside=Aside(discarded=frozenset({4})), steps=9)
    assert (found.revision, plain(found.data), found.parked) == (4, {"sum": 4, "last": "a"}, None)
    assert [one.effect for one in found.steps] == ["created", "discarded", "changed", "changed"]
    # What only the read store could refuse is known from there; who has discarded it meanwhile is believed.
    for discarded in (frozenset({4}), frozenset({4, 6})):
        found = folded(events, aside=Aside((6, "the store's"), discarded))
        assert (found.parked and found.parked.error) == ("the store's" if discarded == {4} else None)
        assert found.revision == (2 if discarded == {4} else 4)


def test_a_read_model_as_of_a_moment_ends_there() -> None:
    events = history(*[("Added", {"n": 1})] * 5)
    fold = RowFold("v1", version(SUMS, ends=[0, 6]), "x", steps=2)
    assert fold.take(events[:2])
    assert not fold.take(events[2:])
    found = fold.result()
    assert (found.revision, plain(found.data)) == (3, {"sum": 3, "last": None})


def test_large_differences_are_told_of_fewer_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "_STEPS_BYTES", 1000)
    events = history(*[("Named", {"name": str(number) * 300}) for number in range(9)])
    found = folded(events, steps=9)
    assert plain(found.data)["last"] == "8" * 300
    assert 1 <= len(found.steps) <= 3
    assert found.steps[-1].revision == 9


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("3", At(revision=3)),
        ("999999999999999999", At(revision=10**18 - 1)),
        ("2026-01-31T23:59:59Z", At(time=dt.datetime(2026, 1, 31, 23, 59, 59, tzinfo=dt.UTC))),
        ("2026-01-31T23:59:59.5+02:00", At(time=dt.datetime(2026, 1, 31, 21, 59, 59, 500_000, tzinfo=dt.UTC))),
    ],
)
def test_a_moment_is_a_revision_or_a_time(text: str, at: At) -> None:
    assert parse_at(text) == at


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "1.5", "1e3", "١", "9" * 19, "now", "2026-01-31", "2026-01-31T23:59:59", "2026-02-31T00:00:00Z",
     "2026-01-31T23:59:59 02:00", "x" * 10_000],
)  # fmt: skip
def test_what_is_no_moment_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="a time"):
        parse_at(text)


def test_only_rows_that_one_partition_feeds_by_a_fold_have_a_history() -> None:
    assert why_not(version(SUMS)) is None
    keyed = SUMS.model_copy(update={"key": "data.x"})
    assert "its key is not the subject" in (why_not(version(keyed)) or "")
    assert "several streams" in (why_not(version(SUMS.model_copy(update={"streams": ["s", "t"]}))) or "")
    # A definition without entries is code.
    assert "by code" in (why_not(version(SUMS.model_copy(update={"fold": []}))) or "")
