"""Appends as callers give them, checked and encoded for the database before they enter a group.

All that PostgreSQL would refuse is refused here, with the field's name, so that a bad append rarely costs its group a
second try. `data` and `metadata` are any JSON value, kept as PostgreSQL's jsonb keeps it: numbers exactly (2.0, 0.10
and long integers stay as they are written, 1e2 becomes 100, -0 becomes 0), of equal keys in an object the last, the
order of keys not at all.
"""

import dataclasses
import functools
import re
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

import msgspec

from refold.eventstore import arrays
from refold.eventstore.errors import InvalidAppendError, TooLargeError
from refold.partitioning import partition_of

ExpectedRevision = int | Literal["any", "none", "exists"]

#: A number in data or metadata has at most this many digits before and after the point, and an exponent within ± this.
MAX_NUMBER = 400
#: Objects and arrays in data or metadata are nested at most this deep.
MAX_DEPTH = 200
MAX_SUBJECT_BYTES = 512
MAX_ID_BYTES = 255
MAX_TYPE_BYTES = 255

_WORDS = {"any": -1, "none": 0, "exists": -2}
_MAX_REVISION = 2**63 - 1
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_MAYBE_BIG_NUMBER = re.compile(rb"\d[eE]|\d{%d}" % (MAX_NUMBER + 1))
_NUMBER = re.compile(rb"-?(\d+)(?:\.(\d+))?(?:[eE]([+-]?\d+))?")
_BRACKET = re.compile(rb"[][{}]")
_partition_of = functools.lru_cache(maxsize=65536)(partition_of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of appends, in events and bytes; in the chart `eventstore.limits`, where messages name them.

    Attributes:
        append_events: events of one append.
        event_bytes: an event's data and metadata as they are sent, with exponents written out. The topic must take
            them with the blanks that PostgreSQL puts in, see `refold.eventstore.records`.
        metadata_bytes: the metadata alone.
        append_bytes: data and metadata of all events of one append.
        body_bytes: an HTTP request's body, or a line of a bulk.
        waiting_appends: appends that may wait in one process; beyond, appends are refused at once.
        waiting_bytes: the same in bytes.
    """

    append_events: int = 1000
    event_bytes: int = 512 * 1024
    metadata_bytes: int = 64 * 1024
    append_bytes: int = 4 * 1024 * 1024
    body_bytes: int = 8 * 1024 * 1024
    waiting_appends: int = 10_000
    waiting_bytes: int = 128 * 1024 * 1024


_NULL = msgspec.Raw(b"null")


class NewEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An event to be appended.

    Args:
        id: unique within the subject, 1 to 255 bytes; the same id makes a retry harmless.
        type: 1 to 255 bytes, for example OrderPlaced.
        data: JSON text; `NewEvent.of` makes it from a Python value.
        metadata: JSON text; null is none.
    """

    id: str
    type: str
    data: msgspec.Raw
    metadata: msgspec.Raw = msgspec.field(default_factory=lambda: _NULL)

    @classmethod
    def of(cls, type: str, data: Any, *, id: str | None = None, metadata: Any = None) -> "NewEvent":  # noqa: A002
        """Return an event of `data` (whatever msgspec can encode), by default with a new random id."""
        return cls(
            id=str(uuid.uuid4()) if id is None else id,
            type=type,
            data=msgspec.Raw(_encode(data)),
            metadata=msgspec.Raw(_encode(metadata)),
        )


class SubjectAppend(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is appended to one subject, among others.

    Args:
        subject: what the events are about, 1 to 512 bytes.
        events: at least one.
        expected_revision: the subject's revision before the append, or `none` (0), `exists` (over 0) or `any`.
    """

    subject: str
    events: list[NewEvent]
    expected_revision: ExpectedRevision = msgspec.field(default="any", name="expectedRevision")


@functools.cache
def _encoder() -> msgspec.json.Encoder:
    return msgspec.json.Encoder(decimal_format="number")


def _encode(value: Any) -> bytes:
    if isinstance(value, Decimal | float) and not Decimal(value).is_finite():
        raise InvalidAppendError("data", f"{value} is no JSON number")
    return _encoder().encode(value)


class Append(msgspec.Struct, frozen=True):
    """One checked append; ids, types, data and metadata are elements of PostgreSQL arrays.

    `expected` is a revision, -1 for any, -2 for exists; `size` is in bytes; `refusal` is what the stream's event types
    of revision `types_revision` say against it; `path` is what stands before its fields in an atomic append, such as
    `appends[2].`.
    """

    subject: str
    subject_element: bytes
    partition: int
    expected: int
    ids: list[bytes]
    types: list[bytes]
    data: list[bytes]
    metadata: list[bytes]
    size: int
    refusal: InvalidAppendError | None = None
    types_revision: int = 0
    path: str = ""


def check(
    subject: str,
    events: Sequence[NewEvent],
    *,
    expected_revision: ExpectedRevision,
    partitions: int,
    limits: Limits,
) -> Append:
    """Return the append of `events` to `subject`, checked and encoded.

    Raises:
        InvalidAppendError: a field isn't what it must be.
        TooLargeError: a limit is exceeded.
    """
    if isinstance(expected_revision, str):
        expected = _WORDS.get(expected_revision)
        if expected is None:
            raise InvalidAppendError("expectedRevision", f"is a number, any, none or exists, not {expected_revision!r}")
    else:
        expected = expected_revision
        if not 0 <= expected <= _MAX_REVISION:
            raise InvalidAppendError("expectedRevision", f"is from 0 to {_MAX_REVISION}, not {expected}")
    subject_bytes = check_text("subject", subject, MAX_SUBJECT_BYTES)
    if not events:
        raise InvalidAppendError("events", "has no events")
    if len(events) > limits.append_events:
        raise TooLargeError("events", _over(f"has {len(events)} events", "appendEvents", limits.append_events))
    ids, types, data, metadata = [], [], [], []
    size = 0
    for index, event in enumerate(events):
        ids.append(arrays.text(check_text("id", event.id, MAX_ID_BYTES, index)))
        try:
            types.append(_type_element(event.type))
        except InvalidAppendError as error:
            raise InvalidAppendError(_path("type", index), error.reason) from None
        text = bytes(event.data)
        event_size = _check_json("data", text, index)
        data.append(arrays.jsonb(text))
        text = bytes(event.metadata)
        if text == b"null":
            metadata.append(arrays.NULL)
        else:
            metadata_size = _check_json("metadata", text, index)
            if metadata_size > limits.metadata_bytes:
                raise TooLargeError(
                    f"events[{index}].metadata",
                    _over(f"has {metadata_size} bytes", "metadataBytes", limits.metadata_bytes),
                )
            event_size += metadata_size
            metadata.append(arrays.jsonb(text))
        if event_size > limits.event_bytes:
            raise TooLargeError(
                f"events[{index}]",
                _over(f"its data and metadata have {event_size} bytes", "eventBytes", limits.event_bytes),
            )
        size += event_size
    if len(ids) > 1 and len(set(ids)) < len(ids):
        index = next(index for index, element in enumerate(ids) if element in ids[:index])
        raise InvalidAppendError(f"events[{index}].id", f"{events[index].id!r} stands twice in the append")
    if size > limits.append_bytes:
        raise TooLargeError("events", _over(f"has {size} bytes", "appendBytes", limits.append_bytes))
    return Append(
        subject=subject,
        subject_element=arrays.text(subject_bytes),
        partition=_partition_of(subject, partitions),
        expected=expected,
        ids=ids,
        types=types,
        data=data,
        metadata=metadata,
        size=size + len(events) * len(subject_bytes),
    )


def check_all(appends: Sequence[SubjectAppend], *, partitions: int, limits: Limits) -> list[Append]:
    """Return the parts of an atomic append, checked and encoded; `limits` are of all of them together.

    Raises:
        InvalidAppendError: a field isn't what it must be, or a subject stands in it twice.
        TooLargeError: a limit is exceeded.
    """
    if not appends:
        raise InvalidAppendError("appends", "has no appends")
    events = sum(len(append.events) for append in appends)
    if events > limits.append_events:
        raise TooLargeError("appends", _over(f"has {events} events", "appendEvents", limits.append_events))
    checked: list[Append] = []
    first: dict[str, int] = {}
    size = 0
    for index, append in enumerate(appends):
        before = first.setdefault(append.subject, index)
        if before != index:
            # Each has its own expected revision, and of two there is no telling which one is meant.
            raise InvalidAppendError(
                f"appends[{index}].subject",
                f"{append.subject!r} stands in appends[{before}] already; give all events of a subject to one append",
            )
        try:
            part = check(
                append.subject,
                append.events,
                expected_revision=append.expected_revision,
                partitions=partitions,
                limits=limits,
            )
        except InvalidAppendError as error:
            raise type(error)(f"appends[{index}].{error.field}", error.reason) from error
        size += part.size - len(part.ids) * len(append.subject.encode())
        checked.append(msgspec.structs.replace(part, path=f"appends[{index}]."))
    if size > limits.append_bytes:
        raise TooLargeError("appends", _over(f"has {size} bytes", "appendBytes", limits.append_bytes))
    return checked


def check_text(field: str, value: str, most: int, index: int | None = None) -> bytes:
    """Return `value` as UTF-8.

    Raises:
        InvalidAppendError: it is empty, holds a NUL or isn't Unicode.
        TooLargeError: it is over `most` bytes.
    """
    try:
        encoded = value.encode()
    except UnicodeEncodeError as error:
        raise InvalidAppendError(_path(field, index), f"isn't Unicode text: {error}") from error
    if not encoded:
        raise InvalidAppendError(_path(field, index), "is empty")
    if len(encoded) > most:
        # Not "too large": there is nothing to split or to shrink for a caller, the name is wrong.
        raise InvalidAppendError(_path(field, index), f"has {len(encoded)} bytes, at most {most} are kept")
    if b"\0" in encoded:
        raise InvalidAppendError(_path(field, index), "holds a NUL, which PostgreSQL can't store")
    return encoded


@functools.lru_cache(maxsize=4096)
def _type_element(name: str) -> bytes:
    """Return the array's element of an event type; remembers the latest answers, since there are few types."""
    return arrays.text(check_text("type", name, MAX_TYPE_BYTES))


def _check_json(field: str, text: bytes, index: int) -> int:
    """Refuse JSON that jsonb refuses; return its size in bytes with exponents written out. Its syntax is checked."""
    size = len(text)
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise InvalidAppendError(_path(field, index), f"isn't UTF-8: {error}") from error
    if b"\\u" in text:
        _check_escapes(field, text, index)
    # Without escapes, what stands outside of strings is every second part between quotes.
    bare = _STRING.sub(b"", text) if b"\\" in text else b"".join(text.split(b'"')[::2])
    if _may_hold_big_number(bare):
        for match in _NUMBER.finditer(bare):
            whole, fraction, exponent = match.groups()
            if len(whole) > MAX_NUMBER or len(fraction or b"") > MAX_NUMBER or abs(_small(exponent)) > MAX_NUMBER:
                raise InvalidAppendError(
                    _path(field, index),
                    f"has a number with over {MAX_NUMBER} digits before or after the point, or an exponent beyond "
                    f"±{MAX_NUMBER}; send it as a string",
                )
            size += abs(_small(exponent))
    if len(bare) > MAX_DEPTH and bare.count(b"[") + bare.count(b"{") > MAX_DEPTH:
        depth = 0
        for bracket in _BRACKET.findall(bare):
            depth += 1 if bracket in b"[{" else -1
            if depth > MAX_DEPTH:
                raise InvalidAppendError(_path(field, index), f"is nested over {MAX_DEPTH} deep")
    return size


def _may_hold_big_number(bare: bytes) -> bool:
    """Tell whether JSON without its strings may hold a number with an exponent or too many digits; cheaply for most."""
    if len(bare) > MAX_NUMBER:
        return _MAYBE_BIG_NUMBER.search(bare) is not None
    if b"E" in bare:
        return True
    return b"e" in bare and b"e" in bare.replace(b"true", b"").replace(b"false", b"")


def _small(exponent: bytes | None) -> int:
    """Return the exponent; one of many digits as one that is over every limit."""
    if exponent is None:
        return 0
    return int(exponent) if len(exponent) < 10 else MAX_NUMBER + 1


def _check_escapes(field: str, text: bytes, index: int) -> None:
    r"""Refuse \u0000 and halves of surrogate pairs."""
    high_end = -1  # where the first half of a pair ended that waits for its second
    for match in _ESCAPE.finditer(text):
        code = int(match[1], 16) if match[1] else None
        if code == 0:
            raise InvalidAppendError(_path(field, index), r"holds \u0000, which PostgreSQL can't store")
        second = code is not None and 0xDC00 <= code <= 0xDFFF
        if second != (high_end == match.start()) or (high_end >= 0 and high_end != match.start()):
            break
        high_end = match.end() if code is not None and 0xD800 <= code <= 0xDBFF else -1
    else:
        if high_end < 0:
            return
    raise InvalidAppendError(_path(field, index), r"holds half of a surrogate pair (\ud800 to \udfff)")


def _over(what: str, setting: str, limit: int) -> str:
    return f"{what}; eventstore.limits.{setting} is {limit}"


def _path(field: str, index: int | None) -> str:
    return field if index is None else f"events[{index}].{field}"


def partition(subject: str, partitions: int) -> int:
    """Return the 0-based partition of `subject` in a stream of `partitions`; remembers the latest answers."""
    return _partition_of(subject, partitions)
