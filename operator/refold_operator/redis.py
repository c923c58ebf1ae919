"""Read models in a Redis of the user's own, whose URL stands in a Secret beside the Projection.

The URL's user is the projectors' and query services' too: nobody gets more than the Secret gives to its namespace.
"""

import base64
import binascii

from refold.projection.readstore import NotFoundError, ProjectionStatus
from refold.projection.readstore.redis import SCHEMES, RedisStore

from refold_operator.cluster import Cluster
from refold_operator.errors import ReconcileError
from refold_operator.readstore import Logins
from refold_operator.resources import Projection

#: The key of the Secret that holds the URL.
URL_KEY = "url"


class RedisReadStore(RedisStore):
    """The read models in one Redis, as `readstore.ReadStore` has those in PostgreSQL."""

    def __init__(self, url: str) -> None:
        """Use the Redis at `url`; nothing is asked of it yet."""
        super().__init__(url)
        self._url = url

    async def logins(self, key: bytes, *, namespace: str, name: str) -> Logins:  # noqa: ARG002 (as of PostgreSQL)
        """Return how projectors and query services reach it: as the Secret says."""
        return Logins(projector=self._url, query=self._url)

    async def status(self, *, namespace: str, name: str) -> ProjectionStatus:
        """Return how far the versions are; without any where the projection isn't claimed."""
        try:
            return await super().status(namespace=namespace, name=name)
        except NotFoundError:
            return ProjectionStatus(live=None, versions={})


class RedisReadStores:
    """The Redis of each Projection that has one; a Redis keeps its connections between reconciles."""

    def __init__(self, cluster: Cluster) -> None:
        """Read Secrets in `cluster`."""
        self._cluster = cluster
        self._known: dict[str, RedisReadStore] = {}

    async def of(self, projection: Projection) -> RedisReadStore:
        """Return the Redis that the Projection names, which has been looked at.

        Raises:
            ReconcileError: its Secret is missing or holds no URL of a Redis.
            refold.projection.readstore.UnavailableError: the Redis is away, or can't keep read models.
        """
        reference = projection.spec.read_store.connection_ref
        assert reference is not None, "the CRD lets no Projection with Redis pass without"
        url = await self._url(projection.metadata.namespace, reference.name)
        store = self._known.get(url)
        if store is None:
            store = self._known[url] = RedisReadStore(url)
        await store.install()
        return store

    async def close(self) -> None:
        """Close all connections."""
        for store in self._known.values():
            await store.close()

    async def _url(self, namespace: str, name: str) -> str:
        secret = await self._cluster.get("Secret", namespace, name)
        what = f"spec.readStore.connectionRef: the Secret {namespace}/{name}"
        if secret is None:
            raise ReconcileError("Ready", "SecretMissing", f"{what} doesn't exist: make it, with the key {URL_KEY}")
        try:
            url = base64.b64decode(secret.get("data", {})[URL_KEY]).decode().strip()
        except (KeyError, binascii.Error, UnicodeDecodeError):
            raise ReconcileError("Ready", "SecretInvalid", f"{what} has no key {URL_KEY}") from None
        if not url.startswith(SCHEMES):
            message = f"{what} has no URL of a Redis under {URL_KEY}: redis://user:password@host:port/database"
            raise ReconcileError("Ready", "SecretInvalid", message)
        return url
