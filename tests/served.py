"""Serving an application for a test as it is served in earnest (uvicorn, a socket), and asking it byte by byte."""

import http.client
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from refold.web import server
from refold.web.app import App


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; `headers` has lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the decoded body."""
        return msgspec.json.decode(self.body)


@dataclass(frozen=True)
class Served:
    """An application that listens on 127.0.0.1."""

    port: int
    token: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        target: str,
        method: str = "GET",
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> Answer:
        """Send one request with exactly this target (no client normalises its path) and return the answer.

        The application's token is sent unless another (or an empty one, for none) is given.
        """
        sent = dict(headers or {})
        token = self.token if token is None else token
        if token:
            sent["authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, target, skip_accept_encoding=True)
            if body is not None:
                connection.putheader("content-length", str(len(body)))
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()


@contextmanager
def serve(app: App, token: str = "") -> Iterator[Served]:
    """Serve `app` in a thread with an event loop of its own; stop it gracefully at the end."""
    running = server.make(app)
    with server.listen(0, "127.0.0.1") as sock:
        port = sock.getsockname()[1]
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, name=f"served-{port}")
        thread.start()
        try:
            deadline = time.monotonic() + 15
            while not running.started:
                if not thread.is_alive():
                    raise RuntimeError("the application ended while it started; its log tells why")
                if time.monotonic() > deadline:
                    raise TimeoutError("the application didn't start within 15 s")
                time.sleep(0.01)
            yield Served(port, token)
        finally:
            running.should_exit = True
            thread.join(30)
