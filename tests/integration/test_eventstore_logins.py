"""Logins that the operator hands out."""

import psycopg
import pytest
from refold import names
from refold.eventstore import roles
from refold.eventstore.errors import ConflictError

from tests.stores import PASSWORD, Installed, connected, install


async def stored_password(installed: Installed, role: str) -> str:
    return str((await installed.query("select rolpassword from pg_authid where rolname = %s", role))[0][0])


async def groups(installed: Installed, role: str) -> set[str]:
    rows = await installed.query(
        "select roleid::regrole::text from pg_auth_members "
        "where member = (select oid from pg_roles where rolname = %s)",
        role,
    )
    return {row[0].strip('"') for row in rows}


async def test_a_login_is_made_and_left_alone_while_nothing_differs(database: str) -> None:
    installed = await install(database)
    role, heads = f"{installed.database}_reader", names.store_role(installed.database, "heads")
    async with connected(installed.admin) as conn:
        assert await roles.ensure_login(conn, role, PASSWORD, member_of=[heads])
        secret = await stored_password(installed, role)
        assert secret.startswith("SCRAM-SHA-256$")
        for _ in range(7):  # more often than psycopg waits before it prepares a statement
            assert not await roles.ensure_login(conn, role, PASSWORD, member_of=[heads])
        assert await stored_password(installed, role) == secret
    async with connected(installed.dsn(role)) as conn:
        await conn.execute("select * from refold.heads")


async def test_a_new_password_and_other_groups_are_brought_about(database: str) -> None:
    installed = await install(database)
    stream = await installed.stream()
    role, heads = f"{installed.database}_reader", names.store_role(installed.database, "heads")
    reader = names.resource_role(installed.database, stream.schema, "reader")
    async with connected(installed.admin) as conn:
        await roles.ensure_login(conn, role, PASSWORD, member_of=[heads])
        secret = await stored_password(installed, role)
        assert await roles.ensure_login(conn, role, PASSWORD * 2, member_of=[heads])
        assert await stored_password(installed, role) != secret
        assert await roles.ensure_login(conn, role, PASSWORD * 2, member_of=[reader])
        assert await groups(installed, role) == {reader}
        await installed.run(f'alter role "{role}" nologin')
        assert await roles.ensure_login(conn, role, PASSWORD * 2, member_of=[reader])
    async with connected(installed.dsn(role)) as conn:
        await conn.execute('select * from "shop.orders".events')
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await conn.execute("select * from refold.heads")


async def test_a_login_is_dropped_once(database: str) -> None:
    installed = await install(database)
    role = f"{installed.database}_reader"
    async with connected(installed.admin) as conn:
        await roles.ensure_login(conn, role, PASSWORD, member_of=[names.store_role(installed.database, "heads")])
        assert await roles.drop_login(conn, role)
        assert not await roles.drop_login(conn, role)
    assert await installed.query("select from pg_roles where rolname = %s", role) == []


async def test_a_role_of_someone_else_is_neither_changed_nor_dropped(database: str) -> None:
    installed = await install(database)
    role = f"{installed.database}_theirs"
    await installed.run(f'create role "{role}"')
    async with connected(installed.admin) as conn:
        for change in (roles.ensure_login(conn, role, PASSWORD), roles.drop_login(conn, role)):
            with pytest.raises(ConflictError, match="wasn't made by Refold"):
                await change
    assert await installed.query("select rolcanlogin from pg_roles where rolname = %s", role) == [(False,)]


async def test_a_role_that_others_depend_on_is_not_dropped(database: str) -> None:
    installed = await install(database)
    role = f"{installed.database}_owner_of_a_table"
    async with connected(installed.admin) as conn:
        await roles.ensure_login(conn, role, PASSWORD)
        await installed.run(f'create table mine (); alter table mine owner to "{role}"')
        with pytest.raises(ConflictError, match="table mine"):
            await roles.drop_login(conn, role)
