"""Readers are handed over to another version while events keep coming, and only the live version waits for that."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from refold.projection.definition import Column, ColumnType, Definition, FoldRule, StreamRef, VersionDefinition
from refold.projection.readstore import Advance, handover

from tests.readstores import Store

INCARNATION = "a" * 16
STREAM = StreamRef(namespace="n", name="aa", incarnation=INCARNATION, partitions=6, topic="a", schema="a")
#: Events a second in each partition, from when the test began.
RATE = 200
DEFINITION = VersionDefinition(
    definition=Definition(
        streams=["aa"], columns=[Column(name="n", type=ColumnType.INTEGER)], fold=[FoldRule(type="T", delete=True)]
    ),
    streams=[STREAM],
)


class Follower(threading.Thread):
    """Applies the events of all partitions in a version, as they come or a `delay` (seconds) later, until it is ended.

    The first one comes at `began` (monotonic seconds).

    Attributes:
        applied: the position that it has reached in each partition.
        longest: how many seconds a batch took at most.
    """

    def __init__(self, store: Store, version: str, began: float, delay: float = 0.0) -> None:
        super().__init__(daemon=True)
        self._rows = store.rows(version=version)
        self._first = began + delay
        self._ended = threading.Event()
        self.applied = 0
        self.longest = 0.0

    def run(self) -> None:
        while not self._ended.wait(0.001):
            began = time.monotonic()
            head = int((began - self._first) * RATE)
            if head > self.applied:
                steps = [
                    Advance(INCARNATION, partition, self.applied, head, None, None, None)
                    for partition in range(STREAM.partitions)
                ]
                self._rows.apply([], [], steps)
                self.applied = head
                self.longest = max(self.longest, time.monotonic() - began)

    def end(self) -> None:
        self._ended.set()
        self.join()
        self._rows.close()


Follow = Callable[..., Follower]


@pytest.fixture
async def follow(store: Store) -> AsyncIterator[Follow]:
    """Starts followers of the live version `v` and the other one, `w`."""
    for version in ("v", "w"):
        await store.make(DEFINITION, version=version)
    begun: list[Follower] = []
    began = time.monotonic()  # so that a version that begins later is behind by the events of this test alone

    def start(version: str, delay: float = 0.0) -> Follower:
        begun.append(Follower(store, version, began, delay))
        begun[-1].start()
        return begun[-1]

    yield start
    for one in begun:
        one.end()


def swap(store: Store) -> Awaitable[bool]:
    return store.admin.try_swap(namespace="n", name="p", version="w")


async def goes_on(one: Follower) -> None:
    before = one.applied
    for _ in range(3000):
        if one.applied != before:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"it stands at {before}")


async def test_readers_are_handed_over_while_events_keep_coming_and_never_go_back(store: Store, follow: Follow) -> None:
    live, other = follow("v"), follow("w", 0.1)  # which is never where the live one is, if nobody waits
    await goes_on(live)
    await goes_on(other)
    seen: list[tuple[str, list[int]]] = []
    ended = asyncio.Event()

    async def read() -> None:
        reads = store.reads()
        await reads.open()
        while not ended.is_set():
            found = await reads.live()
            assert found is not None
            state = await reads.version(*found).state()
            if state.live == found[0]:  # else the pointer moved between the two, and a reader asks again
                seen.append((found[0], [one.position for one in state.partitions]))
        await reads.close()

    reader = asyncio.create_task(read())
    assert any([await swap(store) for _ in range(3)])
    await goes_on(live)
    await goes_on(other)
    await asyncio.sleep(0.1)
    ended.set()
    await reader
    assert [version for version, _ in seen] == sorted(version for version, _ in seen)
    assert {version for version, _ in seen} == {"v", "w"}
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert all(one <= later for one, later in zip(before, after, strict=True))


async def test_while_a_version_comes_near_the_live_one_is_not_held_back(
    store: Store, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "MARK_SECONDS", 60)
    live = follow("v")
    await goes_on(live)
    attempt = asyncio.ensure_future(swap(store))
    await asyncio.sleep(0.1)
    for _ in range(3):
        await goes_on(live)
    assert not attempt.done()
    follow("w")
    assert await attempt


async def test_the_live_version_is_let_go_where_the_other_one_does_not_come(
    store: Store, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "near", lambda _: asyncio.sleep(0, True))
    monkeypatch.setattr(handover, "HELD_SECONDS", 0.5)
    live = follow("v")
    await goes_on(live)
    assert not await swap(store)
    await goes_on(live)
    assert live.longest > 0.4
    other = follow("w")
    await goes_on(other)
    assert await swap(store)
