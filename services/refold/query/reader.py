"""Reading one projection's read model from its read store.

Pointer, positions and rows of an answer come from one snapshot. It is read of the version that was live when last
looked; where the pointer in the answer tells of another one (or the version is gone), the definition is read anew and
the read made again. So readers see one version or the other, never a mixture.

Pages of rows share the connections that lookups by key and looks at the positions leave them, so that filters that take
long hold up neither.

Lookups by key that arrive while others are under way go together in the next read: under load this divides the
cost of a round trip by the number of those that wait, and a lone lookup waits for nobody. Each takes part only in a
read that begins after its arrival.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from refold.projection.readstore import (
    NotFoundError,
    Page,
    Reads,
    Snapshot,
    TooSlowError,
    UnavailableError,
    UnreadableError,
)
from refold.query import problems
from refold.query.freshness import Freshness
from refold.query.live import LiveVersion
from refold.web.problems import Problem

log = structlog.get_logger(__name__)

#: Connections; two of them serve lookups by key, and one the looks at the positions.
CONNECTIONS = 8
#: Reads of lookups by key under way at once, and the most keys in one.
_LANES = 2
MOST_KEYS = 256
#: Reads of pages under way at once.
_PAGES = CONNECTIONS - _LANES - 1
#: Lookups that may wait; beyond, they are refused at once.
_MOST_WAITING = 10_000
#: Seconds that a page waits for the others before it.
_PAGE_SECONDS = 3
#: How often a read is made anew since the live version has changed, or was dropped, under it.
_TRIES = 5
#: Seconds that a definition is trusted in refusing (an index may be added to the live version).
_TRUSTED_SECONDS = 1.0

_T = TypeVar("_T")


class Reader:
    """The read model of the Projection `namespace/name`.

    All methods raise `Problem` 503 where the read store doesn't answer, or holds no live version.

    Args:
        reads: the Projection in its read store.
        projection: the Projection's `namespace/name`.
    """

    def __init__(self, reads: Reads, projection: str) -> None:
        self._reads = reads
        self._projection = projection
        self._known: LiveVersion | None = None
        self._known_at = 0.0
        self._waiting: list[tuple[str, asyncio.Future[tuple[Freshness, str | None]]]] = []
        self._lanes = 0
        self._pages = asyncio.Semaphore(_PAGES)
        self._tasks: set[asyncio.Task[None]] = set()

    async def row(self, key: str) -> tuple[Freshness, str | None]:
        """Return the row of `key` as JSON text, or None where there is none."""
        if len(self._waiting) >= _MOST_WAITING:
            raise problems.overloaded(f"{len(self._waiting)} reads wait for the read store already")
        future: asyncio.Future[tuple[Freshness, str | None]] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, future))
        if self._lanes < _LANES:
            self._lanes += 1
            task = asyncio.create_task(self._look_up())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def by_keys(self, keys: list[str]) -> tuple[Freshness, list[tuple[str, str]]]:
        """Return keys and rows (JSON text) of those of `keys`, at most `MOST_KEYS`, that have one, in any order."""
        return await self._read(lambda live: live.reads.by_keys(keys))

    async def page(self, build: Callable[[LiveVersion], Page]) -> tuple[Freshness, list[tuple[str, str, str | None]]]:
        """Return the rows, in their order, of the page that `build` makes for the live version.

        Each is its key, its data (JSON text) and the text of its value in the order's column.

        Raises:
            Problem: also what `build` raises; 503 where many others wait, or it takes too long.
        """
        try:
            async with asyncio.timeout(_PAGE_SECONDS):
                await self._pages.acquire()
        except TimeoutError as error:
            raise problems.overloaded(f"pages are read as fast as {_PAGES} connections can") from error
        try:
            return await self._read(lambda live: live.reads.page(build(live)))
        finally:
            self._pages.release()

    async def freshness(self) -> Freshness:
        """Return how far the live version is."""

        async def read(live: LiveVersion) -> tuple[Snapshot, None]:
            return await live.reads.state(), None

        return (await self._read(read))[0]

    async def status(self) -> tuple[Freshness, int]:
        """Return how far the live version is and how many events it has parked."""

        async def read(live: LiveVersion) -> tuple[Snapshot, int]:
            snapshot = await live.reads.status()
            return snapshot, snapshot.parked

        return await self._read(read)

    async def _look_up(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting[:MOST_KEYS], self._waiting[MOST_KEYS:]
            keys = [key for key, _ in asked]
            try:
                freshness, rows = await self.by_keys(keys)
            except Exception as error:  # noqa: BLE001 (each caller gets it)
                for _, future in asked:
                    if not future.done():
                        future.set_exception(error)
                continue
            found = dict(rows)
            for key, future in asked:
                if not future.done():
                    future.set_result((freshness, found.get(key)))
        # In the same step as the look at what waits: a task's own end comes later, and who waits in between would
        # find this lane busy and be forgotten.
        self._lanes -= 1

    async def _read(self, read: Callable[[LiveVersion], Awaitable[tuple[Snapshot, _T]]]) -> tuple[Freshness, _T]:
        """Return what `read` yields for the live version, from one snapshot."""
        looked = False
        for _ in range(_TRIES):
            live = self._known
            if live is None:
                live = await self._look()
                looked = True
            try:
                snapshot, found = await read(live)
            except Problem:
                if time.monotonic() - self._known_at < _TRUSTED_SECONDS:
                    raise
                self._known = None
                continue
            except NotFoundError:
                self._known = None
                continue
            except UnavailableError as error:
                raise self._away(error) from error
            if snapshot.live != live.version:
                self._known = None
            # One that was live after this read began, and is no more, is as good: it holds all that was visible then.
            # So no reader fails however often the pointer moves.
            if looked or snapshot.live == live.version:
                return Freshness(live, snapshot), found
        raise problems.unavailable(
            f"the rows of the Projection's live version were missing {_TRIES} times while {self._projection} was read"
        )

    async def _look(self) -> LiveVersion:
        """Read which version is live, and its definition."""
        try:
            found = await self._reads.live()
        except UnavailableError as error:
            raise self._away(error) from error
        if found is None:
            raise problems.no_live_version(self._projection)
        version, definition = found
        live = LiveVersion(version, definition, self._reads.version(version, definition))
        if self._known is None or self._known.version != version:
            log.info("Serving a version", projection=self._projection, version=version)
        self._known = live
        self._known_at = time.monotonic()
        return live

    def _away(self, error: UnavailableError) -> Problem:
        """Return the problem of a read store that doesn't answer."""
        log.warning("The read store doesn't answer", projection=self._projection, error=str(error))
        if isinstance(error, TooSlowError):
            return problems.too_slow(str(error))
        if isinstance(error, UnreadableError):
            return problems.unavailable(str(error))
        return problems.unavailable(
            "the read store didn't answer in time or refused; this passes by itself once it is back"
        )
