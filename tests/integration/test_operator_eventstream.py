"""EventStreams against real Kafka and PostgreSQL: claims, topics, drift, outages, deletion policies."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, cast

import psycopg
import pytest
from confluent_kafka import Producer
from refold import names
from refold.eventstore import catalog
from refold.kafka import Brokers, Settings
from refold_operator import credentials, eventstream, resources
from refold_operator.access import Access
from refold_operator.cluster import Cluster
from refold_operator.database import Database
from refold_operator.errors import ReconcileError
from refold_operator.eventstream import Result
from refold_operator.kafka import Kafka
from refold_operator.settings import AccessSettings
from refold_operator.spec_guard import Rules
from refold_operator.store import Store

from hack.servers import Kafka as KafkaServer
from hack.servers import Postgres

KEY = b"k" * credentials.KEY_BYTES
MESSAGE_BYTES = {"max.message.bytes": "1048588"}
#: Users and ACLs are left alone, so neither Kafka nor the cluster is asked about them.
UNMANAGED = Access(AccessSettings(kafka_bootstrap="nowhere:9092"), cast("Kafka", None))
NO_CLUSTER = cast("Cluster", None)
_numbers = itertools.count(1)


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    """An installed store in a database of its own."""
    opened = Database(database, "event store")
    await opened.open()
    store = Store(opened)
    await store.install(KEY)
    yield store
    await opened.close()


@pytest.fixture
async def other_store(postgres: Postgres) -> AsyncIterator[Store]:
    """The store of another installation."""
    name = f"other_{next(_numbers)}"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"create database {name}")
    opened = Database(postgres.dsn(name), "event store")
    await opened.open()
    store = Store(opened)
    await store.install(KEY)
    yield store
    await opened.close()


@pytest.fixture(scope="session")
def topics(kafka: KafkaServer) -> Kafka:
    return Kafka(Brokers(Settings(kafka_bootstrap=kafka.bootstrap)))


@pytest.fixture
def name() -> str:
    """A name that no other test uses, for topics live longer than a test's database."""
    return f"stream-{next(_numbers)}"


@pytest.fixture
def writes(postgres: Postgres) -> Iterator[Callable[[], int]]:
    """What returns how many transactions that write there were; without autovacuum, whose are such, too."""
    autovacuum = "select from pg_stat_activity where backend_type like 'autovacuum%'"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("alter system set autovacuum = off")
        connection.execute("select pg_reload_conf()")
        while connection.execute(autovacuum).fetchone() is not None:
            time.sleep(0.05)

        def count() -> int:
            (number,) = connection.execute("select pg_snapshot_xmax(pg_current_snapshot())::text").fetchone() or (0,)
            return int(number)

        yield count
        connection.execute("alter system reset autovacuum")
        connection.execute("select pg_reload_conf()")


def resource(name: str, *, uid: str = "u-1", **spec: Any) -> resources.EventStream:
    return named("shop", name, uid=uid, **spec)


def named(namespace: str, name: str, *, uid: str, **spec: Any) -> resources.EventStream:
    metadata = {"namespace": namespace, "name": name, "uid": uid, "generation": 1, "resourceVersion": "1"}
    return resources.event_stream({"metadata": metadata, "spec": {"partitions": 3, **spec}})


async def reconcile(stream: resources.EventStream, store: Store, topics: Kafka, *, older: str | None = None) -> Result:
    """Reconcile, trying again while Kafka's answers are still on their way."""
    for _ in range(20):
        result = await eventstream.reconcile(
            stream,
            store=store,
            kafka=topics,
            access=UNMANAGED,
            cluster=NO_CLUSTER,
            default_replicas=1,
            rules=Rules(),
            older=older,
        )
        if result.conditions[0].reason != "TopicPending":
            break
        await asyncio.sleep(0.1)
    return result


async def until(topics: Kafka, topic: str, *, there: bool) -> None:
    """Wait until the brokers' metadata has the news."""
    async with asyncio.timeout(10):
        while (await topics.topic(topic) is not None) is not there:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.05)


async def until_configured(topics: Kafka, topic: str, config: Mapping[str, str]) -> None:
    """Wait until the broker that is asked has `config`: the controller answers a change before the brokers know it."""
    async with asyncio.timeout(30):
        while (found := await topics.topic(topic)) is None or found.config != config:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)


def ready(result: Result) -> tuple[str, str]:
    assert result.conditions[0].type == "Ready"
    return result.conditions[0].status, result.conditions[0].reason


async def test_topic_and_schema_are_made_and_the_stream_is_served(store: Store, topics: Kafka, name: str) -> None:
    result = await reconcile(resource(name, topic={"config": {"retention.ms": "1000"}}), store, topics)
    assert ready(result) == ("True", "Active")
    assert [condition.status for condition in result.conditions] == ["True", "True", "True"]
    assert result.status == {"topic": f"shop.{name}", "events": 0}
    topic = await topics.topic(f"shop.{name}")
    assert topic is not None
    assert topic.partitions == 3
    assert topic.config == {"retention.ms": "1000", "cleanup.policy": "delete", **MESSAGE_BYTES}
    claim = await store.stream("shop", name)
    assert claim is not None
    assert (claim.state, claim.uid, claim.topic_id) == ("active", "u-1", topic.id)


async def test_a_second_reconcile_changes_nothing(
    store: Store, topics: Kafka, name: str, writes: Callable[[], int]
) -> None:
    await reconcile(resource(name), store, topics)
    before = await topics.topic(f"shop.{name}"), await store.stream("shop", name)
    first = writes()
    result = await reconcile(resource(name), store, topics)
    assert writes() == first, "a reconcile of an unchanged stream writes nothing"
    assert ready(result) == ("True", "Active")
    assert (await topics.topic(f"shop.{name}"), await store.stream("shop", name)) == before
    assert not result.found


async def test_many_streams_go_together_and_a_second_look_at_them_writes_nothing(
    store: Store, topics: Kafka, name: str, writes: Callable[[], int]
) -> None:
    streams = [resource(f"{name}-{number}", uid=f"u-{number}") for number in range(12)]
    results = await asyncio.gather(*(reconcile(stream, store, topics) for stream in streams))
    assert {ready(result) for result in results} == {("True", "Active")}

    async with store.database.connection() as connection:
        made = "select count(distinct xmin::text) from pg_namespace where nspname like %s"
        (transactions,) = await (await connection.execute(made, [f"shop.{name}-%"])).fetchone() or (0,)
    before = [await topics.topic(f"shop.{stream.metadata.name}") for stream in streams]
    first = writes()
    results = await asyncio.gather(*(reconcile(stream, store, topics) for stream in streams))
    assert writes() == first
    assert transactions < len(streams), "schemas are made together"
    assert {ready(result) for result in results} == {("True", "Active")}
    assert not any(result.found for result in results)
    assert [await topics.topic(f"shop.{stream.metadata.name}") for stream in streams] == before


async def test_a_bad_stream_fails_alone_whichever_system_refuses_it(store: Store, topics: Kafka, name: str) -> None:
    good = [resource(f"{name}-{number}", uid=f"u-{number}") for number in range(4)]
    foreign, many, refused, taken = (
        resource(f"{name}-schema", uid="u-schema"),
        resource(f"{name}-replicas", uid="u-replicas", topic={"replicas": 3}),
        resource(f"{name}-name", uid="u-name", topic={"name": "n" * 250}),
        resource(f"{name}-taken", uid="u-taken", topic={"name": f"shop.{name}-0"}),
    )
    async with store.database.connection() as connection:
        await connection.execute(f'create schema "shop.{name}-schema"')

    streams = [good[0], foreign, good[1], many, refused, good[2], taken, good[3]]
    results = await asyncio.gather(*(reconcile(stream, store, topics) for stream in streams))

    found = {
        stream.metadata.name.removeprefix(f"{name}-"): ready(result)
        for stream, result in zip(streams, results, strict=True)
    }
    assert {found.pop(str(number)) for number in range(4)} == {("True", "Active")}
    assert found.pop("taken")[1] in ("TopicConflict", "Conflict")
    assert found == {
        "schema": ("False", "Conflict"), "replicas": ("False", "TopicRefused"), "name": ("False", "TopicRefused"),
    }  # fmt: skip
    for result in (results[1], results[3], results[4]):
        assert not any(f"{name}-{number}" in result.conditions[0].message for number in range(4)), "told of others"


async def test_a_stream_that_somebody_holds_does_not_hold_up_what_goes_together_with_it(
    store: Store, name: str
) -> None:
    held, *others = [
        await store.claim(
            namespace="shop", name=f"{name}-{number}", uid=f"u-{number}", partitions=1, topic=f"shop.{name}-{number}",
            kafka_cluster="k",
        )
        for number in range(4)
    ]  # fmt: skip

    async with store.database.connection() as connection:
        async with connection.transaction():
            await connection.execute("select from refold.heads where stream = %s for update", [held.stream])
            waits = asyncio.create_task(store.activate(held))
            active = await asyncio.gather(*(store.activate(one) for one in others))
            assert [one.state for one in active] == ["active"] * 3
            assert not waits.done()
        assert (await waits).state == "active"


NUMBER = [{"name": "Counted", "schema": {"properties": {"n": {"type": "integer"}}}}, {"name": "Noted"}]


async def test_writers_in_the_database_are_held_to_what_topics_take(store: Store) -> None:
    async with store.database.connection() as connection:
        assert await (await connection.execute("select topic_bytes from refold.store")).fetchone() == (768 * 1024,)
        await Store(store.database, event_bytes=1_000_000).install(KEY)
        assert await (await connection.execute("select topic_bytes from refold.store")).fetchone() == (1_500_000,)


async def test_event_types_are_written_before_ready_says_so_and_changes_nothing_when_they_stay(
    store: Store, topics: Kafka, name: str, writes: Callable[[], int]
) -> None:
    stream = resource(name, events=NUMBER)
    result = await reconcile(stream, store, topics)
    assert ready(result) == ("True", "Active")
    claim = await store.stream("shop", name)
    assert claim is not None
    assert claim.types_revision == 1
    async with store.database.connection() as connection:
        assert await catalog.get_event_types(connection, claim.stream) == (
            1, '{"Counted":{"properties":{"n":{"type":"integer"}}},"Noted":true}',
        )  # fmt: skip
        first = writes()
        await reconcile(resource(name, events=[*reversed(NUMBER)]), store, topics)
        assert writes() == first
        await reconcile(resource(name), store, topics)
        assert await catalog.get_event_types(connection, claim.stream) == (2, None)


async def test_a_bad_schema_changes_nothing_and_says_which_where_and_why(
    store: Store, topics: Kafka, name: str
) -> None:
    broken = [{"name": "Noted", "schema": {"properties": {"n": {"type": "strin"}}}}]
    result = await reconcile(resource(name, events=broken), store, topics)
    assert ready(result) == ("False", "InvalidSchema")
    assert all(part in result.conditions[0].message for part in ("spec.events", "Noted", "/properties/n/type", "strin"))
    assert await store.stream("shop", name) is None
    assert await topics.topic(f"shop.{name}") is None
    await reconcile(resource(name, events=NUMBER), store, topics)
    before = await store.stream("shop", name)
    result = await reconcile(resource(name, events=broken, topic={"config": {"retention.ms": "1"}}), store, topics)
    assert ready(result) == ("False", "InvalidSchema")
    assert await store.stream("shop", name) == before
    topic = await topics.topic(f"shop.{name}")
    assert topic is not None
    assert "retention.ms" not in topic.config


async def test_a_foreign_topic_is_refused_until_it_is_gone(store: Store, topics: Kafka, name: str) -> None:
    await topics.create(f"shop.{name}", partitions=3, replicas=1, config={})
    await until(topics, f"shop.{name}", there=True)
    foreign = await topics.topic(f"shop.{name}")
    result = await reconcile(resource(name, deletionPolicy="Delete"), store, topics)
    assert ready(result) == ("False", "TopicConflict")
    assert result.failed
    assert await store.stream("shop", name) is None, "a topic that isn't ours isn't claimed"
    await eventstream.finalize(resource(name, deletionPolicy="Delete"), store=store, kafka=topics, access=UNMANAGED)
    assert await topics.topic(f"shop.{name}") == foreign, "deletion leaves what was never ours"
    await topics.delete(f"shop.{name}")
    await until(topics, f"shop.{name}", there=False)
    assert ready(await reconcile(resource(name), store, topics)) == ("True", "Active")


async def test_a_foreign_topic_is_adopted_where_the_spec_says_so_and_it_is_empty(
    store: Store, topics: Kafka, kafka: KafkaServer, name: str
) -> None:
    topic = f"shop.{name}"
    await topics.create(topic, partitions=4, replicas=1, config={"retention.ms": "1000"})
    await until(topics, topic, there=True)
    foreign = await topics.topic(topic)
    assert foreign is not None
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    producer.produce(topic, b"{}")
    assert producer.flush(30) == 0
    adopting = resource(name, topic={"adopt": True}, deletionPolicy="Delete")
    result = await reconcile(adopting, store, topics)
    assert ready(result) == ("False", "TopicConflict")
    assert "holds 1 records" in result.conditions[0].message
    assert await store.stream("shop", name) is None
    await topics.delete(topic)
    await until(topics, topic, there=False)
    await topics.create(topic, partitions=4, replicas=1, config={"retention.ms": "1000"})
    await until(topics, topic, there=True)
    result = await reconcile(adopting, store, topics)
    for _ in range(20):  # the client still asks for the partitions of the former one
        if result.conditions[0].reason != "KafkaUnreachable":
            break
        await asyncio.sleep(0.5)
        result = await reconcile(adopting, store, topics)
    assert ready(result) == ("True", "Active")
    assert "1 more partitions" in result.conditions[1].message
    adopted = await topics.topic(topic)
    assert adopted is not None
    assert "retention.ms" not in adopted.config, "it is as the spec says"
    claim = await store.stream("shop", name)
    assert claim is not None
    assert claim.topic_id == adopted.id != foreign.id
    assert ready(await reconcile(resource(name), store, topics)) == ("True", "Active"), "it is its own now"
    await eventstream.finalize(adopting, store=store, kafka=topics, access=UNMANAGED)
    await until(topics, topic, there=False)


async def test_the_older_of_two_resources_with_one_topic_goes_first(store: Store, topics: Kafka, name: str) -> None:
    younger = resource(f"{name}-younger", uid="u-2", topic={"name": f"shop.{name}"})
    result = await reconcile(younger, store, topics, older=f"shop/{name}")
    assert ready(result) == ("False", "TopicConflict")
    assert f"shop/{name} is older" in result.conditions[0].message
    assert await topics.topic(f"shop.{name}") is None
    assert ready(await reconcile(younger, store, topics)) == ("True", "Active")
    assert ready(await reconcile(younger, store, topics, older=f"shop/{name}")) == ("True", "Active"), "it holds it"


async def test_what_somebody_takes_away_in_a_streams_schema_is_made_again(
    store: Store, topics: Kafka, postgres: Postgres, name: str
) -> None:
    stream = resource(name)
    await reconcile(stream, store, topics)
    claim = await store.stream("shop", name)
    assert claim is not None
    schema = f"shop.{name}"

    def role(part: str) -> str:
        return names.resource_role(store.database.name, schema, part)

    service = names.store_role(store.database.name, "eventstore")
    taken = {
        f'drop owned by "{role("writer")}"; drop role "{role("writer")}"': ("role ", "use of the schema", "calling"),
        f'revoke usage on schema "{schema}" from "{role("reader")}"': ("use of the schema",),
        f'revoke select on "{schema}".events from "{service}"': ("reading the events",),
        f'revoke execute on all functions in schema "{schema}" from "{service}"': ("calling the functions",),
        f'drop trigger append_only on "{schema}".events_1': ("triggers",),
        f'alter table "{schema}".events disable trigger append_only': ("triggers",),
    }
    with psycopg.connect(postgres.dsn(store.database.name), autocommit=True) as superuser:
        for statement, told in taken.items():
            superuser.execute(statement)
            result = await reconcile(stream, store, topics)
            assert ready(result) == ("True", "Active"), statement
            for words in told:
                assert words in result.found, statement
            again = await reconcile(stream, store, topics)
            assert not again.found, statement
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
            superuser.execute(f'truncate "{schema}".events_1')
        superuser.execute(f"set role {service}")
        superuser.execute(f'select from "{schema}".events')
        superuser.execute("reset role")
        superuser.execute(f"""set role "{role("writer")}" """)
        appended = superuser.execute(
            f"""select "{schema}".append('[{{"subject": "a", "events": [{{"id": "1", "type": "T", "data": 1}}]}}]')"""
        ).fetchall()
        superuser.execute("reset role")
        assert len(appended) == 1

        superuser.execute(f'drop function "{schema}".append(jsonb)')
        assert ready(await reconcile(stream, store, topics)) == ("False", "HistoryDamaged")
        superuser.execute(f'drop schema "{schema}" cascade')
        result = await reconcile(stream, store, topics)
        assert ready(result) == ("False", "HistoryDamaged")
        assert "the schema" in result.conditions[0].message
        exists = superuser.execute("select from pg_namespace where nspname = %s", [schema]).fetchone()
        assert exists is None, "nothing is made in its place"


async def test_a_crash_between_claim_and_topic_is_made_good(store: Store, topics: Kafka, name: str) -> None:
    cluster = await topics.cluster_id()
    claim = {"namespace": "shop", "name": name, "uid": "u-1", "partitions": 3, "topic": f"shop.{name}"}
    await store.claim(**claim, kafka_cluster=cluster)  # type: ignore[arg-type]
    assert ready(await reconcile(resource(name), store, topics)) == ("True", "Active")


async def test_a_crash_between_topic_and_its_record_is_made_good(store: Store, topics: Kafka, name: str) -> None:
    cluster = await topics.cluster_id()
    claim = {"namespace": "shop", "name": name, "uid": "u-1", "partitions": 3, "topic": f"shop.{name}"}
    await store.claim(**claim, kafka_cluster=cluster)  # type: ignore[arg-type]
    await topics.create(f"shop.{name}", partitions=3, replicas=1, config={})
    await until(topics, f"shop.{name}", there=True)
    assert ready(await reconcile(resource(name), store, topics)) == ("True", "Active")
    topic, recorded = await topics.topic(f"shop.{name}"), await store.stream("shop", name)
    assert topic is not None
    assert recorded is not None
    assert recorded.topic_id == topic.id
    assert topic.config == {"cleanup.policy": "delete", **MESSAGE_BYTES}


async def test_a_deleted_topic_is_made_again(store: Store, topics: Kafka, name: str) -> None:
    await reconcile(resource(name), store, topics)
    former = await store.stream("shop", name)
    assert former is not None
    await topics.delete(f"shop.{name}")
    await until(topics, f"shop.{name}", there=False)
    result = await reconcile(resource(name), store, topics)
    assert ready(result) == ("True", "Active")
    claim, topic = await store.stream("shop", name), await topics.topic(f"shop.{name}")
    assert claim is not None
    assert topic is not None
    assert claim.topic_id == topic.id != former.topic_id
    assert claim.incarnation == former.incarnation, "the history is the same"


async def test_drift_of_the_topics_config_is_undone(store: Store, topics: Kafka, name: str) -> None:
    spec = {"config": {"retention.ms": "1000"}}
    await reconcile(resource(name, topic=spec), store, topics)
    drifted = {"retention.ms": "5", "segment.ms": "777", "cleanup.policy": "compact"}
    await topics.configure(f"shop.{name}", drifted, now={})
    await until_configured(topics, f"shop.{name}", {**drifted, **MESSAGE_BYTES})
    result = await reconcile(resource(name, topic=spec), store, topics)
    assert "retention.ms" in result.found
    await until_configured(
        topics, f"shop.{name}", {"retention.ms": "1000", "cleanup.policy": "delete", **MESSAGE_BYTES}
    )


async def test_what_a_former_topic_of_the_name_had_is_undone_after_the_broker_was_restarted(
    store: Store, topics: Kafka, kafka: KafkaServer, name: str
) -> None:
    former = {"segment.bytes": "2000000", "retention.bytes": "7"}
    await topics.create(f"shop.{name}", partitions=3, replicas=1, config=former)
    await until(topics, f"shop.{name}", there=True)
    await topics.delete(f"shop.{name}")
    await until(topics, f"shop.{name}", there=False)
    await reconcile(resource(name), store, topics)
    await asyncio.to_thread(kafka.restart)
    topic = await topics.topic(f"shop.{name}")
    assert topic is not None
    assert former.items() <= topic.config.items(), "Kafka shows them; where it doesn't any more, this test can go"
    result = await reconcile(resource(name), store, topics)
    assert ready(result) == ("True", "Active")
    await until_configured(topics, f"shop.{name}", {"cleanup.policy": "delete", **MESSAGE_BYTES})
    await asyncio.to_thread(kafka.restart)
    topic = await topics.topic(f"shop.{name}")
    assert topic is not None
    assert topic.config == {"cleanup.policy": "delete", **MESSAGE_BYTES}


async def test_what_kafka_refuses_is_said_with_its_words(store: Store, topics: Kafka, name: str) -> None:
    result = await reconcile(resource(name, topic={"replicas": 3}), store, topics)
    assert ready(result) == ("False", "TopicRefused")
    assert "spec.topic" in result.conditions[0].message
    assert "broker" in result.conditions[0].message
    result = await reconcile(resource(name, topic={"config": {"min.insync.replicas": "-1"}}), store, topics)
    assert ready(result) == ("False", "InvalidField"), "the guard knows what Kafka takes"
    assert "min.insync.replicas" in result.conditions[0].message


async def test_a_topic_that_was_made_a_moment_ago_stays_with_a_stream_that_is_retained(
    store: Store, topics: Kafka, name: str
) -> None:
    for number in range(5):
        topic = f"shop.{name}-{number}"
        await store.claim(
            namespace="shop", name=f"{name}-{number}", uid="u-1", partitions=3, topic=topic,
            kafka_cluster=await topics.cluster_id(),
        )  # fmt: skip
        await topics.create(topic, partitions=3, replicas=1, config={})
        stream = resource(f"{name}-{number}", deletionPolicy="Retain")
        await eventstream.finalize(stream, store=store, kafka=topics, access=UNMANAGED)
        again = resource(f"{name}-{number}", uid="u-2", deletionPolicy="Retain")
        assert ready(await reconcile(again, store, topics)) == ("True", "Active")


async def test_a_topic_that_was_made_a_moment_ago_goes_with_its_stream(store: Store, topics: Kafka, name: str) -> None:
    for number in range(5):
        topic = f"shop.{name}-{number}"
        stream = resource(f"{name}-{number}", deletionPolicy="Delete")
        # as a crash leaves it between the topic and its id, the broker perhaps not knowing the topic yet
        await store.claim(
            namespace="shop", name=f"{name}-{number}", uid="u-1", partitions=3, topic=topic,
            kafka_cluster=await topics.cluster_id(),
        )  # fmt: skip
        await topics.create(topic, partitions=3, replicas=1, config={})
        await eventstream.finalize(stream, store=store, kafka=topics, access=UNMANAGED)
        assert await store.stream("shop", f"{name}-{number}") is None
        await topics.create(topic, partitions=3, replicas=1, config={})  # the controller says whether there is one
        await topics.delete(topic)


async def test_retain_leaves_all_and_the_same_name_takes_it_back(store: Store, topics: Kafka, name: str) -> None:
    await reconcile(resource(name), store, topics)
    before = await topics.topic(f"shop.{name}"), await store.stream("shop", name)
    await eventstream.finalize(resource(name), store=store, kafka=topics, access=UNMANAGED)
    released = await store.stream("shop", name)
    assert released is not None
    assert (released.state, released.uid) == ("released", None)
    assert await topics.topic(f"shop.{name}") == before[0]
    assert ready(await reconcile(resource(name, uid="u-2"), store, topics)) == ("True", "Active")
    again = await store.stream("shop", name)
    assert again is not None
    assert before[1] is not None
    assert (again.incarnation, again.topic_id) == (before[1].incarnation, before[1].topic_id)


async def test_delete_drops_topic_and_schema(store: Store, topics: Kafka, name: str) -> None:
    stream = resource(name, deletionPolicy="Delete")
    await reconcile(stream, store, topics)
    await eventstream.finalize(stream, store=store, kafka=topics, access=UNMANAGED)
    assert await store.stream("shop", name) is None
    await until(topics, f"shop.{name}", there=False)
    async with store.database.connection() as connection:
        cursor = await connection.execute("select from pg_namespace where nspname = %s", [f"shop.{name}"])
        assert await cursor.fetchone() is None
    await eventstream.finalize(stream, store=store, kafka=topics, access=UNMANAGED)


async def test_delete_leaves_a_topic_that_someone_made_again(store: Store, topics: Kafka, name: str) -> None:
    stream = resource(name, deletionPolicy="Delete")
    await reconcile(stream, store, topics)
    await topics.delete(f"shop.{name}")
    await until(topics, f"shop.{name}", there=False)
    await topics.create(f"shop.{name}", partitions=1, replicas=1, config={})
    await until(topics, f"shop.{name}", there=True)
    assert ready(await reconcile(stream, store, topics)) == ("False", "TopicConflict")
    await eventstream.finalize(stream, store=store, kafka=topics, access=UNMANAGED)
    assert await topics.topic(f"shop.{name}") is not None
    assert await store.stream("shop", name) is None


async def test_deletion_leaves_another_resources_stream(store: Store, topics: Kafka, name: str) -> None:
    await reconcile(resource(name), store, topics)
    await eventstream.finalize(
        resource(name, uid="u-2", deletionPolicy="Delete"), store=store, kafka=topics, access=UNMANAGED
    )
    claim = await store.stream("shop", name)
    assert claim is not None
    assert claim.state == "active"
    assert await topics.topic(f"shop.{name}") is not None


async def test_two_resources_with_one_topic_are_told_apart(store: Store, topics: Kafka, name: str) -> None:
    await reconcile(resource(name), store, topics)
    for adopt in (False, True):
        thief = resource(f"{name}-thief", uid="u-2", topic={"name": f"shop.{name}", "adopt": adopt})
        for older in (None, "bank/oldest"):
            refused = await reconcile(thief, store, topics, older=older)
            assert ready(refused) == ("False", "TopicConflict")
            assert f"is the EventStream shop/{name}'s; choose" in refused.conditions[0].message
    await eventstream.finalize(resource(name), store=store, kafka=topics, access=UNMANAGED)
    refused = await reconcile(thief, store, topics)
    assert ready(refused) == ("False", "TopicConflict")
    assert f"shop/{name}'s, which was deleted and its history retained" in refused.conditions[0].message
    assert await store.stream("shop", f"{name}-thief") is None


async def test_of_two_installations_on_one_kafka_the_first_keeps_the_topic(
    store: Store, other_store: Store, kafka: KafkaServer, topics: Kafka, name: str
) -> None:
    stream = resource(name, deletionPolicy="Delete")
    assert ready(await reconcile(stream, store, topics)) == ("True", "Active")
    assert ready(await reconcile(stream, other_store, topics)) == ("False", "TopicConflict")
    assert await other_store.stream("shop", name) is None
    await eventstream.finalize(stream, store=other_store, kafka=topics, access=UNMANAGED)
    assert await topics.topic(f"shop.{name}") is not None

    class Late(Kafka):
        """Another installation makes the topic after this one has looked."""

        async def create(self, name: str, **made: Any) -> None:
            assert ready(await reconcile(other, other_store, topics)) == ("True", "Active")
            await super().create(name, **made)

    ours, other = (resource(f"{name}-late", uid=uid, deletionPolicy="Delete") for uid in ("u-1", "u-2"))
    late = Late(Brokers(Settings(kafka_bootstrap=kafka.bootstrap)))
    for _ in range(2):
        assert ready(await reconcile(ours, store, late)) == ("False", "TopicConflict")
    assert await store.stream("shop", f"{name}-late") is None
    await eventstream.finalize(ours, store=store, kafka=topics, access=UNMANAGED)
    assert await topics.topic(f"shop.{name}-late") is not None
    assert ready(await reconcile(other, other_store, topics)) == ("True", "Active")


async def test_names_that_would_collide_when_joined_stay_apart(store: Store, topics: Kafka, name: str) -> None:
    pairs = [("shop-eu", f"orders-{name}"), ("shop", f"eu-orders-{name}")]
    streams = [named(namespace, each, uid=namespace, deletionPolicy="Delete") for namespace, each in pairs]
    for stream in streams:
        assert ready(await reconcile(stream, store, topics)) == ("True", "Active")
    for namespace, each in pairs:
        claim = await store.stream(namespace, each)
        assert claim is not None
        assert (claim.uid, claim.topic, claim.schema) == (namespace, f"{namespace}.{each}", f"{namespace}.{each}")
    await eventstream.finalize(streams[0], store=store, kafka=topics, access=UNMANAGED)
    assert ready(await reconcile(streams[1], store, topics)) == ("True", "Active")


async def test_the_history_of_another_uid_is_taken_over_only_when_told(store: Store, topics: Kafka, name: str) -> None:
    await reconcile(resource(name), store, topics)
    result = await reconcile(resource(name, uid="u-2"), store, topics)
    assert ready(result) == ("False", "Conflict")
    assert "u-1" in result.conditions[0].message
    told = resource(name, uid="u-2")
    annotated = {"refold.dev/take-over": "u-1"}
    told = told.model_copy(update={"metadata": told.metadata.model_copy(update={"annotations": annotated})})
    for _ in range(2):
        assert ready(await reconcile(told, store, topics)) == ("True", "Active")
    claim = await store.stream("shop", name)
    assert claim is not None
    assert claim.uid == "u-2"


async def test_an_outage_of_kafka_is_a_condition_and_passes(
    store: Store, kafka: KafkaServer, topics: Kafka, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refold_operator.kafka._TIMEOUT_SECONDS", 2.0)
    await reconcile(resource(name), store, topics)
    kafka.stop()
    try:
        result = await reconcile(resource(name), store, topics)
        assert ready(result) == ("False", "KafkaUnreachable")
        assert {each.type: each.status for each in result.conditions}["StoreReady"] == "True"
        with pytest.raises(ReconcileError, match="KafkaUnreachable"):
            await eventstream.finalize(
                resource(name, deletionPolicy="Delete"), store=store, kafka=topics, access=UNMANAGED
            )
        await eventstream.finalize(
            resource(name), store=store, kafka=topics, access=UNMANAGED
        )  # Retain doesn't need Kafka
    finally:
        kafka.start()
    for _ in range(20):
        result = await reconcile(resource(name), store, topics)
        if ready(result)[0] == "True":
            break
    assert ready(result) == ("True", "Active")


async def test_an_outage_of_postgresql_is_a_condition_and_passes(
    store: Store, postgres: Postgres, topics: Kafka, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await reconcile(resource(name), store, topics)
    postgres.stop()
    try:
        result = await reconcile(resource(name), store, topics)
        assert ready(result) == ("False", "StoreUnreachable")
        assert "refused" in result.conditions[0].message
        with pytest.raises(ReconcileError, match="StoreUnreachable"):
            await eventstream.finalize(resource(name), store=store, kafka=topics, access=UNMANAGED)
    finally:
        postgres.start()
    assert ready(await reconcile(resource(name), store, topics)) == ("True", "Active")


async def test_the_installations_logins_work_and_stay_the_same(store: Store) -> None:
    first, second = await store.install(KEY), await store.install(KEY)
    assert first == second
    assert set(first) == {"eventstore", "relay"}
    for login in first.values():
        async with await psycopg.AsyncConnection.connect(login) as connection:
            await connection.execute("select count(*) from refold.streams")
