"""Where a stream's relaying begins, what is read next, and how it falls back and recovers after failures."""

import dataclasses

import pytest
from refold.relay.checkpoint import Checkpoint, CheckpointTopicError, decode, encode
from refold.relay.progress import FULL_BATCH, Progress, Refusal, place, wants
from refold.relay.source import Stream
from refold.relay.topics import Topic

STREAM = Stream(7, "shop", "orders", "0123456789abcdef", "shop.orders", 3, "shop.orders")
TOPIC = Topic("topic-a", 3)


def at(*positions: int, topic_id: str = "topic-a") -> dict[tuple[str, int], Checkpoint]:
    return {(STREAM.incarnation, partition): Checkpoint(n, topic_id) for partition, n in enumerate(positions)}


def progress(heads: tuple[int, ...], positions: list[int], number: int = 7) -> Progress:
    return Progress(dataclasses.replace(STREAM, number=number), heads, TOPIC, positions)


def test_a_stream_goes_on_after_its_checkpoints_and_from_the_beginning_where_there_is_none() -> None:
    assert place(STREAM, TOPIC, {}) == [0, 0, 0]
    assert place(STREAM, TOPIC, at(4, 5)) == [4, 5, 0]


def test_a_checkpoint_of_another_incarnation_does_not_count() -> None:
    assert place(dataclasses.replace(STREAM, incarnation="f" * 16), TOPIC, at(4, 5, 6)) == [0, 0, 0]


def test_a_topic_of_another_id_is_filled_from_the_beginning() -> None:
    assert place(STREAM, Topic("topic-b", 3), at(4, 5, 6)) == [0, 0, 0]


def test_partitions_that_were_added_to_the_topic_are_ignored_and_missing_ones_refused() -> None:
    assert place(STREAM, Topic("topic-a", 4), at(4, 5, 6)) == [4, 5, 6]
    refusal = place(STREAM, Topic("topic-a", 2), at(4, 5, 6))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "TooFewPartitions"


def test_a_stream_that_was_seen_behind_stays_refused_until_the_topic_is_another() -> None:
    checkpoints = at(4, 5, 6) | {(STREAM.incarnation, 1): Checkpoint(5, "topic-a", behind=True)}
    refusal = place(STREAM, TOPIC, checkpoints)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "StoreBehindTopic"
    assert place(STREAM, Topic("topic-b", 3), checkpoints) == [0, 0, 0]


def test_only_waiting_partitions_are_read_each_after_its_position_and_up_to_its_head() -> None:
    found = wants([progress((4, 9, 6), [4, 5, 0])], 100, partitions=64)
    assert [(want.partition, want.after, want.limit) for want in found] == [(1, 5, 4), (2, 0, 6)]


def test_a_batch_is_shared_evenly_and_bounded_in_events_and_partitions() -> None:
    members = [progress((1000, 1000, 1000), [0, 0, 0], number) for number in range(4)]
    assert [want.limit for want in wants(members, 600, partitions=64)] == [50] * 12
    assert len(wants(members, 600, partitions=5)) == 5
    assert [want.limit for want in wants(members, 1, partitions=64)] == [1]
    assert wants([progress((4, 5, 6), [4, 5, 6])], 600, partitions=64) == []


def test_heads_below_the_positions_are_told_and_are_not_waiting() -> None:
    known = progress((4, 3, 9), [4, 5, 6])
    assert known.behind == [1]
    assert known.waiting == 3


def test_a_refused_stream_is_tried_alone_and_grows_back_with_success() -> None:
    known = progress((9, 9, 9), [0, 0, 0])
    assert known.ready(0)
    assert not known.alone
    known.refuse(Refusal("RecordTooLarge", ""), retry_at=10)
    assert not known.ready(9)
    assert not known.due(9)
    assert known.ready(10)
    assert known.due(10)
    assert known.alone
    assert known.batch == 1
    known.accept()
    known.grow()
    assert known.alone
    while known.batch < FULL_BATCH:
        before = known.batch
        known.grow()
        assert known.batch > before
    assert not known.alone


def test_a_checkpoint_survives_its_record() -> None:
    for checkpoint in (Checkpoint(5, "topic-a"), Checkpoint(5, "topic-a", behind=True)):
        assert decode(*encode("0123456789abcdef", 2, checkpoint)) == ("0123456789abcdef", 2, checkpoint)
    assert encode("f", 2, Checkpoint(5, "t"))[1] == b'{"position":5,"topic_id":"t"}'


@pytest.mark.parametrize(
    ("key", "value"), [(b"f", b"{}"), (b"f/x", b'{"position":5,"topic_id":"t"}'), (b"f/1", b'{"position":"5"}')]
)
def test_a_foreign_record_in_the_checkpoint_topic_is_an_error(key: bytes, value: bytes) -> None:
    with pytest.raises(CheckpointTopicError):
        decode(key, value)


def test_a_record_is_proven_to_stand_in_the_topic_only_by_a_known_one_before_it() -> None:
    known = progress((5, 5, 5), [0, 0, 0])
    assert not known.proven(0, 7)
    known.offsets[0] = 6
    assert known.proven(0, 7)
    assert not known.proven(0, 6)
    assert not known.proven(0, 0)
    assert not known.proven(0, None)
    assert not known.proven(1, 7)
    known.placed(TOPIC, [0, 0, 0])
    assert not known.proven(0, 7)
    known.offsets[0] = 6
    assert not known.dropped().proven(0, 7)


def test_the_events_that_stand_in_a_topic_prove_what_comes_after_them_until_a_transaction_is_aborted() -> None:
    known = progress((9, 9, 9), [0, 0, 0])
    known.placed(TOPIC, [5, 0, 1])
    # five events have the offsets 0 to 4 at least: a record that got 5 can't stand in a topic that was created again
    assert known.proven(0, 5)
    assert not known.proven(0, 4)
    assert not known.proven(1, 0)
    assert known.proven(2, 1)
    assert not known.proven(2, 0)
    # its records may be what the later ones come after, in a topic that was created again meanwhile
    known.doubt()
    assert [known.proven(partition, 1_000) for partition in range(3)] == [False, False, False]
