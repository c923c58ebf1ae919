"""A bare ASGI handler on uvicorn with httptools: reads the request, answers constant JSON.

`python -m bench.limits.asgi PORT` serves it on 127.0.0.1 until it is told to end.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn

from bench import wrk
from bench.result import Run
from hack.servers.process import Process, accepts, free_port

#: As large as what Refold answers to an append, and to a query for a row.
_APPENDED = (
    b'{"revision":3,"partition":2,"position":12345,"token":"W1siMDEyMzQ1Njc4OWFiY2RlZiIsMiwxMjM0NV1d","replayed":false}'
)
_ROW = (
    b'{"key":"order-01234567-89ab-4cde-8f01-23456789abcd","data":{"customer":"customer-0123","status":"delivered",'
    b'"items":4,"total":1234.56,"paid":1234.56,"updated":"2026-01-01T00:00:00.123456Z"}}'
)


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer 201 to POST and 200 to all else."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    post = scope["method"] == "POST"
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    body = _APPENDED if post else _ROW
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 201 if post else 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def loaded(requests: Sequence[str], *, method: str, seconds: int) -> Run:
    """Load the handler in a process of its own by wrk, with the requests that Refold gets."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = Process([sys.executable, "-m", "bench.limits.asgi", str(port)], Path(folder) / "log")
        process.start(lambda: accepts(port))
        try:
            return wrk.load(f"http://127.0.0.1:{port}", requests, method=method, token="none", seconds=seconds).run
        finally:
            process.stop()


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False,
                log_level="warning")  # fmt: skip
