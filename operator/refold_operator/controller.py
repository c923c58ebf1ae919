"""From a resource's name to a reconcile and back to its status: what both kinds have in common."""

import datetime as dt
import time
from collections.abc import Mapping
from typing import Any

import structlog

from refold_operator import eventstream, projection, resources
from refold_operator.access import Access
from refold_operator.children import Image
from refold_operator.cluster import Cluster, Object, RefusedError
from refold_operator.delegation import Delegation
from refold_operator.errors import ReconcileError, UnreachableError
from refold_operator.installation import Installation
from refold_operator.kafka import Kafka
from refold_operator.pace import Paces
from refold_operator.projection import Surroundings
from refold_operator.readstore import ReadStore
from refold_operator.redis import RedisReadStores
from refold_operator.resources import FINALIZER
from refold_operator.settings import Settings
from refold_operator.status import Condition, Status, conditions, find, merge_patch, only_numbers_changed
from refold_operator.store import Store
from refold_operator.watched import Watched
from refold_operator.workqueue import Key, Outcome, WorkQueue

_log = structlog.get_logger(__name__)

#: Numbers alone are written at most so often, in seconds.
NUMBERS_SECONDS = 30.0
_NUMBERS = ("events", "lag", "parked", "building")


class Controller:
    """Reconciles and finalizes resources by their keys."""

    def __init__(
        self,
        settings: Settings,
        *,
        cluster: Cluster,
        store: Store,
        readstore: ReadStore,
        redis: RedisReadStores,
        kafka: Kafka,
        access: Access,
        installation: Installation,
        watched: Watched,
    ) -> None:
        self._settings = settings
        self._brokers = settings.brokers()
        self._cluster = cluster
        self._store = store
        self._readstore = readstore
        self._redis = redis
        self._kafka = kafka
        self._access = access
        self._installation = installation
        self._watched = watched
        self._delegation = Delegation(cluster)
        self._paces = Paces()
        self._written: dict[Key, float] = {}
        self._readers: dict[Key, frozenset[str]] = {}
        self.queue = WorkQueue(self.reconcile)

    async def reconcile(self, key: Key) -> Outcome:
        """Bring a resource to what it says, write its status if that differs, and tell when to look again."""
        body = self._watched.get(key)
        if body is None:
            self._forget(key)
            return Outcome()
        if "deletionTimestamp" in body["metadata"] or FINALIZER not in body["metadata"].get("finalizers", []):
            # Deletion is `finalize`'s; before the finalizer is there nothing may be made that it would have to undo.
            return Outcome()
        result: eventstream.Result | projection.Result
        left: float | None = None
        if key.kind == "EventStream":
            stream = resources.event_stream(body)
            result = await eventstream.reconcile(
                stream, store=self._store, kafka=self._kafka, access=self._access, cluster=self._cluster,
                default_replicas=self._settings.topic_replicas, event_bytes=self._settings.event_bytes,
            )  # fmt: skip
        else:
            reader = resources.projection(body)
            left = projection.seconds_left(reader, now=dt.datetime.now(dt.UTC))
            if left is not None and left <= 0:
                _log.info("the Projection's ttl has passed: deleting it", key=str(key))
                await self._cluster.delete(key.kind, key.namespace, key.name, uid=reader.metadata.uid)
                return Outcome()
            self._readers[key] = frozenset(reader.spec.streams)
            result = await projection.reconcile(reader, self._surroundings())
        changed = await self._write(key, body, result.conditions, result.status, found=result.found)
        if changed and key.kind == "EventStream":
            self.wake_readers(key.namespace, key.name)
        if result.failed:
            return Outcome(again=result.again, failed=True, message=result.conditions[0].message)
        moments = [_until_resync(self._settings.resync_seconds, time.monotonic()), result.again, left]
        return Outcome(again=min(moment for moment in moments if moment is not None))

    async def finalize(self, key: Key) -> Outcome:
        """Do what is left to do for a resource that is being deleted; failed means that it has to be tried again."""
        body = await self._cluster.get(key.kind, key.namespace, key.name)
        if body is None:
            self._forget(key)
            return Outcome()
        try:
            if key.kind == "EventStream":
                await eventstream.finalize(
                    resources.event_stream(body), store=self._store, kafka=self._kafka, access=self._access
                )
            else:
                await projection.finalize(resources.projection(body), self._surroundings())
        except ReconcileError as error:
            message = f"deletion waits: {error.message}"
            _log.info("deletion waits", key=str(key), reason=error.reason, why=error.message)
            status: Status = {name: value for name, value in body.get("status", {}).items() if name != "conditions"}
            await self._write(key, body, [Condition("Ready", "False", error.reason, message)], status)
            return Outcome(failed=True, again=error.retry_after, message=message)
        self._forget(key)
        if key.kind == "EventStream":
            self.wake_readers(key.namespace, key.name)
        return Outcome()

    def wake_readers(self, namespace: str, stream: str) -> None:
        """Look at the Projections that read a stream."""
        for key, streams in self._readers.items():
            if key.namespace == namespace and stream in streams:
                self.queue.add(key)

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            cluster=self._cluster,
            store=self._store,
            readstore=self._readstore,
            redis=self._redis,
            image=Image(self._settings.image, self._settings.image_pull_policy),
            delegation=self._delegation,
            brokers=self._brokers,
            access=self._access,
            paces=self._paces,
            key=self._installation.key,
        )

    async def _write(self, key: Key, body: Object, wanted: list[Condition], status: Status, *, found: str = "") -> bool:
        """Write the status if it differs, and an Event if the outcome does; return whether the outcome changed."""
        before: Mapping[str, Any] = body.get("status", {})
        generation = body["metadata"]["generation"]
        after: Status = {
            "observedGeneration": generation,
            "conditions": conditions(
                wanted, before=before.get("conditions", []), generation=generation, now=dt.datetime.now(dt.UTC)
            ),
            **status,
        }
        patch = merge_patch(before, after)
        now = time.monotonic()
        if not patch or (
            only_numbers_changed(before, after, _NUMBERS)
            and now - self._written.get(key, float("-inf")) < NUMBERS_SECONDS
        ):
            return False
        written = await self._cluster.patch_status(key.kind, key.namespace, key.name, patch)
        if written is None:
            self._watched.forget(key)
            return False
        self._watched.take(written)
        self._written[key] = now
        former, ready = find(before, "Ready"), find(after, "Ready")
        assert ready is not None, "every reconcile tells it"
        changed = former is None or (former["status"], former["reason"]) != (ready["status"], ready["reason"])
        if changed:
            _log.info(
                "outcome changed", key=str(key), ready=ready["status"], reason=ready["reason"], why=ready["message"]
            )
            await self._tell(body, warning=_is_warning(ready), reason=ready["reason"], message=ready["message"])
        if found:
            _log.info("put right", key=str(key), found=found)
            await self._tell(body, warning=True, reason="DriftCorrected", message=found)
        return changed

    async def _tell(self, body: Object, *, warning: bool, reason: str, message: str) -> None:
        try:
            await self._cluster.post_event(body, warning=warning, reason=reason, message=message)
        except (UnreachableError, RefusedError) as error:
            # As in a namespace that is being deleted.
            _log.info("an Event couldn't be written", why=str(error))

    def _forget(self, key: Key) -> None:
        self._written.pop(key, None)
        self._readers.pop(key, None)
        self._paces.forget((key.namespace, key.name))


def _until_resync(every: float, now: float) -> float:
    """Return the seconds until the next look without any cause: at most `every`, and at the same time as others.

    What is looked at together is asked for together, and costs less.
    """
    step = every / 10
    return (now + every) // step * step - now


def _is_warning(ready: Mapping[str, Any]) -> bool:
    """Tell whether a person should look; what is on its way isn't a warning."""
    on_its_way = projection.PASSING | {"Building", "QueryStarting", "ProjectorStarting", "TopicPending"}
    return ready["status"] != "True" and ready["reason"] not in on_its_way
