"""`reconcile-500`, `reconcile-one`, `resync`, `projections`, `idle`: the operator with many resources.

The operator is a real process with an API server, Kafka and PostgreSQL. Time runs from the first request of a client
that creates the objects concurrently to the moment when its watch brings the last one that is as it must be.
"""

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from confluent_kafka.admin import NewTopic
from psycopg import sql
from refold import names
from refold.eventstore import migrations
from refold.projection.readstore.postgres import SCHEMA
from refold.projection.readstore.postgres_parked import TABLES

from bench.clusters import Following, client, emptied, event_stream, is_ready, metric, running_operator
from bench.limits import operator as limit
from bench.limits.operator import create, path_of, request
from bench.orders import OrderEvent
from bench.result import Comparison, Run
from bench.servers import Servers
from bench.waiting import until
from hack.servers.kubernetes_api import ApiServer
from hack.servers.platform import Service

_CONFIG = {"cleanup.policy": "delete", "max.message.bytes": "1048588"}
#: What `idle` may take of a core.
_IDLE_SHARE = 0.05


def _count(most: int, events: Sequence[OrderEvent]) -> int:
    """Return how many resources: one for ten events, at most `most`."""
    return min(most, max(2, len(events) // 10))


def _streams(namespace: str, count: int) -> list[dict[str, Any]]:
    return [event_stream(namespace, f"orders-{number}") for number in range(count)]


async def _applied(servers: Servers, server: ApiServer, process: Service, objects: Sequence[dict[str, Any]]) -> float:
    """Create EventStreams; return the seconds until all are Ready."""
    async with client(server) as api, Following(api, ["EventStream"], servers.name, process.log) as seen:
        wanted = {("EventStream", one["metadata"]["name"]) for one in objects}
        began = time.perf_counter()
        await create(api, objects)
        ready: set[tuple[str, str]] = set()

        def all_ready() -> bool:
            ready.update(key for key in wanted - ready if key in seen.objects and is_ready(seen.objects[key]))
            return ready == wanted

        await seen.until(all_ready, f"{len(objects)} EventStreams are Ready")
        return time.perf_counter() - began


def reconcile_500(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """EventStreams applied at once; until all are Ready."""
    count = _count(500, events)

    def run() -> Run:
        server = servers.kubernetes
        with servers.beside() as own, emptied(own, server), running_operator(own, server) as process:
            used = _cpu(process)
            seconds = asyncio.run(_applied(own, server, process, _streams(own.name, count)))
            return Run(events_per_s=count / seconds, **_spent(process, used, count))

    def bare() -> Run:
        server = servers.kubernetes
        with servers.beside() as own, emptied(own, server):
            return _bare_streams(own, server, count)

    return Comparison(
        workload="reconcile-500",
        params={"streams": count, "partitions": 1},
        measured=run,
        limit=bare,
        limit_name="the objects, topics and schemas made by a plain asyncio script",
    )


def _bare_streams(servers: Servers, server: ApiServer, count: int) -> Run:
    objects = _streams(servers.name, count)
    found = [one["metadata"]["name"] for one in objects]
    return _bare(
        servers, server, servers.platform.store_admin_dsn(), objects=objects,
        topics=[NewTopic(names.topic(servers.name, name), 1, 1, config=_CONFIG) for name in found],
        scripts=[_stream_script(servers, number, name) for number, name in enumerate(found, 1)], count=count,
    )  # fmt: skip


def _bare(servers: Servers, server: ApiServer, dsn: str, **things: Any) -> Run:
    server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": servers.name}})

    async def make() -> Run:
        async with client(server) as api:
            return await limit.make(api, servers.kafka.bootstrap, dsn, **things)

    return asyncio.run(make())


def _stream_script(servers: Servers, number: int, name: str) -> str:
    """Return the SQL that makes a stream's roles, catalog entry and schema."""
    database, schema = servers.platform.store_database, names.event_schema(servers.name, name)
    roles = {part: names.resource_role(database, schema, part) for part in ("writer", "reader")}
    store = {part: names.store_role(database, part) for part in ("owner", "eventstore", "relay", "heads")}
    values: dict[str, str | int] = {**store, **roles, "schema": schema, "stream": number, "partitions": 1}
    made = sql.SQL(
        "create role {writer}; comment on role {writer} is 'refold role'; "
        "create role {reader}; comment on role {reader} is 'refold role'; set local role {owner}; "
        "insert into refold.streams (stream, namespace, name, incarnation, uid, schema, partitions, topic, "
        "kafka_cluster, topic_id, state, migration) overriding system value values "
        "({stream}, {namespace}, {name}, {incarnation}, 'u', {text}, 1, {topic}, 'c', 't', 'active', 4); "
        "insert into refold.heads (stream, partition, active) values ({stream}, 0, true); create schema {schema}; "
    ).format(
        **{part: sql.Identifier(role) for part, role in roles.items()}, owner=sql.Identifier(store["owner"]),
        stream=number, namespace=servers.name, name=name, incarnation=f"{number:016x}", text=schema,
        topic=names.topic(servers.name, name), schema=sql.Identifier(schema),
    )  # fmt: skip
    return ";\n".join(
        [made.as_string(), *(each.render(values) for each in migrations.load("stream")), "set local role none;"]
    )


class _Filled:
    """An operator that runs with many EventStreams, all of them Ready."""

    def __init__(self, servers: Servers, server: ApiServer, count: int) -> None:
        self.servers, self.server, self.count = servers, server, count
        self._made = False

    @contextlib.contextmanager
    def running(self, **settings: str) -> Iterator[Service]:
        """Run it; the streams are made by the first one."""
        with running_operator(self.servers, self.server, **settings) as process:
            if not self._made:
                streams = _streams(self.servers.name, self.count)
                asyncio.run(_applied(self.servers, self.server, process, streams))
                self._made = True
            yield process


def reconcile_one(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """Changes of one stream after the other, of many and of ten; from the request until it is Ready again."""
    count, changes = _count(2000, events), max(5, len(events) // 100)
    few = servers.beside()
    many = _Filled(servers, servers.kubernetes, count)
    ten = _Filled(few, few.own_kubernetes(), min(10, count))
    servers.entered(emptied(servers, servers.kubernetes))

    def run(filled: _Filled) -> Run:
        with filled.running() as process:
            latencies = asyncio.run(_change(filled, process, changes))
        return Run(events_per_s=1000 * len(latencies) / sum(latencies), latencies_ms=latencies)

    return Comparison(
        workload="reconcile-one",
        params={"streams": count, "changes": changes},
        measured=lambda: run(many),
        limit=lambda: run(ten),
        limit_name=f"the same with {ten.count} streams",
        latency=True,
    )


async def _change(filled: _Filled, process: Service, changes: int) -> list[float]:
    namespace, latencies = filled.servers.name, []
    async with client(filled.server) as api, Following(api, ["EventStream"], namespace, process.log) as seen:
        # a start looks at all of them
        await asyncio.to_thread(_until_looked_at, process, filled.count)
        for number in range(changes):
            key = ("EventStream", f"orders-{random.randrange(filled.count)}")
            patch = {"spec": {"topic": {"config": {"retention.ms": str(10**9 + time.time_ns() % 10**9 + number)}}}}
            began = time.perf_counter()
            changed = await request(
                api, "PATCH", f"{path_of(key[0], namespace)}/{key[1]}", patch, kind="application/merge-patch+json"
            )
            generation = changed["metadata"]["generation"]

            def done(key: tuple[str, str] = key, generation: int = generation) -> bool:
                found = seen.objects[key]
                return bool(found["metadata"]["generation"] == generation and is_ready(found))

            await seen.until(done, f"{key[1]} is Ready again")
            latencies.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(0.05)
    return latencies


def _until_looked_at(process: Service, count: int) -> None:
    until(lambda: _looks(process) >= count, "each stream was looked at", log=process.log)


def _looks(process: Service) -> float:
    return metric(process, "refold_reconciliations_total")


def resync(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """A look at each of many unchanged streams: the operator is started anew; from its start until it has seen all."""
    count = _count(2000, events)
    filled = _Filled(servers, servers.kubernetes, count)
    servers.entered(emptied(servers, servers.kubernetes))
    with filled.running() as process:
        _until_looked_at(process, count)

    def run() -> Run:
        before = asyncio.run(_written(filled))
        began = time.perf_counter()
        with filled.running() as process:
            _until_looked_at(process, count)
            seconds = time.perf_counter() - began
            memory = _memory(process)
        after = asyncio.run(_written(filled))
        written = sorted(key for key, value in after.items() if before.get(key) != value)
        if written:
            print(f"resync: written were {', '.join(written)}", file=sys.stderr)
        figures = {"seconds": seconds, "writes": len(written)}
        return Run(events_per_s=count / seconds, rss_mb={"operator": memory}, figures=figures)

    return Comparison(
        workload="resync",
        params={"streams": count},
        measured=run,
        limit=lambda: asyncio.run(limit.look(servers.kafka.bootstrap, servers.platform.store_admin_dsn(), count)),
        limit_name="listing the topics and the schemas once",
    )


async def _written(filled: _Filled) -> dict[str, Any]:
    """Return what changes with a write: objects' versions, rows written a table (all sessions have ended), topics."""
    servers, found = filled.servers, {}
    async with client(filled.server) as api:
        for kind in limit.PATHS:
            for item in (await request(api, "GET", path_of(kind, servers.name)))["items"]:
                found[f"{kind} {item['metadata']['name']}"] = item["metadata"]["resourceVersion"]
    with servers.events() as conn:
        # statistics of tables are gathered whenever autovacuum likes (also into their TOAST table); pg_database has the
        # installation's own grants
        rows = conn.execute(
            "select relid::regclass::text, n_tup_ins + n_tup_upd + n_tup_del from pg_stat_all_tables "
            "where relname not in ('pg_statistic', 'pg_toast_2619', 'pg_database')"
        )
        found |= {f"table {table}": written for table, written in rows}
    topics = [names.topic(servers.name, one["metadata"]["name"]) for one in _streams(servers.name, filled.count)]
    for topic, as_it_is in (await limit.described(servers.kafka.bootstrap, topics)).items():
        found[f"topic {topic}"] = as_it_is
    return found


def idle(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """The operator's time while nothing happens, from one look at all to the next; the rate is that of a whole core."""
    count = _count(2000, events)
    seconds = 300 * count / 2000
    filled = _Filled(servers, servers.kubernetes, count)
    servers.entered(emptied(servers, servers.kubernetes))

    def run() -> Run:
        with filled.running(REFOLD_RESYNC_SECONDS=str(seconds)) as process:
            _until_looked_at(process, count)
            began, used = time.perf_counter(), _cpu(process)
            time.sleep(seconds)
            share = (_cpu(process) - used) / (time.perf_counter() - began)
            memory = _memory(process)
        return Run(
            events_per_s=count / max(share, 0.001), rss_mb={"operator": memory}, figures={"core_percent": share * 100}
        )

    return Comparison(
        workload="idle",
        params={"streams": count, "seconds": seconds},
        measured=run,
        limit=lambda: Run(events_per_s=count / _IDLE_SHARE),
        limit_name="what is promised: 5 % of a core",
    )


def _spent(process: Service, used: float, count: int) -> dict[str, Any]:
    """Return the operator's memory, and its time a resource since it had `used` so many seconds, for a `Run`."""
    each = 1000 * (_cpu(process) - used) / count
    return {"rss_mb": {"operator": _memory(process)}, "figures": {"cpu_ms_each": each}}


def _cpu(process: Service) -> float:
    return metric(process, "process_cpu_seconds_total")


def _memory(process: Service) -> float:
    return metric(process, "process_resident_memory_bytes") / 2**20


_PROJECTION = {
    "columns": [{"name": "status", "type": "text", "index": True}, {"name": "total", "type": "numeric"}],
    "fold": [{"type": "OrderPlaced", "set": {"status": "'placed'"}, "add": {"total": "data.total"}}],
    "projector": {"replicas": 0},
    "query": {"replicas": 0},
}
_OBJECTS = ("Deployment", "Service", "Secret", "ServiceAccount")
_OBJECTS_EACH = 6


def projections(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """Projections of one stream applied at once; until each has its six objects and a status that says so."""
    count = _count(50, events)
    made: list[dict[str, Any]] = []

    def run() -> Run:
        server = servers.kubernetes
        with servers.beside() as own, emptied(own, server), running_operator(own, server) as process:
            asyncio.run(_applied(own, server, process, _streams(own.name, 1)))
            used = _cpu(process)
            rate, objects = asyncio.run(_project(own, server, process, count))
            made[:] = objects
            return Run(events_per_s=rate, **_spent(process, used, count))

    def bare() -> Run:
        server = servers.kubernetes
        with servers.beside() as own, emptied(own, server):
            return _bare_projections(own, server, count, made)

    return Comparison(
        workload="projections",
        params={"projections": count},
        measured=run,
        limit=bare,
        limit_name="the same objects and schemas made by a plain asyncio script",
    )


def _projections(namespace: str, count: int) -> list[dict[str, Any]]:
    spec = {"streams": ["orders-0"], **_PROJECTION}
    kind = {"apiVersion": "refold.dev/v1alpha1", "kind": "Projection"}
    return [{**kind, "metadata": {"name": f"p-{n}", "namespace": namespace}, "spec": spec} for n in range(count)]


async def _project(
    servers: Servers, server: ApiServer, process: Service, count: int
) -> tuple[float, list[dict[str, Any]]]:
    """Create Projections; return how many a second were made whole, and the objects that were made."""
    kinds = ["Projection", *_OBJECTS]
    async with client(server) as api, Following(api, kinds, servers.name, process.log) as seen:
        there = len(seen.objects)
        began = time.perf_counter()
        await create(api, _projections(servers.name, count))

        def whole() -> bool:
            return len(seen.objects) - there == count * (1 + _OBJECTS_EACH) and all(
                "live" in item.get("status", {}) for (kind, _), item in seen.objects.items() if kind == "Projection"
            )

        await seen.until(whole, f"{count} Projections have their objects")
        seconds = time.perf_counter() - began
        objects = [item for (kind, _), item in seen.objects.items() if kind != "Projection"]
    return count / seconds, objects


def _bare_projections(servers: Servers, server: ApiServer, count: int, made: Sequence[dict[str, Any]]) -> Run:
    objects = [*_projections(servers.name, count), *(_anew(one, servers.name) for one in made)]
    scripts = [_projection_script(servers, one["metadata"]["name"]) for one in objects[:count]]
    return _bare(servers, server, servers.platform.read_dsn(), objects=objects, topics=[], scripts=scripts, count=count)


def _anew(known: dict[str, Any], namespace: str) -> dict[str, Any]:
    """Return an object as it was asked for, in another namespace."""
    kept = {name: known["metadata"][name] for name in ("name", "labels", "annotations") if name in known["metadata"]}
    body = {name: value for name, value in known.items() if name not in ("metadata", "status")}
    if known["kind"] == "Service":
        body["spec"] = {name: known["spec"][name] for name in ("type", "selector", "ports")}
    return {**body, "metadata": {**kept, "namespace": namespace}}


def _projection_script(servers: Servers, name: str) -> str:
    """Return the SQL that makes a read model's schema and table, its logins and what they may."""
    schema = names.read_schema(servers.name, name)
    roles = [names.resource_role(servers.platform.read_database, schema, part) for part in ("projector", "query", "h")]
    made = [sql.SQL(text).format(schema=sql.Identifier(schema)) for text in (SCHEMA, TABLES)]
    made.append(
        sql.SQL(
            'create table {0}.rows_1 (key text collate "C" primary key, status text collate "C", total numeric); '
            "create index on {0}.rows_1 (status, key); insert into {0}.versions (version, definition) "
            "values ('1', '{{}}'); update {0}.pointer set live = '1'; "
            "insert into {0}.positions (version, incarnation, partition) values ('1', 'i', 0);"
        ).format(sql.Identifier(schema))
    )
    made += [
        sql.SQL(
            "create role {0} login password 'a long one'; comment on role {0} is 'refold role'; "
            "grant usage on schema {1} to {0}; grant select on all tables in schema {1} to {0};"
        ).format(sql.Identifier(role), sql.Identifier(schema))
        for role in roles
    ]
    return sql.SQL("\n").join(made).as_string()
