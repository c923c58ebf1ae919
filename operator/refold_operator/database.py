"""Connections to a PostgreSQL database as its administrator, and what its errors mean for a reconcile."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import psycopg_pool
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict

from refold_operator.errors import UnreachableError

_CONNECT_SECONDS = 5
_WAIT_SECONDS = 6.0
_STATEMENT_SECONDS = 60
# SQLSTATE classes and codes of an outage: connection, resources, operator intervention, read-only (a standby after
# a failover), lock and statement timeouts, serialization and deadlock.
_PASSING = ("08", "53", "57", "58", "25006", "55P03", "40")


class Database:
    """A small pool of administrator's connections that survives restarts of the server."""

    def __init__(self, dsn: str, what: str) -> None:
        """Use `dsn`; `what` names the database in messages, such as `event store`."""
        parts = conninfo_to_dict(dsn)
        self.dsn = dsn
        self.name = str(parts["dbname"])
        self.system = f"the {what} (PostgreSQL database {self.name} at {parts['host']}:{parts.get('port', 5432)})"
        self._pool = psycopg_pool.AsyncConnectionPool(
            dsn,
            min_size=0,
            max_size=4,
            max_idle=60.0,
            timeout=_WAIT_SECONDS,
            reconnect_timeout=_WAIT_SECONDS,
            open=False,
            check=psycopg_pool.AsyncConnectionPool.check_connection,
            kwargs={
                "autocommit": True,
                "connect_timeout": _CONNECT_SECONDS,
                "application_name": "refold-operator",
                "options": f"-c statement_timeout={_STATEMENT_SECONDS}s -c lock_timeout=20s",
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
            },
        )

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
        try:
            async with self._pool.connection() as connection:
                yield connection
        except psycopg_pool.PoolTimeout:
            raise UnreachableError(self.system, await self._why()) from None
        except psycopg.Error as error:
            if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and error.sqlstate is None:
                raise UnreachableError(self.system, _line(error)) from error
            if error.sqlstate is not None and error.sqlstate.startswith(_PASSING):
                raise UnreachableError(self.system, _line(error)) from error
            raise

    async def _why(self) -> str:
        """Return what the server answers to one connection; the pool itself tells only that it waited."""
        try:
            connection = await psycopg.AsyncConnection.connect(self.dsn, connect_timeout=_CONNECT_SECONDS)
        except psycopg.Error as error:
            return _line(error)
        await connection.close()
        return f"no connection was free within {_WAIT_SECONDS:.0f} s"


def _line(error: psycopg.Error) -> str:
    """Return the error's first line: what failed; libpq's further ones are advice and other addresses."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
