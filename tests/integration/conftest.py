"""Real servers for the tests: one PostgreSQL, Kafka and Redis a session, a fresh database a test."""

import itertools
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest

from hack.servers import Kafka, Postgres, Redis
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
