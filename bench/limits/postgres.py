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
import uvloop

from bench.orders import OrderEvent
from bench.result import Run

_TABLE = """
create table bench_limit (position bigint generated always as identity primary key, stream text not null,
  version int not null, type text not null, data jsonb not null, unique (stream, version))
"""
#: Of subject, revision, type and data as JSON text.
INSERT = "insert into bench_limit (stream, version, type, data) values (%s, %s, %s, %s)"
#: Lives of five events in each client, as in the workload; the payload is a parameter, sent and parsed each time.
_PGBENCH = r"""
\set version :version % 5 + 1
\if :version = 1
\set order random(1, 9000000000000000000)
\endif
insert into bench_limit (stream, version, type, data) values
  ('order-' || :client_id || '-' || :order, :version, :type, :data);
"""


def fresh(dsn: str) -> None:
    """Make the limits' table, empty."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("drop table if exists bench_limit")
        conn.execute(_TABLE)


def _check(dsn: str, count: int) -> None:
    with psycopg.connect(dsn) as conn:
        found = conn.execute("select count(*) from bench_limit").fetchone()
    if found != (count,):
        raise RuntimeError(f"the limit inserted {count} rows, the table holds {found}")


def _pgbench(dsn: str, *arguments: str) -> float:
    """Run pgbench with prepared statements and two threads; return transactions per second without connecting."""
    command = ["pgbench", "-n", "-M", "prepared", "-j", "2", *arguments, dsn]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PGOPTIONS": ""})
    found = re.search(r"tps = ([0-9.]+)", done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(f"pgbench ended with {done.returncode}: {done.stderr or done.stdout}")
    return float(found[1])


def pgbench(dsn: str, events: Sequence[OrderEvent], *, clients: int) -> Run:
    """One INSERT and commit each by `clients` clients of `pgbench -M prepared`; the payload is a typical event's."""
    fresh(dsn)
    mean = sum(len(event.data) for event in events) / len(events)
    typical = min(events, key=lambda event: abs(len(event.data) - mean))
    transactions = max(1, len(events) // clients)
    with tempfile.TemporaryDirectory() as folder:
        script, log = Path(folder) / "insert.sql", Path(folder) / "log"
        script.write_text(_PGBENCH)
        rate = _pgbench(
            dsn, "-c", str(clients), "-t", str(transactions), "-f", str(script), "-l", f"--log-prefix={log}",
            "-D", "version=0", "-D", "order=0", "-D", f"type={typical.type}", "-D", f"data={typical.data.decode()}",
        )  # fmt: skip
        # client, transaction, µs, …
        lines = [line.split() for file in Path(folder).glob("log*") for line in file.read_text().splitlines()]
    _check(dsn, clients * transactions)
    return Run(events_per_s=rate, latencies_ms=[int(fields[2]) / 1000 for fields in lines])


def select_only(dsn: str, *, clients: int, seconds: int) -> Run:
    """Point reads by `pgbench -S -M prepared` on its own tables (100,000 rows), `clients` at once."""
    with psycopg.connect(dsn) as conn:
        made = conn.execute("select to_regclass('pgbench_accounts') is not null").fetchone()
    if made != (True,):
        subprocess.run(["pgbench", "-i", "-q", "-s", "1", dsn], check=True, capture_output=True)
    return Run(events_per_s=_pgbench(dsn, "-S", "-c", str(clients), "-T", str(seconds)))


def insert_and_commit(dsn: str, events: Sequence[OrderEvent]) -> Run:
    """One INSERT and commit after another on one psycopg connection."""
    fresh(dsn)
    rows = [(event.subject, event.revision, event.type, event.data.decode()) for event in events]
    latencies = []
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=0) as conn:
        began = time.perf_counter()
        for row in rows:
            start = time.perf_counter()
            conn.execute(INSERT, row)
            latencies.append((time.perf_counter() - start) * 1000)
        seconds = time.perf_counter() - began
    _check(dsn, len(events))
    return Run(events_per_s=len(events) / seconds, latencies_ms=latencies)


def executemany(dsn: str, events: Sequence[OrderEvent], *, batch: int, connections: int) -> Run:
    """Pipelined executemany, `batch` rows and one commit a time, on `connections` psycopg connections at once."""
    fresh(dsn)
    batches = [
        [(event.subject, event.revision, event.type, event.data.decode()) for event in events[start : start + batch]]
        for start in range(0, len(events), batch)
    ]

    async def run() -> Run:
        conns = [await psycopg.AsyncConnection.connect(dsn) for _ in range(connections)]
        waiting = iter(batches)
        latencies = []

        async def work(conn: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
            for rows in waiting:
                start = time.perf_counter()
                async with conn.cursor() as cursor:
                    await cursor.executemany(INSERT, rows)
                await conn.commit()
                latencies.append((time.perf_counter() - start) * 1000)

        began = time.perf_counter()
        await asyncio.gather(*map(work, conns))
        seconds = time.perf_counter() - began
        for conn in conns:
            await conn.close()
        return Run(events_per_s=len(events) / seconds, latencies_ms=latencies)

    result = uvloop.run(run())
    _check(dsn, len(events))
    return result
