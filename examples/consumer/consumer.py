"""A service of your own that keeps in step with an EventStream: orders and money per customer, exactly once.

It uses nothing of Refold but two of its interfaces: the event store's HTTP API and the stream's Kafka topic. The rules
are those of docs/consuming.md, and they are few:

1.  State and positions change in one transaction of one database. Whatever kills the process, both are as of the
    last commit, and the positions say which events the state holds.
2.  An event at or below its partition's position is known: skip it. The next one: fold it. One beyond: something is
    missing, so read it from the event store, which has all of history.
3.  Begin with the store, go on with the topic: note where the topic ends, read the store from the known positions to
    its head, then read the topic from the noted end. All that lies before that end was in the store already, since
    Refold writes an event to the topic only after it is committed in the store.

Anything unforeseen (a gap, a topic whose retention passed us, one that was deleted and made again, Kafka or the store
away) has one answer: roll back, wait a little, begin again with rule 3.

    STREAM=shop/orders EVENT_STORE=http://127.0.0.1:8080 KAFKA=127.0.0.1:9092 TOKEN_FILE=token python consumer.py
    curl 127.0.0.1:8080/            # {"customers": {"c1": {"orders": 2, "spent": "31.50"}}, "positions": {"0": 17, …}}
"""

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

NAMESPACE, _, NAME = os.environ["STREAM"].partition("/")
TOPIC = os.environ.get("TOPIC", f"{NAMESPACE}.{NAME}")
STATE = os.environ.get("STATE", "consumer.db")
PORT = int(os.environ.get("PORT", "8080"))
PAGE = 1000  # events that one request to the store, and one transaction, has at most
PAUSE = 0.5, 30.0  # seconds before beginning again: at first, and at most

log = logging.getLogger("consumer")


class Event(NamedTuple):
    """What this service needs of an event."""

    incarnation: str  # names the history: a stream that was deleted and created again begins another one
    partition: int
    position: int  # 1, 2, 3 … without gaps in its partition
    type: str
    data: Any


class OutOfStepError(Exception):
    """The topic doesn't go on where the state ends; the store knows what lies between."""


class State:
    """The service's database. SQLite here; any database with transactions will do."""

    def __init__(self, path: str) -> None:
        """Open the database, and make its tables where it is new."""
        self._db = sqlite3.connect(path, isolation_level=None)  # transactions begin where we say
        self._db.executescript("""
            pragma journal_mode = wal;   -- those who ask don't wait for us
            pragma synchronous = full;   -- a commit survives a power cut
            create table if not exists history (incarnation text not null);  -- one row
            create table if not exists positions (partition integer primary key, position integer not null);
            create table if not exists customers (
                customer text primary key, orders integer not null, spent text not null  -- an exact decimal
            );
        """)

    def position(self, partition: int) -> int:
        """Return the position of the last event that the state holds; 0 before the first."""
        found = self._db.execute("select position from positions where partition = ?", [partition]).fetchone()
        return found[0] if found else 0

    def incarnation(self) -> str | None:
        """Return which history the state is of; None before the first event."""
        found = self._db.execute("select incarnation from history").fetchone()
        return found[0] if found else None

    def begin_history(self, incarnation: str) -> None:
        """Forget everything: what comes is another history, whose positions begin at 1 again."""
        with self._db:
            self._db.execute("begin immediate")
            for table in ("history", "positions", "customers"):
                self._db.execute(f"delete from {table}")  # noqa: S608 (our own names)
            self._db.execute("insert into history values (?)", [incarnation])

    def apply(self, events: Iterable[Event]) -> None:
        """Fold events in one transaction, each at most once and none before its turn.

        Raises:
            OutOfStepError: one doesn't follow the state; nothing of `events` was folded.
        """
        with self._db:  # commits, or rolls back where anything is raised
            # A second process on this database (a rollout?) waits here, and then reads the positions of the first.
            self._db.execute("begin immediate")
            incarnation = self.incarnation()
            for event in events:
                if event.incarnation != incarnation:
                    raise OutOfStepError(f"the topic holds history {event.incarnation}, the state is of {incarnation}")
                known = self.position(event.partition)
                if event.position <= known:
                    continue
                if event.position > known + 1:
                    raise OutOfStepError(
                        f"partition {event.partition} goes on with {event.position}, the state ends at {known}"
                    )
                self._fold(event)
                self._db.execute("replace into positions values (?, ?)", [event.partition, event.position])

    def _fold(self, event: Event) -> None:
        """Your service's own part. An error here ends the process rather than leaving an event out."""
        data = event.data
        if event.type == "OrderPlaced":
            self._add(data["customerId"], orders=1, spent=data["total"])
        elif event.type == "ItemAdded":
            self._add(data["customerId"], orders=0, spent=data["qty"] * data["price"])

    def _add(self, customer: str, *, orders: int, spent: Decimal) -> None:
        found = self._db.execute("select orders, spent from customers where customer = ?", [customer]).fetchone()
        known_orders, known_spent = found or (0, "0")
        row = [customer, known_orders + orders, str(Decimal(known_spent) + spent)]
        self._db.execute("replace into customers values (?, ?, ?)", row)


def parse(text: str | bytes) -> Any:
    """Return JSON with exact numbers: money isn't binary."""
    return json.loads(text, parse_float=Decimal)


# --- the store ---------------------------------------------------------------------------------------------------


def read_store(http: httpx.Client, state: State, partition: int) -> None:
    """Fold what the store has of a partition beyond the state, up to its head."""
    stream = f"/v1/streams/{quote(NAMESPACE)}/{quote(NAME)}"
    while True:
        after = state.position(partition)
        # The token is read each time: a projected service-account token changes while we run.
        answer = http.get(
            f"{stream}/partitions/{partition}/events",
            params={"after": after, "limit": PAGE},
            headers={"Authorization": f"Bearer {Path(os.environ['TOKEN_FILE']).read_text().strip()}"},
        ).raise_for_status()
        incarnation = answer.headers["Refold-Incarnation"]
        if incarnation != state.incarnation():
            state.begin_history(incarnation)
            raise OutOfStepError(f"history {incarnation} begins, with all its partitions")
        events = parse(answer.content)["events"]
        state.apply(Event(incarnation, partition, it["position"], it["type"], it["data"]) for it in events)
        if len(events) < PAGE:
            return


# --- the topic ---------------------------------------------------------------------------------------------------


def from_record(record: Message) -> Event | None:
    """Return the event of a record: CloudEvents in binary mode, attributes in headers and data in the value."""
    headers: dict[str, Any] = dict(record.headers() or ())
    value = record.value()
    if value is None or "ce_position" not in headers:
        return None  # not written by Refold's relay
    return Event(
        incarnation=headers["ce_incarnation"].decode(),
        partition=record.partition() or 0,
        position=int(headers["ce_position"]),
        type=headers["ce_type"].decode(),
        data=parse(value),
    )


def kafka() -> dict[str, Any]:
    """Return where Kafka is and how to log in: the keys of the Secret `<stream>-consumer`, as variables."""
    settings = {
        "bootstrap.servers": os.environ["KAFKA"],
        "security.protocol": os.environ.get("KAFKA_SECURITY_PROTOCOL", "PLAINTEXT"),
        "sasl.mechanism": os.environ.get("KAFKA_SASL_MECHANISM"),
        "sasl.username": os.environ.get("KAFKA_USERNAME"),
        "sasl.password": os.environ.get("KAFKA_PASSWORD"),
        "ssl.ca.pem": os.environ.get("KAFKA_CA"),  # the certificate itself; without it, the system's authorities
        # Nobody joins the group, but where Kafka has ACLs its name must begin as the Secret says.
        "group.id": os.environ.get("KAFKA_GROUP_PREFIX", "") + "order-sums",
    }
    return {name: value for name, value in settings.items() if value}


def ends(consumer: Consumer) -> list[TopicPartition]:
    """Return each partition of the topic with the offset where it ends now."""
    topic = consumer.list_topics(TOPIC, timeout=10).topics[TOPIC]
    if topic.error is not None:
        raise KafkaException(topic.error)
    partitions = [TopicPartition(TOPIC, partition) for partition in topic.partitions]
    return [TopicPartition(TOPIC, it.partition, consumer.get_watermark_offsets(it, timeout=10)[1]) for it in partitions]


def follow(state: State, consumer: Consumer, http: httpx.Client, in_step: threading.Event) -> None:
    """Catch up with the store, then follow the topic until it doesn't go on."""
    tail = ends(consumer)
    for partition in tail:
        read_store(http, state, partition.partition)
    consumer.assign(tail)
    in_step.set()
    log.info("in step: %s", {it.partition: state.position(it.partition) for it in tail})
    while True:
        records = consumer.consume(PAGE, timeout=0.1)
        for record in records:
            if record.error():
                raise KafkaException(record.error())
        if records:
            state.apply(event for record in records if (event := from_record(record)) is not None)


def run(state: State, in_step: threading.Event) -> None:
    """Follow the stream for ever."""
    pause = PAUSE[0]
    while True:
        began = time.monotonic()
        # Without commits there is no group: positions live beside the state, and Kafka's offsets mean nothing to us.
        consumer = Consumer(
            {
                **kafka(),
                "enable.auto.commit": False,
                "isolation.level": "read_committed",  # librdkafka's default; in Java you must set it
                "auto.offset.reset": "error",  # where the topic no longer has our offset, the store has the events
            }
        )
        try:
            with httpx.Client(base_url=os.environ["EVENT_STORE"], timeout=30) as http:
                follow(state, consumer, http, in_step)
        except (OutOfStepError, KafkaException, httpx.HTTPError) as error:
            if time.monotonic() - began > pause:
                pause = PAUSE[0]  # it worked for a while
            log.warning("beginning again in %.1f s: %s", pause, error)
        finally:
            consumer.close()
        time.sleep(pause)
        pause = min(pause * 2, PAUSE[1])


# --- who asks ----------------------------------------------------------------------------------------------------


def serve(in_step: threading.Event) -> None:
    """Answer `GET /` with the sums and the positions that they hold, and `GET /readyz`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ready = in_step.is_set()
            body = json.dumps(answer() if self.path == "/" else {"inStep": ready}).encode()
            self.send_response(200 if ready else 503)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Don't log each probe."""

    threading.Thread(target=ThreadingHTTPServer(("", PORT), Handler).serve_forever, daemon=True).start()


def answer() -> dict[str, Any]:
    """Return sums and positions of one moment."""
    with closing(sqlite3.connect(f"file:{STATE}?mode=ro", uri=True, isolation_level=None)) as db:
        db.execute("begin")  # one snapshot for both
        customers = db.execute("select customer, orders, spent from customers order by customer")
        return {
            "customers": {customer: {"orders": orders, "spent": spent} for customer, orders, spent in customers},
            "positions": dict(db.execute("select partition, position from positions")),
        }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request is too much
    caught_up = threading.Event()
    opened = State(STATE)
    serve(caught_up)
    run(opened, caught_up)
