"""Bodies of requests, in bounded memory."""

from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request

from refold.web.problems import Problem


class Room:
    """What bodies that are still arriving may take together.

    Args:
        limit: in bytes; beyond, the body that would take more is refused.
        setting: names the limit in messages.
    """

    def __init__(self, limit: int, setting: str) -> None:
        self.limit = limit
        self.setting = setting
        self.taken = 0


async def read(request: Request, limit: int, setting: str, room: Room) -> bytes:
    """Return the whole body of `request`; `setting` names the `limit` in messages.

    Raises:
        Problem: 413 where it is over `limit` bytes; where its length was announced, nothing of it is read. 503 where
            there is no room for it beside the others that are arriving.
    """
    for name, value in request.scope["headers"]:
        if name == b"content-length" and int(value) > limit:
            raise _too_large(f"the body has {int(value)} bytes; {setting} is {limit}", limit)
    chunks: list[bytes] = []
    size = 0
    # Not request.stream(): most bodies come in one piece, for which a generator is a good part of the whole cost.
    try:
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk: bytes = message.get("body", b"")
            if size + len(chunk) > limit:
                raise _too_large(f"the body is larger than {setting}, which is {limit} bytes", limit)
            if not message.get("more_body", False):
                return b"".join((*chunks, chunk)) if chunks else chunk
            if room.taken + len(chunk) > room.limit:
                raise _no_room(room)
            room.taken += len(chunk)
            size += len(chunk)
            chunks.append(chunk)
    finally:
        room.taken -= size


async def lines(request: Request, limit: int, setting: str) -> AsyncIterator[tuple[int, bytes]]:
    r"""Yield number (from 1) and bytes of each line of an NDJSON body as it arrives; `setting` names the `limit`.

    Empty lines are counted, not yielded. Lines end in `\n` or `\r\n`; the last one may lack it. At most a line and
    what the server reads ahead (64 KiB) are held.

    Raises:
        Problem: 413 where a line is over `limit` bytes; the lines before it have been yielded.
    """
    number = 0
    pending: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            number += 1
            if size + end - start > limit:
                raise _line_too_large(number, limit, setting)
            line = chunk[start:end]
            if pending:
                line = b"".join((*pending, line))
                pending.clear()
                size = 0
            start = end + 1
            line = line.strip()
            if line:
                yield number, line
        if start < len(chunk):
            pending.append(chunk[start:])
            size += len(chunk) - start
            if size > limit:
                raise _line_too_large(number + 1, limit, setting)
    line = b"".join(pending).strip()
    if line:
        yield number + 1, line


def _too_large(detail: str, limit: int) -> Problem:
    return Problem(413, "body-too-large", "Body too large", f"{detail}; send less at once", limit=limit)


def _no_room(room: Room) -> Problem:
    return Problem(
        503,
        "overloaded",
        "Overloaded",
        f"bodies of {room.taken} bytes are arriving, {room.setting} is {room.limit}; this one wasn't read, try again a "
        "little later",
        retry_after=1,
    )


def _line_too_large(number: int, limit: int, setting: str) -> Problem:
    return Problem(
        413,
        "line-too-large",
        "Line too large",
        f"line {number} is larger than {setting}, which is {limit} bytes",
        limit=limit,
        line=number,
    )
