"""Waiting until a token's positions are applied.

All requests that wait share one look at the positions, every few milliseconds while somebody waits, and what other
requests read in between. Who comes while others wait waits at once where the last look lacks what is wanted: to read
before that would mostly be in vain, and would double what the read store has to do.
"""

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from refold import tokens
from refold.query import problems
from refold.query.freshness import Freshness
from refold.query.reader import Reader
from refold.web.problems import Problem

#: Seconds between two looks at the positions, at least and at most: short beside the time that an event takes from its
#: append to its row. Between them, as many times as long as a look takes: a busy read store is asked less often.
_LEAST_SECONDS, _MOST_SECONDS, _REST = 0.002, 0.05, 4
#: Seconds that a request with a token waits where it doesn't say, and the most that it may ask for.
DEFAULT_SECONDS = 10.0
MOST_SECONDS = 60.0
#: Positions that a token may name: over those of a projection of many streams, far below what fills a head.
_MOST_POSITIONS = 10_000
_WAIT = re.compile(r'(?:^|,)\s*wait\s*=\s*"?([0-9]{1,9}(?:\.[0-9]{1,6})?)"?\s*(?=[,;]|$)', re.IGNORECASE)


class Wanted:
    """What a request's Refold-Token and `Prefer: wait=SECONDS` (RFC 7240) ask for."""

    def __init__(self, positions: Sequence[tokens.Position], seconds: float) -> None:
        self.positions = positions
        self._begin = time.monotonic()
        self._seconds = seconds

    @property
    def waited(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self._begin

    @property
    def left(self) -> float:
        """Seconds that it may still wait; negative beyond the deadline."""
        return self._seconds - self.waited

    def missing(self, freshness: Freshness) -> list[dict[str, Any]]:
        """Return which wanted positions `freshness` lacks.

        Raises:
            Problem: 400 where the projection doesn't fold what the token names.
        """
        try:
            return freshness.missing(self.positions)
        except KeyError as error:
            incarnation, partition = error.args[0]
            raise problems.invalid_token(
                f"the token names partition {partition} of a stream (incarnation {incarnation[:32]!r}) that this "
                "projection doesn't read; was the stream deleted and made anew since the append?"
            ) from error


def wanted(request: Request) -> Wanted | None:
    """Return what the request's headers ask to wait for, None where nothing.

    Raises:
        Problem: 400 where the Refold-Token isn't one.
    """
    token = request.headers.get("refold-token")
    if token is None:
        return None
    try:
        positions = tokens.decode(token)
    except tokens.InvalidTokenError as error:
        raise problems.invalid_token(str(error)) from error
    if len(positions) > _MOST_POSITIONS:
        raise problems.invalid_token(f"the token names over {_MOST_POSITIONS} positions")
    found = _WAIT.search(",".join(request.headers.getlist("prefer")))
    return Wanted(positions, DEFAULT_SECONDS if found is None else min(float(found[1]), MOST_SECONDS))


class Waiting:
    """The requests that wait for `reader`'s live version."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._waiters: dict[asyncio.Future[None], Wanted] = {}
        self._task: asyncio.Task[None] | None = None
        self._seen: Freshness | None = None

    def lacks(self, wanted: Wanted) -> bool:
        """Tell whether the last look, a moment ago, lacks some of `wanted`; False where nobody has looked just now."""
        if self._task is None or self._seen is None or wanted.left <= 0:
            return False
        try:
            return bool(wanted.missing(self._seen))
        except Problem:  # it may be of another version
            return False

    def saw(self, freshness: Freshness) -> None:
        """Let those go who wait for what `freshness` has, which was read for somebody else."""
        if self._seen is None or freshness.applied != self._seen.applied:
            self._tell(freshness)

    async def until_applied(self, wanted: Wanted, freshness: Freshness | None) -> None:
        """Return once `wanted` is applied, where `freshness`, just read, or the last look (None) lacks some of it.

        Raises:
            Problem: 504 at the deadline; 503 where the read store doesn't answer.
        """
        if wanted.left > 0:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters[future] = wanted
            if self._task is None:
                self._task = asyncio.create_task(self._look())
            try:
                async with asyncio.timeout(wanted.left):
                    await future
                return
            except TimeoutError:
                freshness = None
            finally:
                del self._waiters[future]
        if freshness is None:
            freshness = await self._reader.freshness()
        if not (missing := wanted.missing(freshness)):  # just now
            return
        problem = problems.not_applied(wanted.waited, missing)
        problem.headers.update(freshness.headers)
        raise problem

    async def _look(self) -> None:
        try:
            took = 0.0
            while self._waiters:
                await asyncio.sleep(min(max(_REST * took, _LEAST_SECONDS), _MOST_SECONDS))
                began = time.monotonic()
                await self._look_once()
                took = time.monotonic() - began
        finally:
            self._task = None

    async def _look_once(self) -> None:
        try:
            freshness = await self._reader.freshness()
        except Exception as error:  # noqa: BLE001 (each caller gets it)
            for future in self._waiters:
                if not future.done():
                    future.set_exception(error)
            return
        self._tell(freshness, refuse=True)

    def _tell(self, freshness: Freshness, *, refuse: bool = False) -> None:
        """Let those go whose positions `freshness` has; with `refuse` also those whose token isn't of its version."""
        self._seen = freshness
        for future, wanted in self._waiters.items():
            try:
                if not future.done() and not wanted.missing(freshness):
                    future.set_result(None)
            except Problem as problem:
                if refuse:
                    future.set_exception(problem)
