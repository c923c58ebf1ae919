"""Both read stores, as the operator, projectors and query services use them, for tests that hold for each."""

from typing import Protocol

from refold.projection.definition import VersionDefinition
from refold.projection.readstore import Order, Page, ProjectionStatus, Reads, Rows, stores
from refold.projection.readstore.redis import RedisStore
from refold_operator.database import Database
from refold_operator.readstore import ReadStore as PostgresStore


class Admin(Protocol):
    """The operator's side of a store."""

    async def claim(self, *, namespace: str, name: str, uid: str) -> None: ...
    async def release(self, *, namespace: str, name: str, uid: str) -> object: ...
    async def ensure_version(
        self, *, namespace: str, name: str, version: str, definition: VersionDefinition
    ) -> bool: ...
    async def try_swap(self, *, namespace: str, name: str, version: str) -> bool: ...
    async def drop_version(self, *, namespace: str, name: str, version: str) -> object: ...
    async def drop(self, *, namespace: str, name: str, uid: str) -> object: ...
    async def status(self, *, namespace: str, name: str) -> ProjectionStatus: ...
    async def definitions(self, *, namespace: str, name: str) -> dict[str, VersionDefinition]: ...


class Store:
    """A read store at `url`, without anything in it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_redis = url.startswith("redis")
        self._own: Database | RedisStore
        self.admin: Admin
        if self.is_redis:
            self._own = self.admin = RedisStore(url)
        else:
            self._own = Database(url, "read store")
            self.admin = PostgresStore(self._own)

    async def open(self) -> None:
        if isinstance(self._own, Database):
            await self._own.open()
        await self.admin.install()  # type: ignore[attr-defined]

    async def close(self) -> None:
        await self._own.close()

    async def make(
        self, definition: VersionDefinition, *, namespace: str = "n", name: str = "p", version: str = "v"
    ) -> None:
        await self.admin.claim(namespace=namespace, name=name, uid=name)
        await self.admin.ensure_version(namespace=namespace, name=name, version=version, definition=definition)

    def rows(self, *, namespace: str = "n", name: str = "p", version: str = "v") -> Rows:
        """The projector's side, opened."""
        rows = stores.rows(self.url, namespace=namespace, name=name, version=version)
        rows.open()
        return rows

    def reads(self, *, namespace: str = "n", name: str = "p") -> Reads:
        """The query service's side; open and close it."""
        return stores.reads(self.url, namespace=namespace, name=name, connections=2)

    async def keys(self, *, namespace: str = "n", name: str = "p") -> list[str]:
        """The keys of all rows of the live version, in order."""
        reads = self.reads(namespace=namespace, name=name)
        await reads.open()
        try:
            live = await reads.live()
            assert live is not None
            _, found = await reads.version(*live).page(Page([], Order("key", False), None, 100_000))
        finally:
            await reads.close()
        return [key for key, _, _ in found]
