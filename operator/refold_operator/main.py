"""The operator's process: connections, kopf, the queue's workers, probes."""

import asyncio
import contextlib
import logging
import time

import kopf
import structlog
from refold import kafka, logs
from refold.web.probes import Probes

from refold_operator import handlers
from refold_operator.access import Access
from refold_operator.cluster import Cluster
from refold_operator.controller import NUMBERS_SECONDS, Controller
from refold_operator.database import Database
from refold_operator.errors import UnreachableError
from refold_operator.installation import Installation
from refold_operator.kafka import Kafka
from refold_operator.numbers import watch_numbers
from refold_operator.readstore import ReadStore
from refold_operator.redis import RedisReadStores
from refold_operator.settings import Settings
from refold_operator.store import Store

_log = structlog.get_logger(__name__)

#: The event loop is stuck if it hasn't run for so many seconds.
_STUCK_SECONDS = 60.0


class _Pulse:
    """Tells probes, from another thread, whether the event loop still runs."""

    def __init__(self) -> None:
        self._beat = time.monotonic()

    async def beat(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(1)

    def healthy(self) -> str | None:
        silent = time.monotonic() - self._beat
        return f"the event loop hasn't run for {silent:.0f} s" if silent > _STUCK_SECONDS else None


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    cluster = await Cluster.connect()
    store_database = Database(settings.store_admin_dsn.get_secret_value(), "event store")
    read_database = Database(settings.readstore_admin_dsn.get_secret_value(), "read store")
    store, readstore = Store(store_database, event_bytes=settings.event_bytes), ReadStore(read_database)
    for brokers in (settings.brokers(), settings.projectors()):
        if brokers is not None:
            kafka.end_when_changed(brokers)
    redis_url = settings.redis_admin_url
    redis = RedisReadStores(cluster, admin_url=None if redis_url is None else redis_url.get_secret_value())
    topics = Kafka(settings.brokers())
    access = Access(settings, topics)
    installation = Installation(
        namespace=settings.namespace, cluster=cluster, store=store, readstore=readstore, access=access
    )
    controller = Controller(
        settings, cluster=cluster, store=store, readstore=readstore, redis=redis, kafka=topics, access=access,
        installation=installation,
    )  # fmt: skip
    pulse = _Pulse()
    probes = Probes(
        settings.port,
        healthy=pulse.healthy,
        ready=lambda: None if installation.done else "the installation isn't complete; see the log",
    )
    with probes:
        try:
            await store_database.open()
            await read_database.open()
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(pulse.beat()),
                    tasks.create_task(
                        installation.keep(every=settings.resync_seconds, installed=controller.queue.hurry)
                    ),
                    tasks.create_task(controller.queue.work(settings.workers)),
                    tasks.create_task(watch_numbers(store, controller, every=NUMBERS_SECONDS)),
                ]
                await _wait_for_our_kinds(cluster)
                await kopf.operator(
                    clusterwide=True,
                    standalone=True,
                    settings=handlers.settings(),
                    memo=kopf.Memo(controller=controller, installation=installation),
                )
                for task in background:
                    task.cancel()
        finally:
            await store_database.close()
            await read_database.close()
            await redis.close()
            await cluster.close()
    _log.info("stopped")


async def _wait_for_our_kinds(cluster: Cluster) -> None:
    """Wait until the CRDs are served: kopf looks for them once."""
    told = False
    while True:
        with contextlib.suppress(UnreachableError):
            if await cluster.serves_our_kinds():
                return
        if not told:
            told = True
            _log.info("waiting for the CustomResourceDefinitions of refold.dev")
        await asyncio.sleep(1)


def _plain(record: logging.LogRecord) -> bool:
    """Take from kopf's records what is no news: its whole settings in every line."""
    for extra in ("settings", "k8s_skip"):
        record.__dict__.pop(extra, None)
    return True


def main() -> None:
    """Run the operator; settings come from the environment."""
    logs.configure("operator")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # outages are told by who meets them
    for handler in logging.getLogger().handlers:
        handler.addFilter(_plain)
    asyncio.run(run(Settings()))  # type: ignore[call-arg]  # required settings come from the environment
