"""Bodies of requests, in bounded memory."""

from collections.abc import AsyncIterator

from starlette.requests import Request

from refold.web.problems import Problem


async def read(request: Request, limit: int) -> bytes:
    """Return the whole body of `request`.

    Raises:
        Problem: 413 where it is over `limit` bytes; where its length was announced, nothing of it is read.
    """
    announced = request.headers.get("content-length")
    if announced is not None and int(announced) > limit:
        raise _too_large(f"the body of {announced} bytes is over the limit of {limit} bytes", limit)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(f"the body is over the limit of {limit} bytes", limit)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def lines(request: Request, limit: int) -> AsyncIterator[tuple[int, bytes]]:
    r"""Yield number (from 1) and bytes of each line of an NDJSON body as it arrives.

    Empty lines are counted, not yielded.     Lines end in `\n` or `\r\n`; the last one may lack it. At most a line and
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
                raise _line_too_large(number, limit)
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
                raise _line_too_large(number + 1, limit)
    line = b"".join(pending).strip()
    if line:
        yield number + 1, line


def _too_large(detail: str, limit: int) -> Problem:
    return Problem(413, "body-too-large", "Body too large", f"{detail}; send less at once", limit=limit)


def _line_too_large(number: int, limit: int) -> Problem:
    return Problem(
        413,
        "line-too-large",
        "Line too large",
        f"line {number} is over the limit of {limit} bytes",
        limit=limit,
        line=number,
    )
