"""The example service keeps its sums exact, whatever happens to it, to the topic and to the stream."""

import json
import os
import random
import runpy
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from confluent_kafka import OFFSET_END, TopicPartition
from confluent_kafka.admin import AdminClient
from refold import tokens
from refold.eventstore.catalog import Stream

from hack.servers import Kafka, Postgres
from hack.servers.callers import TOKEN, get
from hack.servers.platform import Platform, Service
from hack.servers.process import Process, free_port

CONSUMER = Path(__file__).parents[2] / "examples" / "consumer" / "consumer.py"
PARTITIONS = 3


class Example(Process):
    """The example service as a process."""

    def __init__(
        self, platform: Platform, stream: Stream, eventstore: Service, folder: Path, **environment: str
    ) -> None:
        token = folder / "token"
        token.write_text(TOKEN + "\n")
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        settings = {
            "STREAM": f"{stream.namespace}/{stream.name}", "EVENT_STORE": eventstore.url, "TOKEN_FILE": str(token),
            "KAFKA": platform.kafka.bootstrap, "STATE": str(folder / "state.db"), "PORT": str(port),
            "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        super().__init__([sys.executable, str(CONSUMER)], folder / "log", env=settings | environment)

    def up(self) -> None:
        self.start(self.in_step)

    def in_step(self) -> bool:
        try:
            return get(f"{self.url}/readyz").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def position(self) -> int:
        """Return how many events its state holds, in step or not; -1 while it doesn't answer."""
        try:
            return sum(get(self.url).json()["positions"].values())
        except httpx.TransportError:
            return -1

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = get(self.url).raise_for_status().json()
        return answer


class Shop(threading.Thread):
    """Appends orders until it is stopped, and sums them up on its own."""

    def __init__(self, stream: Stream, eventstore: Service, seed: int) -> None:
        super().__init__(daemon=True)
        self._path = f"/v1/streams/{stream.namespace}/{stream.name}/events"
        self._http = httpx.Client(
            base_url=eventstore.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60, trust_env=False
        )
        self._random, self._number = random.Random(seed), 0
        self.stopped = threading.Event()
        self.customers: dict[str, dict[str, Any]] = {}
        self.heads: dict[str, int] = {}
        self.incarnations: set[str] = set()

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            self.sell(20)

    def sell(self, orders: int) -> None:
        """Append orders in one request."""
        lines = [json.dumps(self._order()) for _ in range(orders)]
        for line in self._http.post(self._path, content="\n".join(lines)).raise_for_status().text.splitlines():
            for place in tokens.decode(json.loads(line)["token"]):
                self.incarnations.add(place.incarnation)
                number = str(place.partition)
                self.heads[number] = max(self.heads.get(number, 0), place.position)

    def _order(self) -> dict[str, Any]:
        self._number += 1
        customer, cents = f"c{self._random.randrange(7)}", self._random.randrange(9999)
        quantity, price = self._random.randrange(1, 5), self._random.randrange(999)
        sums = self.customers.setdefault(customer, {"orders": 0, "spent": Decimal()})
        sums["orders"] += 1
        sums["spent"] += Decimal(cents + quantity * price) / 100
        placed = {"customerId": customer, "total": cents / 100}
        added = {"customerId": customer, "qty": quantity, "price": price / 100}
        return {
            "subject": f"order-{self._number}",
            "events": [
                {"id": "1", "type": "OrderPlaced", "data": placed}, {"id": "2", "type": "ItemAdded", "data": added},
            ],
        }  # fmt: skip

    def check(self, example: Example) -> None:
        """Wait until the example has what was appended, and compare every sum."""
        deadline = time.monotonic() + 40
        while (answer := example.answer())["positions"] != self.heads:
            assert time.monotonic() < deadline, f"{answer['positions']} in place of {self.heads}; {example.log}"
            time.sleep(0.05)
        found = {name: {**sums, "spent": Decimal(sums["spent"])} for name, sums in answer["customers"].items()}
        assert found == self.customers


class Installation:
    """A platform of this module's own on the session's servers, with event store and relay."""

    def __init__(self, postgres: Postgres, kafka: Kafka) -> None:
        self.platform = Platform(postgres, kafka, store_database="consumer_store", read_database="consumer_read")
        self.eventstore, self.relay = self.platform.eventstore(), self.platform.relay()
        self._admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
        self.eventstore.up()
        self.relay.up()

    def stream(self, name: str) -> Stream:
        stream = self.platform.stream("shop", name, partitions=PARTITIONS)
        path = f"{self.eventstore.url}/v1/streams/shop/{name}/partitions/0/events"
        known = None
        while known != stream.incarnation:  # the event store looks into its catalog every few seconds
            time.sleep(0.1)
            answer = httpx.get(path, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
            known = answer.headers.get("Refold-Incarnation")
        return stream

    def forget(self, stream: Stream) -> int:
        """Delete all records that the topic holds, as its retention would; return how many offsets that were."""
        every = [TopicPartition(stream.topic, number, OFFSET_END) for number in range(PARTITIONS)]
        return sum(future.result(30).low_watermark for future in self._admin.delete_records(every).values())

    def wait_relayed(self, stream: Stream, events: int) -> None:
        """Wait until the relay has committed so many events to the topic."""
        start = f'refold_relay_events_total{{stream="{stream.namespace}/{stream.name}"}} '
        deadline = time.monotonic() + 30
        while True:
            metrics = get(f"{self.relay.url}/metrics").text
            relayed = sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(start))
            if relayed >= events:
                return
            assert time.monotonic() < deadline, f"the relay has {relayed} of {events}; {self.relay.log}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def installation(postgres: Postgres, kafka: Kafka) -> Iterator[Installation]:
    made = Installation(postgres, kafka)
    yield made
    made.relay.kill()
    made.eventstore.kill()


def test_the_example_is_killed_and_the_topic_forgets_and_every_sum_is_exact(
    installation: Installation, tmp_path: Path
) -> None:
    seed = int(os.environ.get("REFOLD_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    draw = random.Random(seed)
    stream = installation.stream("killed")
    shop = Shop(stream, installation.eventstore, seed)
    shop.sell(1500)  # the history before it comes: several pages of the store in each partition
    example = Example(installation.platform, stream, installation.eventstore, tmp_path)
    try:
        shop.start()
        for kill in range(5):  # at first in the store's pages, then in the topic
            example.start(lambda: example.position() >= 0)
            known = example.position()
            deadline = time.monotonic() + 30
            while example.position() <= known or not (kill < 2 or example.in_step()):
                assert time.monotonic() < deadline, f"it stands at {known}; {example.log}"
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
            example.kill()
        example.up()
        before = sum(shop.heads.values())

        example.send(signal.SIGSTOP)  # it sleeps, while the topic forgets what it has not read
        time.sleep(0.5)
        shop.stopped.set()
        shop.join(60)
        installation.wait_relayed(stream, sum(shop.heads.values()))
        assert sum(shop.heads.values()) > before
        assert installation.forget(stream) > before
        example.send(signal.SIGCONT)
        shop.check(example)

        shop.sell(10)  # and the topic goes on
        shop.check(example)

        example.kill()  # the same while it's away
        shop.sell(20)
        installation.wait_relayed(stream, sum(shop.heads.values()))
        installation.forget(stream)
        example.up()
        shop.check(example)
    finally:
        shop.stopped.set()
        example.kill()


def test_a_stream_that_is_deleted_and_created_again_is_a_new_history_with_sums_of_its_own(
    installation: Installation, tmp_path: Path
) -> None:
    old = installation.stream("again")
    first = Shop(old, installation.eventstore, 1)
    first.sell(30)
    example = Example(installation.platform, old, installation.eventstore, tmp_path)
    try:
        example.up()
        first.check(example)
        installation.platform.drop_stream(old)
        new = installation.stream("again")
        second = Shop(new, installation.eventstore, 2)
        second.sell(20)
        assert not first.incarnations & second.incarnations
        second.check(example)
    finally:
        example.kill()


def test_an_event_is_folded_in_its_turn_only_and_a_group_of_events_all_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAM", "shop/orders")
    example = runpy.run_path(str(CONSUMER))
    event, state = example["Event"], example["State"](str(tmp_path / "state.db"))

    def placed(position: int, incarnation: str = "a") -> Any:
        data = {"customerId": "c", "total": Decimal("0.10")}
        return event(incarnation=incarnation, partition=0, position=position, type="OrderPlaced", data=data)

    state.begin_history("a")
    state.apply([placed(1), placed(1), placed(2)])
    for wrong in (placed(5), placed(3, incarnation="b")):
        with pytest.raises(example["OutOfStepError"]):
            state.apply([placed(3), wrong])
        assert state.position(0) == 2
    state.apply([placed(2), placed(3)])
    row = "select orders, spent from customers"
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        assert db.execute(row).fetchall() == [(3, "0.30")]
        state.begin_history("b")
        assert (state.position(0), db.execute(row).fetchall()) == (0, [])
