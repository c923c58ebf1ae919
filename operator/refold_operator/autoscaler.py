"""Decides for all Projections with `spec.projector.autoscaling` how many projectors each of their versions has.

Every few seconds one query tells the heads of their streams. Whose heads haven't moved, and who had nothing left to do,
isn't looked at any further; of the others one query reads the positions that are applied. So it is known what waits
though no projector runs, and idle Projections cost nothing more. What a look means is `autoscaling.step`'s.

A decision is kept here and names the Projection to the work queue; the reconcile writes it to the Deployment and tells
it in status and Event. After a restart all begins with what the Deployments have, and with a window that is empty.
"""

import asyncio
import dataclasses
import datetime as dt
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import psycopg
import structlog
from refold import names
from refold.eventstore.errors import EventStoreError
from refold.projection.readstore import Applied, ReadStoreError

from refold_operator import autoscaling
from refold_operator.autoscaling import Change, Look, Memory
from refold_operator.errors import UnreachableError
from refold_operator.readstore import ReadStore
from refold_operator.redis import RedisReadStore
from refold_operator.resources import Projection, ProjectorScaling
from refold_operator.status import timestamp
from refold_operator.store import Store

_log = structlog.get_logger(__name__)

#: A Projection's namespace and name.
Name = tuple[str, str]
#: Incarnation of a stream, and a partition's number.
_Place = tuple[str, int]
_Heads = dict[_Place, int]


@dataclasses.dataclass
class _Version:
    """One version of a Projection.

    Attributes:
        unseen: readers never saw it.
        running: projectors that are ready.
        change: the last decision of this process, None where there was none, and when that was.
        seen: its partitions, as they were last read.
        heads: theirs, at the last look.
    """

    memory: Memory
    unseen: bool
    running: int = 0
    change: Change | None = None
    changed_at: str = ""
    seen: Sequence[Applied] = ()
    heads: _Heads = dataclasses.field(default_factory=dict)

    def decide(self, change: Change) -> None:
        """Let it have another number of projectors."""
        self.memory = dataclasses.replace(self.memory, replicas=change.replicas)
        self.change, self.changed_at = change, timestamp(dt.datetime.now(dt.UTC))


@dataclasses.dataclass
class _Scaled:
    """A Projection; `redis` is its read store where that is none in PostgreSQL."""

    scaling: ProjectorScaling
    as_of: bool
    versions: dict[str, _Version] = dataclasses.field(default_factory=dict)
    redis: RedisReadStore | None = None


class Told(NamedTuple):
    """A decision as a Kubernetes Event has it."""

    reason: str
    message: str


class Autoscaler:
    """What is known of all Projections whose projectors are scaled."""

    def __init__(self, store: Store, readstore: ReadStore, *, every: float) -> None:
        """Look `every` so many seconds, once `keep` runs."""
        self._store, self._readstore, self._every = store, readstore, every
        self._scaled: dict[Name, _Scaled] = {}

    def replicas(
        self, projection: Projection, version: str, deployment: Mapping[str, Any] | None, *, unseen: bool
    ) -> int:
        """Return how many projectors a version is to have.

        Args:
            projection: as its spec is now.
            version: one that is kept.
            deployment: of its projectors, as it is; None where there is none yet.
            unseen: readers never saw the version, so that it is being built.
        """
        scaling = projection.spec.projector.scaling
        if scaling is None:
            self.forget(_name(projection))
            return projection.spec.projector.replicas
        new = _Scaled(scaling, as_of=projection.spec.as_of is not None)
        scaled = self._scaled.setdefault(_name(projection), new)
        scaled.scaling = scaling
        known = scaled.versions.get(version)
        partitions = len(known.seen) or None if known is not None else None
        bounds = autoscaling.limits(scaling, partitions=partitions, unseen=unseen)
        if known is None:
            begun = bounds[0] if deployment is None else deployment["spec"].get("replicas", 1)
            memory = autoscaling.begin(autoscaling.within(begun, bounds), now=time.monotonic())
            known = scaled.versions[version] = _Version(memory, unseen)
        known.unseen = unseen
        inside = autoscaling.within(known.memory.replicas, bounds)
        if inside != known.memory.replicas:
            known.decide(Change(inside, "Limits", f"{bounds[0]} to {bounds[1]} are allowed and useful now"))
        return inside

    def see(
        self,
        projection: Projection,
        versions: Collection[str],
        deployments: Mapping[str, Mapping[str, Any]],
        readstore: ReadStore | RedisReadStore,
    ) -> None:
        """Note what a reconcile saw: the versions that are kept, how many projectors run, where the rows stand.

        Without any of these it saw nothing, since something was away.
        """
        scaled = self._scaled.get(_name(projection))
        if scaled is None or not versions or not deployments:
            return
        scaled.redis = readstore if isinstance(readstore, RedisReadStore) else None
        for version in scaled.versions.keys() - set(versions):
            del scaled.versions[version]
        for version, known in scaled.versions.items():
            deployment = deployments.get(names.projector_name(projection.metadata.name, version), {})
            known.running = deployment.get("status", {}).get("readyReplicas", 0)

    def forget(self, name: Name) -> None:
        """Forget a Projection."""
        self._scaled.pop(name, None)

    def status(self, projection: Projection, live: str | None) -> list[dict[str, Any]]:
        """Return the last decisions as `status.autoscaling` has them, the live version's first.

        What a process before this one decided stays told while it holds.
        """
        scaled = self._scaled.get(_name(projection))
        before = {one["version"]: one for one in projection.status.get("autoscaling", [])}
        told = []
        versions = {} if scaled is None else scaled.versions
        for version in sorted(versions, key=lambda one: (one != live, one)):
            known = versions[version]
            entry = {"version": version, "desiredReplicas": known.memory.replicas}
            if known.change is not None:
                entry |= {"reason": known.change.reason, "message": known.change.message}
                entry["lastScaleTime"] = known.changed_at
            elif before.get(version, {}).get("desiredReplicas") == known.memory.replicas:
                entry = before[version]
            else:
                entry |= {"reason": "Begun", "message": f"begins with {known.memory.replicas}"}
            told.append(entry)
        return told

    async def keep(self, wake: Callable[[str, str], None]) -> None:
        """Look until cancelled; `wake` is called with namespace and name of what something was decided for."""
        while True:
            await asyncio.sleep(self._every)
            for namespace, name in await self._look():
                wake(namespace, name)

    async def _look(self) -> list[Name]:
        """Look once and return for which Projections something was decided."""
        scaled = {name: one for name, one in self._scaled.items() if one.versions}
        try:
            known = _places(scaled.values())
            heads = await self._heads(known)
            away = await self._read({name: one for name, one in scaled.items() if _restless(one, heads)})
            heads |= await self._heads(_places(scaled.values()) - known)
        except (UnreachableError, EventStoreError, psycopg.Error) as error:
            _log.info("projectors can't be scaled for now", why=str(error))
            return []
        decided = []
        for name, one in scaled.items():
            if name in away:
                continue
            for version, each in one.versions.items():
                change = _decide(one, each, heads, self._every) if each.seen else None
                if change is not None:
                    decided.append(name)
                    _log.info(
                        "projectors scaled", namespace=name[0], name=name[1], version=version,
                        replicas=change.replicas, why=change.message,
                    )  # fmt: skip
        return decided

    async def _heads(self, places: Collection[_Place]) -> _Heads:
        incarnations = sorted({incarnation for incarnation, _ in places})
        return await self._store.heads(incarnations) if incarnations else {}

    async def _read(self, due: Mapping[Name, _Scaled]) -> set[Name]:
        """Read the positions of Projections; return those whose read store doesn't answer."""
        away = set()
        in_postgres = [name for name, one in due.items() if one.redis is None]
        found = await self._readstore.applied(in_postgres) if in_postgres else {}
        for (namespace, name), one in due.items():
            if one.redis is not None:
                try:
                    status = await one.redis.status(namespace=namespace, name=name)
                except ReadStoreError as error:
                    _log.info("projectors can't be scaled for now", namespace=namespace, name=name, why=str(error))
                    away.add((namespace, name))
                else:
                    found[namespace, name] = {version: each.applied for version, each in status.versions.items()}
        for each, one in due.items():
            for version, known in one.versions.items():
                if each not in away:
                    known.seen = found.get(each, {}).get(version, ())
        return away


def _places(scaled: Collection[_Scaled]) -> set[_Place]:
    return {row.place for one in scaled for known in one.versions.values() for row in known.seen}


def _head(scaled: _Scaled, row: Applied, heads: _Heads) -> int:
    """Return the last position to apply: of a version as of a moment its end, else the head."""
    return row.head if scaled.as_of else max(row.position, heads.get(row.place, 0))


def _restless(scaled: _Scaled, heads: _Heads) -> bool:
    """Tell whether positions have to be read: they never were, events have come, or there was something left to do."""
    return any(
        not known.seen
        or any(row.parked or row.stopped or _head(scaled, row, heads) > row.position for row in known.seen)
        for known in scaled.versions.values()
    )


def _decide(scaled: _Scaled, known: _Version, heads: _Heads, every: float) -> Change | None:
    """Take in what was read of a version, and return what was decided, if anything was."""
    now = {row.place: _head(scaled, row, heads) for row in known.seen}
    waiting = {row.place: now[row.place] - row.position for row in known.seen if not row.stopped}
    came = {place for place, head in now.items() if head > known.heads.get(place, head)}
    look = Look(
        at=time.monotonic(),
        head=sum(now.values()),
        applied=sum(row.position for row in known.seen),
        lag=sum(waiting.values()),
        busy=len(came | {place for place, events in waiting.items() if events}),
        partitions=len(known.seen),
        running=known.running,
        held=any(row.parked or row.stopped for row in known.seen),
    )
    known.heads = now
    known.memory, change = autoscaling.step(known.memory, look, scaled.scaling, every=every, unseen=known.unseen)
    if change is not None:
        known.decide(change)
    return change


def _name(projection: Projection) -> Name:
    return projection.metadata.namespace, projection.metadata.name


def told(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Told]:
    """Return the decisions that `after` tells, a status, and the status before doesn't."""
    former = {one["version"]: one["desiredReplicas"] for one in before.get("autoscaling", [])}
    return [
        Told(
            "ScaledUp" if one["desiredReplicas"] > former[one["version"]] else "ScaledDown",
            f"projectors of version {one['version']} from {former[one['version']]} to {one['desiredReplicas']}: "
            f"{one['message']}",
        )
        for one in after.get("autoscaling", [])
        if one["desiredReplicas"] != former.get(one["version"], one["desiredReplicas"])
    ]
