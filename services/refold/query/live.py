"""The live version as queries need it: its columns, its streams and the statements that read it. Pure.

Each statement answers with a first row `(live, positions, now, null, null)` and then rows `(null, null, null, key,
data)`. It is one statement, so all of it comes from one snapshot: the pointer tells whether the version that was read
is still the live one, and the positions are those of exactly these rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from psycopg import sql

from refold.projection.definition import Column, ColumnType, StreamRef, VersionDefinition
from refold.projection.readstore.postgres import rows_table


class Statement(NamedTuple):
    """SQL, rendered once where it doesn't change, and its parameters."""

    sql: bytes
    parameters: Mapping[str, Any]


class Condition(NamedTuple):
    """One filter: `column operator value`, the value cast to `cast`."""

    column: str
    operator: str
    cast: str
    value: object


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

    def page(self, conditions: Sequence[Condition], after: str | None, most: int) -> Statement:
        """Return what reads the first `most` rows that meet all `conditions`, by key and beyond `after`."""
        wanted: list[sql.Composable] = [sql.SQL("true")]
        parameters: dict[str, Any] = {"most": most}
        if after is not None:
            wanted.append(sql.SQL("r.key > %(after)s::text"))
            parameters["after"] = after
        for number, condition in enumerate(conditions):
            wanted.append(
                sql.SQL("r.{} {} {}::{}").format(
                    sql.Identifier(condition.column),
                    sql.SQL(condition.operator),
                    sql.Placeholder(f"value{number}"),
                    sql.SQL(condition.cast),
                )
            )
            parameters[f"value{number}"] = condition.value
        return Statement(
            sql.SQL(
                "{state}, null::text as key, null::text as data union all select null, null, null, p.key, p.data from "
                "(select r.key, {row} as data from {rows} where {wanted} order by r.key limit %(most)s) p"
            )
            .format(state=self._state, row=self._row, rows=self._rows, wanted=sql.SQL(" and ").join(wanted))
            .as_bytes(),
            parameters,
        )

    def positions(self) -> Statement:
        """Return what reads the first row alone."""
        return Statement(self._positions, {})

    def status(self) -> Statement:
        """Return what reads the first row and, as its fourth column, how many events are parked."""
        return Statement(self._parked, {})


def _output(column: Column) -> sql.Composed:
    """Return the column as an answer has it: JSON numbers exact, times as RFC 3339 in UTC."""
    name = sql.Identifier(column.name)
    if column.type is ColumnType.TIMESTAMP:
        return sql.SQL("""to_char(r.{0} at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as {0}""").format(name)
    return sql.SQL("r.{}").format(name)
