"""The PostgreSQL read store as a projector sees it: rows, positions and parked events change in one transaction.

How a batch is written (`PostgresRows.apply`):

1. COPY of the changes into a temporary table, before any lock is held: a process that is frozen in the middle of a
   COPY can't be timed out by the server, and must not keep others waiting.
2. The positions of the batch's partitions are locked in order and compared with what the batch began from. Where
   another owner has written in the meantime: `MovedError`, and nothing happens. From here on until the commit the
   server ends the transaction of a frozen process after `idle_in_transaction_session_timeout`.
3. One INSERT … ON CONFLICT DO UPDATE (or DELETE) for each shape of change, where a shape is which columns are set and
   which are merged with. Rows fed by several partitions have one shape, so that all projectors lock rows in the order
   of their keys. `add`, `min` and `max` join in SQL, and a column that is set has its stamp beside it, of which the
   later wins: no update is lost whoever writes first.
4. Parked events and the positions. Where parked events leave (`postgres_parked`), the positions say so; a batch that
   was folded before that is dropped as one whose partition moved.

The rows of one partition are only ever written by who holds the lock on its position, so that rows fed by one partition
need no rule about concurrent writers.

A fold that has to know what stands in its rows (`read`) reads them before all this and without a lock, so that nobody
waits while events are folded. Once the positions are locked, the rows are looked at again: where one of them was
written in the meantime, nothing happens (`MovedError`), as where a position moved.
"""

import datetime as dt
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, LiteralString, Never, cast

import msgspec
import psycopg
from psycopg import sql
from psycopg.rows import class_row

from refold import names
from refold.projection.definition import ColumnType, VersionDefinition, default_of, merges, single_partition, stamped
from refold.projection.fold import Parked, ParkedEvent, RowChange, Stamp
from refold.projection.readstore import (
    Advance,
    LiveProgress,
    MovedError,
    NotFoundError,
    Position,
    RefusedError,
    Seen,
    UnavailableError,
)
from refold.projection.readstore.postgres import TYPES, default_literal, rows_table, stamp_column
from refold.projection.readstore.postgres_parked import PostgresParked
from refold.projection.unparking import Entry, ParkedRow, Settled
from refold.projection.values import Value

#: Server-side limits of a projector's session. A frozen process (SIGSTOP, a paused VM) lets go of its locks within the
#: idle time; no statement of a batch takes nearly as long as the statement's.
_OPTIONS = (
    "-c statement_timeout=60s -c lock_timeout=30s -c idle_in_transaction_session_timeout=6s "
    "-c default_transaction_isolation=read\\ committed -c client_encoding=UTF8 -c timezone=UTC -c search_path="
)
#: SQLSTATEs after which the same transaction may succeed: deadlock, serialisation failure, lock timeout.
_TRANSIENT = frozenset({"40P01", "40001", "55P03"})
_TRANSIENT_TRIES = 5
#: Classes of SQLSTATEs that blame the data: data exception, integrity, program limits (an index row too large).
_DATA = ("22", "23", "54")
#: How a column of the row `r` and what an operation brings become one; a null on either side counts for nothing.
_JOINS = {
    "add": "coalesce(r.{0} + excluded.{0}, r.{0}, excluded.{0})",
    "min": "least(r.{0}, excluded.{0})",
    "max": "greatest(r.{0}, excluded.{0})",
}
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


class PostgresRows:
    """One version of a projection in PostgreSQL, over one connection; the methods are those of `Rows`."""

    most_rows = None

    def __init__(self, dsn: str, *, namespace: str, name: str, version: str) -> None:
        """Remember where the version is; nothing is connected yet. `dsn` is of the projection's projector login."""
        self._dsn = dsn
        self._what = f"{namespace}/{name}"
        self._version = version
        self._schema = sql.Identifier(names.read_schema(namespace, name))
        self._table = sql.Identifier(names.read_schema(namespace, name), rows_table(version))
        self._parked = PostgresParked(self._schema, version)
        self._conn: psycopg.Connection[Any] | None = None
        self._writer: _Writer | None = None
        #: What the next batch was folded from: the ids of the transactions that wrote the rows which were read.
        self._read: tuple[list[str], dict[str, str]] | None = None

    def close(self) -> None:
        """Close the connection."""
        if self._conn is not None:
            self._conn.close()
            self._conn = None

    def open(self) -> VersionDefinition:
        """Return the version's definition and prepare for writing.

        Raises:
            NotFoundError: there is no such version.
        """
        try:
            conn = self._connection()
            cursor = conn.execute(
                self._sql("select definition::text from {schema}.versions where version = %s"), [self._version]
            )
            row = cursor.fetchone()
            if row is None:
                raise NotFoundError(f"the projection {self._what} has no version {self._version} in the read store")
            definition = VersionDefinition.from_json(row[0])
            self._writer = _Writer(definition, self._table)
            conn.execute(self._writer.create_stage)
        except psycopg.errors.UndefinedTable as error:
            raise NotFoundError(f"the read store holds no projection {self._what}") from error
        except psycopg.Error as error:
            self._raise(error)
        return definition

    def positions(self, partitions: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Position]:
        """Return where the partitions (incarnation, number) stand; one that isn't part of the version is left out."""
        incarnations, numbers = _columns(partitions, 2)
        try:
            cursor = self._connection().cursor(row_factory=class_row(Position))
            cursor.execute(
                self._sql(
                    "select incarnation, partition, position, topic_id, kafka_offset, stopped, unparked "
                    "from {schema}.positions where version = %s "
                    "and (incarnation, partition) in (select * from unnest(%s::text[], %s::int[]))"
                ),
                [self._version, incarnations, numbers],
            )
            return {(found.incarnation, found.partition): found for found in cursor}
        except psycopg.Error as error:
            self._raise(error)

    def parked(self, partitions: Iterable[tuple[str, int]]) -> tuple[Parked, dict[tuple[str, int], int]]:
        """Return which rows and subjects are parked in the partitions, and how many events of each partition."""
        incarnations, numbers = _columns(partitions, 2)
        parked = Parked()
        counts: dict[tuple[str, int], int] = {}
        try:
            cursor = self._connection().execute(
                self._sql(
                    "select incarnation, partition, key, case when key is null then subject end, count(*) "
                    "from {schema}.parked where version = %s "
                    "and (incarnation, partition) in (select * from unnest(%s::text[], %s::int[])) group by 1, 2, 3, 4"
                ),
                [self._version, incarnations, numbers],
            )
            for incarnation, partition, key, subject, count in cursor:
                counts[incarnation, partition] = counts.get((incarnation, partition), 0) + count
                if key is None:
                    parked.subjects.add((incarnation, partition, subject))
                else:
                    parked.rows.add((incarnation, partition, key))
        except psycopg.Error as error:
            self._raise(error)
        return parked, counts

    def asked(self, partitions: Iterable[tuple[str, int]]) -> tuple[bool, list[ParkedRow]]:
        """Return whether the version is live, and the parked rows of the partitions of which something is asked."""
        incarnations, numbers = _columns(partitions, 2)
        try:
            return self._parked.asked(self._connection(), incarnations, numbers)
        except psycopg.Error as error:
            self._raise(error)

    def refuse(self, entries: Sequence[Entry], error: str | None) -> None:
        """Do nothing of what is asked of `entries`; the first stays parked because of `error` (None: as before)."""
        try:
            self._parked.refuse(self._connection(), entries, None if error is None else _storable(error))
        except psycopg.Error as failure:
            self._raise(failure)

    def read(self, keys: Iterable[str], columns: Sequence[str]) -> dict[str, dict[str, Value]]:
        """Return what stands in the rows, by key and column; a row that doesn't exist is left out.

        The next `apply` writes only where nobody else has written these rows until then.
        """
        wanted = sorted(keys)
        texts = sql.SQL(", ").join(self._writer_or_fail().read_as(name) for name in columns)
        try:
            cursor = self._connection().execute(
                sql.SQL("select key, xmin::text, {} from {} where key = any(%s)").format(texts, self._table), [wanted]
            )
            found = cursor.fetchall()
        except psycopg.Error as error:
            self._raise(error)
        self._read = (wanted, {row[0]: row[1] for row in found})
        return {row[0]: dict(zip(columns, row[2:], strict=True)) for row in found}

    def apply(
        self,
        changes: Iterable[RowChange],
        parked: Sequence[ParkedEvent],
        advances: Sequence[Advance],
        settled: Settled | None = None,
    ) -> None:
        """Write a batch: all of it in one transaction, or nothing.

        `settled` names parked events that leave; their partition is one of `advances`.

        Raises:
            MovedError: a partition isn't at its `before`, a row that was read has changed, or parked events left:
                another projector has written in the meantime. Or what is `settled` can't be any more.
            RefusedError: a row can't be stored (out of range, too large); smaller batches tell which event is to blame.
        """
        read, self._read = self._read, None
        try:
            staged, statement = self._writer_or_fail().stage(changes)
        except UnicodeEncodeError as error:
            raise RefusedError(f"a text isn't valid Unicode: {error.reason}") from error
        for attempt in range(_TRANSIENT_TRIES):
            try:
                self._transaction(read, staged, statement, parked, advances, settled)
                return
            except psycopg.Error as error:
                if error.sqlstate in _TRANSIENT and attempt < _TRANSIENT_TRIES - 1 and self._alive():
                    time.sleep(random.uniform(0.005, 0.02) * 2**attempt)  # noqa: S311 (jitter)
                    continue
                if error.sqlstate and error.sqlstate.startswith(_DATA) and self._alive():
                    raise RefusedError(_message(error)) from error
                self._raise(error)

    def see(self, seen: Sequence[Seen]) -> None:
        """Store what was seen of the heads; positions aren't touched."""
        incarnations, partitions, heads, lags = _columns((msgspec.structs.astuple(one) for one in seen), 4)
        try:
            self._connection().execute(
                self._sql(
                    # in the order in which all lock positions: who hands readers over locks all of a version
                    "with locked as (select incarnation, partition from {schema}.positions where version = %(version)s "
                    "  and (incarnation, partition) in ("
                    "    select * from unnest(%(incarnations)s::text[], %(partitions)s::int[]))"
                    "  order by incarnation, partition for update) "
                    "update {schema}.positions p set head = s.head, lag_seconds = s.lag, seen_at = now() "
                    "from locked join unnest(%(incarnations)s::text[], %(partitions)s::int[], %(heads)s::bigint[], "
                    "  %(lags)s::float8[]) s(incarnation, partition, head, lag) using (incarnation, partition) "
                    "where p.version = %(version)s and p.incarnation = s.incarnation and p.partition = s.partition"
                ),
                {
                    "version": self._version,
                    "incarnations": incarnations,
                    "partitions": partitions,
                    "heads": heads,
                    "lags": lags,
                },
            )
        except psycopg.Error as error:
            self._raise(error)

    def stop(self, incarnation: str, partition: int, reason: str | None) -> None:
        """Store why the projector doesn't go on in a partition; None where it does."""
        try:
            self._connection().execute(
                self._sql(
                    "update {schema}.positions set stopped = %s "
                    "where version = %s and incarnation = %s and partition = %s and stopped is distinct from %s"
                ),
                [reason, self._version, incarnation, partition, reason],
            )
        except psycopg.Error as error:
            self._raise(error)

    def live(self) -> LiveProgress | None:
        """Return how far the live version is; None where it is this one, or there is none."""
        try:
            cursor = self._connection().cursor(row_factory=class_row(LiveProgress))
            cursor.execute(
                self._sql(
                    "select sum(position)::bigint as position, "
                    "  coalesce(max(lag_seconds) filter (where head > position), 0) as lag_seconds "
                    "from {schema}.pointer join {schema}.positions on version = live where live <> %s "
                    "having count(*) > 0"
                ),
                [self._version],
            )
            return cursor.fetchone()
        except psycopg.Error as error:
            self._raise(error)

    def _transaction(
        self,
        read: tuple[list[str], dict[str, str]] | None,
        staged: bytes,
        statement: sql.Composed | None,
        parked: Sequence[ParkedEvent],
        advances: Sequence[Advance],
        settled: Settled | None,
    ) -> None:
        conn = self._connection()
        ordered = sorted(advances, key=lambda advance: (advance.incarnation, advance.partition))
        with conn.transaction(), conn.cursor() as cursor:
            if statement is not None:
                with cursor.copy("copy pg_temp.stage from stdin") as copy:
                    copy.write(staged)
            self._lock(cursor, ordered)
            if read is not None:
                self._compare(cursor, *read)
            if settled is not None:
                self._parked.settle(cursor, settled)
            if statement is not None:
                cursor.execute(statement, prepare=False)  # several statements in one can't be prepared
            if parked:
                cursor.execute(
                    self._sql(
                        "insert into {schema}.parked (version, incarnation, partition, position, key, subject, error) "
                        "select %s, * from "
                        "unnest(%s::text[], %s::int[], %s::bigint[], %s::text[], %s::text[], %s::text[])"
                    ),
                    [self._version, *_columns((_parked_row(one) for one in parked), 6)],
                )
            cursor.execute(
                self._sql(
                    "update {schema}.positions p set position = a.position, "
                    "  recorded_at = coalesce(a.recorded_at, p.recorded_at), topic_id = a.topic_id, "
                    "  kafka_offset = a.kafka_offset, head = greatest(p.head, a.position), "
                    "  lag_seconds = case when a.position >= p.head then 0 else p.lag_seconds end, stopped = null "
                    "from unnest(%s::text[], %s::int[], %s::bigint[], %s::timestamptz[], %s::text[], %s::bigint[]) "
                    "  a(incarnation, partition, position, recorded_at, topic_id, kafka_offset) "
                    "where p.version = %s and p.incarnation = a.incarnation and p.partition = a.partition"
                ),
                [*_columns((_advance_row(one) for one in ordered), 6), self._version],
            )

    def _lock(self, cursor: psycopg.Cursor[Any], ordered: Sequence[Advance]) -> None:
        """Lock the positions in order; raise MovedError where one isn't where the batch began."""
        cursor.execute(
            self._sql(
                "select incarnation, partition, position, unparked from {schema}.positions where version = %s "
                "and (incarnation, partition) in (select * from unnest(%s::text[], %s::int[])) "
                "order by incarnation, partition for update"
            ),
            [
                self._version,
                [advance.incarnation for advance in ordered],
                [advance.partition for advance in ordered],
            ],
        )
        found = cursor.fetchall()
        expected = [(one.incarnation, one.partition, one.before, one.unparked) for one in ordered]
        if found != expected:
            raise MovedError(f"the read store stands at {found}, this projector at {expected}")

    def _compare(self, cursor: psycopg.Cursor[Any], keys: Sequence[str], known: dict[str, str]) -> None:
        """Raise MovedError where the rows aren't those that were read."""
        cursor.execute(sql.SQL("select key, xmin::text from {} where key = any(%s)").format(self._table), [list(keys)])
        if dict(cursor.fetchall()) != known:
            raise MovedError("rows that the batch was folded from have been written by another projector")

    def _writer_or_fail(self) -> "_Writer":
        assert self._writer is not None, "open() comes first"
        return self._writer

    def _connection(self) -> psycopg.Connection[Any]:
        if self._conn is not None and not self._conn.closed:
            return self._conn
        conn = psycopg.connect(
            self._dsn,
            autocommit=True,
            options=_OPTIONS,
            connect_timeout=5,
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=20_000,
            application_name=f"refold projector {self._what}",
        )
        self._conn = conn
        if self._writer is not None:
            conn.execute(self._writer.create_stage)
        return conn

    def _alive(self) -> bool:
        return self._conn is not None and not self._conn.closed

    def _raise(self, error: psycopg.Error) -> Never:
        self.close()
        raise UnavailableError(f"the read store of {self._what} (PostgreSQL): {_message(error)}") from error

    def _sql(self, text: LiteralString) -> sql.Composed:
        return sql.SQL(text).format(schema=self._schema)


class _Writer:
    """Turns changes into COPY text for the table `pg_temp.stage`, and the statement that brings them into the rows.

    The stage holds: the number of the change's shape, key, the columns, and their stamps.
    """

    def __init__(self, definition: VersionDefinition, table: sql.Identifier) -> None:
        fold = definition.definition
        self._single = single_partition(fold)
        self._table = table
        self._columns = [column.name for column in fold.columns]
        self._defaults = {column.name: default_of(column) for column in fold.columns}
        self._literals = {column.name: default_literal(column) for column in fold.columns}
        self._stamped = stamped(fold)
        self._json = {column.name for column in fold.columns if column.type == ColumnType.JSON}
        self._text = {column.name: _TEXT[column.type] for column in fold.columns}
        types = {column.name: TYPES[column.type] for column in fold.columns}
        self._merges = merges(fold)
        definitions = [sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(types[name])) for name in self._columns]
        stamps = [sql.SQL('{} text collate "C"').format(sql.Identifier(stamp_column(name))) for name in self._stamped]
        self.create_stage = sql.SQL(
            'create temporary table if not exists stage ("~shape" integer, key text collate "C"{}) '
            "on commit delete rows"
        ).format(sql.SQL("").join(sql.SQL(", ") + part for part in [*definitions, *stamps]))

    def read_as(self, name: str) -> sql.Composed:
        """Return the column as a fold takes it: json as its text."""
        return sql.SQL("{}::text" if name in self._json else "{}").format(sql.Identifier(name))

    def stage(self, changes: Iterable[RowChange]) -> tuple[bytes, sql.Composed | None]:
        """Return the stage's content and the statement (None where nothing changes)."""
        lines: list[str] = []
        if not self._single:
            for change in changes:
                values = [self._value(change, name) for name in self._columns]
                stamps = [_stamp(change.stamps.get(name)) for name in self._stamped]
                lines.append("\t".join(["0", change.key.translate(_ESCAPES), *values, *stamps]))
            return _copy_text(lines), self._merge() if lines else None
        shapes: dict[tuple[bool, bool, frozenset[str], frozenset[str]], int] = {}
        for change in changes:
            shape = (change.exists_after, change.deleted_first, frozenset(change.set), frozenset(change.merge))
            number = shapes.setdefault(shape, len(shapes))
            values = [self._value(change, name) for name in self._columns]
            lines.append("\t".join([str(number), change.key.translate(_ESCAPES), *values]))
        statements = [self._statement(number, *shape) for shape, number in shapes.items()]
        return _copy_text(lines), sql.SQL("; ").join(statements) if statements else None

    def _value(self, change: RowChange, name: str) -> str:
        value = change.set.get(name)
        if value is None:
            value = change.merge.get(name)
            if value is None:
                return "\\N"
        return self._text[name](value)

    def _statement(
        self, number: int, exists_after: bool, deleted_first: bool, set_: frozenset[str], merge: frozenset[str]
    ) -> sql.Composed:
        """Return what brings the changes of one shape into rows that no other transaction writes."""
        if not exists_after:
            return sql.SQL('delete from {} r using pg_temp.stage s where s."~shape" = {} and r.key = s.key').format(
                self._table, sql.Literal(number)
            )
        columns = [name for name in self._columns if name in set_ or name in merge]
        updates = [
            self._joined(name) if name in merge else sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name))
            for name in columns
        ]
        if deleted_first:
            anew = [name for name in self._columns if name not in set_]
            updates += [sql.SQL("{} = default").format(sql.Identifier(name)) for name in anew]
        return self._insert(number, {name: sql.Identifier(name) for name in columns}, updates)

    def _merge(self) -> sql.Composed:
        """Return what brings changes into rows that other transactions write too, in the order of their keys."""
        updates: list[sql.Composed] = []
        values: dict[str, sql.Composable] = {}
        begun = False
        for name in self._columns:
            column, stamp, default = sql.Identifier(name), sql.Identifier(stamp_column(name)), self._literals[name]
            if name in self._stamped:
                updates.append(
                    sql.SQL(
                        "{0} = case when excluded.{1} > coalesce(r.{1}, '') then excluded.{0} else r.{0} end, "
                        "{1} = greatest(r.{1}, excluded.{1})"
                    ).format(column, stamp)
                )
                values[name] = sql.SQL("case when {} is null then {} else {} end").format(stamp, default, column)
                values[stamp_column(name)] = stamp
            elif name in self._merges:
                updates.append(self._joined(name))
                values[name] = column
                if self._defaults[name] is None:
                    continue
                if self._merges[name] == "add":
                    values[name] = sql.SQL("coalesce({}, 0)").format(column)
                    begun = begun or self._defaults[name] != 0
                else:
                    # Nothing else changes the column, so that a row which exists is beyond its default already.
                    join = "least" if self._merges[name] == "min" else "greatest"
                    values[name] = sql.SQL("{}({}, {})").format(sql.SQL(join), column, default)
        statement = self._insert(0, values, updates)
        if begun:
            # What is added to a default that isn't 0 needs it to stand there.
            rows = sql.SQL("insert into {} (key) select key from pg_temp.stage order by key on conflict do nothing; ")
            statement = rows.format(self._table) + statement
        return statement

    def _joined(self, name: str) -> sql.Composed:
        column = sql.Identifier(name)
        return sql.SQL("{} = ").format(column) + sql.SQL(_JOINS[self._merges[name]]).format(column)

    def _insert(
        self, number: int, values: Mapping[str, sql.Composable], updates: Sequence[sql.Composed]
    ) -> sql.Composed:
        action = sql.SQL("update set {}").format(sql.SQL(", ").join(updates)) if updates else sql.SQL("nothing")
        return sql.SQL(
            "insert into {table} as r ({names}) "
            'select {values} from pg_temp.stage where "~shape" = {number} order by key '
            "on conflict (key) do {action}"
        ).format(
            table=self._table,
            names=sql.SQL(", ").join(sql.Identifier(name) for name in ["key", *values]),
            values=sql.SQL(", ").join([sql.Identifier("key"), *values.values()]),
            number=sql.Literal(number),
            action=action,
        )


def _escaped(value: Value) -> str:
    return cast("str", value).translate(_ESCAPES)


def _boolean(value: Value) -> str:
    return "t" if value else "f"


def _timestamp(value: Value) -> str:
    return cast("dt.datetime", value).isoformat()


_TEXT: dict[ColumnType, Callable[[Value], str]] = {
    ColumnType.TEXT: _escaped,
    ColumnType.INTEGER: str,
    ColumnType.NUMERIC: str,
    ColumnType.BOOLEAN: _boolean,
    ColumnType.TIMESTAMP: _timestamp,
    ColumnType.JSON: _escaped,
}


def _stamp(stamp: Stamp | None) -> str:
    return "\\N" if stamp is None else stamp.text


def _copy_text(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode() if lines else b""


def _columns(rows: Iterable[Sequence[Any]], width: int) -> list[list[Any]]:
    """Return rows as columns, `width` of them even where there is no row."""
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(width)]


def _parked_row(one: ParkedEvent) -> tuple[Any, ...]:
    event = one.event
    key = None if one.key is None else _storable(one.key)
    return one.incarnation, event.partition, event.position, key, event.subject, _storable(one.error)


def _storable(text: str) -> str:
    """Return `text` without what PostgreSQL can't store: NUL and lone surrogates."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def _advance_row(one: Advance) -> tuple[Any, ...]:
    return one.incarnation, one.partition, one.after, one.recorded_at, one.topic_id, one.kafka_offset


def _message(error: psycopg.Error) -> str:
    """Return what PostgreSQL said, in one line."""
    diagnostics = error.diag
    if diagnostics.message_primary is None:
        return str(error).strip() or type(error).__name__
    detail = f" ({diagnostics.message_detail})" if diagnostics.message_detail else ""
    return f"{diagnostics.message_primary}{detail}"
