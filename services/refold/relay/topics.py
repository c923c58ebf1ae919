"""What Kafka says of topics: their ids and partitions."""

from collections.abc import Iterable
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient


@dataclass(frozen=True)
class Topic:
    """A topic as it is now. A topic that was deleted and created again has another id."""

    id: str
    partitions: int


class Topics:
    """Asks a Kafka cluster for topics; one connection, kept."""

    def __init__(self, bootstrap: str) -> None:
        """`bootstrap`: the brokers to ask first."""
        self._admin = AdminClient({"bootstrap.servers": bootstrap})

    def describe(self, names: Iterable[str], *, timeout: float = 5) -> dict[str, Topic | KafkaError]:
        """Return each named topic, or what Kafka says of it alone (missing, unauthorised), in one request.

        Raises:
            KafkaException: the request as a whole failed.
        """
        asked = sorted(set(names))
        result: dict[str, Topic | KafkaError] = {}
        if not asked:
            return result
        for name, future in self._admin.describe_topics(TopicCollection(asked), request_timeout=timeout).items():
            try:
                found = future.result()
                result[name] = Topic(str(found.topic_id), len(found.partitions))
            except KafkaException as error:
                reason: KafkaError = error.args[0]
                if reason.code() < 0 or (reason.retriable() and reason.code() != KafkaError.UNKNOWN_TOPIC_OR_PART):
                    raise
                result[name] = reason
        return result
