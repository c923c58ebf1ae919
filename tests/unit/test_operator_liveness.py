"""What makes the operator's liveness probe fail: a loop, a queue or a watch that doesn't get on."""

import asyncio
import time
from typing import cast

import pytest
from refold_operator import liveness, watches
from refold_operator.cluster import Cluster, Object
from refold_operator.liveness import Liveness
from refold_operator.watched import Watched
from refold_operator.watches import Watches


async def test_what_a_look_finds_is_told_until_it_is_gone_and_so_is_a_loop_that_does_not_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(liveness, "STUCK_SECONDS", 0.5)
    monkeypatch.setattr(liveness, "_LOOK_SECONDS", 0.01)
    found: list[str] = []
    live = Liveness([lambda: None, lambda: found[0] if found else None])
    keeping = asyncio.create_task(live.keep())
    await asyncio.sleep(0.03)
    assert live.wrong() is None
    found.append("a watch is silent")
    await asyncio.sleep(0.03)
    assert live.wrong() == "a watch is silent"
    found.clear()
    await asyncio.sleep(0.03)
    time.sleep(0.6)  # noqa: ASYNC251 - as a call that blocks the loop
    assert "the event loop hasn't run" in str(live.wrong())
    await asyncio.sleep(0.03)
    assert live.wrong() is None
    keeping.cancel()


def listed(generation: int) -> list[Object]:
    metadata = {"namespace": "shop", "name": "orders", "uid": "u", "generation": generation}
    return [{"kind": "EventStream", "metadata": metadata}]


async def test_a_generation_that_no_watch_brings_is_missed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "MISSED_SECONDS", 0.1)
    seen = Watches(cast("Cluster", None), Watched())
    seen.compare(listed(1))
    assert seen.stuck() is None
    seen.seen("u", 1)
    await asyncio.sleep(0.15)
    assert seen.stuck() is None
    seen.compare(listed(2))
    await asyncio.sleep(0.15)
    seen.compare(listed(3))
    assert "EventStream shop/orders" in str(seen.stuck())
    seen.seen("u", 1)
    assert seen.stuck() is not None, "an old one is no news"
    seen.seen("u", 3)
    assert seen.stuck() is None


async def test_what_was_deleted_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "MISSED_SECONDS", 0.1)
    brought, not_brought = Watches(cast("Cluster", None), Watched()), Watches(cast("Cluster", None), Watched())
    for seen in (brought, not_brought):
        seen.compare(listed(1))
    await asyncio.sleep(0.15)
    brought.seen("u", 1, deleted=True)
    not_brought.compare([])
    assert (brought.stuck(), not_brought.stuck()) == (None, None)
