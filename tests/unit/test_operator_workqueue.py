"""The work queue: one run at a time a resource, causes merged, failures retried with back-off."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import pytest
import structlog
from prometheus_client import REGISTRY
from refold_operator import workqueue
from refold_operator.errors import UnreachableError
from refold_operator.workqueue import Key, Outcome, WorkQueue, backoff

A, B = Key("EventStream", "shop", "a"), Key("EventStream", "shop", "b")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


class Runs:
    """Counts runs; answers what it was told, after `hold` was set."""

    def __init__(self, *outcomes: Outcome | Exception) -> None:
        self.keys: list[Key] = []
        self.now = 0
        self.most = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self._outcomes = list(outcomes)

    async def __call__(self, key: Key) -> Outcome:
        self.keys.append(key)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.hold.wait()
        finally:
            self.now -= 1
        outcome = self._outcomes.pop(0) if self._outcomes else Outcome()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def working(queue: WorkQueue, workers: int, body: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.create_task(queue.work(workers))
    try:
        await body()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_many_causes_before_a_run_are_one_run() -> None:
    runs = Runs()
    queue = WorkQueue(runs)
    for _ in range(10):
        queue.add(A)

    async def body() -> None:
        await until(lambda: len(runs.keys) == 1)
        await asyncio.sleep(0.05)
        assert runs.keys == [A]

    await working(queue, 4, body)


async def test_a_cause_during_a_run_begins_another_one_after_it() -> None:
    runs = Runs()
    queue = WorkQueue(runs)
    runs.hold.clear()
    queue.add(A)

    async def body() -> None:
        await until(lambda: runs.now == 1)
        queue.add(A)
        await asyncio.sleep(0.05)
        assert len(runs.keys) == 1
        runs.hold.set()
        await until(lambda: len(runs.keys) == 2)
        assert runs.most == 1

    await working(queue, 4, body)


async def test_different_resources_run_at_the_same_time() -> None:
    runs = Runs()
    queue = WorkQueue(runs)
    runs.hold.clear()
    queue.add(A)
    queue.add(B)

    async def body() -> None:
        await until(lambda: runs.now == 2)
        runs.hold.set()

    await working(queue, 2, body)


async def test_what_has_been_due_longest_runs_first_and_a_later_time_gives_way_to_an_earlier_one() -> None:
    runs = Runs()
    queue = WorkQueue(runs)
    keys = [Key("EventStream", "shop", str(number)) for number in range(300)]
    for key in keys:
        queue.add(key, after=30)
    for place, key in enumerate(reversed(keys)):
        queue.add(key, after=-1 + place / 1000)
        queue.add(key, after=20)

    async def body() -> None:
        await until(lambda: len(runs.keys) == len(keys))
        await asyncio.sleep(0.02)
        assert runs.keys == keys[::-1]

    await working(queue, 1, body)


async def test_a_resource_that_became_due_while_it_ran_takes_no_worker_from_others() -> None:
    runs = Runs()
    queue = WorkQueue(runs)
    runs.hold.clear()
    queue.add(A)

    async def body() -> None:
        await until(lambda: runs.now == 1)
        queue.add(A)
        await asyncio.sleep(0.02)
        queue.add(B)
        await until(lambda: runs.now == 2)
        assert runs.keys == [A, B]
        runs.hold.set()
        await until(lambda: runs.keys == [A, B, A])

    await working(queue, 2, body)


async def test_what_waits_behind_a_resource_that_runs_and_is_forgotten_does_not_run() -> None:
    runs = Runs()
    queue = WorkQueue(runs)
    runs.hold.clear()
    queue.add(A)

    async def body() -> None:
        await until(lambda: runs.now == 1)
        queue.add(A)
        await asyncio.sleep(0.02)
        queue.forget(A)
        runs.hold.set()
        queue.add(B)
        await until(lambda: runs.keys == [A, B])
        await asyncio.sleep(0.02)
        assert runs.keys == [A, B]

    await working(queue, 2, body)


@pytest.mark.parametrize("seed", range(8))
async def test_after_each_cause_a_run_begins_whatever_runs_and_is_finalized_meanwhile(seed: int) -> None:
    chance = random.Random(seed)
    keys = [Key("EventStream", "shop", str(number)) for number in range(6)]
    began, running = dict.fromkeys(keys, 0.0), set[Key]()

    async def reconcile(key: Key) -> Outcome:
        assert key not in running, "one run at a time a resource"
        running.add(key)
        began[key] = time.monotonic()
        await asyncio.sleep(chance.choice([0, 0, 0.002]))
        running.remove(key)
        return Outcome(failed=chance.random() < 0.2, again=chance.choice([None, 0, 0.001, 60]))

    queue = WorkQueue(reconcile)

    async def body() -> None:
        for _ in range(150):
            key = chance.choice(keys)
            queue.add(key, after=chance.choice([0, 0.001, 60]))
            if chance.random() < 0.3:
                await queue.now(key, reconcile)
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
            caused = time.monotonic()
            queue.add(key)
            if chance.random() < 0.3:
                await until(lambda key=key, caused=caused: began[key] >= caused)  # type: ignore[misc]
        caused = time.monotonic()
        for key in keys:
            queue.add(key)
        await until(lambda: all(began[key] >= caused for key in keys))

    await working(queue, 3, body)


@pytest.mark.parametrize("failure", [Outcome(failed=True, again=0.01), Outcome(again=0.01)])
async def test_a_run_is_repeated_when_it_asks_for_it(failure: Outcome) -> None:
    runs = Runs(failure, failure)
    queue = WorkQueue(runs)
    queue.add(A)
    await working(queue, 1, lambda: until(lambda: len(runs.keys) == 3))


async def test_a_defect_in_one_resource_is_retried_and_stops_no_other() -> None:
    runs = Runs(RuntimeError("defect"))
    queue = WorkQueue(runs)
    queue.add(A)

    async def body() -> None:
        await until(lambda: len(runs.keys) == 1)
        queue.add(B)
        await until(lambda: runs.keys[-1] == B)
        queue.hurry()
        await until(lambda: runs.keys == [A, B, A])

    await working(queue, 1, body)


async def test_an_outage_of_the_api_server_is_told_as_such_and_is_no_defect() -> None:
    queue = WorkQueue(Runs(UnreachableError("the Kubernetes API", "connection refused"), KeyError("defect")))
    with structlog.testing.capture_logs() as logs:
        outage = await queue.now(A, queue._reconcile)
        defect = await queue.now(A, queue._reconcile)
    assert (outage.failed, outage.reason) == (True, "KubernetesUnreachable")
    assert (defect.failed, defect.reason) == (True, "KeyError")
    assert [log["log_level"] for log in logs] == ["info", "error"]
    assert "connection refused" in logs[0]["why"]


async def test_what_is_due_later_waits_and_an_earlier_cause_wins() -> None:
    runs = Runs()
    queue = WorkQueue(runs)
    queue.add(A, after=60)

    async def body() -> None:
        await asyncio.sleep(0.05)
        assert runs.keys == []
        queue.add(A)
        queue.add(A, after=60)
        await until(lambda: runs.keys == [A])

    await working(queue, 1, body)


async def test_another_run_of_the_same_resource_is_waited_for() -> None:
    runs, finalize = Runs(), Runs(Outcome(failed=True, message="later"))
    queue = WorkQueue(runs)
    runs.hold.clear()
    queue.add(A)

    async def body() -> None:
        await until(lambda: runs.now == 1)
        finalizing = asyncio.create_task(queue.now(A, finalize))
        await asyncio.sleep(0.05)
        assert finalize.keys == []
        runs.hold.set()
        assert (await finalizing).message == "later"

    await working(queue, 2, body)


def test_back_off_grows_to_a_minute_and_spreads() -> None:
    assert 0.8 <= backoff(1) <= 1.2
    assert 6.4 <= backoff(4) <= 9.6
    assert all(48 <= backoff(failures) <= 72 for failures in (7, 100, 10_000))
    assert len({backoff(5) for _ in range(20)}) > 1


async def test_a_run_that_does_not_end_and_a_queue_that_nobody_takes_from_are_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workqueue, "STUCK_SECONDS", 0.1)
    runs = Runs()
    runs.hold.clear()
    queue = WorkQueue(runs)
    queue.add(A, after=60)
    await asyncio.sleep(0.15)
    assert queue.stuck() is None, "nothing is due"
    queue.add(B)
    assert queue.stuck() is None
    await until(lambda: queue.stuck() is not None)
    assert "2 resources wait" in str(queue.stuck())

    async def body() -> None:
        await until(lambda: runs.keys == [B])
        assert queue.stuck() is None
        await until(lambda: queue.stuck() is not None)
        assert "the reconcile of EventStream shop/b has been running" in str(queue.stuck())
        runs.hold.set()
        await until(lambda: queue.stuck() is None)

    await working(queue, 1, body)


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_runs_are_counted_by_how_they_end_and_failures_by_their_reason() -> None:
    names = [f"refold_reconciliations{part}_total" for part in ("", "_successful")]
    before = [counted(name, kind="EventStream") for name in names]
    reasons = ("KafkaUnreachable", "KeyError")
    failed = [counted("refold_reconciliations_failed_total", kind="EventStream", reason=reason) for reason in reasons]
    runs = Runs(Outcome(failed=True, again=0.01, reason=reasons[0]), KeyError("defect"), Outcome())
    queue = WorkQueue(runs)
    queue.add(A)

    async def body() -> None:
        await until(lambda: len(runs.keys) == 2)
        queue.hurry()
        await until(lambda: len(runs.keys) == 3 and not runs.now)

    await working(queue, 1, body)
    after = [counted(name, kind="EventStream") for name in names]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 1]
    now = [counted("refold_reconciliations_failed_total", kind="EventStream", reason=reason) for reason in reasons]
    assert [after - before for after, before in zip(now, failed, strict=True)] == [1, 1]


async def test_the_queue_is_as_deep_as_runs_are_due_and_wait() -> None:
    runs = Runs()
    runs.hold.clear()
    queue = WorkQueue(runs)
    for key in (A, B):
        queue.add(key)
    queue.add(Key("Projection", "shop", "later"), after=60)

    async def body() -> None:
        await until(lambda: runs.now == 1)
        assert counted("refold_reconciliations_queued") == 1
        runs.hold.set()
        await until(lambda: len(runs.keys) == 2)
        assert counted("refold_reconciliations_queued") == 0

    await working(queue, 1, body)


async def test_all_that_a_run_logs_says_of_which_resource_and_run_it_is() -> None:
    told = []

    async def reconcile(key: Key) -> Outcome:
        await asyncio.sleep(0.02)
        told.append(structlog.contextvars.get_contextvars())
        return Outcome(again=0.0 if len(told) < 3 else None)

    queue = WorkQueue(reconcile)
    queue.add(A)
    queue.add(B)
    await working(queue, 2, lambda: until(lambda: len(told) == 4))
    assert {one["resource"] for one in told} == {"EventStream shop/a", "EventStream shop/b"}
    assert len({one["reconcile"] for one in told}) == 4
    assert structlog.contextvars.get_contextvars() == {}
