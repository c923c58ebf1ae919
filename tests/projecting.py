"""A small world for tests of the projector: a store with streams, their topics, a read model, and projector processes.

Events are written to the store by SQL and to the topic by a transactional producer, each apart, so that a test can let
the topic lack what the store has. `World.fold` is the reference: a plain fold in Python.
"""

import contextlib
import datetime as dt
import itertools
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from psycopg import AsyncConnection, sql
from refold import names
from refold.events import Event
from refold.eventstore import catalog
from refold.partitioning import partition_of
from refold.projection.definition import Column, Definition, FoldRule, StreamRef, VersionDefinition, version_of
from refold.projection.projector import Projector
from refold.projection.readstore import ProjectionStatus, UnavailableError, postgres
from refold.projection.settings import Settings

from hack.servers import Kafka
from tests.readstores import Store
from tests.records import headers

ROOT = Path(__file__).parents[1]
NAMESPACE = "shop"
_numbers = itertools.count(1)

#: A row an order: fed by one partition.
ORDERS = Definition(
    streams=["orders"],
    columns=[
        Column(name="status", type="text", index=True),
        Column(name="items", type="integer"),
        Column(name="total", type="numeric"),
    ],
    fold=[
        FoldRule(type="Placed", set={"status": "'placed'"}, add={"items": "data.items", "total": "data.total"}),
        FoldRule(type="Changed", add={"items": "data.items", "total": "data.total"}),
        FoldRule(type="Shipped", set={"status": "'shipped'"}),
        FoldRule(type="Purged", delete=True),
    ],
)
#: A row a customer: fed by all partitions.
CUSTOMERS = Definition(
    streams=["orders"],
    key="data.customer",
    columns=[
        Column(name="events", type="integer"),
        Column(name="spent", type="numeric"),
        Column(name="last", type="text"),
    ],
    fold=[
        FoldRule(type=type_, set={"last": "data.note"}, add={"events": "1", "spent": "data.total"})
        for type_ in ("Placed", "Changed")
    ],
)
#: A row an order whose changes depend on what stands in it.
HISTORIES = Definition(
    streams=["orders"],
    columns=[
        Column(name="before", type="numeric"),
        Column(name="total", type="numeric", default="100", nullable=False),
        Column(name="most", type="numeric"),
        Column(name="notes", type="json"),
    ],
    fold=[
        FoldRule(type="Placed", set={"before": "row.total"}, add={"total": "data.total"}),
        FoldRule(
            type="Changed",
            append={"notes": "[data.note, string(row.total)]"},
            when="!has(row.notes) || size(row.notes) < 5",
        ),
        FoldRule(type="Changed", add={"total": "1"}, max={"most": "row.total"}),
        FoldRule(type="Purged", delete=True),
    ],
)


class World:
    """Streams, topics and read models of one test."""

    def __init__(self, dsn: str, kafka: Kafka) -> None:
        self.dsn = dsn
        self.kafka = kafka
        self.admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
        self.streams: dict[str, StreamRef] = {}
        self.events: dict[str, list[list[Event]]] = {}
        self.revisions: dict[tuple[str, str], int] = {}
        self._producers: dict[str, Producer] = {}
        self._prefix = f"t{next(_numbers)}-{secrets.token_hex(2)}"

    async def install(self) -> None:
        async with await AsyncConnection.connect(self.dsn, autocommit=True) as conn:
            await catalog.install_store(conn)
            await postgres.install(conn)

    async def stream(self, name: str = "orders", *, partitions: int = 3) -> StreamRef:
        topic = f"{self._prefix}.{name}"
        async with await AsyncConnection.connect(self.dsn, autocommit=True) as conn:
            stream = await catalog.claim_stream(
                conn, namespace=NAMESPACE, name=name, uid=name, partitions=partitions, topic=topic, kafka_cluster="k"
            )
            await catalog.activate(conn, stream)
        ref = StreamRef(
            namespace=NAMESPACE, name=name, incarnation=stream.incarnation, partitions=partitions, topic=topic,
            schema=stream.schema,
        )  # fmt: skip
        self.streams[name] = ref
        self.events[name] = [[] for _ in range(partitions)]
        self.make_topic(name)
        return ref

    def make_topic(self, name: str = "orders") -> None:
        stream = self.streams[name]
        self.admin.create_topics([NewTopic(stream.topic, stream.partitions, 1)])[stream.topic].result()

    def drop_topic(self, name: str = "orders") -> None:
        self._producers.pop(name, None)
        topic = self.streams[name].topic
        self.admin.delete_topics([topic])[topic].result()
        until(lambda: topic not in self.admin.list_topics(timeout=5).topics, "the topic to be gone")

    async def projection(self, definition: Definition, name: str, *, rebuild: str = "") -> "ReadModel":
        refs = [self.streams[stream] for stream in definition.streams]
        version = version_of(definition, refs, rebuild=rebuild)
        ends = await self._ends(definition)
        async with await AsyncConnection.connect(self.dsn, autocommit=True) as conn:
            await postgres.claim_projection(conn, namespace=NAMESPACE, name=name, uid=name)
            await postgres.ensure_version(
                conn, namespace=NAMESPACE, name=name, version=version,
                definition=VersionDefinition(definition=definition, streams=refs, ends=ends),
            )  # fmt: skip
        return ReadModel(self, name, version, definition)

    async def _ends(self, definition: Definition) -> dict[str, list[int]]:
        if definition.as_of is None:
            return {}
        refs = [self.streams[stream] for stream in definition.streams]
        return {ref.incarnation: await self.positions_at(definition.as_of, ref.name) for ref in refs}

    async def positions_at(self, moment: dt.datetime, name: str = "orders") -> list[int]:
        """Return the stream's last positions until `moment`, which has passed."""
        async with await AsyncConnection.connect(self.dsn, autocommit=True) as conn:
            stream = await catalog.get_stream(conn, NAMESPACE, name)
            assert stream is not None
            found = await catalog.positions_at(conn, stream, moment)
            assert found is not None, "the moment hasn't passed"
            return found

    async def projection_in(
        self, store: Store, definition: Definition, name: str, *, rebuild: str = ""
    ) -> "StoredModel":
        """A projection in a read store of any kind."""
        refs = [self.streams[stream] for stream in definition.streams]
        version = version_of(definition, refs, rebuild=rebuild)
        stored = VersionDefinition(definition=definition, streams=refs, ends=await self._ends(definition))
        await store.make(stored, namespace=NAMESPACE, name=name, version=version)
        return StoredModel(self, store, name, version, definition)

    def store(self, events: Sequence[tuple[str, str, dict[str, Any]]], name: str = "orders") -> list[Event]:
        """Write (subject, type, data) to the event store, and return the events."""
        stream = self.streams[name]
        made: list[Event] = []
        now = dt.datetime.now(dt.UTC)
        for number, (subject, type_, data) in enumerate(events):
            partition = partition_of(subject, stream.partitions)
            revision = self.revisions[name, subject] = self.revisions.get((name, subject), 0) + 1
            log = self.events[name][partition]
            log.append(
                Event(
                    partition=partition, position=len(log) + 1, subject=subject, revision=revision,
                    id=secrets.token_hex(8), type=type_, time=now + dt.timedelta(microseconds=number),
                    data=msgspec.Raw(json.dumps(data).encode()),
                )
            )  # fmt: skip
            made.append(log[-1])
        with psycopg.connect(self.dsn) as conn, conn.cursor() as cursor:
            with cursor.copy(
                sql.SQL(
                    "copy {} (partition, position, subject, revision, id, type, recorded_at, data) from stdin"
                ).format(sql.Identifier(stream.event_schema, "events"))
            ) as copy:
                for event in made:
                    copy.write_row(
                        (event.partition, event.position, event.subject, event.revision, event.id, event.type,
                         event.time, bytes(event.data).decode())
                    )  # fmt: skip
            for partition, log in enumerate(self.events[name]):
                cursor.execute(
                    "update refold.heads h set head = %s, recorded_at = coalesce(%s, h.recorded_at) "
                    "from refold.streams s "
                    "where s.stream = h.stream and s.incarnation = %s and h.partition = %s",
                    [len(log), log[-1].time if log else None, stream.incarnation, partition],
                )
        return made

    def relay(self, events: Sequence[Event], name: str = "orders") -> None:
        """Write events to the topic, in one transaction."""
        stream = self.streams[name]
        producer = self._producer(name)
        producer.begin_transaction()
        for event in events:
            producer.produce(
                stream.topic,
                bytes(event.data),
                event.subject.encode(),
                event.partition,
                headers=headers(event, namespace=stream.namespace, name=stream.name, incarnation=stream.incarnation),
                timestamp=int(event.time.timestamp() * 1000),
            )
            producer.poll(0)
        producer.commit_transaction()

    def append(self, events: Sequence[tuple[str, str, dict[str, Any]]], name: str = "orders") -> None:
        """Write to the store and to the topic."""
        self.relay(self.store(events, name), name)

    def produce_raw(
        self, partition: int, value: bytes, headers_: list[tuple[str, bytes]], name: str = "orders"
    ) -> None:
        producer = self._producer(name)
        producer.begin_transaction()
        producer.produce(self.streams[name].topic, value, b"k", partition, headers=headers_)
        producer.commit_transaction()

    def delete_records(self, *, keep: int = 0, name: str = "orders") -> None:
        """Delete all but the last `keep` offsets of each partition of the topic."""
        stream = self.streams[name]
        places = []
        for partition in range(stream.partitions):
            high = self.end_offset(stream.topic, partition)
            places.append(TopicPartition(stream.topic, partition, max(0, high - keep)))
        for future in self.admin.delete_records(places).values():
            future.result()

    def end_offset(self, topic: str, partition: int) -> int:
        from confluent_kafka.admin import OffsetSpec

        place = TopicPartition(topic, partition)
        return int(self.admin.list_offsets({place: OffsetSpec.latest()})[place].result().offset)

    def _producer(self, name: str) -> Producer:
        if name not in self._producers:
            producer = Producer(
                {"bootstrap.servers": self.kafka.bootstrap, "transactional.id": f"{self._prefix}-{name}-{os.getpid()}"}
            )
            producer.init_transactions(30)
            self._producers[name] = producer
        return self._producers[name]


class ReadModel:
    """One version of a projection, and the processes that fold it."""

    def __init__(self, world: World, name: str, version: str, definition: Definition) -> None:
        self.world, self.name, self.version, self.definition = world, name, version, definition
        self.schema = names.read_schema(NAMESPACE, name)
        self.group = names.consumer_group(NAMESPACE, name, version)

    def settings(self, **options: Any) -> Settings:
        values: dict[str, Any] = {
            "projection": f"{NAMESPACE}/{self.name}",
            "version": self.version,
            "readstore_dsn": self.world.dsn,
            "store_dsn": self.world.dsn,
            "kafka_bootstrap": self.world.kafka.bootstrap,
            "port": 0,
            "session_seconds": 6,
        }
        return Settings(**(values | options))

    def process(self, **options: Any) -> "Process":
        return Process(self.settings(**options))

    @contextlib.contextmanager
    def projector(self, **options: Any) -> Iterator[Projector]:
        """Run a projector in a thread."""
        projector = Projector(self.settings(**options))
        failures: list[BaseException] = []

        def run() -> None:
            try:
                projector.run()
            except BaseException as error:
                failures.append(error)
                raise

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield projector
        finally:
            projector.stop()
            thread.join(30)
            assert not thread.is_alive(), "the projector didn't stop"
            assert not failures, failures

    def execute(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.world.dsn, autocommit=True) as conn:
            cursor = conn.execute(statement.format(schema=f'"{self.schema}"', rows=f"rows_{self.version}"), parameters)
            return cursor.fetchall() if cursor.description else []

    def rows(self) -> dict[str, dict[str, Any]]:
        columns = [column.name for column in self.definition.columns]
        found = self.execute("select key, " + ", ".join(columns) + " from {schema}.{rows}")
        return {row[0]: dict(zip(columns, row[1:], strict=True)) for row in found}

    def applied(self) -> dict[tuple[str, int], int]:
        found = self.execute(
            "select incarnation, partition, position from {schema}.positions where version = %s", self.version
        )
        return {(row[0], row[1]): row[2] for row in found}

    def caught_up(self) -> bool:
        applied = self.applied()
        return all(
            applied.get((self.world.streams[name].incarnation, partition)) == len(log)
            for name in self.definition.streams
            for partition, log in enumerate(self.world.events[name])
        )

    def wait(self, seconds: float = 120) -> None:
        until(self.caught_up, f"{self.name} to catch up; it is at {self.applied()}", seconds)

    async def status(self) -> ProjectionStatus:
        async with await AsyncConnection.connect(self.world.dsn, autocommit=True) as conn:
            return await postgres.status(conn, namespace=NAMESPACE, name=self.name)

    def committed(self) -> dict[tuple[str, int], int]:
        """Return the offsets that are committed in Kafka."""
        places = [
            TopicPartition(self.world.streams[name].topic, partition)
            for name in self.definition.streams
            for partition in range(self.world.streams[name].partitions)
        ]
        future = self.world.admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(self.group, places)])
        found = future[self.group].result().topic_partitions
        return {(one.topic, one.partition): one.offset for one in found}

    def parked(self) -> list[tuple[str | None, int, str]]:
        return self.execute("select key, position, error from {schema}.parked order by position, key")  # type: ignore[return-value]


class StoredModel(ReadModel):
    """A version in a read store of any kind, seen through the store's own interface."""

    def __init__(self, world: World, store: Store, name: str, version: str, definition: Definition) -> None:
        super().__init__(world, name, version, definition)
        self.store = store

    def settings(self, **options: Any) -> Settings:
        return super().settings(**{"readstore_dsn": self.store.url} | options)

    async def read(self) -> dict[str, dict[str, Any]]:
        """All rows; json as it is parsed."""
        types = {column.name: column.type for column in self.definition.columns}
        rows = self.store.rows(namespace=NAMESPACE, name=self.name, version=self.version)
        found = rows.read(await self.store.keys(namespace=NAMESPACE, name=self.name), list(types))
        rows.close()
        return {
            key: {
                name: json.loads(value, parse_float=Decimal) if value is not None and types[name] == "json" else value
                for name, value in row.items()
            }
            for key, row in found.items()
        }

    def applied(self) -> dict[tuple[str, int], int]:
        streams = [self.world.streams[name] for name in self.definition.streams]
        partitions = [(one.incarnation, partition) for one in streams for partition in range(one.partitions)]
        try:
            rows = self.store.rows(namespace=NAMESPACE, name=self.name, version=self.version)
            found = rows.positions(partitions)
            rows.close()
        except UnavailableError:
            return {}
        return {place: one.position for place, one in found.items()}

    async def status(self) -> ProjectionStatus:
        return await self.store.admin.status(namespace=NAMESPACE, name=self.name)


class Process:
    """A projector process."""

    def __init__(self, settings: Settings) -> None:
        environment = {
            f"REFOLD_{name.upper()}": value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
            for name, value in settings
        }
        self.log = Path(tempfile.mkstemp(prefix="refold-projector-", suffix=".log")[1])
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-c", "from refold.projection.main import main; main()"],
                env={**os.environ, **environment}, stderr=log, stdout=log, cwd=ROOT,
            )  # fmt: skip

    def send(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def kill(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()

    def terminate(self, seconds: float = 20) -> int:
        """Send SIGTERM and return the exit code."""
        self._child.terminate()
        return self._child.wait(seconds)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.log.unlink()


def until(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def random_events(
    count: int, *, subjects: int = 40, seed: int = 1, purge: bool = True
) -> list[tuple[str, str, dict[str, Any]]]:
    """Return events of orders: changes with decimals, now and then a deletion."""
    chance = random.Random(seed)
    types = ["Placed", "Changed", "Changed", "Changed", "Shipped", *(["Purged"] if purge else [])]
    return [
        (
            f"order-{chance.randrange(subjects)}",
            chance.choice(types),
            {
                "items": chance.randrange(-3, 10),
                "total": chance.randrange(-10_000, 100_000) / 100,
                "customer": f"c{chance.randrange(7)}",
                "note": f"n{number}\t\\\n",
            },
        )
        for number in range(count)
    ]


def fold_orders(world: World, name: str = "orders") -> dict[str, dict[str, Any]]:
    """The reference of ORDERS."""
    rows: dict[str, dict[str, Any]] = {}
    for log in world.events[name]:
        for event in log:
            data = json.loads(bytes(event.data), parse_float=Decimal)
            if event.type == "Purged":
                rows.pop(event.subject, None)
                continue
            row = rows.setdefault(event.subject, {"status": None, "items": None, "total": None})
            if event.type in ("Placed", "Changed"):
                row["items"] = (row["items"] or 0) + data["items"]
                row["total"] = (row["total"] or Decimal(0)) + data["total"]
            if event.type != "Changed":
                row["status"] = event.type.lower()
    return rows


def fold_customers(world: World, name: str = "orders") -> dict[str, dict[str, Any]]:
    """The reference of CUSTOMERS: the last note is that of the greatest stamp."""
    rows: dict[str, dict[str, Any]] = {}
    stamps: dict[str, Any] = {}
    for log in world.events[name]:
        for event in log:
            if event.type not in ("Placed", "Changed"):
                continue
            data = json.loads(bytes(event.data), parse_float=Decimal)
            row = rows.setdefault(data["customer"], {"events": 0, "spent": Decimal(0), "last": None})
            row["events"] += 1
            row["spent"] += data["total"]
            stamp = (event.time, world.streams[name].incarnation, event.partition, event.position)
            if stamp > stamps.get(data["customer"], (dt.datetime.min.replace(tzinfo=dt.UTC),)):
                stamps[data["customer"]] = stamp
                row["last"] = data["note"]
    return rows


def fold_histories(world: World) -> dict[str, dict[str, Any]]:
    """The reference of HISTORIES."""
    rows: dict[str, dict[str, Any]] = {}
    for event in itertools.chain.from_iterable(world.events["orders"]):
        data = json.loads(bytes(event.data), parse_float=Decimal)
        if event.type == "Purged":
            rows.pop(event.subject, None)
        if event.type not in ("Placed", "Changed"):
            continue
        row = rows.setdefault(event.subject, {"before": None, "total": Decimal(100), "most": None, "notes": None})
        if event.type == "Placed":
            row["before"], row["total"] = row["total"], row["total"] + data["total"]
            continue
        if row["notes"] is None or len(row["notes"]) < 5:
            text = f"{row['total']:f}"
            text = text.rstrip("0").rstrip(".") if "." in text else text
            row["notes"] = [*(row["notes"] or []), [data["note"], text]]
        most = row["total"] if row["most"] is None else row["most"]
        row["most"], row["total"] = max(most, row["total"]), row["total"] + 1
    return rows
