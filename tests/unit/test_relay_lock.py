"""Who holds how many shards, and when a lock is freed: only after the shard was left."""

import time

from refold.relay.lock import Locks, surplus


def locks(held: int) -> tuple[Locks, list[int]]:
    """A process that holds so many of 8 shards, and the list of those that it is told have changed."""
    changed: list[int] = []
    made = Locks(8, changed=changed.append)
    made.settle(range(held), relays=1, beat=time.monotonic())
    changed.clear()
    return made, changed


def test_what_is_beyond_the_share_is_given_up_and_the_choice_is_kept() -> None:
    assert surplus(range(8), frozenset(), 4) == {4, 5, 6, 7}
    assert surplus(range(8), frozenset({0}), 6) == {0, 7}
    assert surplus(range(3), frozenset(), 4) == frozenset()
    assert surplus(range(3), frozenset({1}), 3) == frozenset()


def test_a_lock_is_freed_when_its_shard_was_left_and_not_before() -> None:
    found, changed = locks(8)
    assert found.settle([], relays=2, beat=time.monotonic()) == frozenset()
    assert sorted(changed) == [4, 5, 6, 7]
    assert found.holds(5)
    assert not found.wants(5)
    found.leave(5)
    assert found.unsettled
    assert found.settle([], relays=2, beat=time.monotonic()) == {5}
    assert not found.holds(5)
    assert not found.unsettled


def test_a_shard_that_is_not_to_be_given_up_is_not_freed_although_nothing_works_on_it() -> None:
    found, _ = locks(8)
    found.leave(1)
    found.settle([], relays=2, beat=time.monotonic())
    found.leave(7)
    assert found.settle([], relays=1, beat=time.monotonic()) == frozenset()
    assert found.wants(7)
    assert found.settle([], relays=2, beat=time.monotonic()) == frozenset(), "it has to be left anew"


def test_a_process_that_ends_frees_each_shard_as_it_is_left() -> None:
    found, _ = locks(3)
    found.close()
    found.leave(2)
    assert found.unsettled
    assert found.settle([], relays=1, beat=time.monotonic()) == {2}
    assert found.held == {0, 1}
    assert not found.wants(0)


def test_nothing_is_held_without_a_heartbeat_or_a_session() -> None:
    found, _ = locks(8)
    found.settle([], relays=1, beat=time.monotonic() - 4.5)
    assert not found.holds(0)
    assert not found.alive
    found.settle([], relays=1, beat=time.monotonic())
    assert found.holds(0)
    found.lost()
    assert not found.holds(0)
