"""What must be true after the attack, whatever was killed and whenever (the invariants of docs/architecture.md)."""

import collections
import datetime as dt
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import msgspec
import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from psycopg import sql
from refold.eventstore.catalog import Stream
from refold.partitioning import partition_of

from hack.servers import Kafka, Postgres
from hack.servers.platform import READ, STORE, Platform
from tests.attack.clients import Acknowledged

_DEADLOCK = re.compile(r".*deadlock.*")


@dataclass(frozen=True, slots=True)
class Stored:
    """An event of the store."""

    position: int
    subject: str
    revision: int
    id: str
    type: str
    data: Any
    recorded_at: dt.datetime


#: The events of the store, by partition, in the order of their positions.
History = list[list[Stored]]


def read_store(platform: Platform, stream: Stream) -> tuple[History, list[int]]:
    """Return the store's events, and the heads of the partitions."""
    history: History = [[] for _ in range(stream.partitions)]
    with psycopg.connect(platform.postgres.dsn(STORE)) as connection:
        query = sql.SQL(
            "select partition, position, subject, revision, id, type, data, recorded_at from {}.events "
            "order by partition, position"
        ).format(sql.Identifier(stream.schema))
        with connection.cursor("events") as cursor:
            for partition, *event in cursor.execute(query):
                history[partition].append(Stored(*event))
        heads = connection.execute(
            "select head from refold.heads where stream = %s order by partition", [stream.stream]
        ).fetchall()
    return history, [head for (head,) in heads]


def check_history(history: History, heads: Sequence[int]) -> None:
    """Positions and revisions have no gap, `recorded_at` never goes back, and each subject is where it belongs."""
    for number, (partition, head) in enumerate(zip(history, heads, strict=True)):
        assert [event.position for event in partition] == list(range(1, head + 1))
        times = [event.recorded_at for event in partition]
        assert times == sorted(times), f"recorded_at goes back in partition {number}"
        revisions: collections.Counter[str] = collections.Counter()
        for event in partition:
            revisions[event.subject] += 1
            assert event.revision == revisions[event.subject]
        assert {partition_of(subject, len(history)) for subject in revisions} == {number}


def check_appends(history: History, acknowledged: Sequence[Acknowledged]) -> None:
    """Each acknowledged append is there once, where its answer said and whole; and nothing else is."""
    found: dict[tuple[str, str], tuple[int, Stored]] = {}
    for number, partition in enumerate(history):
        for event in partition:
            assert (event.subject, event.id) not in found
            found[event.subject, event.id] = number, event
    for append in acknowledged:
        times = set()
        for part, place in append:
            for before, asked in enumerate(reversed(part.events)):  # the place is the last one's
                told = place.partition, place.position - before, place.revision - before
                assert (part.subject, asked["id"]) in found, f"lost: {part}, acknowledged at {place}"
                number, event = found.pop((part.subject, asked["id"]))
                assert (number, event.position, event.revision) == told
                assert (event.type, event.data) == (asked["type"], asked["data"])
                times.add(event.recorded_at)
            if part.expected != "any":
                expected = 0 if part.expected == "none" else part.expected
                assert place.revision == expected + len(part.events)
        assert len(times) == 1, f"appended in parts: {append}"
    assert not found, (
        f"{len(found)} events are there that were never acknowledged, such as {next(iter(found.values()))}"
    )


def check_no_deadlock(platform: Platform, postgres: Postgres) -> None:
    """PostgreSQL never had to end a deadlock: neither its log tells of one nor, since its last crash, its numbers."""
    assert _DEADLOCK.findall(postgres.log.read_text(errors="replace")) == []
    with psycopg.connect(platform.postgres.dsn(STORE)) as connection:
        assert connection.execute("select sum(deadlocks) from pg_stat_database").fetchone() == (0,)


def check_topic(kafka: Kafka, stream: Stream, history: History) -> None:
    """A read_committed consumer sees the store's events, partition by partition, each once and in order."""
    found = [0] * stream.partitions  # how many were seen, and were the right ones
    wait_until = time.monotonic() + 120
    consumer = Consumer({
        "bootstrap.servers": kafka.bootstrap, "group.id": "check", "isolation.level": "read_committed",
        "enable.auto.commit": False, "enable.partition.eof": True,
    })  # fmt: skip
    try:
        consumer.assign([TopicPartition(stream.topic, number, OFFSET_BEGINNING) for number in range(stream.partitions)])
        ended: set[int] = set()
        while len(ended) < stream.partitions:
            assert time.monotonic() < wait_until, "the topic could not be read within 120 s"
            for message in consumer.consume(1000, 1):
                number = message.partition()
                if message.error() is not None:
                    ended.add(number)
                    continue
                headers = dict(message.headers())
                seen = (
                    int(headers["ce_position"]), message.key().decode(), int(headers["ce_revision"]),
                    headers["ce_id"].decode(), headers["ce_type"].decode(), msgspec.json.decode(message.value()),
                )  # fmt: skip
                assert found[number] < len(history[number]), f"after its last event partition {number} holds {seen}"
                event = history[number][found[number]]
                expected = event.position, event.subject, event.revision, event.id, event.type, event.data
                assert seen == expected, f"the topic's partition {number} holds the first in place of the second"
                found[number] += 1
    finally:
        consumer.close()
    assert found == [len(partition) for partition in history]


def wait_applied(platform: Platform, versions: dict[str, str], heads: Sequence[int]) -> None:
    """Both read models come to the heads within 120 s."""
    deadline = time.monotonic() + 120
    with psycopg.connect(platform.postgres.dsn(READ), autocommit=True) as connection:
        for name, version in versions.items():
            query = sql.SQL("select position from {}.positions where version = %s order by partition").format(
                sql.Identifier(f"shop.{name}.read")
            )
            while (found := [row[0] for row in connection.execute(query, [version]).fetchall()]) != heads:
                assert time.monotonic() < deadline, f"{name} is at {found}, the heads are {heads}"
                time.sleep(0.2)


def check_rows(platform: Platform, versions: dict[str, str], history: History) -> None:
    """Both read models equal a fold of the history in plain Python, and nothing is parked."""
    orders: dict[str, tuple[Any, ...]] = {}
    customers: dict[str, tuple[int | None, Decimal]] = {}  # a column that nothing was added to is null
    for partition in history:
        for event in partition:
            status, items, total = orders.get(event.subject, (None, 0, Decimal()))
            data, amount = event.data, Decimal()
            match event.type:
                case "OrderPlaced":
                    amount = Decimal(str(data["total"]))
                    orders[event.subject] = ("placed", items + 1, total + amount)
                case "ItemAdded":
                    amount = data["qty"] * Decimal(str(data["price"]))
                    orders[event.subject] = (status, items + data["qty"], total + amount)
                case "OrderPaid":
                    orders[event.subject] = ("paid", items, total)
                case "OrderPurged":
                    orders.pop(event.subject, None)
            if event.type in ("OrderPlaced", "ItemAdded"):
                number, spent = customers.get(data["customer"], (None, Decimal()))
                if event.type == "OrderPlaced":
                    number = (number or 0) + 1
                customers[data["customer"]] = (number, spent + amount)
    with psycopg.connect(platform.postgres.dsn(READ)) as connection:
        for name, columns, expected in (
            ("order-status", ("status", "items", "total"), orders),
            ("customers", ("orders", "spent"), customers),
        ):
            schema = f"shop.{name}.read"
            query = sql.SQL("select key, {} from {}").format(
                sql.SQL(", ").join(map(sql.Identifier, columns)), sql.Identifier(schema, f"rows_{versions[name]}")
            )
            found = {row[0]: row[1:] for row in connection.execute(query).fetchall()}
            wrong = {key: (found.get(key), expected.get(key)) for key in found.keys() | expected.keys()}
            wrong = {key: (row, right) for key, (row, right) in wrong.items() if row != right}
            assert not wrong, f"{name} holds {len(wrong)} wrong rows (the row, and what it should be): {wrong}"
            parked = connection.execute(
                sql.SQL("select count(*) from {}.parked").format(sql.Identifier(schema))
            ).fetchone()
            assert parked == (0,)
