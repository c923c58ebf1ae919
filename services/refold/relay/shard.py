"""One shard: a share of the store's streams, carried to Kafka by one owner at a time.

To take over: hold the lock, `init_transactions` (fences the former owner and ends its transaction), read the
checkpoints up to the high watermark, then produce. Each transaction holds events and the checkpoints that tell of them.
Whoever is fenced, loses the lock or doesn't know how a transaction ended drops everything and takes over anew; so no
state of a process is ever trusted over Kafka's.

A topic that refuses stops its own stream only. The streams of an aborted transaction whose guilty topic isn't known go
on alone, one event first (see `Progress.batch`), until the guilty one has failed by itself; it is tried again later
and later.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psycopg
import structlog
from confluent_kafka import KafkaException

from refold import names
from refold.kafka import Brokers, CredentialsError
from refold.relay import backoff, checkpoint, metrics, source
from refold.relay.checkpoint import CheckpointTopic, CheckpointTopicError
from refold.relay.lock import Locks
from refold.relay.producer import LostError, TransactionalProducer
from refold.relay.progress import Progress
from refold.relay.pulse import Pulse
from refold.relay.source import Heads
from refold.relay.tenure import Tenure
from refold.relay.topics import Topics
from refold.relay.wake import Mailbox, View

_TAKEOVER_SECONDS = 60.0
_FORESEEN = (LostError, KafkaException, psycopg.Error, TimeoutError, CheckpointTopicError, CredentialsError)


@dataclass(frozen=True)
class Target:
    """What all shards of a process share."""

    store_dsn: str
    brokers: Brokers
    topics: Topics
    store_id: str
    checkpoints: CheckpointTopic


class Shard(threading.Thread):
    """Relays a shard whenever its lock is held and to be kept, until stopped."""

    def __init__(self, number: int, target: Target, locks: Locks, mailbox: Mailbox, pulse: Pulse) -> None:
        """`mailbox` is posted to by the watcher and when the lock is taken."""
        super().__init__(name=f"shard-{number}", daemon=True)
        self.number = number
        self.running = False
        self._target, self._locks, self._mailbox, self._pulse = target, locks, mailbox, pulse
        self._stop_asked = threading.Event()
        self._view: View | None = None
        self._former: list[Progress] = []
        self._log = structlog.get_logger(__name__).bind(shard=number)

    def stop(self) -> None:
        """Ask the thread to end after the transaction that is under way."""
        self._stop_asked.set()
        self._mailbox.post()

    def run(self) -> None:
        """Own the shard again and again; back off after failures."""
        failures = 0
        while not self._stop_asked.is_set():
            self._pulse.beat(self.name)
            if not self._locks.wants(self.number):
                self._locks.leave(self.number)
                self._receive(1.0)
                continue
            begin = time.monotonic()
            try:
                self._own()
            except Exception as error:  # noqa: BLE001 - also a defect of ours must not leave the shard without an owner
                foreseen = isinstance(error, _FORESEEN)
                failures = 1 if time.monotonic() - begin > 2 * backoff.LONGEST_SECONDS else failures + 1
                delay = backoff.seconds(failures)
                trouble = self._target.brokers.trouble()
                metrics.FAILURES.labels(self.number).inc()
                self._log.log(
                    logging.WARNING if foreseen else logging.ERROR,
                    "The shard drops its state and starts again",
                    error=f"{type(error).__name__}: {error}".strip(),
                    **({"kafka": trouble.message} if trouble else {}),
                    in_seconds=round(delay, 1),
                    exc_info=None if foreseen else error,
                )
                self._stop_asked.wait(delay)
        self._locks.leave(self.number)
        self._pulse.end(self.name)

    def _own(self) -> None:
        """Take over and relay until the process stops or has too many shards; a lost lock is an exception."""
        target, started = self._target, time.monotonic()
        topic = target.checkpoints.ensure()
        producer = TransactionalProducer(
            target.brokers,
            names.relay_transactional_id(target.store_id, self.number),
            control=topic,
            check=self._check,
        )
        try:
            producer.init(timeout=_TAKEOVER_SECONDS)
            found = checkpoint.load(
                target.brokers,
                topic,
                self.number,
                end=target.topics.high_watermark(topic, self.number),
                timeout=_TAKEOVER_SECONDS,
                check=self._check,
            )
            with source.connect(target.store_dsn, f"shard {self.number}") as connection:
                self._log.info(
                    "The shard was taken over", checkpoints=len(found), seconds=round(time.monotonic() - started, 2)
                )
                metrics.TAKEOVERS.labels(self.number).inc()
                metrics.HELD.labels(self.number).set(1)
                self._serve(
                    Tenure(
                        self.number,
                        producer=producer,
                        connection=connection,
                        checkpoints=found,
                        checkpoint_topic=topic,
                        topics=target.topics,
                        former=self._former,
                    )
                )
        finally:
            self.running = False
            metrics.HELD.labels(self.number).set(0)
            producer.close()

    def _serve(self, tenure: Tenure) -> None:
        try:
            if self._view is not None:
                tenure.adopt(self._view)
            wait = 0.0
            while not self._stop_asked.is_set():
                self._check()
                if not self._locks.wants(self.number):
                    self._log.info("The shard is left to another relay")
                    return
                former = self._view
                tenure.rest()
                heads = self._receive(wait)
                if self._view is not None and self._view is not former:
                    tenure.adopt(self._view)
                tenure.note(heads)
                wait = tenure.work()
                self.running = True
        finally:
            tenure.close()
            self._former = tenure.streams

    def _check(self) -> None:
        """Show that the thread goes on; give up where the lock was lost."""
        self._pulse.beat(self.name)
        if not self._locks.holds(self.number):
            raise LostError("the shard's lock was lost")

    def _receive(self, timeout: float) -> Mapping[int, Heads]:
        """Wait to be woken; keep the newest view, return the heads that were read since."""
        view, heads = self._mailbox.take(timeout)
        if view is not None:
            self._view = view
        return heads
