"""Filling a store with millions of events in minutes: by its owner, indexed afterwards; they stand as if appended."""

import contextlib
import random
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
from psycopg import sql
from refold.eventstore.catalog import Stream
from refold.partitioning import partition_of

from bench.orders import OrderEvent
from bench.servers import Servers

#: Events of a subject, and how many subjects are open at a time, as in the workload "orders".
LIFE, _WINDOW = 5, 50
#: One subject of so many is returned.
_KEPT = 20

_INSERT = """
insert into {table} (partition, position, subject, revision, id, type, data, recorded_at)
select {partition}, e.position, e.subject, e.revision, md5(e.subject || e.revision)::uuid::text, s.type, s.data,
       now() - interval '1 day' + e.position * interval '1 ms'
from (
  select w.number * {window} * {life} + (r - 1) * cardinality(w.subjects) + n as position, subject, r as revision,
         (w.number * {window} + n) * {life} + r as sample
  from windows w cross join generate_series(1, {life}) r
       cross join lateral unnest(w.subjects) with ordinality u (subject, n)
) e join samples s on s.number = e.sample % {samples}
"""
_INSERT_LONG = """
insert into {table} (partition, position, subject, revision, id, type, data, recorded_at)
select {partition}, {before} + n, {subject}, n, md5({subject} || n)::uuid::text, s.type, s.data,
       now() - interval '1 day' + ({before} + n) * interval '1 ms'
from generate_series(1, {count}) n join samples s on s.number = n % {samples}
"""
_HEAD = """
update refold.heads set head = e.position, recorded_at = e.recorded_at
from (select position, recorded_at from {table} order by position desc limit 1) e
where stream = {stream} and partition = {partition}
"""


def fill(
    servers: Servers, stream: Stream, count: int, *, long: str, long_count: int, like: Sequence[OrderEvent]
) -> list[str]:
    """Give `stream`, which is empty and not in use, `count` events, rounded up to whole lives of subjects.

    Args:
        servers: where the stream is.
        stream: what to fill.
        count: how many events, among them those of `long`.
        long: a subject of many events; the others have 5 each, in windows of 50 subjects as orders arrive.
        long_count: how many.
        like: where types and data are taken from, by turns.

    Returns:
        One in twenty of the subjects of 5 events.
    """
    lives = -(-(count - long_count) // (LIFE * stream.partitions))
    subjects = _subjects(stream.partitions, lives)
    parent = sql.Identifier(stream.schema, "events")
    tables = [sql.Identifier(stream.schema, f"events_{partition}") for partition in range(stream.partitions)]

    def fill_partition(partition: int) -> None:
        with servers.events() as conn:
            # none of this needs to survive a crash before the checkpoint at the end
            conn.execute("set synchronous_commit = off; set maintenance_work_mem = '256MB'")
            _copy_temporarily(conn, subjects[partition], like)
            with _without_keys(conn, tables[partition]):
                where = {
                    "table": tables[partition], "stream": sql.Literal(stream.stream),
                    "partition": sql.Literal(partition), "samples": sql.Literal(len(like)),
                    "window": sql.Literal(_WINDOW), "life": sql.Literal(LIFE), "subject": sql.Literal(long),
                    "before": sql.Literal(lives * LIFE), "count": sql.Literal(long_count),
                }  # fmt: skip
                conn.execute(sql.SQL(_INSERT).format(**where))
                if partition == partition_of(long, stream.partitions):
                    conn.execute(sql.SQL(_INSERT_LONG).format(**where))
            conn.execute(sql.SQL(_HEAD).format(**where))
            conn.execute(sql.SQL("vacuum (analyze) {}").format(tables[partition]))

    with servers.events() as conn:
        for table in tables:
            conn.execute(sql.SQL("alter table {} detach partition {}").format(parent, table))
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(fill_partition, range(stream.partitions)))
        for partition, table in enumerate(tables):
            conn.execute(
                sql.SQL("alter table {} attach partition {} for values in ({})").format(parent, table, partition)
            )
        conn.execute("vacuum (analyze) refold.heads")
        conn.execute(sql.SQL("analyze {}").format(parent))
        conn.execute("checkpoint")
    return [subject for own in subjects for subject in own[::_KEPT]]


def _subjects(partitions: int, lives: int) -> list[list[str]]:
    """Return `lives` subjects of each partition."""
    draw = random.Random(2)
    subjects: list[list[str]] = [[] for _ in range(partitions)]
    full = 0
    while full < partitions:
        subject = f"order-{uuid.UUID(int=draw.getrandbits(128), version=4)}"
        own = subjects[partition_of(subject, partitions)]
        if len(own) < lives:
            own.append(subject)
            full += len(own) == lives
    return subjects


def _copy_temporarily(conn: "psycopg.Connection[Any]", subjects: Sequence[str], like: Sequence[OrderEvent]) -> None:
    """Give the session tables of the events to take types and data from, and of the subjects by windows."""
    conn.execute("create temp table samples (number int primary key, type text, data jsonb)")
    with conn.cursor().copy("copy samples from stdin") as copy:
        for number, event in enumerate(like):
            copy.write_row((number, event.type, event.data.decode()))
    conn.execute("create temp table windows (number bigint, subjects text[])")
    with conn.cursor().copy("copy windows from stdin") as copy:
        for start in range(0, len(subjects), _WINDOW):
            copy.write_row((start // _WINDOW, subjects[start : start + _WINDOW]))
    conn.execute("analyze samples; analyze windows")


@contextlib.contextmanager
def _without_keys(conn: "psycopg.Connection[Any]", table: sql.Identifier) -> Iterator[None]:
    """Take the keys with their indexes off a table, and put them back as they were."""
    keys = conn.execute(
        "select conname, pg_get_constraintdef(oid) from pg_constraint where contype in ('p', 'u') "
        "and conrelid = %s::regclass", [table.as_string(conn)],
    ).fetchall()  # fmt: skip
    for name, _ in keys:
        conn.execute(sql.SQL("alter table {} drop constraint {}").format(table, sql.Identifier(name)))
    yield
    for name, definition in keys:
        conn.execute(
            sql.SQL("alter table {} add constraint {} {}").format(table, sql.Identifier(name), sql.SQL(definition))
        )
