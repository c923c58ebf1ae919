"""Changing a store's tables while it is in use.

A statement that waits for a table's lock makes all later ones wait behind it, appends too. So a migration waits
`LOCK_SECONDS` at most; then its transaction is rolled back, what waited goes on, and it is tried again a little later,
until it was refused for `PATIENCE`. How long it *holds* its locks is for each migration's author to keep short: nothing
that reads or writes a history as a whole.

What holds a stream's tables for hours (a backup, a vacuum) must not keep the others from being served: its migration is
left for the next time.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import psycopg
import structlog
from psycopg import AsyncConnection

from refold.eventstore.errors import EventStoreError

log = structlog.get_logger(__name__)
_T = TypeVar("_T")

#: Seconds that a migration waits for a lock, and appends behind it.
LOCK_SECONDS = 0.5
#: Seconds between two tries, at first and at most, and after which a migration is given up.
BACK_OFF = (0.2, 3.0)
PATIENCE = 60.0
#: What bounds the waiting for locks in the rest of a transaction.
LOCK_TIMEOUT = f"set local lock_timeout = {LOCK_SECONDS * 1000:.0f}"


async def giving_way(conn: AsyncConnection[Any], work: Callable[[], Awaitable[_T]]) -> _T:
    """Return what `work` returns, run in a transaction of its own; again and again where it is refused a lock.

    Args:
        conn: on which `work` runs.
        work: executes `LOCK_TIMEOUT` before it changes tables.

    Raises:
        EventStoreError: it was refused its locks for `PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE
    pause, most = BACK_OFF
    while True:
        try:
            async with conn.transaction():
                return await work()
        except psycopg.errors.LockNotAvailable as error:
            if time.monotonic() > deadline:
                raise EventStoreError(
                    f"the store in database {conn.info.dbname} can't be migrated: its tables were in use for "
                    f"{PATIENCE:g} s ({error}); end the long transactions that pg_stat_activity shows, the operator "
                    "tries again"
                ) from error
            log.info("A migration gives way to what holds its tables", database=conn.info.dbname, error=str(error))
        await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 (spreads load, guards nothing)
        pause = min(most, 2 * pause)


async def each_giving_way(conn: AsyncConnection[Any], works: Sequence[Callable[[], Awaitable[None]]]) -> int:
    """Run each of `works` in a transaction of its own, by turns, those again that are refused a lock.

    Args:
        conn: on which they run.
        works: each as that of `giving_way`.

    Returns:
        How many weren't done, since they were refused their locks until `PATIENCE` had passed.
    """
    deadline = time.monotonic() + PATIENCE
    pause, most = BACK_OFF
    while True:
        refused = []
        for number, work in enumerate(works):
            if number and time.monotonic() > deadline:
                refused.append(work)
                continue
            try:
                async with conn.transaction():
                    await work()
            except psycopg.errors.LockNotAvailable as error:
                log.info("A migration gives way to what holds its tables", database=conn.info.dbname, error=str(error))
                refused.append(work)
        if not refused or time.monotonic() > deadline:
            return len(refused)
        works = refused
        await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 (spreads load, guards nothing)
        pause = min(most, 2 * pause)
