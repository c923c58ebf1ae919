"""Rows for those who read them in SQL: a view that names the live version's, and a login that may read it alone.

The view is replaced in the transaction that moves the pointer, and only there, so a statement sees one version or the
other. Replacing it waits for the transactions that have read it, and makes later ones wait behind: so for a moment
only (`LOCK_TIMEOUT`), before anything else is locked, and then the swap is put off.

A transaction keeps its snapshot where it isn't READ COMMITTED, but it sees the view as it is. One that began before a
swap and first reads the view after it would find rows of the new version as they were while it was being built; the
view's condition makes that an error.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from refold import names
from refold.eventstore import roles
from refold.eventstore.online import LOCK_TIMEOUT
from refold.projection.readstore import BusyError, ReadStoreError

#: The view's name in the projection's schema; the tables of versions are called rows_<version>.
VIEW = "rows"
#: How the comment of the view begins, which tells the version.
_MARK = "refold: rows of the live version "
#: Sessions that a login may have at once: the read store is everybody's.
CONNECTIONS = 20
#: A transaction that does nothing holds up swaps and the vacuum.
_IDLE_SECONDS = 60


def login(database: str, schema: str) -> str:
    """Return the name of the login of those who read the projection in `schema` in SQL."""
    return names.resource_role(database, schema, "sql")


@asynccontextmanager
async def soon(conn: AsyncConnection[Any], what: str) -> AsyncIterator[None]:
    """Wait only for a moment for locks on `what`, in the caller's transaction.

    Raises:
        BusyError: others hold it for longer.
    """
    await conn.execute(LOCK_TIMEOUT)
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        raise BusyError(
            f"{what} is in use by a transaction that has read it and hasn't ended: it is tried again until that ends; "
            "pg_stat_activity shows the sessions, of who reads in SQL with a usename that ends in ':sql'"
        ) from error
    await conn.execute("set local lock_timeout = default")


async def shown(conn: AsyncConnection[Any], schema: str) -> str | None:
    """Return the version whose rows the view names; None where there is no view of ours."""
    cursor = await conn.execute(
        "select obj_description(to_regclass(%s), 'pg_class')", [sql.Identifier(schema, VIEW).as_string(conn)]
    )
    row = await cursor.fetchone()
    return None if row is None or row[0] is None else str(row[0]).removeprefix(_MARK)


async def show(conn: AsyncConnection[Any], schema: str, version: str, table: str, columns: Sequence[str]) -> None:
    """Let the view name the rows of `version`, in the caller's transaction.

    Args:
        conn: an administrator's connection.
        schema: of the projection.
        version: which is made the live one in the same transaction, or is.
        table: that of its rows.
        columns: those that it declares.

    Raises:
        BusyError: others read the view for long.
        ReadStoreError: something of somebody else's depends on the view, and its columns change.
    """
    view = sql.Identifier(schema, VIEW)
    select = sql.SQL(
        "select key, {columns} from {table} where (select case when live = {version} then true else "
        # A cast that fails is an error with a text of our own.
        "('this transaction began before version ' || coalesce(live, '') || ' gave way to version ' || {version} || "
        "': begin another one')::boolean end from {pointer})"
    ).format(
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        table=sql.Identifier(schema, table),
        version=sql.Literal(version),
        pointer=sql.Identifier(schema, "pointer"),
    )
    async with soon(conn, f"the view {schema}.{VIEW}"):
        try:
            async with conn.transaction():  # a savepoint
                await conn.execute(sql.SQL("create or replace view {} as {}").format(view, select))
        except psycopg.errors.InvalidTableDefinition:  # other columns, or in another order
            try:
                await conn.execute(sql.SQL("drop view {}").format(view))
            except psycopg.errors.DependentObjectsStillExist as error:
                raise ReadStoreError(
                    f"version {version} has other columns than the live one, and the view {schema}.{VIEW} can't be "
                    f"made anew: {error.diag.message_detail}; drop that"
                ) from error
            await conn.execute(sql.SQL("create view {} as {}").format(view, select))
    await conn.execute(sql.SQL("comment on view {} is {}").format(view, sql.Literal(_MARK + version)))
    await grant(conn, schema)


async def grant(conn: AsyncConnection[Any], schema: str) -> None:
    """Let the login read the view, in the caller's transaction; where there are both."""
    role = login(conn.info.dbname, schema)
    cursor = await conn.execute(
        "select r.oid, to_regclass(%(view)s)::oid, has_table_privilege(r.oid, to_regclass(%(view)s), 'select') "
        "from pg_roles r where rolname = %(role)s",
        {"view": sql.Identifier(schema, VIEW).as_string(conn), "role": role},
    )
    row = await cursor.fetchone()
    if row is None or row[1] is None or row[2]:
        return
    await conn.execute(
        sql.SQL("grant usage on schema {schema} to {role}; grant select on {view} to {role}").format(
            schema=sql.Identifier(schema), view=sql.Identifier(schema, VIEW), role=sql.Identifier(role)
        )
    )


async def ensure_login(conn: AsyncConnection[Any], schema: str, password: str) -> bool:
    """Make the login and let it read the view, in the caller's transaction; return whether it was changed."""
    role = login(conn.info.dbname, schema)
    changed = await roles.ensure_login(conn, role, password)
    if changed:
        await conn.execute(
            sql.SQL(
                "grant connect on database {database} to {role}; alter role {role} connection limit {connections}; "
                "alter role {role} set search_path = {schema}; "
                "alter role {role} set default_transaction_read_only = on; "
                "alter role {role} set idle_in_transaction_session_timeout = {idle}"
            ).format(
                database=sql.Identifier(conn.info.dbname),
                role=sql.Identifier(role),
                connections=sql.Literal(CONNECTIONS),
                schema=sql.Identifier(schema),
                idle=sql.Literal(f"{_IDLE_SECONDS}s"),
            )
        )
    await grant(conn, schema)
    return changed


async def drop_login(conn: AsyncConnection[Any], schema: str) -> bool:
    """Take all rights from the login and drop it, in the caller's transaction; return whether there was one."""
    role = login(conn.info.dbname, schema)
    cursor = await conn.execute("select from pg_roles where rolname = %s", [role])
    if await cursor.fetchone() is None:
        return False
    await conn.execute(
        sql.SQL(
            "revoke connect on database {database} from {role}; "
            "revoke all on all tables in schema {schema} from {role}; revoke all on schema {schema} from {role}"
        ).format(database=sql.Identifier(conn.info.dbname), schema=sql.Identifier(schema), role=sql.Identifier(role))
    )
    return await roles.drop_login(conn, role)
