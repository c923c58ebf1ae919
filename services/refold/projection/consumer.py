"""The projector's side of Kafka: a member of the version's consumer group that reads committed records only.

Kafka decides who has which partition (cooperative-sticky: what stays isn't interrupted). Where reading begins is
decided by the projector from the read store's positions: a new partition arrives paused, and `start` seeks and resumes
it. Offsets are committed to Kafka only for lag tools; nothing is ever read from them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import structlog
from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, Message, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from refold.kafka import Brokers

log = structlog.get_logger(__name__)

#: Seconds that a question to the brokers may take.
_ANSWER_SECONDS = 5.0

#: A topic's partition.
Place = tuple[str, int]


class KafkaUnavailableError(Exception):
    """Kafka can't be reached, or didn't answer as it should; it may come back."""


class Offsets(msgspec.Struct, frozen=True):
    """Which offsets a partition of a topic with this id holds: from `low` to before `high`."""

    topic_id: str
    low: int
    high: int


class TopicConsumer:
    """A consumer in a group. For one thread; the callbacks are called in `poll` and `close`."""

    def __init__(
        self,
        *,
        brokers: Brokers,
        group: str,
        topics: Iterable[str],
        session_seconds: int,
        on_assigned: Callable[[list[Place]], None],
        on_revoked: Callable[[list[Place]], None],
    ) -> None:
        """Join the group with the first `poll`.

        Args:
            brokers: the cluster.
            group: the consumer group.
            topics: those to share out among the group's members.
            session_seconds: without a heartbeat for so long, Kafka gives the partitions to others.
            on_assigned: told of new partitions; they are paused.
            on_revoked: told of partitions that are no longer this process's, or were lost.
        """
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._brokers = brokers
        self._admin = AdminClient({**brokers.config(), "socket.timeout.ms": 10_000})
        self._consumer = Consumer(
            {
                **brokers.config(),
                "group.id": group,
                "isolation.level": "read_committed",
                "partition.assignment.strategy": "cooperative-sticky",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                # only where the retention passed a reader: what it misses is read from the event store
                "auto.offset.reset": "earliest",
                "enable.partition.eof": True,
                "session.timeout.ms": session_seconds * 1000,
                "heartbeat.interval.ms": min(3000, session_seconds * 1000 // 3),
                "socket.timeout.ms": 10_000,
                "topic.metadata.refresh.interval.ms": 30_000,
                "queued.max.messages.kbytes": 32_768,
                "fetch.queue.backoff.ms": 20,
                # the broker answers as soon as there is a byte, and waits so long for one
                "fetch.wait.max.ms": 500,
                "on_commit": _on_commit,
            }
        )
        self._consumer.subscribe(list(topics), on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked)

    def poll(self, limit: int, timeout: float) -> list[Message]:
        """Wait at most `timeout` seconds for a record, then return those at hand, at most `limit`; errors are logged.

        The end of a partition comes as a message with the error `_PARTITION_EOF`, and its offset is past transaction
        markers.
        """
        messages = self._consumer.consume(1, timeout)
        if messages and limit > 1:
            messages += self._consumer.consume(limit - 1, 0)
        return [message for message in messages if _useful(message)]

    def offsets(self, places: Sequence[Place]) -> dict[Place, Offsets]:
        """Return what the topics hold now.

        Raises:
            KafkaUnavailableError: Kafka doesn't answer, or a topic doesn't exist.
        """
        try:
            topics = sorted({topic for topic, _ in places})
            described = self._admin.describe_topics(TopicCollection(topics), request_timeout=_ANSWER_SECONDS)
            ids = {topic: str(described[topic].result(_ANSWER_SECONDS + 1).topic_id) for topic in topics}
            found = {}
            for place in places:
                low, high = self._consumer.get_watermark_offsets(TopicPartition(*place), _ANSWER_SECONDS)
                found[place] = Offsets(ids[place[0]], low, high)
        except (KafkaException, TimeoutError) as error:
            trouble = self._brokers.trouble()
            why = error if trouble is None else f"{error}; {trouble.message}"
            raise KafkaUnavailableError(f"asking Kafka which offsets {topics} hold: {why}") from error
        finally:
            self._admin.poll(0)  # its log is heard here
        return found

    def start(self, place: Place, offset: int) -> bool:
        """Read a partition from `offset` on; False where Kafka's client isn't ready for it yet: try again soon."""
        try:
            self._consumer.seek(TopicPartition(*place, offset))
            self._consumer.resume([TopicPartition(*place)])
        except KafkaException as error:
            log.debug("Can't seek yet", topic=place[0], partition=place[1], error=str(error))
            return False
        return True

    def pause(self, places: Iterable[Place]) -> None:
        """Stop reading the partitions until they are started again."""
        try:
            self._consumer.pause([TopicPartition(*place) for place in places])
        except KafkaException as error:  # no longer assigned: nothing is read from it anyway
            log.debug("Can't pause", error=str(error))

    def commit(self, offsets: Mapping[Place, int], *, wait: bool = False) -> None:
        """Commit offsets to Kafka, for lag tools; a failure is logged only."""
        if not offsets:
            return
        try:
            found = [TopicPartition(*place, offset) for place, offset in offsets.items()]
            if wait:
                self._consumer.commit(offsets=found, asynchronous=False)
            else:
                self._consumer.commit(offsets=found)
        except KafkaException as error:
            log.info("Offsets weren't committed to Kafka", error=str(error))

    def close(self) -> None:
        """Leave the group."""
        self._consumer.close()

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign([TopicPartition(one.topic, one.partition, OFFSET_END) for one in partitions])
        consumer.pause(partitions)
        self._on_assigned([(one.topic, one.partition) for one in partitions])

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._on_revoked([(one.topic, one.partition) for one in partitions])
        consumer.incremental_unassign(partitions)


def _useful(message: Message) -> bool:
    error = message.error()
    if error is None or error.code() == KafkaError._PARTITION_EOF:
        return True
    log.warning("Kafka reports an error", topic=message.topic(), partition=message.partition(), error=error.str())
    return False


def _on_commit(error: KafkaError | None, _: list[TopicPartition]) -> None:
    if error is not None:
        log.info("Offsets weren't committed to Kafka", error=str(error))
