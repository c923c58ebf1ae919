"""Reading one projection's read model from PostgreSQL.

Each read is one statement, so pointer, positions and rows come from one snapshot. The statement is made for the version
that was live when last looked; where the pointer in its answer tells of another one (or the table is gone), the
definition is read anew and the statement made again. So readers see one version or the other, never a mixture.

Pages of rows share the connections that lookups by key and looks at the positions leave them, so that filters that take
long hold up neither.

Lookups by key that arrive while others are under way go together in the next statement: under load this divides the
cost of a round trip by the number of those that wait, and a lone lookup waits for nobody. Each takes part only in a
statement that begins after its arrival.
"""

import asyncio
import time
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import psycopg
import structlog
from psycopg import errors, sql
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from pydantic import ValidationError

from refold import names
from refold.projection.definition import VersionDefinition
from refold.query import problems
from refold.query.freshness import Freshness
from refold.query.live import LiveVersion, Statement
from refold.web.problems import Problem

log = structlog.get_logger(__name__)

#: Connections; two of them serve lookups by key, and one the looks at the positions.
CONNECTIONS = 8
#: Statements of lookups by key under way at once, and the most keys in one.
_LANES = 2
MOST_KEYS = 256
#: Statements of pages under way at once.
_PAGES = CONNECTIONS - _LANES - 1
#: Lookups that may wait; beyond, they are refused at once.
_MOST_WAITING = 10_000
#: Seconds that a statement may take on the server; what is asked for here takes milliseconds with an index.
_STATEMENT_SECONDS = 10
#: Seconds for a free connection; with the one before, an answer is never later than their sum.
_CONNECTION_SECONDS = 3
#: How often a statement is made anew since the live version has changed, or was dropped, under it.
_TRIES = 5
#: Seconds that a definition is trusted in refusing (an index may be added to the live version).
_TRUSTED_SECONDS = 1.0

_Rows = list[tuple[Any, ...]]


class Reader:
    """The read model of the Projection `namespace/name`.

    All methods raise `Problem` 503 where the read store doesn't answer, or holds no live version.

    Args:
        pool: connections to the read store, see `make_pool`.
        namespace: the Projection's.
        name: the Projection's.
    """

    def __init__(self, pool: AsyncConnectionPool, namespace: str, name: str) -> None:
        self._pool = pool
        self._projection = f"{namespace}/{name}"
        self._schema = names.read_schema(namespace, name)
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
        freshness, (_, *found) = await self._read(lambda live: live.by_keys(keys))
        return freshness, [row[3:5] for row in found]

    async def page(
        self, build: Callable[[LiveVersion], Statement]
    ) -> tuple[Freshness, list[tuple[str, str, str | None]]]:
        """Return the rows, in their order, of the page that `build` makes for the live version.

        Each is its key, its data (JSON text) and the text of its value in the order's column.

        Raises:
            Problem: also what `build` raises; 503 where many others wait, or it takes too long.
        """
        try:
            async with asyncio.timeout(_CONNECTION_SECONDS):
                await self._pages.acquire()
        except TimeoutError as error:
            raise problems.overloaded(f"pages are read as fast as {_PAGES} connections can") from error
        try:
            freshness, (_, *found) = await self._read(build)
        except Problem as problem:
            if isinstance(problem.__cause__, errors.QueryCanceled):
                raise problems.too_slow(_STATEMENT_SECONDS) from problem
            raise
        finally:
            self._pages.release()
        found.sort(key=itemgetter(6))
        return freshness, [row[3:6] for row in found]

    async def freshness(self) -> Freshness:
        """Return how far the live version is."""
        freshness, _ = await self._read(LiveVersion.positions)
        return freshness

    async def status(self) -> tuple[Freshness, int]:
        """Return how far the live version is and how many events it has parked."""
        freshness, (first,) = await self._read(LiveVersion.status)
        return freshness, first[3]

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

    async def _read(self, build: Callable[[LiveVersion], Statement]) -> tuple[Freshness, _Rows]:
        """Return the answer of the statement that `build` makes for the live version, from one snapshot."""
        looked = False
        for _ in range(_TRIES):
            live = self._known
            if live is None:
                live = await self._look()
                looked = True
            try:
                statement = build(live)
            except Problem:
                if time.monotonic() - self._known_at < _TRUSTED_SECONDS:
                    raise
                self._known = None
                continue
            try:
                rows = await self._execute(statement)
            except errors.UndefinedTable:
                self._known = None
                continue
            current, positions, now = rows[0][:3]
            if current != live.version:
                self._known = None
            # One that was live after this read began, and is no more, is as good: it holds all that was visible then.
            # So no reader fails however often the pointer moves.
            if looked or current == live.version:
                return Freshness(live, positions, now), rows
        raise problems.unavailable(
            f"the table of the Projection's live version was missing {_TRIES} times while {self._projection} was read"
        )

    async def _look(self) -> LiveVersion:
        """Read which version is live, and its definition."""
        query = (
            sql.SQL("select live, definition::text from {0}.pointer left join {0}.versions on version = live")
            .format(sql.Identifier(self._schema))
            .as_bytes()
        )
        try:
            rows = await self._execute(Statement(query, {}))
        except (errors.UndefinedTable, errors.InvalidSchemaName, errors.InsufficientPrivilege) as error:
            raise problems.no_live_version(self._projection) from error
        if not rows or rows[0][0] is None:
            raise problems.no_live_version(self._projection)
        version, definition = rows[0]
        try:
            live = LiveVersion(self._schema, version, VersionDefinition.from_json(definition))
        except ValidationError as error:
            log.error("The live version's definition can't be read", version=version, error=str(error))
            raise problems.unavailable(
                f"the definition of the live version {version} isn't one that this release of Refold reads; it was "
                "made by a later one, with which this service has to be upgraded too"
            ) from error
        if self._known is None or self._known.version != version:
            log.info("Serving a version", projection=self._projection, version=version)
        self._known = live
        self._known_at = time.monotonic()
        return live

    async def _execute(self, statement: Statement) -> _Rows:
        """Run a statement; once more on another connection where the server has closed the first (it restarted)."""
        try:
            async with asyncio.timeout(_STATEMENT_SECONDS + _CONNECTION_SECONDS):
                try:
                    return await self._run(statement)
                except psycopg.OperationalError as error:
                    if isinstance(error, PoolTimeout | errors.QueryCanceled):
                        raise
                    await self._pool.check()
                    return await self._run(statement)
        except (psycopg.OperationalError, TimeoutError) as error:
            log.warning("The read store doesn't answer", projection=self._projection, error=str(error))
            raise problems.unavailable(
                "the PostgreSQL read store didn't answer in time or refused; this passes by itself once it is back"
            ) from error

    async def _run(self, statement: Statement) -> _Rows:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(statement.sql, statement.parameters, prepare=statement.prepared)
            return await cursor.fetchall()


def make_pool(dsn: str) -> AsyncConnectionPool:
    """Return a pool of read-only connections to `dsn`, to be opened by `open(wait=False)`, also while it is away."""
    return AsyncConnectionPool(
        dsn,
        min_size=_LANES,
        max_size=CONNECTIONS,
        open=False,
        timeout=_CONNECTION_SECONDS,
        reconnect_timeout=5,  # then the next request tries; the pool's own back-off would outlast an outage
        name="readstore",
        kwargs={
            "autocommit": True,
            "application_name": "refold-query",
            "client_encoding": "utf8",
            "connect_timeout": _CONNECTION_SECONDS,
            "tcp_user_timeout": (_STATEMENT_SECONDS + _CONNECTION_SECONDS) * 1000,
            "options": "-c timezone=UTC -c default_transaction_read_only=on "
            f"-c statement_timeout={_STATEMENT_SECONDS}s",
        },
    )
