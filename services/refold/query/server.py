"""The query service: one Projection's read model over HTTP.

Each answer about rows tells how fresh it is: `Refold-Position` (a token of all that was applied), `Refold-Lag-Events`
and `Refold-Lag-Seconds` (absent until the projector has looked at every partition), from the same snapshot as the rows.
A request with `Refold-Token` is answered once the token's positions are applied, or with 504 after
`Prefer: wait=SECONDS`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from refold import logs
from refold.query import cursors, filters, problems
from refold.query.freshness import Freshness
from refold.query.live import LiveVersion, Statement
from refold.query.reader import Reader, make_pool
from refold.query.settings import Settings
from refold.query.waiting import DEFAULT_SECONDS, MOST_SECONDS, Waiting, wanted
from refold.web import paths, server
from refold.web.app import App
from refold.web.auth.access import ROWS
from refold.web.auth.choice import authority
from refold.web.openapi import Operation, Parameter
from refold.web.problems import Problem

_JSON = "application/json"
_DEFAULT_LIMIT = 100
_MOST_ROWS = 1000
_MOST_FILTERS = 20
_T = TypeVar("_T")


class Row(msgspec.Struct):
    """A row of the read model; numbers are exact, times RFC 3339 in UTC, what was never set is null."""

    key: str
    data: dict[str, Any]


class Page(msgspec.Struct):
    """Rows by key, and the cursor of the next page where there are more."""

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
    """What the service answers, from `reader`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._waiting = Waiting(reader)

    async def row(self, request: Request) -> Response:
        """Answer the row of a key."""
        key = paths.parameter(request, "key")
        if "\0" in key:
            raise problems.invalid_key()
        freshness, data = await self._fresh(request, lambda: self._reader.row(key))
        if data is None:
            problem = problems.row_not_found(key)
            problem.headers.update(freshness.headers)
            raise problem
        body = b'{"key":%b,"data":%b}' % (msgspec.json.encode(key), data.encode())
        return Response(body, headers=freshness.headers, media_type=_JSON)

    async def rows(self, request: Request) -> Response:
        """Answer a page of the rows that meet all filters."""
        where, limit, after = _page_parameters(request)

        def build(live: LiveVersion) -> Statement:
            # one row more than asked for tells whether there is a next page
            return live.page([filters.condition(text, live.columns) for text in where], after, limit + 1)

        freshness, found = await self._fresh(request, lambda: self._reader.rows(build))
        found.sort()  # by code point, which is PostgreSQL's order of collation "C" in UTF-8
        rows = b",".join(b'{"key":%b,"data":%b}' % (msgspec.json.encode(k), d.encode()) for k, d in found[:limit])
        more = cursors.encode(found[limit - 1][0]) if len(found) > limit else None
        body = b'{"rows":[%b],"next":%b}' % (rows, msgspec.json.encode(more))
        return Response(body, headers=freshness.headers, media_type=_JSON)

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

    async def _fresh(
        self, request: Request, read: Callable[[], Awaitable[tuple[Freshness, _T]]]
    ) -> tuple[Freshness, _T]:
        """Return what `read` yields once it has seen all that the request's token names."""
        asked = wanted(request)
        while True:
            freshness, found = await read()
            if asked is None or not asked.missing(freshness):
                return freshness, found
            await self._waiting.until_applied(asked, freshness)


def _page_parameters(request: Request) -> tuple[list[str], int, str | None]:
    """Return filters, limit and the key to begin after.

    Raises:
        Problem: 400 where one of them is wrong, unknown or given twice.
    """
    where: list[str] = []
    once: dict[str, str] = {}
    for name, value in paths.query(request):
        if name == "where":
            where.append(value)
        elif name not in ("limit", "cursor"):
            raise problems.invalid_query(
                f"there is no parameter {name[:100]!r}; known: where, limit, cursor", name[:100]
            )
        elif name in once:
            raise problems.invalid_query(f"the parameter {name!r} is given twice", name)
        else:
            once[name] = value
    if len(where) > _MOST_FILTERS:
        raise problems.invalid_query(f"over {_MOST_FILTERS} filters", "where")
    limit = once.get("limit") or str(_DEFAULT_LIMIT)
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 9 and 1 <= int(limit) <= _MOST_ROWS):
        raise problems.invalid_query(f"the limit is a number of 1 to {_MOST_ROWS}, not {limit[:100]!r}", "limit")
    return where, int(limit), cursors.decode(once["cursor"]) if once.get("cursor") else None


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
                Parameter(
                    name="key", where="path", description="The row's key", schema={"type": "string", "minLength": 1}
                ),
                *_WAITING,
            ],
            answer={_JSON: Row},
            problems=[404, 504],
        ),
        Operation(
            "GET",
            "/v1/rows",
            handlers.rows,
            summary="The rows that meet all filters, by key",
            verb="get",
            parameters=[
                Parameter(
                    name="where",
                    where="query",
                    description="`column:operator:value` on an indexed column; operators: "
                    + ", ".join(filters.OPERATORS),
                    schema={"type": "array", "items": {"type": "string"}, "maxItems": _MOST_FILTERS},
                ),
                Parameter(
                    name="limit",
                    where="query",
                    description="The most rows to answer",
                    schema={"type": "integer", "minimum": 1, "maximum": _MOST_ROWS, "default": _DEFAULT_LIMIT},
                ),
                Parameter(name="cursor", where="query", description="`next` of the page before"),
                *_WAITING,
            ],
            answer={_JSON: Page},
            problems=[422, 504],
        ),
        Operation(
            "GET",
            "/v1/status",
            handlers.status,
            summary="The live version and its lag",
            verb="get",
            answer={_JSON: Status},
        ),
    ]


def app(settings: Settings) -> App:
    """Return the service as an application."""
    pool = make_pool(settings.readstore_dsn.get_secret_value())
    reader = Reader(pool, settings.namespace, settings.name)

    @asynccontextmanager
    async def lifespan(_: App) -> AsyncIterator[None]:
        await pool.open(wait=False)
        try:
            yield
        finally:
            await pool.close(timeout=5)

    async def ready() -> str | None:
        """Ready is who can answer: the read store answers and a version is live."""
        try:
            await reader.freshness()
        except Problem as problem:
            return problem.detail
        return None

    return App(
        f"Refold query: {settings.projection}",
        operations(Handlers(reader)),
        authority=authority(settings.auth),
        kind=ROWS,
        resource=lambda _: (settings.namespace, settings.name),
        ready=ready,
        lifespan=lifespan,
    )


def main(auth: str) -> None:
    """Serve the read model of `REFOLD_PROJECTION` until SIGTERM. `auth` tells who may call."""
    logs.configure("query")
    settings = Settings(auth=auth)  # type: ignore[call-arg] # from the environment
    server.run(app(settings), settings.port)
