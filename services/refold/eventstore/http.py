"""The event store over HTTP: its operations, on the pieces that all services share (`refold.web`)."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from refold.eventstore import http_asked
from refold.eventstore.appends import ExpectedRevision, Limits, NewEvent, SubjectAppend
from refold.eventstore.bulk import Bulk, BulkAnswer
from refold.eventstore.errors import EventStoreError
from refold.eventstore.http_asked import NAME, NAMESPACE, STREAM, SUBJECT
from refold.eventstore.http_live import LiveApi
from refold.eventstore.http_reads import JSON, ReadApi
from refold.eventstore.problems import UNREADABLE, from_error, from_unreadable
from refold.eventstore.store import EventStore
from refold.web import bodies, paths
from refold.web.answers import JsonAnswer
from refold.web.openapi import NDJSON, Operation

_encode = msgspec.json.Encoder().encode
_BODY = "eventstore.limits.bodyBytes"
_WAITING = "eventstore.limits.waitingBytes"


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


class Api:
    """The operations on one store, which is set when the application starts."""

    store: EventStore

    def __init__(self, limits: Limits) -> None:
        self._body_bytes = limits.body_bytes
        self._room = bodies.Room(limits.waiting_bytes, _WAITING)
        self._append_body = msgspec.json.Decoder(AppendBody)
        self._append_all_body = msgspec.json.Decoder(AppendAllBody)

    def operations(self) -> list[Operation]:
        """Return what is served."""
        return [
            Operation(
                "POST",
                STREAM + "/subjects/{subject}/events",
                self.append,
                verb="create",
                summary="Append events to a subject, all or none; a retry with the same ids changes nothing",
                parameters=[NAMESPACE, NAME, SUBJECT],
                body={JSON: AppendBody},
                status=201,
                answer={JSON: Appended},
                problems=[404, 409, 413, 422],
            ),
            Operation(
                "POST",
                STREAM + "/transactions",
                self.append_all,
                verb="create",
                summary="Append to many subjects, all or none; a retry with the same ids changes nothing",
                parameters=[NAMESPACE, NAME],
                body={JSON: AppendAllBody},
                status=201,
                answer={JSON: AllAppendedBody},
                problems=[404, 409, 413, 422],
            ),
            Operation(
                "POST",
                STREAM + "/events",
                self.bulk,
                verb="create",
                summary="Append to many subjects, an append a line; answers a line each, in order",
                parameters=[NAMESPACE, NAME],
                body={NDJSON: SubjectAppend},
                answer={NDJSON: BulkAnswer},
                problems=[404],
            ),
            *ReadApi(lambda: self.store).operations(),
            *LiveApi(lambda: self.store).operations(),
        ]

    async def append(self, request: Request) -> Response:
        """Append to one subject."""
        namespace, name = http_asked.stream(request)
        subject = paths.parameter(request, "subject")
        raw = await bodies.read(request, self._body_bytes, _BODY, self._room)
        try:
            body = self._append_body.decode(raw)
        except UNREADABLE as error:
            raise from_unreadable(error) from error
        try:
            stream = await self.store.stream(namespace, name)
            outcome = self.store.submit(stream, subject, body.events, expected_revision=body.expectedRevision)
            del raw, body  # the append that waits has what it needs of them
            result = await outcome
        except EventStoreError as error:
            raise from_error(error) from error
        return _created(
            Appended(result.revision, result.partition, result.position, result.token), replayed=result.replayed
        )

    async def append_all(self, request: Request) -> Response:
        """Append to many subjects, all or none."""
        namespace, name = http_asked.stream(request)
        raw = await bodies.read(request, self._body_bytes, _BODY, self._room)
        try:
            body = self._append_all_body.decode(raw)
        except UNREADABLE as error:
            raise from_unreadable(error) from error
        try:
            result = await self.store.append_all(namespace, name, body.appends)
        except EventStoreError as error:
            raise from_error(error) from error
        places = [Place(part.revision, part.partition, part.position) for part in result.appends]
        return _created(AllAppendedBody(places, result.token), replayed=result.replayed)

    async def bulk(self, request: Request) -> Response:
        """Append a line at a time."""
        try:
            stream = await self.store.stream(*http_asked.stream(request))
        except EventStoreError as error:
            raise from_error(error) from error
        return Bulk(self.store, stream, bodies.lines(request, self._body_bytes, _BODY))


def _created(body: Appended | AllAppendedBody, *, replayed: bool) -> Response:
    return JsonAnswer(_encode(body), 201, [(b"refold-replayed", b"true")] if replayed else ())
