"""The transactional producer: beside a Kafka that is cut off, and fenced."""

import time

import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from refold.kafka import Brokers, Settings
from refold.relay.producer import LostError, TransactionalProducer

from hack.servers import Kafka
from tests.network import kafka_behind
from tests.relaying import committed


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


def test_who_is_fenced_in_the_middle_of_a_transaction_is_lost_and_nothing_of_it_stands(kafka: Kafka) -> None:
    brokers = Brokers(Settings(kafka_bootstrap=kafka.bootstrap))
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    for made in admin.create_topics([NewTopic("fenced", 1, 1), NewTopic("fenced.control", 1, 1)]).values():
        made.result(30)
    former, owner = (
        TransactionalProducer(brokers, "fenced", control="fenced.control", check=lambda: None) for _ in range(2)
    )

    def begin(one: TransactionalProducer, value: str) -> None:
        one.begin()
        one.send("fenced", 0, b"key", value.encode())

    former.init(timeout=60)
    begin(former, "1")
    former.commit(lambda _: ())
    owner.init(timeout=60)
    begin(former, "a former owner's")
    with pytest.raises(LostError, match="fenced"):
        former.commit(lambda _: ())
    begin(owner, "2")
    owner.commit(lambda _: ())
    for one in (former, owner):
        one.close()
    assert [message.value() for message in committed(kafka, "fenced", at_least=2)] == [b"1", b"2"]
