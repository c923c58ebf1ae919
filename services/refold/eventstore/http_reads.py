"""Reading events over HTTP: as JSON or NDJSON, streamed page by page."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from refold.events import Event
from refold.eventstore import http_asked
from refold.eventstore.errors import EventStoreError
from refold.eventstore.http_asked import NAME, NAMESPACE, NUMBER, PARTITION, POSITIVE, STREAM, SUBJECT
from refold.eventstore.problems import from_error
from refold.eventstore.store import EventStore
from refold.web import paths
from refold.web.openapi import NDJSON, Operation, Parameter

JSON = "application/json"
#: Bytes that are written at once: a client must take each piece in a while, see `refold.web.protocol`.
_PIECE = 64 * 1024
_FORMAT = Parameter(name="accept", where="header", description="application/x-ndjson: one event a line; else JSON")


class Events(msgspec.Struct, frozen=True):
    """Events in their order."""

    events: list[Event]


class ReadApi:
    """The operations that read a store."""

    def __init__(self, store: Callable[[], EventStore]) -> None:
        self._store = store

    def operations(self) -> list[Operation]:
        """Return what is served."""
        return [
            Operation(
                "GET",
                STREAM + "/subjects/{subject}/events",
                self.read_subject,
                verb="get",
                summary="The events of a subject, in order of their revisions or backwards",
                parameters=[
                    NAMESPACE,
                    NAME,
                    SUBJECT,
                    Parameter(name="from", where="query", description="The lowest revision", schema=POSITIVE),
                    Parameter(name="to", where="query", description="The highest revision", schema=NUMBER),
                    Parameter(
                        name="until",
                        where="query",
                        description="Only events recorded at or before this time (RFC 3339)",
                        schema={"type": "string", "format": "date-time"},
                    ),
                    Parameter(
                        name="limit", where="query", description="How many at most (default: all)", schema=POSITIVE
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
                STREAM + "/partitions/{partition}/events",
                self.read_partition,
                verb="get",
                summary="The events of a partition, in order of their positions",
                parameters=[
                    NAMESPACE,
                    NAME,
                    PARTITION,
                    Parameter(name="after", where="query", description="The position before the first", schema=NUMBER),
                    Parameter(
                        name="limit", where="query", description="How many at most (default 1000)", schema=POSITIVE
                    ),
                    _FORMAT,
                ],
                answer={JSON: Events, NDJSON: Event},
                problems=[404],
            ),
        ]

    async def read_subject(self, request: Request) -> Response:
        """Read one subject."""
        namespace, name = http_asked.stream(request)
        query = http_asked.query(request, "from", "to", "until", "limit", "direction")
        direction = query.get("direction", "forward")
        if direction not in ("forward", "backward"):
            raise http_asked.bad_query("direction", f"is forward or backward, not {direction!r}")
        pages = self._store().subject_pages(
            namespace,
            name,
            paths.parameter(request, "subject"),
            from_revision=http_asked.number(query, "from", 1) or 1,
            to_revision=http_asked.number(query, "to", None),
            until=http_asked.time(query, "until"),
            limit=http_asked.limit(query, None),
            backward=direction == "backward",
        )
        return await _answer(request, pages)

    async def read_partition(self, request: Request) -> Response:
        """Read one partition, and tell which history it is of: positions of another mean nothing in it."""
        namespace, name = http_asked.stream(request)
        partition = http_asked.partition(request)
        query = http_asked.query(request, "after", "limit")
        limit = http_asked.limit(query, 1000)
        after = http_asked.number(query, "after", 0) or 0
        while True:
            before = await self._incarnation(namespace, name)
            pages = self._store().partition_pages(namespace, name, partition, after=after, limit=limit)
            response = await _answer(request, pages)
            if await self._incarnation(namespace, name) == before:
                response.headers["refold-incarnation"] = before
                return response
            # The stream was made again meanwhile, and the first page may be of either history.

    async def _incarnation(self, namespace: str, name: str) -> str:
        try:
            return (await self._store().stream(namespace, name)).incarnation
        except EventStoreError as error:
            raise from_error(error) from error


async def _answer(request: Request, pages: AsyncIterator[list[Event]]) -> Response:
    """Stream `pages`; the first is read before the answer begins, so that what is refused is answered as a problem."""
    try:
        first: list[Event] = await anext(pages, [])
    except EventStoreError as error:
        raise from_error(error) from error
    if NDJSON in request.headers.get("accept", ""):
        return _Pages(_as_lines(first, pages), media_type=NDJSON)
    return _Pages(_as_json(first, pages), media_type=JSON)


class _Pages(StreamingResponse):
    """An answer that lets go of its page at once when the client leaves."""

    body_iterator: AsyncGenerator[bytes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


async def _as_lines(first: list[Event], pages: AsyncIterator[list[Event]]) -> AsyncGenerator[bytes]:
    encoder = msgspec.json.Encoder()
    if first:
        for piece in _pieces(encoder.encode_lines(first)):
            yield piece
    async for page in pages:
        for piece in _pieces(encoder.encode_lines(page)):
            yield piece


async def _as_json(first: list[Event], pages: AsyncIterator[list[Event]]) -> AsyncGenerator[bytes]:
    encoder = msgspec.json.Encoder()
    for piece in _pieces(b'{"events":' + encoder.encode(first)[:-1]):
        yield piece
    async for page in pages:
        for piece in _pieces(b"," + encoder.encode(page)[1:-1]):
            yield piece
    yield b"]}"


def _pieces(whole: bytes) -> Iterator[bytes]:
    return (whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE))
