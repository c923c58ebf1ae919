"""Answers that are whole when they begin, made with little work."""

from collections.abc import Iterable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class JsonAnswer(Response):
    """JSON that is encoded already.

    Args:
        body: the JSON text in UTF-8.
        status: the HTTP status.
        headers: further headers, their names in lower case.
    """

    # Not Response.__init__: it encodes, looks for and adds headers, which takes longer than all the rest of an answer.
    def __init__(self, body: bytes, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.status_code = status
        self.body = body
        self.background = None
        self.raw_headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})
