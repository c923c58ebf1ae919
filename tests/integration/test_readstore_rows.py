"""Every read store: random definitions and batches leave the rows of a plain fold, and of nothing else."""

import datetime as dt
import itertools
import json
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psycopg import AsyncConnection
from refold import names
from refold.projection.definition import Definition, StreamRef, VersionDefinition, parse
from refold.projection.fold import Parked, RowChange, Stamp, compile_fold
from refold.projection.readstore import Advance, MovedError, postgres

from tests.folding import Reference, definitions, events_of, steps
from tests.readstores import Store

_numbers = itertools.count(1)


async def folded(store: Store, definition: Definition, history: list[Any], *, several: bool) -> tuple[Any, Reference]:
    """Fold into a version of its own; return its rows and the reference."""
    name = f"p{next(_numbers)}"
    streams = [
        StreamRef(namespace="n", name=stream, incarnation=stream * 8, partitions=2, topic=stream, schema=stream)
        for stream in ("aa", "bb")
    ]
    await store.make(VersionDefinition(definition=definition, streams=streams), name=name)
    rows = store.rows(name=name)
    compiled, reference, parked = compile_fold(definition), Reference(definition, several=several), Parked()
    applied: dict[tuple[str, int], int] = {}
    keys = {event.subject for _, event, _ in events_of(history, several=several)}
    batch, reached = compiled.batch(parked), dict(applied)
    for stream, event, ends in [*events_of(history, several=several), (None, None, True)]:
        if event is not None:
            reference.fold(stream * 8, event)
            batch.fold(stream * 8, [event])
            reached[stream * 8, event.partition] = event.position
        if ends:
            advances = [
                Advance(*place, applied.get(place, 0), position, None, None, None)
                for place, position in reached.items()
            ]
            rows.apply(batch.changes.values(), batch.parked, advances)
            parked.rows.update((one.incarnation, one.event.partition, one.key or "") for one in batch.parked)
            applied |= reached
            before = rows.read(keys, compiled.reads) if compiled.reads else None
            batch, reached = compiled.batch(parked, before), {}
    types = {column.name: column.type for column in definition.columns}
    found = {
        key: {
            name: json.loads(value, parse_float=Decimal) if value is not None and types[name] == "json" else value
            for name, value in row.items()
        }
        for key, row in rows.read(await store.keys(name=name), list(types)).items()
    }
    rows.close()
    return found, reference


#: A shorter example would take minutes to be found.
RANDOM = settings(
    max_examples=30,
    deadline=None,
    phases=set(Phase) - {Phase.shrink},
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
HISTORY = st.lists(steps, min_size=10, max_size=40)


@RANDOM
@given(definition=definitions(several=False), history=HISTORY)
async def test_rows_fed_by_one_partition_equal_the_plain_fold(
    store: Store, definition: Definition, history: list[Any]
) -> None:
    rows, reference = await folded(store, definition, history, several=False)
    assert rows == reference.rows


@RANDOM
@given(definition=definitions(several=True), history=HISTORY)
async def test_rows_fed_by_several_partitions_equal_the_plain_fold(
    store: Store, definition: Definition, history: list[Any]
) -> None:
    rows, reference = await folded(store, definition, history, several=True)
    assert rows == reference.rows


async def applied(store: Store, spec: dict[str, Any], *batches: RowChange) -> dict[str, dict[str, Any]]:
    """Apply changes, each in a batch of its own, and return the rows."""
    definition = parse({"streams": ["aa"], **spec})
    streams = [StreamRef(namespace="n", name="aa", incarnation="a" * 16, partitions=1, topic="a", schema="a")]
    await store.make(VersionDefinition(definition=definition, streams=streams))
    rows = store.rows()
    for number, change in enumerate(batches):
        rows.apply([change], [], [Advance("a" * 16, 0, number, number + 1, None, None, None)])
    columns = [column.name for column in definition.columns]
    keys = {change.key for change in batches}
    found = rows.read(keys, columns)
    rows.close()
    return found


async def test_a_row_that_is_made_anew_begins_with_the_defaults(store: Store) -> None:
    spec = {
        "columns": [
            {"name": "a", "type": "text", "default": "'x'", "nullable": False},
            {"name": "b", "type": "integer", "default": "5"},
            {"name": "c", "type": "json"},
        ],
        "fold": [{"type": "T", "delete": True}],
    }
    found = await applied(
        store, spec,
        *(RowChange(key, set={"a": "old", "b": 7, "c": "[1]"}) for key in "jk"),
        RowChange("j", deleted_first=True, set={"b": None}),
        RowChange("k", deleted_first=True),
        RowChange("l", set={"c": "2"}),
    )  # fmt: skip
    assert found == {
        "j": {"a": "x", "b": None, "c": None},
        "k": {"a": "x", "b": 5, "c": None},
        "l": {"a": "x", "b": 5, "c": "2"},
    }


async def test_rows_fed_by_several_partitions_begin_with_the_defaults(store: Store) -> None:
    spec = {
        "key": "data.k",
        "columns": [
            {"name": "n", "type": "integer", "default": "10", "nullable": False},
            {"name": "zero", "type": "numeric", "default": "0", "nullable": False},
            {"name": "t", "type": "text", "default": "'d'"},
            {"name": "least", "type": "numeric", "default": "3", "nullable": False},
            {"name": "idle", "type": "boolean", "default": "true", "nullable": False},
        ],
        "fold": [{"type": "T", "add": {"n": "1", "zero": "1"}, "set": {"t": "data.t"}, "min": {"least": "data.n"}}],
    }
    stamp = Stamp(dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "a" * 16, 0, 1)
    found = await applied(
        store, spec,
        RowChange("j", merge={"n": 1}),
        RowChange("j", merge={"n": 2, "least": 5, "zero": 4}),
        RowChange("k", set={"t": None}, stamps={"t": stamp}, merge={"least": 1}),
        RowChange("k", merge={"least": 2}),
        RowChange("l", merge={"zero": Decimal("0.5")}),
        RowChange("l", set={"t": "s"}, stamps={"t": stamp}),
    )  # fmt: skip
    assert found == {
        "j": {"n": 13, "zero": 4, "t": "d", "least": 3, "idle": True},
        "k": {"n": 10, "zero": 0, "t": None, "least": 1, "idle": True},
        "l": {"n": 10, "zero": Decimal("0.5"), "t": "s", "least": 3, "idle": True},
    }


async def test_rows_that_were_written_after_they_were_read_are_not_overwritten(store: Store) -> None:
    """As by one who takes up a parked event, which moves no position."""
    definition = parse(
        {
            "streams": ["aa"],
            "columns": [{"name": "n", "type": "integer", "default": "1"}, {"name": "l", "type": "json"}],
            "fold": [{"type": "T", "set": {"n": "row.n * 2"}, "append": {"l": "row.n"}}],
        }
    )
    streams = [StreamRef(namespace="n", name="aa", incarnation="a" * 16, partitions=1, topic="a", schema="a")]
    await store.make(VersionDefinition(definition=definition, streams=streams))
    one, other = store.rows(), store.rows()
    stays = [Advance("a" * 16, 0, 0, 0, None, None, None)]
    reads = ["n", "l"]
    for known, change in [({}, {"n": 2, "l": "[1]"}), ({"k": {"n": 2, "l": "[1]"}}, {"n": 4, "l": "[1, 2]"})]:
        assert one.read({"k", "gone"}, reads) == known
        assert other.read({"k"}, reads) == known
        one.apply([RowChange("k", set=change)], [], stays)
        with pytest.raises(MovedError, match="written by another projector"):
            other.apply([RowChange("k", set=change)], [], stays)
        assert other.read({"k"}, reads) == {"k": change}
        other.apply([], [], stays)
    one.close()
    other.close()


async def test_a_table_tells_its_defaults_and_what_is_never_null(database: str) -> None:
    columns = {
        "text": r"'ü\'\\'", "integer": "-9223372036854775808", "numeric": "2.50", "boolean": "true",
        "timestamp": "'2026-01-01T00:00:00Z'", "json": "{'a': [1, 2.50]}",
    }  # fmt: skip
    definition = parse(
        {
            "streams": ["aa"],
            "columns": [
                {"name": f"c_{name}", "type": name, "default": default, "nullable": False}
                for name, default in columns.items()
            ],
            "fold": [{"type": "T", "delete": True}],
        }
    )
    async with await AsyncConnection.connect(database, autocommit=True) as conn:
        await postgres.install(conn)
        await postgres.claim_projection(conn, namespace="n", name="p", uid="p")
        version = VersionDefinition(definition=definition, streams=[])
        await postgres.ensure_version(conn, namespace="n", name="p", version="v", definition=version)
        table = psycopg.sql.Identifier(names.read_schema("n", "p"), "rows_v")
        await conn.execute(psycopg.sql.SQL("insert into {} (key) values ('k')").format(table))
        cursor = await conn.execute(psycopg.sql.SQL("select * from {}").format(table))
        moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
        found = ("k", "ü'\\", -(2**63), Decimal("2.50"), True, moment, {"a": [1, 2.5]})
        assert await cursor.fetchone() == found
        with pytest.raises(psycopg.errors.NotNullViolation):
            await conn.execute(psycopg.sql.SQL("update {} set c_json = null").format(table))
