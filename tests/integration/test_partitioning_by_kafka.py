"""Kafka's own partitioner is the oracle: subjects stand where any producer with that partitioner would put them."""

import random
import uuid
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from refold.partitioning import partition_of

from hack.servers import Kafka


def subjects() -> list[str]:
    """Return subjects of every length from 1 byte on, of ASCII and of characters of 2 to 4 bytes."""
    draw = random.Random()
    alphabet = "az09-/ éß日本\U0001f600"
    found = ["".join(draw.choices(alphabet, k=length)) for length in range(1, 65) for _ in range(15)]
    return [*found, *(str(uuid.uuid4()) for _ in range(200)), "x" * 512]


@pytest.mark.parametrize("partitions", [6, 7])
def test_a_subject_s_partition_is_the_one_that_kafkas_partitioner_chooses(kafka: Kafka, partitions: int) -> None:
    topic = f"partitioner-{partitions}"
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.create_topics([NewTopic(topic, partitions, 1)])[topic].result(30)
    # murmur2 is what librdkafka calls the default of Kafka's Java client
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "partitioner": "murmur2"})
    chosen: dict[str, int] = {}

    def delivered(error: Any, message: Any) -> None:
        assert error is None
        chosen[message.key().decode()] = message.partition()

    asked = set(subjects())
    for subject in asked:
        producer.produce(topic, key=subject.encode(), on_delivery=delivered)
    assert producer.flush(30) == 0
    assert chosen == {subject: partition_of(subject, partitions) for subject in asked}
    assert set(chosen.values()) == set(range(partitions))
