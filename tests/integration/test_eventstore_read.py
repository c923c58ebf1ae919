"""Reads of subjects and partitions: both directions, their bounds, page borders, and histories that are replaced."""

import datetime as dt
import itertools
from collections.abc import AsyncIterator
from random import Random

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refold.eventstore import EventStore, catalog, reads
from refold.eventstore.errors import InvalidAppendError, UnknownStreamError
from refold.partitioning import partition_of

from hack.servers import Postgres
from tests.stores import Installed, Log, connected, event, install


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    """One store for all tests of this module."""
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database reading")
    return await install(postgres.dsn("reading"))


@pytest.fixture(scope="module")
async def store(installed: Installed) -> AsyncIterator[EventStore]:
    async with await EventStore.open(installed.service) as opened:
        yield opened


_numbers = itertools.count(1)


@pytest.fixture
async def log(installed: Installed, store: EventStore) -> Log:
    """A new active stream of three partitions."""
    return Log(installed, store, await installed.stream(f"orders-{next(_numbers)}"))


@pytest.fixture(scope="module")
async def thirty(installed: Installed, store: EventStore) -> Log:
    """A stream whose subject `s` has 30 events, ten an append, between those of others."""
    log = Log(installed, store, await installed.stream("thirty"))
    for batch in range(3):
        await log.append("other", f"{batch}")
        await log.append("s", *(f"{batch}-{n}" for n in range(10)))
    return log


bounds = st.none() | st.integers(0, 33) | st.sampled_from([2**53, 2**63 - 1, 2**63, 2**70])


@given(
    first=st.integers(-1, 33) | st.sampled_from([2**63 - 1, 2**63]),
    last=bounds,
    until=st.none() | st.integers(-1, 3),
    limit=bounds,
    backward=st.booleans(),
    page=st.integers(1, 12),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_read_gives_exactly_what_is_in_its_bounds_in_both_directions_whatever_the_page(
    thirty: Log, first: int, last: int | None, until: int | None, limit: int | None, backward: bool, page: int
) -> None:
    every = await thirty.read("s")
    assert [one.revision for one in every] == list(range(1, 31))
    time = None if until is None else every[0].time - dt.timedelta(microseconds=1)
    if until is not None and until >= 0:
        time = every[min(until * 10, 29)].time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads, "FIRST_PAGE_EVENTS", page)
        patch.setattr(reads, "PAGE_EVENTS", 2 * page)
        found = await thirty.read(
            "s", from_revision=first, to_revision=last, until=time, limit=limit, backward=backward
        )
    wanted = [
        one
        for one in every
        if first <= one.revision and (last is None or one.revision <= last) and (time is None or one.time <= time)
    ]
    assert found == (wanted[::-1] if backward else wanted)[:limit]


async def test_a_time_that_no_calendar_in_utc_has_is_before_or_after_all(thirty: Log) -> None:
    zone = dt.timezone(dt.timedelta(hours=14))
    assert await thirty.read("s", until=dt.datetime.min.replace(tzinfo=zone)) == []
    assert len(await thirty.read("s", until=dt.datetime.max.replace(tzinfo=dt.timezone(-dt.timedelta(hours=14))))) == 30
    assert len(await thirty.read("s", until=dt.datetime.max)) == 30  # without a zone it is UTC
    assert await thirty.read("nobody", until=dt.datetime.max) == await thirty.read("nobody", backward=True) == []


async def test_huge_events_are_read_page_by_page_in_both_directions(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(1)
    texts = [text for _ in range(5) for text in (random.randbytes(20_000).hex(), "x" * 40_000)]
    await log.add("s", *(event(text) for text in texts))
    monkeypatch.setattr(reads, "PAGE_BYTES", 50_000)

    async def pages(backward: bool) -> list[list[int]]:
        found = log.store.subject_pages("shop", log.stream.name, "s", backward=backward)
        return [[one.revision for one in page] async for page in found]

    assert await pages(backward=False) == [[n, n + 1] for n in range(1, 11, 2)]
    assert await pages(backward=True) == [[n, n - 1] for n in range(10, 0, -2)]
    monkeypatch.setattr(reads, "PAGE_BYTES", 1)
    assert await pages(backward=True) == [[n] for n in range(10, 0, -1)]


async def test_events_appended_while_a_read_is_under_way_disturb_neither_direction(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "FIRST_PAGE_EVENTS", 2)
    monkeypatch.setattr(reads, "PAGE_EVENTS", 2)
    await log.append("s", *map(str, range(5)))

    async def revisions(backward: bool) -> list[int]:
        found = []
        async for page in log.store.subject_pages("shop", log.stream.name, "s", backward=backward):
            found += [one.revision for one in page]
            if len(found) == 2:
                await log.append("s", f"meanwhile {backward}")
        return found

    assert await revisions(backward=True) == [5, 4, 3, 2, 1]
    assert await revisions(backward=False) == [1, 2, 3, 4, 5, 6, 7]


async def test_what_cant_be_a_subject_is_refused(log: Log) -> None:
    for subject in ("", "x" * 513, "\0", "\ud800"):
        with pytest.raises(InvalidAppendError):
            await log.read(subject, backward=True)


async def test_a_stream_that_is_made_again_is_read_as_it_is_now_and_never_as_two_in_one(
    installed: Installed, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "FIRST_PAGE_EVENTS", 2)
    monkeypatch.setattr(reads, "PAGE_EVENTS", 2)
    log = Log(installed, store, await installed.stream("again"))
    await log.append("s", *(f"old-{n}" for n in range(9)))

    async def again(*ids: str) -> None:
        uid = log.stream.uid
        assert uid is not None
        async with connected(installed.admin) as conn:
            await catalog.drop_stream(conn, namespace="shop", name="again", uid=uid)
        stream = await installed.stream("again")
        async with await EventStore.open(installed.service) as other:
            await Log(installed, other, stream).append("s", *ids)

    await again(*(f"new-{n}" for n in range(3)))
    # `store` still knows the former stream; the first page tells it.
    assert [one.id for one in await log.read("s")] == ["new-0", "new-1", "new-2"]

    pages = store.partition_pages("shop", "again", partition_of("s", 3))
    assert [one.id for one in await anext(pages)] == ["new-0", "new-1"]
    await again(*(f"newest-{n}" for n in range(9)))
    with pytest.raises(UnknownStreamError):
        await anext(pages)
    assert (await log.read("s", limit=1, backward=True))[0].id == "newest-8"


async def test_looks_for_a_time_or_the_last_events_dont_scan(log: Log) -> None:
    for batch in range(30):
        await log.append("s", *(f"{batch}-{n}" for n in range(1000)))
    source = reads.Source.of_subject(log.stream, "s")
    half = (await log.read("s", from_revision=15_000, limit=1))[0]
    async with connected(log.installed.superuser) as conn:
        for query, arguments in (
            (reads._search(log.stream.schema, source._where, "revision", "recorded_at"), [half.time] * 2),
            (reads._page(log.stream.schema, source._where, "revision", True), None),
        ):
            where = [source.partition, "s"]
            given = [*where, *arguments, *where] if arguments else [*where, 1, 2**63 - 1, 10, 10**6, log.stream.stream]
            cursor = await conn.execute(b"explain (analyze, buffers, format json) " + query, given)
            ((plan,),) = await cursor.fetchall()
            assert plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"] < 400
