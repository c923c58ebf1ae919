"""The catalog of a store: installing it, and claiming, activating, releasing and dropping streams.

All that the operator does to a store goes through here. Each function takes an administrator's connection (see
`refold.eventstore.roles` for what that role must be), works in a transaction of its own, and is level-based: called
again with the same arguments it changes nothing; a crash between two calls leaves what the next call puts right.

A claim (namespace, name, resource UID, Kafka cluster, topic) is written before the topic is made and the topic's id
after it, so that whoever looks can tell whose topic it is. All is owned by the store's owner role, which can't log in.
"""

import contextlib
import datetime as dt
import functools
import random
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
import psycopg
import structlog
from psycopg import AsyncConnection, sql
from psycopg.rows import class_row

from refold import names
from refold.eventstore import event_types, migrations, records, roles
from refold.eventstore.errors import ConflictError, EventStoreError, NotInstalledError
from refold.eventstore.online import LOCK_TIMEOUT, each_giving_way, giving_way

log = structlog.get_logger(__name__)

#: Held exclusively while a store is installed or upgraded, shared while a stream is claimed or dropped ("Refi").
_INSTALL_LOCK = 0x52656669

State = Literal["claimed", "active", "released"]


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of the catalog.

    `stream` is its number in the catalog; `incarnation` (16 hex digits) names this one history, in tokens and records;
    `uid` is of the EventStream that claims it, None once released; `migration` is that of its schema; `types_revision`
    counts the states of its event types.
    """

    stream: int
    namespace: str
    name: str
    incarnation: str
    uid: str | None
    schema: str
    partitions: int
    topic: str
    kafka_cluster: str | None
    topic_id: str | None
    state: State
    migration: int
    types_revision: int


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """What the live version of a Projection folds (JSON), and the UID of the Projection."""

    uid: str
    version: str
    definition: str


# A store of version 0.1.0, served until the operator has upgraded it, has no types_revision.
_COLUMNS = sql.SQL(", ").join(
    sql.SQL("coalesce((to_jsonb(streams) ->> 'types_revision')::integer, 0) as types_revision")
    if column == "types_revision"
    else sql.Identifier(column)
    for column in Stream.__struct_fields__
)
_STREAMS = sql.SQL("select {} from refold.streams").format(_COLUMNS)


async def install_store(conn: AsyncConnection[Any]) -> str:
    """Install or upgrade the store of the connection's database, and the schemas of the streams in it.

    Idempotent; two at once wait for each other. A stream whose tables other transactions hold for long keeps its
    migration, with a warning in the log, until this is called again.

    Returns:
        The store's id, 16 hex digits, chosen when it was first installed.

    Raises:
        ConflictError: a role of the store exists and isn't Refold's.
        EventStoreError: the database was installed by a later version of Refold, or other transactions hold the
            catalog's tables for longer than a migration waits (see `refold.eventstore.online`).
        psycopg.Error: the role isn't allowed to (it needs CREATEROLE and must own the database), or isn't reachable.
    """
    found = await giving_way(conn, lambda: _migrate_store(conn))
    await _upgrade_streams(conn)
    return found


async def store_id(conn: AsyncConnection[Any]) -> str:
    """Return the store's id (16 hex digits).

    Raises:
        NotInstalledError: the database holds no store.
    """
    try:
        row = await (await conn.execute("select id from refold.store")).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName) as error:
        raise _not_installed(conn) from error
    if row is None:
        raise _not_installed(conn)
    return str(row[0])


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What a resource claims.

    Attributes:
        namespace: the EventStream's namespace.
        name: the EventStream's name.
        uid: the EventStream's UID.
        partitions: 1 to 512, immutable.
        topic: immutable.
        kafka_cluster: Kafka's cluster id; where it differs from the stored one, the stored topic id is forgotten.
    """

    namespace: str
    name: str
    uid: str
    partitions: int
    topic: str
    kafka_cluster: str

    @property
    def schema(self) -> str:
        """The schema of the stream."""
        return names.event_schema(self.namespace, self.name)


async def claim_stream(
    conn: AsyncConnection[Any],
    *,
    namespace: str,
    name: str,
    uid: str,
    partitions: int,
    topic: str,
    kafka_cluster: str,
) -> Stream:
    """Claim a stream for the resource `uid`; see `claim_streams`.

    Raises:
        ConflictError: the name, schema or topic belongs to another resource, or partitions or topic differ from those
            that the stream was made with.
        NotInstalledError: `install_store` wasn't run.
    """
    claim = Claim(
        namespace=namespace, name=name, uid=uid, partitions=partitions, topic=topic, kafka_cluster=kafka_cluster
    )
    (claimed,) = await claim_streams(conn, [claim])
    return _must_be(claimed)


async def claim_streams(conn: AsyncConnection[Any], claims: Sequence[Claim]) -> list[Stream | ConflictError]:
    """Claim streams for their resources, making their schemas, tables and roles where they are missing.

    A stream that was released by a resource of the same namespace and name is taken back with its history. A stream
    is `claimed`, not served, until `activate`; one that is active already stays active. All are claimed in one
    transaction, which holds locks on all tables that it makes: a handful for each stream and each of its partitions.

    Returns:
        In the order of `claims`, the stream, or why it can't be claimed: the name, schema or topic belongs to another
        resource, or partitions or topic differ from those that the stream was made with.

    Raises:
        ConflictError: one of the claims clashes with another one of `claims` or of the same moment, or with a schema or
            role that isn't Refold's. Nothing was claimed: claim one by one.
        psycopg.errors.LockNotAvailable: somebody holds one of several. Nothing was claimed: claim one by one.
        NotInstalledError: `install_store` wasn't run.
    """

    async def claim() -> list[Stream | ConflictError]:
        await conn.execute("select pg_advisory_xact_lock_shared(%s, 0)", [_INSTALL_LOCK])
        async with as_owner(conn, _store_roles(conn)["owner"]):
            found = await _claim_rows(conn, claims)
        latest = migrations.load("stream")[-1].number
        behind = [one for one in found if isinstance(one, Stream) and one.migration < latest]
        migrated = {one.stream: one for one in await _migrate_streams(conn, behind)}
        return [migrated.get(one.stream, one) if isinstance(one, Stream) else one for one in found]

    told = ", ".join(f"{one.namespace}/{one.name}" for one in claims)
    try:
        if len(claims) == 1:
            return await giving_way(conn, claim)
        async with conn.transaction():
            await conn.execute(LOCK_TIMEOUT)
            return await claim()
    except psycopg.errors.UniqueViolation as error:
        topics = ", ".join(one.topic for one in claims)
        raise ConflictError(
            "name",
            f"another claim of stream {told} or of topic {topics} was written at the same time: "
            f"{error.diag.message_detail}",
        ) from error
    except psycopg.errors.DuplicateSchema as error:
        schemas = ", ".join(one.schema for one in claims)
        raise ConflictError(
            "schema",
            f"the schema {schemas} exists in database {conn.info.dbname} and isn't in the store's catalog; "
            "drop or rename it, or choose another name for the stream",
        ) from error
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject) as error:
        raise _not_installed(conn) from error


async def _claim_rows(conn: AsyncConnection[Any], claims: Sequence[Claim]) -> list[Stream | ConflictError]:
    """Write the catalog's rows of `claims`, as the owner, in the caller's transaction."""
    known = await _select(
        conn,
        sql.SQL(
            " where (namespace, name) in (select * from unnest({}::text[], {}::text[])) or schema = any({}) "
            "or (kafka_cluster, topic) in (select * from unnest({}::text[], {}::text[])) order by stream for update"
        ).format(
            [one.namespace for one in claims], [one.name for one in claims], [one.schema for one in claims],
            [one.kafka_cluster for one in claims], [one.topic for one in claims],
        ),
    )  # fmt: skip
    found: list[Stream | ConflictError | None] = []
    for one in claims:
        try:
            stream = _own(known, one)
        except ConflictError as error:
            found.append(error)
            continue
        if stream is not None and (stream.uid, stream.kafka_cluster) != (one.uid, one.kafka_cluster):
            stream = await _take(conn, stream, one)
        found.append(stream)
    new = [one for one, stream in zip(claims, found, strict=True) if stream is None]
    made = {(stream.namespace, stream.name): stream for stream in await _insert(conn, new)} if new else {}
    return [
        made[one.namespace, one.name] if stream is None else stream for one, stream in zip(claims, found, strict=True)
    ]


async def _insert(conn: AsyncConnection[Any], claims: Sequence[Claim]) -> list[Stream]:
    row = sql.SQL("({}, {}, {}, {}, {}, {}, {}, {}, 'claimed')")
    rows = [
        row.format(
            one.namespace, one.name, secrets.token_hex(8), one.uid, one.schema, one.partitions, one.topic,
            one.kafka_cluster,
        )
        for one in claims
    ]  # fmt: skip
    async with conn.cursor(row_factory=class_row(Stream)) as cursor:
        await cursor.execute(
            sql.SQL(
                "insert into refold.streams "
                "(namespace, name, incarnation, uid, schema, partitions, topic, kafka_cluster, state) "
                "values {} returning {}"
            ).format(sql.SQL(", ").join(rows), _COLUMNS)
        )
        return await cursor.fetchall()


async def _take(conn: AsyncConnection[Any], stream: Stream, claim: Claim) -> Stream:
    async with conn.cursor(row_factory=class_row(Stream)) as cursor:
        await cursor.execute(
            sql.SQL(
                "update refold.streams set uid = %(uid)s, kafka_cluster = %(cluster)s, "
                "state = case when state = 'released' then 'claimed' else state end, "
                "topic_id = case when kafka_cluster = %(cluster)s then topic_id end "
                "where stream = %(stream)s returning {}"
            ).format(_COLUMNS),
            {"uid": claim.uid, "cluster": claim.kafka_cluster, "stream": stream.stream},
        )
        taken = await cursor.fetchone()
    assert taken is not None, "the row is locked, so it is there"
    return taken


async def record_topic(conn: AsyncConnection[Any], stream: Stream, topic_id: str) -> Stream:
    """Record the id of the stream's topic, once it was made (or made again).

    Raises:
        ConflictError: the stream isn't claimed by `stream.uid` any more.
    """
    (recorded,) = await _update(conn, [stream], "topic_id", [topic_id])
    return _must_be(recorded)


async def record_topics(
    conn: AsyncConnection[Any], streams: Sequence[Stream], topic_ids: Sequence[str]
) -> list[Stream | ConflictError]:
    """Record topics' ids as `record_topic` does one, in one transaction; return the stream, or why not, for each.

    Raises:
        psycopg.errors.LockNotAvailable: somebody holds one of several; nothing was recorded: record one by one.
    """
    return await _update(conn, streams, "topic_id", topic_ids)


async def activate(conn: AsyncConnection[Any], stream: Stream) -> Stream:
    """Let the stream be appended to, relayed and projected.

    Raises:
        ConflictError: the stream isn't claimed by `stream.uid` any more.
    """
    (active,) = await _update(conn, [stream], "state", ["active"])
    return _must_be(active)


async def activate_all(conn: AsyncConnection[Any], streams: Sequence[Stream]) -> list[Stream | ConflictError]:
    """Let streams be served as `activate` does one, in one transaction; return the stream, or why not, for each.

    Raises:
        psycopg.errors.LockNotAvailable: somebody, such as an append, holds one of several; nothing was done: do it one
            by one.
    """
    return await _update(conn, streams, "state", ["active"] * len(streams))


async def limit_events(conn: AsyncConnection[Any], event_bytes: int) -> None:
    """Let writers append in SQL what topics take that are made for events of `event_bytes`, and nothing larger."""
    async with conn.transaction(), as_owner(conn, _store_roles(conn)["owner"]):
        await conn.execute(
            "update refold.store set topic_bytes = %(most)s where topic_bytes is distinct from %(most)s",
            {"most": records.stored_bytes(event_bytes)},
        )


async def set_event_types(conn: AsyncConnection[Any], stream: Stream, types: Mapping[str, Any] | None) -> Stream:
    """Make `types` what the stream takes; None: events of any type and data.

    Appends under way are finished first. Once this has returned, no event gets in that was checked with other schemas.

    Args:
        conn: an administrator's connection.
        stream: a claimed stream.
        types: the JSON Schema of each event type; `refold.eventstore.event_types.EventTypes` has taken them.

    Raises:
        ConflictError: the stream isn't claimed by `stream.uid` any more.
    """
    wanted = None if types is None else event_types.encode(types)
    async with conn.transaction(), as_owner(conn, _store_roles(conn)["owner"]):
        if (await get_event_types(conn, stream.stream))[1] == wanted:
            return stream
        await _lock_heads(conn, [stream])
        found = await _select(
            conn, sql.SQL(" where stream = {} and uid = {} for update").format(stream.stream, stream.uid)
        )
        if not found:
            raise _not_claimed(stream)
        revision = found[0].types_revision + 1
        await conn.execute("delete from refold.event_types where stream = %s", [stream.stream])
        if wanted is not None:
            await conn.execute(
                "insert into refold.event_types (stream, types) values (%s, %s)", [stream.stream, wanted]
            )
        await conn.execute("update refold.streams set types_revision = %s where stream = %s", [revision, stream.stream])
        await conn.execute(
            "update refold.heads set types_revision = %s where stream = %s",
            [None if wanted is None else revision, stream.stream],
        )
    return msgspec.structs.replace(found[0], types_revision=revision)


async def get_event_types(conn: AsyncConnection[Any], stream: int) -> tuple[int, str | None]:
    """Return the revision and the JSON text of the event types that a stream takes; no text where it takes any event.

    Args:
        conn: a connection that may read the catalog.
        stream: its number; one that is gone takes any event, at revision 0.
    """
    cursor = await conn.execute(
        "select s.types_revision, t.types from refold.streams s left join refold.event_types t using (stream) "
        "where stream = %s",
        [stream],
    )
    return await cursor.fetchone() or (0, None)


async def texts_of_event_types(conn: AsyncConnection[Any], streams: Sequence[int]) -> dict[int, str]:
    """Return the JSON texts of event types of the streams, by their numbers; those that take any event have none."""
    cursor = await conn.execute("select stream, types from refold.event_types where stream = any(%s)", [list(streams)])
    return dict(await cursor.fetchall())


async def release_stream(conn: AsyncConnection[Any], stream: Stream) -> None:
    """Let go of the stream (deletionPolicy Retain): nothing is dropped, nothing is served any more.

    Appends under way are finished first. A stream that is gone or belongs to another resource is left alone.
    """
    async with conn.transaction(), as_owner(conn, _store_roles(conn)["owner"]):
        await _lock_heads(conn, [stream])
        cursor = await conn.execute(
            "update refold.streams set state = 'released', uid = null where stream = %s and uid = %s",
            [stream.stream, stream.uid],
        )
        if cursor.rowcount:
            await conn.execute("update refold.heads set active = false where stream = %s", [stream.stream])


async def drop_stream(conn: AsyncConnection[Any], *, namespace: str, name: str, uid: str) -> bool:
    """Drop the stream's history, roles and catalog entry (deletionPolicy Delete).

    Returns:
        Whether there was such a stream of that `uid`; another resource's is left alone.

    Raises:
        ConflictError: something that isn't Refold's depends on it.
    """
    async with conn.transaction():
        await conn.execute("select pg_advisory_xact_lock_shared(%s, 0)", [_INSTALL_LOCK])
        async with as_owner(conn, _store_roles(conn)["owner"]), conn.cursor(row_factory=class_row(Stream)) as cursor:
            await cursor.execute(_STREAMS + sql.SQL(" where (namespace, name) = (%s, %s)"), [namespace, name])
            stream = await cursor.fetchone()
            if stream is None or stream.uid != uid:
                return False
            await _lock_heads(conn, [stream])
            await cursor.execute("delete from refold.streams where stream = %s and uid = %s", [stream.stream, uid])
            if cursor.rowcount == 0:
                return False
            await cursor.execute(sql.SQL("drop schema if exists {} cascade").format(sql.Identifier(stream.schema)))
        stream_roles = _stream_roles(conn, stream.schema)
        await roles.drop_roles(conn, stream_roles.values())
    return True


async def get_stream(conn: AsyncConnection[Any], namespace: str, name: str) -> Stream | None:
    """Return the stream of that name in whatever state, or None.

    Raises:
        NotInstalledError: the database holds no store.
    """
    found = await get_streams(conn, [(namespace, name)])
    return found.get((namespace, name))


async def get_streams(conn: AsyncConnection[Any], wanted: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Stream]:
    """Return those streams of the (namespace, name) `wanted` that there are, in whatever state, by one query.

    Raises:
        NotInstalledError: the database holds no store.
    """
    where = sql.SQL(" where (namespace, name) in (select * from unnest({}::text[], {}::text[]))")
    found = await _select(conn, where.format([one[0] for one in wanted], [one[1] for one in wanted]))
    return {(stream.namespace, stream.name): stream for stream in found}


async def get_holder(conn: AsyncConnection[Any], *, kafka_cluster: str, topic: str) -> Stream | None:
    """Return the stream that has a topic, claimed or released, or None where no stream has it.

    Raises:
        NotInstalledError: the database holds no store.
    """
    found = await _select(conn, sql.SQL(" where (kafka_cluster, topic) = ({}, {})").format(kafka_cluster, topic))
    return next(iter(found), None)


async def set_definition(
    conn: AsyncConnection[Any], *, namespace: str, name: str, uid: str, version: str, definition: str
) -> None:
    """Write what the live version of a Projection folds; only where it differs.

    Args:
        conn: an administrator's connection.
        namespace: the Projection's namespace.
        name: the Projection's name.
        uid: the Projection's UID; another one's of the same name, which is gone, is overwritten.
        version: the live one.
        definition: `refold.projection.definition.VersionDefinition` as JSON, which the event store itself never reads.

    Raises:
        NotInstalledError: `install_store` wasn't run by this release.
    """
    written = Definition(uid=uid, version=version, definition=definition)
    if await get_definition(conn, namespace, name) == written:
        return
    async with conn.transaction(), as_owner(conn, _store_roles(conn)["owner"]):
        await conn.execute(
            "insert into refold.definitions (namespace, name, uid, version, definition) values (%s, %s, %s, %s, %s) "
            "on conflict (namespace, name) do update "
            "set uid = excluded.uid, version = excluded.version, definition = excluded.definition",
            [namespace, name, uid, version, definition],
        )


async def drop_definition(conn: AsyncConnection[Any], *, namespace: str, name: str, uid: str) -> None:
    """Forget what a Projection folds; one of another `uid` is left alone."""
    found = await get_definition(conn, namespace, name)
    if found is None or found.uid != uid:
        return
    async with conn.transaction(), as_owner(conn, _store_roles(conn)["owner"]):
        await conn.execute(
            "delete from refold.definitions where (namespace, name, uid) = (%s, %s, %s)", [namespace, name, uid]
        )


async def get_definition(conn: AsyncConnection[Any], namespace: str, name: str) -> Definition | None:
    """Return what the live version of a Projection folds, None where the operator wrote none.

    Raises:
        NotInstalledError: the database holds no store, or one of an earlier release.
    """
    try:
        async with conn.cursor(row_factory=class_row(Definition)) as cursor:
            await cursor.execute(
                "select uid, version, definition from refold.definitions where (namespace, name) = (%s, %s)",
                [namespace, name],
            )
            return await cursor.fetchone()
    except psycopg.errors.UndefinedTable as error:
        raise NotInstalledError(
            f"the store in database {conn.info.dbname} doesn't know what Projections fold before the operator has "
            "upgraded it; this passes by itself"
        ) from error
    except psycopg.errors.InvalidSchemaName as error:
        raise _not_installed(conn) from error


async def list_streams(conn: AsyncConnection[Any]) -> list[Stream]:
    """Return all streams, in whatever state, in order of their numbers.

    Raises:
        NotInstalledError: the database holds no store.
    """
    return await _select(conn, sql.SQL(" order by stream"))


async def stream_heads(
    conn: AsyncConnection[Any], streams: Sequence[Stream] | None = None
) -> dict[int, dict[int, int]]:
    """Return the heads of `streams` (default: of all) as {stream number: {partition: head}}, by one query."""
    chosen = None if streams is None else [stream.stream for stream in streams]
    cursor = await conn.execute(
        "select stream, partition, head from refold.heads where %(chosen)s::int[] is null or stream = any(%(chosen)s)",
        {"chosen": chosen},
    )
    heads: dict[int, dict[int, int]] = {}
    async for stream, partition, head in cursor:
        heads.setdefault(stream, {})[partition] = head
    return heads


async def heads_of(conn: AsyncConnection[Any], incarnations: Sequence[str]) -> dict[tuple[str, int], int]:
    """Return the heads of streams by incarnation and partition; a history that is gone is left out."""
    cursor = await conn.execute(
        "select incarnation, partition, head from refold.heads join refold.streams using (stream) "
        "where incarnation = any(%s)",
        [list(incarnations)],
    )
    return {(incarnation, partition): head async for incarnation, partition, head in cursor}


async def positions_at(conn: AsyncConnection[Any], stream: Stream, moment: dt.datetime) -> list[int] | None:
    """Return the last positions that were recorded until `moment`, in the order of the partitions.

    None where `moment` hasn't passed by the store's clock. Otherwise the answer is final: it is read while no append is
    under way, and what is appended later is recorded later.
    """
    async with conn.transaction(), as_owner(conn, _store_roles(conn)["owner"]):
        await _lock_heads(conn, [stream])
        # A lone append that waits for a head has read the clock already. It reads it again if the head was written.
        await conn.execute("update refold.heads set active = active where stream = %s", [stream.stream])
        cursor = await conn.execute(
            "select head, recorded_at <= %(moment)s, clock_timestamp() > %(moment)s from refold.heads "
            "where stream = %(stream)s order by partition",
            {"moment": moment, "stream": stream.stream},
        )
        heads = await cursor.fetchall()
    if not all(passed for _, _, passed in heads):
        return None
    # From here on nobody is held up. Up to `low` all is recorded until the moment, from `high` on nothing is.
    low = [head if before else 0 for head, before, _ in heads]
    high = [head + 1 if before else head for head, before, _ in heads]
    step = sql.SQL(
        "select partition, position, recorded_at <= %s from {} "
        "where (partition, position) in (select * from unnest(%s::int[], %s::bigint[]))"
    ).format(sql.Identifier(stream.schema, "events"))
    while open_ := [partition for partition in range(len(heads)) if high[partition] - low[partition] > 1]:
        middles = [(low[partition] + high[partition]) // 2 for partition in open_]
        async with conn.transaction(), as_owner(conn, _store_roles(conn)["owner"]):
            found = await (await conn.execute(step, [moment, open_, middles])).fetchall()
        if len(found) != len(open_):
            raise EventStoreError(f"the stream {stream.namespace}/{stream.name} lacks events below its heads")
        for partition, position, before in found:
            (low if before else high)[partition] = position
    return low


def writer_role(conn: AsyncConnection[Any], stream: Stream) -> str:
    """Return the role that may append to the stream by its `append` function, and nothing else."""
    return names.resource_role(conn.info.dbname, stream.schema, "writer")


def reader_role(conn: AsyncConnection[Any], stream: Stream) -> str:
    """Return the role that may read the stream's events, and nothing else."""
    return names.resource_role(conn.info.dbname, stream.schema, "reader")


def _own(known: Sequence[Stream], claim: Claim) -> Stream | None:
    """Return the stream among `known` that the claim is for, or None where it is new; refuse what is someone else's."""
    namespace, name, uid, partitions, topic = claim.namespace, claim.name, claim.uid, claim.partitions, claim.topic
    asked = f"stream {namespace}/{name}"
    own = None
    for stream in known:
        held_by = f"stream {stream.namespace}/{stream.name} ({stream.state}, uid {stream.uid})"
        if (stream.namespace, stream.name) == (namespace, name):
            own = stream
        elif (stream.kafka_cluster, stream.topic) == (claim.kafka_cluster, topic):
            raise ConflictError("topic", f"{asked} asks for topic {topic}, which belongs to {held_by}")
        elif stream.schema == claim.schema:
            raise ConflictError("schema", f"{asked} asks for schema {stream.schema}, which belongs to {held_by}")
    if own is None:
        return None
    if own.uid not in (None, uid):
        raise ConflictError("name", f"{asked} belongs to the resource with uid {own.uid}, not to {uid}")
    if own.partitions != partitions:
        raise ConflictError(
            "partitions",
            f"{asked} was made with {own.partitions} partitions, {partitions} are asked for; they can't be changed: "
            "copy the stream into a new one",
        )
    if own.topic != topic:
        raise ConflictError(
            "topic", f"{asked} was made with topic {own.topic}, {topic} is asked for; it can't be changed"
        )
    return own


async def _migrate_store(conn: AsyncConnection[Any]) -> str:
    """Apply the store migrations that are missing, in the caller's transaction; return the store's id."""
    store_roles = _store_roles(conn)
    await conn.execute("select pg_advisory_xact_lock(%s, 0)", [_INSTALL_LOCK])
    await roles.ensure_group(conn, store_roles.values())
    await roles.adopt_owner(conn, store_roles["owner"])
    await _ensure_schema(conn, store_roles["owner"])
    async with as_owner(conn, store_roles["owner"]):
        await conn.execute(LOCK_TIMEOUT)
        for table in ("migrations", "additions"):
            await conn.execute(
                sql.SQL(
                    "create table if not exists refold.{} ("
                    "number integer primary key, name text not null, applied_at timestamptz not null default now())"
                ).format(sql.Identifier(table))
            )
        available = migrations.load("store")
        cursor = await conn.execute("select coalesce(max(number), 0) from refold.migrations")
        row = await cursor.fetchone()
        if row is not None and row[0] > available[-1].number:
            raise EventStoreError(
                f"the store in database {conn.info.dbname} is at migration {row[0]}, this version of Refold knows "
                f"{available[-1].number}: run a later version"
            )
        # builds between two releases noted additions as migrations
        await conn.execute(
            "with former as (delete from refold.migrations where number > %s returning number, name, applied_at) "
            "insert into refold.additions (number, name, applied_at) select number, name, applied_at from former "
            "on conflict do nothing",
            [migrations.BREAKING],
        )
        cursor = await conn.execute("select number from refold.migrations union select number from refold.additions")
        applied = {number async for (number,) in cursor}
        for migration in available:
            if migration.number not in applied:
                await conn.execute(
                    migration.render({**store_roles, "store_id": secrets.token_hex(8)}).encode(), prepare=False
                )
                await conn.execute(
                    sql.SQL("insert into refold.{} (number, name) values (%s, %s)").format(
                        sql.Identifier(migration.note)
                    ),
                    [migration.number, migration.name],
                )
        cursor = await conn.execute("select id from refold.store")
        found = await cursor.fetchone()
        assert found is not None, "the first migration writes this row"
    return str(found[0])


async def _migrate_streams(conn: AsyncConnection[Any], streams: Sequence[Stream]) -> list[Stream]:
    """Apply the stream migrations that are missing, in the caller's transaction."""
    if not streams:
        return []
    by_stream = {stream.stream: _stream_roles(conn, stream.schema) for stream in streams}
    await roles.ensure_group(conn, [role for of_one in by_stream.values() for role in of_one.values()])
    store_roles = _store_roles(conn)
    available = migrations.load("stream")
    statements = [LOCK_TIMEOUT]
    for stream in streams:
        values: dict[str, str | int] = {
            **store_roles,
            **by_stream[stream.stream],
            "schema": stream.schema,
            "stream": stream.stream,
            "partitions": stream.partitions,
        }
        if stream.migration == 0:
            statements += [
                sql.SQL("create schema {}").format(sql.Identifier(stream.schema)).as_string(),
                sql.SQL("insert into refold.heads (stream, partition) select {}, p from generate_series(0, {} - 1) p")
                .format(stream.stream, stream.partitions)
                .as_string(),
            ]
        statements += [migration.render(values) for migration in available if migration.number > stream.migration]
        statements.append(
            sql.SQL("update refold.streams set migration = {} where stream = {}")
            .format(available[-1].number, stream.stream)
            .as_string()
        )
    async with as_owner(conn, store_roles["owner"]):
        # One message for all of it: creating many streams must not take a round trip a statement.
        await conn.execute(";\n".join(statements).encode(), prepare=False)
    return [msgspec.structs.replace(stream, migration=available[-1].number) for stream in streams]


async def _upgrade_streams(conn: AsyncConnection[Any]) -> None:
    """Apply missing stream migrations, a transaction a stream.

    A stream whose tables are in use for long is left as it is, and served so, until this is called again.
    """
    latest = migrations.load("stream")[-1].number

    async def upgrade(stream: Stream) -> None:
        async with as_owner(conn, _store_roles(conn)["owner"]):
            found = await _select(
                conn, sql.SQL(" where stream = {} and migration < {} for update").format(stream.stream, latest)
            )
        await _migrate_streams(conn, found)

    behind = await _select(conn, sql.SQL(" where migration < {}").format(latest))
    random.shuffle(behind)  # those whose tables are in use don't keep the same others waiting each time
    left = await each_giving_way(conn, [functools.partial(upgrade, stream) for stream in behind])
    if left:
        log.warning(
            "Streams are served as they are until their tables can be migrated: they were in use for long; end the "
            "long transactions that pg_stat_activity shows, the operator tries again",
            database=conn.info.dbname,
            streams=left,
        )


async def _ensure_schema(conn: AsyncConnection[Any], owner: str) -> None:
    """Make the schema `refold`, or take over the one that the same administrator made (a read store's)."""
    database = conn.info.dbname
    cursor = await conn.execute(
        "select pg_get_userbyid(nspowner) from pg_namespace where nspname = 'refold'",
    )
    row = await cursor.fetchone()
    statements = [
        sql.SQL("grant create, connect on database {} to {}").format(sql.Identifier(database), sql.Identifier(owner)),
        *(
            sql.SQL("grant connect on database {} to {}").format(sql.Identifier(database), sql.Identifier(role))
            for role in _store_roles(conn).values()
            if role != owner
        ),
    ]
    if row is None:
        statements.append(sql.SQL("create schema refold authorization {}").format(sql.Identifier(owner)))
    elif row[0] != owner:
        statements.append(sql.SQL("alter schema refold owner to {}").format(sql.Identifier(owner)))
    await conn.execute(sql.SQL("; ").join(statements), prepare=False)


async def _lock_heads(conn: AsyncConnection[Any], streams: Sequence[Stream]) -> None:
    """Wait for the appends under way, and make later ones wait for this transaction."""
    await conn.execute(
        "select 1 from refold.heads where stream = any(%s) order by stream, partition for update",
        [[stream.stream for stream in streams]],
    )


async def _update(
    conn: AsyncConnection[Any], streams: Sequence[Stream], column: str, values: Sequence[str]
) -> list[Stream | ConflictError]:
    """Set one column of streams that are still claimed by their `uid`; write only where it differs.

    One waits for locks as long as the connection says, several together only `LOCK_TIMEOUT`.
    """
    wanted = {stream.stream: value for stream, value in zip(streams, values, strict=True)}
    where = sql.SQL(" where stream = any({}) order by stream for update").format(list(wanted))
    async with conn.transaction(), as_owner(conn, _store_roles(conn)["owner"]):
        if len(streams) > 1:
            await conn.execute(LOCK_TIMEOUT)
        if column == "state":
            await _lock_heads(conn, streams)
        uids = {stream.stream: stream.uid for stream in streams}
        found = {one.stream: one for one in await _select(conn, where) if one.uid == uids[one.stream]}
        changed = [number for number, one in found.items() if getattr(one, column) != wanted[number]]
        if changed:
            new = [wanted[number] for number in changed]
            await conn.execute(
                sql.SQL(
                    "update refold.streams s set {0} = t.value from unnest(%s::int[], %s::text[]) t (stream, value) "
                    "where s.stream = t.stream"
                ).format(sql.Identifier(column)),
                [changed, new],
            )
            if column == "state":
                await conn.execute(
                    "update refold.heads h set active = t.value = 'active' "
                    "from unnest(%s::int[], %s::text[]) t (stream, value) where h.stream = t.stream",
                    [changed, new],
                )
    return [
        msgspec.structs.replace(found[stream.stream], **{column: wanted[stream.stream]})
        if stream.stream in found
        else _not_claimed(stream)
        for stream in streams
    ]


def _must_be(stream: Stream | ConflictError) -> Stream:
    if isinstance(stream, ConflictError):
        raise stream
    return stream


async def _select(conn: AsyncConnection[Any], where: sql.Composable) -> list[Stream]:
    try:
        async with conn.cursor(row_factory=class_row(Stream)) as cursor:
            await cursor.execute(_STREAMS + where)
            return await cursor.fetchall()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName) as error:
        raise _not_installed(conn) from error


@contextlib.asynccontextmanager
async def as_owner(conn: AsyncConnection[Any], owner: str) -> AsyncIterator[None]:
    """Act as `owner`, the store's owner role, for a part of the current transaction.

    Raises:
        NotInstalledError: there is no such role.
    """
    try:
        await conn.execute(sql.SQL("set local role {}").format(sql.Identifier(owner)))
    except psycopg.errors.InvalidParameterValue as error:  # there is no such role
        raise _not_installed(conn) from error
    yield
    # Not in a finally: after an error the transaction is rolled back, and the role with it.
    await conn.execute("set local role none")


def _store_roles(conn: AsyncConnection[Any]) -> dict[str, str]:
    return {part: names.store_role(conn.info.dbname, part) for part in ("owner", "eventstore", "relay", "heads")}


def _stream_roles(conn: AsyncConnection[Any], schema: str) -> dict[str, str]:
    return {part: names.resource_role(conn.info.dbname, schema, part) for part in ("writer", "reader")}


def _not_installed(conn: AsyncConnection[Any]) -> NotInstalledError:
    return NotInstalledError(
        f"database {conn.info.dbname} at {conn.info.host}:{conn.info.port} holds no event store; "
        "the operator (refold.eventstore.catalog.install_store) installs it"
    )


def _not_claimed(stream: Stream) -> ConflictError:
    return ConflictError(
        "name",
        f"stream {stream.namespace}/{stream.name} isn't claimed by the resource with uid {stream.uid} any more",
    )
