"""The live version as queries need it: its columns, its streams and the statements that read it. Pure.

Each statement answers with a first row `(live, positions, now, null, …)` and then rows `(null, null, null, key, data,
…)`. It is one statement, so all of it comes from one snapshot: the pointer tells whether the version that was read is
still the live one, and the positions are those of exactly these rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, LiteralString, NamedTuple

from psycopg import sql

from refold.projection.definition import Column, ColumnType, StreamRef, VersionDefinition
from refold.projection.readstore.postgres import rows_table


class Statement(NamedTuple):
    """SQL and its parameters. `prepared`: its plan is good whatever the parameters are, so it is made once."""

    sql: bytes
    parameters: Mapping[str, Any]
    prepared: bool = True


class Condition(NamedTuple):
    """What must hold of a row: `test`, SQL in which {column} stands for the column, {value} for the cast value."""

    column: str
    test: LiteralString
    cast: LiteralString
    value: object


class Order(NamedTuple):
    """By a column (or the key) and then by key, both ascending or both descending; null is the greatest value."""

    column: str
    descending: bool


class After(NamedTuple):
    """The place in an order after which a page begins: the column's value (null where by key) and the key."""

    value: object
    key: str


#: PostgreSQL's types of the values that columns are compared with.
CASTS: Mapping[ColumnType, LiteralString] = {
    ColumnType.TEXT: "text",
    ColumnType.INTEGER: "bigint",
    ColumnType.NUMERIC: "numeric",
    ColumnType.BOOLEAN: "boolean",
    ColumnType.TIMESTAMP: "timestamptz",
    ColumnType.JSON: "jsonb",
}
_KEY = Column(name="key", type=ColumnType.TEXT, index=True)


class LiveVersion:
    """One version of the projection, at one time the live one.

    Args:
        schema: the projection's schema in the read store.
        version: its name.
        definition: what it folds.
    """

    def __init__(self, schema: str, version: str, definition: VersionDefinition) -> None:
        self.version = version
        self.columns: dict[str, Column] = {column.name: column for column in definition.definition.columns}
        #: What rows may be filtered and ordered by, where it has an index: the columns, and the key.
        self.comparable = {"key": _KEY, **self.columns}
        self.streams: dict[str, StreamRef] = {stream.incarnation: stream for stream in definition.streams}
        names = {
            "pointer": sql.Identifier(schema, "pointer"),
            "positions": sql.Identifier(schema, "positions"),
            "parked": sql.Identifier(schema, "parked"),
            "rows": sql.Identifier(schema, rows_table(version)),
            "version": sql.Literal(version),
            "data": sql.SQL(", ").join(_output(column) for column in self.columns.values()),
        }
        self._state = sql.SQL(
            "select (select live from {pointer}) as live,"
            " (select json_agg(json_build_array(incarnation, partition, position, head, lag_seconds,"
            " extract(epoch from seen_at), stopped) order by incarnation, partition)::text"
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

    def by_keys(self, keys: Sequence[str]) -> Statement:
        """Return what reads the rows of `keys` that exist, in any order."""
        return Statement(self._by_keys, {"keys": list(keys)})

    def page(self, conditions: Sequence[Condition], order: Order, after: After | None, most: int) -> Statement:
        """Return what reads the first `most` rows beyond `after` that meet all `conditions`.

        Its rows go on with a text of the value in the order's column (null where by key), and with their number in the
        order, from 1. Its best plan depends on the parameters: a filter may hold for all rows, or for none.
        """
        parameters: dict[str, Any] = {"most": most}
        wanted: list[sql.Composable] = [sql.SQL("true")]
        for number, condition in enumerate(conditions):
            wanted.append(
                sql.SQL(condition.test).format(
                    column=sql.Identifier("r", condition.column),
                    value=sql.SQL("{}::{}").format(sql.Placeholder(f"value{number}"), sql.SQL(condition.cast)),
                )
            )
            parameters[f"value{number}"] = condition.value
        by_key = order.column == _KEY.name
        column = self.comparable[order.column]
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

    def positions(self) -> Statement:
        """Return what reads the first row alone."""
        return Statement(self._positions, {})

    def status(self) -> Statement:
        """Return what reads the first row and, as its fourth column, how many events are parked."""
        return Statement(self._parked, {})


def _beyond(column: Column, order: Order, after: After | None) -> list[list[sql.Composable]]:
    """Return the conditions of the rows beyond `after`, in as many parts as the column's index has ranges of them."""
    if after is None:
        return [[]]
    name = sql.Identifier("r", column.name)
    sign = sql.SQL("<" if order.descending else ">")
    key = sql.SQL("r.key {} %(after_key)s::text").format(sign)
    if column is _KEY:
        return [[key]]
    null = sql.SQL("{} is null").format(name)
    if after.value is None:
        first: list[sql.Composable] = [null, key]
        return [first, [sql.SQL("{} is not null").format(name)]] if order.descending else [first]
    greater = sql.SQL("({0}, r.key) {1} (%(after)s::{2}, %(after_key)s::text)").format(
        name, sign, sql.SQL(CASTS[column.type])
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
