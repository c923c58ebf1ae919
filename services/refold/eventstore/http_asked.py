"""What requests to the event store ask for: the parameters of its paths and queries, as they are described and read."""

import datetime as dt
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request

from refold.web import paths
from refold.web.openapi import Parameter
from refold.web.problems import Problem

STREAM = "/v1/streams/{namespace}/{name}"
NUMBER: Mapping[str, Any] = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
POSITIVE: Mapping[str, Any] = {**NUMBER, "minimum": 1}
NAMESPACE = Parameter(name="namespace", where="path", description="The EventStream's namespace")
NAME = Parameter(name="name", where="path", description="The EventStream's name")
SUBJECT = Parameter(
    name="subject", where="path", description="What the events are about: 1 to 512 bytes of UTF-8, percent-encoded"
)
PARTITION = Parameter(name="partition", where="path", description="From 0", schema=NUMBER)
_LABEL = re.compile(r"[a-z0-9-]{1,63}")


def resource(request: Request) -> tuple[str, str]:
    """Return namespace and name of the stream that a request's path names; handlers ask `stream`.

    Raises:
        Problem: 400 where they can't be decoded, 404 where no EventStream can be called so.
    """
    namespace, name = paths.parameter(request, "namespace"), paths.parameter(request, "name")
    if _LABEL.fullmatch(namespace) is None or _LABEL.fullmatch(name) is None:
        raise Problem(
            404, "stream-not-found", "No such stream", "namespaces and EventStreams are named by a-z, 0-9 and '-' only"
        )
    return namespace, name


def stream(request: Request) -> tuple[str, str]:
    """Return namespace and name of the stream that a request is about."""
    namespace, name = request.scope["resource"]
    return namespace, name


def partition(request: Request) -> int:
    """Return the partition that a path names.

    Raises:
        Problem: 404 where none can be called so.
    """
    text = paths.parameter(request, "partition")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Problem(404, "stream-not-found", "No such stream", f"{text!r} is no partition; they are numbered from 0")
    return int(text)


def query(request: Request, *known: str) -> dict[str, str]:
    """Return the query string's parameters.

    Raises:
        Problem: 400 where there are others than `known`.
    """
    found = dict(paths.query(request))
    for parameter in found:
        if parameter not in known:
            raise bad_query(parameter, f"isn't known here; known are {', '.join(known)}")
    return found


def number(query: Mapping[str, str], name: str, default: int | None) -> int | None:
    """Return a number of 18 digits at most, or the default.

    Raises:
        Problem: 400 where it isn't one.
    """
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise bad_query(name, f"is a number from 0 to 999999999999999999, not {text!r}")
    return int(text)


def limit(query: Mapping[str, str], default: int | None) -> int | None:
    """Return how many are wanted at most.

    Raises:
        Problem: 400 where it isn't a number over 0.
    """
    found = number(query, "limit", default)
    if found == 0:
        raise bad_query("limit", "is at least 1")
    return found


def time(query: Mapping[str, str], name: str) -> dt.datetime | None:
    """Return a time, taken as UTC where it names no zone.

    Raises:
        Problem: 400 where it isn't one.
    """
    text = query.get(name)
    if text is None:
        return None
    try:
        return msgspec.convert(text, dt.datetime)
    except msgspec.ValidationError as error:
        raise bad_query(name, f"is a time such as 2026-01-31T23:59:59Z, not {text!r}") from error


def bad_query(name: str, message: str) -> Problem:
    """Return the problem of a parameter of the query string."""
    return Problem(400, "invalid-query", "Invalid query string", f"{name} {message}", field=name)
