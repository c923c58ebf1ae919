"""What stands in a record is what stands in the store: headers there and back."""

import datetime as dt

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from refold.events import Event, Headers, from_record

from tests.records import headers, microseconds

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
times = st.datetimes(dt.datetime(1970, 1, 2), dt.datetime(9999, 12, 30), timezones=st.just(dt.UTC))
made = st.builds(
    Event,
    partition=st.integers(0, 511),
    position=st.integers(1, 2**63 - 1),
    subject=text,
    revision=st.integers(1, 2**63 - 1),
    id=text,
    type=text,
    time=times,
    data=st.just(msgspec.Raw(b'{"a": 1}')),
    metadata=st.one_of(st.none(), st.just(msgspec.Raw(b'{"b": 2}'))),
)


@given(made)
def test_an_event_survives_its_record(event: Event) -> None:
    found = headers(event, namespace="shop", name="orders", incarnation="f" * 16)
    assert from_record(event.partition, bytes(event.data), found, incarnation="f" * 16) == event
    assert from_record(event.partition, bytes(event.data), found, incarnation="e" * 16) is None


@given(times)
def test_times_always_have_six_digits_of_a_second(time: dt.datetime) -> None:
    event = Event(0, 1, "s", 1, "i", "T", time, msgspec.Raw(b"{}"))
    found = dict(headers(event, namespace="shop", name="orders", incarnation="f" * 16))["ce_time"].decode()
    assert found == time.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(len(found), "0")
    assert len(found) == len("2026-01-31T23:59:59.000000Z")


@given(st.lists(times, min_size=1, max_size=5))
def test_events_of_any_times_one_after_the_other_have_each_its_own(found: list[dt.datetime]) -> None:
    made = Headers(namespace="shop", name="orders", incarnation="f" * 16)
    for time in found:
        text = dict(made.of(1, b"s", 1, b"i", b"T", microseconds(time), None))["ce_time"].decode()
        assert dt.datetime.fromisoformat(text) == time


def test_the_source_percent_encodes_the_subject() -> None:
    for subject, expected in [("AZaz09-._~", "AZaz09-._~"), ("a/b ü", "a%2Fb%20%C3%BC")]:
        event = Event(0, 1, subject, 1, "i", "T", dt.datetime.now(dt.UTC), msgspec.Raw(b"{}"))
        found = dict(headers(event, namespace="shop", name="orders", incarnation="f" * 16))["ce_source"]
        assert found == f"/shop/orders/{expected}".encode()
