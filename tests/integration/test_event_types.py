"""Event types of a stream: refused at append, changed while appends are under way, retried across changes."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb
from refold.eventstore import EventStore, NewEvent, catalog, roles
from refold.eventstore.appends import SubjectAppend
from refold.eventstore.errors import (
    ConflictError,
    IdConflictError,
    InvalidDataError,
    UnavailableError,
    UnknownTypeError,
)

from hack.servers import Postgres
from tests.stores import PASSWORD, Installed, Log, check_history, connected, event, install

NUMBER = {"Counted": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
TEXT = {"Counted": {"type": "object", "properties": {"n": {"type": "string"}}, "required": ["n"]}}
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database event_types")
    return await install(postgres.dsn("event_types"))


@pytest.fixture
async def log(installed: Installed) -> AsyncIterator[Log]:
    """A new active stream that takes any event."""
    async with await EventStore.open(installed.service) as store:
        yield Log(installed, store, await installed.stream(f"counts-{next(_numbers)}"))


def counted(n: Any, id: str | None = None) -> NewEvent:  # noqa: A002
    return event({"n": n}, id=id, type="Counted")


async def test_what_does_not_fit_is_refused_alone_and_nothing_of_it_is_written(log: Log) -> None:
    await log.installed.event_types(log.stream, NUMBER)
    results = await asyncio.gather(
        log.add("a", counted(1), counted("2")),
        log.add("a", counted(3), event({"n": 4}, type="Other")),
        *(log.add("a", counted(n)) for n in range(5)),
        return_exceptions=True,
    )
    assert isinstance(results[0], InvalidDataError)
    assert (results[0].field, results[0].errors) == ("events[1].data", [("/n", '"2" is not of type "integer"')])
    assert isinstance(results[1], UnknownTypeError)
    assert (results[1].field, results[1].types) == ("events[1].type", ["Counted"])
    assert [result.revision for result in results[2:]] == [1, 2, 3, 4, 5]
    assert [bytes(found.data) for found in await log.read("a")] == [b'{"n": %d}' % n for n in range(5)]


async def test_an_atomic_append_with_an_event_that_does_not_fit_is_refused_whole(log: Log) -> None:
    async def append(*parts: tuple[str, NewEvent]) -> Any:
        return await log.store.append_all(
            log.stream.namespace, log.stream.name, [SubjectAppend(subject, [one]) for subject, one in parts]
        )

    first = await append(("a", counted("x", "1")), ("b", counted("y", "2")))
    await log.installed.event_types(log.stream, NUMBER)
    with pytest.raises(InvalidDataError) as refused:
        await append(("a", counted(1)), ("b", counted("2")))
    assert (refused.value.field, refused.value.errors[0][0]) == ("appends[1].events[0].data", "/n")
    again = await append(("a", counted("x", "1")), ("b", counted("y", "2")))
    assert (again.replayed, again.token) == (True, first.token)
    with pytest.raises(IdConflictError):
        await append(("a", counted("x", "1")), ("b", counted(3)))
    with pytest.raises(InvalidDataError):
        await append(("a", counted("x", "1")), ("b", counted("y")))
    await append(("a", counted(1)), ("b", counted(2)))
    assert len(await log.read("a")) == len(await log.read("b")) == 2


async def test_types_hold_from_the_moment_of_their_change_in_a_store_that_knows_the_former_ones(log: Log) -> None:
    await log.add("a", counted("any"))
    await log.installed.event_types(log.stream, NUMBER)
    with pytest.raises(InvalidDataError):
        await log.add("a", counted("text"))
    await log.add("a", counted(1))
    await log.installed.event_types(log.stream, TEXT)
    with pytest.raises(InvalidDataError):
        await log.add("a", counted(2))
    await log.installed.event_types(log.stream, NUMBER)
    await log.add("a", counted(3))
    await log.installed.event_types(log.stream, None)
    await log.add("a", counted("text"), event(1, type="Anything"))
    assert len(await log.read("a")) == 5


async def test_a_retry_of_what_former_types_accepted_is_answered_with_its_first_outcome(log: Log) -> None:
    first = await log.add("a", counted("x", "1"), counted("y", "2"))
    await log.installed.event_types(log.stream, NUMBER)
    again = await log.add("a", counted("x", "1"), counted("y", "2"))
    assert again == first._replace(replayed=True)
    with pytest.raises(IdConflictError):
        await log.add("a", counted("other", "1"))
    with pytest.raises(IdConflictError):
        await log.add("a", counted("y", "2"), counted("z", "3"))
    with pytest.raises(InvalidDataError):
        await log.add("another subject", counted("x", "1"))
    assert len(await log.read("a")) == 2


async def test_no_event_that_does_not_fit_is_committed_after_a_change_by_any_process(log: Log) -> None:
    """Clients of two stores append what fits one of two schemas while the types alternate between them."""
    stop = asyncio.Event()
    refused = 0

    async def client(store: EventStore, number: int) -> None:
        nonlocal refused
        own = Log(log.installed, store, log.stream)
        while not stop.is_set():
            subject = f"s{number % 3}"
            results = await asyncio.gather(
                own.add(subject, counted(1)), own.add(subject, counted("x")), return_exceptions=True
            )
            for result in results:
                refused += isinstance(result, InvalidDataError)
                assert isinstance(result, InvalidDataError) or not isinstance(result, BaseException), result

    async def heads() -> dict[int, int]:
        async with connected(log.installed.admin) as conn:
            return (await catalog.stream_heads(conn, [log.stream]))[log.stream.stream]

    phases: list[tuple[str, dict[int, int], dict[int, int]]] = []
    async with await EventStore.open(log.installed.service) as other:
        clients = [asyncio.create_task(client(log.store if n % 2 else other, n)) for n in range(6)]
        for n in range(12):
            await log.installed.event_types(log.stream, TEXT if n % 2 else NUMBER)
            after = await heads()
            await asyncio.sleep(0.1)
            phases.append(("string" if n % 2 else "number", after, await heads()))
        stop.set()
        await asyncio.gather(*clients)
    check_history(await log.history())
    rows = await log.installed.query(
        f"select partition, position, jsonb_typeof(data -> 'n') from \"{log.stream.schema}\".events"
    )
    inside = [
        (kind, wanted)
        for partition, position, kind in rows
        for wanted, after, before in phases
        if after[partition] < position <= before[partition]
    ]
    assert {kind for kind, _ in inside} == {"number", "string"}
    assert [pair for pair in inside if pair[0] != pair[1]] == []
    assert refused > 0


async def test_the_writer_role_is_sent_to_the_event_store_whatever_it_says(log: Log) -> None:
    async with connected(log.installed.admin) as conn:
        writer = f"writer_of_{log.stream.name}"
        await roles.ensure_login(conn, writer, PASSWORD, member_of=[catalog.writer_role(conn, log.stream)])
    call = f"""select outcome from "{log.stream.schema}".append(
        '[{{"subject": "s", "events": [{{"id": "%s", "type": "Counted", "data": {{"n": "x"}}}}]}}]')"""
    async with connected(log.installed.dsn(writer)) as conn:
        await conn.execute((call % 1).encode())
        stream = await log.installed.event_types(log.stream, NUMBER)
        for setting in ("", str(stream.types_revision)):
            await conn.execute("select set_config('refold.event_types', %s, false)", [setting])
            with pytest.raises(psycopg.Error, match="PostgreSQL can't check") as refused:
                await conn.execute((call % 2).encode())
            assert refused.value.sqlstate == "RF006"
        await log.installed.event_types(log.stream, None)
        await conn.execute((call % 3).encode())
    assert [found.id for found in await log.read("s")] == ["1", "3"]


async def test_changing_types_to_what_they_are_writes_nothing(log: Log) -> None:
    first = await log.installed.event_types(log.stream, {**NUMBER, "Other": True})
    again = await log.installed.event_types(first, {"Other": True, **NUMBER})
    assert (first.types_revision, again.types_revision) == (1, 1)
    assert (await log.installed.event_types(first, None)).types_revision == 2


async def test_only_the_resource_that_holds_the_claim_changes_the_types(log: Log) -> None:
    async with connected(log.installed.admin) as conn:
        await catalog.release_stream(conn, log.stream)
        with pytest.raises(ConflictError):
            await catalog.set_event_types(conn, log.stream, NUMBER)


async def test_types_that_this_version_cannot_use_stop_appends_to_their_stream_alone(log: Log) -> None:
    other = Log(log.installed, log.store, await log.installed.stream(f"counts-{next(_numbers)}"))
    await log.installed.event_types(log.stream, {"Counted": {"pattern": "(?=later)"}})
    with pytest.raises(UnavailableError, match="old version"):
        await log.add("a", counted(1))
    await other.add("a", counted(1))
    await log.installed.event_types(log.stream, NUMBER)
    await log.add("a", counted(1))


async def test_an_unfit_append_waits_for_a_database_that_is_away_instead_of_being_judged(
    log: Log, postgres: Postgres
) -> None:
    await log.installed.event_types(log.stream, NUMBER)
    await log.add("a", counted(1))
    postgres.kill()
    waiting = asyncio.ensure_future(log.add("a", counted("x")))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await asyncio.to_thread(postgres.start)
    with pytest.raises(InvalidDataError):
        await waiting


async def test_a_writer_appends_nothing_in_sql_that_is_too_large_for_its_topic(log: Log) -> None:
    async with connected(log.installed.admin) as conn:
        await catalog.limit_events(conn, 1000)
        writer = f"large_writer_of_{log.stream.name}"
        await roles.ensure_login(conn, writer, PASSWORD, member_of=[catalog.writer_role(conn, log.stream)])

    async def append(conn: psycopg.AsyncConnection[Any], id: str, data: str, metadata: str) -> None:  # noqa: A002
        events = [{"id": id, "type": "T", "data": data, "metadata": metadata}, {"id": f"{id}+", "type": "T", "data": 1}]
        call = f'select * from "{log.stream.schema}".append(%s)'
        await conn.execute(call.encode(), [Jsonb([{"subject": "s", "events": events}])])

    async with connected(log.installed.dsn(writer)) as conn:
        await append(conn, "1", "x" * 1000, "y" * 496)  # with their quotes 1500 bytes
        with pytest.raises(psycopg.Error, match="the event 2 has 1501 bytes") as refused:
            await append(conn, "2", "x" * 1000, "y" * 497)
        assert refused.value.sqlstate == "RF003"
        await append(conn, "3", "x", "y")
    await log.add("s", event("x" * 5000, id="4"))  # the library has limits of its own
    assert [found.id for found in await log.read("s")] == ["1", "1+", "3", "3+", "4"]
    check_history(await log.history())
    async with connected(log.installed.admin) as conn:
        await catalog.limit_events(conn, 512 * 1024)
