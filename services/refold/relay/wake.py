"""What wakes the shards: NOTIFY for single streams, and one slow poll of the catalog, all heads and the locks.

The poll makes sure: a lost notification delays events by at most a poll, and streams that appear or go are noticed.
"""

import threading
import time
from collections.abc import Mapping

import psycopg
import structlog

from refold import names
from refold.relay import backoff, source
from refold.relay.lock import Locks
from refold.relay.pulse import Pulse
from refold.relay.source import Heads, Stream

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
#: PostgreSQL ends the session, and with it the locks, when it hears nothing for so long (also of a stopped process).
IDLE_SESSION = "5s"
#: How often a shard that was left, or the end of the process, is noticed between two polls.
_SLICE_SECONDS = 0.1
#: The active streams by number, with their heads.
View = Mapping[int, tuple[Stream, Heads]]


class Mailbox:
    """Where one shard is told what may have changed; what comes together is read together."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._heads: dict[int, Heads] = {}
        self._view: View | None = None
        self._rung = False

    def post(self, heads: Mapping[int, Heads] | None = None) -> None:
        """Wake the shard; `heads` of streams by number were just read."""
        with self._condition:
            self._heads.update(heads or {})
            self._rung = True
            self._condition.notify()

    def post_view(self, view: View) -> None:
        """Give the shard the streams and heads of a poll, in place of what was read earlier."""
        with self._condition:
            self._view = view
            self._heads.clear()
            self._rung = True
            self._condition.notify()

    def take(self, timeout: float) -> tuple[View | None, dict[int, Heads]]:
        """Wait at most `timeout` seconds to be woken, then take the new view, if there is one, and later heads."""
        with self._condition:
            if not self._rung:
                self._condition.wait(timeout)
            view, heads = self._view, self._heads
            self._view, self._heads, self._rung = None, {}, False
            return view, heads


class Watcher(threading.Thread):
    """Listens and polls; tells the mailbox of each shard (the shard of a stream is its number % shards).

    Its session holds the locks, and its poll is their heartbeat.
    """

    def __init__(self, dsn: str, mailboxes: list[Mailbox], locks: Locks, pulse: Pulse) -> None:
        """`mailboxes`: one a shard, in order."""
        super().__init__(name="watcher", daemon=True)
        self._dsn, self._mailboxes, self._locks, self._pulse = dsn, mailboxes, locks, pulse
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        """Free all locks and end the thread."""
        self._stop_asked.set()
        self.join(10)

    def run(self) -> None:
        """Watch until stopped; with a new session whenever one is lost."""
        failures = 0
        while not self._stop_asked.is_set():
            self._pulse.beat(self.name)
            try:
                with source.connect(self._dsn, "watcher", idle_session_timeout=IDLE_SESSION) as connection:
                    connection.execute(f"listen {names.APPENDED_CHANNEL}")
                    source.enter(connection)
                    here = True
                    while not self._stop_asked.is_set():
                        if here and self._locks.closing:
                            source.leave(connection)
                            here = False
                        self._look(connection)
                        failures = 0
                        self._listen(connection, until=time.monotonic() + POLL_SECONDS)
                    source.unlock(connection, self._locks.held)
            except psycopg.Error as error:
                failures += 1
                log.warning(
                    "The store can't be watched", error=str(error).strip(), shards_lost=sorted(self._locks.held)
                )
                self._locks.lost()
                self._stop_asked.wait(backoff.seconds(failures))
        self._locks.lost()
        self._pulse.end(self.name)

    def _look(self, connection: psycopg.Connection) -> None:
        self._pulse.beat(self.name)
        shards, held = len(self._mailboxes), self._locks.held
        free = [] if self._locks.closing else [shard for shard in range(shards) if shard not in held]
        sent = time.monotonic()
        found = source.look(connection, shards=shards, held=len(held), free=free)
        views: list[dict[int, tuple[Stream, Heads]]] = [{} for _ in range(shards)]
        for number, entry in found.streams.items():
            views[number % shards][number] = entry
        for mailbox, view in zip(self._mailboxes, views, strict=True):
            mailbox.post_view(view)
        freed = self._locks.settle(found.locked, relays=found.relays, beat=sent)
        if freed:
            source.unlock(connection, freed)

    def _listen(self, connection: psycopg.Connection, *, until: float) -> None:
        """Read the heads that notifications tell of until a look is due; an empty payload asks for one at once."""
        shards = len(self._mailboxes)
        while (remaining := until - time.monotonic()) > 0 and not self._stop_asked.is_set():
            heard = connection.notifies(timeout=min(remaining, _SLICE_SECONDS), stop_after=1)
            payloads = {notification.payload for notification in heard}
            if self._locks.unsettled or not all(payload.isdecimal() for payload in payloads):
                return
            ours = [number for number in map(int, payloads) if self._locks.wants(number % shards)]
            if not ours:
                continue
            # here and not in the shards, which may be at a transaction meanwhile
            for number, heads in source.heads(connection, ours).items():
                self._mailboxes[number % shards].post({number: heads})
