"""Autoscalers that aren't Refold's: HorizontalPodAutoscalers with metrics-server's figures, and KEDA.

`make e2e-autoscalers` runs it, beyond what CI has: hack/kind/autoscalers.sh installs both in the cluster first, which
takes half an hour where they have to be built.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hack.client import NAMESPACE, ReadModel, eventually, resource
from tests.e2e.conftest import Sandbox
from tests.e2e.orders import ORDER_STATUS, STREAM, Load, changed

pytestmark = pytest.mark.skipif(not os.environ.get("REFOLD_AUTOSCALERS"), reason="make e2e-autoscalers runs it")

#: Seconds in which an autoscaler has acted: metrics-server looks every 15 s at pods that are 60 s old, and the
#: HorizontalPodAutoscaler every 15 s; a pod then takes 10 s to be ready.
SOON = 240.0
PROJECTION = {"apiVersion": "refold.dev/v1alpha1", "kind": "Projection", "name": "order-status"}


@contextmanager
def readers(base: str, count: int) -> Iterator[None]:
    """Read a row again and again, by `count` readers at once, until the end of the `with`."""
    ended = threading.Event()

    def read() -> None:
        model = ReadModel(base)
        while not ended.is_set():
            model.row("a/b")

    threads = [threading.Thread(target=read, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def projectors(sandbox: Sandbox) -> int:
    """Return how many projectors run."""
    return int(resource("projection", "order-status", sandbox.name)["status"].get("replicas", 0))


def scaler_conditions(sandbox: Sandbox, kind: str, name: str) -> dict[str, str]:
    """Return an autoscaler's conditions: type to status."""
    found = resource(kind, name, sandbox.name).get("status", {}).get("conditions", [])
    return {one["type"]: one["status"] for one in found}


def test_query_processes_become_more_under_load_by_their_cpu(sandbox: Sandbox) -> None:
    autoscaling = {"maxReplicas": 3, "targetCPUUtilizationPercentage": 40}
    sandbox.apply(STREAM, changed(ORDER_STATUS, query={"autoscaling": autoscaling}))
    model, stream = sandbox.read_model("order-status"), sandbox.stream()
    stream.append("a/b", [{"id": "1", "type": "OrderPlaced", "data": {"total": 1}}])
    model.wait_applied(stream.positions)
    with readers(model.base, 4):
        eventually(
            lambda: resource("deployment", "order-status-query", sandbox.name)["status"].get("readyReplicas", 0) > 1,
            "another query process is ready", timeout=SOON,
        )  # fmt: skip
    assert scaler_conditions(sandbox, "hpa", "order-status-query")["ScalingActive"] == "True"
    assert model.row("a/b") == {"status": "placed", "items": 1, "total": 1}


def test_projectors_follow_ones_own_horizontal_pod_autoscaler(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM, ORDER_STATUS)
    sandbox.apply({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "order-status"},
        "spec": {
            "scaleTargetRef": PROJECTION, "minReplicas": 1, "maxReplicas": 3,
            "metrics": [{
                "type": "Resource",
                "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 40}},
            }],
        },
    }, ready=False)  # fmt: skip
    load = Load(sandbox.stream(), seed=1)
    load.start()
    eventually(lambda: projectors(sandbox) > 1, "another projector runs", timeout=SOON)
    load.finish()
    model = sandbox.read_model("order-status")
    load.wait_folded(model)
    assert load.wrong_orders(model) == []
    assert scaler_conditions(sandbox, "hpa", "order-status")["ScalingActive"] == "True"


def test_keda_ends_the_projectors_of_an_idle_group_and_brings_one_back_for_the_next_event(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM, ORDER_STATUS)
    model, stream = sandbox.read_model("order-status"), sandbox.stream()
    stream.append("a/b", [{"id": "1", "type": "OrderPlaced", "data": {"total": 1}}])
    model.wait_applied(stream.positions)
    version = resource("projection", "order-status", sandbox.name)["status"]["live"]["version"]
    sandbox.apply(scaled_object(sandbox, version), ready=False)
    for number in range(2, 5):
        eventually(lambda: projectors(sandbox) == 0, "the idle group has no projectors", timeout=SOON)
        assert scaler_conditions(sandbox, "scaledobject", "order-status")["Ready"] == "True"
        item = {"id": str(number), "type": "ItemAdded", "data": {"qty": 1, "price": 2}}
        written = {"Refold-Token": stream.append("a/b", [item]).json()["token"], "Prefer": "wait=30"}
        # asked again where the event wasn't folded within that time
        row = model.get("/v1/rows/a%2Fb", written).raise_for_status().json()["data"]
        assert row == {"status": "placed", "items": number, "total": 2 * number - 1}
        assert projectors(sandbox) > 0


def scaled_object(sandbox: Sandbox, version: str) -> dict[str, Any]:
    """Return docs/autoscaling.md's example for the embedded Kafka, which looks more often and waits for less long."""
    trigger = {
        "bootstrapServers": f"refold-kafka.{NAMESPACE}:9092", "topic": f"{sandbox.name}.orders",
        "consumerGroup": f"refold.{sandbox.name}.order-status.{version}", "lagThreshold": "1000",
        "offsetResetPolicy": "earliest",
    }  # fmt: skip
    return {
        "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "order-status"},
        "spec": {
            "scaleTargetRef": PROJECTION, "minReplicaCount": 0, "maxReplicaCount": 6,
            "pollingInterval": 5, "cooldownPeriod": 15, "triggers": [{"type": "kafka", "metadata": trigger}],
        },
    }  # fmt: skip
