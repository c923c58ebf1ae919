"""Migrations of a store that is filled and in use: from version 0.1.0 to this one, and around what holds its tables."""

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import pytest
import structlog
from psycopg.pq import ExecStatus
from refold import names
from refold.eventstore import EventStore, catalog, migrations
from refold.eventstore.errors import EventStoreError
from refold.partitioning import partition_of

from tests.stores import Installed, Log, check_history, connected, event, install, together, version_0_1_0

EVENTS = 50_000
#: What version 0.1.0 sends; PostgreSQL finds the parameters' types itself.
_CALL = (
    'select outcomes, revisions, positions from "shop.orders".append_group('
    + ", ".join(f"${n}" for n in range(1, 19))
    + ")"
).encode()
_HISTORY = (
    "select md5(string_agg(md5(row(partition, position, subject, revision, id, type, data, metadata, recorded_at)"
    "::text), '' order by partition, position)), count(*) from \"shop.orders\".events where id not like 'later-%'"
)


class FormerCaller(threading.Thread):
    """Appends to a subject of its own as version 0.1.0 does, event after event, until `stop` is set."""

    def __init__(self, dsn: str, stream: int, subject: str) -> None:
        super().__init__()
        self.stop = threading.Event()
        self.done = 0
        self.error: str | None = None
        self._dsn, self._stream, self._subject = dsn, stream, subject

    def run(self) -> None:
        partition = partition_of(self._subject, 3)
        with psycopg.connect(self._dsn, autocommit=True) as conn:
            conn.pgconn.prepare(b"append", _CALL)
            while not self.stop.is_set():
                values: list[Any] = [
                    self._stream, f"{{{partition}}}", "f", f"{{{self._subject}}}", f"{{{partition}}}",
                    f"{{{self.done}}}", "{1}", "{1}", "{1}", "{0}", "{1}", "{f}", "{1}", f"{{{self._subject}}}",
                    f"{{later-{self.done + 1}}}", "{Later}", '{"1"}', "{NULL}",
                ]  # fmt: skip
                result = conn.pgconn.exec_prepared(b"append", [str(value).encode() for value in values])
                if result.status != ExecStatus.TUPLES_OK or result.get_value(0, 0) != b"{0}":
                    self.error = result.error_message.decode() or str(result.get_value(0, 0))
                    return
                self.done += 1


async def fill(installed: Installed) -> None:
    """Give the stream a history of `EVENTS` events, with heads."""
    await installed.run(
        f"""insert into "shop.orders".events
        select p, row_number() over (partition by p order by n), 's' || n % 10000, n / 10000 + 1, n, 'Filled',
               jsonb_build_object('n', n, 'price', n / 100.0), case when n % 3 = 0 then '{{"a": "x"}}'::jsonb end, now()
        from (select n, refold.partition_of('s' || n % 10000, 3) as p from generate_series(0, {EVENTS - 1}) n) t;
        update refold.heads h set recorded_at = now(), head = (
          select max(position) from "shop.orders".events e where e.partition = h.partition)
        """
    )


@asynccontextmanager
async def appending(installed: Installed) -> AsyncIterator[list[FormerCaller]]:
    """Append all the while from four connections, in all partitions."""
    subjects = [f"later-{n}" for n in range(4)]
    callers = [FormerCaller(installed.service, 1, subject) for subject in subjects]
    for caller in callers:
        caller.start()
    try:
        yield callers
    finally:
        for caller in callers:
            caller.stop.set()
        for caller in callers:
            await asyncio.to_thread(caller.join)


async def progress(callers: list[FormerCaller]) -> None:
    """Wait until each caller, a thread, has appended some more, or failed."""
    wanted = [caller.done + 20 for caller in callers]
    while any(caller.is_alive() and caller.done < n for caller, n in zip(callers, wanted, strict=True)):  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_a_filled_store_of_the_first_version_is_upgraded_while_appends_of_that_version_go_on(
    database: str,
) -> None:
    with version_0_1_0():
        installed = await install(database)
        stream = await installed.stream()
    await fill(installed)
    before = await installed.query(_HISTORY)
    assert before[0][1] == EVENTS
    # A library of this version that meets the former store works with it, and goes on through the migration.
    async with await EventStore.open(installed.service) as store, appending(installed) as callers:
        log = Log(installed, store, stream)
        assert (await log.append("new", "later-1")).revision == 1
        await progress(callers)
        async with connected(installed.admin) as conn:
            await catalog.install_store(conn)
            upgraded = await catalog.get_stream(conn, "shop", "orders")
        await progress(callers)
        # rolled back, and upgraded again
        with version_0_1_0():
            async with connected(installed.admin) as conn:
                await catalog.install_store(conn)
        assert await installed.query("select max(number) from refold.migrations") == [(1,)], "what 0.1.0 goes by"
        await progress(callers)
        async with connected(installed.admin) as conn:
            await catalog.install_store(conn)
        await progress(callers)
        assert (await log.append("new", "later-2", expected_revision=1)).revision == 2
        assert [caller.error for caller in callers] == [None] * 4
    assert upgraded is not None
    assert upgraded.migration == migrations.load("stream")[-1].number
    assert await installed.query(_HISTORY) == before
    history = await installed.history(stream)
    check_history(history)
    assert len(history) == EVENTS + 2 + sum(caller.done for caller in callers)
    heads = await installed.query("select partition, head from refold.heads order by 1")
    assert heads == [(p, sum(row[0] == p for row in history)) for p in range(3)]
    owner = names.store_role(installed.database, "owner")
    for change in ("update {} set type = 'x'", "delete from {}", "truncate {}"):
        async with connected(installed.superuser) as conn:
            await conn.execute(f'set role "{owner}"'.encode())
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
                await conn.execute(change.format('"shop.orders".events').encode())


#: The names of the constraints that check values, of the table and of its partitions.
_CHECKS = (
    "select conrelid::regclass::text, conname from pg_constraint where contype = 'c' "
    "and connamespace = '\"shop.orders\"'::regnamespace order by 1, 2"
)
_RIGHTS = (
    "select oid::regprocedure::text, proacl::text, proowner::regrole::text, prosecdef, proconfig from pg_proc "
    "where pronamespace = '\"shop.orders\"'::regnamespace and proname like 'append%' order by 1"
)


@contextmanager
def migrations_until(last: int, of: str) -> Iterator[None]:
    """Let the catalog know the migrations of `of` (`store`, `stream`) up to `last`, as an earlier release did."""
    load = migrations.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrations, "load", lambda kind: load(kind)[:last] if kind == of else load(kind))
        yield


async def test_the_checks_go_and_the_functions_see_to_it_while_appends_and_lone_appends_go_on(database: str) -> None:
    with migrations_until(4, "stream"):
        installed = await install(database)
        stream = await installed.stream()
    await fill(installed)
    before, rights = await installed.query(_HISTORY), await installed.query(_RIGHTS)
    assert len(await installed.query(_CHECKS)) == 5 * 4
    # A store that met the former functions goes on through the migration, with lone appends and with groups.
    async with await EventStore.open(installed.service) as store, appending(installed) as callers:
        log = Log(installed, store, stream)
        done = 0

        async def append_on() -> None:
            nonlocal done
            for number in range(10):
                outcomes = [await log.append("lone", f"later-{done + number}", expected_revision=done + number)]
                outcomes += await together(*(log.append(f"g{n}", f"later-{done + number}") for n in range(8)))
                assert [outcome.revision for outcome in outcomes] == [done + number + 1] * 9
            done += 10

        await append_on()
        async with connected(installed.admin) as conn:
            upgrading = asyncio.create_task(catalog.install_store(conn))
            await append_on()
            await upgrading
            upgraded = await catalog.get_stream(conn, "shop", "orders")
            assert upgraded is not None
            assert upgraded.migration == migrations.load("stream")[-1].number
        await append_on()
        await progress(callers)
        # The earlier release leaves it as it is, and what it makes anew is upgraded later.
        with migrations_until(4, "stream"):
            async with connected(installed.admin) as conn:
                await catalog.install_store(conn)
                assert await catalog.get_stream(conn, "shop", "orders") == upgraded
            assert (await installed.stream("other")).migration == 4
            async with await EventStore.open(installed.service) as earlier:
                assert (await Log(installed, earlier, stream).append("e", "later-1")).revision == 1
        await append_on()
        async with connected(installed.admin) as conn:
            await catalog.install_store(conn)
        await append_on()
        assert [caller.error for caller in callers] == [None] * 4
    assert await installed.query(_CHECKS) == []
    assert await installed.query(_RIGHTS) == rights
    assert await installed.query(_HISTORY) == before
    history = await installed.history(stream)
    check_history(history)
    assert len(history) == EVENTS + 9 * done + 1 + sum(caller.done for caller in callers)
    heads = await installed.query("select partition, head from refold.heads where stream = 1 order by 1")
    assert heads == [(p, sum(row[0] == p for row in history)) for p in range(3)]
    for call in (
        "append_one(1, 0, 's', -1, repeat('i', 256), 'T', '1', null)",
        "append(jsonb_build_array(jsonb_build_object('subject', 's', 'events', jsonb_build_array("
        "jsonb_build_object('id', repeat('i', 256), 'type', 'T', 'data', 1)))))",
    ):
        with pytest.raises(psycopg.errors.CheckViolation, match="an event's id has 1 to 255 bytes"):
            await installed.query(f'select "shop.orders".{call}')


@pytest.mark.parametrize("behind", [False, True])
async def test_a_migration_waits_for_an_append_under_way_and_never_deadlocks_with_appends(
    database: str, behind: bool
) -> None:
    """A writer's transaction has a head and the tables, and takes another head while the migration waits for it.

    `behind`: the other head is held by an append that waits for the tables behind the migration, which closes a circle.
    """
    with migrations_until(4, "stream"):
        installed = await install(database)
        stream = await installed.stream()
    subjects = {partition_of(f"s{n}", 3): f"s{n}" for n in range(50)}

    async def append(conn: psycopg.AsyncConnection[Any], partition: int, number: int) -> None:
        appends = [{"subject": subjects[partition], "events": [{"id": str(number), "type": "T", "data": 1}]}]
        await conn.execute('select outcome from "shop.orders".append(%s)', [json.dumps(appends)])

    async def waiting(mode: str) -> None:
        while not await installed.query(f"select from pg_locks where mode = '{mode}' and not granted"):
            pass

    async with (
        connected(installed.superuser) as writer,
        connected(installed.superuser) as other,
        connected(installed.admin) as conn,
    ):
        async with writer.transaction():
            await append(writer, 0, 1)
            upgrading = asyncio.create_task(catalog.install_store(conn))
            await waiting("AccessExclusiveLock")
            appending = [asyncio.create_task(append(other, 1, 2))] if behind else []
            if behind:
                await waiting("AccessShareLock")
            await append(writer, 1, 3)
            assert not upgrading.done()
        await together(upgrading, *appending)
    history = await installed.history(stream)
    assert [row[:2] for row in history] == [(0, 1), (1, 1)] + [(1, 2)] * behind
    check_history(history)
    assert await installed.query(_CHECKS) == []
    await installed.query("select pg_stat_force_next_flush()")
    assert await installed.query("select deadlocks from pg_stat_database where datname = current_database()") == [(0,)]


async def test_streams_with_event_types_refuse_what_was_not_checked_before_and_after_their_trigger_is_made_anew(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with migrations_until(4, "store"):
        installed = await install(database)
        stream = await installed.stream()
    stream = await installed.event_types(stream, {"Happened": {"type": "integer"}})
    unchecked = '[{"subject": "s", "events": [{"id": "x", "type": "Happened", "data": 1}]}]'

    async def check(log: Log, number: int) -> None:
        assert (await log.add("s", event(1, id=str(number)))).revision == number
        with pytest.raises(EventStoreError):
            await log.add("s", event("1", id="x"))
        for revision in ("", str(stream.types_revision + 1)):
            with pytest.raises(psycopg.Error) as caught:
                await installed.run(
                    f"select set_config('refold.event_types', '{revision}', false); "
                    f"select \"shop.orders\".append('{unchecked}')"
                )
            assert caught.value.sqlstate == "RF006"

    monkeypatch.setattr("refold.eventstore.online.PATIENCE", 0.1)
    async with await EventStore.open(installed.service) as store, connected(installed.superuser) as reader:
        log = Log(installed, store, stream)
        await check(log, 1)
        async with reader.transaction(), connected(installed.admin) as conn:
            await reader.execute("select from refold.heads")  # as a backup does: it isn't waited for
            await catalog.install_store(conn)
        ((condition, enabled),) = await installed.query(
            "select pg_get_triggerdef(oid), tgenabled from pg_trigger where tgname = 'refuse_unchecked'"
        )
        assert "WHEN ((new.types_revision IS NOT NULL))" in condition
        assert enabled == "A", "session_replication_role silences it"
        await check(log, 2)
    assert len(await installed.history(stream)) == 2


async def test_what_adds_to_a_store_is_noted_apart_from_what_earlier_releases_cannot_work_with(database: str) -> None:
    installed = await install(database)
    known = [(one.number,) for one in migrations.load("store")]
    assert await installed.query("select number from refold.additions order by 1") == known[migrations.BREAKING :]
    # as builds before that noted it
    async with connected(installed.superuser) as conn:
        await conn.execute(
            "with a as (delete from refold.additions returning *) insert into refold.migrations select * from a"
        )
    async with connected(installed.admin) as conn:
        await catalog.install_store(conn)
    assert await installed.query("select number from refold.migrations order by 1") == known[: migrations.BREAKING]
    assert await installed.query("select number from refold.additions order by 1") == known[migrations.BREAKING :]


async def test_a_store_that_a_later_release_has_changed_otherwise_is_left_alone(database: str) -> None:
    installed = await install(database)
    async with connected(installed.superuser) as conn:
        await conn.execute("insert into refold.migrations (number, name) values (99, 'later')")
    async with connected(installed.admin) as conn:
        with pytest.raises(EventStoreError, match="at migration 99, this version of Refold knows"):
            await catalog.install_store(conn)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later migration, which needs the tables of events for itself."""
    load = migrations.load
    column = migrations.Migration(99, "column", 'alter table :"schema".events add column later integer')
    monkeypatch.setattr(migrations, "load", lambda kind: (*load(kind), column) if kind == "stream" else load(kind))


async def test_a_migration_that_waits_for_a_long_reader_gives_way_to_appends(
    database: str, request: pytest.FixtureRequest
) -> None:
    installed = await install(database)
    stream = await installed.stream()
    request.getfixturevalue("later")

    async def migrate() -> None:
        async with connected(installed.admin) as conn:
            await catalog.install_store(conn)

    async with await EventStore.open(installed.service) as store, connected(installed.superuser) as reader:
        log = Log(installed, store, stream)
        await log.append("s", "1")
        async with reader.transaction():
            await reader.execute('select from "shop.orders".events')
            with structlog.testing.capture_logs() as logged:
                migrating = asyncio.create_task(migrate())
                for number in itertools.count(1):
                    # The reader holds the table as long as this runs: an append that waited for it would for ever.
                    assert (await log.append("s", str(number + 1), expected_revision=number)).revision == number + 1
                    if len([line for line in logged if "gives way" in line["event"]]) == 2:
                        break
                assert not migrating.done()
        await migrating
        assert (await log.append("s", "last", expected_revision=number + 1)).revision == number + 2
    assert await installed.query('select count(*), count(later) from "shop.orders".events') == [(number + 2, 0)]


async def test_a_migration_that_is_never_given_its_locks_says_what_holds_it_up_and_keeps_no_other_stream_waiting(
    database: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = await install(database)
    held, free = await installed.stream(), [await installed.stream(f"free-{number}") for number in range(4)]
    request.getfixturevalue("later")
    monkeypatch.setattr("refold.eventstore.online.PATIENCE", 1.5)
    async with connected(installed.superuser) as reader, connected(installed.admin) as conn:
        async with reader.transaction():
            await reader.execute('select from "shop.orders".events')
            with structlog.testing.capture_logs() as logged:
                await catalog.install_store(conn)
            (warning,) = [line for line in logged if line["log_level"] == "warning"]
            assert "pg_stat_activity" in warning["event"]
            assert warning["streams"] == 1
            assert (await catalog.get_stream(conn, "shop", "orders")) == held
            async with await EventStore.open(installed.service) as store:
                for stream in (held, *free):
                    assert (await Log(installed, store, stream).append("s", "1")).revision == 1
        for number in range(4):
            assert await installed.query(f'select count(*), count(later) from "shop.free-{number}".events') == [(1, 0)]
        await catalog.install_store(conn)
    assert await installed.query('select count(*), count(later) from "shop.orders".events') == [(1, 0)]
