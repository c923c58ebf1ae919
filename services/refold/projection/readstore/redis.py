"""The Redis read store as the operator sees it: claims, versions, the live pointer, status; and what all sides share.

Redis must be one primary that keeps what it is told (`unsuitable`): no Cluster, since a script has to reach all rows
and positions of a projection; an append-only file, since rows aren't derived anew after each restart; no eviction.

What is written stands in scripts (`redis_scripts`), of which Redis loses either all or nothing in a crash. With
`appendfsync everysec` that may be the last second's: rows and positions are then as they were before, together, and the
projector goes on from there by its rule for positions. With `always` nothing is lost.

A projection's keys begin with `refold:<namespace>.<name>:`, those of a version go on with `<version>:`

    claim, live, held, definitions, created, retired, dropping, parked-id       of the projection
    positions, recorded, hints, seen, stopped                   by `<incarnation>/<partition>`
    row:<key>       a hash: the columns' texts, `~` a mark that each write changes, `~<column>` the stamp and
                    `=<column>` the place of a column that has one
    keys, by:<column>                                           indexes, see `redis_values`
    indexes         which there are, as `status:ready total:building`
    parked, asked, errors, unparked     events by id, marks at them (`unparking`), newer errors; departures by partition

What was discarded stands in the projection's `discarded`, and how many of each version in `discards`.
"""

import datetime as dt
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from refold.projection.definition import Column, VersionDefinition
from refold.projection.readstore import (
    ConflictError,
    NotFoundError,
    PartitionStatus,
    ProjectionStatus,
    UnavailableError,
    VersionStatus,
    handover,
)
from refold.projection.readstore import redis_scripts as scripts
from refold.projection.readstore.handover import Standing
from refold.projection.readstore.redis_values import place, to_value

#: Seconds that a script may take with all its answer, and until a connection stands.
TIMEOUT_SECONDS = 10
CONNECT_SECONDS = 5
#: Rows that one script writes, fills an index with or deletes: for as long others wait, about 10 ms.
SCRIPT_ROWS = 500

_VERSION = re.compile(r"[a-z0-9]{1,40}")
#: The first release whose scripts say what they do before they begin.
_OLDEST = (7, 0)


class Script(NamedTuple):
    """A script and the name by which Redis knows it once it has seen it."""

    text: str
    sha: str


_known: dict[str, Script] = {}


def script(text: str) -> Script:
    """Return the script of `text`."""
    found = _known.get(text)
    if found is None:
        found = _known[text] = Script(text, hashlib.sha1(text.encode()).hexdigest())  # noqa: S324 (Redis' own name)
    return found


def prefix(namespace: str, name: str) -> str:
    """Return how the names of a projection's keys begin."""
    return f"refold:{namespace}.{name}:"


def version_prefix(namespace: str, name: str, version: str) -> str:
    """Return how the names of the keys of a projection's version begin.

    Raises:
        ValueError: not a version's name.
    """
    if not _VERSION.fullmatch(version):
        raise ValueError(f"not the name of a projection's version: {version!r}")
    return f"{prefix(namespace, name)}{version}:"


def field(incarnation: str, partition: int) -> str:
    """Return the field of a partition."""
    return f"{incarnation}/{partition}"


def partition_of(field: bytes) -> tuple[str, int]:
    """Return incarnation and number of the partition that a field is of."""
    incarnation, _, partition = field.decode().rpartition("/")
    return incarnation, int(partition)


def pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    """Return a hash that Redis answered with."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def unsuitable(info: Mapping[str, Any]) -> str | None:
    """Return why a Redis that says this of itself (INFO) can't keep read models; None where it can."""
    version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    if version < _OLDEST:
        return f"Redis {info['redis_version']} is too old: at least {'.'.join(map(str, _OLDEST))} is needed"
    if int(info.get("cluster_enabled", 0)):
        return (
            "it is a Redis Cluster, where no script reaches all rows of a read model: use a single primary "
            "(with replicas and Sentinel, if you like)"
        )
    if info["role"] != "master":
        return f"it is a replica of {info.get('master_host')}: give the URL of the primary"
    if not int(info["aof_enabled"]):
        return "it has no append-only file, so a restart would lose rows: set 'appendonly yes'"
    if int(info.get("maxmemory", 0)) and info["maxmemory_policy"] != "noeviction":
        return f"it evicts keys when memory runs out ({info['maxmemory_policy']}): set 'maxmemory-policy noeviction'"
    return None


class Indexes(NamedTuple):
    """The indexed columns of a version: those that queries use, and those whose rows aren't all in yet."""

    ready: frozenset[str]
    building: frozenset[str]

    @classmethod
    def of(cls, text: str) -> "Indexes":
        """Return what `text` tells."""
        states = [one.split(":") for one in text.split()]
        return cls(*(frozenset(column for column, state in states if state == wanted) for wanted in cls._fields))

    @property
    def text(self) -> str:
        """The same as text."""
        states = {column: state for state, columns in self._asdict().items() for column in columns}
        return " ".join(f"{column}:{state}" for column, state in sorted(states.items()))


class RedisStore:
    """Read models in one Redis, as the operator manages them.

    Every method raises `UnavailableError` where Redis can't be reached, refuses, or can't keep read models.
    """

    def __init__(self, url: str) -> None:
        """Use the Redis at `url`; nothing is asked of it yet."""
        self._redis = Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 1),
            socket_connect_timeout=CONNECT_SECONDS,
            socket_timeout=TIMEOUT_SECONDS,
            client_name="refold-operator",
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()

    async def install(self) -> None:
        """See whether the Redis can keep read models; it needs nothing else."""
        try:
            info = await self._redis.execute_command("INFO")
        except RedisError as error:
            raise UnavailableError(f"Redis: {error}") from error
        if problem := unsuitable(cast("Mapping[str, Any]", info)):
            raise UnavailableError(f"this Redis can't keep read models: {problem}")

    async def claim(self, *, namespace: str, name: str, uid: str) -> None:
        """Claim the projection's keys for the resource `uid`; what was released is taken back, with its rows.

        Raises:
            ConflictError: a resource of another uid holds the claim.
        """
        owner = await self._call(scripts.CLAIM, prefix(namespace, name), uid)
        if owner:
            raise ConflictError(
                f"the read model of {namespace}/{name} in Redis belongs to a Projection with uid {owner.decode()}; "
                "delete that one first, or choose another name"
            )

    async def release(self, *, namespace: str, name: str, uid: str) -> bool:
        """Give up the claim of `uid` and leave all data; return whether there was such a claim."""
        return bool(await self._call(scripts.RELEASE, prefix(namespace, name), uid))

    async def ensure_version(self, *, namespace: str, name: str, version: str, definition: VersionDefinition) -> bool:
        """Make a version where it is missing, and its indexes as the definition says; the very first goes live.

        Returns:
            Whether it was made now.

        Raises:
            NotFoundError: the projection isn't claimed.
        """
        base, own = prefix(namespace, name), version_prefix(namespace, name, version)
        indexed = frozenset(column.name for column in definition.definition.columns if column.index)
        asked = {
            "version": version,
            "definition": definition.to_json(),
            "indexes": Indexes(indexed, frozenset()).text,
            "partitions": [
                [field(stream.incarnation, partition), False if end is None else str(end)]
                for stream in definition.streams
                for partition, end in enumerate(definition.ends.get(stream.incarnation, [None] * stream.partitions))
            ],
        }
        answer, *found = await self._call(scripts.ENSURE_VERSION, base, asked)
        if answer == b"dropping":  # a drop that broke off
            await self._drop_rows(namespace, name, version)
            answer, *found = await self._call(scripts.ENSURE_VERSION, base, asked)
        if answer == b"unclaimed":
            raise NotFoundError(f"the read store holds no projection {namespace}/{name}; claim it first")
        if answer == b"there":
            indexes, stored = found
            await self._reconcile_indexes(base, own, version, definition, Indexes.of(indexes.decode()), stored)
        return bool(answer == b"made")

    async def try_swap(self, *, namespace: str, name: str, version: str) -> bool:
        """Make `version` the live one if no reader would go back in time by it; return whether it is live now.

        It must be at or beyond the live version in every partition that both fold, have seen the head of those that
        only it folds, and have no more parked. Where it is near, the live version is held back for a moment
        (`handover`): `held` names it, and its batches aren't written.

        Raises:
            NotFoundError: there is no such version.
        """
        base = prefix(namespace, name)

        async def swapped() -> bool:
            answer = await self._call(scripts.SWAP, base, version)
            if answer == b"none":
                raise NotFoundError(f"the projection {namespace}/{name} has no version {version} in the read store")
            return bool(answer == b"live")

        if not await handover.near(lambda: self._standing(base, version)):
            return False
        if await swapped():
            return True
        await self._call(scripts.HOLD, base, str(round((handover.HELD_SECONDS + 1) * 1000)))
        try:
            return await handover.within(handover.HELD_SECONDS, swapped)
        finally:
            await self._command("DEL", f"{base}held")

    async def _standing(self, base: str, version: str) -> Standing:
        positions, seen, live, lacks, live_lacks = await self._call(scripts.STANDING, base, version)
        positions, seen, live = pairs(positions), pairs(seen), pairs(live)
        applied = {partition_of(one): int(position) for one, position in positions.items()}
        wanted = {}
        for one in positions:
            # of what others don't fold the head, which stands first
            known = live[one] if one in live else seen[one].split()[0] if one in seen else None
            wanted[partition_of(one)] = None if known is None else int(known)
        return Standing(applied, wanted, lacks > live_lacks)

    async def drop_version(self, *, namespace: str, name: str, version: str) -> bool:
        """Drop a version's rows, positions and parked events; return whether there was such a version.

        Raises:
            ConflictError: it is the live one.
        """
        answer = await self._call(scripts.BEGIN_DROP, prefix(namespace, name), version, "")
        if answer == b"live":
            raise ConflictError(f"the version {version} of the projection {namespace}/{name} is live: readers see it")
        if answer == b"dropping":
            await self._drop_rows(namespace, name, version)
        return bool(answer == b"dropping")

    async def drop(self, *, namespace: str, name: str, uid: str) -> bool:
        """Drop all that the projection has in the read store; return whether it was there.

        Raises:
            ConflictError: a resource of another uid holds the claim.
        """
        base = prefix(namespace, name)
        claim = await self._command("HGET", f"{base}claim", "uid")
        if claim is None:
            return False
        if claim.decode() not in ("", uid):
            raise ConflictError(
                f"the read model of {namespace}/{name} belongs to a Projection with uid {claim.decode()}, not {uid}"
            )
        for key in ("definitions", "dropping"):
            for version in await self._command("HKEYS", base + key):
                await self._call(scripts.BEGIN_DROP, base, version, "force")
                await self._drop_rows(namespace, name, version.decode())
        await self._command(
            "DEL",
            *(
                base + key
                for key in ("live", "definitions", "created", "retired", "parked-id", "discarded", "discards", "claim")
            ),
        )
        return True

    async def status(self, *, namespace: str, name: str) -> ProjectionStatus:
        """Return how far every version is, from one snapshot.

        Raises:
            NotFoundError: the projection isn't claimed.
        """
        claimed, live, time, versions = await self._call(scripts.STATUS, prefix(namespace, name))
        if not claimed:
            raise NotFoundError(f"the read store holds no projection {namespace}/{name}; claim it first")
        now = int(time[0]) + int(time[1]) / 1e6
        found = [_status(one, live, now) for one in versions]
        found.sort(key=lambda one: (one.created_at, one.version))
        return ProjectionStatus(live=live and live.decode(), versions={one.version: one for one in found})

    async def definitions(self, *, namespace: str, name: str) -> dict[str, VersionDefinition]:
        """Return what each version folds; empty where the projection isn't claimed."""
        found = await self._command("HGETALL", f"{prefix(namespace, name)}definitions")
        return {version.decode(): VersionDefinition.from_json(text) for version, text in found.items()}

    async def _reconcile_indexes(
        self, base: str, own: str, version: str, definition: VersionDefinition, before: Indexes, stored: bytes
    ) -> None:
        """Bring a version's indexes to its definition, which tells of a new one once all rows are in it.

        From the moment that an index is being built, who writes a row puts it there; the rows that aren't written
        meanwhile are put there from here. `before` and `stored` are the indexes and the definition as they are; where
        somebody changed them meanwhile, or dropped the version, or a crash took it back, nothing is done.
        """
        text = definition.to_json()
        columns = {column.name: column for column in definition.definition.columns if column.index}
        wanted = frozenset(columns)
        if before == (wanted, frozenset()) and stored == text.encode():
            return
        building = wanted - before.ready
        between = Indexes(before.ready, building)
        if not await self._set_indexes(base, version, before, between, ""):
            return  # another one does it
        for column in sorted(building):
            await self._fill(own, columns[column])
        after = Indexes(wanted, frozenset())
        if await self._set_indexes(base, version, between, after, text):
            gone = [f"{own}by:{column}" for column in (before.ready | before.building) - wanted]
            if gone:
                await self._command("UNLINK", *gone)

    async def _set_indexes(self, base: str, version: str, before: Indexes, after: Indexes, definition: str) -> bool:
        asked = {"version": version, "before": before.text, "after": after.text, "definition": definition}
        return bool(await self._call(scripts.SET_INDEXES, base, asked))

    async def _fill(self, own: str, column: Column) -> None:
        """Put all rows into the index of a column."""
        begin = "-"
        while found := await self._command("ZRANGEBYLEX", f"{own}keys", begin, "+", "LIMIT", 0, SCRIPT_ROWS):
            keys = [key.decode() for key in found]
            found = await self._call(scripts.FIELDS, own, {"keys": keys, "fields": ["~", column.name]})
            rows = []
            for key, (mark, text) in zip(keys, found, strict=True):
                if mark is not None:
                    value = None if text is None else to_value(text.decode(), column.type)
                    rows.append([key, mark.decode(), place(value, column.type).decode()])
            await self._call(scripts.FILL_INDEX, own, {"column": column.name, "rows": rows})
            begin = f"({keys[-1]}"

    async def _drop_rows(self, namespace: str, name: str, version: str) -> None:
        """Delete what is left of a version that nobody reads or writes any more."""
        base, own = prefix(namespace, name), version_prefix(namespace, name, version)
        while await self._call(scripts.DROP_ROWS, own, str(SCRIPT_ROWS)) == SCRIPT_ROWS:
            pass
        definition = await self._command("HGET", f"{base}dropping", version)
        columns = [] if definition is None else VersionDefinition.from_json(definition).definition.columns
        await self._command("UNLINK", f"{own}keys", *(f"{own}by:{column.name}" for column in columns))
        await self._command("HDEL", f"{base}dropping", version)

    async def _call(self, text: str, key: str, *arguments: str | bytes | dict[str, Any]) -> Any:
        """Run a script on what begins with `key`; an argument that is a dict (of texts) is sent as MessagePack."""
        called = script(text)
        sent = [msgspec.msgpack.encode(one) if isinstance(one, dict) else one for one in arguments]
        try:
            try:
                return await self._redis.execute_command("EVALSHA", called.sha, 1, key, *sent)
            except NoScriptError:
                return await self._redis.execute_command("EVAL", called.text, 1, key, *sent)
        except RedisError as error:
            raise UnavailableError(f"Redis: {error}") from error

    async def _command(self, *command: str | bytes | int) -> Any:
        try:
            return await self._redis.execute_command(*command)
        except RedisError as error:
            raise UnavailableError(f"Redis: {error}") from error


def _status(found: list[Any], live: bytes | None, now: float) -> VersionStatus:
    """Return a version's status, of the script's answer `now` (Unix time)."""
    version, created, retired, parked, discarded, first, *hashes = found
    positions, recorded, seen, stopped = map(pairs, hashes)
    return VersionStatus(
        version=version.decode(),
        live=version == live,
        created_at=_moment(created),
        retired_at=None if retired is None else _moment(retired),
        retired_seconds=None if retired is None else now - float(retired),
        parked=parked,
        parked_error=None if first is None else error_of(*first),
        discarded=int(discarded or 0),
        partitions=[
            _partition(one, positions[one], recorded.get(one), seen.get(one), stopped.get(one))
            for one in _in_order(positions)
        ],
    )


def _partition(
    one: bytes, position: bytes, recorded: bytes | None, seen: bytes | None, stopped: bytes | None
) -> PartitionStatus:
    incarnation, partition = partition_of(one)
    head, lag_seconds, seen_at = seen_of(seen, int(position))
    return PartitionStatus(
        incarnation=incarnation,
        partition=partition,
        position=int(position),
        recorded_at=None if recorded is None else dt.datetime.fromisoformat(recorded.decode()),
        head=head,
        lag_seconds=lag_seconds,
        seen_at=None if seen_at is None else dt.datetime.fromtimestamp(seen_at, dt.UTC),
        stopped=None if stopped is None else stopped.decode(),
    )


def _in_order(positions: Iterable[bytes]) -> list[bytes]:
    return sorted(positions, key=partition_of)


def seen_of(seen: bytes | None, position: int) -> tuple[int, float, float | None]:
    """Return head, lag in seconds and the time (Unix) of a partition at `position` that was `seen` so (null: never)."""
    if seen is None:
        return position, 0.0, None
    head, lag_seconds, seen_at = seen.split()
    if position >= int(head):
        return position, 0.0, float(seen_at)
    return int(head), float(lag_seconds), float(seen_at)


def error_of(newer: bytes | None, parked: bytes) -> str:
    """Return the error of a parked event; `newer` took the place of its first one."""
    return newer.decode() if newer is not None else str(msgspec.json.decode(parked)["error"])


def _moment(text: bytes) -> dt.datetime:
    return dt.datetime.fromtimestamp(float(text), dt.UTC)
