"""The live version's rows for those who read them in SQL: a view, and a login that may read it and nothing else."""

import threading
import time
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, Connection
from psycopg.conninfo import make_conninfo
from refold.eventstore import roles
from refold.projection.definition import Column, Definition, FoldRule, StreamRef, VersionDefinition
from refold.projection.readstore import BusyError, ReadStoreError, postgres, postgres_sql

STATUS = {"namespace": "shop", "name": "order-status"}
SCHEMA = "shop.order-status.read"
PASSWORD = "s" * 43
#: A version with the columns of another one, and one without.
FIRST, SAME, OTHER = "aaaa0001", "bbbb0002", "cccc0003"
COLUMNS = {
    FIRST: {"status": "text", "items": "integer"},
    SAME: {"status": "text", "items": "integer"},
    OTHER: {"total": "numeric", "status": "text"},
}


async def make(admin: AsyncConnection[Any], version: str, name: str = "order-status") -> None:
    """Make a version with the rows a, b and c, whose status is its name."""
    streams = [
        StreamRef(
            namespace="shop", name="orders", incarnation="0" * 16, partitions=2, topic="shop.orders",
            schema="shop.orders",
        )
    ]  # fmt: skip
    definition = Definition(
        streams=["orders"],
        columns=[Column.model_validate({"name": name, "type": type_}) for name, type_ in COLUMNS[version].items()],
        fold=[FoldRule(type="OrderPlaced", set={"status": "'placed'"})],
    )
    await postgres.claim_projection(admin, namespace="shop", name=name, uid="u1")
    await postgres.ensure_version(
        admin, namespace="shop", name=name, version=version,
        definition=VersionDefinition(definition=definition, streams=streams),
    )  # fmt: skip
    await admin.execute(
        f'insert into "shop.{name}.read".rows_{version} (key, status) '
        f"select key, '{version}' from unnest(array['a', 'b', 'c']) key on conflict do nothing"
    )


async def swap(admin: AsyncConnection[Any], version: str) -> bool:
    await admin.execute(f'update "{SCHEMA}".positions set seen_at = now()')
    return await postgres.try_swap(admin, **STATUS, version=version)


def dsn(admin: AsyncConnection[Any], schema: str = SCHEMA) -> str:
    user = postgres_sql.login(admin.info.dbname, schema)
    return make_conninfo(
        host=admin.info.host, port=admin.info.port, dbname=admin.info.dbname, user=user, password=PASSWORD
    )


def connect(admin: AsyncConnection[Any], **how: Any) -> Connection[Any]:
    return psycopg.connect(dsn(admin), autocommit=True, **how)


@pytest.fixture(autouse=True)
async def reader(admin: AsyncConnection[Any]) -> None:
    await make(admin, FIRST)
    assert await postgres.ensure_sql_login(admin, **STATUS, password=PASSWORD)


async def test_the_login_reads_the_view_and_is_refused_everything_else(admin: AsyncConnection[Any]) -> None:
    await make(admin, FIRST, "other")
    assert not await postgres.ensure_sql_login(admin, **STATUS, password=PASSWORD), "nothing is left to do"
    with connect(admin) as conn:
        cursor = conn.execute("select * from rows order by key")
        assert [column.name for column in cursor.description or ()] == ["key", "status", "items"]
        assert cursor.fetchall() == [(key, FIRST, None) for key in "abc"]
        joined = f"select count(*) from \"{SCHEMA}\".rows join unnest(array['a', 'x']) wanted on wanted = key"
        assert conn.execute(joined).fetchone() == (1,)
        conn.execute("set default_transaction_read_only = off")
        tables = ["versions", "pointer", "positions", "parked", "discarded", f"rows_{FIRST}"]
        for refused in [
            *(f'select from "{SCHEMA}".{table}' for table in tables),
            'select from "shop.other.read".rows',
            "select from refold_read.projections",
            "delete from rows",
            "update rows set status = ''",
            "insert into rows (key) values ('z')",
            f'create table "{SCHEMA}".mine ()',
            "create table public.mine ()",
            "drop view rows",
            f'set role "{admin.info.user}"',
            "create role mine",
        ]:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(refused)


async def test_a_reader_sees_one_version_or_the_other_whatever_is_swapped(admin: AsyncConnection[Any]) -> None:
    for version in (SAME, OTHER):
        await make(admin, version)
    stop, failures, seen = threading.Event(), [], set()

    def read(prepared: bool) -> None:
        try:
            with connect(admin, prepare_threshold=0 if prepared else None) as conn:
                while not stop.is_set():
                    found = conn.execute("select key, status from rows order by key").fetchall()
                    assert [key for key, _ in found] == ["a", "b", "c"], found
                    assert len({status for _, status in found}) == 1, found
                    seen.add(found[0][1])
        except (psycopg.Error, AssertionError) as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(prepared,)) for prepared in (True, False)]
    for thread in threads:
        thread.start()
    try:
        for version in (SAME, OTHER, FIRST, OTHER, SAME, FIRST) * 3:
            assert await swap(admin, version)
            until(lambda version=version: failures or version in seen)
            seen.clear()
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not failures, failures


async def test_a_swap_and_the_end_of_a_version_wait_for_transactions_that_have_read_it(
    admin: AsyncConnection[Any],
) -> None:
    await make(admin, SAME)
    with connect(admin) as conn:
        with conn.transaction():
            conn.execute("select from rows")
            with pytest.raises(BusyError, match="pg_stat_activity"):
                await swap(admin, SAME)
            # Neither the projector nor other readers wait.
            await admin.execute("set lock_timeout = '1s'")
            await admin.execute(f'update "{SCHEMA}".positions set position = 1')
            await admin.execute(f'select from "{SCHEMA}".rows')
            assert (await postgres.status(admin, **STATUS)).live == FIRST
        assert await swap(admin, SAME)
    with connect(admin) as conn:
        assert conn.execute("select distinct status from rows").fetchall() == [(SAME,)]
        with conn.transaction():
            conn.execute("select from rows")
            with pytest.raises(BusyError):
                await postgres.drop_projection(admin, **STATUS, uid="u1")
    await admin.execute("begin")
    await admin.execute(f'select from "{SCHEMA}".rows_{FIRST}')
    async with await AsyncConnection.connect(
        make_conninfo(host=admin.info.host, port=admin.info.port, dbname=admin.info.dbname, user=admin.info.user),
        autocommit=True,
    ) as operator:
        with pytest.raises(BusyError):
            await postgres.drop_version(operator, **STATUS, version=FIRST)
        await admin.execute("commit")
        assert await postgres.drop_version(operator, **STATUS, version=FIRST)


async def test_a_swap_that_would_go_back_in_time_moves_no_view(admin: AsyncConnection[Any]) -> None:
    await make(admin, SAME)
    await admin.execute(f"update \"{SCHEMA}\".positions set position = 5 where version = '{FIRST}'")
    assert not await swap(admin, SAME)
    with connect(admin) as conn:
        assert conn.execute("select distinct status from rows").fetchall() == [(FIRST,)]


async def test_a_snapshot_from_before_a_swap_never_shows_rows_that_were_being_built(
    admin: AsyncConnection[Any],
) -> None:
    with connect(admin) as conn:
        conn.execute("begin isolation level repeatable read")
        conn.execute("select 1")  # which takes the snapshot
        await make(admin, SAME)
        assert await swap(admin, SAME)
        with pytest.raises(psycopg.errors.InvalidTextRepresentation, match="begin another one"):
            conn.execute("select * from rows")
        conn.execute("rollback")
        with conn.transaction():
            assert conn.execute("select distinct status from rows").fetchall() == [(SAME,)]


async def test_what_somebody_makes_of_the_view_goes_on_while_its_columns_stay(admin: AsyncConnection[Any]) -> None:
    for version in (SAME, OTHER):
        await make(admin, version)
    await admin.execute(f'create view public.statuses as select distinct status from "{SCHEMA}".rows')
    assert await swap(admin, SAME)
    assert await (await admin.execute("select * from statuses")).fetchall() == [(SAME,)]
    with pytest.raises(ReadStoreError, match="view statuses depends on"):
        await swap(admin, OTHER)
    assert (await postgres.status(admin, **STATUS)).live == SAME
    await admin.execute("drop view statuses")
    assert await swap(admin, OTHER)
    with connect(admin) as conn:
        assert conn.execute("select * from rows where key = 'a'").fetchall() == [("a", None, OTHER)]


async def test_a_read_model_of_an_earlier_release_gets_the_view(admin: AsyncConnection[Any]) -> None:
    await admin.execute(f'drop view "{SCHEMA}".rows')
    await make(admin, FIRST)
    with connect(admin) as conn:
        assert conn.execute("select count(*) from rows").fetchone() == (3,)


async def test_the_login_goes_when_nobody_asks_for_it_and_with_the_projection(admin: AsyncConnection[Any]) -> None:
    assert await postgres.drop_sql_login(admin, **STATUS)
    assert not await postgres.drop_sql_login(admin, **STATUS)
    with pytest.raises(psycopg.OperationalError):
        connect(admin)
    await postgres.ensure_sql_login(admin, **STATUS, password=PASSWORD)
    assert not await postgres.release_projection(admin, **STATUS, uid="another")
    connect(admin).close()
    assert await postgres.release_projection(admin, **STATUS, uid="u1")
    with pytest.raises(psycopg.OperationalError):
        connect(admin)
    await make(admin, FIRST)
    await postgres.ensure_sql_login(admin, **STATUS, password=PASSWORD)
    connect(admin).close()
    assert await postgres.drop_projection(admin, **STATUS, uid="u1")
    with pytest.raises(psycopg.OperationalError):
        connect(admin)
    cursor = await admin.execute(
        "select from pg_roles where rolname = %s", [postgres_sql.login(admin.info.dbname, SCHEMA)]
    )
    assert await cursor.fetchone() is None


async def test_a_role_of_somebody_else_is_not_taken_over(admin: AsyncConnection[Any]) -> None:
    await postgres.drop_sql_login(admin, **STATUS)
    role = postgres_sql.login(admin.info.dbname, SCHEMA)
    await admin.execute(f'create role "{role}"')
    with pytest.raises(roles.ConflictError, match="wasn't made by Refold"):
        await postgres.ensure_sql_login(admin, **STATUS, password=PASSWORD)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
