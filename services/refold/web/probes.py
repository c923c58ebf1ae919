"""Probes and metrics of a process that serves nothing else over plain HTTP (relay, projector, webhook)."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from refold.web.server import listen

log = structlog.get_logger(__name__)


class Probes:
    """Serves `/healthz`, `/readyz` and `/metrics` from daemon threads, so that a busy loop doesn't delay them.

    `healthy` and `ready` are called in those threads: they read a flag or a time and return at once. They return None
    where all is well, else a text that says what isn't (answered with 503). `healthy` is false only where a restart
    would help; an outage of PostgreSQL or Kafka is a matter of `ready`.

    ::

        with Probes(settings.port, healthy=lambda: None, ready=lambda: None if assigned else "no partitions yet"):
            run()

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, port: int, *, healthy: Callable[[], str | None], ready: Callable[[], str | None]) -> None:
        checks = {"/healthz": healthy, "/readyz": ready}

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds for a request to arrive

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(200, generate_latest(), CONTENT_TYPE_LATEST)
                elif path in checks:
                    wrong = checks[path]()
                    status, text = (200, "ok") if wrong is None else (503, wrong)
                    self._answer(status, f"{text}\n".encode(), "text/plain; charset=utf-8")
                else:
                    self._answer(404, b"served here: /healthz, /readyz, /metrics\n", "text/plain; charset=utf-8")

            def _answer(self, status: int, body: bytes, media_type: str) -> None:
                self.send_response(status)
                self.send_header("content-type", media_type)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
                """Keep quiet: probes come every few seconds."""

        self._server = ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
        self._server.daemon_threads = True
        self._server.socket.close()
        self._server.socket = listen(port)
        self.port: int = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="probes", daemon=True)

    def __enter__(self) -> "Probes":
        self._thread.start()
        log.info("Serving probes and metrics", port=self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
