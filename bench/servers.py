"""The servers that a workload runs on: given ones, or own ones on 127.0.0.1 (fsync and synchronous_commit on).

On all of them the benchmarks work in databases, roles and topics of their own, which are removed at the end.
"""

import contextlib
import functools
import itertools
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from confluent_kafka.admin import AdminClient, NewTopic
from psycopg import sql
from psycopg.conninfo import make_conninfo
from refold.eventstore.catalog import Stream

from bench import warming
from hack.servers import Kafka, Postgres, Redis
from hack.servers.kubernetes_api import ApiServer, programs
from hack.servers.platform import Broker, Database, Platform

#: Partitions of the streams, as in the examples.
PARTITIONS = 6
#: Events from which on a new broker is warmed.
_MEASURED = 1_000
#: The operator's own namespace.
SYSTEM = "refold-system"
_CRDS = Path(__file__).parents[1] / "crds"
#: As the chart makes it.
_QUERY_BINDING = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRoleBinding",
    "metadata": {"name": "refold-query"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
}


class _GivenPostgres:
    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def dsn(self, database: str = "postgres") -> str:
        return make_conninfo(self._dsn, dbname=database)


class _GivenKafka:
    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap


class Servers:
    """Servers with a Refold on them; started and installed when a workload first asks for them."""

    def __init__(
        self, *, store: str | None, kafka: str | None, read_store: str | None, shared: "Servers | None" = None
    ) -> None:
        """Remember the endpoints: superusers' DSNs, and Kafka's `host:port`; None for those of `shared`, or own ones.

        The read models are in the event store's server unless `read_store` is given.
        """
        self._given = store, kafka, read_store
        self._shared = shared
        self._cleaning = contextlib.ExitStack()
        self._numbers = itertools.count(1)
        self._warmed = False
        # a run of the benchmarks meets nothing that an earlier one left on given servers
        self.name = f"bench{secrets.token_hex(3)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleaning.__exit__(kind, error, trace)

    @functools.cached_property
    def postgres(self) -> Database:
        """The event store's server, which the limits use too."""
        if self._given[0]:
            return _GivenPostgres(self._given[0])
        if self._shared:
            return self._shared.postgres
        server = Postgres()
        self._cleaning.callback(server.remove)
        server.start()
        return server

    @functools.cached_property
    def _read(self) -> Database:
        if self._given[2]:
            return _GivenPostgres(self._given[2])
        return self._shared._read if self._shared else self.postgres

    @functools.cached_property
    def kafka(self) -> Broker:
        """The broker."""
        if self._given[1]:
            return _GivenKafka(self._given[1])
        if self._shared:
            return self._shared.kafka
        broker = Kafka(lasting=True)
        self._cleaning.callback(broker.remove)
        broker.start()
        return broker

    def warm(self, events: Sequence[Any]) -> None:
        """Warm the broker once, if it is an own one, for a workload whose latencies are measured with `events`.

        A few events are no measurement, but a test.
        """
        if self._shared:
            self._shared.warm(events)
        elif not self._given[1] and not self._warmed and len(events) >= _MEASURED:
            self._warmed = True
            assert isinstance(self.kafka, Kafka), "an own one"
            warming.warm(self.kafka.bootstrap, self.kafka.compiled)

    @functools.cached_property
    def redis(self) -> Redis:
        """A Redis with an append-only file that is synced every second, always an own one."""
        server = Redis()
        self._cleaning.callback(server.remove)
        server.start()
        return server

    @functools.cached_property
    def kubernetes(self) -> ApiServer:
        """The Kubernetes API server that operators use by turns, always an own one."""
        return self._shared.kubernetes if self._shared else self.own_kubernetes()

    def own_kubernetes(self) -> ApiServer:
        """Start another API server (kube-apiserver and etcd), with what the chart makes before the operator runs."""
        if programs() is None:
            raise RuntimeError("the operator's workloads need kube-apiserver and etcd, which hack/kind/build makes")
        server = ApiServer()
        self._cleaning.callback(server.remove)
        server.start()
        server.kubectl("apply", "-f", str(_CRDS))
        server.kubectl("create", "namespace", SYSTEM)
        server.apply(_QUERY_BINDING)
        return server

    def entered(self, context: contextlib.AbstractContextManager[Any]) -> None:
        """Enter a context that ends with these servers."""
        self._cleaning.enter_context(context)

    @functools.cached_property
    def limit(self) -> str:
        """A superuser's DSN of the database that the limits work in."""
        database = f"{self.name}_limit"
        with psycopg.connect(self.postgres.dsn(), autocommit=True) as conn:
            conn.execute(f'create database "{database}"')
        self._cleaning.callback(_drop, self.postgres, database)
        return self.postgres.dsn(database)

    @functools.cached_property
    def platform(self) -> Platform:
        """A Refold of which no process runs yet."""
        store, read = f"{self.name}_store", f"{self.name}_read"
        postgres, kafka = self.postgres, self.kafka
        self._cleaning.callback(_drop_topics, kafka, self.name)
        self._cleaning.callback(_drop, postgres, store)
        self._cleaning.callback(_drop, self._read, read)
        return Platform(postgres, kafka, read=self._read, store_database=store, read_database=read)

    def beside(self) -> "Servers":
        """Return another Refold, with a store of its own, on the same servers; it ends with this one if not before."""
        other = Servers(store=None, kafka=None, read_store=None, shared=self)
        return self._cleaning.enter_context(other)

    def stream(self, *, partitions: int = PARTITIONS) -> Stream:
        """Make a new, empty stream."""
        return self.streams(1, partitions=partitions)[0]

    def streams(self, count: int, *, partitions: int = PARTITIONS) -> list[Stream]:
        """Make new, empty streams."""
        names = [f"orders-{next(self._numbers)}" for _ in range(count)]
        return self.platform.streams(self.name, names, partitions=partitions)

    def topic(self, *, partitions: int = PARTITIONS) -> str:
        """Return the name of a new, empty topic that no stream has."""
        name = f"{self.name}.limit-{next(self._numbers)}"
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap})
        admin.create_topics([NewTopic(name, partitions, 1)])[name].result(30)
        return name

    def events(self) -> "psycopg.Connection[Any]":
        """Return a superuser's connection to the event store's database."""
        return psycopg.connect(self.postgres.dsn(f"{self.name}_store"), autocommit=True)

    def rows(self) -> "psycopg.Connection[Any]":
        """Return a superuser's connection to the read models' database."""
        return psycopg.connect(self._read.dsn(f"{self.name}_read"), autocommit=True)


def _drop(server: Database, database: str) -> None:
    """Drop a database and the roles that carry its name."""
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(database)))
        found = conn.execute(
            "select rolname from pg_roles where rolname like %s or rolname = %s",
            [f"refold\\_{database}%", f"{database}_admin"],
        ).fetchall()
        if found:
            conn.execute(sql.SQL("drop role {}").format(sql.SQL(", ").join(sql.Identifier(row[0]) for row in found)))


def _drop_topics(kafka: Broker, prefix: str) -> None:
    """Delete the topics whose names begin with `prefix`."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    names = [name for name in admin.list_topics(timeout=30).topics if name.startswith(f"{prefix}.")]
    for deleted in admin.delete_topics(names).values() if names else ():
        deleted.result(30)
