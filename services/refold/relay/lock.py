"""Which shards this process may relay: advisory locks of PostgreSQL, all held by one session with a heartbeat.

The lock decides who takes a shard over; it isn't what makes the relay exact. A process that was stopped past its locks
and goes on is fenced by Kafka, since its successor has called `init_transactions`; whoever initialises, rightly or not,
reads the checkpoints afterwards.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psycopg
import structlog

from refold import names
from refold.relay import backoff, source
from refold.relay.pulse import Pulse

log = structlog.get_logger(__name__)

_HEARTBEAT_SECONDS = 1.0
#: PostgreSQL ends the session, and with it the locks, when it hears nothing for so long (also of a stopped process).
_IDLE_SESSION = "5s"
#: The holder trusts a lock for less long than PostgreSQL keeps it without a heartbeat.
_TRUST_SECONDS = 4.0


class Locks(threading.Thread):
    """Takes every free shard, and goes on trying for the others once a second."""

    def __init__(self, dsn: str, shards: int, pulse: Pulse, *, taken: Callable[[int], None]) -> None:
        """`taken` is called (on this thread) with each shard that was locked."""
        super().__init__(name="locks", daemon=True)
        self._dsn, self._shards, self._pulse, self._taken = dsn, shards, pulse, taken
        self._stop_asked = threading.Event()
        self._held: frozenset[int] = frozenset()
        self._beat = float("-inf")

    def holds(self, shard: int) -> bool:
        """Tell whether the shard's lock is held, as far as the last heartbeat tells."""
        return shard in self._held and time.monotonic() - self._beat < _TRUST_SECONDS

    @property
    def alive(self) -> bool:
        """Whether the session has a heartbeat."""
        return time.monotonic() - self._beat < _TRUST_SECONDS

    def stop(self) -> None:
        """Release all locks and end the thread."""
        self._stop_asked.set()
        self.join(10)

    def run(self) -> None:
        """Hold a session until stopped; a new one whenever it is lost."""
        failures = 0
        while not self._stop_asked.is_set():
            self._pulse.beat(self.name)
            try:
                with source.connect(self._dsn, "locks", idle_session_timeout=_IDLE_SESSION) as connection:
                    failures = 0
                    self._hold(connection)
            except psycopg.Error as error:
                failures += 1
                log.warning("The session of the locks was lost", error=str(error).strip(), held=sorted(self._held))
                self._held = frozenset()
                self._stop_asked.wait(backoff.seconds(failures))
        self._pulse.end(self.name)

    def _hold(self, connection: psycopg.Connection) -> None:
        while True:
            self._pulse.beat(self.name)
            sent = time.monotonic()
            free = [shard for shard in range(self._shards) if shard not in self._held]
            rows = connection.execute(
                "select shard, pg_try_advisory_lock(%s, shard) from unnest(%s::int4[]) shard", [names.RELAY_LOCK, free]
            ).fetchall()
            locked = [shard for shard, won in rows if won]
            self._beat = sent
            self._held |= frozenset(locked)
            for shard in locked:
                self._taken(shard)
            if self._stop_asked.wait(_HEARTBEAT_SECONDS):
                self._held = frozenset()
                with suppress(psycopg.Error):
                    connection.execute("select pg_advisory_unlock_all()")
                return
