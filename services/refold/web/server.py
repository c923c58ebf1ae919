"""Running an application with uvicorn: one process, uvloop and httptools, bounded request heads, a graceful end."""

import contextlib
import gc
import resource
import signal
import socket
import ssl
import time
from types import FrameType
from typing import Protocol as Interface
from typing import cast

import structlog
import uvicorn
from starlette.types import Receive, Scope, Send

from refold.web.app import App
from refold.web.protocol import Protocol

log = structlog.get_logger(__name__)

#: Seconds that requests under way have on SIGTERM; below Kubernetes' default grace of 30 s before SIGKILL.
GRACE_SECONDS = 25
#: Seconds that an idle connection is kept: longer than the pauses of usual clients' pools, which else meet a closing
#: one.
KEEP_ALIVE_SECONDS = 75
#: New objects before the garbage collector looks at them, and how many such looks before it looks at older ones.
_GC_THRESHOLDS = (10_000, 20, 20)


class Service(Interface):
    """An ASGI application that can be told of a stop, such as `App`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection scope."""

    def stop(self) -> None:
        """End answers without an end: what is under way is waited for after this."""


def listen(port: int, host: str = "") -> socket.socket:
    """Return a listening socket on all addresses, IPv6 and IPv4 (or on `host` alone); port 0 takes a free one."""
    if host:
        return socket.create_server((host, port), backlog=2048)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=2048)
    return socket.create_server(("", port), backlog=2048)


def make(app: Service, *, tls: ssl.SSLContext | None = None) -> uvicorn.Server:
    """Return a uvicorn server for `app`, to be run with `run`, or in a loop with `await serve(sockets=[listen(0)])`.

    Where `tls` is given, it is what new connections begin with at any time: a certificate loaded later holds for them.
    """
    return _Server(
        app,
        uvicorn.Config(
            app,
            loop="uvloop",
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=2048,
            timeout_graceful_shutdown=GRACE_SECONDS,
            ssl_context_factory=None if tls is None else lambda *_: tls,
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
    # Each connection is an open file; the usual limit of 1,024 is for programs that can't have more.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own below "infinity"
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # What is there now stays: modules, types, descriptions. What requests make goes without the collector's help, but
    # for rare cycles; with its usual thresholds it takes a third of a bulk's time to find nothing.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    with listen(port) as sock:
        log.info("Serving", port=port)
        make(app).run(sockets=[sock])
    log.info("Stopped")


def _done(_signal: int, _frame: FrameType | None) -> None:
    """Do nothing: the graceful stop is over."""


class _Server(uvicorn.Server):
    """uvicorn's server: closes idle connections, and tells the application of a stop before it waits for requests."""

    def __init__(self, app: Service, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # every second
            long_ago = time.monotonic() - KEEP_ALIVE_SECONDS
            for connection in cast("list[Protocol]", list(self.server_state.connections)):
                if connection.idle_since is not None and connection.idle_since < long_ago:
                    connection.transport.close()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.stop()
        await super().shutdown(sockets)
