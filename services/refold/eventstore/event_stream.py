"""Watched events as server-sent events (the WHATWG's `text/event-stream`), until one of both sides goes.

An event is `id` (the token to go on after it), `event` (its type) and `data` (its JSON, as in reads). The first block
has an id alone, so that a client that is cut off before the first event goes on from where it began.

Nothing is written ahead: the next events are taken once the socket has taken the former ones. A client that doesn't
read is cut off after a while; one that is gone without a word is found by the kernel, which is given heartbeats to
send. Each answer is ended after some minutes: clients come again by themselves, with rights that are looked at anew
and perhaps to another replica.
"""

import asyncio
import random
import socket
import time
from collections.abc import Iterator, Sequence

import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from refold.eventstore import metrics
from refold.eventstore.errors import EventStoreError
from refold.eventstore.live import LiveEvent, Reader

log = structlog.get_logger(__name__)

MEDIA_TYPE = "text/event-stream"
#: Milliseconds after which clients are told to come again.
_RETRY_MS = 1000
#: Seconds of silence after which a comment is sent: below the usual patience of proxies (60, some 30).
HEARTBEAT = 15.0
#: Seconds in which a client must take what was sent before.
PATIENCE = 60.0
#: Seconds that a client that doesn't read has once the answer is to end.
_LAST_PATIENCE = 2.0
#: Seconds after which an answer is ended, at most; at least three quarters of it.
LIFETIME = 600.0
_ENDS_OF_LINE = {b"\xc2\x85": b"\\u0085", b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029"}
#: Bytes that are written at once.
_PIECE = 64 * 1024


class EventStream(Response):
    """The answer that tells what `reader` reads; closes it."""

    def __init__(self, reader: Reader) -> None:
        # The connection is closed at the end, so that the next one may go to another replica.
        headers = {"cache-control": "no-store", "connection": "close", "x-accel-buffering": "no"}
        super().__init__(media_type=MEDIA_TYPE, headers=headers)
        del self.headers["content-length"]
        self._reader = reader
        self._encoder = msgspec.json.Encoder()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the client leaves, the store stops, the stream goes or the time is up."""
        transport: asyncio.Transport = scope["state"]["transport"]
        _lose_sooner(transport)
        loop = asyncio.get_running_loop()
        last: list[asyncio.TimerHandle] = []
        self._reader.on_end(lambda: last.append(loop.call_later(_LAST_PATIENCE, transport.abort)))
        gone = asyncio.create_task(self._until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._write(send, b"retry: %d\nid: %s\n\n" % (_RETRY_MS, self._reader.token.encode()))
            end = time.monotonic() + LIFETIME * random.uniform(0.75, 1)  # noqa: S311 (spreads load, guards nothing)
            while time.monotonic() < end and (page := await self._next()) is not None:
                for piece in self._pieces(page):
                    await self._write(send, piece)
            await self._write(send, b"", more=False)
        except TimeoutError:
            metrics.LIVE_CUT.inc()
            transport.abort()
            await gone  # what is answered after that is nobody's
        finally:
            gone.cancel()
            for timer in last:
                timer.cancel()
            self._reader.close()

    async def _next(self) -> list[LiveEvent] | None:
        try:
            return await self._reader.next(HEARTBEAT)
        except EventStoreError as error:  # the client comes again and is then answered with the problem
            log.info("A live read is ended", stream=self._reader.stream.schema, error=str(error))
            return None

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._reader.end()

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(PATIENCE):
            await send({"type": "http.response.body", "body": body, "more_body": more})

    def _pieces(self, page: Sequence[LiveEvent]) -> Iterator[bytes]:
        if not page:
            yield b":\n\n"
            return
        blocks: list[bytes] = []
        size = 0
        for one in page:
            block = self._block(one)
            blocks.append(block)
            size += len(block)
            if size >= _PIECE:
                whole = b"".join(blocks)
                yield from (whole[at : at + _PIECE] for at in range(0, size, _PIECE))
                blocks, size = [], 0
        if blocks:
            yield b"".join(blocks)

    def _block(self, one: LiveEvent) -> bytes:
        # Lines end in CR or LF here, which JSON escapes; many clients end them at Unicode's other ends of line too.
        data = self._encoder.encode(one.event)
        if not data.isascii():
            for character, escaped in _ENDS_OF_LINE.items():
                data = data.replace(character, escaped)
        # A type with an end of line can't be told in this format; it stands in the data.
        kind = one.event.type
        name = b"" if kind.splitlines() != [kind] else b"event: %s\n" % kind.encode()
        return b"id: %s\n%sdata: %s\n\n" % (one.token.encode(), name, data)


def _lose_sooner(transport: asyncio.Transport) -> None:
    """Have the kernel give up a client that acknowledges nothing in `PATIENCE` s, not only in a quarter of an hour."""
    sock = transport.get_extra_info("socket")
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(PATIENCE * 1000))
