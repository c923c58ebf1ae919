"""Appending and reading with the library."""

import asyncio
import datetime as dt
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from random import Random
from typing import Any

import msgspec
import psycopg
import pytest
from prometheus_client import REGISTRY
from psycopg.types.json import Jsonb
from refold import names, tokens
from refold.eventstore import AppendResult, EventStore, Limits, NewEvent, catalog, group_call, reads
from refold.eventstore import lane as lanes
from refold.eventstore.appends import MAX_DEPTH, MAX_NUMBER
from refold.eventstore.errors import (
    IdConflictError,
    InvalidAppendError,
    OverloadedError,
    RevisionConflictError,
    UnavailableError,
    UnknownStreamError,
)
from refold.eventstore.heads import Heads
from refold.eventstore.pace import Pace
from refold.partitioning import partition_of

from hack.servers import Postgres
from tests.stores import Installed, Log, check_history, connected, event, install, raw, together


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    """One store for all tests of this module; each has a stream of its own."""
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database appends")
    return await install(postgres.dsn("appends"))


@pytest.fixture(scope="module")
async def store(installed: Installed) -> AsyncIterator[EventStore]:
    async with await EventStore.open(installed.service) as opened:
        yield opened


_numbers = itertools.count(1)


@pytest.fixture
async def log(installed: Installed, store: EventStore) -> Log:
    """A new active stream of three partitions."""
    return Log(installed, store, await installed.stream(f"orders-{next(_numbers)}"))


def in_one_partition(partition: int, count: int) -> list[str]:
    found: list[str] = []
    number = 0
    while len(found) < count:
        number += 1
        if partition_of(f"s{number}", 3) == partition:
            found.append(f"s{number}")
    return found


async def test_an_append_returns_its_last_events_place_and_a_token_for_it(log: Log) -> None:
    first = await log.append("s", "1", "2", expected_revision="none")
    again = await log.append("s", "3", expected_revision=2)
    assert (first.revision, first.position, first.replayed) == (2, 2, False)
    assert (again.revision, again.position, again.partition) == (3, 3, partition_of("s", 3))
    assert tokens.decode(again.token) == [tokens.Position(log.stream.incarnation, again.partition, 3)]


@pytest.mark.parametrize(
    ("before", "expected", "accepted"),
    [
        (0, "any", True), (2, "any", True), (0, "none", True), (2, "none", False), (0, "exists", False),
        (2, "exists", True), (0, 0, True), (2, 0, False), (2, 1, False), (2, 2, True), (2, 3, False), (0, 5, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("group", [False, True])
async def test_the_expected_revision_decides(log: Log, before: int, expected: Any, accepted: bool, group: bool) -> None:
    earlier = [log.append("s", str(number)) for number in range(before)]
    asked = log.append("s", "new", expected_revision=expected)
    if group:  # in one transaction with what comes before it
        *_, outcome = await together(*earlier, asked)
    else:
        for one in earlier:
            await one
        outcome = await asked
    if accepted:
        assert outcome.revision == before + 1
    else:
        assert isinstance(outcome, RevisionConflictError)
        assert outcome.current == before
    assert len(await log.history()) == before + accepted


@pytest.mark.parametrize("group", [False, True])
async def test_a_retry_gets_the_first_outcome_whatever_revision_it_expects(log: Log, group: bool) -> None:
    calls = [
        log.append("s", "1", "2", expected_revision="none"),
        log.append("s", "3"),
        log.append("s", "1", "2", expected_revision="none"),
        log.append("s", "3", expected_revision=99),
        log.append("s", "2"),
    ]
    outcomes = await together(*calls) if group else [await call for call in calls]
    assert [(o.revision, o.position, o.replayed) for o in outcomes] == [
        (2, 2, False), (3, 3, False), (2, 2, True), (3, 3, True), (2, 2, True),
    ]  # fmt: skip
    assert outcomes[0].token == outcomes[2].token


@pytest.mark.parametrize(
    "ids", [["1", "new"], ["new", "2"], ["2", "1"], ["1", "3"], ["1", "2", "3", "new"]], ids=lambda ids: "+".join(ids)
)
@pytest.mark.parametrize("group", [False, True])
async def test_a_known_id_in_another_append_is_a_conflict_and_writes_nothing(
    log: Log, ids: list[str], group: bool
) -> None:
    calls = [log.append("s", "1", "2"), log.append("s", "3"), log.append("s", *ids, expected_revision=3)]
    outcomes = await together(*calls) if group else [await call for call in calls]
    assert isinstance(outcomes[2], IdConflictError)
    assert outcomes[2].current == 3
    assert len(await log.history()) == 3


async def test_a_known_id_with_other_data_or_type_is_a_conflict(log: Log) -> None:
    await log.add("s", event({"a": 1}, id="1"))
    for other in (event({"a": 2}, id="1"), event({"a": 1}, id="1", type="Other"), event(None, id="1")):
        with pytest.raises(IdConflictError):
            await log.add("s", other)
    same = NewEvent("1", "Happened", raw(' { "a" : 1 } '))
    assert (await log.add("s", same)).replayed


async def test_an_append_that_writes_nothing_leaves_the_heads_as_they_were(log: Log) -> None:
    heads = (
        f"select partition, head, recorded_at, active from refold.heads where stream = {log.stream.stream} order by 1"
    )
    empty = await log.installed.query(heads)
    assert isinstance(await log.append("s", "1", expected_revision=1), RevisionConflictError)
    assert await log.installed.query(heads) == empty
    await log.append("s", "1")
    filled = await log.installed.query(heads)
    assert isinstance(await log.append("s", "2", expected_revision=2), RevisionConflictError)
    with pytest.raises(IdConflictError):
        await log.add("s", event({"other": True}, id="1"))
    assert isinstance(await log.append("t", "1", expected_revision="exists"), RevisionConflictError)
    assert (await log.append("s", "1")).replayed
    assert await log.installed.query(heads) == filled
    assert (await log.append("s", "2", expected_revision=1)).position == 2


async def test_the_same_id_in_another_subject_is_another_event(log: Log) -> None:
    subjects = in_one_partition(0, 3)
    outcomes = await together(*(log.append(subject, "1") for subject in subjects))
    assert [outcome.revision for outcome in outcomes] == [1, 1, 1]


async def test_in_a_group_the_later_see_the_earlier_and_a_refusal_is_its_own_affair(log: Log) -> None:
    outcomes = await together(
        log.append("a", "1"),
        log.append("b", "1", expected_revision=4),
        log.append("a", "2", expected_revision=1),
        log.append("a", "3", expected_revision=1),
        log.append("c", "1"),
        log.append("a", "2"),
        log.append("a", "4", expected_revision=2),
        log.append("b", "1", expected_revision=0),
        log.append("c", "2", "3"),
        log.append("a", "4", "5"),
    )
    said = [outcome.revision if isinstance(outcome, tuple) else type(outcome).__name__ for outcome in outcomes]
    assert said == [
        1, "RevisionConflictError", 2, "RevisionConflictError", 1, 2, 3, 1, 3, "IdConflictError",
    ]  # fmt: skip
    check_history(await log.history())


async def test_of_many_that_expect_one_revision_one_wins(log: Log) -> None:
    outcomes = await together(*(log.append("s", str(n), expected_revision="none") for n in range(50)))
    assert Counter(type(outcome).__name__ for outcome in outcomes) == {"AppendResult": 1, "RevisionConflictError": 49}


async def test_appends_of_a_burst_share_transactions(log: Log) -> None:
    await log.append("warm", "1")
    await together(*(log.append(f"s{n}", "1") for n in range(200)))
    times = {row[5] for row in await log.history()}
    assert len(times) <= 4


async def test_history_is_right_whatever_many_writers_and_stores_do_at_once(log: Log) -> None:
    async def writer(log: Log, number: int) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        for step in range(30):
            subject = f"s{(number * step) % 7}"
            expected: Any = ["any", step % 5, "exists", "none"][step % 4]
            outcome = await log.append(subject, f"{number}-{step % 25}", expected_revision=expected)
            outcomes[type(outcome).__name__] += 1
        return outcomes

    async with await EventStore.open(log.installed.service) as other:
        logs = [log, replace(log, store=other)]
        counts = sum(await together(*(writer(logs[number % 2], number) for number in range(16))), Counter[str]())
    assert set(counts) <= {"AppendResult", "RevisionConflictError", "IdConflictError"}
    history = await log.history()
    assert len(history) > 16
    check_history(history)
    async with connected(log.installed.admin) as conn:
        heads = (await catalog.stream_heads(conn, [log.stream]))[log.stream.stream]
    assert heads == {partition: len([row for row in history if row[0] == partition]) for partition in range(3)}


async def test_an_event_that_only_postgresql_refuses_stands_alone_with_its_refusal(log: Log) -> None:
    bad = NewEvent("1", "T", raw('{"never": checked}'))  # the library takes JSON text on trust
    outcomes = await together(
        *(log.append(f"s{n}", "1") for n in range(10)),
        asyncio.gather(log.add("bad", bad), return_exceptions=True),
        *(log.append(f"t{n}", "1") for n in range(10)),
    )
    assert isinstance(outcomes[10][0], InvalidAppendError)
    assert [outcome.revision for outcome in (*outcomes[:10], *outcomes[11:])] == [1] * 20
    check_history(await log.history())


@pytest.mark.parametrize(
    "text",
    [
        "null", "2.0", "0.10", "123456789012345678901234567890", "-1.5e-7", "9" * MAX_NUMBER, f"1e{MAX_NUMBER}",
        f"1e-{MAX_NUMBER}", "0." + "1" * MAX_NUMBER, '"é日\\u00e9\\ud83d\\ude00"', '"\\u0001\\b\\f\\n\\r\\t\\"\\\\\\/"',
        "[" * MAX_DEPTH + "]" * MAX_DEPTH, '{"a": {"b": [1, 2.50, "x"]}, "": null}', "[" + "1," * 50_000 + "1]", "2.50",
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
async def test_json_comes_back_as_the_same_value_with_exact_numbers(log: Log, text: str) -> None:
    metadata = text if len(text) <= log.store.limits.metadata_bytes else "1"
    await log.add("s", NewEvent("1", "T", raw(text), raw(metadata)))
    (read,) = await log.read("s")

    def exact(json_text: str | bytes) -> Any:
        return json.loads(json_text, parse_float=Decimal, parse_int=Decimal)

    assert exact(bytes(read.data)) == exact(text)
    if text[0].isdigit() and "e" not in text:
        assert bytes(read.data).decode() == text  # 2.0 isn't 2, 0.10 isn't 0.1
    assert (read.metadata is None) == (text == "null")


@pytest.mark.parametrize("subject", ["a/b", "..", "%2F", "日本 語", "'; drop table x; --", "\x01", "x" * 512])
async def test_any_text_is_a_subject(log: Log, subject: str) -> None:
    await log.append(subject, "1")
    (read,) = await log.read(subject)
    assert (read.subject, read.revision, read.id, read.partition) == (subject, 1, "1", partition_of(subject, 3))


async def test_a_bad_append_is_refused_before_it_waits(log: Log) -> None:
    for subject, ids in (("", ["1"]), ("x" * 513, ["1"]), ("a\0", ["1"]), ("s", [""]), ("s", ["1", "1"])):
        assert isinstance(await log.append(subject, *ids), InvalidAppendError)


async def test_a_stream_is_found_as_soon_as_it_is_active(log: Log) -> None:
    late = replace(log, stream=msgspec.structs.replace(log.stream, name="late"))
    assert isinstance(await late.append("s", "1"), UnknownStreamError)
    await log.installed.stream("late")
    assert (await late.append("s", "1")).revision == 1


async def test_reading_a_subject_goes_page_by_page_and_keeps_its_bounds(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "FIRST_PAGE_EVENTS", 2)
    for batch in range(3):
        await log.append("s", *(f"{batch}-{n}" for n in range(10)))
    await log.append(in_one_partition(partition_of("s", 3), 1)[0], "other")

    async def revisions(**bounds: Any) -> list[int]:
        return [one.revision for one in await log.read("s", **bounds)]

    assert await revisions() == list(range(1, 31))
    assert await revisions(from_revision=5, to_revision=9) == [5, 6, 7, 8, 9]
    assert await revisions(from_revision=25) == [25, 26, 27, 28, 29, 30]
    assert (
        await revisions(from_revision=31)
        == await revisions(to_revision=0)
        == await revisions(from_revision=9, to_revision=8)
        == []
    )
    events = await log.read("s")
    assert await revisions(until=events[14].time) == list(range(1, 21))
    assert await revisions(until=events[0].time - dt.timedelta(microseconds=1)) == []
    assert await log.read("never seen") == []


async def test_a_page_is_bounded_in_bytes_too(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "PAGE_BYTES", 50_000)
    async with await EventStore.open(log.installed.service) as small:
        random = Random(1)
        events = [event(text) for _ in range(5) for text in (random.randbytes(20_000).hex(), "x" * 40_000)]
        await small.append("shop", log.stream.name, "s", events)
        pages = [len(page) async for page in small.subject_pages("shop", log.stream.name, "s")]
    assert pages == [2] * 5


async def test_reading_a_partition_gives_its_events_in_order_after_a_position(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "FIRST_PAGE_EVENTS", 2)
    subjects = in_one_partition(1, 4)
    for n in range(20):
        await log.append(subjects[n % 4], str(n))

    async def positions(partition: int = 1, **bounds: Any) -> list[int]:
        return [one.position async for one in log.store.read_partition("shop", log.stream.name, partition, **bounds)]

    assert await positions() == list(range(1, 21))
    assert await positions(after=15) == [16, 17, 18, 19, 20]
    assert await positions(after=3, limit=9) == list(range(4, 13))
    assert await positions(after=20) == await positions(0) == []
    with pytest.raises(UnknownStreamError, match="0 to 2"):
        await positions(3)


async def test_listeners_are_told_of_appends_after_they_are_committed(log: Log) -> None:
    async with connected(log.installed.superuser) as conn:
        await conn.execute(f"listen {names.APPENDED_CHANNEL}".encode())
        await log.append("s", "1")
        async for notice in conn.notifies(timeout=5, stop_after=1):
            assert notice.payload == str(log.stream.stream)
            break
        else:
            pytest.fail("nobody was told")


async def test_beyond_the_bound_appends_are_refused_at_once(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.store, "limits", Limits(waiting_appends=5))
    outcomes = await together(*(log.append(f"s{n}", "1") for n in range(8)))
    assert Counter(type(outcome).__name__ for outcome in outcomes) == {"AppendResult": 5, "OverloadedError": 3}
    assert isinstance(outcomes[-1], OverloadedError)
    assert (await log.append("s9", "1")).revision == 1


async def test_a_caller_that_leaves_harms_nobody(log: Log) -> None:
    calls = [asyncio.create_task(log.append(f"s{n}", "1")) for n in range(20)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [outcome.revision for outcome in outcomes[1::2]] == [1] * 10
    check_history(await log.history())
    assert log.store._waiting == log.store._waiting_bytes == 0


async def test_closing_finishes_what_was_taken_and_takes_no_more(log: Log) -> None:
    log = replace(log, store=await EventStore.open(log.installed.service))
    calls = [asyncio.create_task(log.append(f"s{n}", "1")) for n in range(50)]
    await asyncio.sleep(0)
    await log.store.close()
    assert [outcome.revision for outcome in await asyncio.gather(*calls)] == [1] * 50
    assert isinstance(await log.append("s", "1"), UnavailableError)


async def test_connections_that_break_cost_a_retry_and_nothing_else(log: Log) -> None:
    acknowledged = asyncio.Semaphore(0)

    async def breaker() -> None:
        async with connected(log.installed.superuser) as conn:
            while True:
                for _ in range(12):
                    await acknowledged.acquire()
                await conn.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'refold-%'"
                )

    async def writer(number: int) -> None:
        for step in range(25):
            outcome = await log.append(f"w{number}", str(step), expected_revision=step)
            assert outcome.revision == step + 1, outcome
            acknowledged.release()

    breaking = asyncio.create_task(breaker())
    await together(*(writer(number) for number in range(8)))
    breaking.cancel()
    history = await log.history()
    check_history(history)
    assert len(history) == 8 * 25


async def test_a_subjects_appends_stay_in_the_order_of_the_calls_whatever_fails_amid_them(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that was sent behind another one must not be applied where that wasn't, and not before it."""
    behind = 0  # groups

    def marks(mark: bytes, **places: bytes) -> list[bytes]:
        nonlocal behind
        behind += bool(places["behind"])
        return real_marks(mark, **places)

    real_marks = group_call.marks
    monkeypatch.setattr(group_call, "marks", marks)
    # As where the callers' work takes longer than a transaction, which is so only on a machine with nothing else to do.
    monkeypatch.setattr(Pace, "share", lambda _, former, waiting: -(-(former + waiting) // 2))
    seed = Random().randrange(2**32)
    print(f"seed {seed}")
    chance = Random(seed)
    sent: dict[str, list[str]] = {f"s{n}": [] for n in range(5)}
    outcomes: list[asyncio.Future[AppendResult]] = []
    await log.append("warm", "1")

    async def breaker() -> None:
        async with connected(log.installed.superuser) as conn:
            while True:
                await asyncio.sleep(chance.uniform(0, 0.2))
                await conn.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where application_name = "
                    "'refold-eventstore-append'"
                )

    breaking = asyncio.create_task(breaker())
    for burst in itertools.count(1):
        if burst > 400 and behind > 20:
            break
        assert burst < 5_000, "hardly a group was sent behind another"
        for number in range(chance.randint(1, 40)):
            subject = f"s{chance.randrange(5)}"
            one = event(id=f"{burst}-{number}")
            if chance.random() < 0.005:
                one = NewEvent(one.id, one.type, raw("never checked"))  # refuses its group
            else:
                sent[subject].append(one.id)
            outcomes.append(log.store.submit(log.stream, subject, [one]))
        await asyncio.sleep(chance.choice((0, 0.001, 0.002)))
        await asyncio.wait([outcomes[max(0, len(outcomes) - 200)]])  # so many wait at most
    results = await asyncio.gather(*outcomes, return_exceptions=True)
    breaking.cancel()
    refused = [result for result in results if not isinstance(result, AppendResult)]
    assert refused
    assert all(isinstance(result, InvalidAppendError) for result in refused)
    history = await log.history()
    check_history(history)
    for subject, ids in sent.items():
        assert [one.id for one in await log.read(subject)] == ids


async def test_while_postgresql_is_away_appends_wait_and_then_are_given_up(
    postgres: Postgres, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await log.append("s", "1")).revision == 1
    monkeypatch.setattr(lanes, "PATIENCE", 1.0)
    postgres.stop()
    try:
        outcome = await log.append("s", "2")
        assert isinstance(outcome, UnavailableError)
        with pytest.raises(UnavailableError):
            await log.store.ping()
        with pytest.raises(UnavailableError):
            await log.read("s")
        monkeypatch.setattr(lanes, "PATIENCE", 60.0)
        waiting = asyncio.create_task(log.append("s", "2", expected_revision=1))
        await asyncio.sleep(0.2)
    finally:
        postgres.start()
    assert (await waiting).revision == 2
    assert [one.id for one in await log.read("s")] == ["1", "2"]
    await log.store.ping()


async def test_an_append_asks_for_the_isolation_that_its_proof_needs(log: Log) -> None:
    async with connected(log.installed.superuser) as conn:
        await conn.execute("begin isolation level repeatable read")
        with pytest.raises(psycopg.Error, match="READ COMMITTED"):
            await conn.execute(
                f'select * from "{log.stream.schema}".append(%s)'.encode(),
                [json.dumps([{"subject": "s", "events": [{"id": "1", "type": "T", "data": 1}]}])],
            )


async def test_the_database_puts_subjects_where_kafka_does(log: Log) -> None:
    subjects = [
        "",
        "a",
        "ab",
        "abc",
        "abcd",
        "abcde",
        "21",
        "foobar",
        "a-little-bit-long-string",
        "é",
        "日本",
        "x" * 512,
    ]
    subjects += [f"order-{n}-{'é' * (n % 5)}" for n in range(200)]
    rows = await log.installed.query("select s, refold.partition_of(s, 1000003) from unnest(%s::text[]) s", subjects)
    assert dict(rows) == {subject: partition_of(subject, 1000003) for subject in subjects}


async def test_limits_are_the_callers_to_choose(log: Log) -> None:
    async with await EventStore.open(log.installed.service, limits=Limits(append_events=2)) as small:
        assert isinstance(await replace(log, store=small).append("s", "1", "2", "3"), InvalidAppendError)


async def test_the_heads_are_shown_of_the_streams_that_are_served(log: Log) -> None:
    def shown() -> float | None:
        return REGISTRY.get_sample_value("refold_head_events", {"stream": f"shop/{log.stream.name}"})

    for n in range(3):
        await log.append(f"s{n}", "1", "2")
    heads = Heads(log.store._control)
    await heads.show([log.stream])
    assert shown() == 6
    await log.append("s", "1")
    await heads.show([log.stream])
    assert shown() == 7
    await heads.show([])
    assert shown() is None


async def test_nothing_that_an_append_in_sql_runs_is_compiled(log: Log) -> None:
    """JIT takes tens of milliseconds; what an append forbids the planner makes plans look worth it."""
    plans: list[str] = []
    async with connected(log.installed.superuser) as conn:
        await conn.execute("load 'auto_explain'; set auto_explain.log_min_duration = 0; set client_min_messages = log")
        await conn.execute(
            "set auto_explain.log_nested_statements = on; set auto_explain.log_analyze = on; set jit = on"
        )
        conn.add_notice_handler(lambda notice: plans.append(notice.message_primary or ""))
        for revision in range(3):
            events = [{"id": str(revision), "type": "T", "data": revision}]
            call = f'select * from "{log.stream.schema}".append(%s)'
            await conn.execute(call.encode(), [Jsonb([{"subject": "s", "events": events}])])
    assert sum("topic_bytes" in plan for plan in plans) == 3
    assert not [plan for plan in plans if "JIT:" in plan]
