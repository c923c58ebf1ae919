"""What must be true after the attack, whatever was killed and whenever (the invariants of docs/architecture.md)."""

import asyncio
import collections
import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import msgspec
import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from refold.eventstore.catalog import Stream
from refold.partitioning import partition_of
from refold.projection.definition import VersionDefinition
from refold.projection.readstore import After, Order, Page, VersionReads, stores
from refold.projection.readstore import Rows as ReadRows

from hack.servers import Kafka, Postgres
from tests.attack.clients import Acknowledged
from tests.attack.history import History, Stored
from tests.attack.models import Model, Rows

_DEADLOCK = re.compile(r".*deadlock.*")
#: Rows that are read at once.
_PAGE = 2000
_EXACT = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal)


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


def check_no_deadlock(postgres: Postgres) -> None:
    """PostgreSQL never had to end a deadlock: neither its log tells of one nor, since its last crash, its numbers."""
    assert _DEADLOCK.findall(postgres.log.read_text(errors="replace")) == []
    with psycopg.connect(postgres.dsn()) as connection:
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


@dataclass(frozen=True)
class Built:
    """A version of a read model, and the URL of the read store that holds it."""

    url: str
    model: Model
    generation: int
    version: str

    @property
    def rows(self) -> ReadRows:
        """The version as a projector sees it."""
        return stores.rows(self.url, namespace="shop", name=self.model.name, version=self.version)

    def positions(self, stream: Stream) -> list[int]:
        """Return how far it is in each partition."""
        partitions = [(stream.incarnation, number) for number in range(stream.partitions)]
        with contextlib.closing(self.rows) as rows:
            found = rows.positions(partitions)
        return [found[at].position for at in partitions]

    @property
    def told(self) -> str:
        """What it is, for people."""
        store = "Redis" if self.url.startswith("redis") else "PostgreSQL"
        return f"{self.model.name} {self.generation} ({self.version}) in {store}"


def wait_applied(versions: Sequence[Built], stream: Stream, heads: Sequence[int]) -> None:
    """All versions come to the heads, in each partition, within 120 s."""
    deadline = time.monotonic() + 120
    for one in versions:
        while (found := one.positions(stream)) != heads:
            assert time.monotonic() < deadline, f"{one.told} is at {found}, the heads are {heads}"
            time.sleep(0.2)


def check_rows(versions: Sequence[Built], history: History) -> None:
    """Each version equals the fold of the history in plain Python, by key and by its index; nothing is parked."""
    for one in versions:
        with contextlib.closing(one.rows) as rows:
            definition = rows.open()
        found, by_index, parked = asyncio.run(_read(one, definition))
        expected = one.model.fold(history, one.generation)
        wrong = {key: (found.get(key), expected.get(key)) for key in found.keys() | expected.keys()}
        wrong = {key: (row, right) for key, (row, right) in wrong.items() if row != right}
        assert not wrong, f"{one.told} holds {len(wrong)} wrong rows (the row, and what it should be): {wrong}"
        assert by_index == _in_order(expected, one.model.index), f"the index {one.model.index} of {one.told} is wrong"
        assert parked == 0, f"{one.told} has parked {parked} events"


async def _read(one: Built, definition: VersionDefinition) -> tuple[Rows, list[str], int]:
    """Return a version's rows, their keys in the order of its index, and how many events it has parked."""
    reads = stores.reads(one.url, namespace="shop", name=one.model.name, connections=2)
    await reads.open()
    try:
        version = reads.version(one.version, definition)
        rows = {key: _EXACT.decode(data) for key, data in await _pages(version, "key")}
        return rows, [key for key, _ in await _pages(version, one.model.index)], (await version.status()).parked
    finally:
        await reads.close()


async def _pages(version: VersionReads, column: str) -> list[tuple[str, str]]:
    """Return keys and data of all rows in the order of a column, read page by page."""
    found: list[tuple[str, str]] = []
    after: After | None = None
    while True:
        _, page = await version.page(Page([], Order(column, False), after, _PAGE))
        found += [(key, data) for key, data, _ in page]
        if len(page) < _PAGE:
            return found
        key, data, _ = page[-1]
        after = After(None if column == "key" else msgspec.json.decode(data)[column], key)


def _in_order(rows: Rows, column: str) -> list[str]:
    """Return the keys in the order of a column, null last, and then of the keys."""
    return sorted(rows, key=lambda key: (rows[key][column] is None, rows[key][column] or 0, key.encode()))
