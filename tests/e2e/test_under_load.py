"""Events flow while parts are scaled, killed and restarted; afterwards every row is right."""

import random
import time

import pytest

from hack.client import NAMESPACE, eventually, kubectl, resource
from tests.e2e.conftest import Sandbox
from tests.e2e.orders import CUSTOMERS, ORDER_STATUS, STREAM, Load


@pytest.fixture
def seed() -> int:
    """The seed of the load; the test's output tells it."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return seed


def all_rows_are_right(sandbox: Sandbox, load: Load) -> None:
    orders, customers = sandbox.read_model("order-status"), sandbox.read_model("customers")
    load.wait_folded(orders, customers)
    assert load.wrong_orders(orders) == []
    assert load.wrong_customers(customers) == []


def running(projection: str, sandbox: Sandbox) -> int:
    """Return how many projectors run."""
    return int(resource("projection", projection, sandbox.name)["status"].get("replicas", 0))


def test_scaling_projectors_from_one_to_three_and_back_under_load(sandbox: Sandbox, seed: int) -> None:
    sandbox.apply(STREAM, ORDER_STATUS, CUSTOMERS)
    load = Load(sandbox.stream(), seed=seed)
    load.start()
    for replicas in (3, 1):
        kubectl("-n", sandbox.name, "scale", "projection/order-status", f"--replicas={replicas}")
        kubectl("-n", sandbox.name, "scale", "projection/customers", f"--replicas={replicas}")
        for name in ("order-status", "customers"):
            eventually(
                lambda name=name, replicas=replicas: running(name, sandbox) == replicas,
                f"{replicas} projectors of {name}",
            )
        time.sleep(3)
    load.finish()
    all_rows_are_right(sandbox, load)


def test_every_pod_of_refold_is_deleted_under_load(sandbox: Sandbox, seed: int) -> None:
    sandbox.apply(STREAM, ORDER_STATUS, CUSTOMERS)
    load = Load(sandbox.stream(), seed=seed)
    load.start()
    for namespace, selector in (
        (NAMESPACE, "app.kubernetes.io/component=relay"),
        (sandbox.name, "app.kubernetes.io/component=projector"),
        (NAMESPACE, "app.kubernetes.io/component=eventstore"),
        (sandbox.name, "app.kubernetes.io/component=query"),
        (NAMESPACE, "app.kubernetes.io/component=operator"),
    ):
        gone = kubectl("-n", namespace, "delete", "pods", "-l", selector, "--grace-period=0", "--force", "--wait=false")
        assert "deleted" in gone, f"no pods with {selector} in {namespace}"
        time.sleep(4)
    load.finish()
    all_rows_are_right(sandbox, load)


def test_kafka_and_postgresql_are_restarted_under_load(sandbox: Sandbox, seed: int) -> None:
    sandbox.apply(STREAM, ORDER_STATUS, CUSTOMERS)
    load = Load(sandbox.stream(), seed=seed)
    load.start()
    for pod in ("refold-kafka-0", "refold-postgres-0"):
        kubectl("-n", NAMESPACE, "delete", "pod", pod, "--grace-period=0", "--force")
        time.sleep(2)
        kubectl("-n", NAMESPACE, "rollout", "status", f"statefulset/{pod[:-2]}", "--timeout=180s")
        time.sleep(3)
    before = load.appended
    eventually(lambda: load.appended > before, "appends go on after both restarts")
    load.finish()
    all_rows_are_right(sandbox, load)
