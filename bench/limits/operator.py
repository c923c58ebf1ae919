"""What the operator makes, made by a plain asyncio script: three client libraries, concurrently and in batches."""

import asyncio
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import psycopg
from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient, ConfigResource, ConfigSource, NewTopic, ResourceType
from kubernetes.aio.client import ApiClient

from bench.result import Run

#: Requests at once to the API server, topics in one request to Kafka, scripts in one transaction.
REQUESTS, TOPICS, SCRIPTS = 32, 100, 20
#: Connections to PostgreSQL: DDL keeps a backend busy, and there are two cores.
CONNECTIONS = 2
PATHS = {
    "EventStream": ("/apis/refold.dev/v1alpha1", "eventstreams"),
    "Projection": ("/apis/refold.dev/v1alpha1", "projections"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "Service": ("/api/v1", "services"),
    "Secret": ("/api/v1", "secrets"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "Event": ("/api/v1", "events"),
}


async def request(api: ApiClient, method: str, path: str, body: Any = None, *, kind: str = "application/json") -> Any:
    """Return the API server's answer.

    Raises:
        RuntimeError: it refused.
    """
    asked = await api.param_serialize(
        method, path, header_params={"Accept": "application/json", "Content-Type": kind}, body=body,
        auth_settings=["BearerToken"],
    )  # fmt: skip
    answer = await api.call_api(*asked)
    data = await answer.read()
    if answer.status >= 300:
        raise RuntimeError(f"{method} {path}: {answer.status} {data[:300]!r}")
    return json.loads(data)


def path_of(kind: str, namespace: str) -> str:
    """Return where the objects of a kind in a namespace are."""
    root, plural = PATHS[kind]
    return f"{root}/namespaces/{namespace}/{plural}"


async def create(api: ApiClient, objects: Iterable[Mapping[str, Any]]) -> None:
    """Create objects, `REQUESTS` at once, begun in their order."""
    left = iter(objects)

    async def work() -> None:
        for one in left:
            await request(api, "POST", path_of(one["kind"], one["metadata"]["namespace"]), one)

    async with asyncio.TaskGroup() as group:
        for _ in range(REQUESTS):
            group.create_task(work())


async def create_topics(bootstrap: str, topics: Iterable[NewTopic]) -> None:
    """Create topics, `TOPICS` in a request."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    left = iter(topics)
    while some := list(itertools.islice(left, TOPICS)):
        await asyncio.gather(*map(asyncio.wrap_future, admin.create_topics(some).values()))


async def execute(dsn: str, scripts: Iterable[str]) -> None:
    """Run SQL scripts, `SCRIPTS` in a transaction, on `CONNECTIONS` connections."""
    left = iter(scripts)

    async def work() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
            while some := list(itertools.islice(left, SCRIPTS)):
                await conn.execute("\n".join(["begin;", *some, "commit;"]).encode(), prepare=False)

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(work())


async def make(
    api: ApiClient, bootstrap: str, dsn: str, *,
    objects: Sequence[Mapping[str, Any]], topics: Sequence[NewTopic], scripts: Sequence[str], count: int,
) -> Run:  # fmt: skip
    """Make all of it at once; the rate is that of the `count` resources that it is for."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        group.create_task(create(api, objects))
        group.create_task(create_topics(bootstrap, topics))
        group.create_task(execute(dsn, scripts))
    return Run(events_per_s=count / (time.perf_counter() - began))


async def look(bootstrap: str, dsn: str, count: int) -> Run:
    """List all topics and all schemas once."""
    began = time.perf_counter()
    admin = AdminClient({"bootstrap.servers": bootstrap})
    async with asyncio.TaskGroup() as group:
        listed = group.create_task(asyncio.to_thread(admin.list_topics, timeout=30))
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            await (await conn.execute("select * from refold.streams, pg_namespace where nspname = schema")).fetchall()
        await listed
    return Run(events_per_s=count / (time.perf_counter() - began))


async def described(bootstrap: str, topics: Sequence[str]) -> dict[str, tuple[str, dict[str, str]]]:
    """Return the id and the own configuration of each topic."""
    admin, found = AdminClient({"bootstrap.servers": bootstrap}), {}
    for start in range(0, len(topics), TOPICS):
        some = topics[start : start + TOPICS]
        resources = {name: ConfigResource(ResourceType.TOPIC, name) for name in some}
        ids = admin.describe_topics(TopicCollection(list(some)))
        configs = admin.describe_configs(list(resources.values()))
        for name, resource in resources.items():
            entries = (await asyncio.wrap_future(configs[resource])).values()
            own = {one.name: one.value for one in entries if one.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value}
            found[name] = str((await asyncio.wrap_future(ids[name])).topic_id), own
    return found
