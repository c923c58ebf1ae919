"""The Redis read store as a query service sees it: each read is one script, so all of its answer is of one moment."""

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

import msgspec
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from refold.projection.definition import VersionDefinition
from refold.projection.readstore import (
    KEY,
    AppliedPartition,
    NotFoundError,
    Page,
    Snapshot,
    TooSlowError,
    UnavailableError,
    live_definition,
)
from refold.projection.readstore import redis_scripts as scripts
from refold.projection.readstore.redis import TIMEOUT_SECONDS, pairs, partition_of, prefix, script, seen_of
from refold.projection.readstore.redis_parked import RedisParkedReads
from refold.projection.readstore.redis_values import Answers, Range, scan

#: Seconds for a free connection; with a script's own, an answer is never later than their sum.
_CONNECTION_SECONDS = 3
#: Rows that a page's filters may look at. Redis answers nobody else meanwhile: about 50 ms.
MOST_LOOKED_AT = 20_000

_partition_of = functools.lru_cache(maxsize=10_000)(partition_of)


class RedisReads:
    """A projection in Redis, over a pool of connections; the methods are those of `Reads`."""

    def __init__(self, url: str, *, namespace: str, name: str, connections: int) -> None:
        """Remember where the projection is; `connections` are the most at once."""
        self._base = prefix(namespace, name)
        self._redis = Redis(
            connection_pool=BlockingConnectionPool.from_url(
                url,
                max_connections=connections,
                timeout=_CONNECTION_SECONDS,
                protocol=2,
                retry=Retry(NoBackoff(), 1),  # the server may have closed the connection: it restarted
                socket_connect_timeout=_CONNECTION_SECONDS,
                socket_timeout=TIMEOUT_SECONDS,
                client_name="refold-query",
            )
        )

    async def open(self) -> None:
        """Do nothing: each read connects where it must."""

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def live(self) -> tuple[str, VersionDefinition] | None:
        """Return the live version's name and definition; None where there is none."""
        found = await self.call(scripts.LIVE, {})
        if not found or found[1] is None:
            return None
        version = found[0].decode()
        return version, live_definition(version, found[1])

    def version(self, name: str, definition: VersionDefinition) -> "RedisVersion":
        """Return what reads the version."""
        return RedisVersion(self, name, definition)

    def parked(self) -> RedisParkedReads:
        """Return what lists and marks parked events."""
        return RedisParkedReads(self.call)

    async def call(self, text: str, asked: dict[str, Any]) -> Any:
        """Run a script; one whose connection was lost may be run twice."""
        called, sent = script(text), msgspec.msgpack.encode(asked)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS + _CONNECTION_SECONDS):
                try:
                    return await self._redis.execute_command("EVALSHA", called.sha, 1, self._base, sent)
                except NoScriptError:
                    return await self._redis.execute_command("EVAL", called.text, 1, self._base, sent)
        except (RedisError, TimeoutError) as error:
            raise UnavailableError(f"Redis: {error}") from error


class RedisVersion:
    """One version of a projection in Redis; the methods are those of `VersionReads`."""

    def __init__(self, reads: RedisReads, version: str, definition: VersionDefinition) -> None:
        self._reads = reads
        self._version = version
        columns = definition.definition.columns
        self._columns = {KEY.name: KEY, **{column.name: column for column in columns}}
        self._answers = Answers(columns)
        self._fields = ["~", *self._answers.names]

    async def by_keys(self, keys: Sequence[str]) -> tuple[Snapshot, list[tuple[str, str]]]:
        """Return keys and data (JSON text) of the rows of `keys` that exist, in any order."""
        sent = [key.encode(errors="replace").decode() for key in keys]
        snapshot, rows = await self._read(scripts.BY_KEYS, {"keys": sent, "fields": self._fields})
        return snapshot, [
            (key.decode(), self._answers.json(texts[1:])) for key, texts in zip(rows[::2], rows[1::2], strict=True)
        ]

    async def page(self, page: Page) -> tuple[Snapshot, list[tuple[str, str, str | None]]]:
        """Return the page's rows in order: key, data (JSON text), and a text of the value in the order's column."""
        along = scan(page.conditions, page.order, page.after, self._columns)
        asked = {
            "along": [along.column or "", _sent(along.ranges)],
            "descending": along.descending,
            "others": [[column or "", _sent(ranges)] for column, ranges in along.others],
            "needs": [column for column in [along.column, *(one for one, _ in along.others)] if column is not None],
            "most": page.most,
            "limit": MOST_LOOKED_AT,
            "fields": self._fields,
        }
        snapshot, rows = await self._read(scripts.PAGE, asked)
        at = None if page.order.column == KEY.name else self._fields.index(page.order.column)
        found = []
        for key, texts in rows:
            place = None if at is None or texts[at] is None else texts[at].decode()
            found.append((key.decode(), self._answers.json(texts[1:]), place))
        return snapshot, found

    async def state(self) -> Snapshot:
        """Return the snapshot alone."""
        return (await self._read(scripts.STATUS_OF_VERSION, {}))[0]

    async def status(self) -> Snapshot:
        """Return the snapshot with the number of parked events."""
        snapshot, parked = await self._read(scripts.STATUS_OF_VERSION, {})
        return snapshot._replace(parked=parked)

    async def _read(self, text: str, asked: dict[str, Any]) -> tuple[Snapshot, Any]:
        answer = await self._reads.call(text, {"version": self._version, **asked})
        if answer[0] == b"slow":
            raise TooSlowError(f"over {MOST_LOOKED_AT} rows would have to be looked at")
        if answer[0] != b"ok":
            raise NotFoundError(f"the version, or an index of it, isn't there ({answer[0].decode()})")
        _, live, *hashes, (seconds, micros), found = answer
        positions, seen, stopped, unparked = map(pairs, hashes)
        partitions = []
        for name, position in positions.items():
            reason = stopped.get(name)
            head, lag_seconds, seen_at = seen_of(seen.get(name), int(position))
            why = None if reason is None else reason.decode()
            left = int(unparked.get(name, 0))
            partitions.append(
                AppliedPartition(*_partition_of(name), int(position), head, lag_seconds, seen_at, why, left)
            )
        partitions.sort(key=lambda one: (one.incarnation, one.partition))
        return Snapshot(live and live.decode(), partitions, int(seconds) + int(micros) / 1e6), found


def _sent(ranges: Sequence[Range]) -> list[list[str]]:
    """Return ranges as scripts take them, whose MessagePack knows texts only."""
    return [[one.begin.decode(), one.end.decode()] for one in ranges]
