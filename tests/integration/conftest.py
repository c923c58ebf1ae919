"""Real servers for the tests: one PostgreSQL, Kafka and Redis a session, a fresh database a test."""

import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from refold.projection.readstore import postgres as read_store

from hack.servers import Kafka, Postgres, Redis
from tests.projecting import World
from tests.readstores import Store

_numbers = itertools.count(1)
_databases = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server; a test that kills it starts it again."""
    server = Postgres()
    server.start()
    yield server
    server.remove()


@pytest.fixture
def database(postgres: Postgres) -> str:
    """The superuser's DSN of a fresh, empty database."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f'create database "{name}"')
    return postgres.dsn(name)


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """A Kafka broker; a test that kills it starts it again."""
    broker = Kafka()
    broker.start()
    yield broker
    broker.remove()


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    """A Redis server; a test that kills it starts it again."""
    server = Redis()
    server.start()
    yield server
    server.remove()


@pytest.fixture(params=["postgres", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """A read store of each kind, empty."""
    if request.param == "redis":
        found = Store(request.getfixturevalue("redis").url(next(_databases)))
    else:
        found = Store(request.getfixturevalue("database"))
    await found.open()
    yield found
    await found.close()


@pytest.fixture
async def admin(database: str) -> AsyncIterator[AsyncConnection[Any]]:
    """A connection as the operator has it: no superuser, CREATEROLE, owner of the database."""
    name = conninfo_to_dict(database)["dbname"]
    async with await AsyncConnection.connect(database, autocommit=True) as root:
        await root.execute(f'create role "admin_{name}" login createrole')
        await root.execute(f'alter database "{name}" owner to "admin_{name}"')
        dsn = make_conninfo(database, user=f"admin_{name}")
        async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
            await read_store.install(conn)
            yield conn
        cursor = await root.execute("select rolname from pg_roles where rolname like %s", [f"refold_{name}:%"])
        left = [row[0] for row in await cursor.fetchall()]
        for role in left:
            await root.execute(f'drop owned by "{role}"; drop role "{role}"')


@pytest.fixture
async def world(database: str, kafka: Kafka) -> World:
    """A Refold with one stream of three partitions; a module that needs another one has a `world` of its own."""
    world = World(database, kafka)
    await world.install()
    await world.stream()
    return world
