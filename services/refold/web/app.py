"""The ASGI application of a service: which handler answers, and what holds for every request.

- Routes match on the raw path (see `paths`).
- `/healthz` and `/readyz` are open; for everything else the caller has to be known first, so that one without
  credentials learns nothing, not even which paths exist. An operation then asks for its verb on the resource that the
  path names, before its handler begins; `/metrics` for the right to get that path; `/openapi.json` is any known
  caller's.
- Every error is a problem (see `problems`); an unexpected one is logged with its traceback and answered with 500 and
  nothing about it.
- Requests are counted and timed by route.

It is one class and not Starlette's router under a stack of middlewares: each layer costs calls and closures for every
request, which are a good part of what an append costs.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import NamedTuple

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, Histogram, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import Lifespan, Receive, Scope, Send

from refold.web import openapi
from refold.web.auth.access import METRICS, Authority, PathAccess, ResourceAccess, Verb
from refold.web.problems import Problem

log = structlog.get_logger(__name__)

_REQUESTS = Histogram(
    "refold_http_request_seconds",
    "Time from a request's head to the end of its answer",
    ["method", "route", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OPEN = frozenset({"/healthz", "/readyz"})
_STOPPED = Problem(
    503,
    "stopped",
    "Stopped",
    "the service was stopped before this was done; whether the request took effect is unknown",
    retry_after=1,
)
_PARAMETER = re.compile(r"\\{(\w+)\\}")  # as re.escape leaves it


class _Endpoint(NamedTuple):
    """What answers a method on a path, and the verb that the caller needs on the request's resource, if any."""

    handler: Callable[[Request], Awaitable[Response]]
    verb: Verb | None = None


class _Route(NamedTuple):
    """What is served at one path (a template), by method."""

    path: str
    pattern: re.Pattern[str]
    endpoints: Mapping[str, _Endpoint]

    @classmethod
    def of(cls, path: str, endpoints: Mapping[str, _Endpoint]) -> "_Route":
        """Return a route; HEAD is served as GET."""
        if "GET" in endpoints:
            endpoints = {**endpoints, "HEAD": endpoints["GET"]}
        return cls(path, re.compile(_PARAMETER.sub(r"(?P<\1>[^/]+)", re.escape(path))), endpoints)


class App:
    """A service as an ASGI application.

    Args:
        title: of the OpenAPI description.
        operations: what is served besides the probes, `/metrics` and `/openapi.json`; those asked for most come first.
        authority: decides on every request but the probes; entered before and left after `lifespan`.
        resource: tells which resource (namespace and name) a request for one of `operations` is about. What it raises
            is the answer: 400 or 404 for what no resource can be called. Handlers find it in `scope["resource"]`.
        kind: what rights are given on, `EVENTS` or `ROWS` of `auth.access`.
        ready: returns None where the service can do its work now, else what it lacks; asked by `/readyz`.
        lifespan: entered before the first request is accepted, left after the last was answered; given this App.
        stop: called when the service is to stop, before what is under way is waited for: ends answers without an end.
    """

    def __init__(
        self,
        title: str,
        operations: Sequence[openapi.Operation],
        *,
        authority: Authority,
        kind: str,
        resource: Callable[[Request], tuple[str, str]],
        ready: Callable[[], Awaitable[str | None]],
        lifespan: Lifespan["App"] | None = None,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._authority = authority
        self._kind = kind
        self._resource = resource
        self.stop = stop
        self._ready = ready
        self._timers: dict[tuple[str, str, int], Histogram] = {}  # finding a labelled child costs more than observing
        description = openapi.document(title, operations, kind)

        async def describe(_: Request) -> Response:
            return Response(description, media_type="application/json")

        # One route a path, so that 405 names all its methods.
        served: dict[str, dict[str, _Endpoint]] = {}
        for one in operations:
            served.setdefault(one.path, {})[one.method] = _Endpoint(one.handler, one.verb)
        for path, handler in {
            "/openapi.json": describe,
            METRICS: _metrics,
            "/healthz": _healthy,
            "/readyz": self._answer_ready,
        }.items():
            served[path] = {"GET": _Endpoint(handler)}
        self._routes = [_Route.of(path, endpoints) for path, endpoints in served.items()]

        @asynccontextmanager
        async def entered(app: App) -> AsyncIterator[None]:
            async with authority, nullcontext() if lifespan is None else lifespan(app):
                yield

        self._lifespan = Router(lifespan=entered)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection scope."""
        if scope["type"] != "http":
            scope["app"] = self
            await self._lifespan(scope, receive, send)
            return
        begin = time.perf_counter()
        route = None
        status = 499  # nobody is left to be answered; the number is what proxies log for it
        try:
            try:
                route = self._find(scope)
                response = await self._answer(route, scope, receive)
            except ClientDisconnect:
                return
            except asyncio.CancelledError:  # only the end of the process's patience does this
                response = _STOPPED.response()
            except Exception as error:  # noqa: BLE001 (logged, and answered without its details)
                response = _as_problem(error, scope).response()
            status = response.status_code
            try:
                await response(scope, receive, send)
            except ClientDisconnect:
                return
            except Exception:
                log.exception("An answer broke off", method=scope["method"], path=scope["path"])
                raise  # uvicorn closes the connection, so that the caller sees it
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            labels = (method, "none" if route is None else route.path, status)
            timer = self._timers.get(labels)
            if timer is None:
                timer = self._timers[labels] = _REQUESTS.labels(*map(str, labels))
            timer.observe(time.perf_counter() - begin)

    def _find(self, scope: Scope) -> _Route | None:
        """Return the route of a request's path, and note what its parameters are."""
        scope["path"] = path = scope["raw_path"].decode("ascii")
        for route in self._routes:
            match = route.pattern.fullmatch(path)
            if match is not None:
                scope["path_params"] = match.groupdict()
                return route
        return None

    async def _answer(self, route: _Route | None, scope: Scope, receive: Receive) -> Response:
        """Return the answer to a request, once it is known that the caller may have it."""
        path, method = scope["path"], scope["method"]
        if path not in _OPEN:
            scope["caller"] = await self._authority.caller(scope)
        if route is None:
            raise Problem(404, "not-found", "Not Found", f"nothing is served at {path}")
        endpoint = route.endpoints.get(method)
        if endpoint is None:
            raise Problem(
                405,
                "method-not-allowed",
                "Method Not Allowed",
                f"{method} isn't served at {path}",
                headers={"allow": ", ".join(route.endpoints)},
            )
        request = Request(scope, receive)
        if endpoint.verb is not None:
            scope["resource"] = resource = self._resource(request)
            await scope["caller"].require(ResourceAccess(endpoint.verb, self._kind, *resource))
        return await endpoint.handler(request)

    async def _answer_ready(self, _: Request) -> Response:
        lacking = await self._ready()
        if lacking is not None:
            raise Problem(503, "not-ready", "Not ready", lacking, retry_after=1)
        return Response(b"ok\n", media_type="text/plain")


async def _healthy(_: Request) -> Response:
    return Response(b"ok\n", media_type="text/plain")


async def _metrics(request: Request) -> Response:
    await request.scope["caller"].require(PathAccess(METRICS))
    return Response(generate_latest(), headers={"content-type": CONTENT_TYPE_LATEST})


def _as_problem(error: Exception, scope: Scope) -> Problem:
    if isinstance(error, Problem):
        return error
    log.error("A request failed unexpectedly", method=scope["method"], path=scope["path"], exc_info=error)
    return Problem(
        500,
        "internal-error",
        "Internal error",
        "the service failed in a way that it doesn't know, and its log has the details; "
        "whether the request took effect is unknown",
    )
