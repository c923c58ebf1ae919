"""Invariant 1, attacked: nobody to whom the platform hands out a role can change or forge history."""

import contextlib
import json
from typing import Any

import psycopg
import pytest
from psycopg import sql
from refold import names
from refold.eventstore import EventStore, catalog, roles
from refold.partitioning import partition_of

from tests.stores import PASSWORD, Installed, Log, check_history, connected, event, install, version_0_1_0

REFUSED = (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName)
LOGINS = ("eventstore", "relay", "heads", "writer", "reader", "nobody")


@pytest.fixture(scope="module", params=["attacked", "upgraded"])
async def installed(postgres: Any, request: pytest.FixtureRequest) -> Installed:
    """The streams shop/orders and shop/other with events, and a login for each role that is handed out.

    Once as they are made now, once as they were made by version 0.1.0 and upgraded.
    """
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute(f"create database {request.param}".encode())
    with version_0_1_0() if request.param == "upgraded" else contextlib.nullcontext():
        found = await install(postgres.dsn(request.param))
        streams = [await found.stream("orders"), await found.stream("other")]
    async with connected(found.admin) as conn:
        await catalog.install_store(conn)
    async with await EventStore.open(found.service) as store:
        for stream in streams:
            for number in range(12):
                await Log(found, store, stream).add(f"s{number}", event(id="1"), event(id="2"))
    async with connected(found.admin) as conn:
        for login in LOGINS[2:]:
            group = {
                "heads": [names.store_role(found.database, "heads")],
                "writer": [catalog.writer_role(conn, streams[0])],
                "reader": [catalog.reader_role(conn, streams[0])],
                "nobody": [],
            }[login]
            await roles.ensure_login(conn, f"{found.database}_{login}", PASSWORD, member_of=group)
    return found


def dsn(installed: Installed, login: str) -> str:
    if login in ("eventstore", "relay"):
        return installed.dsn(names.store_role(installed.database, login))
    return installed.dsn(f"{installed.database}_{login}")


async def everything(installed: Installed) -> list[list[tuple[Any, ...]]]:
    """Return all that an attack could have changed."""
    return [
        await installed.query('select * from "shop.orders".events order by partition, position'),
        await installed.query('select * from "shop.other".events order by partition, position'),
        await installed.query("select * from refold.streams order by stream"),
        await installed.query("select stream, partition, head from refold.heads order by 1, 2"),
        await installed.query("select * from refold.store"),
        await installed.query("select tgrelid::regclass::text, tgname, tgenabled from pg_trigger order by 1, 2"),
        await installed.query(
            "select oid::regclass::text, relacl::text, relowner::regrole::text from pg_class "
            "where relnamespace::regnamespace::text not like 'pg_%' order by 1"
        ),
        await installed.query(
            "select oid::regprocedure::text, proacl::text, md5(prosrc) from pg_proc "
            "where pronamespace::regnamespace::text not like 'pg_%' order by 1"
        ),
    ]


def forged_call(stream: str, partition: str, function: str = "append_group") -> str:
    """Return a call of the service's own functions that puts an event into a partition of the caller's choice."""
    if function == "append_one":
        return f"select \"shop.orders\".append_one({stream}, {partition}, 's', -1, 'forged', 'T', '1', null)"
    return f"""select * from "shop.orders".{function}({stream}, array[{partition}], false,
        array['s'], array[{partition}], array[-1], array[1], array[1], array[1], array[0], array[1], array[false],
        array[1], array['s'], array['forged'], array['T'], array['1']::jsonb[], array[null]::jsonb[])"""


ATTACKS = [
    *(
        statement.format(table=table)
        for table in ('"shop.orders".events', '"shop.orders".events_0', '"shop.other".events', "refold.heads")
        for statement in (
            "delete from {table}",
            "truncate {table}",
            "truncate {table} cascade",
            "alter table {table} disable trigger all",
            "alter table {table} disable trigger append_only",
            "alter table {table} rename to gone",
            "alter table {table} owner to current_user",
            "alter table {table} add column forged text",
            "drop table {table}",
            "drop table {table} cascade",
            "lock table {table} in access exclusive mode",
            "copy {table} from stdin",
            "create rule forget as on insert to {table} do instead nothing",
            "create trigger mine before insert on {table} for each row "
            "execute function suppress_redundant_updates_trigger()",
            "grant all on {table} to current_user",
            "select * from {table} for update",
        )
    ),
    "update \"shop.orders\".events set data = '{}'",
    "update \"shop.orders\".events_0 set data = '{}'",
    "update refold.heads set head = 0",
    "update refold.streams set state = 'released', uid = null",
    "insert into refold.heads values (1, 77, 0)",
    "insert into refold.streams (namespace, name, incarnation, uid, schema, partitions, topic, state) "
    "values ('x', 'x', '0123456789abcdef', 'x', 'x', 1, 'x', 'active')",
    "insert into \"shop.orders\".events values (0, 999, 's', 1, 'x', 'T', '1', null, now())",
    "insert into \"shop.orders\".events_0 values (0, 999, 's', 1, 'x', 'T', '1', null, now())",
    'merge into "shop.orders".events e using (select 1) x on true when matched then delete',
    'drop trigger append_only on "shop.orders".events',
    'alter table "shop.orders".events detach partition "shop.orders".events_0',
    'create table "shop.orders".mine partition of "shop.orders".events for values in (99)',
    'create table "shop.orders".mine ()',
    'drop schema "shop.orders" cascade',
    'alter schema "shop.orders" rename to gone',
    "drop schema refold cascade",
    "create or replace function refold.refuse_change() returns trigger language plpgsql as $$ begin return old; end $$",
    "drop function refold.refuse_change() cascade",
    'drop function "shop.orders".append(jsonb)',
    'drop function "shop.orders".append_all(jsonb)',
    "set session_replication_role = replica",
    "set role postgres",
    "set session authorization postgres",
    "set role {owner}",
    "set role {admin}",
    "grant {owner} to current_user",
    "alter role {owner} login password 'mine'",
    "create role mine superuser",
    "alter system set fsync = off",
    "create schema mine",
    "create extension pg_trgm",
    "create event trigger mine on ddl_command_start execute function pg_catalog.tsvector_update_trigger()",
    "do $$ begin perform refold.refuse_change(); end $$",
]


@pytest.mark.parametrize("login", LOGINS)
async def test_no_role_that_is_handed_out_can_change_history(installed: Installed, login: str) -> None:
    before = await everything(installed)
    values = {
        "owner": sql.Identifier(names.store_role(installed.database, "owner")).as_string(),
        "admin": sql.Identifier(f"admin_of_{installed.database}").as_string(),
    }
    done, misspelled = [], []
    for attack in ATTACKS:
        statement = attack.replace("{owner}", values["owner"]).replace("{admin}", values["admin"])
        async with connected(dsn(installed, login)) as conn:
            try:
                await conn.execute(statement.encode())
            except psycopg.Error as error:
                if error.sqlstate == "42601":  # a syntax error: it wasn't the right that was wanting
                    misspelled.append(statement)
            else:
                # PostgreSQL warns "no privileges were granted" and says that it went well.
                done += [] if statement.startswith("grant all") else [statement]
    assert (done, misspelled) == ([], [])
    assert await everything(installed) == before


@pytest.mark.parametrize("login", LOGINS)
async def test_each_role_reads_and_calls_what_it_is_for_and_nothing_else(installed: Installed, login: str) -> None:
    asked = {
        "events of orders": 'select * from "shop.orders".events',
        "events of other": 'select * from "shop.other".events',
        "heads": "select * from refold.heads",
        "catalog": "select * from refold.streams",
        "append to orders": "select * from \"shop.orders\".append('[]')",
        "append to other": "select * from \"shop.other\".append('[]')",
        "append all to orders": "select * from \"shop.orders\".append_all('[]')",
        "append all to other": "select * from \"shop.other\".append_all('[]')",
        "append with partitions": forged_call("0", "0"),
        "append all with partitions": forged_call("0", "0", "append_all"),
        "append one with a partition": forged_call("0", "0", "append_one"),
        "copy": "copy \"shop.orders\".events to program 'true'",
    }
    allowed = {
        "eventstore": {
            "events of orders",
            "events of other",
            "heads",
            "catalog",
            "append with partitions",
            "append all with partitions",
            "append one with a partition",
        },
        "relay": {"events of orders", "events of other", "heads", "catalog"},
        "heads": {"heads", "catalog"},
        "writer": {"append to orders", "append all to orders"},
        "reader": {"events of orders"},
        "nobody": set(),
    }[login]
    could, failed = set(), []
    async with connected(dsn(installed, login)) as conn:
        for what, statement in asked.items():
            try:
                await conn.execute(statement.encode())
            except REFUSED:
                continue
            except psycopg.Error as error:
                if not (error.sqlstate or "").startswith("RF"):  # it ran, and refused what it was given
                    failed.append((what, error))
            could.add(what)
    assert failed == []
    assert could == allowed


@pytest.mark.parametrize("table", ["events", "events_0"])
@pytest.mark.parametrize(
    "how", ["update {} set type = 'x'", "delete from {}", "truncate {}", "delete from {} where false"]
)
async def test_the_triggers_refuse_the_owner_and_the_superuser_too(installed: Installed, table: str, how: str) -> None:
    before = await everything(installed)
    owner = sql.Identifier(names.store_role(installed.database, "owner")).as_string()
    for prepare in (f"set role {owner}", "set session_replication_role = replica"):
        async with connected(installed.superuser) as conn:
            await conn.execute(prepare.encode())
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
                await conn.execute(how.format(f'"shop.orders".{table}').encode())
    assert await everything(installed) == before


async def test_a_schema_that_a_caller_puts_in_front_changes_nothing_for_the_functions(installed: Installed) -> None:
    async with connected(dsn(installed, "writer")) as conn:
        await conn.execute("create temp table heads (stream int, partition int, head bigint, recorded_at timestamptz)")
        await conn.execute("create temp table events (partition int, position bigint, subject text, revision bigint)")
        await conn.execute("create function pg_temp.cardinality(anyarray) returns int language sql as 'select 0'")
        await conn.execute("set search_path = pg_temp, pg_catalog")
        appends = json.dumps([{"subject": "path", "events": [{"id": "1", "type": "T", "data": 1}]}])
        row = await (await conn.execute('select * from "shop.orders".append(%s)', [appends])).fetchone()
    assert row is not None
    assert row[:2] == ("appended", 1)
    assert len(await installed.query("select from \"shop.orders\".events where subject = 'path'")) == 1


WRITES = [
    {"subject": "w", "events": [{"id": "1", "type": "T", "data": {"a": 1}}]},
    {"subject": "w", "expected": 1, "events": [{"id": "2", "type": "T", "data": 1, "metadata": {"m": 1}}]},
    {"subject": "w", "expected": "none", "events": [{"id": "3", "type": "T", "data": 1}]},
    {"subject": "w", "expected": "exists", "events": [{"id": "2", "type": "T", "data": 1}]},
    {"subject": "w", "expected": "any", "events": [{"id": "2", "type": "T", "data": 2}]},
]


async def test_a_writer_appends_by_its_function_which_chooses_the_partition(installed: Installed) -> None:
    async with connected(dsn(installed, "writer")) as conn:
        rows = await (await conn.execute('select * from "shop.orders".append(%s)', [json.dumps(WRITES)])).fetchall()
        names_of_subjects = ["é", "日本", "a", "abcdefg", "order-1"]
        more = [{"subject": subject, "events": [{"id": "1", "type": "T", "data": 1}]} for subject in names_of_subjects]
        placed = await (await conn.execute('select * from "shop.orders".append(%s)', [json.dumps(more)])).fetchall()
    assert [row[:2] for row in rows] == [
        ("appended", 1), ("appended", 2), ("revision-conflict", 2), ("replayed", 2), ("id-conflict", 2),
    ]  # fmt: skip
    assert [row[2] for row in placed] == [partition_of(subject, 3) for subject in names_of_subjects]
    stream = await installed.stream("orders")
    check_history(await installed.history(stream))


@pytest.mark.parametrize(
    "forged",
    [
        "null", "[]", "{}", "1", '"x"', "[1]", "[null]", "[[]]", '[{"subject": "s"}]',
        '[{"subject": "s", "events": []}]',
        '[{"subject": "s", "events": {}}]', '[{"subject": 1, "events": [{"id": "1", "type": "T", "data": 1}]}]',
        '[{"subject": "", "events": [{"id": "1", "type": "T", "data": 1}]}]',
        '[{"subject": "s", "events": [{"id": "", "type": "T", "data": 1}]}]',
        '[{"subject": "s", "events": [{"id": 1, "type": "T", "data": 1}]}]',
        '[{"subject": "s", "events": [{"id": "1", "type": "T"}]}]',
        '[{"subject": "s", "events": [{"id": "1", "type": null, "data": 1}]}]',
        '[{"subject": "s", "events": [1]}]',
        '[{"subject": "s", "events": [{"id": "1", "type": "T", "data": 1}, {"id": "1", "type": "T", "data": 1}]}]',
        '[{"subject": "s", "expected": -1, "events": [{"id": "1", "type": "T", "data": 1}]}]',
        '[{"subject": "s", "expected": 1.5, "events": [{"id": "1", "type": "T", "data": 1}]}]',
        '[{"subject": "s", "expected": 1e30, "events": [{"id": "1", "type": "T", "data": 1}]}]',
        '[{"subject": "s", "expected": null, "events": [{"id": "1", "type": "T", "data": 1}]}]',
        '[{"subject": "s", "expected": [], "events": [{"id": "1", "type": "T", "data": 1}]}]',
        '[{"subject": "s", "expected": "some", "events": [{"id": "1", "type": "T", "data": 1}]}]',
        json.dumps([{"subject": "s" * 513, "events": [{"id": "1", "type": "T", "data": 1}]}]),
        json.dumps([{"subject": "s", "events": [{"id": str(n), "type": "T", "data": 1} for n in range(1001)]}]),
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
async def test_a_forged_append_is_refused_whole(installed: Installed, forged: str) -> None:
    before = await everything(installed)
    async with connected(dsn(installed, "writer")) as conn:
        for function in ("append", "append_all"):
            with pytest.raises(psycopg.Error):
                await conn.execute(f'select * from "shop.orders".{function}(%s)'.encode(), [forged])
            with pytest.raises(psycopg.Error):
                await conn.execute(f'select * from "shop.orders".{function}(null)'.encode())
    assert await everything(installed) == before


async def test_the_service_is_refused_partitions_and_streams_that_are_not_there(installed: Installed) -> None:
    stream = await installed.stream("orders")
    other = await installed.stream("other")
    before = await everything(installed)
    for number, partition in ((stream.stream, 3), (stream.stream, -1), (other.stream, 0), (999, 0), (None, 0)):
        async with connected(dsn(installed, "eventstore")) as conn:
            for function in ("append_group", "append_all", "append_one"):
                with pytest.raises(psycopg.Error) as caught:
                    await conn.execute(forged_call(str(number or "null"), str(partition), function).encode())
                assert caught.value.sqlstate in ("RF001", "RF002")
    assert await everything(installed) == before


def call_with(function: str, subject: str, id: str, type: str) -> tuple[str, list[Any]]:  # noqa: A002
    """Return a call of the service's own functions: of groups, one in which the event stands between two others."""
    if function == "append_one":
        return "select \"shop.orders\".append_one(1, 0, %s, -1, %s, %s, '1', null)", [subject, id, type]
    other = f"other {len(subject)} {len(id)} {len(type)}"
    query = f"""select * from "shop.orders".{function}(1, array[0], true,
        %s::text[], array[0, 0], array[-1, -1]::bigint[], array[1, 2], array[1, 3], array[1, 3], array[0, 0],
        array[1, 2], array[false, false], array[1, 2, 2], %s::text[], %s::text[], %s::text[],
        array['1', '1', '1']::jsonb[], array[null, null, null]::jsonb[])"""
    return query, [[other, subject], [other, subject, subject], ["1", id, "3"], ["T", type, "T"]]


@pytest.mark.parametrize("function", ["append_group", "append_all", "append_one"])
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("subject", ["", "s" * 513, "é" * 257, "s" * 3000]),
        ("id", ["", "i" * 256, "é" * 128, "i" * 3000]),
        ("type", ["", "t" * 256, "é" * 128, "t" * 3000]),
    ],
)
async def test_the_service_is_refused_events_whose_values_have_not_the_length_they_must(
    installed: Installed, function: str, field: str, values: list[str]
) -> None:
    before = await everything(installed)
    for value in values:
        query, arguments = call_with(function, **{"subject": "s", "id": "i", "type": "T", field: value})
        async with connected(dsn(installed, "eventstore")) as conn:
            with pytest.raises(psycopg.errors.CheckViolation) as caught:
                await conn.execute(query.encode(), arguments)
        most = 512 if field == "subject" else 255
        said = f"an event's {field} has 1 to {most} bytes in UTF-8, not {len(value.encode())}"
        assert caught.value.diag.message_primary == said
    assert await everything(installed) == before


@pytest.mark.parametrize("function", ["append_group", "append_all", "append_one"])
async def test_the_service_is_refused_events_that_lack_a_value(installed: Installed, function: str) -> None:
    before = await everything(installed)
    for field in ("subject", "id", "type"):
        values: dict[str, Any] = {"subject": "s", "id": "i", "type": "T", field: None}
        query, arguments = call_with(function, **{key: value or "" for key, value in values.items()})
        arguments = [
            [None if value == "" else value for value in one] if isinstance(one, list) else one or None
            for one in arguments
        ]
        async with connected(dsn(installed, "eventstore")) as conn:
            with pytest.raises(psycopg.errors.NotNullViolation):
                await conn.execute(query.encode(), arguments)
    assert await everything(installed) == before


@pytest.mark.parametrize("function", ["append_group", "append_all", "append_one"])
async def test_the_service_appends_values_of_the_greatest_length(installed: Installed, function: str) -> None:
    query, arguments = call_with(function, function.ljust(12, "_") + "é" * 250, "é" * 127 + "i", "t" * 255)
    async with connected(dsn(installed, "eventstore")) as conn:
        await conn.execute(query.encode(), arguments)
    check_history(await installed.history(await installed.stream("orders")))
