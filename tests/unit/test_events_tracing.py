"""A trace that an event's metadata carries goes on in the record's headers."""

import datetime as dt
import json
from typing import Any

import msgspec
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from refold import events
from refold.events import Event, from_record
from refold.eventstore.appends import MAX_DEPTH

from tests.records import headers

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b9c7c989f97918e1-01"


def event(metadata: str | None) -> Event:
    raw = None if metadata is None else msgspec.Raw(metadata.encode())
    return Event(0, 1, "order-1", 1, "id-1", "OrderPlaced", dt.datetime.now(dt.UTC), msgspec.Raw(b"{}"), raw)


def headers_of(metadata: str | None) -> dict[str, bytes]:
    return dict(headers(event(metadata), namespace="shop", name="orders", incarnation="f" * 16))


def test_a_traceparent_is_a_header_for_tracing_libraries_and_an_attribute_for_cloudevents() -> None:
    found = headers_of(json.dumps({"user": "ann", "traceparent": TRACE}))
    assert found["traceparent"] == TRACE.encode()
    official = from_binary(KafkaMessage(headers=found, key=b"order-1", value=b"{}"), JSONFormat(), CloudEvent)
    assert official.get_extension("traceparent") == TRACE


@pytest.mark.parametrize(
    "metadata",
    [
        None, "{}", '"traceparent"', '["traceparent"]', '{"note": "traceparent"}', '{"traceparent": null}',
        '{"traceparent": 7}', '{"traceparent": ""}', '{"inner": {"traceparent": "00-a-b-01"}}',
    ],
)  # fmt: skip
def test_no_other_metadata_makes_a_trace_and_it_is_kept_as_it_is(metadata: str | None) -> None:
    found = headers_of(metadata)
    assert not {"traceparent", "ce_traceparent"} & found.keys()
    assert found.get("ce_metadata") == (None if metadata is None else metadata.encode())


def test_the_deepest_metadata_that_can_be_appended_is_searched() -> None:
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert headers_of(f'{{"deep": {deep}, "traceparent": "{TRACE}"}}')["traceparent"] == TRACE.encode()


def test_metadata_without_the_word_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(_: Any) -> Any:
        raise AssertionError("parsed")

    monkeypatch.setattr(events, "_decode_traced", parse)
    headers_of('{"user": "ann"}')


def test_an_event_survives_a_record_with_a_trace() -> None:
    traced = event(json.dumps({"traceparent": TRACE}))
    found = headers(traced, namespace="shop", name="orders", incarnation="f" * 16)
    assert from_record(0, b"{}", found, incarnation="f" * 16) == traced
