"""Atomic appends: many subjects of one stream, all or none, with the library, over HTTP and in SQL."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any

import msgspec
import psycopg
import pytest
from refold import tokens
from refold.eventstore import AllAppended, EventStore, Limits, SubjectAppend, catalog, roles, server
from refold.eventstore.errors import (
    EventStoreError,
    IdConflictError,
    InvalidAppendError,
    NotInstalledError,
    OverloadedError,
    RevisionConflictError,
    TooLargeError,
    UnknownStreamError,
)
from refold.eventstore.settings import Settings
from refold.partitioning import partition_of

from hack.servers import Postgres
from hack.servers.callers import tokens_file
from tests.served import Answer, Served, serve
from tests.stores import PASSWORD, Installed, Log, check_history, connected, event, install, together

TOKEN = "t0ken"


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    """One store for all tests of this module; each has a stream of its own."""
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database transactions")
    return await install(postgres.dsn("transactions"))


@pytest.fixture(scope="module")
async def store(installed: Installed) -> AsyncIterator[EventStore]:
    async with await EventStore.open(installed.service) as opened:
        yield opened


_numbers = itertools.count(1)


@pytest.fixture
async def log(installed: Installed, store: EventStore) -> Log:
    """A new active stream of three partitions."""
    return Log(installed, store, await installed.stream(f"orders-{next(_numbers)}"))


def part(subject: str, *ids: str, expected: Any = "any", data: Any = 1) -> SubjectAppend:
    return SubjectAppend(subject, [event(data, id=id) for id in ids], expected)  # noqa: A001


_WAITS = (
    "from pg_stat_activity a where wait_event_type = 'Lock' and datname = current_database() and query like '%append%'"
)


@asynccontextmanager
async def held_head(log: Log, appending: Awaitable[Any]) -> AsyncIterator[asyncio.Future[Any]]:
    """Hold the head of partition 1 until `appending` waits for it, and through the block."""
    async with connected(log.installed.superuser) as conn, conn.transaction():
        await conn.execute(
            "select from refold.heads where stream = %s and partition = 1 for update", [log.stream.stream]
        )
        task = asyncio.ensure_future(appending)
        while not await log.installed.query(f"select {_WAITS}"):
            assert not task.done()
        yield task


async def append_all(log: Log, *parts: SubjectAppend) -> Any:
    """Return the outcome, an exception too."""
    try:
        return await log.store.append_all(log.stream.namespace, log.stream.name, parts)
    except EventStoreError as error:
        return error


async def test_all_parts_are_appended_at_once_and_one_token_lists_every_partition(log: Log) -> None:
    subjects = [f"s{n}" for n in range(20)]
    done = await append_all(log, *(part(subject, "1", "2", expected="none") for subject in subjects))
    assert [one.revision for one in done.appends] == [2] * 20
    assert [one.partition for one in done.appends] == [partition_of(subject, 3) for subject in subjects]
    assert not done.replayed
    history = await log.history()
    check_history(history)
    last = {row[0]: row[1] for row in history}
    assert tokens.decode(done.token) == [tokens.Position(log.stream.incarnation, p, last[p]) for p in sorted(last)]
    assert [(one.partition, one.position) for one in done.appends] == [
        next(row[:2] for row in history if row[2:4] == (subject, 2)) for subject in subjects
    ]
    assert len({row[5] for row in history}) == 1


@pytest.mark.parametrize("expected", [("none", 1), (0, "exists"), ("any", "any")])
async def test_a_retry_gets_the_first_outcome(log: Log, expected: tuple[Any, Any]) -> None:
    await log.append("b", "0")
    parts = part("a", "1", "2", expected=expected[0]), part("b", "3", expected=expected[1])
    first = await append_all(log, *parts)
    await log.append("a", "later")
    again = await append_all(log, *parts)
    assert (first.replayed, again.replayed) == (False, True)
    assert [one[:3] for one in again.appends] == [one[:3] for one in first.appends]
    assert again.token == first.token
    # The order of the parts is no part of it: each is found in its own subject.
    assert (await append_all(log, *reversed(parts))).replayed
    assert len(await log.history()) == 5


@pytest.mark.parametrize(
    ("parts", "index", "current"),
    [
        ([part("a", "1", "2"), part("b", "new")], 0, 2),
        ([part("b", "new"), part("a", "1", "2")], 1, 2),
        ([part("c", "3"), part("a", "2", "1")], 1, 2),
        ([part("c", "3"), part("a", "1", "2", data="other")], 1, 2),
        ([part("c", "3", "new")], 0, 1),
        ([part("a", "1", "2"), part("c", "3"), part("b", "new", expected=9)], 0, 2),
        ([part("b", "new", expected=9), part("c", "new", expected=0), part("a", "x", "2", expected=2)], 2, 2),
        ([part("b", "new", expected="none"), part("a", "1", expected=2)], 1, 2),
        ([part("c", "3", expected=1), part("b", "new", expected=0)], 0, 1),
    ],
)
async def test_what_is_known_in_part_or_otherwise_is_an_id_conflict_and_writes_nothing(
    log: Log, parts: list[SubjectAppend], index: int, current: int
) -> None:
    await append_all(log, part("a", "1"), part("c", "3"))
    await log.append("a", "2")
    before = await log.history()
    outcome = await append_all(log, *parts)
    assert isinstance(outcome, IdConflictError)
    assert (outcome.index, outcome.subject, outcome.current) == (index, parts[index].subject, current)
    assert await log.history() == before


@pytest.mark.parametrize(
    ("expected", "index", "current"),
    [((1, 1, 0), None, 0), ((0, 1, 0), 0, 1), ((1, 1, 1), 2, 0), (("any", "none", "exists"), 1, 2),
     (("any",) * 3, None, 0), (("exists", 2, "exists"), 2, 0), ((1, 3, "none"), 1, 2)],
)  # fmt: skip
async def test_the_expected_revision_of_each_part_decides_about_all(
    log: Log, expected: tuple[Any, ...], index: int | None, current: int
) -> None:
    await log.append("a", "1")
    await log.append("b", "1")
    if expected[1] != 1:
        await log.append("b", "2")
    before = await log.history()
    parts = [part(subject, "new", expected=value) for subject, value in zip("abc", expected, strict=True)]
    outcome = await append_all(log, *parts)
    if index is None:
        assert isinstance(outcome, AllAppended)
        assert len(await log.history()) == len(before) + 3
    else:
        assert isinstance(outcome, RevisionConflictError)
        assert (outcome.index, outcome.subject, outcome.current) == (index, "abc"[index], current)
        assert await log.history() == before
        # Nothing is left behind: the next position is the next one.
        assert (await log.append("a", "next", expected_revision=1)).revision == 2
        check_history(await log.history())


async def test_appends_take_effect_in_the_order_of_submission(log: Log) -> None:
    outcomes = await together(
        log.append("a", "1", expected_revision=0),
        log.append("b", "1", expected_revision=0),
        append_all(log, part("a", "2", expected=1), part("b", "2", expected=1)),
        log.append("a", "3", expected_revision=2),
        append_all(log, part("a", "4", expected=3), part("c", "1", expected=1)),
        append_all(log, part("a", "5", expected=3), part("c", "1", expected=0)),
        log.append("a", "6", expected_revision=4),
    )
    said = [
        [one.revision for one in outcome.appends] if isinstance(outcome, AllAppended)
        else outcome.index if isinstance(outcome, EventStoreError) else outcome.revision
        for outcome in outcomes
    ]  # fmt: skip
    assert said == [1, 1, [2, 2], 3, 1, [4, 1], 5]
    check_history(await log.history())


async def test_limits_are_of_all_parts_together(log: Log) -> None:
    limits = Limits(append_events=4, event_bytes=100, append_bytes=250)
    async with await EventStore.open(log.installed.service, limits=limits) as opened:
        small = replace(log, store=opened)
        assert isinstance(await append_all(small, part("a", "1", "2"), part("b", "1", "2")), AllAppended)
        for parts, field in (
            ([part("a", "3", "4", "5"), part("b", "3", "4")], "appends"),
            ([part(subject, "3", data="x" * 80) for subject in "abcd"], "appends"),
            ([part("a", "3"), part("b", "3", data="x" * 200)], "appends[1].events[0]"),
        ):
            refusal = await append_all(small, *parts)
            assert isinstance(refusal, TooLargeError)
            assert refusal.field == field
    assert len(await log.history()) == 4


async def test_a_bad_part_is_refused_with_its_place(log: Log) -> None:
    for parts, field in (
        ([], "appends"),
        ([part("a", "1"), part("")], "appends[1].subject"),
        ([part("a", "1"), part("b")], "appends[1].events"),
        ([part("a", "1"), part("b", "1", ""), part("c", "1")], "appends[1].events[1].id"),
        ([part("a", "1"), part("b", "1", expected=-1)], "appends[1].expectedRevision"),
        ([part("a", "1"), part("b", "1"), part("a", "2")], "appends[2].subject"),
    ):
        refusal = await append_all(log, *parts)
        assert isinstance(refusal, InvalidAppendError)
        assert refusal.field == field
    unknown = replace(log, stream=msgspec.structs.replace(log.stream, name="nothing"))
    assert isinstance(await append_all(unknown, part("a", "1")), UnknownStreamError)
    assert await log.history() == []


async def test_beyond_the_bound_an_atomic_append_is_refused_at_once(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.store, "limits", Limits(waiting_appends=5))
    outcomes = await together(
        append_all(log, *(part(f"s{n}", "1") for n in range(5))), append_all(log, part("a", "1")), log.append("a", "1")
    )
    assert isinstance(outcomes[0], AllAppended)
    assert [type(outcome) for outcome in outcomes[1:]] == [OverloadedError, OverloadedError]
    assert isinstance(await append_all(log, part("a", "1")), AllAppended)


async def test_an_atomic_append_that_is_under_way_when_its_connection_breaks_happens_once(log: Log) -> None:
    """The head of one partition is held, so that the append waits in the database; then its backend is ended."""
    parts = [part(f"s{n}", "1", expected=0) for n in range(10)]
    async with held_head(log, append_all(log, *parts)) as appending:
        assert await log.installed.query(f"select pg_terminate_backend(pid) {_WAITS}") == [(True,)]
    assert isinstance(await appending, AllAppended)
    assert (await append_all(log, *parts)).replayed
    assert len(await log.history()) == 10


async def test_a_stream_that_was_not_upgraded_yet_says_so(log: Log) -> None:
    await log.installed.run(f"update refold.streams set migration = 2 where stream = {log.stream.stream}")
    async with await EventStore.open(log.installed.service) as behind:
        outcome = await append_all(replace(log, store=behind), part("a", "1"))
    assert isinstance(outcome, NotInstalledError)
    assert "upgraded" in str(outcome)


# Crossing appends


async def test_crossing_atomic_appends_of_many_processes_never_deadlock_and_leave_a_right_history(log: Log) -> None:
    """Two stores (two processes' connections), and writers in SQL, append to the same subjects in all orders."""
    random = Random(7)
    subjects = [f"s{n}" for n in range(12)]

    async def writer(log: Log, number: int) -> None:
        for step in range(25):
            chosen = random.sample(subjects, 6)
            done = await append_all(log, *(part(subject, f"{number}-{step}") for subject in chosen))
            assert isinstance(done, AllAppended), done

    async def sql_writer(number: int) -> None:
        async with connected(log.installed.superuser) as conn:
            for step in range(25):
                chosen = random.sample(subjects, 6)
                appends = [
                    {"subject": subject, "events": [{"id": f"{number}-{step}", "type": "T", "data": 1}]}
                    for subject in chosen
                ]
                rows = await conn.execute(
                    f'select outcome from "{log.stream.schema}".append_all(%s)'.encode(), [json.dumps(appends)]
                )
                assert [row[0] async for row in rows] == ["appended"] * 6

    before = await deadlocks(log.installed)
    async with await EventStore.open(log.installed.service) as other:
        logs = [log, replace(log, store=other)]
        await together(*(writer(logs[n % 2], n) for n in range(8)), *(sql_writer(n) for n in range(8, 12)))
    assert await deadlocks(log.installed) == before
    history = await log.history()
    assert len(history) == 12 * 25 * 6
    check_history(history)
    # All or none: of each append all six events are there, at one time.
    whole: dict[str, list[Any]] = {}
    for row in history:
        whole.setdefault(row[4], []).append(row[5])
    assert {len(times) for times in whole.values()} == {6}
    assert {len(set(times)) for times in whole.values()} == {1}


async def deadlocks(installed: Installed) -> int:
    await installed.query("select pg_stat_force_next_flush()")
    ((count,),) = await installed.query("select deadlocks from pg_stat_database where datname = current_database()")
    return int(count)


@pytest.mark.parametrize("function", ["append", "append_all", "library"])
async def test_heads_are_locked_first_and_in_the_order_of_the_partitions_whatever_the_order_of_the_parts(
    log: Log, function: str
) -> None:
    """With the head of partition 1 held, an append to 2, 1, 0 holds 0 and waits; it has done nothing, and 2 is free."""
    subjects = {partition_of(f"s{n}", 3): f"s{n}" for n in range(50)}
    parts = [part(subjects[partition], "1") for partition in (2, 1, 0)]

    async def append() -> None:
        if function == "library":
            await log.store.append_all("shop", log.stream.name, parts)
            return
        async with connected(log.installed.superuser) as conn:
            call = f'select * from "{log.stream.schema}".{function}(%s)'
            await conn.execute(call.encode(), [json.dumps(as_json(*parts))])

    async with held_head(log, append()) as appending:
        free = await log.installed.query(
            "select partition from refold.heads where stream = %s for update skip locked", log.stream.stream
        )
        assert free == [(2,)]
        # It touched no table of events before it has all its locks.
        tables = await log.installed.query(
            f"select distinct relation::regclass::text from pg_locks join (select pid {_WAITS}) a using (pid) "
            "where relation is not null"
        )
        assert ("refold.heads",) in tables
        assert not [table for (table,) in tables if "events" in table]
    await appending
    assert len(await log.history()) == 3


# The writer's role in SQL


async def in_sql(log: Log, appends: Any) -> list[tuple[Any, ...]]:
    async with connected(log.installed.admin) as conn:
        await roles.ensure_login(conn, "sql_writer", PASSWORD, member_of=[catalog.writer_role(conn, log.stream)])
    async with connected(log.installed.dsn("sql_writer")) as conn:
        rows = await conn.execute(f'select * from "{log.stream.schema}".append_all(%s)'.encode(), [json.dumps(appends)])
        return await rows.fetchall()


def as_json(*parts: SubjectAppend) -> list[dict[str, Any]]:
    return [
        {
            "subject": one.subject,
            "expected": one.expected_revision,
            "events": [{"id": e.id, "type": e.type, "data": msgspec.json.decode(e.data)} for e in one.events],
        }
        for one in parts
    ]


async def test_a_stream_s_writer_appends_all_or_none_in_sql_too(log: Log) -> None:
    parts = [part("a", "1", "2", expected="none"), part("b", "1", expected="none")]
    assert [row[:2] for row in await in_sql(log, as_json(*parts))] == [("appended", 2), ("appended", 1)]
    again = await in_sql(log, as_json(*parts))
    assert [row[:2] for row in again] == [("replayed", 2), ("replayed", 1)]
    assert [row[2] for row in again] == [partition_of("a", 3), partition_of("b", 3)]
    before = await log.history()
    for parts, said in (
        ([part("a", "1", "2"), part("b", "new")], [("id-conflict", 2), ("not-appended", 1)]),
        ([part("c", "1"), part("b", "2", expected=5)], [("not-appended", 0), ("revision-conflict", 1)]),
        ([part("c", "1", "2"), part("b", "1", data="other")], [("not-appended", 0), ("id-conflict", 1)]),
    ):
        rows = await in_sql(log, as_json(*parts))
        assert [row[:2] for row in rows] == said
        assert [row[3] for row in rows] == [None, None]
    with pytest.raises(psycopg.Error, match="once") as caught:
        await in_sql(log, as_json(part("a", "3"), part("b", "3"), part("a", "4")))
    assert caught.value.sqlstate == "RF003"
    with pytest.raises(psycopg.Error, match="not a list"):
        await in_sql(log, {})
    assert await log.history() == before


# Over HTTP


@pytest.fixture(scope="module")
async def served(installed: Installed) -> AsyncIterator[Served]:
    await installed.stream("served")
    auth = tokens_file(TOKEN)
    settings = Settings(
        store_dsn=installed.service,
        auth=auth,
        append_events=10,
        event_bytes=2000,
        metadata_bytes=1024,
        append_bytes=4096,
        body_bytes=8192,
    )
    with serve(server.make(settings), TOKEN) as api:
        yield api


def post(api: Served, *parts: SubjectAppend) -> Answer:
    body = {"appends": list(parts)}
    return api.ask("/v1/streams/shop/served/transactions", "POST", body=msgspec.json.encode(body))


def test_over_http_the_answer_has_each_append_s_place_and_one_token(served: Served) -> None:
    parts = part("http-a", "1", "2", expected="none"), part("http-b", "1"), part("http-c", "1", expected=0)
    first = post(served, *parts)
    assert first.status == 201
    answer = first.json()
    assert answer.keys() == {"appends", "token"}
    assert [one["revision"] for one in answer["appends"]] == [2, 1, 1]
    assert {(one.partition, one.position) for one in tokens.decode(answer["token"])} <= {
        (one["partition"], one["position"]) for one in answer["appends"]
    }
    assert "refold-replayed" not in first.headers
    again = post(served, *parts)
    assert (again.status, again.body, again.headers["refold-replayed"]) == (201, first.body, "true")


def test_over_http_a_conflict_names_the_append_the_subject_and_its_revision(served: Served) -> None:
    assert post(served, part("http-d", "1"), part("http-e", "1")).status == 201
    wrong = post(served, part("http-f", "1"), part("http-e", "2", expected=7))
    known = post(served, part("http-f", "1"), part("http-e", "1"), part("http-d", "2"))
    for answer, slug in ((wrong, "revision-conflict"), (known, "id-conflict")):
        problem = answer.json()
        assert (answer.status, problem["type"].rsplit("/", 1)[-1]) == (409, slug)
        assert (problem["index"], problem["subject"], problem["currentRevision"]) == (1, "http-e", 1)
    assert served.ask("/v1/streams/shop/served/subjects/http-f/events").json() == {"events": []}


@pytest.mark.parametrize(
    ("body", "status", "slug", "field"),
    [
        (b"{", 400, "invalid-json", None),
        (b'{"appends": []}', 422, "invalid-append", "appends"),
        (b'{"events": []}', 422, "invalid-append", ""),
        (b'{"appends": [{"events": []}]}', 422, "invalid-append", "appends[0]"),
        (b'{"appends": [{"subject": "a", "events": [{"id": "1"}]}]}', 422, "invalid-append", "appends[0].events[0]"),
        (b'{"appends": [{"subject": "a", "events": []}]}', 422, "invalid-append", "appends[0].events"),
        (b'{"appends": [{"subject": "a", "events": [], "expected": 1}]}', 422, "invalid-append", "appends[0]"),
        (b"x" * 9000, 413, "body-too-large", None),
    ],
)
def test_over_http_bad_input_is_a_problem_that_names_the_field(
    served: Served, body: bytes, status: int, slug: str, field: str | None
) -> None:
    answer = served.ask("/v1/streams/shop/served/transactions", "POST", body=body)
    problem = answer.json()
    assert (answer.status, problem["type"].rsplit("/", 1)[-1], problem.get("field")) == (status, slug, field)


def test_over_http_too_many_events_and_a_subject_twice_are_refused(served: Served) -> None:
    many = post(served, part("http-g", *map(str, range(6))), part("http-h", *map(str, range(5))))
    assert (many.status, many.json()["field"]) == (413, "appends")
    twice = post(served, part("http-g", "1"), part("http-g", "2"))
    assert (twice.status, twice.json()["field"]) == (422, "appends[1].subject")
    unknown = served.ask("/v1/streams/shop/nothing/transactions", "POST", body=b'{"appends": []}')
    assert unknown.status == 404
