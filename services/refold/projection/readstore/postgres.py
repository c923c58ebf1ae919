"""The PostgreSQL read store as the operator sees it: claims, versions, the live pointer, logins, status.

All functions take an administrator's async connection: no superuser, but a role with CREATEROLE that owns the database
(PostgreSQL 15 and later). Each runs in a transaction of its own, is idempotent, and may run in two processes at once:
those that change something hold an advisory lock of the projection until they commit.

A projection has a schema (`names.read_schema`) with the tables that docs/architecture.md shows. Who owns the schema
stands in `refold_read.projections`, so that nothing that someone else made is ever taken over or dropped.
"""

import re
from collections.abc import Collection
from decimal import Decimal
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from refold import names
from refold.eventstore import roles
from refold.eventstore.online import LOCK_TIMEOUT, giving_way
from refold.projection.definition import (
    Column,
    ColumnType,
    Definition,
    VersionDefinition,
    default_of,
    stamped,
)
from refold.projection.readstore import (
    Applied,
    ConflictError,
    NotFoundError,
    PartitionStatus,
    ProjectionStatus,
    VersionStatus,
    handover,
    postgres_sql,
)
from refold.projection.readstore.handover import Standing
from refold.projection.readstore.postgres_parked import MARK, TABLES

_LOCK = 0x5265666D  # "Refm", the first of two int4 keys; the second is a hash of the schema, or 0 for the whole store
_VERSION = re.compile(r"[a-z0-9]{1,40}")
#: Each look at the other version sees what is committed by then; and the server ends the transaction of an operator
#: that stands still (SIGSTOP) while it holds the live version back.
_HOLDING = "set transaction isolation level read committed; set local idle_in_transaction_session_timeout = '5s'"

#: PostgreSQL's type of a column; text is collated "C", so that order and cursors are the same everywhere.
TYPES = {
    ColumnType.TEXT: 'text collate "C"',
    ColumnType.INTEGER: "bigint",
    ColumnType.NUMERIC: "numeric",
    ColumnType.BOOLEAN: "boolean",
    ColumnType.TIMESTAMP: "timestamptz",
    ColumnType.JSON: "jsonb",
}

_INSTALL = """
create schema if not exists refold_read;
revoke all on schema refold_read from public;
create table if not exists refold_read.projections (
  namespace text not null,
  name      text not null,
  uid       text,                  -- of the Projection that claims it; null once released (deletionPolicy: Retain)
  schema    text not null unique,
  primary key (namespace, name)
);
"""

#: Makes the schema of one projection, its name as `schema`.
SCHEMA = """
create schema {schema};
create table {schema}.versions (
  version    text primary key,
  definition jsonb not null,
  created_at timestamptz not null default now(),
  retired_at timestamptz
);
create table {schema}.pointer (
  "only" boolean primary key default true check ("only"),
  live   text references {schema}.versions
);
insert into {schema}.pointer (live) values (null);
create table {schema}.positions (
  version      text not null references {schema}.versions on delete cascade,
  incarnation  text not null,
  partition    integer not null,
  position     bigint not null default 0 check (position >= 0),
  recorded_at  timestamptz,
  topic_id     text,
  kafka_offset bigint,
  head         bigint not null default 0,
  lag_seconds  double precision not null default 0,
  seen_at      timestamptz,
  stopped      text,
  primary key (version, incarnation, partition)
) with (
  fillfactor = 50,
  autovacuum_vacuum_threshold = 500,
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_cost_delay = 0
);
create table {schema}.parked (
  id          bigint generated always as identity primary key,
  version     text not null references {schema}.versions on delete cascade,
  incarnation text not null,
  partition   integer not null,
  position    bigint not null,
  key         text collate "C",
  subject     text collate "C" not null,
  error       text not null,
  parked_at   timestamptz not null default now()
);
create index parked_event on {schema}.parked (version, incarnation, partition, position);
"""


def rows_table(version: str) -> str:
    """Return the name of the table that holds a version's rows.

    Raises:
        ValueError: not a version's name.
    """
    if not _VERSION.fullmatch(version):
        raise ValueError(f"not the name of a projection's version: {version!r}")
    return f"rows_{version}"


def default_literal(column: Column) -> sql.Composed:
    """Return the column's default as SQL."""
    value = default_of(column)
    # A number stands in quotes, since -9223372036854775808 without them is no bigint to PostgreSQL.
    literal = sql.Literal(str(value) if isinstance(value, int | Decimal) else value)
    return sql.SQL("({}::{})").format(literal, sql.SQL(TYPES[column.type]))


def stamp_column(column: str) -> str:
    """Return the hidden column with the stamp of the event that set `column`, in rows fed by several partitions."""
    return f"~{column}"


async def install(conn: AsyncConnection[Any]) -> None:
    """Make what the read store's database needs before the first projection."""
    async with conn.transaction():
        await _lock(conn, None)
        await conn.execute(_INSTALL)


async def claim_projection(conn: AsyncConnection[Any], *, namespace: str, name: str, uid: str) -> str:
    """Claim the projection's schema for the resource `uid`, make the schema where it is missing, return its name.

    A projection that was released is taken back, with its rows. Tables that an earlier Refold made get what they lack.

    Raises:
        ConflictError: a resource of another uid holds the claim, or the schema exists and isn't Refold's.
        refold.eventstore.errors.EventStoreError: the tables were in use for long, and lack what is new.
    """
    schema = names.read_schema(namespace, name)
    await _claim(conn, schema, namespace=namespace, name=name, uid=uid)
    cursor = await conn.execute("select to_regclass(%s)", [sql.Identifier(schema, "discarded").as_string(conn)])
    row = await cursor.fetchone()
    if row is None or row[0] is None:

        async def add() -> None:
            await conn.execute(LOCK_TIMEOUT)
            await _lock(conn, schema)
            await conn.execute(sql.SQL(TABLES).format(schema=sql.Identifier(schema)))

        await giving_way(conn, add)
    return schema


async def _claim(conn: AsyncConnection[Any], schema: str, *, namespace: str, name: str, uid: str) -> None:
    async with conn.transaction():
        await _lock(conn, schema)
        cursor = await conn.execute(
            "select namespace, name, uid from refold_read.projections where schema = %s", [schema]
        )
        claim = await cursor.fetchone()
        if claim is not None:
            if tuple(claim[:2]) != (namespace, name) or claim[2] not in (None, uid):
                raise ConflictError(
                    f"the read model's schema {schema} belongs to the Projection {claim[0]}/{claim[1]} with uid "
                    f"{claim[2]}; delete that one first, or choose another name"
                )
            if claim[2] is None:
                await conn.execute("update refold_read.projections set uid = %s where schema = %s", [uid, schema])
            await _upgrade(conn, schema)
            return
        cursor = await conn.execute("select from pg_namespace where nspname = %s", [schema])
        if await cursor.fetchone() is not None:
            raise ConflictError(
                f"the schema {schema} exists in the read store's database and wasn't made by Refold; rename or drop "
                "it, or choose another name for the Projection"
            )
        await conn.execute(sql.SQL(SCHEMA).format(schema=sql.Identifier(schema)))
        await conn.execute(
            "insert into refold_read.projections (namespace, name, uid, schema) values (%s, %s, %s, %s)",
            [namespace, name, uid, schema],
        )


async def release_projection(conn: AsyncConnection[Any], *, namespace: str, name: str, uid: str) -> bool:
    """Give up the claim of `uid` and leave all data (deletionPolicy: Retain); return whether there was such a claim.

    The login of those who read in SQL goes, since its Secret does.
    """
    async with conn.transaction():
        await _lock(conn, None)
        cursor = await conn.execute(
            "update refold_read.projections set uid = null where namespace = %s and name = %s and uid = %s",
            [namespace, name, uid],
        )
        if cursor.rowcount == 1:
            await postgres_sql.drop_login(conn, names.read_schema(namespace, name))
    return cursor.rowcount == 1


async def ensure_version(
    conn: AsyncConnection[Any], *, namespace: str, name: str, version: str, definition: VersionDefinition
) -> bool:
    """Make the version's table, positions and stored definition where they are missing; the very first goes live.

    Indexes aren't part of a version: on a table that exists they are created and dropped as the definition says
    (concurrently, so that neither projectors nor readers wait; this needs a connection in autocommit mode).

    A version whose table somebody has dropped is folded again from the beginning, the live one before its readers.

    Returns:
        Whether the version, or its table, was made now.

    Raises:
        NotFoundError: the projection isn't claimed.
    """
    schema = names.read_schema(namespace, name)
    table = rows_table(version)
    async with conn.transaction():
        await _lock(conn, schema)
        await _must_be_claimed(conn, namespace, name)
        made = await _insert_version(conn, schema, version, definition)
        if not made and await _lacks_rows(conn, schema, table):
            await _begin_anew(conn, schema, version, definition)
            made = True
        if made:
            await conn.execute(_create_rows(schema, table, definition.definition))
            for column in definition.definition.columns:
                if column.index:
                    await conn.execute(_create_index(schema, table, column, concurrently=False))
            await _grant(conn, schema)
        await conn.execute(
            sql.SQL("update {}.pointer set live = %s where live is null").format(sql.Identifier(schema)), [version]
        )
        await _show_live(conn, schema)
    if not made:
        await _reconcile_indexes(conn, schema, table, definition.definition.columns)
    return made


async def ensure_logins(
    conn: AsyncConnection[Any], *, namespace: str, name: str, projector_password: str, query_password: str
) -> bool:
    """Make the projection's two logins and grant what they need, in its schema alone.

    The names are `names.resource_role(database, read_schema, "projector")` (reads and writes rows, positions and parked
    events) and the same with "query" (reads, and marks parked events). Passwords must be random, with at least 128
    bits.

    Returns:
        Whether a login was changed.

    Raises:
        NotFoundError: the projection isn't claimed.
        refold.eventstore.errors.ConflictError: a role of that name exists and isn't Refold's.
    """
    schema = names.read_schema(namespace, name)
    projector, query = logins(conn.info.dbname, schema)
    async with conn.transaction():
        # GRANT on the database changes one row for all projections, so this lock is the whole store's
        await _lock(conn, None)
        await _must_be_claimed(conn, namespace, name)
        changed = [
            await roles.ensure_login(conn, projector, projector_password),
            await roles.ensure_login(conn, query, query_password),
        ]
        await _grant(conn, schema)
    return any(changed)


async def ensure_sql_login(conn: AsyncConnection[Any], *, namespace: str, name: str, password: str) -> bool:
    """Make the login that may read the view of the live version's rows and nothing else; return whether it changed.

    Args:
        conn: an administrator's connection.
        namespace: the projection's namespace.
        name: the projection's name.
        password: random, with at least 128 bits.

    Raises:
        NotFoundError: the projection isn't claimed.
        refold.eventstore.errors.ConflictError: a role of that name exists and isn't Refold's.
    """
    async with conn.transaction():
        await _lock(conn, None)
        await _must_be_claimed(conn, namespace, name)
        return await postgres_sql.ensure_login(conn, names.read_schema(namespace, name), password)


async def drop_sql_login(conn: AsyncConnection[Any], *, namespace: str, name: str) -> bool:
    """Drop the login of those who read in SQL; return whether there was one."""
    schema = names.read_schema(namespace, name)
    cursor = await conn.execute(
        "select from pg_roles where rolname = %s", [postgres_sql.login(conn.info.dbname, schema)]
    )
    if await cursor.fetchone() is None:
        return False
    async with conn.transaction():
        await _lock(conn, None)
        return await postgres_sql.drop_login(conn, schema)


def logins(database: str, schema: str) -> tuple[str, str]:
    """Return the names of the projector's and of the query service's login of the projection in `schema`."""
    return names.resource_role(database, schema, "projector"), names.resource_role(database, schema, "query")


async def try_swap(conn: AsyncConnection[Any], *, namespace: str, name: str, version: str) -> bool:
    """Make `version` the live one if no reader would go back in time by it; return whether it is live now.

    It must be at or beyond the live version in every partition that both fold, have seen the head of those that only it
    folds, and have no more parked or discarded. Where it is near, the live version is held back for a moment
    (`handover`): its positions are locked, so that they can't move on.
    The view of those who read in SQL moves with the pointer.

    Raises:
        BusyError: transactions that have read the view haven't ended.
        ReadStoreError: something of somebody else's depends on the view, and its columns change.
        NotFoundError: there is no such version.
    """
    schema = sql.Identifier(names.read_schema(namespace, name))
    await _must_be_claimed(conn, namespace, name)
    if not await handover.near(lambda: _standing(conn, schema, version)):
        return False
    async with conn.transaction() as transaction:
        await conn.execute(_HOLDING)
        await _lock(conn, names.read_schema(namespace, name))
        await _must_be_claimed(conn, namespace, name)
        cursor = await conn.execute(
            sql.SQL("select version from {}.versions where version = %s").format(schema), [version]
        )
        if await cursor.fetchone() is None:
            raise NotFoundError(f"the projection {namespace}/{name} has no version {version} in the read store")
        cursor = await conn.execute(sql.SQL("select live from {}.pointer for update").format(schema))
        row = await cursor.fetchone()
        live = row[0] if row else None
        if live == version:
            return True
        # Before the live version is held back: its projectors needn't wait for who reads it in SQL.
        await _show(conn, names.read_schema(namespace, name), version)
        if live is not None and not await _follows(conn, schema, live, version):
            raise psycopg.Rollback(transaction)
        await conn.execute(sql.SQL("update {}.pointer set live = %s").format(schema), [version])
        await conn.execute(
            sql.SQL(
                "update {}.versions set retired_at = case when version = %(live)s then now() end "
                "where version in (%(live)s, %(version)s)"
            ).format(schema),
            {"live": live, "version": version},
        )
        return True
    return False


async def drop_version(conn: AsyncConnection[Any], *, namespace: str, name: str, version: str) -> bool:
    """Drop a version's rows, positions and parked events; return whether there was such a version.

    Raises:
        BusyError: transactions that have read its rows haven't ended.
        ConflictError: it is the live one.
    """
    schema = names.read_schema(namespace, name)
    async with conn.transaction():
        await _lock(conn, schema)
        if not await _claimed(conn, namespace, name):
            return False
        cursor = await conn.execute(sql.SQL("select live from {}.pointer for update").format(sql.Identifier(schema)))
        row = await cursor.fetchone()
        if row and row[0] == version:
            raise ConflictError(f"the version {version} of the projection {namespace}/{name} is live: readers see it")
        table = rows_table(version)
        async with postgres_sql.soon(conn, f"the table {schema}.{table}"):
            await conn.execute(sql.SQL("drop table if exists {}").format(sql.Identifier(schema, table)))
        cursor = await conn.execute(
            sql.SQL("delete from {}.versions where version = %s").format(sql.Identifier(schema)), [version]
        )
    return cursor.rowcount == 1


async def drop_projection(conn: AsyncConnection[Any], *, namespace: str, name: str, uid: str) -> bool:
    """Drop all that the projection has in the read store, its logins too; return whether it was there.

    Raises:
        BusyError: transactions that have read it haven't ended.
        ConflictError: a resource of another uid holds the claim.
    """
    schema = names.read_schema(namespace, name)
    async with conn.transaction():
        await _lock(conn, None)
        await _lock(conn, schema)
        cursor = await conn.execute(
            "select uid from refold_read.projections where namespace = %s and name = %s", [namespace, name]
        )
        claim = await cursor.fetchone()
        if claim is None:
            return False
        if claim[0] not in (None, uid):
            raise ConflictError(
                f"the read model of {namespace}/{name} belongs to a Projection with uid {claim[0]}, not {uid}"
            )
        await postgres_sql.drop_login(conn, schema)
        async with postgres_sql.soon(conn, f"the read model {schema}"):
            await conn.execute(sql.SQL("drop schema if exists {} cascade").format(sql.Identifier(schema)))
        pair = logins(conn.info.dbname, schema)
        for role in await _existing(conn, pair):
            await conn.execute(
                sql.SQL("revoke connect, temporary on database {} from {}").format(
                    sql.Identifier(conn.info.dbname), sql.Identifier(role)
                )
            )
        await roles.drop_roles(conn, pair)
        await conn.execute("delete from refold_read.projections where schema = %s", [schema])
    return True


async def status(conn: AsyncConnection[Any], *, namespace: str, name: str) -> ProjectionStatus:
    """Return how far every version is, from one snapshot.

    Raises:
        NotFoundError: the projection isn't claimed.
    """
    schema = sql.Identifier(names.read_schema(namespace, name))
    async with conn.transaction():
        await _must_be_claimed(conn, namespace, name)
        cursor = conn.cursor(row_factory=dict_row)
        await cursor.execute(
            sql.SQL(
                "select v.version, v.created_at, v.retired_at, (select live from {0}.pointer) as live, "
                "extract(epoch from now() - v.retired_at)::float8 as retired_seconds, "
                "(select count(*) from {0}.parked p where p.version = v.version) as parked, "
                "(select count(*) from {0}.discarded d where d.version = v.version) as discarded, "
                "(select error from {0}.parked p where p.version = v.version order by id limit 1) as parked_error, "
                "incarnation, partition, position, recorded_at, head, lag_seconds, seen_at, stopped "
                "from {0}.versions v left join {0}.positions p on p.version = v.version "
                "order by v.created_at, v.version, incarnation, partition"
            ).format(schema)
        )
        versions: dict[str, VersionStatus] = {}
        live: str | None = None
        for row in await cursor.fetchall():
            live = row["live"]
            version = versions.setdefault(
                row["version"],
                VersionStatus(
                    version=row["version"],
                    live=row["version"] == live,
                    created_at=row["created_at"],
                    retired_at=row["retired_at"],
                    retired_seconds=row["retired_seconds"],
                    parked=row["parked"],
                    parked_error=row["parked_error"],
                    discarded=row["discarded"],
                    partitions=[],
                ),
            )
            if row["incarnation"] is not None:
                fields = {field: row[field] for field in PartitionStatus.__struct_fields__}
                version.partitions.append(PartitionStatus(**fields))
    return ProjectionStatus(live=live, versions=versions)


async def applied(
    conn: AsyncConnection[Any], projections: Collection[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, list[Applied]]]:
    """Return how far the versions of many projections are, by (namespace, name) and version, in one query.

    One that isn't in this read store is left out. Where one is dropped meanwhile, the query fails as a whole.
    """
    schemas = {names.read_schema(namespace, name): (namespace, name) for namespace, name in projections}
    cursor = await conn.execute(
        "select n.nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace "
        "where c.relname = 'positions' and n.nspname = any(%s)",
        [list(schemas)],
    )
    there = [schema for (schema,) in await cursor.fetchall()]
    found: dict[tuple[str, str], dict[str, list[Applied]]] = {}
    if not there:
        return found
    one = sql.SQL(
        "select {name}, version, incarnation, partition, position, head, stopped is not null, "
        "exists (select from {schema}.parked p where p.version = o.version) from {schema}.positions o"
    )
    cursor = await conn.execute(
        sql.SQL(" union all ").join(
            one.format(name=sql.Literal(schema), schema=sql.Identifier(schema)) for schema in there
        )
    )
    async for schema, version, *row in cursor:
        found.setdefault(schemas[schema], {}).setdefault(version, []).append(Applied(*row))
    return found


async def _upgrade(conn: AsyncConnection[Any], schema: str) -> None:
    """Give a projection of an earlier Refold what has been added since; its versions go on meanwhile."""
    versions = sql.Identifier(schema, "versions")
    cursor = await conn.execute(
        "select from pg_attribute where attrelid = %s::regclass and attname = 'retired_at'", [versions.as_string(conn)]
    )
    if await cursor.fetchone() is None:
        await conn.execute(sql.SQL("alter table {} add column retired_at timestamptz").format(versions))


async def _lock(conn: AsyncConnection[Any], schema: str | None) -> None:
    """Hold the lock of a projection's schema, or of the whole read store, until the transaction ends."""
    await conn.execute(
        "select pg_advisory_xact_lock(%s, case when %s::text is null then 0 else hashtext(%s) end)",
        [_LOCK, schema, schema],
    )


async def _claimed(conn: AsyncConnection[Any], namespace: str, name: str) -> bool:
    cursor = await conn.execute(
        "select from refold_read.projections where namespace = %s and name = %s", [namespace, name]
    )
    return await cursor.fetchone() is not None


async def _show_live(conn: AsyncConnection[Any], schema: str) -> None:
    """Let the view name the live version's rows, where it doesn't: it is new, or was dropped by somebody else."""
    cursor = await conn.execute(sql.SQL("select live from {}.pointer").format(sql.Identifier(schema)))
    row = await cursor.fetchone()
    if row is not None and row[0] is not None and await postgres_sql.shown(conn, schema) != row[0]:
        await _show(conn, schema, row[0])


async def _show(conn: AsyncConnection[Any], schema: str, version: str) -> None:
    cursor = await conn.execute(
        sql.SQL("select definition::text from {}.versions where version = %s").format(sql.Identifier(schema)), [version]
    )
    row = await cursor.fetchone()
    assert row is not None, "looked at before, under the projection's lock"
    columns = [column.name for column in VersionDefinition.from_json(row[0]).definition.columns]
    await postgres_sql.show(conn, schema, version, rows_table(version), columns)


async def _must_be_claimed(conn: AsyncConnection[Any], namespace: str, name: str) -> None:
    if not await _claimed(conn, namespace, name):
        raise NotFoundError(f"the read store holds no projection {namespace}/{name}; claim it first")


async def _insert_version(conn: AsyncConnection[Any], schema: str, version: str, definition: VersionDefinition) -> bool:
    """Store the definition and positions at 0; return whether the version is new.

    Where it has ends, they are the heads from the beginning: there is nothing else to see.
    """
    text = definition.to_json()
    cursor = await conn.execute(
        sql.SQL("insert into {}.versions (version, definition) values (%s, %s) on conflict do nothing").format(
            sql.Identifier(schema)
        ),
        [version, text],
    )
    if cursor.rowcount == 0:
        await conn.execute(
            sql.SQL("update {}.versions set definition = %s where version = %s and definition <> %s::jsonb").format(
                sql.Identifier(schema)
            ),
            [text, version, text],
        )
        return False
    await _insert_positions(conn, schema, version, definition)
    return True


async def _insert_positions(
    conn: AsyncConnection[Any], schema: str, version: str, definition: VersionDefinition
) -> None:
    for stream in definition.streams:
        heads = definition.ends.get(stream.incarnation, [None] * stream.partitions)
        await conn.execute(
            sql.SQL(
                "insert into {}.positions (version, incarnation, partition, head, seen_at) "
                "select %s, %s, number - 1, coalesce(head, 0), case when head is not null then now() end "
                "from unnest(%s::bigint[]) with ordinality as ends (head, number)"
            ).format(sql.Identifier(schema)),
            [version, stream.incarnation, heads],
        )


async def _lacks_rows(conn: AsyncConnection[Any], schema: str, table: str) -> bool:
    cursor = await conn.execute("select to_regclass(%s) is null", [sql.Identifier(schema, table).as_string(conn)])
    row = await cursor.fetchone()
    assert row is not None, "a select without a table has one row"
    return bool(row[0])


async def _begin_anew(conn: AsyncConnection[Any], schema: str, version: str, definition: VersionDefinition) -> None:
    """Take a version back to before its first event; its projectors find that their positions aren't there any more."""
    for table in ("parked", "positions"):
        await conn.execute(
            sql.SQL("delete from {} where version = %s").format(sql.Identifier(schema, table)), [version]
        )
    # The trace stays, as that of a version that is gone: what is parked again is discarded again by it.
    await conn.execute(
        sql.SQL("update {} set version = %s where version = %s").format(sql.Identifier(schema, "discarded")),
        [f"{version} before its rows were dropped", version],
    )
    await _insert_positions(conn, schema, version, definition)


def _create_rows(schema: str, table: str, definition: Definition) -> sql.Composed:
    columns: list[sql.Composable] = [sql.SQL('key text collate "C" primary key')]
    columns += [
        sql.SQL("{} {} default {}{}").format(
            sql.Identifier(column.name),
            sql.SQL(TYPES[column.type]),
            default_literal(column),
            sql.SQL("" if column.nullable else " not null"),
        )
        for column in definition.columns
    ]
    columns += [
        sql.SQL('{} text collate "C"').format(sql.Identifier(stamp_column(column))) for column in stamped(definition)
    ]
    # Room in each page lets an update that changes no indexed column stay in it (HOT)
    return sql.SQL("create table {} ({}) with (fillfactor = 85)").format(
        sql.Identifier(schema, table), sql.SQL(", ").join(columns)
    )


def _index(table: str, column: str) -> str:
    return names.pg_identifier(f"{table}~{column}")


def _create_index(schema: str, table: str, column: Column, *, concurrently: bool) -> sql.Composed:
    # the key beside the column gives a page of one value its order and its cursor
    return sql.SQL("create index {} {} on {} ({}, key)").format(
        sql.SQL("concurrently" if concurrently else ""),
        sql.Identifier(_index(table, column.name)),
        sql.Identifier(schema, table),
        sql.Identifier(column.name),
    )


async def _reconcile_indexes(conn: AsyncConnection[Any], schema: str, table: str, columns: list[Column]) -> None:
    wanted = {_index(table, column.name): column for column in columns if column.index}
    cursor = await conn.execute(
        "select c.relname, i.indisvalid from pg_index i join pg_class c on c.oid = i.indexrelid "
        "where i.indrelid = %s::regclass and not i.indisprimary",
        [sql.Identifier(schema, table).as_string(conn)],
    )
    known: dict[str, bool] = {row[0]: row[1] for row in await cursor.fetchall()}
    for index, valid in known.items():
        # an invalid one was left by a build that broke off
        if index not in wanted or not valid:
            await conn.execute(sql.SQL("drop index concurrently if exists {}").format(sql.Identifier(schema, index)))
    for index, column in wanted.items():
        if not known.get(index, False):
            await conn.execute(_create_index(schema, table, column, concurrently=True))


async def _existing(conn: AsyncConnection[Any], wanted: tuple[str, ...]) -> list[str]:
    cursor = await conn.execute("select rolname::text from pg_roles where rolname = any(%s::name[])", [list(wanted)])
    return [row[0] for row in await cursor.fetchall()]


#: Whether a role has all that it is granted below; `%(writes)s` for the projector. The other may update `%(mark)s`.
_GRANTED = """
select bool_and(
  has_schema_privilege(r.rolname, n.oid, 'usage')
  and has_database_privilege(r.rolname, current_database(), 'connect')
  and has_table_privilege(r.rolname, c.oid, 'select')
  and (%(writes)s or c.relname <> 'parked' or (
    select bool_and(has_column_privilege(r.rolname, c.oid, mark, 'update')) from unnest(%(mark)s::text[]) mark))
  and (not %(writes)s
    or has_database_privilege(r.rolname, current_database(), 'temporary')
    and (has_table_privilege(r.rolname, c.oid, 'insert') or c.relname !~ '^(rows_|parked$|discarded$)')
    and (has_table_privilege(r.rolname, c.oid, 'update') or c.relname !~ '^(rows_|parked$|positions$)')))
from pg_roles r, pg_namespace n join pg_class c on c.relnamespace = n.oid and c.relkind = 'r'
where r.rolname = %(role)s and n.nspname = %(schema)s
"""


async def _grant(conn: AsyncConnection[Any], schema: str) -> None:
    """Grant the projection's logins what they need on all its tables; a login that isn't made yet is left out."""
    projector, query = logins(conn.info.dbname, schema)
    for role in await _existing(conn, (projector, query)):
        writes = role == projector
        cursor = await conn.execute(_GRANTED, {"role": role, "schema": schema, "writes": writes, "mark": list(MARK)})
        row = await cursor.fetchone()
        if row is not None and row[0]:
            continue
        # temporary: a batch is staged in a temporary table
        statement = (
            "grant {connect} on database {database} to {role}; grant usage on schema {schema} to {role}; "
            "grant select on {all} to {role}"
        )
        if writes:
            statement += (
                "; grant update on {positions} to {role}; grant insert, update, delete on {tables} to {role}; "
                "grant insert on {discarded} to {role}"
            )
        else:
            statement += "; grant update ({mark}) on {parked} to {role}"
        cursor = await conn.execute(sql.SQL("select version from {}.versions").format(sql.Identifier(schema)))
        tables = ["parked", *(rows_table(row[0]) for row in await cursor.fetchall())]
        # not the view, which is for those who read in SQL
        cursor = await conn.execute(
            "select relname::text from pg_class where relnamespace = %s::regnamespace and relkind = 'r' order by 1",
            [sql.Identifier(schema).as_string(conn)],
        )
        everything = [row[0] for row in await cursor.fetchall()]
        await conn.execute(
            sql.SQL(statement).format(
                connect=sql.SQL("connect, temporary" if writes else "connect"),
                database=sql.Identifier(conn.info.dbname),
                role=sql.Identifier(role),
                schema=sql.Identifier(schema),
                positions=sql.Identifier(schema, "positions"),
                parked=sql.Identifier(schema, "parked"),
                discarded=sql.Identifier(schema, "discarded"),
                mark=sql.SQL(", ").join(map(sql.Identifier, MARK)),
                tables=sql.SQL(", ").join(sql.Identifier(schema, table) for table in tables),
                all=sql.SQL(", ").join(sql.Identifier(schema, table) for table in everything),
            )
        )


async def _follows(conn: AsyncConnection[Any], schema: sql.Identifier, live: str, version: str) -> bool:
    """Hold the live version back and return whether `version` came to where it stands; locks the live positions."""
    await conn.execute(
        sql.SQL("select from {}.positions where version = %s order by incarnation, partition for update").format(
            schema
        ),
        [live],
    )

    async def there() -> bool:
        return (await _standing(conn, schema, version)).behind == 0

    return await handover.within(handover.HELD_SECONDS, there)


async def _standing(conn: AsyncConnection[Any], schema: sql.Identifier, version: str) -> Standing:
    """Return how `version` stands beside the live one, from one snapshot."""
    cursor = await conn.execute(
        sql.SQL(
            "select n.incarnation, n.partition, n.position, "
            "  coalesce(l.position, case when n.seen_at is not null then n.head end), "
            "  (select count(*) from {0}.parked where version = n.version)"
            "  + (select count(*) from {0}.discarded where version = n.version)"
            "  > (select count(*) from {0}.parked where version = live)"
            "  + (select count(*) from {0}.discarded where version = live) "
            "from {0}.pointer join {0}.positions n on n.version = %s and live <> n.version "
            "left join {0}.positions l"
            "  on l.version = live and l.incarnation = n.incarnation and l.partition = n.partition"
        ).format(schema),
        [version],
    )
    rows = await cursor.fetchall()
    return Standing(
        applied={(row[0], row[1]): row[2] for row in rows},
        wanted={(row[0], row[1]): row[3] for row in rows},
        lacks_more=any(row[4] for row in rows),
    )
