"""The catalog: installing a store, claiming, releasing and dropping streams, as a role that is no superuser."""

import asyncio
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection
from refold import names
from refold.eventstore import EventStore, catalog
from refold.eventstore.catalog import Stream
from refold.eventstore.errors import ConflictError, NotInstalledError

from tests.stores import KAFKA, Installed, Log, connected, event, install


async def claim(conn: AsyncConnection[Any], **other: Any) -> Stream:
    asked: dict[str, Any] = {
        "namespace": "shop", "name": "orders", "uid": "uid-1", "partitions": 3, "topic": "shop.orders",
        "kafka_cluster": KAFKA,
    }  # fmt: skip
    return await catalog.claim_stream(conn, **{**asked, **other})


async def objects(installed: Installed) -> list[tuple[Any, ...]]:
    """Return all that an install and claims make, with its privileges."""
    return await installed.query(
        "select 'table', c.oid::regclass::text, relkind::text, relacl::text, pg_get_userbyid(relowner)::text "
        "from pg_class c join pg_namespace n on n.oid = relnamespace "
        "where nspname not in ('pg_catalog', 'information_schema', 'pg_toast') "
        "union all select 'schema', nspname, '', nspacl::text, pg_get_userbyid(nspowner) from pg_namespace "
        "union all select 'function', p.oid::regprocedure::text, '', proacl::text, pg_get_userbyid(proowner) "
        "from pg_proc p join pg_namespace n on n.oid = pronamespace "
        "where nspname not in ('pg_catalog', 'information_schema') "
        "union all select 'role', rolname, rolcanlogin::text, '', '' from pg_roles where rolname like '%refold%' "
        "order by 1, 2, 3"
    )


async def test_a_store_is_installed_once_by_a_role_that_is_no_superuser(database: str) -> None:
    installed = await install(database)
    before = await objects(installed)
    async with connected(installed.admin) as conn:
        assert await catalog.install_store(conn) == installed.store_id
        assert await catalog.store_id(conn) == installed.store_id
    assert await objects(installed) == before
    owner = names.store_role(installed.database, "owner")
    assert await installed.query("select rolcanlogin from pg_roles where rolname = %s", owner) == [(False,)]
    assert {row[4] for row in before if row[0] == "table"} == {owner}


async def test_two_installers_at_once_make_one_store(database: str) -> None:
    installed = await install(database)
    await installed.run("drop schema refold cascade")

    async def once() -> str:
        async with connected(installed.admin) as conn:
            return await catalog.install_store(conn)

    assert len(set(await asyncio.gather(*(once() for _ in range(4))))) == 1


async def test_a_database_without_a_store_says_so(database: str) -> None:
    async with connected(database) as conn:
        for ask in (catalog.list_streams(conn), catalog.store_id(conn), claim(conn)):
            with pytest.raises(NotInstalledError, match="holds no event store"):
                await ask
    with pytest.raises(NotInstalledError):
        await EventStore.open(database)


async def test_a_store_takes_over_the_schema_that_a_read_store_made_for_the_same_administrator(database: str) -> None:
    installed = await install(database)
    await installed.run("drop schema refold cascade")
    async with connected(installed.admin) as conn:
        await conn.execute("create schema refold; create table refold.projections (name text)")
        await catalog.install_store(conn)
        await conn.execute("insert into refold.projections values ('still there and writable')")


async def test_claiming_twice_changes_nothing(database: str) -> None:
    installed = await install(database)
    async with connected(installed.admin) as conn:
        stream = await claim(conn)
        assert (stream.state, stream.schema, stream.topic_id) == ("claimed", "shop.orders", None)
        before = await objects(installed)
        assert await claim(conn) == stream
        assert await objects(installed) == before
        assert await catalog.list_streams(conn) == [stream] == [await catalog.get_stream(conn, "shop", "orders")]
        assert await catalog.get_stream(conn, "shop", "other") is None
        assert await catalog.stream_heads(conn) == {stream.stream: {0: 0, 1: 0, 2: 0}}
        heads = await catalog.heads_of(conn, [stream.incarnation, "gone"])
        assert heads == {(stream.incarnation, partition): 0 for partition in range(3)}


async def test_a_stream_becomes_active_with_its_topic_and_stays_so_when_claimed_again(database: str) -> None:
    installed = await install(database)
    async with connected(installed.admin) as conn:
        stream = await catalog.activate(conn, await catalog.record_topic(conn, await claim(conn), "topic-1"))
        assert (stream.state, stream.topic_id) == ("active", "topic-1")
        assert await claim(conn) == stream
        moved = await claim(conn, kafka_cluster="another")
        assert (moved.state, moved.topic_id, moved.kafka_cluster) == ("active", None, "another")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"uid": "uid-2"}, "name"),
        ({"partitions": 4}, "partitions"),
        ({"topic": "shop.other"}, "topic"),
        ({"name": "other", "uid": "uid-2"}, "topic"),
        ({"namespace": "else", "uid": "uid-2"}, "topic"),
    ],
)
async def test_what_belongs_to_another_or_cannot_change_is_refused(
    database: str, other: dict[str, Any], what: str
) -> None:
    installed = await install(database)
    async with connected(installed.admin) as conn:
        stream = await claim(conn)
        with pytest.raises(ConflictError) as caught:
            await claim(conn, **other)
        assert caught.value.what == what
        assert await catalog.list_streams(conn) == [stream]


async def test_a_schema_or_a_role_that_is_not_refolds_is_never_taken_over(database: str) -> None:
    installed = await install(database)
    async with connected(installed.admin) as conn:
        await conn.execute('create schema "shop.orders"')
        with pytest.raises(ConflictError) as caught:
            await claim(conn)
        assert caught.value.what == "schema"
        role = names.resource_role(installed.database, "shop.other", "writer")
        await conn.execute(f'create role "{role}"'.encode())
        with pytest.raises(ConflictError) as caught:
            await claim(conn, name="other", topic="other")
        assert caught.value.what == "role"
        assert await catalog.list_streams(conn) == []


async def test_one_of_many_claims_of_a_name_at_once_wins(database: str) -> None:
    installed = await install(database)

    async def one(number: int) -> Stream | ConflictError:
        async with connected(installed.admin) as conn:
            try:
                return await claim(conn, uid=f"uid-{number}")
            except ConflictError as error:
                return error

    outcomes = await asyncio.gather(*(one(number) for number in range(6)))
    assert len([outcome for outcome in outcomes if isinstance(outcome, Stream)]) == 1


async def test_a_released_stream_is_taken_back_with_its_history_by_the_same_name_only(database: str) -> None:
    installed = await install(database)
    stream = await installed.stream()
    async with await EventStore.open(installed.service) as store, connected(installed.admin) as conn:
        log = Log(installed, store, stream)
        await log.append("s", "1")
        await catalog.release_stream(conn, stream)
        assert "isn't active" in str(await log.append("s", "2"))
        released = await catalog.get_stream(conn, "shop", "orders")
        assert released is not None
        assert (released.state, released.uid) == ("released", None)
        with pytest.raises(ConflictError):
            await claim(conn, name="other")
        back = await claim(conn, uid="a new uid")
        assert (back.state, back.incarnation, back.stream) == ("claimed", stream.incarnation, stream.stream)
        await catalog.activate(conn, back)
        assert (await log.append("s", "2", expected_revision=1)).revision == 2


async def test_a_claim_that_was_lost_cannot_be_written_to(database: str) -> None:
    installed = await install(database)
    async with connected(installed.admin) as conn:
        stream = await claim(conn)
        await catalog.release_stream(conn, stream)
        await claim(conn, uid="uid-2")
        for change in (catalog.activate(conn, stream), catalog.record_topic(conn, stream, "mine")):
            with pytest.raises(ConflictError):
                await change
        await catalog.release_stream(conn, stream)
        kept = await catalog.get_stream(conn, "shop", "orders")
        assert kept is not None
        assert kept.uid == "uid-2"


async def test_dropping_leaves_nothing_and_only_ones_own(database: str) -> None:
    installed = await install(database)
    before = await objects(installed)
    async with connected(installed.admin) as conn:
        await claim(conn)
        assert not await catalog.drop_stream(conn, namespace="shop", name="orders", uid="uid-2")
        assert not await catalog.drop_stream(conn, namespace="shop", name="other", uid="uid-1")
        assert await catalog.get_stream(conn, "shop", "orders") is not None
        assert await catalog.drop_stream(conn, namespace="shop", name="orders", uid="uid-1")
        assert not await catalog.drop_stream(conn, namespace="shop", name="orders", uid="uid-1")
        assert await objects(installed) == before
        assert await catalog.stream_heads(conn) == {}
        again = await claim(conn)
        assert again.stream == 2


async def test_a_stream_made_anew_is_another_incarnation_for_a_running_store(database: str) -> None:
    installed = await install(database)
    stream = await installed.stream()
    async with await EventStore.open(installed.service) as store, connected(installed.admin) as conn:
        log = Log(installed, store, stream)
        first = await log.append("s", "1")
        await catalog.drop_stream(conn, namespace="shop", name="orders", uid=str(stream.uid))
        await installed.stream()
        outcomes = [await log.append("s", "1") for _ in range(2)]
        # The first may still be sent to the old stream and be refused; never is it written under the old one's name.
        assert outcomes[1].token != first.token
        assert outcomes[1].revision == 1


async def test_names_too_long_for_postgresql_stay_apart(database: str) -> None:
    installed = await install(database)
    one, two = "a" * 40 + "1", "a" * 40 + "2"
    first = await installed.stream(one, namespace="n" * 40)
    second = await installed.stream(two, namespace="n" * 40)
    assert first.schema != second.schema
    assert len(first.schema.encode()) <= 63
    async with await EventStore.open(installed.service) as store:
        for name in (one, two):
            assert (await store.append("n" * 40, name, "s", [event()])).position == 1


async def test_a_schema_of_an_earlier_version_is_upgraded_with_its_events(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = await install(database)
    stream = await installed.stream()
    async with await EventStore.open(installed.service) as store:
        log = Log(installed, store, stream)
        await log.append("s", "1", "2")
        history = await installed.history(stream)
        load = catalog.migrations.load
        later = catalog.migrations.Migration(
            99, "later", 'create view :"schema".counted as select count(*) from :"schema".events'
        )
        monkeypatch.setattr(
            catalog.migrations, "load", lambda kind: (*load(kind), later) if kind == "stream" else load(kind)
        )
        async with connected(installed.admin) as conn:
            await catalog.install_store(conn)
            upgraded = await catalog.get_stream(conn, "shop", "orders")
        assert upgraded is not None
        assert upgraded.migration == 99
        assert await installed.query('select * from "shop.orders".counted') == [(2,)]
        assert await installed.history(stream) == history
        assert (await log.append("s", "3", expected_revision=2)).revision == 3


async def test_an_administrator_without_the_right_to_make_roles_is_told_so_by_postgresql(database: str) -> None:
    async with connected(database) as conn:
        await conn.execute("drop role if exists weak; create role weak login")
        await conn.execute("set role weak")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await catalog.install_store(conn)
