"""Watching events with the library: nothing left out, nothing twice, and nobody waits for a slow reader."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from random import Random

import psycopg
import pytest
from refold import tokens
from refold.events import Event
from refold.eventstore import EventStore, catalog, live
from refold.eventstore.errors import (
    InvalidAppendError,
    OtherHistoryError,
    OverloadedError,
    UnknownStreamError,
)
from refold.eventstore.live import After, LiveEvent
from refold.partitioning import partition_of

from hack.servers import Postgres
from tests.stores import Installed, Log, connected, install


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    """One store for all tests of this module."""
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database watching")
    return await install(postgres.dsn("watching"))


@pytest.fixture(scope="module")
async def store(installed: Installed) -> AsyncIterator[EventStore]:
    async with await EventStore.open(installed.service) as opened:
        yield opened


@pytest.fixture(scope="module")
async def other(installed: Installed) -> AsyncIterator[EventStore]:
    """Another store on the same database, as another process has it."""
    async with await EventStore.open(installed.service) as opened:
        yield opened


_numbers = itertools.count(1)


@pytest.fixture
async def log(installed: Installed, store: EventStore) -> Log:
    """A new active stream of three partitions."""
    return Log(installed, store, await installed.stream(f"orders-{next(_numbers)}"))


def watch(
    log: Log, what: str | int | None, after: After = 0, store: EventStore | None = None
) -> AsyncIterator[LiveEvent]:
    """Watch a subject (a text), a partition (a number) or the whole stream."""
    found = store or log.store
    if what is None:
        return found.watch_stream("shop", log.stream.name, after=after)
    if isinstance(what, int):
        return found.watch_partition("shop", log.stream.name, what, after=after)
    return found.watch_subject("shop", log.stream.name, what, after=after)


async def take(events: AsyncIterator[LiveEvent], count: int) -> list[LiveEvent]:
    """Take so many; more that come are an error of the test's next look, not of this one."""
    async with asyncio.timeout(30):
        return [await anext(events) for _ in range(count)]


def ids(found: list[LiveEvent]) -> list[str]:
    return [one.event.id for one in found]


async def nothing_comes(events: AsyncIterator[LiveEvent]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await anext(events)


@pytest.mark.parametrize("what", ["s", partition_of("s", 3), None])
async def test_the_history_comes_first_and_then_what_is_appended_here_or_elsewhere(
    log: Log, other: EventStore, what: str | int | None
) -> None:
    await log.append("s", "1", "2")
    async with contextlib.aclosing(watch(log, what)) as events:
        assert ids(await take(events, 2)) == ["1", "2"]
        await log.append("s", "3")
        assert ids(await take(events, 1)) == ["3"]
        await Log(log.installed, other, log.stream).append("s", "4", "5")
        found = await take(events, 2)
        assert ids(found) == ["4", "5"]
    read = await log.read("s")
    assert found[-1].event == read[-1]


@pytest.mark.parametrize("what", ["s", partition_of("s", 3), None])
async def test_a_watch_goes_on_after_any_of_its_tokens_and_after_now(log: Log, what: str | int | None) -> None:
    await log.append("before", "0")
    last = await log.append("s", "1", "2", "3", "4")
    async with contextlib.aclosing(watch(log, what)) as events:
        found = [one for one in await take(events, 5 if what is None else 4) if one.event.subject == "s"]
    assert ids(found) == ["1", "2", "3", "4"]
    for number, one in enumerate(found):
        async with contextlib.aclosing(watch(log, what, one.token)) as events:
            assert [name for name in ids(await take(events, 3 - number)) if name != "0"] == ["2", "3", "4"][number:]
    for after in ("now", found[-1].token) if what is None else ("now", found[-1].token, last.token):
        async with contextlib.aclosing(watch(log, what, after)) as events:
            await nothing_comes(events)
    async with contextlib.aclosing(watch(log, what, "now")) as events:
        coming = asyncio.create_task(take(events, 1))
        while not log.store._live._tails:  # noqa: ASYNC110 (until it watches)
            await asyncio.sleep(0.01)
        await log.append("s", "5")
        assert ids(await coming) == ["5"]


async def test_a_watch_goes_on_after_a_number(log: Log) -> None:
    await log.append("a", "a1", "a2")
    place = await log.append("b", "b1", "b2", "b3")
    async with contextlib.aclosing(watch(log, "b", 1)) as events:
        assert ids(await take(events, 2)) == ["b2", "b3"]
    async with contextlib.aclosing(watch(log, place.partition, place.position - 1)) as events:
        assert ids(await take(events, 1)) == ["b3"]
    for what, after in (("b", 4), ("b", -1), ("b", 2**70), (place.partition, place.position + 1)):
        with pytest.raises(OtherHistoryError, match="yet"):
            await anext(watch(log, what, after))
    with pytest.raises(tokens.InvalidTokenError):
        await anext(watch(log, None, 1))


async def test_what_is_no_place_in_this_history_is_refused(log: Log, installed: Installed) -> None:
    appended = await log.append("s", "1")
    stranger = Log(installed, log.store, await installed.stream(f"{log.stream.name}-else"))
    foreign = (await stranger.append("s", "1")).token
    beyond = tokens.encode([tokens.Position(log.stream.incarnation, appended.partition, 2)])
    elsewhere = tokens.encode([tokens.Position(log.stream.incarnation, (appended.partition + 1) % 3, 0)])
    for what in ("s", appended.partition, None):
        with pytest.raises(OtherHistoryError, match="made again"):
            await anext(watch(log, what, foreign))
        with pytest.raises(OtherHistoryError, match="backup"):
            await anext(watch(log, what, beyond))
        with pytest.raises(tokens.InvalidTokenError):
            await anext(watch(log, what, "nonsense"))
    with pytest.raises(tokens.InvalidTokenError, match="names no position"):
        await anext(watch(log, "s", elsewhere))
    with pytest.raises(UnknownStreamError, match="0 to 2"):
        await anext(watch(log, 3))
    with pytest.raises(UnknownStreamError):
        await anext(log.store.watch_stream("shop", "nothing"))
    with pytest.raises(InvalidAppendError):
        await anext(watch(log, ""))


async def _appends(log: Log, stores: list[EventStore], random: Random, count: int) -> None:
    """Append `count` events of ten subjects at both stores at once."""

    async def some(store: EventStore, numbers: range) -> None:
        for number in numbers:
            size = random.choice([1, 1, 1, 5])
            await Log(log.installed, store, log.stream).append(
                f"subject-{random.randrange(10)}", *(f"{number}-{part}" for part in range(size))
            )
            if random.random() < 0.1:
                await asyncio.sleep(random.random() * 0.02)

    await asyncio.gather(*(some(one, range(at, count, 2)) for at, one in enumerate(stores)))


@pytest.mark.parametrize("seed", range(2))
async def test_readers_of_any_speed_get_each_event_once_and_in_order_while_two_processes_append(
    log: Log, other: EventStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little may wait for a reader, so slow ones fall behind and catch up all the time; each leaves and resumes."""
    monkeypatch.setattr(live, "WAITING_EVENTS", 4)
    random = Random(seed)
    writers = asyncio.create_task(_appends(log, [log.store, other], random, 300))

    async def read(what: str | int | None, store: EventStore, slow: bool) -> list[Event]:
        found: list[Event] = []
        after: After = 0
        while True:
            async with contextlib.aclosing(watch(log, what, after, store)) as events:
                for _ in range(random.randrange(1, 80)):
                    over = writers.done()
                    try:
                        async with asyncio.timeout(0.3):
                            one = await anext(events)
                    except TimeoutError:
                        if over:
                            return found
                        break
                    found.append(one.event)
                    after = one.token
                    if slow and random.random() < 0.2:
                        await asyncio.sleep(0.01)

    wanted = [None, None, 0, 1, 2, *(f"subject-{n}" for n in range(4))]
    readers = [read(what, random.choice([log.store, other]), slow) for what in wanted for slow in (False, True)]
    results = await asyncio.gather(*readers)
    await writers
    for what, found in zip([what for what in wanted for _ in range(2)], results, strict=True):
        history = [
            one for partition in range(3)
            async for one in log.store.read_partition("shop", log.stream.name, partition)
        ]  # fmt: skip
        if isinstance(what, int):
            history = [one for one in history if one.partition == what]
        elif what is not None:
            history = [one for one in history if one.subject == what]
        assert sorted(found, key=lambda one: one.partition) == history  # stable: in each partition as they came


async def test_a_reader_that_stops_reading_holds_little_and_the_others_and_appends_go_on(log: Log) -> None:
    """In the end it has got everything too."""
    behind = live.metrics.LIVE_BEHIND._value.get()
    slow = await log.store.watch("shop", log.stream.name, 0)
    assert await slow.next(0.05) == []  # it is up to date, and now it stops
    async with contextlib.aclosing(watch(log, None)) as events:
        coming = asyncio.create_task(take(events, 4000))
        for batch in range(40):
            await log.append(f"s{batch % 7}", *(f"{batch}-{n}" for n in range(100)))
        assert len(await coming) == 4000
    assert slow._held <= 1000
    assert live.metrics.LIVE_BEHIND._value.get() > behind
    found: list[LiveEvent] = []
    while len(found) < 4000:
        page = await slow.next(5)
        assert page
        found += page
    slow.close()
    assert len({(one.event.partition, one.event.position) for one in found}) == 4000


async def test_all_readers_share_one_look_at_the_heads(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "POLL", 0.05)
    readers = [await log.store.watch("shop", log.stream.name, 0, subject=f"s{n}") for n in range(100)]
    for reader in readers:
        assert await reader.next(0.01) == []

    async def transactions() -> int:
        ((count,),) = await log.installed.query(
            "select xact_commit from pg_stat_database where datname = current_database()"
        )
        return int(count)

    # A session tells its counts a second after its last transaction, or ten: what the readers asked at their
    # start may be told in any of the first seconds. Asked for each reader, it would be 2,000 in every second.
    for _ in range(15):
        before = await transactions()
        await asyncio.sleep(1.1)
        if 5 < await transactions() - before < 50:
            break
    else:
        pytest.fail("in no second did the readers share their looks at the heads")
    for reader in readers:
        reader.close()


async def test_the_readers_are_bounded_and_end_with_the_store(log: Log) -> None:
    async with await EventStore.open(log.installed.service, live_readers=2) as small:
        first = await small.watch("shop", log.stream.name, 0)
        second = await small.watch("shop", log.stream.name, 0, subject="s")
        with pytest.raises(OverloadedError, match="2 readers"):
            await small.watch("shop", log.stream.name, 0)
        second.close()
        with pytest.raises(UnknownStreamError):  # a refusal takes no place
            await small.watch("shop", log.stream.name, 0, partition=9)
        third = await small.watch("shop", log.stream.name, 0)
        waiting = [asyncio.create_task(one.next()) for one in (first, third)]
        await asyncio.sleep(0)
        small.end_watches()
        assert await asyncio.gather(*waiting) == [None, None]
        with pytest.raises(OverloadedError, match="stopping"):
            await small.watch("shop", log.stream.name, 0)


async def test_readers_of_a_stream_that_is_dropped_are_told_and_its_tokens_are_refused_by_a_new_one(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "POLL", 0.1)
    await log.append("s", "1", "2")
    async with contextlib.aclosing(watch(log, "s")) as events:
        last = (await take(events, 2))[-1].token
        assert log.stream.uid is not None
        async with connected(log.installed.admin) as conn:
            await catalog.drop_stream(conn, namespace="shop", name=log.stream.name, uid=log.stream.uid)
        await log.installed.stream(log.stream.name)
        with pytest.raises(UnknownStreamError):
            await take(events, 1)
    with pytest.raises(OtherHistoryError, match="made again"):
        await anext(watch(log, "s", last))
    await log.append("s", "new")
    async with contextlib.aclosing(watch(log, "s")) as events:
        assert ids(await take(events, 1)) == ["new"]


async def test_lost_notifications_and_a_lost_connection_cost_a_moment_and_no_event(
    log: Log, other: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "POLL", 0.1)
    async with contextlib.aclosing(watch(log, "s", 0, other)) as events:
        for number in range(5):
            await log.installed.run(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where application_name = 'refold-eventstore-live'"
            )
            await log.append("s", str(number))
            assert ids(await take(events, 1)) == [str(number)]
