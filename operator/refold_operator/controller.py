"""From a resource's name to a reconcile and back to its status: what both kinds have in common."""

import contextlib
import datetime as dt
import time
from collections.abc import Mapping
from typing import Any

import structlog

from refold_operator import autoscaler, eventstream, projection, resources
from refold_operator.access import Access
from refold_operator.autoscaler import Autoscaler
from refold_operator.children import Image
from refold_operator.cluster import Cluster, Object, RefusedError
from refold_operator.delegation import Delegation
from refold_operator.errors import ReconcileError, UnreachableError
from refold_operator.installation import Installation
from refold_operator.kafka import Kafka
from refold_operator.metrics import Census
from refold_operator.pace import Paces
from refold_operator.projection import Surroundings
from refold_operator.readstore import ReadStore
from refold_operator.redis import RedisReadStores
from refold_operator.resources import FINALIZER, EventStream, Projection
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
        autoscaler: Autoscaler,
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
        self._autoscaler = autoscaler
        self._watched = watched
        self._delegation = Delegation(cluster, given=bool(settings.everywhere))
        self._paces = Paces()
        self._written: dict[Key, float] = {}
        self._census = Census()
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
        resource = _read(key, body)
        if why := resources.why_paused(resource):
            if isinstance(resource, Projection):
                self._autoscaler.forget((key.namespace, key.name))
            await self._write(key, body, paused(body.get("status", {}), resource, why, now=dt.datetime.now(dt.UTC)))
            return Outcome()
        result: eventstream.Result | projection.Result
        left: float | None = None
        if isinstance(resource, EventStream):
            result = await eventstream.reconcile(
                resource, store=self._store, kafka=self._kafka, access=self._access, cluster=self._cluster,
                default_replicas=self._settings.topic_replicas, rules=self._settings.rules,
                older=self._older(key),
            )  # fmt: skip
        else:
            left = projection.seconds_left(resource, now=dt.datetime.now(dt.UTC))
            if left is not None and left <= 0:
                _log.info("the Projection's ttl has passed: deleting it")
                await self._cluster.delete(key.kind, key.namespace, key.name, uid=resource.metadata.uid)
                return Outcome()
            self._readers[key] = frozenset(resource.spec.streams)
            result = await projection.reconcile(resource, self._surroundings())
        changed = await self._write(key, body, _status(body, result.conditions, result.status))
        if result.found:
            _log.info("put right", found=result.found)
            await self._tell(body, warning=True, reason="DriftFound", message=result.found)
        if changed and key.kind == "EventStream":
            self.wake_readers(key.namespace, key.name)
        if result.failed:
            ready = result.conditions[0]
            return Outcome(again=result.again, failed=True, reason=ready.reason, message=ready.message)
        moments = [until_resync(self._settings.resync_seconds, time.monotonic()), result.again, left]
        return Outcome(again=min(moment for moment in moments if moment is not None))

    def _older(self, key: Key) -> str | None:
        """Return an older EventStream that wants the same topic and may have it."""
        for body in self._watched.older(key):
            rival = resources.event_stream(body)
            if (
                rival.metadata.deletion_timestamp is None
                and resources.why_paused(rival) is None
                and not eventstream.problems(rival, self._settings.rules)
            ):
                return f"{rival.metadata.namespace}/{rival.metadata.name}"
        return None

    async def finalize(self, key: Key) -> Outcome:
        """Do what is left to do for a resource that is being deleted; failed means that it has to be tried again."""
        body = await self._cluster.get(key.kind, key.namespace, key.name)
        if body is None:
            self._forget(key)
            return Outcome()
        resource = _read(key, body)
        if resources.why_paused(resource):
            resource = resources.retained(resource)
        try:
            await self._let_end(resource)
        except ReconcileError as error:
            if error.reason in projection.PASSING or not resources.may_let_go(resource):
                message = f"deletion waits: {error.message}"
                _log.info("deletion waits", reason=error.reason, why=error.message)
                status: Status = {name: value for name, value in body.get("status", {}).items() if name != "conditions"}
                ready = Condition("Ready", "False", error.reason, message)
                await self._write(key, body, _status(body, [ready], status))
                return Outcome(failed=True, again=error.retry_after, reason=error.reason, message=message)
            with contextlib.suppress(ReconcileError):
                # So that a new one of this name can take back what stays.
                await self._let_end(resources.retained(resource))
            message = f"{resources.LET_GO_ANNOTATION} is true, so what couldn't be dropped stays: {error.message}"
            _log.warning("let go", reason=error.reason, why=error.message)
            await self._tell(body, warning=True, reason="LetGo", message=message)
        self._forget(key)
        if key.kind == "EventStream":
            self.wake_readers(key.namespace, key.name)
        return Outcome()

    async def _let_end(self, resource: EventStream | Projection) -> None:
        if isinstance(resource, EventStream):
            await eventstream.finalize(resource, store=self._store, kafka=self._kafka, access=self._access)
        else:
            await projection.finalize(resource, self._surroundings())

    def wake_readers(self, namespace: str, stream: str) -> None:
        """Look at the Projections that read a stream."""
        for key, streams in self._readers.items():
            if key.namespace == namespace and stream in streams:
                self.queue.add(key)

    def wake(self, namespace: str, projection: str) -> None:
        """Look at a Projection."""
        self.queue.add(Key("Projection", namespace, projection))

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
            autoscaler=self._autoscaler,
            rules=self._settings.rules,
            key=self._installation.key,
        )

    async def _write(self, key: Key, body: Object, after: Status) -> bool:
        """Write the status if it differs, and an Event if the outcome does; return whether the outcome changed."""
        before: Mapping[str, Any] = body.get("status", {})
        self._census.note(key, key.kind, after["conditions"])
        patch = merge_patch(before, after)
        now = time.monotonic()
        if not patch or (
            only_numbers_changed(before, after, _NUMBERS)
            and now - self._written.get(key, float("-inf")) < NUMBERS_SECONDS
        ):
            return False
        written = await self._cluster.patch_status(key.kind, key.namespace, key.name, patch)
        if written is None:
            return False
        self._watched.take(written)
        self._written[key] = now
        former, ready = find(before, "Ready"), find(after, "Ready")
        assert ready is not None, "every reconcile tells it"
        changed = former is None or (former["status"], former["reason"]) != (ready["status"], ready["reason"])
        if changed:
            _log.info("outcome changed", ready=ready["status"], reason=ready["reason"], why=ready["message"])
            await self._tell(body, warning=_is_warning(ready), reason=ready["reason"], message=ready["message"])
        for reason, message in autoscaler.told(before, after):
            await self._tell(body, warning=False, reason=reason, message=message)
        return changed

    async def _tell(self, body: Object, *, warning: bool, reason: str, message: str) -> None:
        try:
            await self._cluster.post_event(body, warning=warning, reason=reason, message=message)
        except (UnreachableError, RefusedError) as error:
            # As in a namespace that is being deleted.
            _log.info("an Event couldn't be written", why=str(error))

    def _forget(self, key: Key) -> None:
        self._written.pop(key, None)
        self._census.forget(key)
        self._readers.pop(key, None)
        if key.kind == "Projection":
            self._paces.forget((key.namespace, key.name))
            self._autoscaler.forget((key.namespace, key.name))


def _read(key: Key, body: Object) -> EventStream | Projection:
    return resources.event_stream(body) if key.kind == "EventStream" else resources.projection(body)


def _status(body: Object, wanted: list[Condition], status: Status) -> Status:
    """Return the status that an outcome makes of a resource's former one."""
    before, generation = body.get("status", {}).get("conditions", []), body["metadata"]["generation"]
    now = dt.datetime.now(dt.UTC)
    return {
        "observedGeneration": generation,
        "conditions": conditions(wanted, before=before, generation=generation, now=now),
        **status,
    }


def paused(before: Status, resource: EventStream | Projection, why: str, *, now: dt.datetime) -> Status:
    """Return the status of a resource that is left alone: nobody knows whether it is as specified, the rest stays."""
    message = f"{why}: nothing of this resource is looked at or changed"
    wanted = [Condition("Ready", "Unknown", "Paused", message)]
    if isinstance(resource, Projection):
        wanted.append(Condition("Progressing", "False", "Paused", message))
    former = before.get("conditions", [])
    generation = resource.metadata.generation
    told = {one["type"]: one for one in conditions(wanted, before=former, generation=generation, now=now)}
    kept = {one["type"]: one for one in former}
    return {**before, "observedGeneration": generation, "conditions": list({**kept, **told}.values())}


def until_resync(every: float, now: float) -> float:
    """Return the seconds until the next look without any cause: at most `every`, and at the same time as others.

    What is looked at together is asked for together, and costs less.
    """
    step = every / 10
    return (now + every) // step * step - now


def _is_warning(ready: Mapping[str, Any]) -> bool:
    """Tell whether a person should look; what is on its way isn't a warning."""
    on_its_way = projection.PASSING | {"Building", "QueryStarting", "ProjectorStarting", "TopicPending", "Paused"}
    return ready["status"] != "True" and ready["reason"] not in on_its_way
