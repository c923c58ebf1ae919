"""A store with streams and topics, and relays on it as processes that are killed, stopped and resumed.

`World.verify` is the yardstick: what a `read_committed` consumer finds in a topic equals the store's history, partition
by partition, event by event, in order.
"""

import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from psycopg import sql
from psycopg.conninfo import make_conninfo
from refold import events, names
from refold.eventstore import catalog, roles
from refold.eventstore.catalog import Stream

from hack.servers import Kafka, Postgres
from tests.records import microseconds

_namespaces = itertools.count(1)


@dataclass
class RelayProcess:
    """A relay in a process of its own."""

    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from refold.cli.main import app; app()", "relay"],
                env={**os.environ, **self.environment}, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.environment['REFOLD_PORT']}{path}", timeout=5
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def metric(self, line: str) -> float:
        """The value of a metric, 0 where it isn't there."""
        for found in self.get("/metrics")[1].splitlines():
            if found.startswith(line + " "):
                return float(found.rpartition(" ")[2])
        return 0.0

    def held(self) -> set[int]:
        """The shards that it relays; none where it doesn't answer."""
        lines = self.get("/metrics")[1].splitlines()
        return {
            int(line.split('"')[1])
            for line in lines
            if line.startswith("refold_relay_shard_held{") and line.endswith(" 1.0")
        }

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


class World:
    """A store with streams and topics, and the relays on it."""

    def __init__(self, dsn: str, relay_dsn: str, kafka: Kafka, folder: Path, admin: psycopg.AsyncConnection) -> None:
        self.dsn, self.relay_dsn, self.folder = dsn, relay_dsn, folder
        self.server_dsn = make_conninfo(dsn, dbname="postgres")
        self.admin = admin
        self.use(kafka)
        self.namespace = f"relay{next(_namespaces)}"
        self.relays: list[RelayProcess] = []
        self.numbers = itertools.count()
        self._deleted: dict[str, str | None] = {}

    def use(self, kafka: Kafka) -> None:
        self.kafka = kafka
        self.kafka_admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 2})

    def relay(self, **environment: str) -> RelayProcess:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        started = RelayProcess(
            {
                "REFOLD_STORE_DSN": self.relay_dsn,
                "REFOLD_KAFKA_BOOTSTRAP": self.kafka.bootstrap,
                "REFOLD_RELAY_SHARDS": "2",
                "REFOLD_PORT": str(port),
                **environment,
            },
            self.folder / f"relay-{len(self.relays)}.log",
        )
        self.relays.append(started)
        return started

    async def stream(self, name: str, *, partitions: int = 3, topic_partitions: int | None = None) -> Stream:
        topic = names.topic(self.namespace, name)
        self.create_topic(topic, topic_partitions or partitions)
        claimed = await catalog.claim_stream(
            self.admin, namespace=self.namespace, name=name, uid=secrets.token_hex(4), partitions=partitions,
            topic=topic, kafka_cluster="test",
        )  # fmt: skip
        return await catalog.activate(self.admin, claimed)

    def create_topic(self, topic: str, partitions: int, **config: str) -> None:
        made = NewTopic(topic, num_partitions=partitions, replication_factor=1, config=config)

        def create() -> bool:
            with contextlib.suppress(KafkaException):  # a topic of that name may still be on its way out
                self.kafka_admin.create_topics([made])[topic].result(10)
                return True
            return False

        until(create, f"topic {topic} is created")
        # the controller answers before the broker that is read from knows it: that one may have the former topic
        until(lambda: self._topic_id(topic) not in (None, self._deleted.get(topic)), f"the broker has the new {topic}")

    def delete_topic(self, topic: str) -> None:
        self._deleted[topic] = self._topic_id(topic)
        self.kafka_admin.delete_topics([topic])[topic].result(10)

    def _topic_id(self, topic: str) -> str | None:
        with contextlib.suppress(KafkaException):
            described = self.kafka_admin.describe_topics(TopicCollection([topic]))[topic].result(10)
            return str(described.topic_id)
        return None

    def append(self, stream: Stream, count: int, *, subjects: int = 50, size: int = 20) -> None:
        """Append `count` events one by one, 1,000 in a transaction, and notify as the event store does."""
        payload = "x" * size
        appends = [
            {
                "subject": f"subject-{number % subjects}/ü",
                "events": [
                    {
                        "id": f"id-{number}",
                        "type": "Counted",
                        "data": {"number": number, "payload": payload},
                        "metadata": {"by": "test"} if number % 2 else None,
                    }
                ],
            }
            for number in itertools.islice(self.numbers, count)
        ]
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            for begin in range(0, count, 1000):
                self.call_append(connection, stream, appends[begin : begin + 1000])
            connection.execute("select pg_notify(%s, %s)", [names.APPENDED_CHANNEL, str(stream.stream)])

    def call_append(self, connection: psycopg.Connection, stream: Stream, appends: list[dict[str, Any]]) -> None:
        call = sql.SQL("select outcome from {}.append(%s::jsonb)").format(sql.Identifier(stream.schema))
        assert {row[0] for row in connection.execute(call, [json.dumps(appends)])} == {"appended"}

    def history(self, stream: Stream) -> list[list[tuple[Any, ...]]]:
        """All events of each partition, as `_facts` shows a record."""
        with psycopg.connect(self.dsn) as connection:
            rows = connection.execute(
                sql.SQL(
                    "select partition, position, subject, revision, id, type, data::text, metadata::text, "
                    "round(extract(epoch from recorded_at) * 1000000)::bigint from {}.events "
                    "order by partition, position"
                ).format(sql.Identifier(stream.schema))
            ).fetchall()
        found: list[list[tuple[Any, ...]]] = [[] for _ in range(stream.partitions)]
        for row in rows:
            found[row[0]].append(row[1:])
        return found

    def relayed(self, stream: Stream, *, at_least: int = 0) -> list[list[tuple[Any, ...]]]:
        """All records of each of the stream's partitions that a read_committed consumer finds."""
        found: list[list[tuple[Any, ...]]] = [[] for _ in range(stream.partitions)]
        for message in self.messages(stream.topic, at_least=at_least):
            partition = message.partition()
            value, headers = message.value(), message.headers()
            assert partition is not None
            assert value is not None
            event = events.from_record(partition, value, headers or [], incarnation=stream.incarnation)
            assert event is not None, f"not an event of {stream.name}: {headers}"
            assert message.key() == event.subject.encode()
            assert message.timestamp()[1] == microseconds(event.time) // 1000
            found[partition].append(
                (
                    event.position, event.subject, event.revision, event.id, event.type, bytes(event.data).decode(),
                    None if event.metadata is None else bytes(event.metadata).decode(),
                    round(event.time.timestamp() * 1_000_000),
                )
            )  # fmt: skip
        return found

    def messages(self, topic: str, *, at_least: int = 0, within: float = 60) -> list[Message]:
        """See `committed`."""
        return committed(self.kafka, topic, at_least=at_least, within=within)

    def verify(self, *streams: Stream) -> None:
        """Wait until all is relayed, then compare the topics with the store, event by event."""
        for stream in streams:
            expected = self.history(stream)
            found = self.relayed(stream, at_least=sum(map(len, expected)))
            for partition, (there, wanted) in enumerate(zip(found, expected, strict=True)):
                same = next((at for at, (a, b) in enumerate(zip(there, wanted, strict=False)) if a != b), "one's end")
                assert there == wanted, (
                    f"{stream.topic}/{partition} has {len(there)} records, the store {len(wanted)} events; they are "
                    f"equal up to {same}; positions: {[record[0] for record in there]}"
                )


def until(condition: Callable[[], Any], what: str, *, within: float = 90) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not in {within} s: {what}"
        time.sleep(0.05)


@contextlib.asynccontextmanager
async def relay_world(postgres: Postgres, database: str, kafka: Kafka, folder: Path) -> AsyncIterator[World]:
    """Install a store in `database`; kill the relays at the end."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await catalog.install_store(admin)
        role = names.store_role(admin.info.dbname, "relay")
        await roles.ensure_login(admin, role, secrets.token_hex(16))
        made = World(database, postgres.dsn(admin.info.dbname, user=role), kafka, folder, admin)
        try:
            yield made
        finally:
            for relay in made.relays:
                if relay.process.poll() is None:
                    relay.kill()


def ready(relay: RelayProcess) -> None:
    until(lambda: relay.get("/readyz")[0] == 200, "the relay is ready")


def committed(kafka: Kafka, topic: str, *, at_least: int = 0, within: float = 60) -> list[Message]:
    """All committed records of a topic, in order in each partition; waits until there are `at_least` so many."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap, "group.id": "test", "isolation.level": "read_committed",
            "enable.partition.eof": True, "auto.offset.reset": "earliest", "enable.auto.commit": False,
            "fetch.wait.max.ms": 50,
        }
    )  # fmt: skip
    found, ended, deadline = [], set(), time.monotonic() + within
    with contextlib.closing(consumer):
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        while len(ended) < len(partitions) or len(found) < at_least:
            for message in consumer.consume(1000, 0.05):
                error = message.error()
                if error is None:
                    found.append(message)
                    ended.discard(message.partition())
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended.add(message.partition())
            assert time.monotonic() < deadline, f"{len(found)} of {at_least} records of {topic} in {within} s"
    return found
