"""The operator's process: connections, the election, kopf, the queue's workers, probes."""

import asyncio
import contextlib
import logging
import signal

import kopf
import structlog
import uvloop
from refold import logs
from refold.web.probes import Probes

from refold_operator import handlers
from refold_operator.access import Access
from refold_operator.autoscaler import Autoscaler
from refold_operator.cluster import Cluster
from refold_operator.controller import NUMBERS_SECONDS, Controller
from refold_operator.database import Database
from refold_operator.election import Election
from refold_operator.errors import UnreachableError
from refold_operator.installation import Installation
from refold_operator.kafka import Kafka
from refold_operator.liveness import Liveness
from refold_operator.numbers import watch_numbers
from refold_operator.readstore import ReadStore
from refold_operator.redis import RedisReadStores
from refold_operator.settings import Settings
from refold_operator.store import Store
from refold_operator.watched import Watched
from refold_operator.watches import Watches

_log = structlog.get_logger(__name__)

#: Pods of operators that know no Lease: those of Refold 0.1.0.
UNELECTED = "app.kubernetes.io/name=refold,app.kubernetes.io/component=operator,!refold.dev/elects"


async def run(settings: Settings) -> None:
    """Stand by until this process holds the Lease, then work, until SIGTERM or SIGINT."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        # Until kopf runs and takes them; without a handler, the first process of a container isn't ended by them.
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    candidate = await Cluster.connect()
    election = Election(candidate, namespace=settings.namespace, seconds=settings.lease_seconds)
    try:
        await _take_part(settings, election)
    finally:
        await candidate.close()
    _log.info("stopped")


async def _take_part(settings: Settings, election: Election) -> None:
    guard = election.check
    cluster = await Cluster.connect(guard=guard, namespaces=settings.everywhere)
    store_database = Database(settings.store_admin, "event store", guard=guard)
    read_database = Database(settings.readstore_admin, "read store", guard=guard)
    store, readstore = Store(store_database, event_bytes=settings.event_bytes), ReadStore(read_database)
    redis = RedisReadStores(cluster, admin=settings.redis_admin, guard=guard)
    topics = Kafka(settings.brokers(), guard=guard)
    access = Access(settings, topics)
    installation = Installation(
        namespace=settings.namespace, cluster=cluster, store=store, readstore=readstore, access=access
    )
    autoscaler = Autoscaler(store, readstore, every=settings.autoscaler_seconds)
    watched = Watched()
    controller = Controller(
        settings, cluster=cluster, store=store, readstore=readstore, redis=redis, kafka=topics, access=access,
        installation=installation, autoscaler=autoscaler, watched=watched,
    )  # fmt: skip
    watches = Watches(cluster, watched)
    liveness = Liveness([controller.queue.stuck, watches.stuck])
    working = False

    def unready() -> str | None:
        if working:
            return None if installation.done else "the installation isn't complete; see the log"
        return None if election.answered else "the Kubernetes API hasn't answered yet; see the log"

    pulse = asyncio.create_task(liveness.keep())
    try:
        with Probes(settings.port, healthy=liveness.wrong, ready=unready):
            async with election.held():
                await _wait_for_former(cluster, settings.namespace)
                working = True
                await store_database.open()
                await read_database.open()
                async with asyncio.TaskGroup() as tasks:
                    background = [
                        tasks.create_task(
                            installation.keep(every=settings.resync_seconds, installed=controller.queue.hurry)
                        ),
                        tasks.create_task(controller.queue.work(settings.workers)),
                        tasks.create_task(watch_numbers(store, controller, every=NUMBERS_SECONDS)),
                        tasks.create_task(autoscaler.keep(controller.wake)),
                        tasks.create_task(watches.keep()),
                    ]
                    await _wait_for_our_kinds(cluster)
                    await kopf.operator(
                        clusterwide=not settings.everywhere,
                        namespaces=settings.everywhere,
                        standalone=True,
                        settings=handlers.settings(),
                        memo=kopf.Memo(
                            controller=controller,
                            installation=installation,
                            watches=watches,
                            watched=watched,
                            guard=guard,
                        ),
                    )
                    for task in background:
                        task.cancel()
    finally:
        pulse.cancel()
        await store_database.close()
        await read_database.close()
        await redis.close()
        await cluster.close()


async def _wait_for_former(cluster: Cluster, namespace: str) -> None:
    """Wait until the operators of Refold 0.1.0 have ended, which work without a Lease; met in an upgrade only."""
    told = False
    while True:
        with contextlib.suppress(UnreachableError):
            former = [pod["metadata"]["name"] for pod in await cluster.list("Pod", namespace, selector=UNELECTED)]
            if not former:
                return
            if not told:
                told = True
                _log.info(
                    "waiting for operators of an earlier Refold to end; delete the pods, by force where their node is "
                    "gone, if they don't",
                    pods=former,
                )
        await asyncio.sleep(1)


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
    with contextlib.suppress(asyncio.CancelledError):  # told to end while it stood by
        uvloop.run(run(Settings()))  # type: ignore[call-arg]  # required settings come from the environment
