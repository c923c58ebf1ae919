"""What to reconcile next: one entry a resource, one run at a time a resource, retries with back-off.

Watch events, timers and retries only *name* a resource; a run looks at the whole of it. So any number of causes that
come before a run begin it once, and a cause that comes during a run begins another one after it.
"""

import asyncio
import contextlib
import dataclasses
import heapq
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import structlog

from refold_operator import metrics
from refold_operator.errors import UnreachableError

_log = structlog.get_logger()

_FIRST_RETRY_SECONDS = 1.0
_LAST_RETRY_SECONDS = 60.0
#: A run that takes longer is cancelled and tried again: every call inside has a shorter limit of its own.
RUN_SECONDS = 180.0
#: A run that hasn't ended by then can't be cancelled; one that hasn't begun by then has no worker.
STUCK_SECONDS = RUN_SECONDS + 60.0


class Key(NamedTuple):
    """A resource: `kind` is EventStream or Projection."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        again: seconds until the next run without any cause, or None for never (the resource is gone).
        failed: whether something is missing; then `again` None means the key's own exponential back-off.
        reason: why, in one CamelCase word, as the resource's condition has it.
        message: what is missing.
    """

    again: float | None = None
    failed: bool = False
    reason: str = ""
    message: str = ""


Reconcile = Callable[[Key], Awaitable[Outcome]]


def backoff(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row: 1, 2, 4 … 60, ± 20 %."""
    seconds = min(_FIRST_RETRY_SECONDS * 2.0 ** min(failures - 1, 16), _LAST_RETRY_SECONDS)
    return seconds * random.uniform(0.8, 1.2)  # noqa: S311 - spreads retries, guards nothing


class WorkQueue:
    """Keys with the time that they are due at, and the workers that run them."""

    def __init__(self, reconcile: Reconcile) -> None:
        """Run `reconcile`; it raises only on defects and API outages, both retried."""
        self._reconcile = reconcile
        self._due: dict[Key, float] = {}
        #: The keys of `_due` that aren't running, first that which is due first; and entries that no longer hold.
        self._order: list[tuple[float, Key]] = []
        #: Keys that became due while they ran.
        self._held_up: set[Key] = set()
        self._failures: dict[Key, int] = {}
        #: The locks of keys that run, and how many have them or wait for them.
        self._locks: dict[Key, tuple[asyncio.Lock, int]] = {}
        self._changed = asyncio.Event()
        self._began: dict[Key, float] = {}
        self._last_began = time.monotonic()

    def add(self, key: Key, *, after: float = 0.0) -> None:
        """Run `key` at the latest `after` seconds from now."""
        due = time.monotonic() + after
        if key not in self._due or due < self._due[key]:
            self._due[key] = due
            self._line_up(key)

    def forget(self, key: Key) -> None:
        """Drop what is kept of a resource that is gone."""
        self._due.pop(key, None)
        self._failures.pop(key, None)

    def hurry(self) -> None:
        """Run what has failed at once: its cause may be gone."""
        for key in list(self._failures):
            self.add(key)

    async def now(self, key: Key, run: Reconcile) -> Outcome:
        """Run something else for `key`, after its current run and before the next one."""
        async with self._alone(key):
            return await self._run(key, run)

    def stuck(self) -> str | None:
        """Return what keeps the queue from going on; None where it does."""
        now = time.monotonic()
        for key, began in self._began.items():
            if now - began > STUCK_SECONDS:
                return f"the reconcile of {key} has been running for {now - began:.0f} s"
        oldest = min(self._due.values(), default=now)
        if min(now - oldest, now - self._last_began) > STUCK_SECONDS:
            return f"{len(self._due)} resources wait, and no worker has taken one for {now - self._last_began:.0f} s"
        return None

    async def work(self, workers: int) -> None:
        """Run keys as they become due, up to `workers` at the same time, until cancelled."""
        metrics.QUEUED.set_function(self._waiting)
        free = asyncio.Semaphore(workers)
        async with asyncio.TaskGroup() as group:
            while True:
                await free.acquire()
                running = group.create_task(self._work_on(await self._next()))
                running.add_done_callback(lambda _: free.release())

    async def _work_on(self, key: Key) -> None:
        async with self._alone(key):
            outcome = await self._run(key, self._reconcile)
        if outcome.failed:
            self._failures[key] = self._failures.get(key, 0) + 1
            self.add(key, after=backoff(self._failures[key]) if outcome.again is None else outcome.again)
        else:
            self._failures.pop(key, None)
            if outcome.again is not None:
                self.add(key, after=outcome.again)
            elif key not in self._due:
                self.forget(key)

    @contextlib.asynccontextmanager
    async def _alone(self, key: Key) -> AsyncIterator[None]:
        """Wait until no other run of `key` is under way; none begins until this one is over.

        The lock stays for as long as somebody waits for it: one that was just released and goes to a waiter isn't
        locked yet, and whoever made a new one then would run beside that waiter.
        """
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            _, users = self._locks[key]
            if users > 1:
                self._locks[key] = lock, users - 1
            else:
                del self._locks[key]
            if key in self._held_up:
                self._held_up.discard(key)
                if key in self._due:
                    self._line_up(key)

    def _line_up(self, key: Key) -> None:
        """Put a key of `_due` where it stands by its time."""
        heapq.heappush(self._order, (self._due[key], key))
        if len(self._order) > 2 * len(self._due) + 100:
            self._order = [(due, one) for one, due in self._due.items() if one not in self._held_up]
            heapq.heapify(self._order)
        self._changed.set()

    async def _next(self) -> Key:
        """Return the key that has been due longest and isn't running, and take it out."""
        while True:
            self._changed.clear()
            wait = None
            while self._order:
                due, key = self._order[0]
                holds = self._due.get(key) == due
                if holds and due > time.monotonic():
                    wait = due - time.monotonic()
                    break
                heapq.heappop(self._order)
                if not holds:
                    continue
                if key in self._locks:
                    self._held_up.add(key)
                    continue
                del self._due[key]
                return key
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _run(self, key: Key, run: Reconcile) -> Outcome:
        self._began[key] = self._last_began = time.monotonic()
        try:
            # All that is logged meanwhile says of which resource and which run it is.
            with (
                structlog.contextvars.bound_contextvars(resource=str(key), reconcile=secrets.token_hex(4)),
                metrics.DURATION.labels(key.kind).time(),
            ):
                outcome = await self._guarded(key, run)
        finally:
            del self._began[key]
        metrics.RECONCILIATIONS.labels(key.kind).inc()
        if outcome.failed:
            metrics.FAILURES.labels(key.kind, outcome.reason).inc()
        else:
            metrics.SUCCESSFUL.labels(key.kind).inc()
        return outcome

    async def _guarded(self, key: Key, run: Reconcile) -> Outcome:
        try:
            async with asyncio.timeout(RUN_SECONDS):
                return await run(key)
        except UnreachableError as error:
            # The API server; of other backends a reconcile tells the resource's status.
            _log.info("reconcile failed: no resource can be read or its status written", why=str(error))
            return Outcome(failed=True, reason="KubernetesUnreachable", message=str(error))
        except Exception as error:  # noqa: BLE001 - the last guard: a defect in one resource must not stop the others
            _log.exception("reconcile failed unexpectedly")
            return Outcome(failed=True, reason=type(error).__name__, message=f"{type(error).__name__}: {error}")

    def _waiting(self) -> int:
        """Return how many runs are due; called in the metrics' thread."""
        now = time.monotonic()
        return sum(due <= now for due in list(self._due.values()))
