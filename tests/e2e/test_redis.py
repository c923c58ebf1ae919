"""A read model in the Redis that the chart embeds."""

import random

from hack.client import NAMESPACE, eventually, kubectl, resource
from tests.e2e.conftest import Sandbox
from tests.e2e.orders import ORDER_STATUS, STREAM, Load, changed

REDIS = {"readStore": {"type": "redis"}}


def test_a_read_model_in_redis_is_right_after_a_crash_and_a_swap_under_load(sandbox: Sandbox) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    sandbox.apply(STREAM, changed(ORDER_STATUS, **REDIS))
    model, stream = sandbox.read_model("order-status"), sandbox.stream()

    appended = stream.append("a/b", [{"id": "1", "type": "OrderPlaced", "data": {"total": 12.5}}])
    written = {"Refold-Token": appended.json()["token"], "Prefer": "wait=30"}
    found = model.get("/v1/rows", written, where="status:eq:placed").raise_for_status().json()
    row = {"status": "placed", "items": 1, "total": 12.5}
    assert [(one["key"], one["data"]) for one in found["rows"]] == [("a/b", row)]

    load = Load(stream, seed=seed)
    load.orders["a/b"] = {"status": "placed", "items": 1, "cents": 1250}
    load.start()
    before = live(sandbox)
    eventually(lambda: load.appended > 1000, "events")
    kubectl("-n", NAMESPACE, "delete", "pod", "refold-redis-0", "--grace-period=0", "--force")
    kubectl("-n", NAMESPACE, "rollout", "status", "statefulset/refold-redis", "--timeout=120s")
    rules = changed(ORDER_STATUS)["spec"]["fold"]
    rules[0]["when"] = "true"
    sandbox.apply(changed(ORDER_STATUS, **REDIS, fold=rules), ready=False)
    load.finish()
    eventually(lambda: live(sandbox) not in (None, before), "the changed definition's version serves")
    load.wait_folded(model)
    assert load.wrong_orders(model) == []
    assert model.row("a/b") == row


def live(sandbox: Sandbox) -> str | None:
    """Return the version that readers see; None where the operator couldn't tell when it looked."""
    version: str | None = resource("projection", "order-status", sandbox.name)["status"].get("live", {}).get("version")
    return version
