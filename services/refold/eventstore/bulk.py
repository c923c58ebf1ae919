"""Many appends in one request, NDJSON in and out, in constant memory.

Lines are taken while a window of unanswered ones has room, so that many go into one group; answers are written in order
as they come. A client may send everything before it reads anything, as most do: answers then wait here, up to
`ANSWER_BYTES`; beyond, no further line is read until some are taken.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from refold.eventstore.appends import SubjectAppend
from refold.eventstore.catalog import Stream
from refold.eventstore.errors import EventStoreError, OverloadedError, UnavailableError
from refold.eventstore.lane import AppendResult
from refold.eventstore.problems import UNREADABLE, from_error, from_unreadable
from refold.eventstore.store import EventStore
from refold.web.openapi import NDJSON
from refold.web.problems import Problem, ProblemBody

#: Lines, and bytes of them, that may wait for their outcome in one request.
WINDOW_LINES = 1000
WINDOW_BYTES = 8 * 1024 * 1024
#: Bytes of answers that may wait for the client to read them (about 100,000 answers).
ANSWER_BYTES = 16 * 1024 * 1024
#: Seconds that a line waits where too many appends of other requests are waiting.
_OVERLOAD_PATIENCE = 30.0
_OVERLOAD_PAUSE = 0.02
#: Lines after which others have their turn, the database's answers among them: what has arrived may be 500 lines.
_TURN_LINES = 50


class BulkAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to one line: what the single append would have answered, or its `error`."""

    subject: str | None
    revision: int | None = None
    partition: int | None = None
    position: int | None = None
    token: str | None = None
    replayed: bool = False
    error: ProblemBody | None = None


class _Subject(msgspec.Struct, frozen=True):
    subject: str


class _Line(NamedTuple):
    number: int
    subject: str | None
    size: int
    outcome: asyncio.Future[AppendResult] | Problem


class Bulk(Response):
    """The answer to a bulk of appends to `stream`, given while its `lines` (number and bytes) are read."""

    def __init__(self, store: EventStore, stream: Stream, lines: AsyncIterator[tuple[int, bytes]]) -> None:
        super().__init__(media_type=NDJSON)
        del self.headers["content-length"]
        self._store = store
        self._stream = stream
        self._lines = lines
        self._decoder = msgspec.json.Decoder(SubjectAppend)
        self._encoder = msgspec.json.Encoder()
        self._window: collections.deque[_Line] = collections.deque()
        self._window_bytes = 0
        self._answers = bytearray()
        self._room = asyncio.Event()  # the window or the answers became shorter, or the writer ended
        self._some = asyncio.Event()  # there are answers to write, or the lines ended
        self._ended = False

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Read, append and answer until the lines end."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writer = asyncio.create_task(self._write(send))
        writer.add_done_callback(lambda _: self._room.set())
        try:
            await self._read(writer)
            await writer
        finally:
            writer.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _read(self, writer: asyncio.Task[None]) -> None:
        try:
            async for number, raw in self._lines:
                if not number % _TURN_LINES:
                    await asyncio.sleep(0)
                subject, outcome = await self._submit(number, raw)
                self._window.append(_Line(number, subject, len(raw), outcome))
                self._window_bytes += len(raw)
                if len(self._window) == 1:
                    self._collect()
                while not writer.done() and (
                    len(self._window) >= WINDOW_LINES
                    or self._window_bytes >= WINDOW_BYTES
                    or len(self._answers) >= ANSWER_BYTES
                ):
                    self._room.clear()
                    await self._room.wait()
        except Problem as problem:  # a line was too large: what follows it isn't read
            self._window.append(_Line(problem.members["line"], None, 0, problem))
            if len(self._window) == 1:
                self._collect()
        while self._window and not writer.done():
            self._room.clear()
            await self._room.wait()
        self._ended = True
        self._some.set()

    async def _submit(self, number: int, raw: bytes) -> tuple[str | None, asyncio.Future[AppendResult] | Problem]:
        """Hand one line to the store; return its subject, where it can be told, and its outcome to come."""
        try:
            line = self._decoder.decode(raw)
        except UNREADABLE as error:
            problem = from_unreadable(error)
            problem.members["line"] = number
            with contextlib.suppress(*UNREADABLE):
                return msgspec.json.decode(raw, type=_Subject).subject, problem
            return None, problem
        deadline = None
        while True:
            try:
                return line.subject, self._store.submit(
                    self._stream, line.subject, line.events, expected_revision=line.expected_revision
                )
            except OverloadedError as error:
                deadline = deadline or time.monotonic() + _OVERLOAD_PATIENCE
                if time.monotonic() > deadline:
                    return line.subject, _problem(error, number)
                await asyncio.sleep(_OVERLOAD_PAUSE)
            except EventStoreError as error:
                return line.subject, _problem(error, number)

    def _collect(self, _: object = None) -> None:
        """Turn the outcomes that are there into answers, as far as all before them are there too; then wait for more.

        Only the first line without an outcome calls this: most get theirs together.
        """
        window = self._window
        while window:
            line = window[0]
            if isinstance(line.outcome, Problem):
                answer = self._refusal(line.subject, line.outcome)
            elif not line.outcome.done():
                line.outcome.add_done_callback(self._collect)
                break
            elif line.outcome.cancelled():
                answer = self._refusal(
                    line.subject, _problem(UnavailableError("the event store is stopping"), line.number)
                )
            elif (error := line.outcome.exception()) is None:
                result = line.outcome.result()
                answer = self._encoder.encode(
                    BulkAnswer(
                        line.subject,
                        result.revision,
                        result.partition,
                        result.position,
                        result.token,
                        replayed=result.replayed,
                    )
                )
            elif isinstance(error, EventStoreError):
                answer = self._refusal(line.subject, _problem(error, line.number))
            else:
                raise error
            window.popleft()
            self._window_bytes -= line.size
            self._answers += answer
            self._answers += b"\n"
        self._room.set()
        if self._answers:
            self._some.set()

    def _refusal(self, subject: str | None, problem: Problem) -> bytes:
        return self._encoder.encode({"subject": subject, "error": problem.body()})

    async def _write(self, send: Send) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            while self._answers:
                body = bytes(self._answers)
                self._answers.clear()
                self._room.set()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            if self._ended and not self._window:
                return


def _problem(error: EventStoreError, number: int) -> Problem:
    problem = from_error(error)
    problem.members["line"] = number
    return problem
