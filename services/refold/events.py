"""The event as it crosses module borders, and its form as a Kafka record (CloudEvents 1.0, binary mode)."""

import datetime as dt
import string
from collections.abc import Sequence
from urllib.parse import quote

import msgspec


class Event(msgspec.Struct, frozen=True, gc=False):
    """One immutable event as it stands in a stream.

    `data` and `metadata` are JSON text, never decomposed. `time` is `recorded_at` (UTC, microseconds).
    """

    partition: int
    position: int
    subject: str
    revision: int
    id: str
    type: str
    time: dt.datetime
    data: msgspec.Raw
    metadata: msgspec.Raw | None = None


class _Traced(msgspec.Struct, frozen=True, gc=False):
    traceparent: str | None = None


_UNRESERVED = (string.ascii_letters + string.digits + "-._~").encode()
_MAX_TRACEPARENT = 128  # characters
_encode = msgspec.json.Encoder().encode
_decode_traced = msgspec.json.Decoder(_Traced).decode


def source(namespace: str, name: str, subject: str) -> str:
    """Return the CloudEvents `source`: stream and subject, so that `source` + `id` is unique."""
    return f"/{namespace}/{name}/{quote(subject, safe='')}"


def headers(event: Event, *, namespace: str, name: str, incarnation: str) -> list[tuple[str, bytes]]:
    """Return the Kafka headers of `event` in the CloudEvents binary mode.

    A `traceparent` in the metadata stands twice: under its own name, where tracing libraries look for the context of a
    message, and as the attribute of CloudEvents' Distributed Tracing extension.
    """
    # The relay calls this for every event, so what is usual is short: 2 µs in place of 6.
    subject = event.subject.encode()
    if subject.rstrip(_UNRESERVED):
        origin = source(namespace, name, event.subject).encode()
    else:
        origin = f"/{namespace}/{name}/".encode() + subject
    time = event.time
    if time.microsecond and time.tzinfo is dt.UTC:
        text = _encode(time)[1:-1]
    else:  # msgspec would leave out microseconds of 0
        text = time.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
    result = [
        ("ce_specversion", b"1.0"),
        ("ce_id", event.id.encode()),
        ("ce_source", origin),
        ("ce_type", event.type.encode()),
        ("ce_subject", subject),
        ("ce_time", text),
        ("content-type", b"application/json"),
        ("ce_position", b"%d" % event.position),
        ("ce_revision", b"%d" % event.revision),
        ("ce_incarnation", incarnation.encode()),
    ]
    if event.metadata is not None:
        metadata = bytes(event.metadata)
        result.append(("ce_metadata", metadata))
        # few events are traced: the others' metadata isn't parsed
        if b"traceparent" in metadata and (traceparent := _traceparent(metadata)) is not None:
            result += (("traceparent", traceparent), ("ce_traceparent", traceparent))
    return result


def _traceparent(metadata: bytes) -> bytes | None:
    """Return the W3C trace context that the metadata carries as the string `traceparent`, if it does.

    One has 55 characters, of later versions perhaps more; a long text is none, and twice in the headers it might make
    the record larger than the topic takes.
    """
    try:
        found = _decode_traced(metadata).traceparent
    except msgspec.DecodeError:  # no object, or another type than a string
        return None
    return found.encode() if found and len(found) <= _MAX_TRACEPARENT else None


def from_record(
    partition: int, value: bytes, record_headers: Sequence[tuple[str, bytes]], *, incarnation: str
) -> Event | None:
    """Return the event of a Kafka record, or None where it isn't one of this incarnation that the relay wrote."""
    found = dict(record_headers)
    try:
        if found["ce_incarnation"] != incarnation.encode():
            return None
        metadata = found.get("ce_metadata")
        return Event(
            partition=partition,
            position=int(found["ce_position"]),
            subject=found["ce_subject"].decode(),
            revision=int(found["ce_revision"]),
            id=found["ce_id"].decode(),
            type=found["ce_type"].decode(),
            time=dt.datetime.fromisoformat(found["ce_time"].decode()),
            data=msgspec.Raw(value),
            metadata=None if metadata is None else msgspec.Raw(metadata),
        )
    except (KeyError, ValueError):
        return None
