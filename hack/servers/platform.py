"""A whole Refold without Kubernetes, for attacks and benchmarks: what the operator and the chart do, on 127.0.0.1.

Streams and projections are made through the same functions that the operator calls; each process of the data plane is
the `refold` command with the settings of docs/architecture.md, so that a test can kill, stop and restart it.
"""

import asyncio
import contextlib
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx
import psycopg
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, NewTopic
from psycopg.conninfo import make_conninfo
from refold import names
from refold.eventstore import catalog, roles
from refold.projection import definition as definitions
from refold.projection.readstore import postgres as readstore
from refold.projection.readstore.redis import RedisStore

from hack.servers.callers import TOKEN, get, tokens_file
from hack.servers.process import Process, free_port

#: A broker takes a limited number of partitions in one request.
_TOPICS_AT_ONCE = 100
_CLAIMS_AT_ONCE = 2
STORE, READ = "refold_store", "refold_read"


class Database(Protocol):
    """A PostgreSQL server; `dsn` returns a superuser's DSN of one of its databases."""

    def dsn(self, database: str = "postgres") -> str: ...  # noqa: D102


class Broker(Protocol):
    """A Kafka cluster; `bootstrap` is `host:port`."""

    @property
    def bootstrap(self) -> str: ...  # noqa: D102


class Platform:
    """An installation on servers that run already. The processes are the caller's to start."""

    def __init__(
        self, postgres: Database, kafka: Broker, *, read: Database | None = None, store_database: str = STORE,
        read_database: str = READ,
    ) -> None:  # fmt: skip
        """Make both databases, the roles of the services, and a folder for logs.

        Args:
            postgres: where the event store goes.
            kafka: where the topics go.
            read: where the read models go, by default `postgres`.
            store_database: the event store's database, which must not exist; roles carry its name.
            read_database: the read models' database, which must not exist either.
        """
        self.postgres, self.kafka = postgres, kafka
        self.store_database, self.read_database = store_database, read_database
        self.read_server = read or postgres
        self._servers = {store_database: postgres, read_database: self.read_server}
        self.logs = Path(tempfile.mkdtemp(prefix="refold-logs-"))
        self._auth = tokens_file(TOKEN, self.logs)
        self._password = secrets.token_hex(16)
        self._admins = {database: f"{database}_admin" for database in self._servers}
        for database, server in self._servers.items():
            with psycopg.connect(server.dsn(), autocommit=True) as conn:
                admin = self._admins[database]
                conn.execute(f"create role {admin} login createrole password '{self._password}'")
                conn.execute(f"create database {database} owner {admin}")
        self.store_id = asyncio.run(self._install())

    async def _install(self) -> str:
        async with await self._admin(self.store_database) as conn:
            store_id = await catalog.install_store(conn)
            for part in ("eventstore", "relay"):
                await roles.ensure_login(conn, names.store_role(self.store_database, part), self._password)
        async with await self._admin(self.read_database) as conn:
            await readstore.install(conn)
        return store_id

    async def _admin(self, database: str) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(self._dsn(database, self._admins[database]), autocommit=True)

    def _dsn(self, database: str, role: str) -> str:
        # key=value form: a role's name may hold any character
        return make_conninfo(self._servers[database].dsn(database), user=role, password=self._password)

    def store_dsn(self, part: str = "eventstore") -> str:
        """Return the DSN of a service's role in the event store's database."""
        return self._dsn(self.store_database, names.store_role(self.store_database, part))

    def store_admin_dsn(self) -> str:
        """Return the administrator's DSN of the event store's database."""
        return self._dsn(self.store_database, self._admins[self.store_database])

    def read_dsn(self) -> str:
        """Return the administrator's DSN of the read models' database."""
        return self._dsn(self.read_database, self._admins[self.read_database])

    def projector_dsn(self, namespace: str, name: str) -> str:
        """Return the DSN of a projection's projector login in the read models' database."""
        return self._dsn(
            self.read_database, readstore.logins(self.read_database, names.read_schema(namespace, name))[0]
        )

    def stream(self, namespace: str, name: str, *, partitions: int) -> catalog.Stream:
        """Make a stream and its topic, as the operator does, and activate it."""
        return self.streams(namespace, [name], partitions=partitions)[0]

    def streams(self, namespace: str, stream_names: Sequence[str], *, partitions: int) -> list[catalog.Stream]:
        """Make many streams as `stream` makes one."""
        return asyncio.run(self._streams(namespace, stream_names, partitions))

    async def _streams(self, namespace: str, stream_names: Sequence[str], partitions: int) -> list[catalog.Stream]:
        # a claim keeps one backend of PostgreSQL busy for as long as it takes
        shares = [stream_names[number::_CLAIMS_AT_ONCE] for number in range(_CLAIMS_AT_ONCE)]
        claims = await asyncio.gather(*(self._claim(namespace, share, partitions) for share in shares))
        claimed = {stream.name: stream for share in claims for stream in share}
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap})
        active = []
        async with await self._admin(self.store_database) as conn:
            for start in range(0, len(stream_names), _TOPICS_AT_ONCE):
                some = [claimed[name] for name in stream_names[start : start + _TOPICS_AT_ONCE]]
                for made in admin.create_topics([NewTopic(stream.topic, partitions, 1) for stream in some]).values():
                    made.result(60)
                topic_ids = await _topic_ids(admin, [stream.topic for stream in some])
                for stream in some:
                    recorded = await catalog.record_topic(conn, stream, topic_ids[stream.topic])
                    active.append(await catalog.activate(conn, recorded))
        return active

    async def _claim(self, namespace: str, stream_names: Sequence[str], partitions: int) -> list[catalog.Stream]:
        async with await self._admin(self.store_database) as conn:
            return [
                await catalog.claim_stream(
                    conn, namespace=namespace, name=name, uid=f"{namespace}/{name}", partitions=partitions,
                    topic=names.topic(namespace, name), kafka_cluster="local",
                )
                for name in stream_names
            ]  # fmt: skip

    def set_event_types(self, stream: catalog.Stream, types: dict[str, Any] | None) -> catalog.Stream:
        """Make `types` (the JSON Schema of each event type) what the stream takes; None: any event."""
        return asyncio.run(self._set_event_types(stream, types))

    async def _set_event_types(self, stream: catalog.Stream, types: dict[str, Any] | None) -> catalog.Stream:
        async with await self._admin(self.store_database) as conn:
            return await catalog.set_event_types(conn, stream, types)

    def drop_stream(self, stream: catalog.Stream) -> None:
        """Drop a stream's history and delete its topic, as the operator does with `deletionPolicy: Delete`."""
        asyncio.run(self._drop_stream(stream))

    async def _drop_stream(self, stream: catalog.Stream) -> None:
        assert stream.uid is not None, "only streams of this installation are dropped"
        async with await self._admin(self.store_database) as conn:
            await catalog.drop_stream(conn, namespace=stream.namespace, name=stream.name, uid=stream.uid)
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap})
        admin.delete_topics([stream.topic])[stream.topic].result(30)

    def projection(
        self,
        namespace: str,
        name: str,
        spec: dict[str, Any],
        streams: list[catalog.Stream],
        *,
        redis: str | None = None,
    ) -> str:
        """Make a projection's version in the read store (or the Redis at a URL) and its logins; return the version."""
        return asyncio.run(self._projection(namespace, name, spec, streams, redis))

    async def _projection(
        self, namespace: str, name: str, spec: dict[str, Any], streams: list[catalog.Stream], redis: str | None
    ) -> str:
        definition = definitions.parse(spec)
        refs = [
            definitions.StreamRef(
                namespace=stream.namespace, name=stream.name, incarnation=stream.incarnation,
                partitions=stream.partitions, topic=stream.topic, event_schema=stream.schema,
            )
            for stream in streams
        ]  # fmt: skip
        version = definitions.version_of(definition, refs, read_store="redis" if redis else "postgres")
        stored = definitions.VersionDefinition(definition=definition, streams=refs)
        if redis is None:
            async with await self._admin(self.read_database) as conn:
                await readstore.claim_projection(conn, namespace=namespace, name=name, uid=f"{namespace}/{name}")
                await readstore.ensure_version(conn, namespace=namespace, name=name, version=version, definition=stored)
                await readstore.ensure_logins(
                    conn, namespace=namespace, name=name,
                    projector_password=self._password, query_password=self._password,
                )  # fmt: skip
        else:
            async with _opened(RedisStore(redis)) as store:
                await store.claim(namespace=namespace, name=name, uid=f"{namespace}/{name}")
                await store.ensure_version(namespace=namespace, name=name, version=version, definition=stored)
        async with await self._admin(self.store_database) as conn:
            readers = [catalog.reader_role(conn, stream) for stream in streams]
            role = names.resource_role(self.store_database, names.read_schema(namespace, name), "projector")
            await roles.ensure_login(
                conn, role, self._password, member_of=[*readers, names.store_role(self.store_database, "heads")]
            )
        return version

    def swap(self, namespace: str, name: str, version: str, *, redis: str | None = None) -> bool:
        """Make a projection's version the live one if it has caught up, as the operator tries; return whether it is."""
        return asyncio.run(self._swap(namespace, name, version, redis))

    async def _swap(self, namespace: str, name: str, version: str, redis: str | None) -> bool:
        if redis is None:
            async with await self._admin(self.read_database) as conn:
                return await readstore.try_swap(conn, namespace=namespace, name=name, version=version)
        async with _opened(RedisStore(redis)) as store:
            return await store.try_swap(namespace=namespace, name=name, version=version)

    def drop_version(self, namespace: str, name: str, version: str, *, redis: str | None = None) -> None:
        """Drop a projection's version that isn't live, and that no projector folds any more."""
        asyncio.run(self._drop_version(namespace, name, version, redis))

    async def _drop_version(self, namespace: str, name: str, version: str, redis: str | None) -> None:
        if redis is None:
            async with await self._admin(self.read_database) as conn:
                await readstore.drop_version(conn, namespace=namespace, name=name, version=version)
            return
        async with _opened(RedisStore(redis)) as store:
            await store.drop_version(namespace=namespace, name=name, version=version)

    def operator(self, kubeconfig: Path, *, namespace: str, **settings: str) -> "Service":
        """Return an operator of the cluster of `kubeconfig`, not yet started; `namespace` is its own."""
        default = {
            "KUBECONFIG": str(kubeconfig),
            "REFOLD_STORE_ADMIN_DSN": self.store_admin_dsn(),
            "REFOLD_READSTORE_ADMIN_DSN": self.read_dsn(),
            "REFOLD_KAFKA_BOOTSTRAP": self.kafka.bootstrap,
            "REFOLD_IMAGE": "refold/refold:local",
            "REFOLD_NAMESPACE": namespace,
        }
        return Service(self, "operator", **{**default, **settings})

    def eventstore(self, **settings: str) -> "Service":
        """Return an event store, not yet started."""
        default = {"REFOLD_STORE_DSN": self.store_dsn(), "REFOLD_AUTH": self._auth}
        return Service(self, "eventstore", **{**default, **settings})

    def relay(self, **settings: str) -> "Service":
        """Return a relay, not yet started."""
        default = {"REFOLD_STORE_DSN": self.store_dsn("relay"), "REFOLD_KAFKA_BOOTSTRAP": self.kafka.bootstrap}
        return Service(self, "relay", **{**default, **settings})

    def projector(self, namespace: str, name: str, version: str, **settings: str) -> "Service":
        """Return a projector of one version, not yet started; of a Redis with its URL as REFOLD_READSTORE_DSN."""
        schema = names.read_schema(namespace, name)
        default = {
            "REFOLD_PROJECTION": f"{namespace}/{name}",
            "REFOLD_VERSION": version,
            "REFOLD_STORE_DSN": self._dsn(
                self.store_database, names.resource_role(self.store_database, schema, "projector")
            ),
            "REFOLD_READSTORE_DSN": self.projector_dsn(namespace, name),
            "REFOLD_KAFKA_BOOTSTRAP": self.kafka.bootstrap,
        }
        return Service(self, "projector", **{**default, **settings})

    def query(self, namespace: str, name: str, **settings: str) -> "Service":
        """Return a query service, not yet started; of a Redis with its URL as REFOLD_READSTORE_DSN."""
        schema = names.read_schema(namespace, name)
        default = {
            "REFOLD_PROJECTION": f"{namespace}/{name}",
            "REFOLD_AUTH": self._auth,
            "REFOLD_READSTORE_DSN": self._dsn(self.read_database, readstore.logins(self.read_database, schema)[1]),
        }
        return Service(self, "query", **{**default, **settings})


@contextlib.asynccontextmanager
async def _opened(store: RedisStore) -> AsyncIterator[RedisStore]:
    try:
        yield store
    finally:
        await store.close()


async def _topic_ids(admin: AdminClient, topics: Sequence[str]) -> dict[str, str]:
    """Return the topics' ids; the broker may hear of topics a little later than the controller that made them."""
    found: dict[str, str] = {}
    for _ in range(600):
        missing = [topic for topic in topics if topic not in found]
        if not missing:
            return found
        for topic, described in admin.describe_topics(TopicCollection(missing)).items():
            try:
                found[topic] = str(described.result(30).topic_id)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise
        if len(found) < len(topics):
            await asyncio.sleep(0.1)
    raise TimeoutError(f"Kafka made topics, and doesn't know {missing[0]} of them a minute later")


class Service(Process):
    """One process of the data plane, on a port of its own."""

    def __init__(self, platform: Platform, command: str, **settings: str) -> None:
        """Choose a port; `settings` are environment variables."""
        self.command = command
        self.port = free_port()
        super().__init__(
            [str(Path(sys.executable).with_name("refold")), command],
            platform.logs / f"{command}-{self.port}.log",
            env={**settings, "REFOLD_PORT": str(self.port)},
        )

    @property
    def url(self) -> str:
        """Return where it serves."""
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Start it and wait until it is alive (it may still wait for its servers)."""
        self.start(self._alive)

    def _alive(self) -> bool:
        try:
            return get(f"{self.url}/healthz").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False
