"""The event store over HTTP: its operations, on the pieces that all services share (`refold.web`)."""

import datetime as dt
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from refold.events import Event
from refold.eventstore.appends import ExpectedRevision, Limits, NewEvent, SubjectAppend
from refold.eventstore.bulk import Bulk, BulkAnswer
from refold.eventstore.errors import EventStoreError
from refold.eventstore.problems import from_error, json_problem
from refold.eventstore.store import EventStore
from refold.web import bodies, paths
from refold.web.openapi import NDJSON, Operation, Parameter
from refold.web.problems import Problem

JSON = "application/json"
_LABEL = re.compile(r"[a-z0-9-]{1,63}")
_NAMESPACE = Parameter(name="namespace", where="path", description="The EventStream's namespace")
_NAME = Parameter(name="name", where="path", description="The EventStream's name")
_SUBJECT = Parameter(
    name="subject", where="path", description="What the events are about: 1 to 512 bytes of UTF-8, percent-encoded"
)
_FORMAT = Parameter(name="accept", where="header", description="application/x-ndjson: one event a line; else JSON")
_NUMBER: Mapping[str, Any] = {"type": "integer", "minimum": 0}
_POSITIVE: Mapping[str, Any] = {"type": "integer", "minimum": 1}


class AppendBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of an append.

    `expectedRevision` is the subject's revision before it, `any`, `none` (0) or `exists` (over 0).
    """

    events: list[NewEvent]
    expectedRevision: ExpectedRevision = "any"  # noqa: N815 (the API's name)


class Appended(msgspec.Struct, frozen=True):
    """The revision and the position of an append's last event, and the token that lets a query wait for it."""

    revision: int
    partition: int
    position: int
    token: str


class AppendAllBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of an atomic append: its appends, each to another subject."""

    appends: list[SubjectAppend]


class Place(msgspec.Struct, frozen=True):
    """The revision and the position of an append's last event."""

    revision: int
    partition: int
    position: int


class AllAppendedBody(msgspec.Struct, frozen=True):
    """The places of an atomic append's appends, in their order, and the token that lets a query wait for all."""

    appends: list[Place]
    token: str


class Events(msgspec.Struct, frozen=True):
    """Events in their order."""

    events: list[Event]


class Api:
    """The operations on one store, which is set when the application starts."""

    store: EventStore

    def __init__(self, limits: Limits) -> None:
        # JSON may escape and space what counts half as much.
        self._body_bytes = 2 * limits.append_bytes
        self._append_body = msgspec.json.Decoder(AppendBody)
        self._append_all_body = msgspec.json.Decoder(AppendAllBody)

    def operations(self) -> list[Operation]:
        """Return what is served."""
        stream = "/v1/streams/{namespace}/{name}"
        return [
            Operation(
                "POST",
                stream + "/subjects/{subject}/events",
                self.append,
                verb="create",
                summary="Append events to a subject, all or none; a retry with the same ids changes nothing",
                parameters=[_NAMESPACE, _NAME, _SUBJECT],
                body={JSON: AppendBody},
                status=201,
                answer={JSON: Appended},
                problems=[404, 409, 413, 422],
            ),
            Operation(
                "POST",
                stream + "/transactions",
                self.append_all,
                verb="create",
                summary="Append to many subjects, all or none; a retry with the same ids changes nothing",
                parameters=[_NAMESPACE, _NAME],
                body={JSON: AppendAllBody},
                status=201,
                answer={JSON: AllAppendedBody},
                problems=[404, 409, 413, 422],
            ),
            Operation(
                "POST",
                stream + "/events",
                self.bulk,
                verb="create",
                summary="Append to many subjects, an append a line; answers a line each, in order",
                parameters=[_NAMESPACE, _NAME],
                body={NDJSON: SubjectAppend},
                answer={NDJSON: BulkAnswer},
                problems=[404],
            ),
            Operation(
                "GET",
                stream + "/subjects/{subject}/events",
                self.read_subject,
                verb="get",
                summary="The events of a subject, in order of their revisions or backwards",
                parameters=[
                    _NAMESPACE,
                    _NAME,
                    _SUBJECT,
                    Parameter(name="from", where="query", description="The lowest revision", schema=_POSITIVE),
                    Parameter(name="to", where="query", description="The highest revision", schema=_NUMBER),
                    Parameter(
                        name="until",
                        where="query",
                        description="Only events recorded at or before this time (RFC 3339)",
                        schema={"type": "string", "format": "date-time"},
                    ),
                    Parameter(
                        name="limit", where="query", description="How many at most (default: all)", schema=_POSITIVE
                    ),
                    Parameter(
                        name="direction",
                        where="query",
                        description="backward: the highest revision first (default: forward)",
                        schema={"enum": ["forward", "backward"]},
                    ),
                    _FORMAT,
                ],
                answer={JSON: Events, NDJSON: Event},
                problems=[404, 422],
            ),
            Operation(
                "GET",
                stream + "/partitions/{partition}/events",
                self.read_partition,
                verb="get",
                summary="The events of a partition, in order of their positions",
                parameters=[
                    _NAMESPACE,
                    _NAME,
                    Parameter(name="partition", where="path", description="From 0", schema=_NUMBER),
                    Parameter(name="after", where="query", description="The position before the first", schema=_NUMBER),
                    Parameter(
                        name="limit", where="query", description="How many at most (default 1000)", schema=_POSITIVE
                    ),
                    _FORMAT,
                ],
                answer={JSON: Events, NDJSON: Event},
                problems=[404],
            ),
        ]

    async def append(self, request: Request) -> Response:
        """Append to one subject."""
        namespace, name = _stream(request)
        subject = paths.parameter(request, "subject")
        raw = await bodies.read(request, self._body_bytes)
        with json_problem():
            body = self._append_body.decode(raw)
        try:
            result = await self.store.append(
                namespace, name, subject, body.events, expected_revision=body.expectedRevision
            )
        except EventStoreError as error:
            raise from_error(error) from error
        return _created(
            Appended(result.revision, result.partition, result.position, result.token), replayed=result.replayed
        )

    async def append_all(self, request: Request) -> Response:
        """Append to many subjects, all or none."""
        namespace, name = _stream(request)
        raw = await bodies.read(request, self._body_bytes)
        with json_problem():
            body = self._append_all_body.decode(raw)
        try:
            result = await self.store.append_all(namespace, name, body.appends)
        except EventStoreError as error:
            raise from_error(error) from error
        places = [Place(part.revision, part.partition, part.position) for part in result.appends]
        return _created(AllAppendedBody(places, result.token), replayed=result.replayed)

    async def bulk(self, request: Request) -> Response:
        """Append a line at a time."""
        try:
            stream = await self.store.stream(*_stream(request))
        except EventStoreError as error:
            raise from_error(error) from error
        return Bulk(self.store, stream, bodies.lines(request, self._body_bytes))

    async def read_subject(self, request: Request) -> Response:
        """Read one subject."""
        namespace, name = _stream(request)
        query = _query(request, "from", "to", "until", "limit", "direction")
        direction = query.get("direction", "forward")
        if direction not in ("forward", "backward"):
            raise _bad_query("direction", f"is forward or backward, not {direction!r}")
        pages = self.store.subject_pages(
            namespace,
            name,
            paths.parameter(request, "subject"),
            from_revision=_number(query, "from", 1) or 1,
            to_revision=_number(query, "to", None),
            until=_time(query, "until"),
            limit=_limit(query, None),
            backward=direction == "backward",
        )
        return await _answer(request, pages)

    async def read_partition(self, request: Request) -> Response:
        """Read one partition, and tell which history it is of: positions of another mean nothing in it."""
        namespace, name = _stream(request)
        partition = paths.parameter(request, "partition")
        if not (partition.isascii() and partition.isdigit() and len(partition) < 10):
            raise Problem(
                404, "stream-not-found", "No such stream", f"{partition!r} is no partition; they are numbered from 0"
            )
        query = _query(request, "after", "limit")
        limit = _limit(query, 1000)
        after = _number(query, "after", 0) or 0
        while True:
            before = await self._incarnation(namespace, name)
            pages = self.store.partition_pages(namespace, name, int(partition), after=after, limit=limit)
            response = await _answer(request, pages)
            if await self._incarnation(namespace, name) == before:
                response.headers["refold-incarnation"] = before
                return response
            # The stream was made again meanwhile, and the first page may be of either history.

    async def _incarnation(self, namespace: str, name: str) -> str:
        try:
            return (await self.store.stream(namespace, name)).incarnation
        except EventStoreError as error:
            raise from_error(error) from error


def asked_stream(request: Request) -> tuple[str, str]:
    """Return namespace and name of the stream that a request is about.

    Raises:
        Problem: 400 where they can't be decoded, 404 where no EventStream can be called so.
    """
    namespace, name = _stream(request)
    if _LABEL.fullmatch(namespace) is None or _LABEL.fullmatch(name) is None:
        raise Problem(
            404, "stream-not-found", "No such stream", "namespaces and EventStreams are named by a-z, 0-9 and '-' only"
        )
    return namespace, name


def _stream(request: Request) -> tuple[str, str]:
    return paths.parameter(request, "namespace"), paths.parameter(request, "name")


def _created(body: Appended | AllAppendedBody, *, replayed: bool) -> Response:
    response = Response(msgspec.json.encode(body), 201, media_type=JSON)
    if replayed:
        response.headers["refold-replayed"] = "true"
    return response


async def _answer(request: Request, pages: AsyncIterator[list[Event]]) -> Response:
    """Stream `pages`; the first is read before the answer begins, so that what is refused is answered as a problem."""
    try:
        first: list[Event] = await anext(pages, [])
    except EventStoreError as error:
        raise from_error(error) from error
    if NDJSON in request.headers.get("accept", ""):
        return StreamingResponse(_as_lines(first, pages), media_type=NDJSON)
    return StreamingResponse(_as_json(first, pages), media_type=JSON)


async def _as_lines(first: list[Event], pages: AsyncIterator[list[Event]]) -> AsyncIterator[bytes]:
    encoder = msgspec.json.Encoder()
    if first:
        yield encoder.encode_lines(first)
    async for page in pages:
        yield encoder.encode_lines(page)


async def _as_json(first: list[Event], pages: AsyncIterator[list[Event]]) -> AsyncIterator[bytes]:
    encoder = msgspec.json.Encoder()
    yield b'{"events":' + encoder.encode(first)[:-1]
    async for page in pages:
        yield b"," + encoder.encode(page)[1:-1]
    yield b"]}"


def _query(request: Request, *known: str) -> dict[str, str]:
    query = dict(paths.query(request))
    for parameter in query:
        if parameter not in known:
            raise _bad_query(parameter, f"isn't known here; known are {', '.join(known)}")
    return query


def _number(query: Mapping[str, str], name: str, default: int | None) -> int | None:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise _bad_query(name, f"is a number from 0 to 999999999999999999, not {text!r}")
    return int(text)


def _limit(query: Mapping[str, str], default: int | None) -> int | None:
    limit = _number(query, "limit", default)
    if limit == 0:
        raise _bad_query("limit", "is at least 1")
    return limit


def _time(query: Mapping[str, str], name: str) -> dt.datetime | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        return msgspec.convert(text, dt.datetime)
    except msgspec.ValidationError as error:
        raise _bad_query(name, f"is a time such as 2026-01-31T23:59:59Z, not {text!r}") from error


def _bad_query(name: str, message: str) -> Problem:
    return Problem(400, "invalid-query", "Invalid query string", f"{name} {message}", field=name)
