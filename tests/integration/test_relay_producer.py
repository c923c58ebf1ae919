"""The transactional producer beside a Kafka that is cut off."""

import time

import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from refold.kafka import Brokers, Settings
from refold.relay.producer import TransactionalProducer

from tests.network import kafka_behind


@pytest.mark.parametrize("how", ["cut", "hang"])
def test_its_end_waits_for_no_kafka_that_is_out_of_reach(how: str) -> None:
    with kafka_behind(1) as (broker, (network,)):
        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        for made in admin.create_topics([NewTopic("t", 1, 1), NewTopic("control", 1, 1)]).values():
            made.result(30)
        brokers = Brokers(Settings(kafka_bootstrap=f"127.0.0.1:{network.port}"))

        def producer() -> TransactionalProducer:
            return TransactionalProducer(brokers, "shard", control="control", check=lambda: None)

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
