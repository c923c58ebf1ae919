"""What wakes the shards: NOTIFY for single streams, and one slow poll of the catalog and all heads for the process.

The poll makes sure: a lost notification delays events by at most a poll, and streams that appear or go are noticed.
"""

import threading
import time
from collections.abc import Iterable, Mapping

import psycopg
import structlog

from refold import names
from refold.relay import backoff, source
from refold.relay.pulse import Pulse
from refold.relay.source import Heads, Stream

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
#: The active streams by number, with their heads.
View = Mapping[int, tuple[Stream, Heads]]


class Mailbox:
    """Where one shard is told what may have changed; what comes together is read together."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._streams: set[int] = set()
        self._view: View | None = None
        self._rung = False

    def post(self, streams: Iterable[int] = ()) -> None:
        """Wake the shard; `streams` have new events."""
        with self._condition:
            self._streams.update(streams)
            self._rung = True
            self._condition.notify()

    def post_view(self, view: View) -> None:
        """Give the shard the streams and heads of a poll, in place of an earlier one."""
        with self._condition:
            self._view = view
            self._rung = True
            self._condition.notify()

    def take(self, timeout: float) -> tuple[View | None, set[int]]:
        """Wait at most `timeout` seconds to be woken, then take the new view, if there is one, and the streams."""
        with self._condition:
            if not self._rung:
                self._condition.wait(timeout)
            view, streams = self._view, self._streams
            self._view, self._streams, self._rung = None, set(), False
            return view, streams


class Watcher(threading.Thread):
    """Listens and polls; tells the mailbox of each shard (the shard of a stream is its number % shards)."""

    def __init__(self, dsn: str, mailboxes: list[Mailbox], pulse: Pulse) -> None:
        """`mailboxes`: one a shard, in order."""
        super().__init__(name="watcher", daemon=True)
        self._dsn, self._mailboxes, self._pulse = dsn, mailboxes, pulse
        self._stop_asked = threading.Event()
        self._polled_at = float("-inf")

    def stop(self) -> None:
        """End the thread, within about a poll."""
        self._stop_asked.set()

    def fresh(self, seconds: float) -> bool:
        """Tell whether the store was read in the last `seconds`."""
        return time.monotonic() - self._polled_at < seconds

    def run(self) -> None:
        """Watch until stopped; with a new session whenever one is lost."""
        failures = 0
        while not self._stop_asked.is_set():
            self._pulse.beat(self.name)
            try:
                with source.connect(self._dsn, "watcher") as connection:
                    connection.execute(f"listen {names.APPENDED_CHANNEL}")
                    while not self._stop_asked.is_set():
                        self._poll(connection)
                        failures = 0
                        self._listen(connection, until=time.monotonic() + POLL_SECONDS)
            except psycopg.Error as error:
                failures += 1
                log.warning("The store can't be watched", error=str(error).strip())
                self._stop_asked.wait(backoff.seconds(failures))
        self._pulse.end(self.name)

    def _poll(self, connection: psycopg.Connection) -> None:
        self._pulse.beat(self.name)
        found = source.catalog(connection)
        shards = len(self._mailboxes)
        views: list[dict[int, tuple[Stream, Heads]]] = [{} for _ in range(shards)]
        for number, entry in found.items():
            views[number % shards][number] = entry
        for mailbox, view in zip(self._mailboxes, views, strict=True):
            mailbox.post_view(view)
        self._polled_at = time.monotonic()

    def _listen(self, connection: psycopg.Connection, *, until: float) -> None:
        """Pass notifications on until a poll is due; an empty payload asks for a poll at once."""
        while (remaining := until - time.monotonic()) > 0 and not self._stop_asked.is_set():
            for notification in connection.notifies(timeout=remaining, stop_after=1):
                if not notification.payload.isdecimal():
                    return
                number = int(notification.payload)
                self._mailboxes[number % len(self._mailboxes)].post([number])
