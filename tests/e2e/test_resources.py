"""What happens to resources that can't work, are deleted, or lose their children."""

from typing import Any

import pytest
import yaml

from hack.client import NAMESPACE, eventually, kubectl, resource, wait_ready
from tests.e2e.conftest import Sandbox
from tests.e2e.orders import ORDER_STATUS, STREAM, changed


def ready(kind: str, name: str, namespace: str) -> dict[str, Any] | None:
    """Return the Ready condition of the current generation, if there is one."""
    found = resource(kind, name, namespace)
    for condition in found.get("status", {}).get("conditions", []):
        if condition["type"] == "Ready" and condition["observedGeneration"] == found["metadata"]["generation"]:
            return dict(condition)
    return None


def wait_not_ready(kind: str, name: str, namespace: str, *says: str) -> dict[str, Any]:
    """Wait until Ready is false with a message that holds all of `says`."""

    def refused() -> dict[str, Any] | None:
        condition = ready(kind, name, namespace)
        fits = condition and condition["status"] == "False" and all(text in condition["message"] for text in says)
        return condition if fits else None

    return eventually(refused, f"{kind} {name} not ready, saying {says}")


# What comes in while no admission webhook answers.
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fold": [{"type": "OrderPlaced", "set": {"colour": "'red'"}}]}, ("colour", "fold")),
        ({"fold": [{"type": "OrderPlaced", "set": {"status": "data.("}}]}, ("spec.fold[0].set.status", "column")),
        ({"key": "event.colour"}, ("spec.key", "colour")),
        ({"key": "data.customer"}, ("delete",)),
        ({"streams": ["missing"]}, ("missing",)),
    ],
)
def test_a_projection_that_cannot_work_says_why_and_recovers_when_it_is_mended(
    broken: Sandbox, change: dict[str, Any], says: tuple[str, ...]
) -> None:
    broken.apply(changed(ORDER_STATUS, **change), ready=False)
    wait_not_ready("projection", "order-status", broken.name, *says)
    broken.apply(ORDER_STATUS)
    kubectl("-n", broken.name, "delete", "projection", "order-status", "--timeout=120s")


@pytest.fixture(scope="module")
def broken(without_webhook: None) -> Any:
    sandbox = Sandbox("e2e-broken")
    sandbox.apply(STREAM)
    yield sandbox
    sandbox.remove()


def test_a_topic_that_another_resource_owns_is_not_taken_over(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM)
    thief = changed(STREAM, topic={"name": f"{sandbox.name}.orders"})
    thief["metadata"]["name"] = "thief"
    sandbox.apply(thief, ready=False)
    wait_not_ready("eventstream", "thief", sandbox.name, f"{sandbox.name}.orders")
    kubectl("-n", sandbox.name, "delete", "eventstream", "thief", "--timeout=120s")
    wait_ready(sandbox.name)
    stream = sandbox.stream()
    assert stream.append("o1", [{"id": "1", "type": "OrderPlaced", "data": {}}]).status_code == 201


def test_the_api_server_refuses_what_can_never_work(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM)
    for document, says in (
        (changed(STREAM, partitions=4), "immutable"),
        (changed(STREAM, partitions=0), "partitions"),
        (changed(ORDER_STATUS, columns=[]), "columns"),
        (changed(ORDER_STATUS, colour="red"), "colour"),
    ):
        with pytest.raises(RuntimeError, match=says):
            kubectl(
                "-n", sandbox.name, "apply", "--validate=strict", "-f", "-",
                stdin=yaml.safe_dump(document),
            )  # fmt: skip


def test_a_retained_stream_keeps_its_history_and_takes_it_back(sandbox: Sandbox) -> None:
    sandbox.apply(changed(STREAM, deletionPolicy="Retain"))
    stream = sandbox.stream()
    stream.append("o1", [{"id": "1", "type": "OrderPlaced", "data": {}}])
    kubectl("-n", sandbox.name, "delete", "eventstream", "orders", "--timeout=120s")
    eventually(
        lambda: stream.append("o2", [{"id": "1", "type": "OrderPlaced", "data": {}}]).status_code == 404,
        "the deleted stream refuses appends",
    )
    sandbox.apply(STREAM)
    assert [event["id"] for event in sandbox.stream().events("o1")] == ["1"]


def test_a_deleted_stream_with_policy_delete_is_gone_and_starts_anew(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM, ORDER_STATUS)
    stream = sandbox.stream()
    stream.append("o1", [{"id": "1", "type": "OrderPlaced", "data": {"total": 1}}])
    kubectl("-n", sandbox.name, "delete", "projection", "order-status", "--timeout=120s")
    kubectl("-n", sandbox.name, "delete", "eventstream", "orders", "--timeout=120s")
    sandbox.apply(STREAM, ORDER_STATUS)
    assert eventually(lambda: sandbox.stream().events("o1") == [], "an empty history")
    model = sandbox.read_model("order-status")
    assert model.row("o1") is None


def test_children_that_someone_changes_or_deletes_are_put_right(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM, ORDER_STATUS)
    names = kubectl("-n", sandbox.name, "get", "deployments", "-o", "name").split()
    assert len(names) == 2
    projector = next(name for name in names if "projector" in name)
    kubectl("-n", sandbox.name, "scale", projector, "--replicas=5")
    kubectl("-n", sandbox.name, "delete", "deployment", "order-status-query")
    kubectl("-n", sandbox.name, "delete", "service", "order-status-query")

    def restored() -> bool:
        current = set(kubectl("-n", sandbox.name, "get", "deployments", "-o", "name").split())
        service = kubectl(
            "-n", sandbox.name, "get", "service", "order-status-query", "--ignore-not-found", "-o", "name"
        )
        replicas = kubectl("-n", sandbox.name, "get", projector, "-o", "jsonpath={.spec.replicas}")
        return current == set(names) and "service/order-status-query" in service and replicas == "1"

    eventually(restored, "the children as the spec says", timeout=60)
    wait_ready(sandbox.name)


def test_resources_heal_by_themselves_after_the_store_was_away(sandbox: Sandbox) -> None:
    statefulset = "statefulset/refold-postgres"
    kubectl("-n", NAMESPACE, "scale", statefulset, "--replicas=0")
    try:
        kubectl("-n", NAMESPACE, "wait", "pod/refold-postgres-0", "--for=delete", "--timeout=60s")
        sandbox.apply(STREAM, ready=False)
        wait_not_ready("eventstream", "orders", sandbox.name)
    finally:
        kubectl("-n", NAMESPACE, "scale", statefulset, "--replicas=1")
        kubectl("-n", NAMESPACE, "rollout", "status", statefulset, "--timeout=120s")
    wait_ready(sandbox.name, timeout=120)
