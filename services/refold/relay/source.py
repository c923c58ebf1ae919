"""What the relay asks the event store: the catalog, heads, events and locks. It only selects, in short transactions.

Positions of a partition are gapless and in commit order (an append holds the head's lock until it commits), so a
snapshot that shows head `n` shows every event from 1 to `n`, and to resume is to read what is after a position.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import cast

import psycopg
from psycopg import sql
from psycopg.types.numeric import Int8BinaryLoader
from psycopg.types.string import ByteaBinaryLoader

from refold import names

#: Partitions that one query reads at most: each costs planning time and locks in PostgreSQL.
MAX_PARTITIONS_PER_QUERY = 64
_CHUNK_ROWS = 1_000

_OPTIONS = {
    # Short reads: whatever takes longer is refused and retried, and never holds back vacuum.
    "statement_timeout": "30s",
    "lock_timeout": "2s",
    "default_transaction_read_only": "on",
    # Rows of one partition must come in order through UNION ALL; parallel workers would interleave them.
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    "timezone": "UTC",
    "client_encoding": "UTF8",
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
class Look:
    """What a look at the store found: the active streams by number with their heads, and where the locks are.

    Attributes:
        streams: by number.
        relays: how many are there, this one included.
        locked: shards that the look locked.
    """

    streams: dict[int, tuple[Stream, Heads]]
    relays: int
    locked: list[int]


@dataclass(frozen=True)
class Want:
    """Events to read: at most `limit` of one partition after a position."""

    stream: Stream
    partition: int
    after: int
    limit: int


#: An event as PostgreSQL sends it, since millions pass through here: index of the want, position, subject, revision,
#: id, type, `recorded_at` in microseconds since 2000, data and metadata. Texts are UTF-8, and the last two are jsonb in
#: its binary format: a byte (its version, 1), then JSON text.
Row = tuple[int, int, bytes, int, bytes, bytes, int, bytes, bytes | None]
_JSONB_VERSION = 1
#: From 1970 to 2000, in microseconds.
EPOCH = 946_684_800_000_000


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


def look(connection: psycopg.Connection, *, shards: int, held: int, free: Sequence[int]) -> Look:
    """Read all there is to know, and lock what is free, in one query: an idle store costs no other.

    Args:
        connection: the session that holds the locks, on which `enter` was called.
        shards: how many there are.
        held: how many of them the session holds.
        free: those to try to lock, until the session holds its share; none at 0 shards.
    """
    rows = connection.execute(
        """with there as (
             select greatest(count(*), 1) as relays from pg_locks
             where locktype = 'advisory' and classid = %(lock)s and objid = %(presence)s and objsubid = 2
               and database = (select oid from pg_database where datname = current_database())
           ), locked as materialized (
             select shard from unnest(%(free)s::int4[]) shard where pg_try_advisory_lock(%(lock)s, shard)
             limit (select greatest(0, (%(shards)s + relays - 1) / relays - %(held)s) from there)
           )
           select null, null, null, null, null, (select relays from there)::int4, null,
                  (select coalesce(array_agg(shard::int8), '{}') from locked)
           union all
           select s.stream, s.namespace, s.name, s.incarnation, s.schema, s.partitions, s.topic,
                  array_agg(h.head order by h.partition)
           from refold.streams s join refold.heads h using (stream)
           where s.state = 'active' group by s.stream""",
        {
            "lock": names.RELAY_LOCK,
            "presence": names.RELAY_PRESENCE,
            "free": list(free),
            "shards": shards,
            "held": held,
        },
        binary=True,
    ).fetchall()
    streams, relays, locked = {}, 1, []
    for row in rows:
        if row[0] is None:
            relays, locked = row[5], row[7]
        else:
            streams[row[0]] = Stream(*row[:7]), tuple(row[7])
    return Look(streams, relays, locked)


def enter(connection: psycopg.Connection) -> None:
    """Be counted as a relay as long as the session lasts."""
    connection.execute("select pg_advisory_lock_shared(%s, %s)", [names.RELAY_LOCK, names.RELAY_PRESENCE])


def leave(connection: psycopg.Connection) -> None:
    """No longer be counted."""
    connection.execute("select pg_advisory_unlock_shared(%s, %s)", [names.RELAY_LOCK, names.RELAY_PRESENCE])
    _tell_all(connection)


def unlock(connection: psycopg.Connection, shards: Iterable[int]) -> None:
    """Free the locks of `shards`, and let all relays look at once."""
    connection.execute(
        "select pg_advisory_unlock(%s, shard) from unnest(%s::int4[]) shard", [names.RELAY_LOCK, list(shards)]
    )
    _tell_all(connection)


def _tell_all(connection: psycopg.Connection) -> None:
    connection.execute("select pg_notify(%s, '')", [names.APPENDED_CHANNEL])


def heads(connection: psycopg.Connection, streams: Iterable[int]) -> dict[int, Heads]:
    """Return the heads of `streams` now; those that no longer exist are missing."""
    rows = connection.execute(
        """select stream, array_agg(head order by partition) from refold.heads
           where stream = any(%s) group by stream""",
        [list(streams)],
        binary=True,
    ).fetchall()
    return {stream: tuple(found) for stream, found in rows}


def events(connection: psycopg.Connection, wants: Sequence[Want], *, max_bytes: int) -> tuple[list[list[Row]], bool]:
    """Read the events of all `wants` in one query.

    Returns:
        For each want its events in order of position; and whether everything that was wanted and exists is there:
        false where reading stopped since the data reached `max_bytes`.

    Raises:
        psycopg.Error: with more than one want it isn't known whose table is the reason.
    """
    result: list[list[Row]] = [[] for _ in wants]
    query = sql.SQL(" union all ").join(
        sql.SQL(
            "(select {index}::int4, position, subject, revision, id, type, recorded_at, data, metadata"
            " from {schema}.events where partition = {partition} and position > {after}"
            " order by position limit {limit})"
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
    with connection.cursor(binary=True) as cursor:
        for kind in ("text", "jsonb"):
            cursor.adapters.register_loader(kind, ByteaBinaryLoader)
        cursor.adapters.register_loader("timestamptz", Int8BinaryLoader)
        # closed early it cancels the query
        with closing(cast("Generator[Row]", cursor.stream(query, size=_CHUNK_ROWS))) as rows:
            for row in rows:
                result[row[0]].append(row)
                data, metadata = row[7], row[8]
                if data[0] != _JSONB_VERSION:
                    raise psycopg.NotSupportedError(f"PostgreSQL sends jsonb in version {data[0]} of its format")
                size += len(data) + (0 if metadata is None else len(metadata))
                if size >= max_bytes:
                    return result, False
    return result, True
