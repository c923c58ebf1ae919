"""Kafka's transactional producer with the three outcomes that a transaction can have for the relay.

Committed; aborted because of certain topics (`AbortedError`: the others can go on); or lost (`LostError`: fenced,
fatal, or the outcome is unknown), after which the only safe thing is to begin again from the checkpoints with a new
producer.
"""

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from refold.kafka import Brokers

_COMMIT_SECONDS = 60.0
_ABORT_SECONDS = 15.0
_SLICE_SECONDS = 1.0
#: How long to leave the markers, in times of the commit's answer: 2, 3 and 4 were tried and about alike. And seconds,
#: at most: what librdkafka itself waits where they aren't written.
_MARKERS, _LONGEST_MARKERS_SECONDS = 3.0, 0.02

#: Answers that speak of a topic or of a record in it, not of the cluster.
_OF_TOPIC = {
    KafkaError.UNKNOWN_TOPIC_OR_PART: "TopicMissing",
    KafkaError._UNKNOWN_TOPIC: "TopicMissing",
    KafkaError._UNKNOWN_PARTITION: "TopicMissing",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "TopicForbidden",
    KafkaError.MSG_SIZE_TOO_LARGE: "RecordTooLarge",
    KafkaError.RECORD_LIST_TOO_LARGE: "RecordTooLarge",
    KafkaError.INVALID_MSG_SIZE: "RecordTooLarge",
    KafkaError.INVALID_MSG: "RecordRefused",
    KafkaError.INVALID_RECORD: "RecordRefused",
    KafkaError.INVALID_TIMESTAMP: "RecordRefused",
    KafkaError.POLICY_VIOLATION: "RecordRefused",
    KafkaError.TOPIC_EXCEPTION: "TopicInvalid",
    KafkaError.NOT_ENOUGH_REPLICAS: "TopicUnavailable",
    KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND: "TopicUnavailable",
    KafkaError.KAFKA_STORAGE_ERROR: "TopicUnavailable",
}
#: Answers that speak of a topic only where others were reached at the same time.
_OF_TIME = frozenset({KafkaError._MSG_TIMED_OUT, KafkaError._TIMED_OUT})
#: By topic and partition: the offset of the last record that was watched.
Offsets = dict[tuple[str, int], int]
_PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})


class AbortedError(Exception):
    """The transaction was aborted, nothing of it stands.

    Attributes:
        guilty: what Kafka said of topics; empty where it isn't known which one is the reason.
        answer: what Kafka said of the transaction.
        changed: topics that are no longer those that the transaction was meant for.
    """

    def __init__(
        self,
        message: str,
        *,
        guilty: dict[str, KafkaError] | None = None,
        answer: KafkaError | None = None,
        changed: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.guilty = guilty or {}
        self.answer = answer
        self.changed = frozenset(changed)


class LostError(Exception):
    """The producer can't go on. Whether its last transaction was committed, the checkpoints tell.

    Attributes:
        aborted: what is known of the topics that were the reason, if they were.
    """

    def __init__(self, message: str, *, aborted: AbortedError | None = None) -> None:
        super().__init__(message)
        self.aborted = aborted


def reason(error: KafkaError) -> str:
    """Return the reason (a CamelCase word for conditions and metrics) of an error that speaks of a topic."""
    return _OF_TOPIC.get(error.code(), "TopicUnavailable" if error.code() in _OF_TIME else "TopicRefused")


class TransactionalProducer:
    """One `transactional.id`, one transaction at a time. Used by one thread.

    Args:
        brokers: the cluster.
        transactional_id: names the shard; whoever initialises it fences all that did so before.
        control: the checkpoint topic, which is in every transaction: it tells a topic's failure from the cluster's.
        check: called between waits of a second; raises to give up.
    """

    def __init__(self, brokers: Brokers, transactional_id: str, *, control: str, check: Callable[[], None]) -> None:
        self._control, self._check = control, check
        self._failed: dict[str, KafkaError] = {}
        self._undelivered: set[str] = set()
        self._delivered: Offsets = {}
        self._open = False
        self._rests_until = 0.0
        self._producer = Producer(
            {
                **brokers.config(),
                "transactional.id": transactional_id,
                "acks": "all",
                "enable.idempotence": True,
                # A transaction that nobody ends holds back read_committed consumers for so long at most; a successor
                # aborts it at once.
                "transaction.timeout.ms": 30_000,
                "message.timeout.ms": 20_000,
                # Fills batches while catching up; a lone event isn't delayed, since a commit flushes without it.
                "linger.ms": 5,
                "batch.size": 1_000_000,
                "compression.type": "lz4",
                "queue.buffering.max.messages": 1_000_000,
                # The topic's own limit decides.
                "message.max.bytes": 128 << 20,
            }
        )

    def init(self, *, timeout: float) -> None:
        """Fence every former owner of the transactional id and end its transaction.

        Raises:
            LostError: it did not succeed in `timeout` seconds, or never can.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._producer.init_transactions(_SLICE_SECONDS)
            except KafkaException as error:
                self.poll()  # librdkafka tells in its log why it can't connect
                self._again_or_lost(error, deadline, "initialise transactions")
            else:
                return

    def begin(self) -> None:
        """Begin a transaction."""
        self._failed.clear()
        self._undelivered.clear()
        self._delivered.clear()
        try:
            self._producer.begin_transaction()
        except KafkaException as error:
            raise LostError(f"Kafka refused to begin a transaction: {error.args[0]}") from error
        self._open = True

    def send(
        self,
        topic: str,
        partition: int,
        key: bytes,
        value: bytes,
        headers: list[tuple[str, bytes]] | None = None,
        timestamp: int = 0,
        *,
        watched: bool = True,
    ) -> None:
        """Add a record to the transaction; `timestamp` in milliseconds, 0 for now.

        What becomes of it is noted where it is `watched`. To watch each costs a tenth of the throughput; the first one
        of each partition tells the offset, and mostly which topic refuses.

        Raises:
            AbortedError, LostError: as the class of each tells.
        """
        while True:
            try:
                self._producer.produce(
                    topic,
                    value,
                    key,
                    partition,
                    timestamp=timestamp,
                    headers=headers,  # type: ignore[arg-type] # invariant list
                    on_delivery=self._on_delivery if watched else None,
                )
            except BufferError:  # the local queue is full: let it drain
                self._served(self._producer.poll, 0.1)
                self._check()
            except KafkaException as error:
                if error.args[0].code() in _OF_TOPIC:
                    self._failed.setdefault(topic, error.args[0])
                self._give_up(self._cause(error.args[0]))
            else:
                return

    def poll(self) -> None:
        """Let librdkafka log and report.

        Raises:
            LostError: it can't go on.
        """
        self._served(self._producer.poll, 0)

    def commit(self, changed: Callable[[Offsets], Iterable[str]]) -> None:
        """Commit the transaction.

        `changed` is given the offsets of the watched records when all are delivered, before the commit, and returns the
        topics that are no longer those that the records were meant for: then it aborts. A record that was delivered
        before the answer stands in the topic that the answer tells of, so a recreated topic never gets a part of the
        history. It is also asked, without offsets, while records can't be delivered.

        Raises:
            AbortedError, LostError: as the class of each tells.
        """
        deadline = time.monotonic() + _COMMIT_SECONDS
        while self._served(self._producer.flush, _SLICE_SECONDS) and not self._failed:
            self._check()
            self._abort_where_changed(changed({}))
            if time.monotonic() > deadline:
                raise LostError(f"Kafka did not take the records in {_COMMIT_SECONDS:g} s")
        if not self._failed:
            self._abort_where_changed(changed(self._delivered))
        asked = time.monotonic()
        while True:
            try:
                self._producer.commit_transaction(_SLICE_SECONDS)
            except KafkaException as error:
                if error.args[0].txn_requires_abort():
                    self._give_up(error.args[0])
                self._again_or_lost(error, deadline, "commit")
                self._check()
            else:
                self._open = False
                answered = time.monotonic()
                self._rests_until = answered + min(_MARKERS * (answered - asked), _LONGEST_MARKERS_SECONDS)
                return

    def rest(self) -> None:
        """Wait until the markers of the last transaction are written, as far as can be foreseen.

        Kafka answers a commit before they are, and refuses the next transaction until they are; librdkafka then waits
        for 20 ms. Events that come meanwhile go together.
        """
        time.sleep(max(0.0, self._rests_until - time.monotonic()))

    def close(self) -> None:
        """Abort what is open, as far as Kafka lets us at once, and end the producer.

        librdkafka's own end waits until Kafka is back, however long that is. So it comes on a thread of its own: the
        shard goes on, and whoever takes over fences this producer in any case.
        """
        if self._open:
            try:
                self._producer.abort_transaction(3)
            except KafkaException:
                self._producer.purge()  # fenced or out of reach: the successor's init_transactions ends it
        threading.Thread(target=self._end, name="producer-end", daemon=True).start()

    def _end(self) -> None:
        with suppress(KafkaException, SystemError):  # as `_served` tells
            self._producer.close()

    def _served(self, call: Callable[[float], int], seconds: float) -> int:
        """Make a call that serves callbacks, and return what it returns.

        confluent-kafka raises a fatal error amid them, which breaks the delivery that comes next (SystemError).
        """
        try:
            return call(seconds)
        except (KafkaException, SystemError) as error:
            raise LostError(f"Kafka fenced or refused the producer: {error.__cause__ or error}") from error

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        if topic is None:
            return
        if error is None:
            if partition is not None and offset is not None:
                self._delivered[topic, partition] = offset
            return
        self._undelivered.add(topic)
        if error.code() not in _PURGED:
            self._failed.setdefault(topic, error)

    def _abort_where_changed(self, changed: Iterable[str]) -> None:
        topics = sorted(changed)
        if topics:
            self._abort()
            raise AbortedError(f"topics were deleted or created again: {', '.join(topics)}", changed=topics)

    def _cause(self, error: KafkaError) -> KafkaError:
        """Return why no more records are taken, where `error` only says that the transaction has failed already."""
        if error.code() != KafkaError._STATE:
            return error
        try:
            self._producer.commit_transaction(_SLICE_SECONDS)  # refused with the cause
        except KafkaException as refused:
            cause: KafkaError = refused.args[0]
            return cause
        raise LostError(f"librdkafka refused a record and committed nevertheless: {error}")

    def _give_up(self, error: KafkaError) -> None:
        """Abort after a failure and raise what is known of its reason."""
        if error.fatal():
            raise LostError(f"Kafka fenced or refused the producer: {error}")
        lost = None
        try:
            self._abort()
        except LostError as error_of_abort:
            # Kafka knows nothing of a transaction that a topic refused to enter, so that aborting it is fatal
            lost = error_of_abort
        reached = self._control not in self._undelivered
        guilty = {
            topic: found
            for topic, found in self._failed.items()
            if topic != self._control and (found.code() in _OF_TOPIC or (reached and found.code() in _OF_TIME))
        }
        aborted = None
        if self._control in self._failed:
            pass  # without checkpoints nothing goes
        elif guilty or error.code() in _OF_TOPIC:
            aborted = AbortedError(f"Kafka refused records: {error}", guilty=guilty, answer=error)
        if aborted is None or lost is not None:
            raise LostError(f"Kafka refused the transaction: {error}", aborted=aborted) from lost
        raise aborted

    def _abort(self) -> None:
        deadline = time.monotonic() + _ABORT_SECONDS
        while True:
            try:
                self._producer.abort_transaction(_SLICE_SECONDS)
            except KafkaException as error:
                self._again_or_lost(error, deadline, "abort")
            else:
                self._open = False
                return

    def _again_or_lost(self, error: KafkaException, deadline: float, what: str) -> None:
        """Return where the call may be repeated (librdkafka says so, and bounds each by its own time)."""
        answer: KafkaError = error.args[0]
        if answer.fatal() or not answer.retriable() or time.monotonic() > deadline:
            raise LostError(f"Kafka refused to {what}: {answer}") from error
        if what == "initialise transactions":
            self._check()
