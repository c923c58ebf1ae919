"""The PostgreSQL read store as the operator uses it, over an administrator's role that is no superuser."""

import asyncio
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from refold import names
from refold.projection.definition import Column, Definition, FoldRule, StreamRef, VersionDefinition
from refold.projection.readstore import Applied, ConflictError, NotFoundError, postgres

ORDERS = {"namespace": "shop", "name": "order-status"}
SCHEMA = "shop.order-status.read"
V1 = "aaaa0001"
V2 = "bbbb0002"


def version_definition(*, index: bool = True, partitions: int = 2) -> VersionDefinition:
    return VersionDefinition(
        definition=Definition(
            streams=["orders"],
            columns=[
                Column(name="status", type="text", index=index),
                Column(name="items", type="integer"),
                Column(name="total", type="numeric"),
            ],
            fold=[FoldRule(type="OrderPlaced", set={"status": "'placed'"}, add={"items": "1"})],
        ),
        streams=[
            StreamRef(
                namespace="shop", name="orders", incarnation="0" * 16, partitions=partitions, topic="shop.orders",
                schema="shop.orders",
            )
        ],
    )  # fmt: skip


async def login(admin: AsyncConnection[Any], part: str, password: str) -> AsyncConnection[Any]:
    role = names.resource_role(admin.info.dbname, SCHEMA, part)
    dsn = make_conninfo(
        host=admin.info.host, port=admin.info.port, dbname=admin.info.dbname, user=role, password=password
    )
    return await AsyncConnection.connect(dsn, autocommit=True)


def place(row: Applied) -> tuple[str, int]:
    return row.place


async def make(admin: AsyncConnection[Any], version: str = V1, **options: Any) -> None:
    await postgres.claim_projection(admin, **ORDERS, uid="u1")
    await postgres.ensure_version(admin, **ORDERS, version=version, definition=version_definition(**options))


async def test_the_first_version_goes_live_at_once_and_later_ones_do_not(admin: AsyncConnection[Any]) -> None:
    await make(admin, V1)
    await make(admin, V2)
    status = await postgres.status(admin, **ORDERS)
    assert status.live == V1
    assert [(version.version, version.live) for version in status.versions.values()] == [(V1, True), (V2, False)]
    assert [(p.partition, p.position, p.head) for p in status.versions[V2].partitions] == [(0, 0, 0), (1, 0, 0)]


async def test_how_far_many_projections_are_is_one_answer_without_those_that_are_not_there(
    admin: AsyncConnection[Any],
) -> None:
    asked = [("shop", "order-status"), ("shop", "gone"), ("shop", "customers")]
    assert await postgres.applied(admin, asked) == {}
    await make(admin, V1)
    await make(admin, V2)
    await postgres.claim_projection(admin, namespace="shop", name="customers", uid="u2")
    await admin.execute(f'update "{SCHEMA}".positions set position = 4, head = 7 where partition = 1')
    await admin.execute(f"update \"{SCHEMA}\".positions set stopped = 'no' where partition = 0 and version = '{V2}'")
    await admin.execute(
        f'insert into "{SCHEMA}".parked (version, incarnation, partition, position, subject, error) '
        f"values ('{V1}', '', 0, 1, 'a', 'bad')"
    )
    found = await postgres.applied(admin, asked)
    assert list(found) == [("shop", "order-status")]
    status = await postgres.status(admin, **ORDERS)
    assert {version: sorted(each, key=place) for version, each in found["shop", "order-status"].items()} == {
        version: sorted(each.applied, key=place) for version, each in status.versions.items()
    }
    first, second = sorted(found["shop", "order-status"][V1], key=place)
    assert (first.position, first.stopped, first.parked) == (0, False, True)
    assert (second.place, second.position, second.head) == (("0" * 16, 1), 4, 7)
    assert [(each.stopped, each.parked) for each in sorted(found["shop", "order-status"][V2], key=place)] == [
        (True, False), (False, False),
    ]  # fmt: skip


async def test_everything_can_be_repeated_and_run_twice_at_once(admin: AsyncConnection[Any]) -> None:
    dsn = make_conninfo(host=admin.info.host, port=admin.info.port, dbname=admin.info.dbname, user=admin.info.user)

    async def reconcile() -> None:
        async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
            await postgres.install(conn)
            await make(conn)
            await postgres.ensure_logins(conn, **ORDERS, projector_password="p" * 32, query_password="q" * 32)

    await asyncio.gather(*(reconcile() for _ in range(4)))
    assert (await postgres.status(admin, **ORDERS)).live == V1
    assert not await postgres.ensure_logins(admin, **ORDERS, projector_password="p" * 32, query_password="q" * 32)


async def test_a_schema_of_another_resource_or_of_someone_else_is_refused(admin: AsyncConnection[Any]) -> None:
    await postgres.claim_projection(admin, **ORDERS, uid="u1")
    with pytest.raises(ConflictError, match="uid u1"):
        await postgres.claim_projection(admin, **ORDERS, uid="u2")
    await admin.execute('create schema "shop.theirs.read"')
    with pytest.raises(ConflictError, match="wasn't made by Refold"):
        await postgres.claim_projection(admin, namespace="shop", name="theirs", uid="u1")


async def test_a_released_read_model_is_taken_back_with_its_rows(admin: AsyncConnection[Any]) -> None:
    await make(admin)
    await admin.execute(f"insert into \"{SCHEMA}\".rows_{V1} (key, status) values ('a', 'placed')")
    assert await postgres.release_projection(admin, **ORDERS, uid="u1")
    await postgres.claim_projection(admin, **ORDERS, uid="u2")
    cursor = await admin.execute(f'select key from "{SCHEMA}".rows_{V1}')
    assert await cursor.fetchall() == [("a",)]


async def test_a_version_whose_rows_someone_dropped_is_made_again_from_before_its_first_event(
    admin: AsyncConnection[Any],
) -> None:
    await make(admin, V1)
    await make(admin, V2)
    await postgres.ensure_logins(admin, **ORDERS, projector_password="p" * 32, query_password="q" * 32)
    await admin.execute(f'update "{SCHEMA}".positions set position = 9')
    assert not await postgres.ensure_version(admin, **ORDERS, version=V1, definition=version_definition())
    await admin.execute(f'drop table "{SCHEMA}".rows_{V1} cascade')
    assert await postgres.ensure_version(admin, **ORDERS, version=V1, definition=version_definition())
    found = await postgres.status(admin, **ORDERS)
    assert found.live == V1
    assert [version.position for version in found.versions.values()] == [0, 18], "the other version has its rows"
    async with await login(admin, "query", "q" * 32) as reader:
        assert (await (await reader.execute(f'select count(*) from "{SCHEMA}".rows_{V1}')).fetchone()) == (0,)
    assert (await (await admin.execute(f'select count(*) from "{SCHEMA}".rows')).fetchone()) == (0,)


async def test_indexes_follow_the_definition_without_a_new_version(admin: AsyncConnection[Any]) -> None:
    async def indexed() -> list[str]:
        cursor = await admin.execute(
            "select indexname::text from pg_indexes "
            "where schemaname = %s and tablename = %s and indexname like '%%~%%'",
            [SCHEMA, f"rows_{V1}"],
        )
        return [row[0] for row in await cursor.fetchall()]

    await make(admin, index=True)
    assert await indexed() == [f"rows_{V1}~status"]
    await make(admin, index=False)
    assert await indexed() == []
    await make(admin, index=True)
    assert await indexed() == [f"rows_{V1}~status"]
    cursor = await admin.execute(f'select definition from "{SCHEMA}".versions')
    row = await cursor.fetchone()
    assert row is not None
    assert VersionDefinition.model_validate(row[0]) == version_definition(index=True)


async def test_the_logins_can_do_their_work_and_nothing_else(admin: AsyncConnection[Any]) -> None:
    await make(admin, V1)
    await postgres.ensure_logins(admin, **ORDERS, projector_password="p" * 32, query_password="q" * 32)
    await make(admin, V2)  # made after the logins
    await postgres.claim_projection(admin, namespace="shop", name="other", uid="u9")
    async with await login(admin, "projector", "p" * 32) as projector, await login(admin, "query", "q" * 32) as query:
        for version in (V1, V2):
            await projector.execute(f"insert into \"{SCHEMA}\".rows_{version} (key) values ('a')")
            await projector.execute(f"update \"{SCHEMA}\".rows_{version} set status = 'x'")
            await query.execute(f'select * from "{SCHEMA}".rows_{version}')
        await projector.execute(f'update "{SCHEMA}".positions set position = 1')
        await projector.execute("create temporary table stage (k text)")
        await query.execute(f'select * from "{SCHEMA}".positions, "{SCHEMA}".pointer, "{SCHEMA}".parked')
        for conn, statement in [
            (query, f'update "{SCHEMA}".rows_{V1} set status = null'),
            (query, f'delete from "{SCHEMA}".positions'),
            (projector, f'update "{SCHEMA}".pointer set live = null'),
            (projector, f"insert into \"{SCHEMA}\".versions values (1, '{{}}')"),
            (projector, f'delete from "{SCHEMA}".positions'),
            (projector, f'drop table "{SCHEMA}".rows_{V1}'),
            (projector, 'select * from "shop.other.read".positions'),
            (query, 'select * from "shop.other.read".positions'),
            (projector, "select * from refold_read.projections"),
            (query, f'create table "{SCHEMA}".t (x int)'),
        ]:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await conn.execute(statement)


async def advance(admin: AsyncConnection[Any], version: str, positions: dict[int, int], *, head: int = 0) -> None:
    for partition, position in positions.items():
        await admin.execute(
            f'update "{SCHEMA}".positions set position = %s, head = %s, seen_at = now() '
            "where version = %s and partition = %s",
            [position, head, version, partition],
        )


async def test_a_version_is_swapped_in_only_where_readers_do_not_go_back(admin: AsyncConnection[Any]) -> None:
    await make(admin, V1)
    await make(admin, V2)
    await advance(admin, V1, {0: 5, 1: 7})
    await advance(admin, V2, {0: 5, 1: 6})
    assert not await postgres.try_swap(admin, **ORDERS, version=V2)
    await advance(admin, V2, {1: 7})
    await admin.execute(
        f'insert into "{SCHEMA}".parked (version, incarnation, partition, position, key, subject, error) '
        "values (%s, '', 0, 3, 'a', 'a', 'bad')",
        [V2],
    )
    assert not await postgres.try_swap(admin, **ORDERS, version=V2)
    assert (await postgres.status(admin, **ORDERS)).versions[V2].parked_error == "bad"
    await admin.execute(f'delete from "{SCHEMA}".parked')
    assert await postgres.try_swap(admin, **ORDERS, version=V2)
    assert (await postgres.status(admin, **ORDERS)).live == V2
    with pytest.raises(NotFoundError):
        await postgres.try_swap(admin, **ORDERS, version="cccc0003")


async def test_the_read_store_knows_when_a_version_was_last_live(admin: AsyncConnection[Any]) -> None:
    async def retired() -> dict[str, bool]:
        found = await postgres.status(admin, **ORDERS)
        assert all((one.retired_at is None) == (one.retired_seconds is None) for one in found.versions.values())
        return {name: one.retired_at is not None for name, one in found.versions.items()}

    await make(admin, V1)
    await make(admin, V2)
    assert await retired() == {V1: False, V2: False}
    assert await postgres.try_swap(admin, **ORDERS, version=V1)
    assert await retired() == {V1: False, V2: False}
    assert await postgres.try_swap(admin, **ORDERS, version=V2)
    assert await retired() == {V1: True, V2: False}
    await admin.execute(f"update \"{SCHEMA}\".versions set retired_at = now() - interval '90 s' where version = '{V1}'")
    (first, _) = (await postgres.status(admin, **ORDERS)).versions.values()
    assert first.retired_seconds == pytest.approx(90, abs=30)
    assert await postgres.try_swap(admin, **ORDERS, version=V1), "a former version folds on, so that it can come back"
    assert await retired() == {V1: False, V2: True}


async def test_a_read_model_of_an_earlier_refold_gets_what_was_added_since(admin: AsyncConnection[Any]) -> None:
    await make(admin, V1)
    await admin.execute(f'alter table "{SCHEMA}".versions drop column retired_at')
    await make(admin, V2)
    assert await postgres.try_swap(admin, **ORDERS, version=V2)
    assert (await postgres.status(admin, **ORDERS)).versions[V1].retired_at is not None


async def test_a_version_with_a_partition_that_the_live_one_lacks_waits_for_its_head(
    admin: AsyncConnection[Any],
) -> None:
    await make(admin, V1, partitions=1)
    await make(admin, V2, partitions=2)
    assert not await postgres.try_swap(admin, **ORDERS, version=V2), "nobody has seen the head of partition 1 yet"
    await advance(admin, V2, {1: 3}, head=4)
    assert not await postgres.try_swap(admin, **ORDERS, version=V2)
    await advance(admin, V2, {1: 4}, head=4)
    assert await postgres.try_swap(admin, **ORDERS, version=V2)


async def test_the_live_version_is_not_dropped_but_a_former_one_is(admin: AsyncConnection[Any]) -> None:
    await make(admin, V1)
    await make(admin, V2)
    with pytest.raises(ConflictError, match="live"):
        await postgres.drop_version(admin, **ORDERS, version=V1)
    assert await postgres.drop_version(admin, **ORDERS, version=V2)
    assert not await postgres.drop_version(admin, **ORDERS, version=V2)
    assert list((await postgres.status(admin, **ORDERS)).versions) == [V1]


async def test_dropping_a_projection_leaves_no_schema_and_no_login(admin: AsyncConnection[Any]) -> None:
    await make(admin)
    await postgres.ensure_logins(admin, **ORDERS, projector_password="p" * 32, query_password="q" * 32)
    with pytest.raises(ConflictError):
        await postgres.drop_projection(admin, **ORDERS, uid="u2")
    assert await postgres.drop_projection(admin, **ORDERS, uid="u1")
    assert not await postgres.drop_projection(admin, **ORDERS, uid="u1")
    cursor = await admin.execute(
        "select (select count(*) from pg_namespace where nspname = %s), "
        "(select count(*) from pg_roles where rolname like %s)",
        [SCHEMA, f"refold_{admin.info.dbname}:{SCHEMA}:%"],
    )
    assert await cursor.fetchone() == (0, 0)
    with pytest.raises(NotFoundError):
        await postgres.status(admin, **ORDERS)
