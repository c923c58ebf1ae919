"""PostgreSQL's own rate for inserts of one event a row, without Refold.

The table is the same for all: an identity as position, unique (stream, version), the same payload.
"""

import asyncio
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg

from bench.orders import OrderEvent
from bench.result import Run

TABLE = """
create table {name} (position bigint generated always as identity primary key, stream text not null,
  version int not null, type text not null, data jsonb not null, unique (stream, version))
"""
INSERT = "insert into bench_limit (stream, version, type, data) values (%s, %s, %s, %s)"


def _fresh(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("drop table if exists bench_limit")
        conn.execute(TABLE.format(name="bench_limit"))


def pgbench(dsn: str, events: Sequence[OrderEvent], *, clients: int) -> Run:
    """One INSERT and commit each by `clients` clients of `pgbench -M prepared`; the payload is one of the events'."""
    _fresh(dsn)
    payload = max(events[:50], key=lambda event: len(event.data) == 450).data.decode().replace("'", "''")
    script = (
        "\\set version random(1, 2000000000)\n"
        "insert into bench_limit (stream, version, type, data) values ("
        f"'order-' || :client_id || '-' || :version, :version, 'OrderPlaced', '{payload}');\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "insert.sql"
        file.write_text(script)
        transactions = max(1, len(events) // clients)
        done = subprocess.run(
            ["pgbench", "-n", "-M", "prepared", "-c", str(clients), "-j", "2", "-t", str(transactions), "-f", str(file),
             dsn], check=True, capture_output=True, text=True, env={**os.environ, "PGOPTIONS": ""},
        )  # fmt: skip
    found = re.search(r"tps = ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout
    return Run(events_per_s=float(found[1]))


def insert_and_commit(dsn: str, events: Sequence[OrderEvent]) -> Run:
    """One INSERT and commit after another on one psycopg connection."""
    _fresh(dsn)

    async def run() -> Run:
        latencies = []
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=0) as conn:
            began = time.perf_counter()
            for event in events:
                start = time.perf_counter()
                await conn.execute(INSERT, (event.subject, event.revision, event.type, event.data.decode()))
                latencies.append((time.perf_counter() - start) * 1000)
            seconds = time.perf_counter() - began
        return Run(events_per_s=len(events) / seconds, latencies_ms=latencies)

    return asyncio.run(run())


def executemany(dsn: str, events: Sequence[OrderEvent], *, batch: int, connections: int) -> Run:
    """Pipelined executemany, `batch` rows and one commit a time, on `connections` psycopg connections at once."""
    _fresh(dsn)
    batches = [
        [(event.subject, event.revision, event.type, event.data.decode()) for event in events[start : start + batch]]
        for start in range(0, len(events), batch)
    ]

    async def run() -> Run:
        conns = [await psycopg.AsyncConnection.connect(dsn) for _ in range(connections)]
        waiting = iter(batches)

        async def work(conn: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
            for rows in waiting:
                async with conn.cursor() as cursor:
                    await cursor.executemany(INSERT, rows)
                await conn.commit()

        began = time.perf_counter()
        await asyncio.gather(*map(work, conns))
        seconds = time.perf_counter() - began
        for conn in conns:
            await conn.close()
        return Run(events_per_s=len(events) / seconds)

    return asyncio.run(run())
