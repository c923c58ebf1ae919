"""A bare pipeline in one process: INSERT, transactional produce, consume, upsert; one event after the other."""

import time
from collections.abc import Sequence

import psycopg
from confluent_kafka import Producer

from bench.limits import kafka, postgres
from bench.orders import OrderEvent
from bench.result import Run

_UPSERT = """
insert into bench_rows (key, last, events) values (%s, %s, 1)
on conflict (key) do update set last = excluded.last, events = bench_rows.events + 1
"""


def end_to_end(dsn: str, bootstrap: str, topic: str, events: Sequence[OrderEvent], *, rate: float) -> Run:
    """At most `rate` events a second; latency: from the INSERT's begin until the upsert is committed."""
    postgres.fresh(dsn)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("drop table if exists bench_rows")
        conn.execute("create table bench_rows (key text primary key, last text not null, events int not null)")
    producer = Producer({"bootstrap.servers": bootstrap, "transactional.id": topic, "linger.ms": 0})
    producer.init_transactions(30)
    records = (message for messages in kafka.consume(
        bootstrap, topic, len(events), isolation="read_committed", at_once=1) for message in messages)  # fmt: skip
    latencies: list[float] = []
    with (
        psycopg.connect(dsn, autocommit=True, prepare_threshold=0) as store,
        psycopg.connect(dsn, autocommit=True, prepare_threshold=0) as rows,
    ):

        def send(number: int) -> None:
            event = events[number]
            start = time.perf_counter()
            store.execute(postgres.INSERT, (event.subject, event.revision, event.type, event.data.decode()))
            producer.begin_transaction()
            producer.produce(topic, event.data, event.subject)
            producer.commit_transaction(30)
            message = next(records)
            rows.execute(_UPSERT, ((message.key() or b"").decode(), event.type))
            latencies.append((time.perf_counter() - start) * 1000)

        seconds = kafka.paced(send, len(events), rate=rate)
        written = rows.execute("select sum(events) from bench_rows").fetchone()
    records.close()
    if written != (len(events),):
        raise RuntimeError(f"the limit sent {len(events)} events, its rows count {written}")
    return Run(events_per_s=len(events) / seconds, latencies_ms=latencies)
