"""uvicorn's HTTP/1.1 protocol (httptools) with our rules, and with less work for a request.

- A request's head is bounded, and what isn't HTTP is refused with a problem too.
- An answer of known length leaves in one write: a second one costs a system call here, and wakes the client for half an
  answer.
- A client that doesn't read is cut off after a while.
- Idle connections have no timer each: the server closes them by one look at all, now and then. They keep nothing of
  their last request.
"""

import asyncio
import collections
import time
from http import HTTPStatus
from typing import Any, cast

import httptools
import msgspec
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from refold.web.problems import MEDIA_TYPE, Problem

#: Bytes that a request's first line and headers may take together; a subject of 512 bytes takes at most 1,536 of them.
MAX_HEAD_BYTES = 65536
#: Seconds in which a client must take a piece of an answer; above those of watches, which tell of it in a metric.
PATIENCE = 90.0


class _Signal:
    """What asyncio.Event does, without a queue of 700 bytes in each: ten thousand connections have one or two each."""

    __slots__ = ("_on", "_waiting")

    def __init__(self) -> None:
        self._on = False
        self._waiting: list[asyncio.Future[None]] | None = None

    def set(self) -> None:
        self._on = True
        waiting, self._waiting = self._waiting, None
        for one in waiting or ():
            if not one.done():
                one.set_result(None)

    def clear(self) -> None:
        self._on = False

    async def wait(self) -> None:
        if self._on:
            return
        if self._waiting is None:
            self._waiting = []
        coming = asyncio.get_running_loop().create_future()
        self._waiting.append(coming)
        await coming


class Protocol(HttpToolsProtocol):
    """One connection."""

    #: When the connection became idle (time.monotonic); None while a request is under way.
    idle_since: float | None
    _in_head = True
    _head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        super().connection_made(cast("asyncio.Transport", transport))
        self.flow._is_writable_event = writable = cast("asyncio.Event", _Signal())
        writable.set()
        self.pipeline = _NOTHING_AHEAD
        self.idle_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(
                    431,
                    "head-too-large",
                    "Request head too large",
                    f"the request's first line and headers are over {MAX_HEAD_BYTES} bytes",
                )

    def on_message_begin(self) -> None:
        """Begin a request; httptools calls this."""
        self._in_head = True
        self._head_bytes = 0
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        """Hand a request to the application; httptools calls this. Its body may still be under way."""
        self._in_head = False
        self.idle_since = None
        http_version = self.parser.get_http_version()
        path, _, query = self.url.partition(b"?")
        if not path.startswith(b"/") or b"#" in self.url:  # a whole URL, as proxies send it, or a mistake
            url = httptools.parse_url(self.url)
            path, query = url.path, url.query or b""
        self.scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": http_version,
            "method": self.parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": path.decode("ascii"),  # as it was sent, see `paths`
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": self.headers,
            "server": self.server,
            "client": self.client,
            # for answers without an end, which may have to be cut
            "state": {"transport": self.transport},
        }
        former = self.cycle
        self.cycle = _Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=cast("asyncio.Event", _Signal()),
            expect_100_continue=self.expect_100_continue,
            keep_alive=http_version != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        if former is None or former.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:  # sent ahead
            self.flow.pause_reading()
            if self.pipeline is _NOTHING_AHEAD:
                self.pipeline = collections.deque()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_response_complete(self) -> None:
        """Go on with the next request, if it is there."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self.idle_since = time.monotonic()
            self.pipeline = _NOTHING_AHEAD
            self.cycle = _ANSWERED
            self.scope = self.headers = None  # type: ignore[assignment]
            self.url = b""

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's own words for it)
        """Refuse what isn't HTTP."""
        self._refuse(
            400, "invalid-http", "Invalid HTTP", "the request isn't valid HTTP/1.1; is its path percent-encoded?"
        )

    def _refuse(self, status: int, slug: str, title: str, detail: str) -> None:
        body = msgspec.json.encode(Problem(status, slug, title, detail).body())
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class _Cycle(RequestResponseCycle):
    """A request and its answer."""

    #: The head of an answer of known length, to be written with the first piece of its body, which comes at once.
    _head: bytes | None = None

    async def send(self, message: Any) -> None:
        """Write a part of the answer; see uvicorn's own."""
        head = self._head
        if head is not None and message["type"] == "http.response.body":
            self._head = None
            if not (self.flow.write_paused or self.disconnected or message.get("more_body", False)):
                body = message.get("body", b"")
                if self.scope["method"] != "HEAD":
                    if len(body) != self.expected_content_length:
                        raise RuntimeError("an answer's body isn't as long as its head says")
                    head += body
                self.response_complete = True
                self.message_event.set()
                self.transport.write(head)
                if not self.keep_alive:
                    self.transport.close()
                self.on_response()
                return
            if not self.disconnected:
                self.transport.write(head)
        elif message["type"] == "http.response.start" and not self.response_started and not self.disconnected:
            head = self._joined(message)
            if head is not None:
                self.response_started = True
                self.waiting_for_100_continue = False
                self._head = head
                return
        if self.flow.write_paused and not self.disconnected:
            try:
                async with asyncio.timeout(PATIENCE):
                    await self.flow.drain()
            except TimeoutError as error:
                self.transport.abort()
                raise ClientDisconnect from error
        await super().send(message)

    def _joined(self, message: Any) -> bytes | None:
        """Return the head of an answer of known length; None where it isn't known, or there is more to look after."""
        parts = [STATUS_LINE[message["status"]]]
        length = None
        for name, value in (*self.default_headers, *message["headers"]):
            if HEADER_RE.search(name) or HEADER_VALUE_RE.search(value):
                raise RuntimeError(f"an answer can't have the header {name!r}: {value!r}")
            if name == b"content-length":
                length = int(value)
            elif name in (b"connection", b"transfer-encoding"):
                return None
            parts += (name, b": ", value, b"\r\n")
        if length is None:
            return None
        self.expected_content_length = length
        self.chunked_encoding = False
        parts.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        return b"".join(parts)


class _Answered:
    """What stands for the last request and its answer once that is complete."""

    response_complete = True
    message_event = _Signal()


_ANSWERED = cast("RequestResponseCycle", _Answered())
_NOTHING_AHEAD: collections.deque[Any] = collections.deque(maxlen=0)
