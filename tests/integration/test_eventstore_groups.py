"""Groups of appends as the event store sends them: heads and history after all, some or none of them were refused."""

import asyncio
import itertools
from random import Random
from typing import Any, Literal

import psycopg
import pytest
from psycopg.pq import ExecStatus, Format
from refold.eventstore import appends, arrays, group_call
from refold.eventstore.appends import Append, ExpectedRevision, Limits
from refold.eventstore.catalog import Stream
from refold.partitioning import partition_of

from hack.servers import Postgres
from tests.stores import Installed, check_history, event, install

#: Outcomes of `append_group`.
APPENDED, REPLAYED, REVISION_CONFLICT, ID_CONFLICT = range(4)
PARTITIONS = 3
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database grouped")
    return await install(postgres.dsn("grouped"))


@pytest.fixture
async def stream(installed: Installed) -> Stream:
    return await installed.stream(f"orders-{next(_numbers)}", partitions=PARTITIONS)


def part(subject: str, *ids: str, expected: ExpectedRevision = "any", data: Any = 1) -> Append:
    events = [event(data, id=id) for id in ids]  # noqa: A001
    return appends.check(subject, events, expected_revision=expected, partitions=PARTITIONS, limits=Limits())


def call(
    dsn: str,
    stream: Stream,
    *parts: Append,
    careful: bool = False,
    function: Literal["append_group", "append_all"] = "append_group",
) -> list[tuple[int, ...]]:
    """Append a group; return outcome, revision and position of each append."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        values = group_call.arguments(stream.stream, parts, careful=careful)
        if function == "append_group":
            values += group_call.marks(b"1", behind=b"")
        query = group_call.query(stream.schema, function, 0)
        result = conn.pgconn.exec_params(query, values, None, [Format.BINARY] * len(values), Format.BINARY)
        if result.status != ExecStatus.TUPLES_OK:
            raise psycopg.DatabaseError(result.error_message.decode())
        columns = [arrays.int8_values(result.get_value(0, column) or b"") for column in range(3)]
        return list(zip(*columns, strict=True))


async def deadlocks(installed: Installed) -> list[tuple[Any, ...]]:
    await installed.query("select pg_stat_force_next_flush()")
    return await installed.query("select deadlocks from pg_stat_database where datname = current_database()")


async def heads(installed: Installed, stream: Stream) -> list[tuple[Any, ...]]:
    return await installed.query(
        "select partition, head, recorded_at from refold.heads where stream = %s order by 1", stream.stream
    )


async def check(installed: Installed, stream: Stream) -> None:
    """Assert that history is gapless and that each head is its partition's last event."""
    history = await installed.history(stream)
    check_history(history)
    last = {row[0]: (row[1], row[5]) for row in history}
    ((epoch,),) = await installed.query("select 'epoch'::timestamptz")
    expected = [(partition, *last.get(partition, (0, epoch))) for partition in range(PARTITIONS)]
    assert await heads(installed, stream) == expected


#: Subjects by their partition: of one partition alone, or of all.
BY_PARTITION = [[f"s{n}" for n in range(60) if partition_of(f"s{n}", PARTITIONS) == p][:4] for p in range(PARTITIONS)]
SAME = BY_PARTITION[1]
ACROSS = [BY_PARTITION[2][0], BY_PARTITION[0][0], BY_PARTITION[1][0], BY_PARTITION[2][1]]


@pytest.fixture(params=[SAME, ACROSS], ids=["one partition", "several partitions"])
def subjects(request: pytest.FixtureRequest) -> list[str]:
    found: list[str] = request.param
    return found


@pytest.mark.parametrize("login", ["service", "superuser"])
async def test_a_group_of_which_nothing_is_appended_leaves_the_heads_as_they_were(
    installed: Installed, stream: Stream, subjects: list[str], login: str
) -> None:
    a, b, c, d = subjects
    dsn = getattr(installed, login)
    refused = [part(a, "new", expected=7), part(b, "new", expected="exists"), part(c, "new", expected=1)]
    assert [row[0] for row in call(dsn, stream, *refused)] == [REVISION_CONFLICT] * 3
    assert await installed.history(stream) == []
    await check(installed, stream)
    first = [part(a, "1", "2"), part(b, "1", expected=0), part(c, "1"), part(d, "1", "2", "3")]
    appended = call(dsn, stream, *first)
    assert [row[0] for row in appended] == [APPENDED] * 4
    await check(installed, stream)
    before = await heads(installed, stream), await installed.history(stream)
    again = call(dsn, stream, *first, careful=True)
    assert again == [(REPLAYED, revision, position) for _, revision, position in appended]
    mixed = [part(a, "new", expected=1), *first[1:3], part(d, "2", "1"), part(a, "x", expected="none")]
    assert [row[0] for row in call(dsn, stream, *mixed, careful=True)] == [
        REVISION_CONFLICT, REPLAYED, REPLAYED, ID_CONFLICT, REVISION_CONFLICT,
    ]  # fmt: skip
    assert (await heads(installed, stream), await installed.history(stream)) == before


@pytest.mark.parametrize("login", ["service", "superuser"])
@pytest.mark.parametrize("bad", [(0,), (1,), (3,), (0, 3), (1, 2), (0, 1, 2)])
async def test_where_some_of_a_group_are_refused_the_others_follow_without_gaps(
    installed: Installed, stream: Stream, subjects: list[str], bad: tuple[int, ...], login: str
) -> None:
    dsn = getattr(installed, login)
    call(dsn, stream, *(part(subject, "0") for subject in subjects))
    asked, wanted = [], []
    for number, subject in enumerate(subjects):
        if number not in bad:
            asked.append(part(subject, "1", "2", expected=1))
            wanted.append((APPENDED, 3))
        elif number % 2:
            asked.append(part(subject, "0"))
            wanted.append((REPLAYED, 1))
        else:
            asked.append(part(subject, "1", "2", expected=5))
            wanted.append((REVISION_CONFLICT, 1))
    found = call(dsn, stream, *asked)
    assert [row[:2] for row in found] == wanted
    at = {(row[2], row[3]): row[1] for row in await installed.history(stream)}
    for subject, (outcome, revision, position) in zip(subjects, found, strict=True):
        assert position == (0 if outcome == REVISION_CONFLICT else at[subject, revision])
    await check(installed, stream)
    assert [row[:2] for row in call(dsn, stream, *(part(subject, "last") for subject in subjects))] == [
        (APPENDED, revision + 1) for _, revision, _ in found
    ]
    await check(installed, stream)


async def test_an_atomic_append_that_is_refused_leaves_the_heads_as_they_were(
    installed: Installed, stream: Stream, subjects: list[str]
) -> None:
    call(installed.service, stream, *(part(subject, "0") for subject in subjects), function="append_all")
    before = await heads(installed, stream)
    asked = [part(subject, "1", expected=1) for subject in subjects[:-1]]
    found = call(installed.service, stream, *asked, part(subjects[-1], "1", expected=0), function="append_all")
    assert [row[0] for row in found] == [4] * (len(subjects) - 1) + [REVISION_CONFLICT]
    assert await heads(installed, stream) == before
    await check(installed, stream)


async def test_a_partition_in_which_nothing_is_appended_keeps_its_head(installed: Installed, stream: Stream) -> None:
    call(installed.service, stream, *(part(subject, "0") for subject in ACROSS))
    before = await heads(installed, stream)
    a, b, c, d = ACROSS  # of the partitions 2, 0, 1, 2
    found = call(
        installed.service, stream,
        part(a, "1"), part(b, "1", expected=0), part(b, "2", expected=9), part(c, "0"), part(d, "1", expected=4),
    )  # fmt: skip
    assert [row[0] for row in found] == [APPENDED, REVISION_CONFLICT, REVISION_CONFLICT, REPLAYED, REVISION_CONFLICT]
    after = await heads(installed, stream)
    assert after[:2] == before[:2]
    assert (after[2][1], after[2][2] > before[2][2]) == (before[2][1] + 1, True)
    await check(installed, stream)


async def test_groups_that_cross_and_are_refused_in_part_leave_a_right_history(
    installed: Installed, stream: Stream
) -> None:
    """Four connections of the service append to the same subjects of all partitions, in all orders."""
    subjects = [subject for own in BY_PARTITION for subject in own]

    def client(number: int) -> list[tuple[int, ...]]:
        random = Random(number)
        found = []
        for step in range(60):
            group = [
                part(
                    subject,
                    *(f"{number}-{step}-{n}" for n in range(random.randint(1, 3))),
                    expected=random.choice(["any", "any", "exists", "none", step]),
                )
                for subject in random.sample(subjects, random.randint(1, 6))
            ]
            group += [part(random.choice(subjects), f"shared-{random.randint(0, 30)}")]
            found += call(installed.service, stream, *group, careful=True)
        return found

    before = await deadlocks(installed)
    results = await asyncio.gather(*(asyncio.to_thread(client, number) for number in range(4)))
    assert await deadlocks(installed) == before
    outcomes = [row[0] for found in results for row in found]
    assert {APPENDED, REPLAYED, REVISION_CONFLICT} <= set(outcomes)
    await check(installed, stream)
