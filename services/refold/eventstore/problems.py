"""What the event store refuses, as problems (RFC 9457)."""

import re
from typing import Any

import msgspec

from refold.eventstore.errors import (
    EventStoreError,
    IdConflictError,
    InvalidAppendError,
    InvalidDataError,
    NotInstalledError,
    OtherHistoryError,
    OverloadedError,
    RevisionConflictError,
    TooLargeError,
    UnavailableError,
    UnknownStreamError,
    UnknownTypeError,
)
from refold.web.problems import Problem

_WHERE = re.compile(r" - at `\$\.?(.*)`$")


def from_error(error: EventStoreError) -> Problem:
    """Return the problem that a caller is told of."""
    detail = str(error)
    match error:
        case UnknownStreamError():
            return Problem(404, "stream-not-found", "No such stream", detail)
        case RevisionConflictError():
            return Problem(409, "revision-conflict", "Revision conflict", detail, **_where(error))
        case IdConflictError():
            return Problem(409, "id-conflict", "Id conflict", detail, **_where(error))
        case TooLargeError():
            return Problem(413, "append-too-large", "Append too large", detail, field=error.field)
        case UnknownTypeError():
            return Problem(
                422, "unknown-event-type", "Unknown event type", detail, field=error.field, types=error.types
            )
        case InvalidDataError():
            errors = [{"pointer": pointer, "message": message} for pointer, message in error.errors]
            return Problem(422, "invalid-data", "Invalid data", detail, field=error.field, errors=errors)
        case InvalidAppendError():
            return Problem(422, "invalid-append", "Invalid append", detail, field=error.field)
        case OtherHistoryError():
            return Problem(410, "other-history", "Another history", detail)
        case OverloadedError():
            return Problem(503, "overloaded", "Overloaded", detail, retry_after=1)
        case UnavailableError():
            return Problem(503, "store-unavailable", "Store unavailable", detail, retry_after=1)
        case NotInstalledError():
            return Problem(503, "store-not-installed", "Store not installed", detail, retry_after=5)
        case _:
            return Problem(500, "internal-error", "Internal error", detail)


def _where(error: RevisionConflictError | IdConflictError) -> dict[str, Any]:
    """Return the subject's revision, and of an atomic append which of its appends and which subject it was."""
    where: dict[str, Any] = {"currentRevision": error.current}
    if error.index is not None:
        where |= {"index": error.index, "subject": error.subject}
    return where


#: What decoding a body raises where it can't be read.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def from_unreadable(error: Exception) -> Problem:
    """Return the problem of one of `UNREADABLE`: 400 for what isn't JSON, 422 for what isn't what it must be."""
    match error:
        case msgspec.ValidationError():
            message = str(error)
            where = _WHERE.search(message)
            field = where[1] if where else ""
            return Problem(422, "invalid-append", "Invalid append", f"the body isn't an append: {message}", field=field)
        case RecursionError():
            return Problem(422, "invalid-append", "Invalid append", "the body is nested too deep", field="")
        case _:
            return Problem(400, "invalid-json", "Invalid JSON", f"the body isn't JSON in UTF-8: {error}")
