"""Which of the operator's replicas works: the holder of a Lease (coordination.k8s.io/v1) in the operator's namespace.

The rules are client-go's. A candidate takes the Lease when it is free, or when the candidate itself has watched it
unchanged for the duration that stands in it: times of other machines' clocks are never compared. Of two that try at
once the resourceVersion lets one through. The holder counts its time from *before* it sent the request that renewed the
Lease, and only two thirds of the duration: the last third is for what was under way when the time ended.

Every adapter calls `check` right before a request that changes something, and a process that doesn't hold the Lease any
more ends there and then. A process that is stopped between the check and the request, for longer than its Lease lasts,
may still send that one request when it goes on. So that it does no harm:

- PostgreSQL: the next holder ends the sessions of the former one before it uses a database (`database`). The request
  goes to a session that is gone, and what was under way is rolled back.
- Kubernetes: what is applied late is an older wish of the same field manager. The next holder watches what it made and
  puts it right; an object of an owner that is gone is collected by its owner's UID, and finalizers are changed only in
  the version that was read. A status says in `observedGeneration` of which spec it is.
- Kafka: topics, ACLs and users are compared with the catalog by name and topic id at every reconcile. A topic that is
  deleted late is made again and filled from the history by the relay; one that is made late has no claim, so nobody
  takes it for a stream's (`TopicConflict` says so where its name is wanted).
- Redis: claims and swaps are scripts that look at what is there. A late drop can take parts of a read model that was
  made anew meanwhile; read models are derived data, and are built again where they are missing. Users are compared at
  every reconcile.

kubernetes.aio has an election, too (37.0.2). It isn't used: it goes by the wall clock, counts from the answer, sets no
limit to a request, and doesn't give the Lease back.
"""

import asyncio
import contextlib
import datetime as dt
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NoReturn

import structlog

from refold_operator import metrics
from refold_operator.cluster import Cluster, Object, RefusedError
from refold_operator.errors import UnreachableError

NAME = "refold-operator"
#: Parts of the Lease's duration: while a holder may act, between two tries, and that one request may take.
_HOLDS, _PAUSE, _REQUEST = 2 / 3, 1 / 10, 1 / 3
_CONFLICT, _MISSING = 409, 404

_log = structlog.get_logger(__name__)


def end_process(why: str) -> NoReturn:
    """End this process at once: no handler, no cleanup and no other task may do anything more."""
    _log.error("this process ends: it doesn't hold the Lease any more", why=why)
    os._exit(1)


class Election:
    """One candidate for the Lease."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        namespace: str,
        seconds: int,
        lost: Callable[[str], NoReturn] = end_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is asked of `cluster` yet.

        Args:
            cluster: a connection of the election's own, so that renewals wait for nothing else.
            namespace: the operator's.
            seconds: how long the Lease lasts, a whole number as Kubernetes has it.
            lost: ends the process.
            clock: monotonic seconds.
        """
        #: Of this process alone: a container that is started again is another candidate.
        self.identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
        self._cluster, self._namespace, self._seconds = cluster, namespace, seconds
        self._lost, self._clock = lost, clock
        self._until = float("-inf")
        self._spec: Mapping[str, Any] | None = None
        self._seen_at = 0.0
        self._failing = False
        #: Whether the API server has ever answered.
        self.answered = False

    @property
    def holds(self) -> bool:
        """Whether this process may act now."""
        return self._clock() < self._until

    def check(self) -> None:
        """Return if this process may act; else it ends here."""
        if not self.holds:
            self._lose("its time is over")

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Wait for the Lease, keep it inside, and give it back at the end: by then nothing may act any more."""
        await self._acquire()
        metrics.LEADER.set(1)
        _log.info("this process works: it holds the Lease", identity=self.identity)
        renewals = asyncio.create_task(self._keep(), name="renewals of the Lease")
        try:
            yield
        finally:
            renewals.cancel()
            await asyncio.wait([renewals])
            metrics.LEADER.set(0)
            await self._release()

    async def _acquire(self) -> None:
        holder: str | None = None
        while not await self._try():
            current = _holder(self._spec)
            if current and current != holder:
                holder = current
                _log.info("this process stands by", holder=holder, identity=self.identity)
            await asyncio.sleep(self._seconds * _PAUSE)

    async def _keep(self) -> None:
        """Renew the Lease until cancelled; the process ends where that fails."""
        try:
            while True:
                await asyncio.sleep(self._seconds * _PAUSE)
                # One whose time is over is a candidate like any other, and must not act as if it had gone on.
                self.check()
                if not await self._try() and _holder(self._spec) != self.identity:
                    self._lose(f"{_holder(self._spec) or 'nobody'} holds it")
        except Exception:  # noqa: BLE001 - whatever it is, without renewals this process must not go on
            _log.exception("renewing the Lease failed unexpectedly")
            self._lose("renewing it failed")

    async def _release(self) -> None:
        """Let the Lease go, so that the next holder needn't wait; without an answer it does."""
        if not self.holds:
            return
        self._until = float("-inf")
        try:
            async with asyncio.timeout(self._seconds * _REQUEST):
                lease = await self._cluster.get("Lease", self._namespace, NAME)
                if lease is None or _holder(lease.get("spec")) != self.identity:
                    return
                spec = {name: value for name, value in lease["spec"].items() if name != "holderIdentity"}
                await self._cluster.replace({**lease, "spec": {**spec, "renewTime": _now()}})
                _log.info("gave the Lease back")
        except (UnreachableError, RefusedError, TimeoutError) as error:
            _log.info("the Lease couldn't be given back", why=str(error))

    async def _try(self) -> bool:
        """Take or renew the Lease, if no other candidate may hold it; return whether that was done."""
        try:
            async with asyncio.timeout(self._seconds * _REQUEST):
                taken = await self._take()
        except (UnreachableError, RefusedError, TimeoutError) as error:
            if not self._failing:  # told once an outage
                self._failing = True
                _log.warning("the Lease can't be looked at or changed", why=str(error) or "no answer in time")
            return False
        self._failing = False
        return taken

    async def _take(self) -> bool:
        lease = await self._cluster.get("Lease", self._namespace, NAME)
        self.answered, seen_at = True, self._clock()
        if lease is None:
            # Somebody deleted it, and its holder may not know yet.
            if self._others(self._spec):
                return False
            sent = self._clock()
            made: Object = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": NAME, "namespace": self._namespace},
                "spec": self._wish({}),
            }
            if not await self._cluster.create(made):
                return False
            self._spec, self._seen_at = made["spec"], self._clock()
            self._until = sent + self._seconds * _HOLDS
            return True
        spec = lease.get("spec") or {}
        if spec != self._spec:
            self._spec, self._seen_at = spec, seen_at
        if self._others(spec):
            return False
        sent = self._clock()
        try:
            self._spec = (await self._cluster.replace({**lease, "spec": self._wish(spec)}))["spec"]
        except RefusedError as error:
            if error.status in (_CONFLICT, _MISSING):  # another one was faster, or it was deleted
                return False
            raise
        self._until = sent + self._seconds * _HOLDS
        return True

    def _others(self, spec: Mapping[str, Any] | None) -> bool:
        """Tell whether another candidate holds what was last seen of the Lease, and its time isn't over."""
        if spec is None or _holder(spec) in ("", self.identity):
            return False
        return self._clock() < self._seen_at + int(spec.get("leaseDurationSeconds", self._seconds))

    def _wish(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the Lease shall say, of what it says."""
        now = _now()
        mine = _holder(spec) == self.identity
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._seconds,
            "acquireTime": spec.get("acquireTime", now) if mine else now,
            "renewTime": now,
            "leaseTransitions": spec.get("leaseTransitions", 0) + (0 if mine or not spec else 1),
        }

    def _lose(self, why: str) -> NoReturn:
        self._until = float("-inf")
        metrics.LEADER.set(0)
        self._lost(why)


def _holder(spec: Mapping[str, Any] | None) -> str:
    """Return who holds the Lease; empty: nobody."""
    return (spec or {}).get("holderIdentity") or ""


def _now() -> str:
    """Return the time for people to read; nobody decides by it."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
