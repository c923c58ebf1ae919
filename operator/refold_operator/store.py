"""The event store, as the operator manages it: the catalog's claims, and the logins that read it.

What reconciles that run at the same time ask and change of streams goes in one query or transaction (`batching`).
"""

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from refold import names
from refold.eventstore import Limits, catalog, event_types, roles, upkeep
from refold.eventstore.catalog import Claim, Stream

from refold_operator import credentials, dsn
from refold_operator.batching import Batch
from refold_operator.database import Database

#: Streams in one query.
_READ = 200
#: Streams, and their partitions, that are made in one transaction: it holds some 12 locks on tables for each stream and
#: 4 for each partition, of which a server has 64 for each connection that it allows.
_MADE, _MADE_PARTITIONS = 20, 200
#: Such transactions at the same time: making a schema is the server's work on one core.
_MAKING = 3


class Store:
    """The store of one database."""

    def __init__(self, database: Database, *, event_bytes: int = Limits().event_bytes) -> None:
        """Manage the store in `database`; nothing is asked of it yet. `event_bytes` is the largest event's size."""
        self.database = database
        self._event_bytes = event_bytes
        self._reads = Batch(self._read, most=_READ)
        self._types = Batch(self._read_types, most=_READ)
        self._heads = Batch(self._read_heads, most=_READ)
        self._claims = Batch(self._claim, most=_MADE, at_once=_MAKING)
        self._recordings = Batch(self._record, most=_READ)
        self._activations = Batch(self._activate, most=_READ)
        self._looks = Batch(self._look, most=_READ)

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
        return await self._reads.ask((namespace, name))

    async def _read(self, wanted: Sequence[tuple[str, str]]) -> list[Stream | Exception | None]:
        async with self.database.connection() as connection:
            found = await catalog.get_streams(connection, wanted)
        return [found.get(one) for one in wanted]

    async def holder(self, kafka_cluster: str, topic: str) -> Stream | None:
        """Return the stream that has a topic, claimed or released, if there is one."""
        async with self.database.connection() as connection:
            return await catalog.get_holder(connection, kafka_cluster=kafka_cluster, topic=topic)

    async def claim(
        self, *, namespace: str, name: str, uid: str, partitions: int, topic: str, kafka_cluster: str
    ) -> Stream:
        """Claim a stream for a resource; see `refold.eventstore.catalog.claim_stream`."""
        return await self._claims.ask(
            Claim(
                namespace=namespace, name=name, uid=uid, partitions=partitions, topic=topic, kafka_cluster=kafka_cluster
            )
        )

    async def _claim(self, claims: Sequence[Claim]) -> list[Stream | Exception]:
        if len(claims) > 1 and sum(claim.partitions for claim in claims) > _MADE_PARTITIONS:
            half = len(claims) // 2
            return [*await self._claim(claims[:half]), *await self._claim(claims[half:])]
        async with self.database.connection() as connection:
            return list(await catalog.claim_streams(connection, claims))

    async def record_topic(self, stream: Stream, topic_id: str) -> Stream:
        """Record which topic is the stream's; empty: one is about to be made."""
        return await self._recordings.ask((stream, topic_id))

    async def _record(self, wanted: Sequence[tuple[Stream, str]]) -> list[Stream | Exception]:
        async with self.database.connection() as connection:
            return list(await catalog.record_topics(connection, *zip(*wanted, strict=True)))

    async def set_event_types(self, stream: Stream, types: Mapping[str, Any] | None) -> Stream:
        """Make `types` what the stream takes; see `refold.eventstore.catalog.set_event_types`."""
        wanted = None if types is None else event_types.encode(types)
        if await self._types.ask(stream.stream) == wanted:
            return stream
        async with self.database.connection() as connection:
            return await catalog.set_event_types(connection, stream, types)

    async def _read_types(self, wanted: Sequence[int]) -> list[str | Exception | None]:
        async with self.database.connection() as connection:
            found = await catalog.texts_of_event_types(connection, wanted)
        return [found.get(one) for one in wanted]

    async def activate(self, stream: Stream) -> Stream:
        """Let the stream be served."""
        return await self._activations.ask(stream)

    async def _activate(self, wanted: Sequence[Stream]) -> list[Stream | Exception]:
        async with self.database.connection() as connection:
            return list(await catalog.activate_all(connection, wanted))

    async def look(self, stream: Stream) -> upkeep.Found:
        """Return what of the stream's schema isn't as it was made; see `refold.eventstore.upkeep`."""
        return await self._looks.ask(stream)

    async def _look(self, wanted: Sequence[Stream]) -> list[upkeep.Found | Exception]:
        async with self.database.connection() as connection:
            found = await upkeep.look(connection, wanted)
        return [found[one.stream] for one in wanted]

    async def repair(self, stream: Stream) -> None:
        """Make the stream's roles, privileges and triggers again."""
        async with self.database.connection() as connection:
            await upkeep.repair(connection, stream)

    async def release(self, stream: Stream) -> None:
        """Let go of the stream; nothing is dropped."""
        async with self.database.connection() as connection:
            await catalog.release_stream(connection, stream)

    async def drop(self, *, namespace: str, name: str, uid: str) -> None:
        """Drop the stream's history, roles and claim, where it is the resource's own."""
        async with self.database.connection() as connection:
            await catalog.drop_stream(connection, namespace=namespace, name=name, uid=uid)

    async def events(self, stream: Stream) -> int:
        """Return the sum of the stream's heads."""
        return await self._heads.ask(stream)

    async def _read_heads(self, wanted: Sequence[Stream]) -> list[int | Exception]:
        async with self.database.connection() as connection:
            heads = await catalog.stream_heads(connection, wanted)
        return [sum(heads.get(one.stream, {}).values()) for one in wanted]

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
