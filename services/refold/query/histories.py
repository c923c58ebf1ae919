"""Folding histories in a process that has more to do: few at once, each for a while, and in threads.

A thread that folds lets go of the interpreter every few milliseconds; the event loop would have to wait for a page's
thousand events, or for what each of them did.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from refold.events import Event
from refold.projection.past import RowAt, RowFold
from refold.query import problems

#: Histories that are folded at once, and seconds that others wait for their turn.
AT_ONCE = 2
_TURN_SECONDS = 3
#: Seconds that one may take: a million events or so.
SECONDS = 20


class Turns:
    """The turns of one process, which is a `service`."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._turns = asyncio.Semaphore(AT_ONCE)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Be one of those few; not for too long.

        Raises:
            Problem: 503 where none of them ends soon, or this one doesn't.
        """
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await self._turns.acquire()
        except TimeoutError as error:
            raise problems.overloaded(f"{AT_ONCE} histories are folded already", self._service) from error
        try:
            async with asyncio.timeout(SECONDS):
                yield
        except TimeoutError as error:
            raise problems.history_too_long(SECONDS) from error
        finally:
            self._turns.release()


async def fold(row: RowFold, pages: AsyncIterator[list[Event]]) -> RowAt:
    """Fold pages until no later one counts, and return what came of it."""
    async for page in pages:
        if not await asyncio.to_thread(row.take, page):
            break
    return await asyncio.to_thread(row.result)
