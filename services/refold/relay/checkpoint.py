"""Checkpoints: how far each partition of each stream has been relayed, in Kafka beside the events themselves.

A shard's checkpoints stand in the partition of the checkpoint topic with the shard's number. They are written in the
transactions that hold the events, so both are committed or neither. The topic is compacted: of each key the latest
record stays.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from refold import names
from refold.kafka import Brokers
from refold.relay.topics import Topics

_CONFIG = {
    "cleanup.policy": "compact",
    # A busy shard writes a checkpoint for every transaction; small segments are compacted soon, so that taking over
    # reads little: at most about this much besides the latest records.
    "segment.bytes": str(8 << 20),
    "min.cleanable.dirty.ratio": "0.1",
    # Also bounds how long the markers of compacted transactions stay.
    "delete.retention.ms": "60000",
}


class CheckpointTopicError(Exception):
    """The checkpoint topic can't be used as it is; the message says what a person can do."""


class Checkpoint(msgspec.Struct, frozen=True, omit_defaults=True):
    """The last position that stands in the topic with this Kafka id."""

    position: int
    topic_id: str
    #: The store was once seen behind this position (restored from a backup): nothing more is relayed to this topic.
    behind: bool = False


#: By stream incarnation and partition.
Checkpoints = dict[tuple[str, int], Checkpoint]

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Checkpoint)


def encode(incarnation: str, partition: int, checkpoint: Checkpoint) -> tuple[bytes, bytes]:
    """Return key and value of a checkpoint's record."""
    return f"{incarnation}/{partition}".encode(), _encoder.encode(checkpoint)


def decode(key: bytes, value: bytes) -> tuple[str, int, Checkpoint]:
    """Return incarnation, partition and checkpoint of a record.

    Raises:
        CheckpointTopicError: the relay didn't write it.
    """
    try:
        incarnation, partition = key.decode().split("/")
        return incarnation, int(partition), _decoder.decode(value)
    except (ValueError, msgspec.DecodeError) as error:
        raise CheckpointTopicError(
            f"the checkpoint topic holds a record that isn't a checkpoint (key {key!r}: {error}); "
            "nothing but the relay may write to it"
        ) from error


class CheckpointTopic:
    """The checkpoint topic of a store, created where it is missing. Safe to use from several threads."""

    def __init__(self, topics: Topics, name: str, *, shards: int, replicas: int) -> None:
        """`shards` is the number of partitions; `replicas` counts only when the topic is created."""
        self._topics, self._name, self._shards, self._replicas = topics, name, shards, replicas
        self._lock = threading.Lock()

    def ensure(self) -> str:
        """Return the topic's name when it exists and is as it must be.

        Raises:
            CheckpointTopicError: it has another number of partitions, isn't compacted or may not be written to.
            KafkaException: Kafka can't be reached or refuses.
        """
        with self._lock:
            found = self._topics.describe([self._name], rights=True)[self._name]
            if isinstance(found, KafkaError) and found.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                self._topics.create(self._name, partitions=self._shards, replicas=self._replicas, config=_CONFIG)
                found = self._topics.describe([self._name], rights=True)[self._name]
            if isinstance(found, KafkaError):
                raise KafkaException(found)
            if not found.writable:
                raise CheckpointTopicError(f"Kafka doesn't let the relay write to the checkpoint topic {self._name}")
            if found.partitions != self._shards:
                raise CheckpointTopicError(
                    f"the checkpoint topic {self._name} has {found.partitions} partitions, but REFOLD_RELAY_SHARDS is "
                    f"{self._shards}: the number of shards is fixed for a store, set it to the former number"
                )
            policy = self._topics.setting(self._name, "cleanup.policy")
            if policy != "compact":
                raise CheckpointTopicError(
                    f"the checkpoint topic {self._name} has cleanup.policy {policy!r} and would lose positions: set it "
                    "to 'compact'"
                )
        return self._name


def load(
    brokers: Brokers, topic: str, shard: int, *, end: int, timeout: float, check: Callable[[], None]
) -> Checkpoints:
    """Read the checkpoints of a shard, up to `end`, committed ones only.

    `end` is the partition's high watermark, asked for after `init_transactions`, which ends every transaction of a
    former owner: then nothing below it is undecided, and nobody else can write. `check` is called between waits and
    raises to give up.

    Raises:
        TimeoutError: `end` wasn't reached in `timeout` seconds, e.g. since a transaction hangs.
        KafkaException: Kafka can't be reached or refuses.
        CheckpointTopicError: there is a record that the relay didn't write.
    """
    deadline = time.monotonic() + timeout
    found: Checkpoints = {}
    if end == 0:
        return found
    consumer = Consumer(
        {
            **brokers.config(),
            "group.id": names.RELAY_GROUP,  # required, but never joined: the partition is assigned by hand
            "isolation.level": "read_committed",
            "auto.offset.reset": "error",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 50,
        }
    )
    try:
        low, _ = consumer.get_watermark_offsets(TopicPartition(topic, shard), timeout=10)
        consumer.assign([TopicPartition(topic, shard, low)])
        while True:
            for message in consumer.consume(10_000, timeout=0.05):
                error = message.error()
                if error is None:
                    key, value = message.key(), message.value()
                    if key is not None and value is not None:
                        incarnation, partition, checkpoint = decode(key, value)
                        found[incarnation, partition] = checkpoint
                    if (message.offset() or 0) + 1 >= end:
                        return found
                elif error.code() == KafkaError._PARTITION_EOF:
                    if (message.offset() or 0) >= end:
                        return found
                elif not error.retriable() and error.code() != KafkaError._TRANSPORT:
                    raise KafkaException(error)
            check()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"reading checkpoints: partition {shard} of {topic} wasn't read up to its high watermark {end} in "
                    f"{timeout:g} s; a transaction may hang there (kafka-transactions.sh find-hanging)"
                )
    finally:
        with suppress(KafkaException):
            consumer.close()
