"""The relay's process: one thread for each shard, one that watches the store and holds the locks, and the probes."""

import signal
import sys
import threading

import psycopg
import structlog

from refold import kafka, logs, names
from refold.relay import backoff, source
from refold.relay.checkpoint import CheckpointTopic
from refold.relay.lock import Locks
from refold.relay.pulse import Pulse
from refold.relay.settings import Settings
from refold.relay.shard import Shard, Target
from refold.relay.topics import Topics
from refold.relay.wake import Mailbox, Watcher
from refold.web.probes import Probes

log = structlog.get_logger(__name__)

#: For the transactions under way when the process is told to stop; below Kubernetes' grace of 30 s.
_STOP_SECONDS = 20.0
#: Python's own 5 ms are what a thread that reads waits, at every piece that comes, for one that sends and never blocks.
_SWITCH_SECONDS = 0.0005


def main() -> None:
    """Relay until SIGTERM or SIGINT, then finish the transactions under way and return."""
    logs.configure("relay")
    sys.setswitchinterval(_SWITCH_SECONDS)
    settings = Settings()  # type: ignore[call-arg]  # from the environment
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    relay = Relay(settings)
    with Probes(settings.port, healthy=relay.stuck, ready=relay.lacking):
        relay.run(stop)
    log.info("Stopped")


class Relay:
    """All threads of a relay process."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is started or connected yet."""
        self._settings = settings
        self._dsn = settings.store_dsn.get_secret_value()
        self._brokers = settings.brokers()
        self._pulse = Pulse()
        mailboxes = [Mailbox() for _ in range(settings.relay_shards)]
        self._locks = Locks(len(mailboxes), changed=lambda shard: mailboxes[shard].post())
        self._watcher = Watcher(self._dsn, mailboxes, self._locks, self._pulse)
        self._mailboxes = mailboxes
        self._shards: list[Shard] = []

    def run(self, stop: threading.Event) -> None:
        """Run all threads until `stop` is set; then end them, each shard's lock is freed as it ends."""
        store_id = self._wait_for_store(stop)
        if store_id is None:
            return
        shards = self._settings.relay_shards
        kafka.end_when_changed(self._brokers)
        topics = Topics(self._brokers)
        checkpoints = CheckpointTopic(
            topics, names.checkpoint_topic(store_id), shards=shards, replicas=self._settings.checkpoint_replicas
        )
        target = Target(self._dsn, self._brokers, topics, store_id, checkpoints)
        self._shards = [
            Shard(number, target, self._locks, mailbox, self._pulse) for number, mailbox in enumerate(self._mailboxes)
        ]
        for thread in (self._watcher, *self._shards):
            thread.start()
        log.info("Relaying", store=store_id, shards=shards)
        stop.wait()
        self._locks.close()
        for shard in self._shards:
            shard.stop()
        deadline = threading.Event()
        timer = threading.Timer(_STOP_SECONDS, deadline.set)
        timer.daemon = True
        timer.start()
        for shard in self._shards:
            while shard.is_alive() and not deadline.is_set():
                shard.join(0.1)
        timer.cancel()
        unfinished = [shard.number for shard in self._shards if shard.is_alive()]
        if unfinished:
            log.warning("Transactions were left to be aborted by the next owner", shards=unfinished)
        self._watcher.stop()

    def stuck(self) -> str | None:
        """Return which threads are stuck or dead, None where a restart wouldn't help."""
        silent = self._pulse.silent()
        return f"silent: {', '.join(silent)}" if silent else None

    def lacking(self) -> str | None:
        """Return what this process lacks to relay, or to take over when it is needed; None where nothing."""
        if not self._shards:
            return "the store wasn't reached yet, or isn't installed"
        if not self._locks.alive:
            return "the store can't be read"
        starting = [shard.number for shard in self._shards if self._locks.wants(shard.number) and not shard.running]
        if not starting:
            return None
        trouble = self._brokers.trouble()
        return f"taking over shards {starting}" + (f"; {trouble.message}" if trouble else "")

    def _wait_for_store(self, stop: threading.Event) -> str | None:
        failures = 0
        while not stop.is_set():
            try:
                with source.connect(self._dsn, "start") as connection:
                    return source.store_id(connection)
            except (psycopg.Error, LookupError) as error:
                failures += 1
                delay = backoff.seconds(failures)
                log.warning("Waiting for the store", error=str(error).strip(), in_seconds=round(delay, 1))
                stop.wait(delay)
        return None
