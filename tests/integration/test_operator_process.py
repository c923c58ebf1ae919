"""The operator's process against a real API server, Kafka and PostgreSQL: from resources to objects and back.

Needs the kube-apiserver and etcd that hack/kind builds on machines without a container registry; elsewhere tests/e2e
covers the same on a kind cluster.
"""

import base64
import datetime as dt
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
import yaml
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourceType,
)
from kubernetes.aio import client, config
from refold_operator.cluster import Cluster
from refold_operator.delegation import Account, Delegation

from hack.servers import EmbeddedRedis, Kafka, Postgres, Redis, kubernetes_api
from hack.servers.kubernetes_api import ApiServer
from tests.operating import (
    Operator,
    api_server,
    becomes,
    condition,
    event_stream,
    live,
    names,
    projection,
    ready,
    roll_out,
    serves,
    told,
    until,
)

pytestmark = pytest.mark.skipif(
    kubernetes_api.programs() is None, reason="no kube-apiserver and etcd in the cache: see hack/kind"
)
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    server = api_server()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def operator(api: ApiServer, postgres: Postgres, kafka: Kafka) -> Iterator[Operator]:
    operator = Operator(api, postgres, kafka, ("operator_store", "operator_reads"))
    operator.start()
    yield operator
    operator.stop()


@pytest.fixture
def namespace(api: ApiServer, operator: Operator) -> str:
    name = f"shop-{next(_numbers)}"
    api.kubectl("create", "namespace", name)
    return name


def handled(namespace: str, *, more: dict[str, Any] | None = None, **handler: Any) -> dict[str, Any]:
    """A projection with code in place of a fold."""
    made = projection(namespace, **(more or {}))
    if "fold" not in (more or {}):
        del made["spec"]["fold"]
    given = {"image": f"registry/acme@sha256:{'0a' * 32}", "function": "acme.orders:project", **handler}
    made["spec"]["handler"] = {name: value for name, value in given.items() if value is not None}
    return made


PAST = "2026-01-31T23:59:59Z"
COLUMNS = [{"name": "status", "type": "text"}]
RULES = [{"type": "OrderPlaced", "set": {"status": "'placed'"}}]


@pytest.mark.parametrize(
    ("manifest", "field"),
    [
        (event_stream("default", "n" * 41), "metadata.name"),
        (event_stream("default", "a.b"), "metadata.name"),
        (event_stream("default", partitions=0), "spec.partitions"),
        (event_stream("default", partitions=257), "spec.partitions"),
        (event_stream("default", partitions=None), "spec.partitions"),
        (event_stream("default", topic={"name": "sp ace"}), "spec.topic.name"),
        (event_stream("default", topic={"name": "__consumer_offsets"}), "spec.topic.name"),
        (event_stream("default", topic={"name": "refold.checkpoints.x"}), "spec.topic.name"),
        (event_stream("default", topic={"replicas": 0}), "spec.topic.replicas"),
        (event_stream("default", topic={"config": {"cleanup.policy": "compact"}}), "spec.topic.config"),
        (event_stream("default", topic={"config": {"retention.ms": "a week"}}), "spec.topic.config"),
        (event_stream("default", topic={"config": {"compression.type": "rar"}}), "spec.topic.config"),
        (event_stream("default", topic={"config": {"retention.ms": 1000}}), "spec.topic.config.retention.ms"),
        (event_stream("default", deletionPolicy="Orphan"), "spec.deletionPolicy"),
        (event_stream("default", shards=3), "shards"),
        (event_stream("default", events=[]), "spec.events"),
        (event_stream("default", events=[{"schema": True}]), "spec.events[0].name"),
        (event_stream("default", events=[{"name": ""}]), "spec.events[0].name"),
        (event_stream("default", events=[{"name": "x" * 256}]), "spec.events[0].name"),
        (event_stream("default", events=[{"name": "é" * 128}]), "spec.events[0].name"),
        (event_stream("default", events=[{"name": "Placed"}, {"name": "Placed"}]), "spec.events[1]"),
        (projection("default", "9lives"), "metadata.name"),
        (projection("default", streams=[]), "spec.streams"),
        (projection("default", streams=["a", "a"]), "spec.streams"),
        (projection("default", streams=["Orders"]), "spec.streams"),
        (projection("default", key=""), "spec.key"),
        (projection("default", columns=[]), "spec.columns"),
        (projection("default", columns=[*COLUMNS, *COLUMNS]), "spec.columns"),
        (projection("default", columns=[{"name": "key", "type": "text"}]), "spec.columns[0].name"),
        (projection("default", columns=[{"name": "Total", "type": "text"}]), "spec.columns[0].name"),
        (projection("default", columns=[{"name": "total", "type": "float"}]), "spec.columns[0].type"),
        (projection("default", fold=[]), "spec.fold"),
        (projection("default", fold=[{"type": "X"}]), "spec.fold[0]"),
        (projection("default", fold=[{"type": "X", "delete": False}]), "spec.fold[0].delete"),
        (projection("default", fold=[{**RULES[0], "delete": True}]), "spec.fold[0]"),
        (projection("default", fold=[{"type": "X", "set": {}}]), "spec.fold[0].set"),
        (projection("default", fold=[{**RULES[0], "when": ""}]), "spec.fold[0].when"),
        (handled("default", image="registry/acme:1"), "say in handler.version which code it is"),
        (handled("default", image=None), "spec.handler.image"),
        (handled("default", function="acme.orders"), "spec.handler.function"),
        (handled("default", keys="all"), "spec.handler.keys"),
        (handled("default", more={"key": "data.customer"}), "say in handler.keys whether they are any"),
        (handled("default", more={"fold": RULES}), "either fold or handler"),
        (projection("default", projector={"replicas": -1}), "spec.projector.replicas"),
        (projection("default", query={"replicas": 1000}), "spec.query.replicas"),
        (projection("default", readStore={"type": "mongo"}), "spec.readStore.type"),
        (projection("default", readStore={"connectionRef": {"name": "a"}}), "spec.readStore"),
        (
            projection("default", readStore={"type": "redis", "connectionRef": {"name": "a"}, "sql": True}),
            "only rows in",
        ),
        (projection("default", readStore={"type": "redis", "connectionRef": {"name": "A b"}}), "connectionRef.name"),
        (projection("default", keepPrevious="1 day"), "spec.keepPrevious"),
        (projection("default", keepPrevious="721h"), "spec.keepPrevious"),
        (projection("default", asOf="yesterday"), "spec.asOf"),
        (projection("default", asOf="2026-01-31T23:59:59"), "spec.asOf"),
        (projection("default", asOf=PAST, ttl="1 day"), "spec.ttl"),
        (projection("default", ttl="1h"), "only a Projection with asOf may have a ttl"),
        (projection("default", query={"resources": {"limits": {"memory": "much"}}}), "spec.query.resources.limits"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_api_server_refuses_a_bad_spec_and_names_the_field(
    api: ApiServer, manifest: dict[str, Any], field: str
) -> None:
    with pytest.raises(RuntimeError) as refused:
        api.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(manifest))
    assert field in str(refused.value)


@pytest.mark.parametrize(
    "manifest",
    [
        event_stream("default"),
        event_stream("default", "n" * 40, partitions=256, deletionPolicy="Delete"),
        event_stream("default", topic={"name": "my.Topic_1-x", "replicas": 3, "config": {"retention.ms": "-1"}}),
        event_stream("default", events=[{"name": "Any"}, {"name": "Never", "schema": False}]),
        event_stream("default", events=[{"name": "n" * 255, "schema": {"$ref": "#/$defs/a", "$defs": {"a": {}}}}]),
        handled("default"),
        handled("default", image="registry:5000/acme:1", version="1", keys="any", adds=["status"]),
        projection("default", "p" * 40),
        projection("default", readStore={"type": "redis", "connectionRef": {"name": "orders.redis-1"}}),
        projection("default", readStore={"type": "redis"}),
        projection("default", readStore={}),
        projection("default", readStore={"sql": True}),
        projection("default", keepPrevious="0s"),
        projection("default", asOf=PAST),
        projection("default", asOf="2026-01-31T23:59:59.123456+02:00", ttl="24h"),
        projection("default", keepPrevious="719h59m60s"),
        projection("default", projector={"replicas": 0, "resources": {"requests": {"cpu": 1, "memory": "1.5Gi"}}}),
        projection(
            "default", fold=[{"type": "X", "delete": True}, {"type": "X", "add": {"status": "1"}, "when": "true"}]
        ),
    ],
)
def test_the_api_server_accepts_a_good_spec(api: ApiServer, manifest: dict[str, Any]) -> None:
    api.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(manifest))


def test_what_a_stream_was_made_with_cannot_be_changed(api: ApiServer) -> None:
    api.kubectl("create", "namespace", "immutable")
    made = {"name": "t", "replicas": 1, "config": {"retention.ms": "5"}}
    api.apply(event_stream("immutable", topic=made))
    changes: list[dict[str, Any]] = [
        {"partitions": 3, "topic": made},
        {"topic": {**made, "name": "u"}},
        {"topic": {**made, "replicas": 2}},
        {"topic": {"name": "t"}},
        {},
    ]
    for change in changes:
        with pytest.raises(RuntimeError, match="immutable"):
            api.apply(event_stream("immutable", **change))
    api.apply(event_stream("immutable", topic={**made, "config": {}}, deletionPolicy="Delete"))


def test_the_installations_logins_are_put_into_secrets(api: ApiServer, operator: Operator) -> None:
    until(lambda: operator.answers("/readyz"))
    for part in ("eventstore", "relay"):
        secret = until(lambda part=part: api.get("secret", f"refold-{part}", "-n", "refold-system"))
        dsn = base64.b64decode(secret["data"]["dsn"]).decode()
        with psycopg.connect(dsn) as connection:
            assert connection.execute("select count(*) from refold.streams").fetchone() is not None
    api.kubectl("delete", "secret", "refold-relay", "-n", "refold-system")
    again = until(lambda: api.get("secret", "refold-relay", "-n", "refold-system"), seconds=10)
    assert again["data"] == secret["data"], "the same login as before, so that nobody has to be restarted"


def test_a_projection_waits_for_its_stream_and_serves(api: ApiServer, namespace: str) -> None:
    api.apply(projection(namespace))
    becomes(api, "projection", namespace, "status", "False", "StreamNotReady")
    api.apply(event_stream(namespace))
    becomes(api, "eventstream", namespace, "orders", "True", "Active")
    becomes(api, "projection", namespace, "status", "False", "QueryStarting")
    version = live(api, namespace)
    assert names(api, "deployments", namespace) == {"status-query", f"status-projector-{version}"}
    assert names(api, "services", namespace) == {"status-query"}
    assert names(api, "secrets", namespace) == {"status-query", f"status-projector-{version}"}
    until(lambda: serves(api, namespace))
    status = api.get("projection", "status", "-n", namespace)["status"]
    assert status["url"] == f"http://status-query.{namespace}.svc"
    assert status["replicas"] == 1
    scale = yaml.safe_load(
        api.kubectl("get", "--raw", f"/apis/refold.dev/v1alpha1/namespaces/{namespace}/projections/status/scale")
    )
    assert scale["status"]["replicas"] == 1
    assert version in scale["status"]["selector"]


def test_a_projection_in_redis_is_built_swapped_and_dropped_there(api: ApiServer, namespace: str) -> None:
    server = Redis()
    server.start()
    connection = redis.Redis.from_url(server.url())
    url = base64.b64encode(server.url().encode()).decode()
    secret = {
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "my-redis", "namespace": namespace},
        "data": {"url": url},
    }  # fmt: skip
    store = {"type": "redis", "connectionRef": {"name": "my-redis"}}
    columns = [{"name": "status", "type": "text", "index": True}]
    try:
        api.apply(event_stream(namespace), projection(namespace, readStore=store))
        becomes(api, "projection", namespace, "status", "False", "SecretMissing")
        api.apply({**secret, "data": {"uri": url}})
        becomes(api, "projection", namespace, "status", "False", "SecretInvalid")
        api.apply(secret)
        until(lambda: serves(api, namespace))
        version = live(api, namespace)
        for child in ("status-query", f"status-projector-{version}"):
            assert api.get("secret", child, "-n", namespace)["data"]["readstore-dsn"] == url
        with pytest.raises(RuntimeError, match="can't be changed"):
            api.apply(projection(namespace))
        api.apply(projection(namespace, readStore=store, columns=columns))
        rule = {**RULES[0], "when": "true"}
        api.apply(projection(namespace, readStore=store, fold=[rule], columns=columns))
        until(lambda: live(api, namespace) != version)
        until(lambda: serves(api, namespace))
        assert {one.decode() for one in connection.hkeys(f"refold:{namespace}.status:definitions")} == {
            version, live(api, namespace),
        }  # fmt: skip
        api.kubectl("delete", "projection", "status", "-n", namespace, "--timeout=30s")
        assert connection.keys() == []
    finally:
        connection.close()
        server.remove()


def test_without_a_connection_a_projection_stands_in_the_installations_redis(
    api: ApiServer, operator: Operator, namespace: str
) -> None:
    server = EmbeddedRedis()
    server.start()
    wanted = projection(namespace, readStore={"type": "redis"})
    rule = {**RULES[0], "when": "true"}
    with redis.Redis.from_url(server.admin_url, protocol=2) as admin:
        admin.execute_command("ACL", "SETUSER", "all", "on", ">p", "~*", "+@all")
    everything = redis.Redis.from_url(f"redis://all:p@127.0.0.1:{server.port}", protocol=2)
    try:
        for _ in range(2):
            api.apply(event_stream(namespace), wanted)
            becomes(api, "projection", namespace, "status", "False", "ReadStoreMissing")
            api.kubectl("delete", "projection", "status", "-n", namespace, "--timeout=30s")
        api.apply(wanted)
        becomes(api, "projection", namespace, "status", "False", "ReadStoreMissing")
        operator.restart(REFOLD_REDIS_ADMIN_URL=server.admin_url)
        until(lambda: serves(api, namespace))
        former = live(api, namespace)
        for child, part in (("status-query", "query"), (f"status-projector-{former}", "projector")):
            url = base64.b64decode(api.get("secret", child, "-n", namespace)["data"]["readstore-dsn"]).decode()
            with redis.Redis.from_url(url, protocol=2) as connection:
                assert urlsplit(url).username == f"refold.{namespace}.status.{part}"
                assert connection.get(f"refold:{namespace}.status:live") == former.encode()
        server.kill()
        server.start()
        api.apply(projection(namespace, readStore={"type": "redis"}, fold=[rule]))
        until(lambda: live(api, namespace) != former)
        until(lambda: serves(api, namespace))
        api.apply(wanted)  # the former one again, which `keepPrevious` has kept
        until(lambda: live(api, namespace) == former and serves(api, namespace))
        assert len(everything.hkeys(f"refold:{namespace}.status:definitions")) == 2
        api.kubectl("delete", "projection", "status", "-n", namespace, "--timeout=30s")
        assert everything.keys() == []
        assert set(everything.acl_users()) == {"all", "default", "probe", "refold_admin"}
    finally:
        everything.close()
        operator.restart()
        server.remove()


def delegates(api: ApiServer) -> set[tuple[str, str]]:
    subjects = api.get("clusterrolebinding", "refold-query").get("subjects", [])
    return {(subject["namespace"], subject["name"]) for subject in subjects}


def test_query_services_and_nobody_else_may_ask_about_their_callers(api: ApiServer, namespace: str) -> None:
    readers = [projection(namespace), projection(namespace, "other")]
    api.apply(event_stream(namespace), *readers)
    for name in ("status", "other"):
        until(lambda name=name: serves(api, namespace, name))
    ours = {(namespace, "status-query"), (namespace, "other-query")}
    assert ours <= delegates(api)
    assert names(api, "serviceaccounts", namespace) == {"status-query", "other-query"}
    pod = api.get("deployment", "status-query", "-n", namespace)["spec"]["template"]["spec"]
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("status-query", True)
    questions = ("tokenreviews.authentication.k8s.io", "subjectaccessreviews.authorization.k8s.io", "secrets")
    users = f"system:serviceaccount:{namespace}"
    may = {
        account: [
            api.kubectl("auth", "can-i", "create", one, "-A", f"--as={users}:{account}", check=False).split("\n")[0]
            for one in questions
        ]
        for account in ("status-query", "default")
    }
    assert may == {"status-query": ["yes", "yes", "no"], "default": ["no", "no", "no"]}

    api.kubectl("delete", "serviceaccount", "status-query", "-n", namespace)
    until(lambda: "status-query" in names(api, "serviceaccounts", namespace))
    # The pods' tokens are those of the account that is gone, so they are replaced.
    uid = api.get("serviceaccount", "status-query", "-n", namespace)["metadata"]["uid"]
    until(
        lambda: (
            api.get("deployment", "status-query", "-n", namespace)["spec"]["template"]["metadata"]["annotations"][
                "refold.dev/account"
            ]
            == uid
        )
    )
    api.kubectl("delete", "projection", "other", "-n", namespace)
    assert ours & delegates(api) == {(namespace, "status-query")}
    until(lambda: names(api, "serviceaccounts", namespace) == {"status-query"})


def test_event_types_of_a_resource_are_what_the_store_takes(api: ApiServer, operator: Operator, namespace: str) -> None:
    schema = {"type": "object", "required": ["count"], "properties": {"count": {"type": "integer", "x-unit": "1"}}}
    types = [{"name": "Counted", "schema": schema}, {"name": "Never", "schema": False}]
    api.apply(event_stream(namespace, events=types))
    becomes(api, "eventstream", namespace, "orders", "True", "Active")
    written = "select types from refold.event_types join refold.streams using (stream) where namespace = %s"
    with psycopg.connect(operator.admin[operator.store], autocommit=True) as connection:
        found = connection.execute(written, [namespace]).fetchall()
        assert [json.loads(types) for (types,) in found] == [{"Counted": schema, "Never": False}]
        api.apply(event_stream(namespace, events=[{"name": "Counted", "schema": {"pattern": "("}}]))
        becomes(api, "eventstream", namespace, "orders", "False", "InvalidSchema")
        assert connection.execute(written, [namespace]).fetchall() == found
        api.apply(event_stream(namespace, events=[{"name": "Counted"}]))
        becomes(api, "eventstream", namespace, "orders", "True", "Active")
        assert connection.execute(written, [namespace]).fetchall() == [('{"Counted":true}',)]


async def test_accounts_of_projections_that_went_without_the_operator_lose_the_right_and_conflicts_are_tried_again(
    api: ApiServer, namespace: str
) -> None:
    def ours() -> set[str]:
        return {account for where, account in delegates(api) if where == namespace}

    configuration = client.Configuration()
    await config.load_kube_config(str(api.kubeconfig), client_configuration=configuration)
    cluster = Cluster(client.ApiClient(configuration))
    try:
        first, second = Delegation(cluster), Delegation(cluster)
        await first.give(Account(namespace, "a-query"))
        assert ours() == {"a-query"}
        # The next one that reads the binding finds no Projection of that name; the first has read it before.
        await second.give(Account(namespace, "b-query"))
        assert ours() == {"b-query"}
        await first.give(Account(namespace, "c-query"))
        assert ours() == {"c-query"}
        await first.take(Account(namespace, "c-query"))
        await first.take(Account(namespace, "c-query"))
        assert ours() == set()
    finally:
        await cluster.close()


def test_the_secrets_logins_can_do_their_work_and_no_more(api: ApiServer, namespace: str) -> None:
    api.apply(event_stream(namespace), event_stream(namespace, "secrets"), projection(namespace))
    until(lambda: serves(api, namespace))
    version = live(api, namespace)
    projector = api.get("secret", f"status-projector-{version}", "-n", namespace)["data"]
    query = api.get("secret", "status-query", "-n", namespace)["data"]
    decoded = {key: base64.b64decode(value).decode() for key, value in {**query, **projector}.items()}
    assert set(query) == {"readstore-dsn", "store-dsn"}
    for reads in (decoded["store-dsn"], base64.b64decode(query["store-dsn"]).decode()):
        with psycopg.connect(reads, autocommit=True) as connection:
            connection.execute(f'select * from "{namespace}.orders".events')
            connection.execute("select * from refold.heads")
            for refused in (f'select * from "{namespace}.secrets".events', f'delete from "{namespace}.orders".events'):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(refused)
    with psycopg.connect(decoded["readstore-dsn"], autocommit=True) as connection:
        connection.execute(f'update "{namespace}.status.read".positions set head = head')
    reader = base64.b64decode(query["readstore-dsn"]).decode()
    with psycopg.connect(reader, autocommit=True) as connection:
        connection.execute(f'select * from "{namespace}.status.read".rows_{version}')
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(f'delete from "{namespace}.status.read".rows_{version}')


def test_a_query_service_reads_no_history_where_rows_have_none(api: ApiServer, namespace: str) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    secret = api.get("secret", "status-query", "-n", namespace)["data"]
    login = base64.b64decode(secret["store-dsn"]).decode()
    # of the live version until readers have left it
    api.apply(projection(namespace, key="data.customer", keepPrevious="0s"))
    until(lambda: "store-dsn" not in api.get("secret", "status-query", "-n", namespace)["data"])
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(login)


def test_changed_and_deleted_children_are_put_back(api: ApiServer, namespace: str) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    projector = f"status-projector-{live(api, namespace)}"
    secret = api.get("secret", projector, "-n", namespace)["data"]
    api.kubectl("delete", "deployment", projector, "-n", namespace)
    api.kubectl("delete", "service", "status-query", "-n", namespace)
    api.kubectl("delete", "secret", projector, "-n", namespace)
    api.kubectl("scale", "deployment", "status-query", "--replicas=7", "-n", namespace)
    until(lambda: projector in names(api, "deployments", namespace), seconds=10)
    until(lambda: "status-query" in names(api, "services", namespace), seconds=10)
    until(lambda: api.get("secret", projector, "-n", namespace)["data"] == secret, seconds=10)
    until(lambda: api.get("deployment", "status-query", "-n", namespace)["spec"]["replicas"] == 1, seconds=10)
    assert any("status" in message for message in until(lambda: told(api, namespace, "DriftFound")))


def catalog(operator: Operator, namespace: str) -> dict[str, str]:
    """Return the states of a namespace's streams."""
    with psycopg.connect(operator.admin[operator.store]) as connection:
        query = "select name, state from refold.streams where namespace = %s"
        return dict(connection.execute(query, [namespace]).fetchall())


def test_a_topic_that_someone_changes_or_deletes_is_found_by_the_resync_and_told(
    api: ApiServer, operator: Operator, namespace: str, kafka: Kafka
) -> None:
    api.apply(event_stream(namespace, topic={"config": {"retention.ms": "86400000"}}))
    becomes(api, "eventstream", namespace, "orders", "True", "Active")
    admin, topic = AdminClient({"bootstrap.servers": kafka.bootstrap}), f"{namespace}.orders"

    def said(text: str) -> bool:
        return any(text in message for message in told(api, namespace, "DriftFound"))

    operator.restart(REFOLD_RESYNC_SECONDS="1")
    try:
        shorter = [ConfigEntry("retention.ms", "5", incremental_operation=AlterConfigOpType.SET)]
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=shorter)
        admin.incremental_alter_configs([resource])[resource].result()
        until(lambda: said(f"configured the topic {topic}: retention.ms"))
        admin.create_partitions([NewPartitions(topic, 4)])[topic].result()
        until(lambda: said(f"the topic {topic} has 2 more partitions, which are never used"))
        assert "2 more" in condition(api, "eventstream", namespace, "orders", "TopicReady")["message"]
        looked = operator.metric("refold_reconciliations_total")
        until(lambda: operator.metric("refold_reconciliations_total") >= looked + 3)
        assert len([message for message in told(api, namespace, "DriftFound") if "2 more" in message]) == 1
        admin.delete_topics([topic])[topic].result()
        until(lambda: said(f"the topic {topic} was gone and has been made again"))
        becomes(api, "eventstream", namespace, "orders", "True", "Active")
        assert "2 more" not in condition(api, "eventstream", namespace, "orders", "TopicReady")["message"]
    finally:
        operator.restart()


def test_an_object_of_someone_else_is_not_taken_over(api: ApiServer, namespace: str) -> None:
    foreign = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "status-query", "namespace": namespace},
        "spec": {"ports": [{"port": 1234}], "selector": {"mine": "yes"}},
    }  # fmt: skip
    api.apply(foreign, event_stream(namespace), projection(namespace))
    becomes(api, "projection", namespace, "status", "False", "ObjectConflict")
    assert api.get("service", "status-query", "-n", namespace)["spec"]["ports"][0]["port"] == 1234
    # It holds up neither what doesn't need it nor the read model.
    first = live(api, namespace)
    assert api.get("deployment", f"status-projector-{first}", "-n", namespace)["spec"]["replicas"] == 1
    api.kubectl("annotate", "projection", "status", "refold.dev/rebuild=again", "-n", namespace)
    until(lambda: live(api, namespace) != first)
    becomes(api, "projection", namespace, "status", "False", "ObjectConflict")
    api.kubectl("delete", "service", "status-query", "-n", namespace)
    until(lambda: serves(api, namespace))


def test_scaling_a_projection_scales_its_projectors(api: ApiServer, namespace: str) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    api.kubectl("scale", "projection", "status", "--replicas=2", "-n", namespace)
    projector = f"status-projector-{live(api, namespace)}"
    until(lambda: api.get("deployment", projector, "-n", namespace)["spec"]["replicas"] == 2, seconds=10)
    until(lambda: serves(api, namespace))
    until(lambda: api.get("projection", "status", "-n", namespace)["status"]["replicas"] == 2)
    found = api.get("projection", "status", "-n", namespace)
    assert found["spec"]["projector"]["replicas"] == 2, "the operator leaves it to whoever scales"
    assert "autoscaling" not in found["status"]


class Positions:
    """The read model's tables, in which a test does what projectors would."""

    def __init__(self, operator: Operator, namespace: str, name: str = "status") -> None:
        self.schema = f"{namespace}.{name}.read"
        self._connection = psycopg.connect(operator.admin[operator.readstore], autocommit=True)
        self._operator, self._projection = operator, (namespace, name)

    def __enter__(self) -> "Positions":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def told(self) -> str | None:
        """Return of which version the event store was told what it folds."""
        with psycopg.connect(self._operator.admin[self._operator.store]) as connection:
            found = connection.execute(
                "select version from refold.definitions where (namespace, name) = (%s, %s)", self._projection
            ).fetchone()
        return None if found is None else str(found[0])

    def execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        cursor = self._connection.execute(statement.format(schema=f'"{self.schema}"'), parameters)
        return cursor.fetchall() if cursor.description else []

    def reach(self, version: str, position: int, *, head: int = 10) -> None:
        self.execute(
            "update {schema}.positions set position = %s, head = %s, seen_at = now() where version = %s",
            position, head, version,
        )  # fmt: skip

    def park(self, version: str) -> None:
        self.execute(
            "insert into {schema}.parked (version, incarnation, partition, position, key, subject, error) "
            "values (%s, '', 0, 3, 'a', 'a', 'no field x')",
            version,
        )

    def stop(self, version: str, reason: str | None) -> None:
        self.execute("update {schema}.positions set stopped = %s where version = %s", reason, version)

    def versions(self) -> set[str]:
        """Return the versions that have a table."""
        tables = "select tablename from pg_tables where schemaname = %s and tablename like 'rows%%'"
        return {row[0].removeprefix("rows_") for row in self.execute(tables, self.schema)}

    def retired_long_ago(self, version: str) -> None:
        self.execute("update {schema}.versions set retired_at = now() - interval '2 h' where version = %s", version)


@pytest.fixture
def positions(operator: Operator, namespace: str) -> Iterator[Positions]:
    with Positions(operator, namespace) as found:
        yield found


def changed(namespace: str, to: str = "changed", **spec: Any) -> dict[str, Any]:
    return projection(namespace, fold=[{"type": "OrderPlaced", "set": {"status": f"'{to}'"}}], **spec)


def building(api: ApiServer, namespace: str, *, but: str = "") -> str:
    """Return the version that is being built, another one than `but`."""

    def version() -> str:
        found: str = api.get("projection", "status", "-n", namespace)["status"]["building"]["version"]
        return "" if found == but else found

    return until(version)


def test_a_changed_definition_is_built_beside_the_live_one_and_swapped(
    api: ApiServer, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace), projection(namespace, keepPrevious="0s"))
    until(lambda: serves(api, namespace))
    former = live(api, namespace)
    positions.reach(former, 10)
    api.apply(changed(namespace, keepPrevious="0s"))
    becomes(api, "projection", namespace, "status", "False", "Building")
    version = building(api, namespace)
    assert live(api, namespace) == former
    assert {f"status-projector-{each}" for each in (former, version)} < names(api, "deployments", namespace)
    roll_out(api, namespace)
    conditions = until(lambda: api.get("projection", "status", "-n", namespace)["status"]["conditions"])
    assert {each["type"]: each["status"] for each in conditions}["Available"] == "True"
    assert positions.told() == former
    positions.reach(version, 10)
    until(lambda: serves(api, namespace), seconds=20)
    assert live(api, namespace) == version
    assert positions.told() == version
    until(lambda: f"status-projector-{former}" not in names(api, "deployments", namespace))
    until(lambda: f"status-projector-{former}" not in names(api, "secrets", namespace))
    until(lambda: positions.versions() == {version})


def test_rows_are_read_in_sql_where_the_spec_asks_for_it(
    api: ApiServer, operator: Operator, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace), projection(namespace, keepPrevious="0s"))
    until(lambda: serves(api, namespace))
    assert "status-sql" not in names(api, "secrets", namespace)
    api.apply(projection(namespace, keepPrevious="0s", readStore={"sql": True}))
    secret = until(lambda: api.get("secret", "status-sql", "-n", namespace))
    found = {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
    assert set(found) == {
        "type", "provider", "host", "port", "database", "dbname", "username", "password", "uri",
    }  # fmt: skip
    former = live(api, namespace)
    positions.execute(f"insert into {{schema}}.rows_{former} (key, status) values ('a', 'former')")
    with psycopg.connect(found["uri"], autocommit=True) as reader:
        assert reader.execute("select * from rows").fetchall() == [("a", "former")]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute(f'select * from "{namespace}.status.read".positions')
        reader.execute("begin")
        reader.execute("select * from rows")
        api.apply(changed(namespace, keepPrevious="0s", readStore={"sql": True}))
        version = building(api, namespace)
        positions.execute(f"insert into {{schema}}.rows_{version} (key, status) values ('a', 'later')")
        positions.reach(version, 0, head=0)
        becomes(api, "projection", namespace, "status", "False", "ReadModelInUse")
        assert live(api, namespace) == former
        reader.execute("commit")
        until(lambda: live(api, namespace) == version, seconds=40)
        assert reader.execute("select * from rows").fetchall() == [("a", "later")]
    api.apply(changed(namespace, keepPrevious="0s"))
    until(lambda: "status-sql" not in names(api, "secrets", namespace))
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(found["uri"])


def test_the_former_version_goes_on_and_its_definition_brings_it_back_at_once(
    api: ApiServer, operator: Operator, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    former = live(api, namespace)
    positions.reach(former, 10)
    api.apply(changed(namespace))
    version = building(api, namespace)
    positions.reach(version, 10)
    until(lambda: live(api, namespace) == version)
    until(lambda: serves(api, namespace))
    previous = api.get("projection", "status", "-n", namespace)["status"]["previous"]
    assert previous["version"] == former
    assert 3500 < _seconds(previous["keptUntil"]) - time.time() <= 3600
    assert {f"status-projector-{each}" for each in (former, version)} < names(api, "deployments", namespace)
    api.kubectl("scale", "projection", "status", "--replicas=2", "-n", namespace)
    until(lambda: api.get("deployment", f"status-projector-{former}", "-n", namespace)["spec"]["replicas"] == 2)

    # its projectors are a little behind: until they aren't, readers stay where they are
    positions.reach(former, 9)
    api.apply(projection(namespace))
    becomes(api, "projection", namespace, "status", "False", "Building")
    assert building(api, namespace) == former
    assert live(api, namespace) == version
    operator.kill()
    positions.reach(former, 10)
    operator.start()
    until(lambda: live(api, namespace) == former)
    until(lambda: serves(api, namespace))
    assert positions.versions() == {former, version}
    assert api.get("projection", "status", "-n", namespace)["status"]["previous"]["version"] == version
    api.apply(changed(namespace))
    until(lambda: live(api, namespace) == version)

    # two hours later
    operator.kill()
    positions.retired_long_ago(former)
    operator.start()
    until(lambda: positions.versions() == {version})
    until(lambda: f"status-projector-{former}" not in names(api, "deployments", namespace))
    until(lambda: serves(api, namespace))
    assert "previous" not in api.get("projection", "status", "-n", namespace)["status"]


def test_a_kept_version_is_dropped_in_time_while_the_definition_is_a_bad_one(
    api: ApiServer, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    former = live(api, namespace)
    positions.reach(former, 10)
    api.apply(changed(namespace))
    version = building(api, namespace)
    positions.reach(version, 10)
    until(lambda: live(api, namespace) == version)
    api.apply(projection(namespace, fold=[{"type": "OrderPlaced", "set": {"nowhere": "'placed'"}}]))
    until(lambda: ready(api, "projection", namespace, "status")[0] == "False")
    assert {f"status-projector-{each}" for each in (former, version)} < names(api, "deployments", namespace)
    positions.retired_long_ago(former)
    api.kubectl("annotate", "projection", "status", "look=again", "-n", namespace)
    until(lambda: positions.versions() == {version})
    until(lambda: f"status-projector-{former}" not in names(api, "deployments", namespace))


def test_a_build_that_fails_is_said_and_superseded_by_the_next_edit(
    api: ApiServer, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    former = live(api, namespace)
    positions.reach(former, 10)
    api.apply(changed(namespace, "wrong"))
    wrong = building(api, namespace)
    positions.park(wrong)
    positions.reach(wrong, 10)
    becomes(api, "projection", namespace, "status", "False", "BuildFailed")
    roll_out(api, namespace)
    found = api.get("projection", "status", "-n", namespace)["status"]
    conditions = {each["type"]: each for each in found["conditions"]}
    assert "no field x" in conditions["Ready"]["message"]
    assert conditions["Degraded"]["status"] == "True"
    assert conditions["Available"]["status"] == "True"
    assert live(api, namespace) == former
    warnings = [each for each in api.get("events", "-n", namespace)["items"] if each["reason"] == "BuildFailed"]
    assert [each["type"] for each in warnings] == ["Warning"]

    api.apply(changed(namespace, "right"))
    right = building(api, namespace, but=wrong)
    until(lambda: positions.versions() == {former, right})
    until(lambda: f"status-projector-{wrong}" not in names(api, "deployments", namespace))
    positions.reach(right, 10)
    until(lambda: serves(api, namespace))
    assert live(api, namespace) == right
    assert positions.versions() == {former, right}


def test_a_handlers_image_is_built_beside_the_live_version_and_its_refusal_is_said(
    api: ApiServer, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    former = live(api, namespace)
    positions.reach(former, 10)
    api.apply(handled(namespace))
    version = building(api, namespace)

    def image(name: str) -> str:
        (container,) = api.get("deployment", name, "-n", namespace)["spec"]["template"]["spec"]["containers"]
        return str(container["image"])

    made = until(lambda: image(f"status-projector-{version}"))
    assert made == handled(namespace)["spec"]["handler"]["image"]
    assert image(f"status-projector-{former}") == image("status-query") == "refold/refold:test"
    positions.stop(version, "spec.handler.image: it is built from Refold 99.1.0")
    becomes(api, "projection", namespace, "status", "False", "BuildFailed")
    found = api.get("projection", "status", "-n", namespace)["status"]
    conditions = {each["type"]: each for each in found["conditions"]}
    assert "built from Refold 99.1.0" in conditions["Ready"]["message"]
    assert live(api, namespace) == former
    moved = f"mirror:5000/acme@sha256:{'0a' * 32}"
    api.apply(handled(namespace, image=moved))
    until(lambda: image(f"status-projector-{version}") == moved)
    positions.stop(version, None)
    positions.reach(version, 10)
    until(lambda: live(api, namespace) == version)


def test_the_annotation_rebuilds_with_the_same_definition_and_tells_how_far_it_is(
    api: ApiServer, operator: Operator, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    former = live(api, namespace)
    positions.reach(former, 100_000, head=100_000)
    api.kubectl("annotate", "projection", "status", "refold.dev/rebuild=once", "-n", namespace)
    version = building(api, namespace)
    assert version != former

    def progress() -> dict[str, Any]:
        positions.execute("update {schema}.positions set position = position + 20 where version = %s", version)
        found: dict[str, Any] = api.get("projection", "status", "-n", namespace)["status"]["building"]
        return found if "remainingSeconds" in found else {}

    positions.reach(version, 10, head=100_000)
    looked = operator.metric("refold_reconciliations_total")
    until(lambda: not progress() and operator.metric("refold_reconciliations_total") >= looked + 3)
    positions.park(former)  # numbers alone are written every half minute: other news
    found = until(progress)
    assert found["events"] == 200_000
    assert 0 < found["applied"] < 200_000
    assert found["progress"] == f"{found['applied'] * 100 // 200_000}%"
    left = found["events"] - found["applied"]
    assert found["remainingSeconds"] == pytest.approx(left / found["eventsPerSecond"], abs=2, rel=0.1)
    positions.reach(version, 100_000, head=100_000)
    until(lambda: live(api, namespace) == version)
    until(lambda: serves(api, namespace))
    assert "building" not in api.get("projection", "status", "-n", namespace)["status"]
    positions.execute("delete from {schema}.parked")
    api.kubectl("annotate", "projection", "status", "refold.dev/rebuild-", "-n", namespace)
    until(lambda: live(api, namespace) == former)


def test_the_command_rebuilds_and_tells_how_it_ended(api: ApiServer, namespace: str, positions: Positions) -> None:
    def command() -> "subprocess.Popen[str]":
        program = "from refold.cli.main import app; app()"
        return subprocess.Popen(
            [sys.executable, "-c", program, "rebuild", "status", "-n", namespace],
            env={**os.environ, "KUBECONFIG": str(api.kubeconfig)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    missing = command()
    assert "find the Projection" in missing.communicate(timeout=60)[1]
    assert missing.returncode == 1
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    former = live(api, namespace)
    positions.reach(former, 10)
    failing = command()
    wrong = building(api, namespace)
    positions.park(wrong)
    shown, _ = failing.communicate(timeout=60)
    assert failing.returncode == 1
    assert "no field x" in shown
    assert live(api, namespace) == former
    going = command()
    version = building(api, namespace, but=wrong)
    positions.reach(version, 10)
    shown, _ = going.communicate(timeout=60)
    assert going.returncode == 0
    assert shown.splitlines()[-1] == f"readers see {version}"


def now(seconds: float = 0) -> str:
    return (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).isoformat()


def record(postgres: Postgres, operator: Operator, namespace: str, first: int, last: int) -> None:
    """Write events of these positions into partition 0 of the stream `orders`."""
    with psycopg.connect(postgres.dsn(operator.store), autocommit=True) as connection:
        connection.execute(
            f'insert into "{namespace}.orders".events '
            "(partition, position, subject, revision, id, type, data, recorded_at) "
            "select 0, n, 's', n, n::text, 'OrderPlaced', '{}', now() from generate_series(%s::int, %s) n",
            [first, last],
        )
        connection.execute(
            "update refold.heads h set head = %s, recorded_at = now() from refold.streams s "
            "where s.stream = h.stream and s.namespace = %s and partition = 0",
            [last, namespace],
        )


def test_a_read_model_as_of_a_moment_is_built_until_then_and_its_projectors_end(
    api: ApiServer, operator: Operator, namespace: str, positions: Positions, postgres: Postgres
) -> None:
    api.apply(event_stream(namespace))
    becomes(api, "eventstream", namespace, "orders", "True", "Active")
    record(postgres, operator, namespace, 1, 7)
    moment = now()
    time.sleep(0.01)
    record(postgres, operator, namespace, 8, 9)
    api.apply(projection(namespace, asOf=moment))
    becomes(api, "projection", namespace, "status", "False", "Building")
    version = live(api, namespace)
    assert building(api, namespace) == version
    heads = "select partition, head from {schema}.positions order by partition"
    assert positions.execute(heads) == [(0, 7), (1, 0)]
    projector = f"status-projector-{version}"

    def replicas() -> int:
        found: int = api.get("deployment", projector, "-n", namespace)["spec"]["replicas"]
        return found

    until(lambda: replicas() == 1)
    operator.kill()
    positions.execute("update {schema}.positions set position = head")
    operator.start()
    until(lambda: replicas() == 0)
    roll_out(api, namespace)
    becomes(api, "projection", namespace, "status", "True", "Complete")
    assert "building" not in api.get("projection", "status", "-n", namespace)["status"]
    assert positions.execute(heads) == [(0, 7), (1, 0)]

    api.apply(changed(namespace, asOf=moment))
    next_version = building(api, namespace, but=version)
    positions.execute("update {schema}.positions set position = head where version = %s", next_version)
    until(lambda: live(api, namespace) == next_version)
    for change in ({"asOf": now()}, {}):
        with pytest.raises(RuntimeError, match="asOf is immutable"):
            api.apply(projection(namespace, **change))


def test_as_of_a_moment_that_has_not_passed_waits_for_it(api: ApiServer, namespace: str) -> None:
    api.apply(event_stream(namespace))
    becomes(api, "eventstream", namespace, "orders", "True", "Active")
    api.apply(projection(namespace, asOf=now(8)))
    becomes(api, "projection", namespace, "status", "False", "AsOfNotPassed")
    assert "live" not in api.get("projection", "status", "-n", namespace)["status"]
    becomes(api, "projection", namespace, "status", "False", "QueryStarting")
    roll_out(api, namespace)
    becomes(api, "projection", namespace, "status", "True", "Complete")


def test_a_projection_whose_ttl_has_passed_is_deleted_with_its_read_model(
    api: ApiServer, operator: Operator, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace), projection(namespace, "stays", asOf=PAST, ttl="1h"))
    api.apply(projection(namespace, asOf=PAST, ttl="20s"))
    until(lambda: positions.versions())
    operator.kill()
    time.sleep(20)
    operator.start()
    until(lambda: names(api, "projections", namespace) == {"stays"})
    assert positions.versions() == set()
    assert not [name for name in names(api, "deployments", namespace) if name.startswith("status-")]


def test_a_bad_definition_is_said_and_leaves_the_live_version_alone(api: ApiServer, namespace: str) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    former = live(api, namespace)
    api.apply(projection(namespace, fold=[{"type": "OrderPlaced", "set": {"nowhere": "'placed'"}}]))

    def refused() -> bool:
        found = api.get("projection", "status", "-n", namespace)["status"]
        conditions = {each["type"]: each for each in found["conditions"]}
        assert conditions["Ready"]["status"] == "False"
        assert "fold[0]" in conditions["Ready"]["message"]
        assert conditions["Available"]["status"] == "True"
        return bool(found["live"]["version"] == former)

    until(refused)
    api.kubectl("scale", "projection", "status", "--replicas=2", "-n", namespace)
    projector = f"status-projector-{former}"
    until(lambda: api.get("deployment", projector, "-n", namespace)["spec"]["replicas"] == 2, seconds=10)
    api.apply(projection(namespace))
    until(lambda: serves(api, namespace))


def test_deleting_a_projection_drops_its_read_model_and_logins(
    api: ApiServer, operator: Operator, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace), projection(namespace), projection(namespace, "kept", deletionPolicy="Retain"))
    until(lambda: serves(api, namespace))
    until(lambda: serves(api, namespace, "kept"))
    assert positions.told() is not None
    api.kubectl("delete", "projections", "--all", "-n", namespace, "--timeout=30s")
    assert positions.told() is None
    assert names(api, "deployments", namespace) == set()
    assert names(api, "secrets", namespace) == set()
    with psycopg.connect(operator.admin[operator.readstore]) as connection:
        schemas = connection.execute(
            "select nspname from pg_namespace where nspname like %s", [f"{namespace}.%"]
        ).fetchall()
        assert schemas == [(f"{namespace}.kept.read",)]
        roles = connection.execute("select rolname from pg_roles where rolname like %s", [f"%{namespace}.status%"])
        assert roles.fetchall() == []
    api.apply(projection(namespace, "kept", deletionPolicy="Retain"))
    until(lambda: serves(api, namespace, "kept"))


def test_deletion_waits_for_projectors_that_still_end(api: ApiServer, operator: Operator, namespace: str) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    secret = api.get("secret", f"status-projector-{live(api, namespace)}", "-n", namespace)["data"]
    with psycopg.connect(base64.b64decode(secret["readstore-dsn"]).decode(), autocommit=True) as projector:
        projector.execute("create temporary table stage (x int)")
        api.kubectl("delete", "projection", "status", "-n", namespace, "--wait=false")
        becomes(api, "projection", namespace, "status", "False", "ProcessesEnding")
    api.kubectl("wait", "--for=delete", "projection/status", "-n", namespace, "--timeout=20s")


def test_a_namespace_with_everything_in_it_can_be_deleted(api: ApiServer, namespace: str) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    # there is no namespace controller here: delete what it would, in its order, which is none
    api.kubectl("delete", "eventstreams,projections,deployments,services,secrets", "--all", "-n", namespace)
    assert api.get("eventstreams,projections", "-n", namespace)["items"] == []


def test_an_idle_resource_is_not_written(api: ApiServer, operator: Operator, namespace: str) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    time.sleep(2)
    kinds = "eventstreams,projections,deployments,services,secrets"
    before = {
        (item["kind"], item["metadata"]["name"]): item["metadata"]["resourceVersion"]
        for item in api.get(kinds, "-n", namespace)["items"]
    }
    runs = operator.metric("refold_reconciliations_total")
    for kind, name in (("eventstream", "orders"), ("projection", "status")):
        api.kubectl("label", kind, name, "look=again", "-n", namespace)
    until(lambda: operator.metric("refold_reconciliations_total") >= runs + 2)
    time.sleep(1)
    after = {
        (item["kind"], item["metadata"]["name"]): item["metadata"]["resourceVersion"]
        for item in api.get(kinds, "-n", namespace)["items"]
    }
    ours = [key for key in before if before[key] != after[key]]
    assert set(ours) <= {("EventStream", "orders"), ("Projection", "status")}, "the labels themselves, nothing else"
    managed = api.get("projection", "status", "-n", namespace, "--show-managed-fields")["metadata"]["managedFields"]
    times = [entry["time"] for entry in managed if entry.get("subresource") == "status"]
    assert all(time.time() - _seconds(each) > 2 for each in times), "no status was written after the label"


def _seconds(timestamp: str) -> float:
    return dt.datetime.fromisoformat(timestamp).timestamp()


def test_nothing_secret_is_in_the_log(operator: Operator) -> None:
    for secret in ("password=", ":local@", "postgresql://"):
        assert secret not in operator.log
    assert "Traceback" not in operator.log


def test_a_read_models_rows_that_someone_drops_are_folded_again_and_told(
    api: ApiServer, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    version = live(api, namespace)
    positions.reach(version, 7)
    positions.execute("drop table {schema}.rows_" + version + " cascade")
    api.kubectl("label", "projection", "status", "look=again", "-n", namespace)
    until(lambda: any(f"the rows of version {version}" in text for text in told(api, namespace, "DriftFound")))
    assert positions.versions() == {version}
    assert positions.execute("select sum(position) from {schema}.positions") == [(0,)]


def test_what_is_paused_is_left_alone_and_goes_without_losing_anything(
    api: ApiServer, operator: Operator, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace, "new", paused=True, deletionPolicy="Delete"))
    api.apply(event_stream(namespace, deletionPolicy="Delete"), projection(namespace))
    until(lambda: serves(api, namespace))
    projector = f"status-projector-{live(api, namespace)}"
    before = api.get("projection", "status", "-n", namespace)["status"]
    api.apply(event_stream(namespace, deletionPolicy="Delete", paused=True))
    api.kubectl("annotate", "projection", "status", "refold.dev/paused=true", "-n", namespace)
    for kind, name in (("eventstream", "new"), ("eventstream", "orders"), ("projection", "status")):
        becomes(api, kind, namespace, name, "Unknown", "Paused")
    after = api.get("projection", "status", "-n", namespace)["status"]
    assert {name: value for name, value in after.items() if name not in ("conditions", "lag")} == {
        name: value for name, value in before.items() if name not in ("conditions", "lag")
    }
    assert condition(api, "projection", namespace, "status", "Available")["status"] == "True"
    assert catalog(operator, namespace) == {"orders": "active"}

    api.kubectl("delete", "deployment", projector, "-n", namespace)
    api.apply(changed(namespace))
    becomes(api, "projection", namespace, "status", "Unknown", "Paused")
    assert projector not in names(api, "deployments", namespace)
    assert len(positions.versions()) == 1

    api.kubectl("delete", "eventstreams", "--all", "-n", namespace, "--timeout=30s")
    assert catalog(operator, namespace) == {"orders": "released"}
    api.apply(event_stream(namespace, deletionPolicy="Delete"))
    becomes(api, "eventstream", namespace, "orders", "True", "Active")
    api.kubectl("annotate", "projection", "status", "refold.dev/paused-", "-n", namespace)
    until(lambda: projector in names(api, "deployments", namespace))
    until(lambda: len(positions.versions()) == 2)


def test_a_deletion_does_not_wait_for_what_is_gone_for_good_once_it_is_told_to_let_go(
    api: ApiServer, operator: Operator, namespace: str, positions: Positions
) -> None:
    api.apply(event_stream(namespace, deletionPolicy="Delete"), projection(namespace))
    until(lambda: serves(api, namespace))
    readstore = urlsplit(operator.admin[operator.readstore])
    nowhere = readstore._replace(netloc=readstore.netloc.replace(f":{readstore.port}", ":1"))
    operator.restart(REFOLD_KAFKA_BOOTSTRAP="127.0.0.1:1", REFOLD_READSTORE_ADMIN_DSN=nowhere.geturl())
    try:
        api.kubectl("delete", "projection", "status", "-n", namespace, "--wait=false")
        until(lambda: ready(api, "projection", namespace, "status")[1] == "ReadStoreUnreachable")
        until(lambda: "deletion waits" in condition(api, "projection", namespace, "status", "Ready")["message"])
        for kind, name in (("projection", "status"), ("eventstream", "orders")):
            api.kubectl("annotate", kind, name, "refold.dev/let-go=true", "-n", namespace)
        api.kubectl("delete", "eventstream", "orders", "-n", namespace, "--timeout=90s")
        api.kubectl("wait", "--for=delete", "projection/status", "-n", namespace, "--timeout=60s")
    finally:
        operator.restart()
    assert len(told(api, namespace, "LetGo")) == 2
    assert catalog(operator, namespace) == {"orders": "released"}, "what can be reached is let go"
    assert len(positions.versions()) == 1


def test_outages_are_conditions_and_pass(
    api: ApiServer, operator: Operator, namespace: str, postgres: Postgres
) -> None:
    api.apply(event_stream(namespace), projection(namespace))
    until(lambda: serves(api, namespace))
    before = api.get("projection", "status", "-n", namespace)["status"]
    postgres.stop()
    try:
        api.apply(event_stream(namespace, "late"))
        becomes(api, "eventstream", namespace, "late", "False", "StoreUnreachable")
        api.kubectl("annotate", "projection", "status", "look=again", "-n", namespace)
        becomes(api, "projection", namespace, "status", "False", "ReadStoreUnreachable")
        away = api.get("projection", "status", "-n", namespace)["status"]
        api.kubectl("annotate", "eventstream", "orders", "look=again", "-n", namespace)
        becomes(api, "eventstream", namespace, "orders", "False", "StoreUnreachable")
        topic = condition(api, "eventstream", namespace, "orders", "TopicReady")
        assert operator.answers("/healthz")
        for metric in (
            'refold_reconciliations_failed_total{kind="EventStream",reason="StoreUnreachable"}',
            'refold_backend_call_seconds_count{backend="eventstore",outcome="unavailable"}',
            'refold_backend_call_seconds_count{backend="readstore",outcome="unavailable"}',
            'refold_backend_call_seconds_count{backend="kubernetes",outcome="ok"}',
            'refold_backend_call_seconds_count{backend="kafka",outcome="ok"}',
            'refold_resources{condition="Ready",kind="EventStream",status="False"}',
            'refold_resources{condition="Ready",kind="Projection",status="False"}',
        ):
            assert operator.metric(metric) >= 1, metric
        said = [line for line in map(json.loads, operator.log.splitlines()) if line.get("reason") == "StoreUnreachable"]
        assert any(line["resource"] == f"EventStream {namespace}/late" and line["reconcile"] for line in said)
    finally:
        postgres.start()
    (available,) = (each for each in away["conditions"] if each["type"] == "Available")
    assert (available["status"], available["reason"]) == ("True", "ReadStoreUnreachable"), "its processes still run"
    assert operator.readstore in available["message"]
    told = ("live", "lag", "parked", "replicas", "selector", "url")
    assert {name: away[name] for name in told} == {name: before[name] for name in told}
    assert (topic["status"], topic["reason"]) == ("True", "Applied"), "nobody could ask whose the topic is"
    becomes(api, "eventstream", namespace, "late", "True", "Active", seconds=90)
    until(lambda: serves(api, namespace), seconds=90)


def test_the_operator_survives_the_api_server(api: ApiServer, operator: Operator, namespace: str) -> None:
    api.stop_server()
    time.sleep(3)
    assert operator.answers("/healthz")
    api.start_server()
    api.apply(event_stream(namespace))
    becomes(api, "eventstream", namespace, "orders", "True", "Active", seconds=90)


def test_killed_at_any_moment_it_converges(api: ApiServer, operator: Operator, namespace: str) -> None:
    wanted = [
        manifest
        for number in range(4)
        for manifest in (
            event_stream(namespace, f"orders-{number}", deletionPolicy="Delete"),
            projection(namespace, f"status-{number}", streams=[f"orders-{number}"]),
        )
    ]
    api.apply(*wanted)
    for pause in (0.3, 0.9, 1.5):
        time.sleep(pause)
        operator.kill()
        operator.start()
    for number in range(4):
        until(lambda number=number: serves(api, namespace, f"status-{number}"), seconds=90)
    assert len(names(api, "deployments", namespace)) == 8
    api.kubectl("delete", "eventstreams,projections", "--all", "-n", namespace, "--wait=false")
    for pause in (0.2, 0.8):
        time.sleep(pause)
        operator.kill()
        operator.start()
    until(lambda: api.get("eventstreams,projections", "-n", namespace)["items"] == [], seconds=90)
    for database in (operator.store, operator.readstore):
        with psycopg.connect(operator.admin[database]) as connection:
            left = connection.execute("select nspname from pg_namespace where nspname like %s", [f"{namespace}.%"])
            assert left.fetchall() == []
            left = connection.execute("select rolname from pg_roles where rolname like %s", [f"%{namespace}.%"])
            assert left.fetchall() == []
