"""The data plane under attack: whatever is killed and whenever, no acknowledged append is lost or counted twice.

Clients append to a stream while event store, relays, projectors and the servers beneath are killed with -9, stopped
past their leases and resumed, or restarted, at random. Afterwards (the invariants of docs/architecture.md): positions
and revisions have no gap, `recorded_at` never decreases, the store holds exactly the acknowledged events, the topic
equals the store for a read_committed consumer, and both read models equal the fold with positions at the heads.

`make test` makes 10 disturbances, `make attack` at least 100; REFOLD_SEED repeats a run's choices.
"""

import collections
import datetime as dt
import itertools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import httpx
import msgspec
import psycopg
import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from psycopg import sql
from refold.eventstore.catalog import Stream

from hack.servers import Kafka, Postgres
from hack.servers.callers import TOKEN
from hack.servers.platform import READ, STORE, Platform, Service

DISTURBANCES = int(os.environ.get("REFOLD_DISTURBANCES", "10"))
PARTITIONS = 3
CLIENTS = 4
ORDER_STATUS = {
    "streams": ["orders"],
    "columns": [
        {"name": "status", "type": "text"}, {"name": "items", "type": "integer"}, {"name": "total", "type": "numeric"},
    ],
    "fold": [
        {"type": "OrderPlaced", "set": {"status": "'placed'"}, "add": {"items": "1", "total": "data.total"}},
        {"type": "ItemAdded", "add": {"items": "data.qty", "total": "data.qty * data.price"}},
        {"type": "OrderPaid", "set": {"status": "'paid'"}},
        {"type": "OrderPurged", "delete": True},
    ],
}  # fmt: skip
CUSTOMERS = {
    "streams": ["orders"],
    "key": "data.customer",
    "columns": [{"name": "orders", "type": "integer"}, {"name": "spent", "type": "numeric"}],
    "fold": [
        {"type": "OrderPlaced", "add": {"orders": "1", "spent": "data.total"}},
        {"type": "ItemAdded", "add": {"spent": "data.qty * data.price"}},
    ],
}


class Client(threading.Thread):
    """Appends lives of orders one event at a time; repeats each append, with its ids, until it is acknowledged."""

    def __init__(self, name: str, stores: list[Service], seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self._stores, self._random = stores, random.Random(seed)
        self.stopped = threading.Event()
        self.acknowledged: dict[tuple[str, str], tuple[int, str, dict[str, Any]]] = {}
        self.failure: str | None = None

    def run(self) -> None:
        with httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20, trust_env=False) as http:
            for number in itertools.count():
                if self.stopped.is_set() or self.failure:
                    return
                self._one_life(http, f"{self.name} order/{number}")

    def _one_life(self, http: httpx.Client, subject: str) -> None:
        draw = self._random
        customer = f"c{draw.randrange(30)}"
        events: list[tuple[str, dict[str, Any]]] = [
            ("OrderPlaced", {"customer": customer, "total": draw.randrange(9999) / 100})
        ]
        events += [
            ("ItemAdded", {"customer": customer, "qty": draw.randrange(1, 5), "price": draw.randrange(999) / 100})
            for _ in range(draw.randrange(3))
        ]
        events.append(draw.choice([("OrderPaid", {}), ("OrderPurged", {})]))
        for revision, (type_, data) in enumerate(events):
            event = {"id": f"{revision}-{type_}", "type": type_, "data": data}
            if not self._append(http, subject, revision, event):
                return

    def _append(self, http: httpx.Client, subject: str, revision: int, event: dict[str, Any]) -> bool:
        path = f"/v1/streams/shop/orders/subjects/{subject.replace('/', '%2F').replace(' ', '%20')}/events"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                answer = http.post(
                    self._random.choice(self._stores).url + path,
                    json={"expectedRevision": revision or "none", "events": [event]},
                )
            except httpx.TransportError:
                time.sleep(0.1)
                continue
            if answer.status_code == httpx.codes.CREATED:
                if answer.json()["revision"] != revision + 1:
                    self.failure = f"{subject}: revision {answer.json()} instead of {revision + 1}"
                    return False
                self.acknowledged[subject, event["id"]] = (revision + 1, event["type"], event["data"])
                return True
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                self.failure = f"{subject} {event['id']}: {answer.status_code} {answer.text}"
                return False
            time.sleep(0.1)
        self.failure = f"{subject} {event['id']}: not acknowledged within 120 s"
        return False


class Fleet:
    """All processes of an installation, and what can happen to them."""

    def __init__(self, platform: Platform, versions: dict[str, str]) -> None:
        self.platform = platform
        self.stores = [platform.eventstore() for _ in range(2)]
        self.relays = [platform.relay() for _ in range(2)]
        session = {"REFOLD_SESSION_SECONDS": "6"}
        self.projectors = [
            platform.projector("shop", name, version, **session) for name, version in versions.items() for _ in range(2)
        ]
        self.happened: collections.Counter[str] = collections.Counter()

    @property
    def services(self) -> list[Service]:
        return [*self.stores, *self.relays, *self.projectors]

    def start(self) -> None:
        for service in self.services:
            service.up()

    def stop(self) -> None:
        for service in self.services:
            service.kill()

    def disturb(self, draw: random.Random) -> None:
        """Do one terrible thing, and let it heal."""
        kinds: list[tuple[str, Callable[[], None]]] = [
            ("kill -9 event store", lambda: self._kill(draw.choice(self.stores))),
            ("kill -9 relay", lambda: self._kill(draw.choice(self.relays))),
            ("kill -9 projector", lambda: self._kill(draw.choice(self.projectors))),
            ("SIGSTOP relay past its lease", lambda: self._freeze(draw.choice(self.relays), 7)),
            ("SIGSTOP projector past its session", lambda: self._freeze(draw.choice(self.projectors), 8)),
            ("kill -9 PostgreSQL", lambda: self._crash(self.platform.postgres)),
            ("restart PostgreSQL", self.platform.postgres.restart),
            ("kill -9 Kafka", lambda: self._crash(self.platform.kafka)),
            ("restart Kafka", self.platform.kafka.restart),
        ]
        # every kind once before any comes again
        least = min(self.happened[name] for name, _ in kinds)
        name, act = draw.choice([kind for kind in kinds if self.happened[kind[0]] == least])
        self.happened[name] += 1
        act()

    @staticmethod
    def _kill(service: Service) -> None:
        service.kill()
        service.up()

    @staticmethod
    def _freeze(service: Service, seconds: float) -> None:
        service.send(signal.SIGSTOP)
        time.sleep(seconds)
        service.send(signal.SIGCONT)

    @staticmethod
    def _crash(server: Postgres | Kafka) -> None:
        server.kill()
        server.start()


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Postgres, Kafka]]:
    """Servers of this module's own, since it kills them."""
    postgres, kafka = Postgres(), Kafka()
    postgres.start()
    kafka.start()
    yield postgres, kafka
    kafka.remove()
    postgres.remove()


def test_no_acknowledged_append_is_lost_or_counted_twice_whatever_is_killed(
    servers: tuple[Postgres, Kafka], capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("REFOLD_SEED") or random.randrange(2**32))
    draw = random.Random(seed)
    platform = Platform(*servers)
    stream = platform.stream("shop", "orders", partitions=PARTITIONS)
    versions = {
        "order-status": platform.projection("shop", "order-status", ORDER_STATUS, [stream]),
        "customers": platform.projection("shop", "customers", CUSTOMERS, [stream]),
    }
    fleet = Fleet(platform, versions)
    clients = [Client(f"client {i}", fleet.stores, draw.randrange(2**32)) for i in range(CLIENTS)]
    with capsys.disabled():
        print(f"\nseed {seed}, {DISTURBANCES} disturbances, logs in {platform.logs}")
    began = time.monotonic()
    fleet.start()
    try:
        for client in clients:
            client.start()
        for _ in range(DISTURBANCES):
            time.sleep(draw.uniform(0.2, 3))
            fleet.disturb(draw)
            assert [client.failure for client in clients if client.failure] == []
        time.sleep(2)
        for client in clients:
            client.stopped.set()
        for client in clients:
            client.join(150)
        assert [client.failure for client in clients if client.failure] == []
        acknowledged = {key: value for client in clients for key, value in client.acknowledged.items()}
        assert len(acknowledged) > DISTURBANCES
        stored = check_store(platform, stream, acknowledged)
        wait_applied(platform, versions, stored)
        check_topic(platform, stream, stored)
        check_rows(platform, versions, acknowledged)
    finally:
        fleet.stop()
    with capsys.disabled():
        report(seed, fleet, stored, time.monotonic() - began)


def report(seed: int, fleet: Fleet, stored: list[list[tuple[Any, ...]]], seconds: float) -> None:
    """Print what was done and checked, as committed under docs/attack/."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(f"commit {commit}, seed {seed}, {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s")
    for name, times in sorted(fleet.happened.items()):
        print(f"  {times:4} × {name}")
    print(
        f"checked: {sum(map(len, stored)):,} events in {len(stored)} partitions: no gap in positions and revisions, "
        "recorded_at in order, store = acknowledged appends, topic = store, both read models = their fold"
    )


def check_store(platform: Platform, stream: Stream, acknowledged: dict[Any, Any]) -> list[list[tuple[Any, ...]]]:
    """Check the history and return its events by partition, in order of position."""
    columns = "partition, position, subject, revision, id, type, data, recorded_at"
    with psycopg.connect(platform.postgres.dsn(STORE)) as conn:
        query = sql.SQL("select " + columns + " from {}.events order by partition, position")
        events = conn.execute(query.format(sql.Identifier(stream.schema))).fetchall()
        heads = dict(
            conn.execute("select partition, head from refold.heads where stream = %s", [stream.stream]).fetchall()
        )
    partitions = [[event for event in events if event[0] == number] for number in range(PARTITIONS)]
    revisions: dict[str, list[int]] = collections.defaultdict(list)
    for number, partition in enumerate(partitions):
        assert [event[1] for event in partition] == list(range(1, heads[number] + 1))
        assert [event[7] for event in partition] == sorted(event[7] for event in partition)
        for event in partition:
            revisions[event[2]].append(event[3])
    assert all(found == list(range(1, len(found) + 1)) for found in revisions.values())
    found = {(event[2], event[4]): (event[3], event[5], event[6]) for event in events}
    assert len(found) == len(events)
    # An append whose client gave up would be unknown; none did, so both must be equal.
    assert found == acknowledged
    return partitions


def wait_applied(platform: Platform, versions: dict[str, str], stored: list[list[tuple[Any, ...]]]) -> None:
    """Wait until both read models are at the heads, for at most 90 s."""
    heads = [len(partition) for partition in stored]
    deadline = time.monotonic() + 90
    with psycopg.connect(platform.postgres.dsn(READ), autocommit=True) as conn:
        for name, version in versions.items():
            query = sql.SQL("select position from {}.positions where version = %s order by partition").format(
                sql.Identifier(f"shop.{name}.read")
            )
            while (found := [row[0] for row in conn.execute(query, [version]).fetchall()]) != heads:
                assert time.monotonic() < deadline, f"{name} is at {found}, the heads are {heads}"
                time.sleep(0.2)


def check_topic(platform: Platform, stream: Stream, stored: list[list[tuple[Any, ...]]]) -> None:
    """Check that a read_committed consumer sees the store's events, once and in order."""
    consumer = Consumer({
        "bootstrap.servers": platform.kafka.bootstrap, "group.id": "check", "isolation.level": "read_committed",
        "enable.auto.commit": False, "enable.partition.eof": True,
    })  # fmt: skip
    consumer.assign([TopicPartition(stream.topic, number, OFFSET_BEGINNING) for number in range(PARTITIONS)])
    found: list[list[tuple[Any, ...]]] = [[] for _ in range(PARTITIONS)]
    ended: set[int] = set()
    deadline = time.monotonic() + 60
    while len(ended) < PARTITIONS:
        assert time.monotonic() < deadline, "the topic could not be read within 60 s"
        for message in consumer.consume(1000, 1):
            if message.error() is not None:
                ended.add(message.partition())
                continue
            headers = dict(message.headers())
            found[message.partition()].append((
                int(headers["ce_position"]), message.key().decode(), int(headers["ce_revision"]),
                headers["ce_id"].decode(), headers["ce_type"].decode(), msgspec.json.decode(message.value()),
            ))  # fmt: skip
    consumer.close()
    assert found == [[event[1:7] for event in partition] for partition in stored]


def check_rows(platform: Platform, versions: dict[str, str], acknowledged: dict[Any, Any]) -> None:
    """Check both read models against a fold in plain Python, and that nothing is parked."""
    orders: dict[str, tuple[Any, ...]] = {}
    customers: dict[str, tuple[int, Decimal]] = {}
    for (subject, _), (_, type_, data) in acknowledged.items():  # a client's events stand in their order
        status, items, total = orders.get(subject, (None, 0, Decimal()))
        amount = Decimal()
        match type_:
            case "OrderPlaced":
                amount = Decimal(str(data["total"]))
                orders[subject] = ("placed", items + 1, total + amount)
            case "ItemAdded":
                amount = data["qty"] * Decimal(str(data["price"]))
                orders[subject] = (status, items + data["qty"], total + amount)
            case "OrderPaid":
                orders[subject] = ("paid", items, total)
            case "OrderPurged":
                orders.pop(subject, None)
        if type_ in ("OrderPlaced", "ItemAdded"):
            number, spent = customers.get(data["customer"], (0, Decimal()))
            customers[data["customer"]] = (number + (type_ == "OrderPlaced"), spent + amount)
    with psycopg.connect(platform.postgres.dsn(READ)) as conn:
        for name, columns, expected in (
            ("order-status", ("status", "items", "total"), orders),
            ("customers", ("orders", "spent"), customers),
        ):
            schema = f"shop.{name}.read"
            query = sql.SQL("select key, {} from {}").format(
                sql.SQL(", ").join(map(sql.Identifier, columns)), sql.Identifier(schema, f"rows_{versions[name]}")
            )
            assert {row[0]: row[1:] for row in conn.execute(query).fetchall()} == expected
            parked = conn.execute(sql.SQL("select count(*) from {}.parked").format(sql.Identifier(schema))).fetchone()
            assert parked == (0,)
