"""Administrators' passwords that are changed while the operator uses them: in the server, then in the file."""

import asyncio
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from refold.projection.readstore import UnavailableError
from refold_operator import resources
from refold_operator.cluster import Cluster
from refold_operator.database import Database
from refold_operator.errors import UnreachableError
from refold_operator.redis import RedisReadStores

from hack.servers import EmbeddedRedis, Postgres


async def answers(database: Database) -> bool:
    async with database.connection() as connection:
        return (await (await connection.execute("select 1")).fetchone()) == (1,)


async def test_a_password_of_postgresql_is_taken_over_from_the_file(postgres: Postgres, tmp_path: Path) -> None:
    file = tmp_path / "dsn"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("create role rotating login password 'first'")
        # the test server trusts everybody who asks; so what tells the logins apart is who may connect at all
        connection.execute("create role rotated login password 'second'")
    file.write_text(postgres.dsn(user="rotating", password="first"))
    database = Database(lambda: file.read_text(), "event store")
    await database.open()
    try:
        assert await answers(database)
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute("alter role rotating nologin")
            connection.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'rotating'")
        with pytest.raises(UnreachableError, match="rotating"):
            await answers(database)
        file.write_text(postgres.dsn(user="rotated", password="second"))
        assert await answers(database)

        file.write_text(make_conninfo(file.read_text(), dbname="template1"))
        with pytest.raises(UnreachableError, match="names another database now, template1"):
            database.dsn  # noqa: B018 - it is read
        file.write_text("nonsense with a secret")
        with pytest.raises(UnreachableError) as refused:
            database.dsn  # noqa: B018
        assert "secret" not in str(refused.value)
        file.unlink()
        with pytest.raises(UnreachableError, match="can't be used"):
            database.dsn  # noqa: B018
    finally:
        await database.close()


async def test_who_asked_before_the_pool_gave_up_is_served_once_the_server_answers(postgres: Postgres) -> None:
    def allow(login: str) -> None:
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(f"alter role awaited {login}")

    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("create role awaited nologin")
    database = Database(postgres.dsn(user="awaited"), "event store")
    await database.open()
    try:
        first = asyncio.create_task(answers(database))
        await asyncio.sleep(3)
        second = asyncio.create_task(answers(database))
        with pytest.raises(UnreachableError, match="awaited"):
            await first
        await asyncio.sleep(1)  # the attempts that the first one began are over, and the second began none
        allow("login")
        assert await second
    finally:
        await database.close()


def projection() -> resources.Projection:
    metadata = {"namespace": "shop", "name": "status", "uid": "u", "generation": 1, "resourceVersion": "1"}
    return resources.projection({"metadata": metadata, "spec": {"streams": ["orders"], "readStore": {"type": "redis"}}})


async def test_a_password_of_redis_is_taken_over_from_the_file(tmp_path: Path) -> None:
    server = EmbeddedRedis()
    file = tmp_path / "url"
    file.write_text(server.admin_url)
    stores = RedisReadStores(Cluster.__new__(Cluster), admin=lambda: file.read_text())
    try:
        await asyncio.to_thread(server.start)
        assert await stores.of(projection()) is await stores.of(projection())
        await asyncio.to_thread(server.stop)
        server.use("second")
        await asyncio.to_thread(server.start)
        with pytest.raises(UnavailableError):
            await stores.of(projection())
        file.write_text(server.admin_url)
        await stores.of(projection())
        file.write_text("nonsense with a secret")
        with pytest.raises(UnavailableError) as refused:
            await stores.of(projection())
        assert "secret" not in str(refused.value)
    finally:
        await stores.close()
        server.remove()
