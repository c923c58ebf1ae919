"""The event store, as the operator manages it: the catalog's claims, and the logins that read it."""

import asyncio
import datetime as dt
import time
from collections.abc import Mapping, Sequence
from typing import Any

from refold import names
from refold.eventstore import Limits, catalog, roles
from refold.eventstore.catalog import Stream

from refold_operator import credentials, dsn
from refold_operator.database import Database

#: How old the heads may be that statuses are made of, in seconds: one query serves all streams.
_HEADS_SECONDS = 10.0


class Store:
    """The store of one database."""

    def __init__(self, database: Database, *, event_bytes: int = Limits().event_bytes) -> None:
        """Manage the store in `database`; nothing is asked of it yet. `event_bytes` is the largest event's size."""
        self.database = database
        self._event_bytes = event_bytes
        self._heads: dict[int, int] = {}
        self._heads_at = float("-inf")
        self._heads_lock = asyncio.Lock()

    async def install(self, key: bytes) -> dict[str, str]:
        """Install or upgrade the store and make the logins of event store and relay.

        Args:
            key: the installation's key of passwords.

        Returns:
            The DSNs, by `eventstore` and `relay`.
        """
        async with self.database.connection() as connection:
            await catalog.install_store(connection)
            await catalog.limit_events(connection, self._event_bytes)
            logins = {}
            for part in ("eventstore", "relay"):
                role = names.store_role(self.database.name, part)
                password = credentials.password(key, role)
                await roles.ensure_login(connection, role, password)
                logins[part] = dsn.login(self.database.dsn, role, password)
        return logins

    async def id(self) -> str:
        """Return the store's id, 16 hex digits."""
        async with self.database.connection() as connection:
            return await catalog.store_id(connection)

    async def stream(self, namespace: str, name: str) -> Stream | None:
        """Return a stream of the catalog, in whatever state."""
        async with self.database.connection() as connection:
            return await catalog.get_stream(connection, namespace, name)

    async def claim(
        self, *, namespace: str, name: str, uid: str, partitions: int, topic: str, kafka_cluster: str
    ) -> Stream:
        """Claim a stream for a resource; see `refold.eventstore.catalog.claim_stream`."""
        async with self.database.connection() as connection:
            return await catalog.claim_stream(
                connection, namespace=namespace, name=name, uid=uid, partitions=partitions, topic=topic,
                kafka_cluster=kafka_cluster,
            )  # fmt: skip

    async def record_topic(self, stream: Stream, topic_id: str) -> Stream:
        """Record which topic is the stream's; empty: one is about to be made."""
        async with self.database.connection() as connection:
            return await catalog.record_topic(connection, stream, topic_id)

    async def set_event_types(self, stream: Stream, types: Mapping[str, Any] | None) -> Stream:
        """Make `types` what the stream takes; see `refold.eventstore.catalog.set_event_types`."""
        async with self.database.connection() as connection:
            return await catalog.set_event_types(connection, stream, types)

    async def activate(self, stream: Stream) -> Stream:
        """Let the stream be served."""
        async with self.database.connection() as connection:
            return await catalog.activate(connection, stream)

    async def release(self, stream: Stream) -> None:
        """Let go of the stream; nothing is dropped."""
        async with self.database.connection() as connection:
            await catalog.release_stream(connection, stream)

    async def drop(self, *, namespace: str, name: str, uid: str) -> None:
        """Drop the stream's history, roles and claim, where it is the resource's own."""
        async with self.database.connection() as connection:
            await catalog.drop_stream(connection, namespace=namespace, name=name, uid=uid)

    async def events(self, stream: Stream) -> int:
        """Return the sum of the stream's heads, at most some seconds old."""
        async with self._heads_lock:
            if stream.stream not in self._heads or time.monotonic() - self._heads_at > _HEADS_SECONDS:
                async with self.database.connection() as connection:
                    heads = await catalog.stream_heads(connection)
                self._heads = {number: sum(partitions.values()) for number, partitions in heads.items()}
                self._heads_at = time.monotonic()
            return self._heads.get(stream.stream, 0)

    async def all_events(self) -> dict[tuple[str, str], int]:
        """Return the sums of the heads of all streams that are claimed, by (namespace, name)."""
        async with self.database.connection() as connection:
            streams = await catalog.list_streams(connection)
            heads = await catalog.stream_heads(connection)
        return {
            (stream.namespace, stream.name): sum(heads.get(stream.stream, {}).values())
            for stream in streams
            if stream.uid is not None
        }

    async def heads(self, incarnations: Sequence[str]) -> dict[tuple[str, int], int]:
        """Return the heads of streams; see `refold.eventstore.catalog.heads_of`."""
        async with self.database.connection() as connection:
            return await catalog.heads_of(connection, incarnations)

    async def positions_at(self, stream: Stream, moment: dt.datetime) -> list[int] | None:
        """Return the last positions until `moment`, None where it hasn't passed; see `refold.eventstore.catalog`."""
        async with self.database.connection() as connection:
            return await catalog.positions_at(connection, stream, moment)

    async def reader_login(self, role: str, password: str, streams: Sequence[Stream]) -> str:
        """Make a login of a projection's processes, which may read `streams` and their heads; return its DSN."""
        async with self.database.connection() as connection:
            groups = [catalog.reader_role(connection, stream) for stream in streams]
            groups.append(names.store_role(self.database.name, "heads"))
            await roles.ensure_login(connection, role, password, member_of=groups)
        return dsn.login(self.database.dsn, role, password)

    async def set_definition(self, *, namespace: str, name: str, uid: str, version: str, definition: str) -> None:
        """Write what the live version of a Projection folds; see `refold.eventstore.catalog.set_definition`."""
        async with self.database.connection() as connection:
            await catalog.set_definition(
                connection, namespace=namespace, name=name, uid=uid, version=version, definition=definition
            )

    async def drop_definition(self, *, namespace: str, name: str, uid: str) -> None:
        """Forget what a Projection folds."""
        async with self.database.connection() as connection:
            await catalog.drop_definition(connection, namespace=namespace, name=name, uid=uid)

    async def drop_login(self, role: str) -> None:
        """Drop a login; one that is gone is no error."""
        async with self.database.connection() as connection:
            await roles.drop_login(connection, role)
