"""The partition of a subject is the one that Kafka's default partitioner answers."""

import pytest
from refold.partitioning import murmur2, partition_of

# Source: org.apache.kafka.common.utils.UtilsTest.testMurmur2 (signed 32-bit answers).
vectors = pytest.mark.parametrize(
    ("key", "answer"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)


@vectors
def test_murmur2_answers_kafkas_own_test_vectors(key: bytes, answer: int) -> None:
    assert murmur2(key) == answer % 2**32


@vectors
def test_the_partition_is_the_answer_without_its_sign_bit(key: bytes, answer: int) -> None:
    # org.apache.kafka.common.utils.Utils.toPositive: not the absolute value
    assert partition_of(key.decode(), 7) == (answer + 2**31 if answer < 0 else answer) % 7


def test_every_subject_has_a_partition_in_range() -> None:
    assert {partition_of(f"order-{i}", 6) for i in range(1000)} == set(range(6))
