"""Reading the event store: pages of a partition, and the heads.

All statements are short and each is a transaction of its own, so that a long backfill never holds back vacuum.
`History` belongs to the projector's loop; `Heads` polls in a thread of its own, so that a store that doesn't answer
delays nothing that comes from Kafka.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Never

import msgspec
import psycopg
import structlog
from psycopg import sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader

from refold.events import Event
from refold.projection.definition import StreamRef

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
_OPTIONS = "-c statement_timeout=30s -c default_transaction_read_only=on -c timezone=UTC -c search_path="

#: Bytes of data and metadata, as PostgreSQL stores them, that a page holds at most (but at least one event).
_PAGE_BYTES = 8 * 2**20
_PAGE = """
select partition, position, subject, revision, id, type, recorded_at, data, metadata
from (
  select *, sum(pg_column_size(data) + coalesce(pg_column_size(metadata), 0)) over (order by position) as bytes
  from (
    select * from {} where partition = %(partition)s and position > %(after)s order by position limit %(limit)s
  ) page
) page
where bytes <= %(bytes)s or position = %(after)s + 1
order by position
"""


_EVENTS = """
select partition, position, subject, revision, id, type, recorded_at, data, metadata
from {} where partition = %s and position = any(%s::bigint[]) order by position
"""


class HistoryUnavailableError(Exception):
    """The event store can't be reached, or didn't answer as it should; it may come back."""


class _RawLoader(Loader):
    """Leaves jsonb as the text that the server sends."""

    def load(self, data: Buffer) -> msgspec.Raw:
        return msgspec.Raw(bytes(data))


def _connect(dsn: str, part: str) -> psycopg.Connection[Any]:
    conn = psycopg.connect(
        dsn,
        autocommit=True,
        options=_OPTIONS,
        connect_timeout=3,
        keepalives_idle=10,
        keepalives_interval=5,
        keepalives_count=3,
        tcp_user_timeout=20_000,
        application_name=f"refold projector {part}",
    )
    conn.adapters.register_loader("jsonb", _RawLoader)
    return conn


class Page(NamedTuple):
    """Which events to read: at most `limit` of a partition, after the position `after`; fewer where they are large."""

    stream: StreamRef
    partition: int
    after: int
    limit: int


class History:
    """The stored events, over one connection in a thread of its own, so that a page can be read ahead.

    Every method raises `HistoryUnavailableError`; the next call then opens a new connection.
    """

    def __init__(self, dsn: str) -> None:
        """Remember where; nothing is connected yet."""
        self._dsn = dsn
        self._conn: psycopg.Connection[Any] | None = None
        self._thread = ThreadPoolExecutor(1, "history")
        self._ahead: tuple[Page, Future[list[Event]]] | None = None

    def close(self) -> None:
        """Close the connection."""
        self._thread.shutdown(cancel_futures=True)
        self._disconnect()

    def ask(self, page: Page) -> None:
        """Begin to read a page that is likely to be read next."""
        self._ahead = page, self._thread.submit(self._read, page)

    def page(self, page: Page) -> list[Event]:
        """Return the page's events, in order and without a gap; none where the head is reached."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == page and (found := ahead[1].result()):
            return found
        return self._thread.submit(self._read, page).result()

    def events(self, stream: StreamRef, partition: int, positions: Sequence[int]) -> list[Event]:
        """Return the events of a partition at these positions, in order."""
        return self._thread.submit(self._read_events, stream, partition, positions).result() if positions else []

    def heads(self, incarnations: Sequence[str]) -> dict[tuple[str, int], int]:
        """Return the heads by (incarnation, partition); streams that are gone are left out."""
        return self._thread.submit(self._read_heads, incarnations).result()

    def _read(self, page: Page) -> list[Event]:
        stream, partition, after, limit = page
        try:
            cursor = self._connection().execute(
                sql.SQL(_PAGE).format(sql.Identifier(stream.event_schema, "events")),
                {"partition": partition, "after": after, "limit": limit, "bytes": _PAGE_BYTES},
            )
            return [Event(*row) for row in cursor.fetchall()]
        except psycopg.Error as error:
            self._raise(error, f"{stream.namespace}/{stream.name}")

    def _read_events(self, stream: StreamRef, partition: int, positions: Sequence[int]) -> list[Event]:
        what = f"{stream.namespace}/{stream.name}"
        try:
            cursor = self._connection().execute(
                sql.SQL(_EVENTS).format(sql.Identifier(stream.event_schema, "events")), [partition, list(positions)]
            )
            found = [Event(*row) for row in cursor.fetchall()]
        except psycopg.Error as error:
            self._raise(error, what)
        if missing := set(positions) - {event.position for event in found}:
            raise HistoryUnavailableError(f"the event store lacks position {min(missing)} of {what}/{partition}")
        return found

    def _read_heads(self, incarnations: Sequence[str]) -> dict[tuple[str, int], int]:
        try:
            return _heads(self._connection(), incarnations)
        except psycopg.Error as error:
            self._raise(error, "the heads")

    def _connection(self) -> psycopg.Connection[Any]:
        if self._conn is None or self._conn.closed:
            self._conn = _connect(self._dsn, "history")
        return self._conn

    def _disconnect(self) -> None:
        if self._conn is not None:
            self._conn.close()
            self._conn = None

    def _raise(self, error: psycopg.Error, what: str) -> Never:
        self._disconnect()
        raise HistoryUnavailableError(f"reading {what} in the event store (PostgreSQL): {error}".strip()) from error


class Sighting(msgspec.Struct, frozen=True):
    """What one poll saw of a partition: its head and, where events are to be applied, the age of the first, in seconds.

    `position` is what was applied then.
    """

    head: int
    position: int
    lag_seconds: float


class Heads(threading.Thread):
    """Polls the heads of the assigned partitions, and how old their first unapplied events are."""

    def __init__(self, dsn: str, streams: Sequence[StreamRef]) -> None:
        """Prepare; `watch` tells what to look at."""
        super().__init__(name="heads", daemon=True)
        self._dsn = dsn
        self._streams = {stream.incarnation: stream for stream in streams}
        self._stopping = threading.Event()
        self._applied: Mapping[tuple[str, int], int] = {}
        self._latest: dict[tuple[str, int], Sighting] | None = None
        self._lock = threading.Lock()

    def watch(self, applied: Mapping[tuple[str, int], int]) -> None:
        """Look from now on at these partitions, which are applied up to these positions."""
        self._applied = applied

    def take(self) -> dict[tuple[str, int], Sighting] | None:
        """Return what the latest poll saw, once; None where there was none since the last call."""
        with self._lock:
            latest, self._latest = self._latest, None
        return latest

    def stop(self) -> None:
        """End the thread soon."""
        self._stopping.set()

    def run(self) -> None:
        """Poll until stopped."""
        conn: psycopg.Connection[Any] | None = None
        failures = 0
        while not self._stopping.wait(POLL_SECONDS if failures == 0 else min(10, 0.5 * 2**failures)):
            try:
                if conn is None or conn.closed:
                    conn = _connect(self._dsn, "heads")
                seen = self._poll(conn, self._applied)
                failures = 0
                with self._lock:
                    self._latest = seen
            except psycopg.Error as error:
                failures = min(failures + 1, 8)
                log.warning("The event store doesn't answer", error=str(error).strip())
                if conn is not None:
                    conn.close()
        if conn is not None:
            conn.close()

    def _poll(
        self, conn: psycopg.Connection[Any], applied: Mapping[tuple[str, int], int]
    ) -> dict[tuple[str, int], Sighting]:
        if not applied:
            return {}
        heads = _heads(conn, sorted({incarnation for incarnation, _ in applied}))
        ages: dict[tuple[str, int], float] = {}
        for incarnation, stream in self._streams.items():
            behind = [
                (partition, position)
                for (other, partition), position in applied.items()
                if other == incarnation and heads.get((other, partition), 0) > position
            ]
            if behind:
                cursor = conn.execute(
                    sql.SQL(
                        "select p.partition, extract(epoch from clock_timestamp() - (select e.recorded_at from {} e "
                        "where e.partition = p.partition and e.position = p.position + 1))::float8 "
                        "from unnest(%s::int[], %s::bigint[]) p(partition, position)"
                    ).format(sql.Identifier(stream.event_schema, "events")),
                    [[one[0] for one in behind], [one[1] for one in behind]],
                )
                ages.update({(incarnation, partition): max(0.0, age or 0.0) for partition, age in cursor})
        return {
            key: Sighting(heads[key], position, ages.get(key, 0.0)) for key, position in applied.items() if key in heads
        }


def _heads(conn: psycopg.Connection[Any], incarnations: Sequence[str]) -> dict[tuple[str, int], int]:
    cursor = conn.execute(
        "select s.incarnation, h.partition, h.head from refold.heads h join refold.streams s using (stream) "
        "where s.incarnation = any(%s)",
        [list(incarnations)],
    )
    return {(incarnation, partition): head for incarnation, partition, head in cursor}


def wait_a_little(failures: int) -> float:
    """Return the monotonic time of the next try after so many failures in a row (1 or more): 0.2 s, doubling to 5 s."""
    return time.monotonic() + min(5.0, 0.1 * (1 << min(failures, 8)))
