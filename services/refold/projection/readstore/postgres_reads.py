"""The PostgreSQL read store as a query service sees it.

Each read is one statement, so pointer, positions and rows come from one snapshot. It answers with a first row `(live,
positions, now, null, …)` and then rows `(null, null, null, key, data, …)`.

A condition is of a form that the column's index serves: `ne` is two ranges.
"""

import asyncio
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, LiteralString, NamedTuple

import msgspec
import psycopg
from psycopg import errors, sql
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from refold import names
from refold.projection.definition import Column, ColumnType, VersionDefinition
from refold.projection.readstore import (
    KEY,
    After,
    AppliedPartition,
    NotFoundError,
    Order,
    Page,
    Snapshot,
    TooSlowError,
    UnavailableError,
    live_definition,
)
from refold.projection.readstore.postgres import rows_table
from refold.projection.readstore.postgres_parked import PostgresParkedReads

#: Seconds that a statement may take on the server; what is asked for here takes milliseconds with an index.
_STATEMENT_SECONDS = 10
#: Seconds for a free connection; with the one before, an answer is never later than their sum.
_CONNECTION_SECONDS = 3
#: PostgreSQL's types of the values that columns are compared with.
_CASTS: Mapping[ColumnType, LiteralString] = {
    ColumnType.TEXT: "text",
    ColumnType.INTEGER: "bigint",
    ColumnType.NUMERIC: "numeric",
    ColumnType.BOOLEAN: "boolean",
    ColumnType.TIMESTAMP: "timestamptz",
    ColumnType.JSON: "jsonb",
}
_COMPARISONS: Mapping[str, LiteralString] = {
    "eq": "{column} = {value}",
    "ne": "({column} < {value} or {column} > {value})",
    "lt": "{column} < {value}",
    "le": "{column} <= {value}",
    "gt": "{column} > {value}",
    "ge": "{column} >= {value}",
    "in": "{column} = any({value})",
}
_decoder = msgspec.json.Decoder(list[AppliedPartition])
_Rows = list[tuple[Any, ...]]


class Statement(NamedTuple):
    """SQL and its parameters. `prepared`: its plan is good whatever the parameters are, so it is made once.

    `writes`: it needs a transaction that isn't read-only. One whose connection was lost may be run twice.
    """

    sql: bytes
    parameters: Mapping[str, Any]
    prepared: bool = True
    writes: bool = False


class PostgresReads:
    """A projection in PostgreSQL, over a pool of read-only connections; the methods are those of `Reads`."""

    def __init__(self, dsn: str, *, namespace: str, name: str, connections: int) -> None:
        """Remember where the projection is; `dsn` is of its query login, `connections` the most at once."""
        self._schema = names.read_schema(namespace, name)
        self._pool = AsyncConnectionPool(
            dsn,
            min_size=min(2, connections),
            max_size=connections,
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

    async def open(self) -> None:
        """Begin to connect, also while PostgreSQL is away."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close(timeout=5)

    async def live(self) -> tuple[str, VersionDefinition] | None:
        """Return the live version's name and definition; None where there is none."""
        query = (
            sql.SQL("select live, definition::text from {0}.pointer left join {0}.versions on version = live")
            .format(sql.Identifier(self._schema))
            .as_bytes()
        )
        try:
            rows = await self.execute(Statement(query, {}))
        except (errors.UndefinedTable, errors.InvalidSchemaName, errors.InsufficientPrivilege):
            return None
        if not rows or rows[0][0] is None:
            return None
        version, definition = rows[0]
        return version, live_definition(version, definition)

    def version(self, name: str, definition: VersionDefinition) -> "PostgresVersion":
        """Return what reads the version."""
        return PostgresVersion(self, self._schema, name, definition)

    def parked(self) -> PostgresParkedReads:
        """Return what lists and marks parked events."""

        async def execute(text: bytes, parameters: Mapping[str, Any], writes: bool) -> _Rows:
            return await self.execute(Statement(text, parameters, writes=writes))

        return PostgresParkedReads(self._schema, execute)

    async def execute(self, statement: Statement) -> _Rows:
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
        except errors.QueryCanceled as error:
            raise TooSlowError(f"the rows weren't found within {_STATEMENT_SECONDS} s") from error
        except (psycopg.OperationalError, TimeoutError) as error:
            raise UnavailableError(f"PostgreSQL: {error}") from error

    async def _run(self, statement: Statement) -> _Rows:
        async with self._pool.connection() as connection:
            if not statement.writes:
                cursor = await connection.execute(statement.sql, statement.parameters, prepare=statement.prepared)
                return await cursor.fetchall()
            async with connection.transaction():
                await connection.execute("set transaction read write")
                cursor = await connection.execute(statement.sql, statement.parameters, prepare=statement.prepared)
                return await cursor.fetchall()


class PostgresVersion:
    """One version of a projection in PostgreSQL; the methods are those of `VersionReads`, beside their statements."""

    def __init__(self, reads: PostgresReads, schema: str, version: str, definition: VersionDefinition) -> None:
        self._reads = reads
        columns = definition.definition.columns
        self._columns = {KEY.name: KEY, **{column.name: column for column in columns}}
        names = {
            "pointer": sql.Identifier(schema, "pointer"),
            "positions": sql.Identifier(schema, "positions"),
            "parked": sql.Identifier(schema, "parked"),
            "rows": sql.Identifier(schema, rows_table(version)),
            "version": sql.Literal(version),
            "data": sql.SQL(", ").join(_output(column) for column in columns),
        }
        self._state = sql.SQL(
            "select (select live from {pointer}) as live,"
            " (select json_agg(json_build_array(incarnation, partition, position, head, lag_seconds,"
            " extract(epoch from seen_at), stopped, unparked) order by incarnation, partition)::text"
            " from {positions} where version = {version}) as positions,"
            " extract(epoch from now())::float8 as now"
        ).format(**names)
        self._row = sql.SQL("(select row_to_json(d)::text from (select {data}) d)").format(**names)
        self._rows = sql.SQL("{rows} r").format(**names)
        self._by_keys = (
            sql.SQL(
                "{state}, null::text as key, null::text as data union all "
                "select null, null, null, r.key, {row} from {rows} where r.key = any(%(keys)s::text[])"
            )
            .format(state=self._state, row=self._row, rows=self._rows)
            .as_bytes()
        )
        self._positions = self._state.as_bytes()
        self._parked = (
            sql.SQL("{state}, (select count(*) from {parked} where version = {version}) as parked")
            .format(state=self._state, **names)
            .as_bytes()
        )

    async def by_keys(self, keys: Sequence[str]) -> tuple[Snapshot, list[tuple[str, str]]]:
        """Return keys and data (JSON text) of the rows of `keys` that exist, in any order."""
        first, *found = await self._read(Statement(self._by_keys, {"keys": list(keys)}))
        return _snapshot(first), [row[3:5] for row in found]

    async def page(self, page: Page) -> tuple[Snapshot, list[tuple[str, str, str | None]]]:
        """Return the page's rows in order: key, data (JSON text), and a text of the value in the order's column."""
        first, *found = await self._read(self.page_statement(page))
        found.sort(key=itemgetter(6))
        return _snapshot(first), [row[3:6] for row in found]

    async def state(self) -> Snapshot:
        """Return the snapshot alone."""
        [first] = await self._read(Statement(self._positions, {}))
        return _snapshot(first)

    async def status(self) -> Snapshot:
        """Return the snapshot with the number of parked events."""
        [first] = await self._read(Statement(self._parked, {}))
        return _snapshot(first)._replace(parked=first[3])

    def page_statement(self, page: Page) -> Statement:
        """Return what reads a page.

        Its rows go on with a text of the value in the order's column (null where by key), and with their number in the
        order, from 1. Its best plan depends on the parameters: a filter may hold for all rows, or for none.
        """
        order, after = page.order, page.after
        parameters: dict[str, Any] = {"most": page.most}
        wanted: list[sql.Composable] = [sql.SQL("true")]
        for number, condition in enumerate(page.conditions):
            cast = _CASTS[condition.column.type]
            wanted.append(
                sql.SQL(_COMPARISONS[condition.comparison]).format(
                    column=sql.Identifier("r", condition.column.name),
                    value=sql.SQL("{}::{}{}").format(
                        sql.Placeholder(f"value{number}"),
                        sql.SQL(cast),
                        sql.SQL("[]" if condition.comparison == "in" else ""),
                    ),
                )
            )
            parameters[f"value{number}"] = condition.value
        by_key = order.column == KEY.name
        column = self._columns[order.column]
        direction = sql.SQL("desc" if order.descending else "asc")
        ordered = sql.SQL("r.key {0}" if by_key else "{1} {0}, r.key {0}").format(
            direction, sql.Identifier("r", column.name)
        )
        read = sql.SQL("select * from {rows} where {wanted} order by {ordered} limit %(most)s")
        branches = [
            read.format(rows=self._rows, wanted=sql.SQL(" and ").join([*wanted, *beyond]), ordered=ordered)
            for beyond in _beyond(column, order, after)
        ]
        if after is not None:
            parameters |= {"after": after.value, "after_key": after.key}
        found = branches[0]
        if len(branches) > 1:  # each is read from the index from its beginning on, which no `or` of both would be
            both = sql.SQL(" union all ").join(sql.SQL("({})").format(branch) for branch in branches)
            found = read.format(rows=sql.SQL("({}) r").format(both), wanted=sql.SQL("true"), ordered=ordered)
        return Statement(
            sql.SQL(
                "{state}, null::text as key, null::text as data, null::text as place, 0::bigint as number union all "
                "select null, null, null, r.key, {row}, {place}, row_number() over (order by {ordered}) "
                "from ({found}) r"
            )
            .format(
                state=self._state,
                row=self._row,
                place=sql.SQL("null") if by_key else _as_text(column),
                ordered=ordered,
                found=found,
            )
            .as_bytes(),
            parameters,
            prepared=False,
        )

    async def _read(self, statement: Statement) -> _Rows:
        try:
            return await self._reads.execute(statement)
        except errors.UndefinedTable as error:
            raise NotFoundError("the version's table is gone") from error


def _snapshot(first: tuple[Any, ...]) -> Snapshot:
    live, positions, now = first[:3]
    return Snapshot(live, [] if positions is None else _decoder.decode(positions), now)


def _beyond(column: Column, order: Order, after: After | None) -> list[list[sql.Composable]]:
    """Return the conditions of the rows beyond `after`, in as many parts as the column's index has ranges of them."""
    if after is None:
        return [[]]
    name = sql.Identifier("r", column.name)
    sign = sql.SQL("<" if order.descending else ">")
    key = sql.SQL("r.key {} %(after_key)s::text").format(sign)
    if column is KEY:
        return [[key]]
    null = sql.SQL("{} is null").format(name)
    if after.value is None:
        first: list[sql.Composable] = [null, key]
        return [first, [sql.SQL("{} is not null").format(name)]] if order.descending else [first]
    greater = sql.SQL("({0}, r.key) {1} (%(after)s::{2}, %(after_key)s::text)").format(
        name, sign, sql.SQL(_CASTS[column.type])
    )
    return [[greater]] if order.descending else [[greater], [null]]


def _as_text(column: Column) -> sql.Composed:
    """Return the column's value as the text that a cursor holds."""
    if column.type is ColumnType.TIMESTAMP:
        return _rfc_3339(column)
    return sql.SQL("r.{}::text").format(sql.Identifier(column.name))


def _output(column: Column) -> sql.Composed:
    """Return the column as an answer has it: JSON numbers exact, times as RFC 3339 in UTC."""
    name = sql.Identifier(column.name)
    if column.type is ColumnType.TIMESTAMP:
        return sql.SQL("{} as {}").format(_rfc_3339(column), name)
    return sql.SQL("r.{}").format(name)


def _rfc_3339(column: Column) -> sql.Composed:
    return sql.SQL("""to_char(r.{} at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')""").format(
        sql.Identifier(column.name)
    )
