"""Connections to a PostgreSQL database as its administrator, and what its errors mean for a reconcile.

Before a process uses a database for the first time it ends the sessions that other processes of the operator have there
(those of the same login, by their application_name). Only the holder of the Lease gets so far, and it looks whether it
still is one after it has its session. So a former holder's sessions are all from before the present one's first: what a
frozen process still sends, or had under way, is rolled back instead of done.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import psycopg_pool
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict

from refold_operator.administrators import Login
from refold_operator.calls import call
from refold_operator.dsn import check
from refold_operator.errors import BusyError, UnreachableError
from refold_operator.guard import Guard, unguarded

_CONNECT_SECONDS = 5
_WAIT_SECONDS = 6.0
#: At most. Batches take one each; a swap of versions may hold one for 2 s.
_CONNECTIONS = 12
_STATEMENT_SECONDS = 60
_APPLICATION = "refold-operator"
#: Tells this process' sessions from others'.
_PROCESS = secrets.token_hex(8)
#: The sessions of the operator's other processes: which of them are still there a while after they were told to end.
#: Materialized, or the planner might end sessions before it has looked whose they are.
_END_OTHERS = """
with others as materialized (
  select pid from pg_stat_activity
  where application_name like %(ours)s and application_name <> %(mine)s
    and datname = current_database() and usename = current_user)
select pid from others where not pg_terminate_backend(pid, 5000)
"""
# SQLSTATE classes and codes of an outage: connection, resources, operator intervention, read-only (a standby after
# a failover), lock and statement timeouts, serialization and deadlock.
_PASSING = ("08", "53", "57", "58", "25006", "55P03", "40")
# Those of them that are of what was asked for: locks, the time of a statement, serialization and deadlock.
_BUSY = ("55P03", "57014", "40", "53200")


class Database:
    """A small pool of administrator's connections that survives restarts of the server."""

    def __init__(self, login: Login | str, what: str, *, guard: Guard = unguarded, process: str = _PROCESS) -> None:
        """Use the database that `login` leads to now; its name stays the same, all else may change.

        Args:
            login: the administrator's.
            what: names the database in messages, such as `event store`.
            guard: called before each use of a connection.
            process: names the process that uses it, in at most 40 characters.
        """
        self._login = login if callable(login) else lambda: login
        parts = conninfo_to_dict(self._login())
        self._guard = guard
        self._session = f"{_APPLICATION} {process}"
        self._alone = False
        self._ending = asyncio.Lock()
        self._free = asyncio.Semaphore(_CONNECTIONS)
        self._backend = what.replace(" ", "")
        self.name = str(parts["dbname"])
        self.system = f"the {what} (PostgreSQL database {self.name} at {parts['host']}:{parts.get('port', 5432)})"
        self._pool = psycopg_pool.AsyncConnectionPool(
            lambda: self.dsn,
            min_size=0,
            max_size=_CONNECTIONS,
            max_idle=60.0,
            timeout=_WAIT_SECONDS,
            reconnect_timeout=_WAIT_SECONDS,
            open=False,
            check=psycopg_pool.AsyncConnectionPool.check_connection,
            kwargs={
                "autocommit": True,
                "connect_timeout": _CONNECT_SECONDS,
                "application_name": self._session,
                "options": f"-c statement_timeout={_STATEMENT_SECONDS}s -c lock_timeout=20s",
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
            },
        )

    @property
    def dsn(self) -> str:
        """The administrator's DSN as it is now.

        Raises:
            UnreachableError: it can't be read, or leads to a database of another name.
        """
        try:
            found = self._login()
            check(found)
        except (OSError, ValueError) as error:
            raise UnreachableError(self.system, f"the administrator's DSN can't be used: {error}") from None
        if (name := str(conninfo_to_dict(found)["dbname"])) != self.name:
            raise UnreachableError(
                self.system, f"the administrator's DSN names another database now, {name}: restart the operator"
            )
        return found

    async def open(self) -> None:
        """Start the pool; no connection is needed yet."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close all connections."""
        # kopf, when it stops, cancels all tasks that were begun after it, the pool's own among them.
        with contextlib.suppress(asyncio.CancelledError):
            await self._pool.close()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection[Any]]:
        """Yield an autocommit connection.

        Raises:
            UnreachableError: the server is away, refuses the connection, or broke off what was under way.
        """
        # To wait for what this process does itself is no outage, and isn't the pool's time.
        async with self._free:
            with call(self._backend, refused=psycopg.Error):
                async with self._connection() as connection:
                    yield connection

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection[Any]]:
        try:
            async with contextlib.AsyncExitStack() as stack:
                connection = await self._taken(stack)
                # With the session there, so that the next holder ends it.
                self._guard()
                if not self._alone:
                    await self._end_others(connection)
                yield connection
        except psycopg.Error as error:
            if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and error.sqlstate is None:
                raise UnreachableError(self.system, _line(error)) from error
            if error.sqlstate is not None and error.sqlstate.startswith(_BUSY):
                raise BusyError(self.system, _line(error)) from error
            if error.sqlstate is not None and error.sqlstate.startswith(_PASSING):
                raise UnreachableError(self.system, _line(error)) from error
            raise

    async def _taken(self, stack: contextlib.AsyncExitStack) -> AsyncConnection[Any]:
        """Return a connection of the pool, which has it back when `stack` ends."""
        try:
            return await stack.enter_async_context(self._pool.connection())
        except psycopg_pool.PoolTimeout:
            if why := await self._why():
                raise UnreachableError(self.system, why) from None
        # The server answers; but the pool had given its attempts up, after this wait began, and makes others only for
        # who asks anew.
        try:
            return await stack.enter_async_context(self._pool.connection())
        except psycopg_pool.PoolTimeout:
            raise UnreachableError(self.system, f"no connection was free within {_WAIT_SECONDS:.0f} s") from None

    async def _end_others(self, connection: AsyncConnection[Any]) -> None:
        """End the sessions of other processes of the operator, once."""
        async with self._ending:
            if self._alone:
                return
            cursor = await connection.execute(_END_OTHERS, {"ours": f"{_APPLICATION}%", "mine": self._session})
            if left := await cursor.fetchall():
                pids = ", ".join(str(pid) for (pid,) in left)
                raise UnreachableError(
                    self.system, f"sessions of the operator's former process don't end (pids {pids})"
                )
            self._alone = True

    async def _why(self) -> str | None:
        """Return why the server refuses a connection, None where it doesn't; the pool tells only that it waited."""
        try:
            connection = await psycopg.AsyncConnection.connect(self.dsn, connect_timeout=_CONNECT_SECONDS)
        except psycopg.Error as error:
            return _line(error)
        await connection.close()
        return None


def _line(error: psycopg.Error) -> str:
    """Return the error's first line: what failed; libpq's further ones are advice and other addresses."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
