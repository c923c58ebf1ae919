"""The PostgreSQL read store: random definitions and batches leave the rows of a plain fold, and of nothing else."""

import itertools
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psycopg import AsyncConnection
from refold import names
from refold.projection.definition import Definition, StreamRef, VersionDefinition
from refold.projection.fold import Parked, compile_fold
from refold.projection.readstore import postgres
from refold.projection.readstore.postgres_rows import Advance, PostgresRows

from tests.folding import Reference, definitions, events_of, steps

_numbers = itertools.count(1)


@pytest.fixture
async def store(database: str) -> str:
    async with await AsyncConnection.connect(database, autocommit=True) as conn:
        await postgres.install(conn)
    return database


async def folded(dsn: str, definition: Definition, history: list[Any], *, several: bool) -> tuple[Any, Reference]:
    """Fold into a version of its own; return its rows and the reference."""
    name = f"p{next(_numbers)}"
    streams = [
        StreamRef(namespace="n", name=stream, incarnation=stream * 8, partitions=2, topic=stream, schema=stream)
        for stream in ("aa", "bb")
    ]
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        await postgres.claim_projection(conn, namespace="n", name=name, uid=name)
        await postgres.ensure_version(
            conn,
            namespace="n",
            name=name,
            version="v",
            definition=VersionDefinition(definition=definition, streams=streams),
        )
    rows = PostgresRows(dsn, namespace="n", name=name, version="v")
    rows.open()
    compiled, reference, parked = compile_fold(definition), Reference(definition, several=several), Parked()
    applied: dict[tuple[str, int], int] = {}
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
            batch, reached = compiled.batch(parked), {}
    rows.close()
    columns = ["key", *(column.name for column in definition.columns)]
    with psycopg.connect(dsn) as connection:
        table = psycopg.sql.Identifier(names.read_schema("n", name), "rows_v")
        found = connection.execute(
            psycopg.sql.SQL("select {} from {}").format(
                psycopg.sql.SQL(", ").join(map(psycopg.sql.Identifier, columns)), table
            )
        )
        return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in found}, reference


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
    store: str, definition: Definition, history: list[Any]
) -> None:
    rows, reference = await folded(store, definition, history, several=False)
    assert rows == reference.rows


@RANDOM
@given(definition=definitions(several=True), history=HISTORY)
async def test_rows_fed_by_several_partitions_equal_the_plain_fold(
    store: str, definition: Definition, history: list[Any]
) -> None:
    rows, reference = await folded(store, definition, history, several=True)
    assert rows == reference.rows
