"""Event stores for tests: installed by a role that is no superuser, as the operator does it."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from psycopg import AsyncConnection, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from refold import names
from refold.events import Event
from refold.eventstore import AppendResult, EventStore, NewEvent, catalog, migrations, roles
from refold.eventstore.catalog import Stream
from refold.eventstore.errors import EventStoreError

PASSWORD = "d0a1" * 16
KAFKA = "kafka-cluster"
_ids = itertools.count(1)


@dataclass
class Installed:
    """A database with a store: `superuser` and `admin` (CREATEROLE, owns the database) are DSNs."""

    superuser: str
    admin: str
    store_id: str
    database: str = field(init=False)

    def __post_init__(self) -> None:
        self.database = str(conninfo_to_dict(self.superuser)["dbname"])

    def dsn(self, role: str) -> str:
        """Return the DSN of a role that was made a login with `PASSWORD`."""
        return make_conninfo(self.superuser, user=role, password=PASSWORD)

    @property
    def service(self) -> str:
        """The DSN of the event store's own role."""
        return self.dsn(names.store_role(self.database, "eventstore"))

    async def stream(self, name: str = "orders", *, namespace: str = "shop", partitions: int = 3) -> Stream:
        """Make an active stream."""
        async with connected(self.admin) as conn:
            stream = await catalog.claim_stream(
                conn,
                namespace=namespace,
                name=name,
                uid=f"uid of {namespace}/{name}",
                partitions=partitions,
                topic=names.topic(namespace, name),
                kafka_cluster=KAFKA,
            )
            return await catalog.activate(conn, await catalog.record_topic(conn, stream, "topic-id"))

    async def event_types(self, stream: Stream, types: dict[str, Any] | None) -> Stream:
        """Make `types` what an active stream takes."""
        async with connected(self.admin) as conn:
            return await catalog.set_event_types(conn, stream, types)

    async def query(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query by the superuser."""
        async with connected(self.superuser) as conn:
            return await (await conn.execute(query.encode(), arguments or None)).fetchall()

    async def run(self, statements: str) -> None:
        """Run statements as the superuser."""
        async with connected(self.superuser) as conn:
            await conn.execute(statements.encode())

    async def history(self, stream: Stream) -> list[tuple[Any, ...]]:
        """Return partition, position, subject, revision, id, recorded_at of all events, in order."""
        return await self.query(
            f'select partition, position, subject, revision, id, recorded_at from "{stream.schema}".events '
            "order by partition, position"
        )


#: The last migrations of version 0.1.0, the first that was released.
RELEASED = {"store": 1, "stream": 2}


@contextmanager
def version_0_1_0() -> Iterator[None]:
    """Let the catalog know the migrations of version 0.1.0 alone: what is installed is a store of that version."""
    load = migrations.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrations, "load", lambda kind: load(kind)[: RELEASED[kind]])
        yield


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[AsyncConnection[Any]]:
    """Connect in autocommit mode."""
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        yield conn


async def install(database: str) -> Installed:
    """Install a store in the empty `database` (a superuser's DSN), with logins for the services."""
    name = str(conninfo_to_dict(database)["dbname"])
    role = f"admin_of_{name}"
    async with connected(database) as conn:
        await conn.execute(
            sql.SQL(
                "create role {role} login createrole password {password}; alter database {name} owner to {role}"
            ).format(role=sql.Identifier(role), name=sql.Identifier(name), password=PASSWORD)
        )
    admin = make_conninfo(database, user=role, password=PASSWORD)
    async with connected(admin) as conn:
        store_id = await catalog.install_store(conn)
        for part in ("eventstore", "relay"):
            await roles.ensure_login(conn, names.store_role(name, part), PASSWORD)
    return Installed(database, admin, store_id)


def event(data: Any = None, *, id: str | None = None, type: str = "Happened") -> NewEvent:  # noqa: A002
    """Return an event, by default with a new id."""
    return NewEvent.of(type, data, id=f"id-{next(_ids)}" if id is None else id)


def raw(text: str) -> msgspec.Raw:
    """Return JSON text as it is."""
    return msgspec.Raw(text.encode())


def check_history(history: list[tuple[Any, ...]]) -> None:
    """Assert what every history must be: positions and revisions gapless, `recorded_at` never decreasing."""
    partitions: dict[int, list[tuple[Any, ...]]] = {}
    subjects: dict[str, list[tuple[Any, ...]]] = {}
    for row in history:
        partitions.setdefault(row[0], []).append(row)
        subjects.setdefault(row[2], []).append(row)
    for rows in partitions.values():
        assert [row[1] for row in rows] == list(range(1, len(rows) + 1))
        times = [row[5] for row in rows]
        assert times == sorted(times)
    for rows in subjects.values():
        assert len({row[0] for row in rows}) == 1
        assert [row[3] for row in rows] == list(range(1, len(rows) + 1))
        assert len({row[4] for row in rows}) == len(rows)


@dataclass(frozen=True)
class Log:
    """One stream of an opened store."""

    installed: Installed
    store: EventStore
    stream: Stream

    async def append(self, subject: str, *ids: str, **how: Any) -> Any:
        """Append events of these ids; return the outcome, an exception too."""
        events = [event({"id": id}, id=id) for id in ids]  # noqa: A001
        try:
            return await self.add(subject, *events, **how)
        except EventStoreError as error:
            return error

    async def add(self, subject: str, *events: NewEvent, **how: Any) -> AppendResult:
        """Append events."""
        return await self.store.append(self.stream.namespace, self.stream.name, subject, events, **how)

    async def read(self, subject: str, **bounds: Any) -> list[Event]:
        """Read a subject."""
        events = self.store.read_subject(self.stream.namespace, self.stream.name, subject, **bounds)
        return [one async for one in events]

    async def history(self) -> list[tuple[Any, ...]]:
        """Return `Installed.history`."""
        return await self.installed.history(self.stream)


async def together(*calls: Any) -> list[Any]:
    """Run coroutines at once and return their results in order."""
    return list(await asyncio.gather(*calls))
