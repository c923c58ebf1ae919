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
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_decode_traced = msgspec.json.Decoder(_Traced).decode


def source(namespace: str, name: str, subject: str) -> str:
    """Return the CloudEvents `source`: stream and subject, so that `source` + `id` is unique."""
    return f"/{namespace}/{name}/{quote(subject, safe='')}"


class Headers:
    """Makes the Kafka headers of one stream's events, in the CloudEvents binary mode.

    The relay does it for every event: so texts are UTF-8 as PostgreSQL sends them, and what is the same in all events,
    or was in the one before, is made once.
    """

    def __init__(self, *, namespace: str, name: str, incarnation: str) -> None:
        """`incarnation` is that of the stream's history."""
        self._namespace, self._name = namespace, name
        self._origin = source(namespace, name, "").encode()
        self._incarnation = ("ce_incarnation", incarnation.encode())
        self._second = -1
        self._second_text = b"1969-12-31T23:59:59"

    def of(
        self, position: int, subject: bytes, revision: int, id_: bytes, type_: bytes, time: int, metadata: bytes | None
    ) -> list[tuple[str, bytes]]:
        """Return the headers of an event; `time` is `recorded_at` in microseconds since 1970.

        A `traceparent` in the metadata stands twice: under its own name, where tracing libraries look for the context
        of a message, and as the attribute of CloudEvents' Distributed Tracing extension.
        """
        second, microsecond = divmod(time, 1_000_000)
        if second != self._second:
            text = (_EPOCH + dt.timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%S")
            self._second, self._second_text = second, text.encode()
        if subject.rstrip(_UNRESERVED):
            origin = source(self._namespace, self._name, subject.decode()).encode()
        else:
            origin = self._origin + subject
        result = [
            ("ce_specversion", b"1.0"),
            ("ce_id", id_),
            ("ce_source", origin),
            ("ce_type", type_),
            ("ce_subject", subject),
            ("ce_time", b"%b.%06dZ" % (self._second_text, microsecond)),
            ("content-type", b"application/json"),
            ("ce_position", b"%d" % position),
            ("ce_revision", b"%d" % revision),
            self._incarnation,
        ]
        if metadata is not None:
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
