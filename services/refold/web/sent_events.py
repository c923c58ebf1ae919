"""Server-sent events (the WHATWG's `text/event-stream`): an answer that tells what comes, until one of both sides goes.

An event is a `block`; its `id` is what a client sends back as Last-Event-ID to go on after it. The first block may have
an id alone, so that a client that is cut off before the first event goes on from where it began.

Nothing is written ahead: the next events are taken once the socket has taken the former ones. A client that doesn't
read is cut off after a while; one that is gone without a word is found by the kernel, which is given heartbeats to
send. Each answer is ended after some minutes: clients come again by themselves, with rights that are looked at anew
and perhaps to another replica.
"""

import asyncio
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

MEDIA_TYPE = "text/event-stream"
#: Milliseconds after which clients are told to come again.
_RETRY_MS = 1000
#: Seconds of silence after which a comment is sent: below the usual patience of proxies (60, some 30).
HEARTBEAT = 15.0
#: Seconds in which a client must take what was sent before.
PATIENCE = 60.0
#: Seconds that the kernel has more patience than we, so that a client that doesn't read is cut off by us and counted.
_KERNEL_SECONDS = 30.0
#: Seconds that a client that doesn't read has once the answer is to end.
_LAST_PATIENCE = 2.0
#: Seconds after which an answer is ended, at most; at least three quarters of it.
LIFETIME = 600.0
_ENDS_OF_LINE = {b"\xc2\x85": b"\\u0085", b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029"}
#: Bytes that are written at once.
_PIECE = 64 * 1024


class Source(Protocol):
    """Where the events of one answer come from."""

    def first_id(self) -> str | None:
        """Return the id of where it begins; None where a client that is cut off before the first event begins anew."""

    async def next(self, seconds: float) -> Iterable[bytes] | None:
        """Return the next blocks; none where nothing came for `seconds`, None where nothing more will come."""

    def on_end(self, call: Callable[[], None]) -> None:
        """Have `call` called when the source is ended by other than its own `close`; at once where it is."""

    def end(self) -> None:
        """Have `next` return None."""

    def close(self) -> None:
        """Give up what it holds."""


def block(data: bytes, *, id_: str | None, kind: str | None) -> bytes:
    """Return an event: its data (JSON without line ends), its id and its type; without an id the last one holds on."""
    # Lines end in CR or LF here, which JSON escapes; many clients end them at Unicode's other ends of line too.
    if not data.isascii():
        for character, escaped in _ENDS_OF_LINE.items():
            data = data.replace(character, escaped)
    # A type with an end of line can't be told in this format.
    name = b"" if kind is None or kind.splitlines() != [kind] else b"event: %s\n" % kind.encode()
    return b"%s%sdata: %s\n\n" % (_id(id_), name, data)


def _id(id_: str | None) -> bytes:
    return b"" if id_ is None else b"id: %s\n" % id_.encode()


class SentEvents(Response):
    """The answer that tells what comes from `source`; closes it. `cut` is called where a client is cut off."""

    def __init__(self, source: Source, *, cut: Callable[[], None]) -> None:
        # The connection is closed at the end, so that the next one may go to another replica.
        headers = {"cache-control": "no-store", "connection": "close", "x-accel-buffering": "no"}
        super().__init__(media_type=MEDIA_TYPE, headers=headers)
        del self.headers["content-length"]
        self._source = source
        self._cut = cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the client leaves, the source ends or the time is up."""
        transport: asyncio.Transport = scope["state"]["transport"]
        _lose_sooner(transport)
        loop = asyncio.get_running_loop()
        last: list[asyncio.TimerHandle] = []
        self._source.on_end(lambda: last.append(loop.call_later(_LAST_PATIENCE, transport.abort)))
        gone = asyncio.create_task(self._until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            first = self._source.first_id()
            await self._write(send, b"retry: %d\n%s\n" % (_RETRY_MS, _id(first)))
            end = time.monotonic() + LIFETIME * random.uniform(0.75, 1)  # noqa: S311 (spreads load, guards nothing)
            while time.monotonic() < end and (page := await self._source.next(HEARTBEAT)) is not None:
                for piece in _pieces(page):
                    await self._write(send, piece)
            await self._write(send, b"", more=False)
        except TimeoutError:
            self._cut()
            transport.abort()
            await gone  # what is answered after that is nobody's
        finally:
            gone.cancel()
            for timer in last:
                timer.cancel()
            self._source.close()

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._source.end()

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(PATIENCE):
            await send({"type": "http.response.body", "body": body, "more_body": more})


def _pieces(page: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the blocks in pieces that are written at once; a comment where there is none."""
    blocks: list[bytes] = []
    size = 0
    nothing = True
    for one in page:
        nothing = False
        blocks.append(one)
        size += len(one)
        if size >= _PIECE:
            whole = b"".join(blocks)
            yield from (whole[at : at + _PIECE] for at in range(0, size, _PIECE))
            blocks, size = [], 0
    if blocks:
        yield b"".join(blocks)
    if nothing:
        yield b":\n\n"


def _lose_sooner(transport: asyncio.Transport) -> None:
    """Have the kernel give up a client that acknowledges nothing soon, not only in a quarter of an hour.

    Later than our own patience: to the kernel a client that is there and doesn't read is no better, but we count it.
    """
    if transport.is_closing():  # the caller left before its answer began: uvloop has no socket then
        return
    sock = transport.get_extra_info("socket")
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int((PATIENCE + _KERNEL_SECONDS) * 1000))
