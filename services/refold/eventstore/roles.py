"""PostgreSQL roles: those that the installer makes, and the logins that the operator hands out.

The administrator's connection may belong to a non-superuser with CREATEROLE that owns the database (PostgreSQL 15 and
later). A role's comment says that it is Refold's; a role without that comment is never altered or dropped. Of a
password the comment keeps the SHA-256, so that a reconcile can tell whether it must be set without knowing what
PostgreSQL stores: passwords must therefore be random, with at least 128 bits.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from refold.eventstore.errors import ConflictError

_MARK = "refold"
_ROLE_LOCK = 0x5265666C  # "Refl", the first of two int4 keys; the second is a hash of the role


def _password_mark(password: str) -> str:
    return f"{_MARK} login sha256:{hashlib.sha256(password.encode()).hexdigest()}"


async def ensure_group(conn: AsyncConnection[Any], roles: Iterable[str]) -> None:
    """Create the roles that are missing, without LOGIN; inside the caller's transaction or in one of its own.

    Raises:
        ConflictError: a role of that name exists and isn't Refold's.
    """
    wanted = sorted(roles)
    async with conn.transaction():
        cursor = await conn.execute(
            "select rolname, shobj_description(oid, 'pg_authid') from pg_roles where rolname = any(%s::name[])",
            [wanted],
        )
        known = dict(await cursor.fetchall())
        for role, comment in known.items():
            _check_ours(role, comment)
        missing = [role for role in wanted if role not in known]
        if missing:
            statements = [
                sql.SQL("create role {role}; comment on role {role} is {mark}").format(
                    role=sql.Identifier(role), mark=sql.Literal(f"{_MARK} role")
                )
                for role in missing
            ]
            await conn.execute(sql.SQL("; ").join(statements), prepare=False)


async def ensure_login(conn: AsyncConnection[Any], role: str, password: str, *, member_of: Sequence[str] = ()) -> bool:
    """Make `role` a login with `password` and exactly the memberships `member_of`; change only what differs.

    Args:
        conn: an administrator's connection.
        role: created where it is missing.
        password: random, at least 128 bits; sent as a SCRAM verifier, so it is in no log.
        member_of: the roles whose privileges it inherits; other memberships are revoked.

    Returns:
        Whether anything was changed.

    Raises:
        ConflictError: a role of that name exists and isn't Refold's.
        psycopg.errors.UndefinedObject: a role of `member_of` doesn't exist.
    """
    mark = _password_mark(password)
    async with conn.transaction():
        await conn.execute("select pg_advisory_xact_lock(%s, hashtext(%s))", [_ROLE_LOCK, role])
        cursor = await conn.execute(
            "select r.rolcanlogin, shobj_description(r.oid, 'pg_authid'), "
            "array(select g.rolname::text from pg_auth_members m join pg_roles g on g.oid = m.roleid "
            "where m.member = r.oid) from pg_roles r where r.rolname = %s",
            [role],
        )
        row = await cursor.fetchone()
        name = sql.Identifier(role)
        statements: list[sql.Composable] = []
        memberships: set[str] = set()
        if row is None:
            statements.append(sql.SQL("create role {}").format(name))
        else:
            _check_ours(role, row[1])
            memberships = set(row[2])
        if row is None or not row[0] or row[1] != mark:
            verifier = conn.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
            statements += [
                sql.SQL("alter role {} login inherit password {}").format(name, sql.Literal(verifier)),
                sql.SQL("comment on role {} is {}").format(name, sql.Literal(mark)),
            ]
        statements += [
            sql.SQL("grant {} to {}").format(sql.Identifier(group), name)
            for group in sorted(set(member_of) - memberships)
        ]
        statements += [
            sql.SQL("revoke {} from {}").format(sql.Identifier(group), name)
            for group in sorted(memberships - set(member_of))
        ]
        if statements:
            await conn.execute(sql.SQL("; ").join(statements), prepare=False)
    return bool(statements)


async def drop_login(conn: AsyncConnection[Any], role: str) -> bool:
    """Drop `role` where it exists; its sessions end with their next statement that needs a privilege.

    Returns:
        Whether there was such a role.

    Raises:
        ConflictError: the role isn't Refold's, or objects still depend on it.
    """
    return await drop_roles(conn, [role]) == 1


async def drop_roles(conn: AsyncConnection[Any], roles: Iterable[str]) -> int:
    """Drop those of `roles` that exist, in the caller's transaction or in one of its own; return how many."""
    async with conn.transaction():
        cursor = await conn.execute(
            "select rolname, shobj_description(oid, 'pg_authid') from pg_roles where rolname = any(%s::name[])",
            [sorted(roles)],
        )
        known = await cursor.fetchall()
        for role, comment in known:
            _check_ours(role, comment)
        if known:
            names = sql.SQL(", ").join(sql.Identifier(role) for role, _ in known)
            try:
                await conn.execute(sql.SQL("drop role {}").format(names))
            except psycopg.errors.DependentObjectsStillExist as error:
                raise ConflictError(
                    "role",
                    f"PostgreSQL refused to drop {', '.join(role for role, _ in known)}: {error.diag.message_detail}; "
                    "drop or reassign what depends on it",
                ) from error
    return len(known)


async def adopt_owner(conn: AsyncConnection[Any], owner: str) -> None:
    """Let the administrator act as `owner` (needed to create what it owns)."""
    if not await _may_act_as(conn, owner):
        await conn.execute(sql.SQL("grant {} to current_user").format(sql.Identifier(owner)))


async def _may_act_as(conn: AsyncConnection[Any], role: str) -> bool:
    cursor = await conn.execute(
        "select (select rolsuper from pg_roles where rolname = current_user) or exists ("
        "select from pg_auth_members m where m.member = (select oid from pg_roles where rolname = current_user) "
        "and m.roleid = (select oid from pg_roles where rolname = %s) "
        # From PostgreSQL 16 on the creator of a role is its member with ADMIN only, which isn't enough to act as it.
        "and coalesce((to_jsonb(m) ->> 'set_option')::boolean, true) "
        "and coalesce((to_jsonb(m) ->> 'inherit_option')::boolean, true))",
        [role],
    )
    row = await cursor.fetchone()
    return row is not None and bool(row[0])


def _check_ours(role: str, comment: str | None) -> None:
    if comment is None or not comment.startswith(f"{_MARK} "):
        raise ConflictError(
            "role",
            f"the PostgreSQL role {role} exists and wasn't made by Refold (its comment doesn't begin with "
            f"'{_MARK} '); drop it, or set that comment to let Refold have it",
        )
