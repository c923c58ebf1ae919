"""Running an application with uvicorn: one process, uvloop and httptools, bounded request heads, a graceful end."""

import signal
import socket
from http import HTTPStatus
from types import FrameType

import msgspec
import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from refold.web.app import App
from refold.web.problems import MEDIA_TYPE, Problem

log = structlog.get_logger(__name__)

#: Bytes that a request's first line and headers may take together; a subject of 512 bytes takes at most 1,536 of them.
MAX_HEAD_BYTES = 65536
#: Seconds that requests under way have on SIGTERM; below Kubernetes' default grace of 30 s before SIGKILL.
GRACE_SECONDS = 25
#: Seconds that an idle connection is kept: longer than the pauses of usual clients' pools, which else meet a closing
#: one.
KEEP_ALIVE_SECONDS = 75


def listen(port: int, host: str = "") -> socket.socket:
    """Return a listening socket on all addresses, IPv6 and IPv4 (or on `host` alone); port 0 takes a free one."""
    if host:
        return socket.create_server((host, port), backlog=2048)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=2048)
    return socket.create_server(("", port), backlog=2048)


def make(app: App) -> uvicorn.Server:
    """Return a uvicorn server for `app`, to be run with `run`, or in a test with `await serve(sockets=[listen(0)])`."""
    return _Server(
        app,
        uvicorn.Config(
            app,
            loop="uvloop",
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=2048,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        ),
    )


def run(app: App, port: int) -> None:
    """Serve `app` on `port` until SIGTERM or SIGINT, finish what is under way, return.

    Raises:
        SystemExit: with code 3 where the application's lifespan failed at the start (its error is in the log).
    """
    # uvicorn raises the signal again when it is done, which would end the process by the signal and not with exit code
    # 0.
    signal.signal(signal.SIGTERM, _done)
    with listen(port) as sock:
        log.info("Serving", port=port)
        make(app).run(sockets=[sock])
    log.info("Stopped")


def _done(_signal: int, _frame: FrameType | None) -> None:
    """Do nothing: the graceful stop is over."""


class _Server(uvicorn.Server):
    """uvicorn's server, which tells the application of a stop before it waits for what is under way."""

    def __init__(self, app: App, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.stop()
        await super().shutdown(sockets)


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol with two of our rules: a request's head is bounded, and a refused one is a problem too."""

    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
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
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()
        self.scope["state"]["transport"] = self.transport  # for answers without an end, which may have to be cut

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's own words for it)
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
