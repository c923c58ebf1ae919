"""What every installation needs before its first resource: the stores, the logins of event store and relay, its ACLs.

The logins' DSNs are put into Secrets that the chart's Deployments wait for. Run at the start, with every resync, and
when one of the Secrets was changed; a database that isn't there yet is waited for.
"""

import asyncio
import base64
from collections.abc import Callable

import psycopg
import structlog
from confluent_kafka import KafkaException
from refold.eventstore.errors import EventStoreError
from refold.projection.readstore import ReadStoreError

from refold_operator import children, cluster, credentials, metrics
from refold_operator.access import Access
from refold_operator.cluster import Cluster
from refold_operator.errors import ForbiddenError, UnreachableError
from refold_operator.kafka import TopicRefusedError
from refold_operator.readstore import ReadStore
from refold_operator.store import Store
from refold_operator.workqueue import backoff

_log = structlog.get_logger(__name__)

_KEY_SECRET = "refold-operator-key"  # noqa: S105 - a name


_FORESEEN = (
    UnreachableError, ForbiddenError, cluster.RefusedError, EventStoreError, ReadStoreError, psycopg.Error,
    KafkaException, TopicRefusedError,
)  # fmt: skip


class Installation:
    """The installation in one namespace."""

    def __init__(self, *, namespace: str, cluster: Cluster, store: Store, readstore: ReadStore, access: Access) -> None:
        self.namespace = namespace
        self._cluster = cluster
        self._store = store
        self._readstore = readstore
        self._access = access
        self._wake = asyncio.Event()
        #: The key of passwords, once it is known.
        self.key: bytes | None = None
        #: Whether all was in place at least once.
        self.done = False

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    async def keep(self, *, every: float, installed: Callable[[], None]) -> None:
        """Install, and look again `every` so many seconds, until cancelled; `installed` is called after the first."""
        failures = 0
        while True:
            self._wake.clear()
            try:
                await self.ensure()
            except _FORESEEN as error:
                failures += 1
                pause = min(backoff(failures), 15.0)
                metrics.INSTALLED.set(0)
                _log.warning("installation isn't complete", why=str(error), retry_seconds=round(pause, 1))
            else:
                failures, pause = 0, every
                metrics.INSTALLED.set(1)
                if not self.done:
                    self.done = True
                    _log.info("installation is complete")
                    installed()
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def ensure(self) -> None:
        """Put in place what is missing or differs.

        Raises:
            UnreachableError: a database, Kafka or the API server is away.
            ForbiddenError: Kafka doesn't authorise the operator.
            RefusedError: the API server refuses a Secret.
            EventStoreError, ReadStoreError, psycopg.Error: a store refuses to be installed.
        """
        self.key = await self._ensure_key(self.key)
        dsns = await self._store.install(self.key)
        await self._readstore.install()
        for part, dsn in dsns.items():
            secret = children.installation_secret(self.namespace, f"refold-{part}", {"dsn": dsn})
            known = await self._cluster.get("Secret", self.namespace, f"refold-{part}")
            if known is None or not cluster.covers(known, secret):
                await self._cluster.apply(secret)
                _log.info("applied", kind="Secret", namespace=self.namespace, name=f"refold-{part}")
        await self._access.install(key=self.key, store_id=await self._store.id())

    async def _ensure_key(self, key: bytes | None) -> bytes:
        """Return the key that stands in the Secret, putting `key` or a new one there where it is missing."""
        known = await self._cluster.get("Secret", self.namespace, _KEY_SECRET)
        if known is None:
            secret = children.installation_secret(self.namespace, _KEY_SECRET, {"key": key or credentials.new_key()})
            await self._cluster.create(secret)
            known = await self._cluster.get("Secret", self.namespace, _KEY_SECRET)
            assert known is not None, "it was just created, or someone else was faster"
        return base64.b64decode(known["data"]["key"])
