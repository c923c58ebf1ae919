"""Parked events in the PostgreSQL read store, beyond their being parked: marks, and what leaves (`unparking`).

All of it is SQL on two tables of the projection's schema: `parked`, whose column `asked` holds a mark, and `discarded`,
which keeps the trace of what was discarded, also after its version is gone. How often events left `parked` stands in
`positions.unparked`, which each batch of a projector compares with what it was folded from.

The query service may write marks and nothing else: it has UPDATE on the columns `asked` and `asked_at`.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, LiteralString

import msgspec
import psycopg
from psycopg import sql

from refold.projection.past import Aside
from refold.projection.readstore import Listed, Looked, Marked, MovedError, NotFoundError
from refold.projection.unparking import ASKED_SECONDS, Asked, Entry, ParkedRow, Settled

#: The columns of `parked` that hold a mark, which the query service writes.
MARK = ("asked", "asked_at")
#: Belongs to a projection's schema; `postgres` runs it.
TABLES = """
alter table {schema}.positions add column if not exists unparked bigint not null default 0;
alter table {schema}.parked add column if not exists asked jsonb, add column if not exists asked_at timestamptz;
create table if not exists {schema}.discarded (
  id           bigint primary key,
  version      text not null,
  incarnation  text not null,
  partition    integer not null,
  position     bigint not null,
  key          text collate "C",
  subject      text collate "C" not null,
  error        text not null,
  parked_at    timestamptz not null,
  discarded_at timestamptz not null default now(),
  discarded_by text not null
);
"""

_LIST = """
with v as (
  select version, definition from {versions}
  where version = coalesce(%(version)s::text, (select live from {pointer}))
)
select v.version, p.id, (
    select s ->> 'namespace' || '/' || (s ->> 'name') from jsonb_array_elements(v.definition -> 'streams') s
    where s ->> 'incarnation' = p.incarnation
  ), p.partition, p.position, p.subject, p.key, p.error, p.parked_at
from v left join lateral (
  select * from {parked} p
  where p.version = v.version and p.id > %(after)s and (%(key)s::text is null or p.key = %(key)s)
  order by id limit %(limit)s
) p on true
order by p.id
"""
_ASIDE = """
select first.position, first.error,
  array(select position from {discarded} where version = %(version)s and key = %(key)s)
from (select) one left join lateral (
  select position, error from {parked} where version = %(version)s and key = %(key)s order by position limit 1
) first on true
"""
_ASK = """
with v as (select coalesce(%(version)s::text, (select live from {pointer})) as version), marked as (
  update {parked} p set asked = %(asked)s::jsonb, asked_at = now() from v
  where p.id = %(id)s and p.version = v.version
    and (p.asked is null or p.asked_at < now() - %(valid)s * interval '1 s' or p.asked ->> 'token' = %(token)s)
  returning p.id
)
select v.version, p.version, (select id from marked) from v left join {parked} p on p.id = %(id)s
"""
_LOOK = """
select p.asked ->> 'token', (select live from {pointer}) = %(version)s,
  exists (select from {versions} where version = %(version)s), exists (select from {discarded} where id = %(id)s),
  first.id, first.position, first.error
from (select) one left join {parked} p on p.id = %(id)s left join lateral (
  select * from {parked} f
  where f.version = p.version and f.incarnation = p.incarnation and f.partition = p.partition
    and (f.key = p.key or (f.key is null and p.key is null and f.subject = p.subject))
  order by position, id limit 1
) first on true
"""
_WITHDRAW = """
update {parked} set asked = null, asked_at = null where id = %(id)s and asked ->> 'token' = %(token)s returning id
"""

_Execute = Callable[[bytes, Mapping[str, Any], bool], Awaitable[list[tuple[Any, ...]]]]


class PostgresParked:
    """The parked events of one version as a projector settles them.

    Args:
        schema: the projection's, in the read store.
        version: its name.
    """

    def __init__(self, schema: sql.Identifier, version: str) -> None:
        self._schema = schema
        self._version = version

    def asked(
        self, conn: psycopg.Connection[Any], incarnations: list[str], partitions: list[int]
    ) -> tuple[bool, list[ParkedRow]]:
        """Return whether the version is live, and the rows of these partitions of which something is asked.

        Of what was discarded in another version the same is asked here.
        """
        cursor = conn.execute(
            self._sql(
                "with p as ("
                "  select p.*, case "
                "    when asked_at > now() - %(valid)s * interval '1 s' and asked is not null then asked "
                "    when d.by is not null then jsonb_build_object("
                "      'token', '', 'verb', 'discard', 'by', d.by, 'live', false) end as mark "
                "  from {schema}.parked p left join ("
                "    select distinct on (incarnation, partition, position, key) "
                "      incarnation, partition, position, key, discarded_by as by "
                "    from {schema}.discarded order by incarnation, partition, position, key, id"
                "  ) d on d.incarnation = p.incarnation and d.partition = p.partition and d.position = p.position "
                "    and d.key is not distinct from p.key "
                "  where p.version = %(version)s and (p.incarnation, p.partition) in ("
                "    select * from unnest(%(incarnations)s::text[], %(partitions)s::int[]))"
                ") select (select live from {schema}.pointer) = version, "
                "  incarnation, partition, key, case when key is null then subject end, "
                "  id, position, error, mark::text "
                "from p where (incarnation, partition, key is null, coalesce(key, subject)) in ("
                "  select incarnation, partition, key is null, coalesce(key, subject) from p where mark is not null"
                ") order by incarnation, partition, position, id"
            ),
            {
                "version": self._version,
                "valid": ASKED_SECONDS,
                "incarnations": incarnations,
                "partitions": partitions,
            },
        )
        live = False
        found: dict[tuple[str, int, str | None, str | None], ParkedRow] = {}
        for is_live, *place, id_, position, error, asked in cursor:
            live = bool(is_live)
            incarnation, partition, key, subject = place
            row = found.setdefault(
                (incarnation, partition, key, subject), ParkedRow(incarnation, partition, key, subject, [])
            )
            mark = None if asked is None else msgspec.json.decode(asked, type=Asked)
            row.entries.append(Entry(id_, position, error, mark))
        return live, list(found.values())

    def settle(self, cursor: psycopg.Cursor[Any], settled: Settled) -> None:
        """Take events out of those that are parked; their partition's position is locked.

        Raises:
            MovedError: one of them isn't parked any more, or the version must be live and isn't.
        """
        if settled.live:
            # Who makes another version live locks this one's positions before.
            cursor.execute(self._sql("select live from {schema}.pointer"))
            row = cursor.fetchone()
            if row is None or row[0] != self._version:
                raise MovedError("the version isn't live any more")
        if settled.discarded:
            cursor.execute(
                self._sql(
                    "insert into {schema}.discarded (id, version, incarnation, partition, position, key, subject, "
                    "  error, parked_at, discarded_by) "
                    "select p.id, version, incarnation, partition, position, key, subject, error, parked_at, d.by "
                    "from {schema}.parked p join unnest(%s::bigint[], %s::text[]) d(id, by) on d.id = p.id"
                ),
                [list(settled.discarded), list(settled.discarded.values())],
            )
        ids = [*settled.folded, *settled.discarded]
        cursor.execute(
            self._sql("delete from {schema}.parked where version = %s and id = any(%s)"), [self._version, ids]
        )
        if cursor.rowcount != len(ids):
            raise MovedError(f"of {len(ids)} parked events {cursor.rowcount} are parked still")
        cursor.execute(
            self._sql(
                "update {schema}.positions set unparked = unparked + 1 "
                "where version = %s and incarnation = %s and partition = %s"
            ),
            [self._version, settled.incarnation, settled.partition],
        )

    def refuse(self, conn: psycopg.Connection[Any], entries: Iterable[Entry], error: str | None) -> None:
        """Take the marks off `entries`, which stay parked: the first of them because of `error` (null: as before)."""
        there = list(entries)
        conn.execute(
            self._sql(
                "update {schema}.parked set asked = null, asked_at = null, "
                "  error = case when id = %(first)s then coalesce(%(error)s, error) else error end "
                "where version = %(version)s and (id = %(first)s and %(error)s::text is distinct from error "
                "  or asked ->> 'token' = any(%(tokens)s::text[]))"
            ),
            {
                "version": self._version,
                "first": there[0].id,
                "error": error,
                "tokens": [entry.asked.token for entry in there if entry.asked is not None],
            },
        )

    def _sql(self, text: LiteralString) -> sql.Composed:
        return sql.SQL(text).format(schema=self._schema)


class PostgresParkedReads:
    """The parked events of a projection as its query service sees them; the methods are those of `ParkedReads`.

    Args:
        schema: the projection's, in the read store.
        execute: runs a statement with its parameters; the last argument says whether it writes.
    """

    def __init__(self, schema: str, execute: _Execute) -> None:
        self._run = execute
        names = {table: sql.Identifier(schema, table) for table in ("versions", "pointer", "parked", "discarded")}
        self._list, self._aside, self._ask, self._look, self._withdraw = (
            sql.SQL(text).format(**names).as_bytes() for text in (_LIST, _ASIDE, _ASK, _LOOK, _WITHDRAW)
        )

    async def page(
        self, *, version: str | None, key: str | None, after: int, most: int
    ) -> tuple[str, list[Listed]] | None:
        """Return the version and its first `most` parked events with ids beyond `after`; None: no such version."""
        rows = await self._execute(self._list, {"version": version, "key": key, "after": after, "limit": most})
        if not rows:
            return None
        return rows[0][0], [Listed(*row[1:]) for row in rows if row[1] is not None]

    async def aside(self, version: str, key: str) -> Aside:
        """Return what `version` has set aside of the row `key`, which one partition feeds."""
        ((position, error, discarded),) = await self._execute(self._aside, {"version": version, "key": key})
        return Aside(None if position is None else (position, error), frozenset(discarded))

    async def ask(self, id_: int, asked: Asked, version: str | None) -> Marked:
        """Leave a mark at a parked event of `version` (None: the live one), where there is none."""
        parameters = {
            "id": id_,
            "version": version,
            "token": asked.token,
            "asked": msgspec.json.encode(asked).decode(),
            "valid": ASKED_SECONDS,
        }
        ((wanted, is_of, marked),) = await self._execute(self._ask, parameters, writes=True)
        return Marked(wanted, is_of, marked is not None)

    async def look(self, id_: int, version: str) -> Looked:
        """Return what became of a parked event of `version`."""
        ((token, live, there, discarded, *first),) = await self._execute(self._look, {"id": id_, "version": version})
        parked = first[0] is not None
        return Looked(token, (first[0], first[1], first[2]) if parked else None, bool(live), there, discarded)

    async def withdraw(self, id_: int, token: str) -> bool:
        """Take a mark away; return whether it was still there."""
        return bool(await self._execute(self._withdraw, {"id": id_, "token": token}, writes=True))

    async def _execute(
        self, text: bytes, parameters: Mapping[str, Any], *, writes: bool = False
    ) -> list[tuple[Any, ...]]:
        try:
            return await self._run(text, parameters, writes)
        except (
            psycopg.errors.UndefinedTable,
            psycopg.errors.InvalidSchemaName,
            psycopg.errors.InsufficientPrivilege,
        ) as error:
            raise NotFoundError("the projection isn't in the read store") from error
