"""What Kafka says of topics: ids, partitions, settings, high watermarks. One admin client for the process."""

import concurrent.futures
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AclOperation, AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from refold.kafka import Brokers

_SECONDS = 5.0
_MADE_SECONDS = 10.0


@dataclass(frozen=True)
class Topic:
    """A topic as it is now. A topic that was deleted and created again has another id."""

    id: str
    partitions: int
    #: Whether Kafka lets us write to it, where that was asked for.
    writable: bool = True


class Topics:
    """Asks a Kafka cluster for topics. Safe to use from several threads.

    All methods raise KafkaException where Kafka can't be reached or refuses the request as a whole.
    """

    def __init__(self, brokers: Brokers) -> None:
        """Nothing is asked yet of `brokers`."""
        self._admin = AdminClient(brokers.config())

    def describe(self, names: Iterable[str], *, rights: bool = False) -> dict[str, Topic | KafkaError]:
        """Return each named topic, or what Kafka says of it alone (missing, unauthorised), in one request.

        With `rights` it is also asked whether we may write.
        """
        asked = sorted(set(names))
        result: dict[str, Topic | KafkaError] = {}
        if not asked:
            return result
        futures = self._admin.describe_topics(
            TopicCollection(asked), include_authorized_operations=rights, request_timeout=_SECONDS
        )
        while concurrent.futures.wait(futures.values(), timeout=0.5).not_done:
            self._admin.poll(0)  # librdkafka tells in its log why it can't connect
        self._admin.poll(0)
        for name, future in futures.items():
            try:
                found = future.result()
                writable = not rights or AclOperation.WRITE in (found.authorized_operations or ())
                result[name] = Topic(str(found.topic_id), len(found.partitions), writable)
            except KafkaException as error:
                answer: KafkaError = error.args[0]
                if answer.code() not in (
                    KafkaError.UNKNOWN_TOPIC_OR_PART,
                    KafkaError.TOPIC_AUTHORIZATION_FAILED,
                    KafkaError.TOPIC_EXCEPTION,
                ):
                    raise
                result[name] = answer
        return result

    def create(self, name: str, *, partitions: int, replicas: int, config: Mapping[str, str]) -> None:
        """Create a topic and wait until the brokers know it; one that exists is left as it is."""
        topic = NewTopic(name, num_partitions=partitions, replication_factor=replicas, config=dict(config))
        try:
            self._admin.create_topics([topic], request_timeout=_MADE_SECONDS)[name].result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
        deadline = time.monotonic() + _MADE_SECONDS
        while isinstance(self.describe([name])[name], KafkaError) and time.monotonic() < deadline:
            time.sleep(0.05)

    def setting(self, name: str, setting: str) -> str | None:
        """Return a setting of a topic."""
        resource = ConfigResource(ResourceType.TOPIC, name)
        config = self._admin.describe_configs([resource], request_timeout=_SECONDS)[resource].result()
        value: str | None = config[setting].value
        return value

    def high_watermark(self, name: str, partition: int) -> int:
        """Return the high watermark itself, not the last stable offset, which an open transaction holds back."""
        place = TopicPartition(name, partition)
        latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        future = self._admin.list_offsets(
            {place: latest}, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=_SECONDS
        )[place]
        return int(future.result().offset)
