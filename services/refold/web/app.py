"""The ASGI application of a service: Starlette's router, and around it what holds for every request.

- Routes match on the raw path (see `paths`).
- `/healthz` and `/readyz` are open; for everything else the caller has to be known first, so that one without
  credentials learns nothing, not even which paths exist. An operation then asks for its verb on the resource that the
  path names, before its handler begins; `/metrics` for the right to get that path; `/openapi.json` is any known
  caller's.
- Every error is a problem (see `problems`); an unexpected one is logged with its traceback and answered with 500 and
  nothing about it.
- Requests are counted and timed by route.

It is one class and not a stack of middlewares, since each of these costs a call and a closure for every request.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from http import HTTPStatus
from typing import Any

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

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


class App:
    """A service as an ASGI application.

    Args:
        title: of the OpenAPI description.
        operations: what is served besides the probes, `/metrics` and `/openapi.json`.
        authority: decides on every request but the probes; entered before and left after `lifespan`.
        resource: tells which resource (namespace and name) a request for one of `operations` is about. What it raises
            is the answer: 400 or 404 for what no resource can be called.
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
        self.stop = stop
        self._ready = ready
        self._timers: dict[tuple[str, str, int], Histogram] = {}  # finding a labelled child costs more than observing
        description = openapi.document(title, operations, kind)

        async def describe(_: Request) -> Response:
            return Response(description, media_type="application/json")

        # One route a path, so that 405 names all its methods.
        served: dict[str, dict[str, ASGIApp]] = {}
        for one in operations:
            handlers = served.setdefault(one.path, {})
            handlers[one.method] = _Guarded(one.handler, one.verb, kind, resource)

        routes = [
            *(Route(path, _Methods(handlers), methods=list(handlers)) for path, handlers in served.items()),
            Route("/openapi.json", _Endpoint(describe), methods=["GET"]),
            Route(METRICS, _Endpoint(_metrics), methods=["GET"]),
            Route("/healthz", _Endpoint(_healthy), methods=["GET"]),
            Route("/readyz", _Endpoint(self._answer_ready), methods=["GET"]),
        ]

        @asynccontextmanager
        async def entered(app: App) -> AsyncIterator[None]:
            async with authority, nullcontext() if lifespan is None else lifespan(app):
                yield

        self._router = Router(routes, redirect_slashes=False, lifespan=entered)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection scope."""
        scope["app"] = self
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        scope["path"] = scope["raw_path"].decode("ascii")
        begin = time.perf_counter()
        status = 0

        async def sender(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"] not in _OPEN:
                scope["caller"] = await self._authority.caller(scope)
            await self._router(scope, receive, sender)
        except ClientDisconnect:
            status = status or 499  # nobody is left to be answered; the number is what proxies log for it
        except Exception as error:
            if status:
                log.exception("An answer broke off", method=scope["method"], path=scope["path"])
                raise  # uvicorn closes the connection, so that the caller sees it
            await _as_problem(error, scope).response()(scope, receive, sender)
        finally:
            route = scope.get("route")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            labels = (method, route.path if isinstance(route, Route) else "none", status)
            timer = self._timers.get(labels)
            if timer is None:
                timer = self._timers[labels] = _REQUESTS.labels(*map(str, labels))
            timer.observe(time.perf_counter() - begin)

    async def _answer_ready(self, _: Request) -> Response:
        lacking = await self._ready()
        if lacking is not None:
            raise Problem(503, "not-ready", "Not ready", lacking, retry_after=1)
        return Response(b"ok\n", media_type="text/plain")


class _Endpoint:
    """A handler as the ASGI application of a route, without Starlette's own handling of errors, which `App` does."""

    def __init__(self, handler: Callable[[Request], Awaitable[Response]]) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(Request(scope, receive, send))
        await response(scope, receive, send)


class _Methods:
    """What is served at one path, by method; HEAD as GET."""

    def __init__(self, handlers: Mapping[str, ASGIApp]) -> None:
        self._handlers = dict(handlers)
        if "GET" in handlers:
            self._handlers["HEAD"] = handlers["GET"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._handlers[scope["method"]](scope, receive, send)


class _Guarded:
    """A handler of an operation: called where the caller has the operation's right on the request's resource."""

    def __init__(
        self,
        handler: Callable[[Request], Awaitable[Response]],
        verb: Verb,
        kind: str,
        resource: Callable[[Request], tuple[str, str]],
    ) -> None:
        self._handler = handler
        self._verb = verb
        self._kind = kind
        self._resource = resource

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        await scope["caller"].require(ResourceAccess(self._verb, self._kind, *self._resource(request)))
        response = await self._handler(request)
        await response(scope, receive, send)


async def _healthy(_: Request) -> Response:
    return Response(b"ok\n", media_type="text/plain")


async def _metrics(request: Request) -> Response:
    await request.scope["caller"].require(PathAccess(METRICS))
    return Response(generate_latest(), headers={"content-type": CONTENT_TYPE_LATEST})


def _as_problem(error: Exception, scope: Scope) -> Problem:
    if isinstance(error, Problem):
        return error
    asked: dict[str, Any] = {"method": scope["method"], "path": scope["path"]}
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        details = {404: "nothing is served at {path}", 405: "{method} isn't served at {path}"}
        return Problem(
            error.status_code,
            phrase.lower().replace(" ", "-"),
            phrase,
            details.get(error.status_code, error.detail).format(**asked),
            headers=error.headers,
        )
    log.error("A request failed unexpectedly", **asked, exc_info=error)
    return Problem(
        500,
        "internal-error",
        "Internal error",
        "the service failed in a way that it doesn't know, and its log has the details; "
        "whether the request took effect is unknown",
    )
