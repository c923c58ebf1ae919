"""The query service: one Projection's read model over HTTP.

Rows are read by key, by keys, or as pages by filters and an order (`asked`), and followed as they change (`changes`).
A row is also answered as it was at a moment, and what each event did to it (`past`).
Events that the projector has parked are listed, and it is asked to fold them again or to discard them (`parked`).

Each answer about rows tells how fresh it is: `Refold-Position` (a token of all that was applied), `Refold-Lag-Events`
and `Refold-Lag-Seconds` (absent until the projector has looked at every partition), from the same snapshot as the rows.
A request with `Refold-Token` is answered once the token's positions are applied, or with 504 after
`Prefer: wait=SECONDS`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response

from refold import logs
from refold.projection.past import MOST_STEPS, At, RowAt
from refold.projection.readstore import stores
from refold.projection.unparking import Verb
from refold.query import asked, problems
from refold.query.answers import AT, Rows, at_headers
from refold.query.asked import AskedMoment, AskedPage, AskedParked
from refold.query.changes import Changes, State
from refold.query.filters import OPERATORS
from refold.query.freshness import Freshness
from refold.query.ordering import Cursor
from refold.query.parked import Outcome, ParkedEvents, ParkedPage
from refold.query.past import Past
from refold.query.reader import CONNECTIONS, Reader
from refold.query.settings import Settings
from refold.query.waiting import DEFAULT_SECONDS, MOST_SECONDS, Waiting, wanted
from refold.web import paths, sent_events, server
from refold.web.app import App
from refold.web.auth.access import ROWS
from refold.web.auth.choice import authority
from refold.web.openapi import Operation, Parameter
from refold.web.problems import Problem
from refold.web.sent_events import SentEvents

log = structlog.get_logger(__name__)

_JSON = "application/json"
_T = TypeVar("_T")


class Row(msgspec.Struct):
    """A row of the read model; numbers are exact, times RFC 3339 in UTC, what was never set is null."""

    key: str
    data: dict[str, Any]


class Page(msgspec.Struct):
    """Rows in the order that was asked for, and the cursor of the next page where there are more."""

    rows: list[Row]
    next: str | None


class PartitionStatus(msgspec.Struct, rename="camel"):
    """How far the live version is in one partition; `head` is what the projector last saw in the event store."""

    stream: str
    partition: int
    position: int
    head: int
    stopped: str | None


class Lag(msgspec.Struct):
    """What isn't applied yet; null before the projector has looked at every partition."""

    events: int | None
    seconds: float | None


class Status(msgspec.Struct):
    """The live version, how far it is, and how many events it has parked."""

    version: str
    positions: list[PartitionStatus]
    lag: Lag
    parked: int


class Handlers:
    """What the service answers, from `reader`, of `parked` events and of the `past`."""

    def __init__(self, reader: Reader, parked: ParkedEvents, past: Past) -> None:
        self._reader = reader
        self._waiting = Waiting(reader)
        self._changes = Changes(reader)
        self._parked = parked
        self._past = past

    async def row(self, request: Request) -> Response:
        """Answer the row of a key."""
        key = paths.parameter(request, "key")
        if "\0" in key:
            raise problems.invalid_key()
        moment = AskedMoment.of(request)
        if moment.at is not None:
            return self._row_at(request, await self._past.row(key, moment.at))
        freshness, data = await self._fresh(request, lambda: self._reader.row(key))
        if data is None:
            problem = problems.row_not_found(key)
            problem.headers.update(freshness.headers)
            raise problem
        return Rows(request, freshness.raw_headers, _row(key, data))

    async def history(self, request: Request) -> Response:
        """Answer what the last events did to the row of a key."""
        key = paths.parameter(request, "key")
        if "\0" in key:
            raise problems.invalid_key()
        moment = AskedMoment.of(request, steps=True)
        found = await self._past.row(key, moment.at or At(), steps=moment.steps)
        return Response(msgspec.json.encode(found), headers=at_headers(found), media_type=_JSON)

    @staticmethod
    def _row_at(request: Request, found: RowAt) -> Response:
        if found.data is None:
            problem = problems.no_row_then(found.key, found.revision, found.parked)
            problem.headers.update(at_headers(found))
            raise problem
        headers = [(name.encode(), value.encode()) for name, value in at_headers(found).items()]
        return Rows(request, headers, _row(found.key, bytes(found.data).decode()))

    async def rows(self, request: Request) -> Response:
        """Answer a page of the rows that have one of the keys and meet all filters."""
        page = AskedPage.of(request)
        freshness, found = await self._fresh(request, lambda: self._reader.page(page.page))
        more = None
        if len(found) > page.limit:
            *_, (key, _, place) = found = found[: page.limit]
            more = Cursor(page.order, place, key).encode()
        rows = b",".join(_row(key, data) for key, data, _ in found)
        return Rows(request, freshness.raw_headers, b'{"rows":[%b],"next":%b}' % (rows, msgspec.json.encode(more)))

    async def status(self, _: Request) -> Response:
        """Answer which version is live and how far it is."""
        freshness, parked = await self._reader.status()
        streams = freshness.live.streams
        status = Status(
            version=freshness.live.version,
            positions=[
                PartitionStatus(
                    stream=f"{streams[p.incarnation].namespace}/{streams[p.incarnation].name}",
                    partition=p.partition,
                    position=p.position,
                    head=max(p.head, p.position),
                    stopped=p.stopped,
                )
                for p in freshness.partitions
            ],
            lag=Lag(freshness.lag_events, freshness.lag_seconds),
            parked=parked,
        )
        return Response(msgspec.json.encode(status), headers=freshness.headers, media_type=_JSON)

    async def changes(self, request: Request) -> Response:
        """Tell of changes as they come."""
        keys = asked.watched_keys(request)
        freshness, _ = await self._fresh(request, self._reader.status)
        state = State.of(freshness)
        if request.method == "HEAD":
            return Response(media_type=sent_events.MEDIA_TYPE)
        watcher = self._changes.watch(keys, request.headers.get("last-event-id") or None, state)
        return SentEvents(watcher, cut=lambda: log.info("A reader of changes took nothing for long and was cut off"))

    async def parked(self, request: Request) -> Response:
        """Answer which events are parked."""
        wanted = AskedParked.of(request)
        page = await self._parked.page(**wanted._asdict())
        return Response(msgspec.json.encode(page), media_type=_JSON)

    async def retry(self, request: Request) -> Response:
        """Have a parked event folded again."""
        return await self._settle(request, "retry")

    async def discard(self, request: Request) -> Response:
        """Have a parked event discarded."""
        return await self._settle(request, "discard")

    async def _settle(self, request: Request, verb: Verb) -> Response:
        id_, version = asked.parked_id(request), asked.version(request)
        outcome = await self._parked.settle(id_, verb, version=version, by=request.scope["caller"].name)
        return Response(msgspec.json.encode(outcome), media_type=_JSON)

    def stop(self) -> None:
        """End the answers without an end."""
        self._changes.stop()

    async def _fresh(
        self, request: Request, read: Callable[[], Awaitable[tuple[Freshness, _T]]]
    ) -> tuple[Freshness, _T]:
        """Return what `read` yields once it has seen all that the request's token names."""
        token = wanted(request)
        if token is not None and self._waiting.lacks(token):
            await self._waiting.until_applied(token, None)
        while True:
            freshness, found = await read()
            self._waiting.saw(freshness)
            if token is None or not token.missing(freshness):
                return freshness, found
            await self._waiting.until_applied(token, freshness)


def _row(key: str, data: str) -> bytes:
    return b'{"key":%b,"data":%b}' % (msgspec.json.encode(key), data.encode())


_IF_NONE_MATCH = Parameter(
    name="If-None-Match",
    where="header",
    description="The ETag of an answer before: 304, without a body and with the headers that tell how fresh the rows "
    "are, where the answer would be the same",
)
_WAITING = (
    Parameter(
        name="Refold-Token",
        where="header",
        description="A token of an append: the answer has seen these events. Or the Refold-Position of an answer "
        "before: the answer is never older",
    ),
    Parameter(
        name="Prefer",
        where="header",
        description=f"`wait=SECONDS` (at most {MOST_SECONDS:.0f}, else {DEFAULT_SECONDS:.0f}): how long to wait for "
        "the Refold-Token before 504",
    ),
)


_KEY = Parameter(name="key", where="path", description="The row's key", schema={"type": "string", "minLength": 1})
_VERSION = Parameter(
    name="version",
    where="query",
    description="The version that they are of; without, the live one",
)
_ID = Parameter(name="id", where="path", description="Of the parked event", schema={"type": "integer", "minimum": 1})


def operations(handlers: Handlers) -> list[Operation]:
    """Return what the service serves."""
    return [
        Operation(
            "GET",
            "/v1/rows/{key}",
            handlers.row,
            summary="The row of a key",
            verb="get",
            parameters=[
                _KEY,
                AT,
                _IF_NONE_MATCH,
                *_WAITING,
            ],
            answer={_JSON: Row},
            problems=[404, 410, 501, 504],
        ),
        Operation(
            "GET",
            "/v1/rows",
            handlers.rows,
            summary="The rows of these keys that meet all filters, a page of them",
            verb="get",
            parameters=[
                Parameter(
                    name="key",
                    where="query",
                    description="A key, repeatable: the rows of these keys alone. One without a row is left out",
                    schema={"type": "array", "items": {"type": "string"}, "maxItems": asked.MOST_KEYS},
                ),
                Parameter(
                    name="where",
                    where="query",
                    description="`column:operator:value`, repeatable, all must hold; on the key and on columns with "
                    f"an index. Operators: {', '.join(OPERATORS)} (`in:a,b`, with `\\,` for a comma in a value; "
                    "`prefix` of texts). No filter holds for a column that is null",
                    schema={"type": "array", "items": {"type": "string"}, "maxItems": asked.MOST_FILTERS},
                ),
                Parameter(
                    name="order",
                    where="query",
                    description="`column` or `column:desc`, the key or a column with an index, then by key; by key "
                    "without. null is greater than every value",
                ),
                Parameter(
                    name="limit",
                    where="query",
                    description="The most rows to answer",
                    schema={
                        "type": "integer",
                        "minimum": 1,
                        "maximum": asked.MOST_ROWS,
                        "default": asked.DEFAULT_LIMIT,
                    },
                ),
                Parameter(
                    name="cursor",
                    where="query",
                    description="`next` of the page before, sent with the same keys, filters and order",
                ),
                _IF_NONE_MATCH,
                *_WAITING,
            ],
            answer={_JSON: Page},
            problems=[422, 504],
        ),
        Operation(
            "GET",
            "/v1/rows/{key}/history",
            handlers.history,
            summary="What each event did to the row of a key",
            verb="get",
            parameters=[
                _KEY,
                AT,
                Parameter(
                    name="steps",
                    where="query",
                    description="Of how many of the last events until then",
                    schema={"type": "integer", "minimum": 1, "maximum": MOST_STEPS, "default": asked.DEFAULT_LIMIT},
                ),
            ],
            answer={_JSON: RowAt},
            problems=[404, 410, 501],
        ),
        Operation(
            "GET",
            "/v1/changes",
            handlers.changes,
            summary="When the read model changes, and rows of these keys as they are then, as server-sent events",
            verb="watch",
            parameters=[
                Parameter(
                    name="key",
                    where="query",
                    description="A key, repeatable: `row` events tell its row as it is, and after each change (`data` "
                    "is null where there is none). Each `position` event, also without keys, says that all up to its "
                    "token is told",
                    schema={"type": "array", "items": {"type": "string"}, "maxItems": asked.MOST_KEYS},
                ),
                Parameter(
                    name="last-event-id",
                    where="header",
                    description="The id of the last event that was read, to miss nothing since",
                ),
                *_WAITING,
            ],
            answer={sent_events.MEDIA_TYPE: str},
            problems=[504],
        ),
        Operation(
            "GET",
            "/v1/status",
            handlers.status,
            summary="The live version and its lag",
            verb="get",
            answer={_JSON: Status},
        ),
        Operation(
            "GET",
            "/v1/parked",
            handlers.parked,
            summary="The events that are parked, in the order in which they were",
            verb="get",
            parameters=[
                _VERSION,
                Parameter(name="key", where="query", description="Of the row with this key alone"),
                Parameter(
                    name="after",
                    where="query",
                    description="`next` of the page before",
                    schema={"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
                ),
                Parameter(
                    name="limit",
                    where="query",
                    description="The most parked events to answer",
                    schema={
                        "type": "integer",
                        "minimum": 1,
                        "maximum": asked.MOST_ROWS,
                        "default": asked.DEFAULT_LIMIT,
                    },
                ),
            ],
            answer={_JSON: ParkedPage},
            problems=[404],
        ),
        Operation(
            "POST",
            "/v1/parked/{id}:retry",
            handlers.retry,
            summary="Fold the parked events of a row again, up to this one and on to the first that still fails",
            verb="update",
            parameters=[_ID, _VERSION],
            answer={_JSON: Outcome},
            problems=[404, 409, 504],
        ),
        Operation(
            "POST",
            "/v1/parked/{id}:discard",
            handlers.discard,
            summary="Discard a parked event, and fold those behind it again",
            verb="update",
            parameters=[_ID, _VERSION],
            answer={_JSON: Outcome},
            problems=[404, 409, 504],
        ),
    ]


def app(settings: Settings) -> App:
    """Return the service as an application."""
    reads = stores.reads(
        settings.readstore_dsn.get_secret_value(),
        namespace=settings.namespace,
        name=settings.name,
        connections=CONNECTIONS,
    )
    reader = Reader(reads, settings.projection)
    parked = ParkedEvents(reads.parked(), settings.projection)
    history = None if settings.store_dsn is None else settings.store_dsn.get_secret_value()
    past = Past(reader, parked, history)
    handlers = Handlers(reader, parked, past)

    @asynccontextmanager
    async def lifespan(_: App) -> AsyncIterator[None]:
        await reads.open()
        try:
            yield
        finally:
            await past.close()
            await reads.close()

    async def ready() -> str | None:
        """Ready is who can answer: the read store answers and a version is live."""
        try:
            await reader.freshness()
        except Problem as problem:
            return problem.detail
        return None

    return App(
        f"Refold query: {settings.projection}",
        operations(handlers),
        authority=authority(settings.auth),
        kind=ROWS,
        resource=lambda _: (settings.namespace, settings.name),
        ready=ready,
        lifespan=lifespan,
        stop=handlers.stop,
    )


def main(auth: str) -> None:
    """Serve the read model of `REFOLD_PROJECTION` until SIGTERM. `auth` tells who may call."""
    logs.configure("query")
    settings = Settings(auth=auth)  # type: ignore[call-arg] # from the environment
    server.run(app(settings), settings.port)
