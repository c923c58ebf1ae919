"""What somebody else has changed in streams' schemas: found by one query, and put right where history is whole.

Roles, privileges and triggers are made again. A schema, table or function that is gone is told: only a backup has it.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from psycopg import AsyncConnection, sql

from refold import names
from refold.eventstore import roles
from refold.eventstore.catalog import Stream, as_owner, reader_role, writer_role

_FUNCTIONS = ["append", "append_all", "append_group", "append_one", "refuse_value"]
#: Of `append`, `append_all` in two forms, `append_group`, `append_one` and `refuse_value`: by the stream's migration.
_FUNCTIONS_OF = {1: 0, 2: 2, 3: 4, 4: 5, 5: 6}

_LOOK = """
with asked as (
  select * from unnest(%(streams)s::int[], %(schemas)s::text[], %(partitions)s::int[], %(writers)s::text[],
                       %(readers)s::text[]) as t (stream, schema, partitions, writer, reader)
), functions as materialized (  -- once for all: each stream has functions of the same names
  select pronamespace, array_agg(oid) as oids, array_agg(pronargs) as arguments from pg_proc
  where proname = any (%(functions)s) group by pronamespace
), found as (
  select asked.*, n.oid as schema_oid, e.oid as events_oid, w.oid as writer_oid, r.oid as reader_oid,
         s.oid as eventstore_oid, y.oid as relay_oid, f.oids as functions, f.arguments
  from asked
  left join pg_namespace n on n.nspname = asked.schema
  left join functions f on f.pronamespace = n.oid
  left join pg_class e on e.relnamespace = n.oid and e.relname = 'events'
  left join pg_roles w on w.rolname = asked.writer
  left join pg_roles r on r.rolname = asked.reader
  left join pg_roles s on s.rolname = %(eventstore)s
  left join pg_roles y on y.rolname = %(relay)s
)
select stream, schema_oid is not null, events_oid is not null,
  (select count(*) from pg_inherits i where i.inhparent = events_oid) = partitions,
  coalesce(cardinality(functions), 0),
  array_remove(array[
    case when writer_oid is null then 'role ' || writer end,
    case when reader_oid is null then 'role ' || reader end,
    case when coalesce(has_schema_privilege(writer_oid, schema_oid, 'usage')
                   and has_schema_privilege(reader_oid, schema_oid, 'usage')
                   and has_schema_privilege(eventstore_oid, schema_oid, 'usage')
                   and has_schema_privilege(relay_oid, schema_oid, 'usage'), false) is false
         then 'use of the schema' end,
    case when coalesce(has_table_privilege(reader_oid, events_oid, 'select')
                   and has_table_privilege(eventstore_oid, events_oid, 'select')
                   and has_table_privilege(relay_oid, events_oid, 'select'), false) is false
         then 'reading the events' end,
    case when exists (
      select from unnest(functions, arguments) as p (function, arguments)
      where coalesce(has_function_privilege(
        case when p.arguments = 1 then writer_oid else eventstore_oid end, p.function, 'execute'), false) is false
    ) then 'calling the functions' end,
    case when (
      select count(*) from pg_trigger t
      where t.tgname = 'append_only' and t.tgenabled = 'A' and not t.tgisinternal
        and t.tgrelid = any (array(select i.inhrelid from pg_inherits i where i.inhparent = events_oid) || events_oid)
    ) <> partitions + 1 then 'triggers that refuse changes' end
  ], null)
from found
"""


class Found(msgspec.Struct, frozen=True):
    """What isn't as it was made.

    Attributes:
        lost: what can't be made again: history is damaged, or can't be appended to.
        changed: what `repair` puts right.
    """

    lost: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


async def look(conn: AsyncConnection[Any], streams: Sequence[Stream]) -> dict[int, Found]:
    """Look at the schemas of `streams`, which have been made, by one query; return what there is by their numbers."""
    database = conn.info.dbname
    cursor = await conn.execute(
        _LOOK,
        {
            "streams": [one.stream for one in streams],
            "schemas": [one.schema for one in streams],
            "partitions": [one.partitions for one in streams],
            "writers": [writer_role(conn, one) for one in streams],
            "readers": [reader_role(conn, one) for one in streams],
            "eventstore": names.store_role(database, "eventstore"),
            "relay": names.store_role(database, "relay"),
            "functions": _FUNCTIONS,
        },
    )
    migrations = {one.stream: one.migration for one in streams}
    found = {}
    async for stream, schema, events, partitions, functions, changed in cursor:
        lost = []
        if not schema:
            lost.append("the schema")
        elif not events:
            lost.append("the table events")
        elif not partitions:
            lost.append("partitions of the table events")
        if schema and functions < _FUNCTIONS_OF.get(migrations[stream], 0):
            lost.append("functions")
        found[stream] = Found(tuple(lost), () if lost else tuple(changed))
    return found


async def repair(conn: AsyncConnection[Any], stream: Stream) -> None:
    """Make the stream's roles, privileges and triggers what they were, where nothing of it is lost.

    Raises:
        ConflictError: a role of the stream's name isn't Refold's.
        psycopg.errors.LockNotAvailable: somebody holds a table whose trigger is missing.
    """
    database = conn.info.dbname
    writer, reader = writer_role(conn, stream), reader_role(conn, stream)
    eventstore, relay = names.store_role(database, "eventstore"), names.store_role(database, "relay")
    async with conn.transaction():
        await roles.ensure_group(conn, [writer, reader])
        async with as_owner(conn, names.store_role(database, "owner")):
            await _grant(conn, stream, writer=writer, reader=reader, eventstore=eventstore, relay=relay)
            await _guard(conn, stream)


async def _grant(
    conn: AsyncConnection[Any], stream: Stream, *, writer: str, reader: str, eventstore: str, relay: str
) -> None:
    schema = sql.Identifier(stream.schema)
    all_, readers = _listed([writer, reader, eventstore, relay]), _listed([reader, eventstore, relay])
    cursor = await conn.execute(
        "select p.oid::regprocedure::text, p.pronargs from pg_proc p join pg_namespace n on n.oid = p.pronamespace "
        "where n.nspname = %s and p.proname = any (%s)",
        [stream.schema, _FUNCTIONS],
    )
    functions = await cursor.fetchall()
    statements = [
        sql.SQL("grant usage on schema {} to {}").format(schema, all_),
        sql.SQL("grant select on {}.events to {}").format(schema, readers),
        *(
            sql.SQL("grant execute on function {} to {}").format(
                sql.SQL(function), sql.Identifier(writer if arguments == 1 else eventstore)
            )
            for function, arguments in functions
        ),
    ]
    await conn.execute(sql.SQL("; ").join(statements), prepare=False)


async def _guard(conn: AsyncConnection[Any], stream: Stream) -> None:
    """Make the triggers that are missing or switched off, on the table and on each of its partitions."""
    cursor = await conn.execute(
        "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace "
        "where n.nspname = %s and c.relkind in ('r', 'p') and not exists ("
        "  select from pg_trigger t where t.tgrelid = c.oid and t.tgname = 'append_only' and t.tgenabled = 'A')",
        [stream.schema],
    )
    for (table,) in await cursor.fetchall():
        name = sql.Identifier(stream.schema, table)
        await conn.execute(
            sql.SQL(
                "create or replace trigger append_only before update or delete or truncate on {0} "
                "for each statement execute function refold.refuse_change(); "
                "alter table {0} enable always trigger append_only"
            ).format(name),
            prepare=False,
        )


def _listed(roles_: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(sql.Identifier, roles_))
