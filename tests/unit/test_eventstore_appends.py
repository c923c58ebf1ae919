"""What an append must be, before it reaches the database."""

import datetime as dt
import json
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refold.eventstore.appends import MAX_DEPTH, MAX_NUMBER, Append, Limits, NewEvent, check
from refold.eventstore.errors import InvalidAppendError, TooLargeError
from refold.eventstore.reads import _utc
from refold.partitioning import partition_of


def raw(text: str | bytes) -> msgspec.Raw:
    return msgspec.Raw(text if isinstance(text, bytes) else text.encode())


def event(data: str | bytes = "1", *, id: str = "1", type: str = "T", metadata: str = "null") -> NewEvent:  # noqa: A002
    return NewEvent(id, type, raw(data), raw(metadata))


def checked(*events: NewEvent, subject: str = "s", expected: Any = "any", limits: Limits | None = None) -> Append:
    return check(subject, events, expected_revision=expected, partitions=6, limits=limits or Limits())


def refused(*events: NewEvent, **asked: Any) -> InvalidAppendError:
    with pytest.raises(InvalidAppendError) as caught:
        checked(*events, **asked)
    return caught.value


@pytest.mark.parametrize("subject", ["a", "a/b", "..", "é" * 256, "x" * 512, "日本", "\x01", " "])
def test_a_subject_of_1_to_512_bytes_is_put_where_kafka_would_put_it(subject: str) -> None:
    assert checked(event(), subject=subject).partition == partition_of(subject, 6)


@pytest.mark.parametrize("subject", ["", "x" * 513, "é" * 257, "a\0b", "\ud800"])
def test_a_subject_that_cannot_be_stored_is_refused_by_its_name(subject: str) -> None:
    error = refused(event(), subject=subject)
    assert error.field == "subject"
    assert not isinstance(error, TooLargeError)


@pytest.mark.parametrize("bad", ["", "x" * 256, "a\0b", "\udfff"])
@pytest.mark.parametrize("field", ["id", "type"])
def test_a_bad_id_or_type_is_refused_with_its_event(field: str, bad: str) -> None:
    assert refused(event(), event(**{"id": "2", field: bad})).field == f"events[1].{field}"


@pytest.mark.parametrize(
    ("given", "number"), [("any", -1), ("none", 0), ("exists", -2), (0, 0), (7, 7), (2**63 - 1, 2**63 - 1)]
)
def test_an_expected_revision_is_a_number_or_a_word(given: Any, number: int) -> None:
    assert checked(event(), expected=given).expected == number


@pytest.mark.parametrize("given", [-1, -2, 2**63, "ANY", "", "3"])
def test_another_expected_revision_is_refused(given: Any) -> None:
    assert refused(event(), expected=given).field == "expectedRevision"


def test_an_append_has_events_and_not_too_many_of_them() -> None:
    assert refused().field == "events"
    few = Limits(append_events=2)
    checked(event(id="1"), event(id="2"), limits=few)
    assert isinstance(refused(*(event(id=str(n)) for n in range(3)), limits=few), TooLargeError)


def test_an_id_that_stands_twice_is_refused_at_its_second_place() -> None:
    assert refused(event(id="a"), event(id="b"), event(id="a")).field == "events[2].id"


def test_too_large_an_event_or_append_is_refused() -> None:
    limits = Limits(event_bytes=100, append_bytes=250)
    full = json.dumps("x" * 98)
    checked(event(full), limits=limits)
    assert refused(event(json.dumps("x" * 99)), limits=limits).field == "events[0]"
    assert refused(event(full, metadata="1"), limits=limits).field == "events[0]"
    error = refused(*(event(full, id=str(n)) for n in range(3)), limits=limits)
    assert isinstance(error, TooLargeError)
    assert error.field == "events"


def test_a_limit_that_is_exceeded_is_named_with_its_number() -> None:
    limits = Limits(append_events=2, event_bytes=100, metadata_bytes=20, append_bytes=150)
    metadata = refused(event(metadata=json.dumps("x" * 19)), limits=limits)
    assert (metadata.field, metadata.reason) == (
        "events[0].metadata", "has 21 bytes; eventstore.limits.metadataBytes is 20",
    )  # fmt: skip
    checked(event(metadata=json.dumps("x" * 18)), limits=limits)
    large = event(json.dumps("x" * 78), id="2")
    for events, named in (
        ([event(json.dumps("x" * 99))], "eventstore.limits.eventBytes is 100"),
        ([event(json.dumps("x" * 78)), large], "eventstore.limits.appendBytes is 150"),
        ([event(id=str(n)) for n in range(3)], "eventstore.limits.appendEvents is 2"),
    ):
        assert named in str(refused(*events, limits=limits))


@pytest.mark.parametrize(
    "text",
    [
        "null", "true", '""', "[]", "{}", "-0", "1e2", "2.0", "0.10", "1E+400", "-1e-400", "9" * MAX_NUMBER,
        "0." + "1" * MAX_NUMBER, r'"\u0001"', r'"\ud83d\ude00"', r'"\\u0000"', r'"\\\\ud800"', r'"\"\u00e9"',
        '"1e999999"', '"' + "9" * 1000 + '"', '{"1e9999": 1}', "[" * MAX_DEPTH + "]" * MAX_DEPTH,
        '"' + "[" * 1000 + '"', "[" + "[]," * 1000 + "[]]", '"é日"', r'"\u00e9\ud83d\ude00\ud83d\ude00"',
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["data", "metadata"])
def test_json_that_can_be_kept_is_taken(field: str, text: str) -> None:
    checked(event(**{field: text}))


@pytest.mark.parametrize(
    "text",
    [
        r'"\u0000"', r'{"\u0000": 1}', r'"\\\u0000"', r'"\ud800"', r'"\udc00"', r'"\ud83dx\ude00"', r'"\ud83d\n\ude00"',
        r'"\ud83d\ud83d"', r'["\ud83d", "\ude00"]', "1e401", "1E-401", "-1e99999999999999999999",
        "9" * (MAX_NUMBER + 1), "0." + "1" * (MAX_NUMBER + 1), '["1", 1e500]', r'["\"", 1e500]',
        b'"\xff"', b'"\xed\xa0\x80"',
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1),
    ],
)  # fmt: skip
def test_json_that_postgresql_cannot_keep_is_refused_with_its_field(text: str | bytes) -> None:
    assert refused(event(), event(text, id="2")).field == "events[1].data"


def test_an_exponent_counts_as_the_digits_that_it_stands_for() -> None:
    many = "[" + ",".join(["1e400"] * 100) + "]"
    checked(event(many), limits=Limits(event_bytes=41_000))
    assert isinstance(refused(event(many), limits=Limits(event_bytes=40_000)), TooLargeError)


def test_metadata_null_is_none() -> None:
    assert checked(event()).metadata == checked(NewEvent("1", "T", raw("1"))).metadata
    assert checked(event(metadata="{}")).metadata != checked(event()).metadata


def test_an_event_of_a_python_value_has_an_id_of_its_own_and_exact_numbers() -> None:
    one, two = NewEvent.of("T", {"price": Decimal("0.10")}), NewEvent.of("T", 1, metadata={"user": "ann"})
    assert one.id != two.id
    assert bytes(one.data) == b'{"price":0.10}'
    assert bytes(one.metadata) == b"null"
    assert bytes(two.metadata) == b'{"user":"ann"}'


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(_json)
def test_what_json_encoders_write_is_taken_unless_it_holds_a_nul_or_half_a_pair(value: Any) -> None:
    text = json.dumps(value)
    words = json.loads(text, object_hook=lambda found: [*found, *found.values()])
    holds = "\0" in (flat := "".join(_strings(words))) or any(0xD800 <= ord(letter) <= 0xDFFF for letter in flat)
    if holds:
        refused(event(text))
    else:
        checked(event(text))


def _strings(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def test_a_time_without_a_zone_is_taken_as_utc() -> None:
    assert _utc(dt.datetime(2026, 1, 1, 12)).isoformat() == "2026-01-01T12:00:00+00:00"
    east = dt.timezone(dt.timedelta(hours=2))
    assert _utc(dt.datetime(2026, 1, 1, 12, tzinfo=east)).isoformat() == "2026-01-01T10:00:00+00:00"
