"""What the relay reads from the event store: the catalog, heads and events. It only selects, in short transactions.

Positions of a partition are gapless and in commit order (an append holds the head's lock until it commits), so a
snapshot that shows head `n` shows every event from 1 to `n`, and to resume is to read what is after a position.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import psycopg
from psycopg import sql

from refold.events import Event

#: Partitions that one query reads at most: each costs planning time and locks in PostgreSQL.
MAX_PARTITIONS_PER_QUERY = 64
_CHUNK_ROWS = 500

_OPTIONS = {
    # Short reads: whatever takes longer is refused and retried, and never holds back vacuum.
    "statement_timeout": "30s",
    "lock_timeout": "2s",
    "default_transaction_read_only": "on",
    # Rows of one partition must come in order through UNION ALL; parallel workers would interleave them.
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    "timezone": "UTC",
}


@dataclass(frozen=True)
class Stream:
    """A served stream as the catalog tells it."""

    number: int
    namespace: str
    name: str
    incarnation: str
    schema: str
    partitions: int
    topic: str

    @property
    def label(self) -> str:
        """`<namespace>/<name>`, for logs and metrics."""
        return f"{self.namespace}/{self.name}"


#: Of one stream: the head of each partition, in order.
Heads = tuple[int, ...]


@dataclass(frozen=True)
class Want:
    """Events to read: at most `limit` of one partition after a position."""

    stream: Stream
    partition: int
    after: int
    limit: int


def connect(dsn: str, purpose: str, **options: str) -> psycopg.Connection:
    """Open a session that ends by itself where the server can't be reached, named after its purpose."""
    settings = " ".join(f"-c {name}={value}" for name, value in {**_OPTIONS, **options}.items())
    return psycopg.connect(
        dsn,
        autocommit=True,
        application_name=f"refold relay {purpose}",
        options=settings,
        connect_timeout=5,
        keepalives_idle=3,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=10_000,
    )


def store_id(connection: psycopg.Connection) -> str:
    """Return the id of the store.

    Raises:
        psycopg.Error: the server can't be reached, or the store isn't installed yet.
        LookupError: the store's catalog is empty.
    """
    row = connection.execute("select id from refold.store").fetchone()
    if row is None:
        raise LookupError("the store's catalog (refold.store) holds no id: install the store again")
    return str(row[0])


def catalog(connection: psycopg.Connection) -> dict[int, tuple[Stream, Heads]]:
    """Return all active streams by number, with their heads, in one query."""
    rows = connection.execute(
        """select s.stream, s.namespace, s.name, s.incarnation, s.schema, s.partitions, s.topic,
                  array_agg(h.head order by h.partition)
           from refold.streams s join refold.heads h using (stream)
           where s.state = 'active' group by s.stream""",
        binary=True,
    ).fetchall()
    return {row[0]: (Stream(*row[:7]), tuple(row[7])) for row in rows}


def heads(connection: psycopg.Connection, streams: Iterable[int]) -> dict[int, Heads]:
    """Return the heads of `streams` now; those that no longer exist are missing."""
    rows = connection.execute(
        """select stream, array_agg(head order by partition) from refold.heads
           where stream = any(%s) group by stream""",
        [list(streams)],
        binary=True,
    ).fetchall()
    return {stream: tuple(found) for stream, found in rows}


def events(connection: psycopg.Connection, wants: Sequence[Want], *, max_bytes: int) -> tuple[list[list[Event]], bool]:
    """Read the events of all `wants` in one query.

    Returns:
        For each want its events in order of position; and whether everything that was wanted and exists is there:
        false where reading stopped since the data reached `max_bytes`.

    Raises:
        psycopg.Error: with more than one want it isn't known whose table is the reason.
    """
    result: list[list[Event]] = [[] for _ in wants]
    query = sql.SQL(" union all ").join(
        sql.SQL(
            "(select {index}::int4, position, subject, revision, id, type, recorded_at, convert_to(data::text, 'UTF8'),"
            " convert_to(metadata::text, 'UTF8') from {schema}.events where partition = {partition}"
            " and position > {after} order by position limit {limit})"
        ).format(
            index=index,
            schema=sql.Identifier(want.stream.schema),
            partition=want.partition,
            after=want.after,
            limit=want.limit,
        )
        for index, want in enumerate(wants)
    )
    size = 0
    with (
        connection.cursor(binary=True) as cursor,
        # closed early it cancels the query
        closing(cast("Generator[tuple[Any, ...]]", cursor.stream(query, size=_CHUNK_ROWS))) as rows,
    ):
        for index, position, subject, revision, id_, type_, time, data, metadata in rows:
            result[index].append(
                Event(
                    wants[index].partition, position, subject, revision, id_, type_, time, msgspec.Raw(data),
                    None if metadata is None else msgspec.Raw(metadata),
                )
            )  # fmt: skip
            size += len(data) + (0 if metadata is None else len(metadata))
            if size >= max_bytes:
                return result, False
    return result, True
