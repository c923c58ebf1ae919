"""The transactional producer beside a Kafka that is cut off."""

import contextlib
import time

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from refold.kafka import Brokers, Settings
from refold.relay.producer import LostError, TransactionalProducer

from hack.servers import Kafka
from tests.network import kafka_behind


@pytest.mark.parametrize("how", ["cut", "hang"])
def test_its_end_waits_for_no_kafka_that_is_out_of_reach(how: str) -> None:
    with kafka_behind(1) as (broker, (network,)):
        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        for made in admin.create_topics([NewTopic("t", 1, 1), NewTopic("control", 1, 1)]).values():
            made.result(30)
        brokers = Brokers(Settings(kafka_bootstrap=f"127.0.0.1:{network.port}"))

        def producer() -> TransactionalProducer:
            return TransactionalProducer(brokers, ["shard", "shard.1"], control="control", check=lambda: None)

        cut_off = producer()
        cut_off.init(timeout=60)
        cut_off.begin()
        cut_off.send("t", 0, b"key", b"value")
        getattr(network, how)()
        began = time.monotonic()
        cut_off.close()
        # it tries to abort for 3 s; librdkafka's own end took as long as Kafka was away
        assert time.monotonic() - began < 20
        network.heal()
        successor = producer()
        successor.init(timeout=60)
        successor.begin()
        successor.send("t", 0, b"key", b"value")
        successor.commit(lambda _: ())
        successor.close()


def test_who_is_overtaken_half_way_through_its_takeover_writes_nothing(kafka: Kafka) -> None:
    brokers = Brokers(Settings(kafka_bootstrap=kafka.bootstrap))
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    for made in admin.create_topics([NewTopic("overtaken", 1, 1), NewTopic("overtaken.control", 1, 1)]).values():
        made.result(30)

    def producer() -> TransactionalProducer:
        ids = ["overtaken.0", "overtaken.0.1"]
        return TransactionalProducer(brokers, ids, control="overtaken.control", check=lambda: None)

    def write(one: TransactionalProducer, value: str) -> None:
        one.begin()
        one.send("overtaken", 0, b"key", value.encode())
        one.commit(lambda _: ())

    overtaken, owner, successor = producer(), producer(), producer()
    deadline = time.monotonic() + 60
    overtaken._init(overtaken._producers[0], deadline)
    owner.init(timeout=60)
    for value in ("1", "2", "3"):
        write(owner, value)
    overtaken._init(overtaken._producers[1], deadline)  # fences one of the owner's
    with pytest.raises(LostError):
        write(overtaken, "overtaken")
    with pytest.raises(LostError):
        write(owner, "half an owner")
    successor.init(timeout=60)
    for value in ("4", "5"):
        write(successor, value)
    for one in (overtaken, owner, successor):
        one.close()
    assert committed(kafka, "overtaken") == ["1", "2", "3", "4", "5"]


def committed(kafka: Kafka, topic: str) -> list[str]:
    """Return all that stands in partition 0 of a topic."""
    consumer = Consumer({
        "bootstrap.servers": kafka.bootstrap, "group.id": "test", "isolation.level": "read_committed",
        "enable.partition.eof": True,
    })  # fmt: skip
    consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
    found = []
    with contextlib.closing(consumer):
        while (message := consumer.poll(30)) is not None and message.error() is None:
            found.append((message.value() or b"").decode())
    return found
