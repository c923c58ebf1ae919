"""The example service of docs/consuming.md beside a stream in the cluster: its sums are exact."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from hack.client import NAMESPACE, Stream, eventually, kubectl
from tests.e2e.conftest import Sandbox
from tests.e2e.orders import STREAM

EXAMPLE = Path(__file__).parents[2] / "examples" / "consumer"
_ASK = "import httpx; print(httpx.get('http://127.0.0.1:8080/').text)"


def deploy(sandbox: Sandbox) -> None:
    """Apply the example as its kubernetes.yaml says."""
    text = (EXAMPLE / "kubernetes.yaml").read_text().replace("namespace: shop", f"namespace: {sandbox.name}")
    *others, deployment = yaml.safe_load_all(text)
    image = kubectl("-n", NAMESPACE, "get", "deployment", "refold-eventstore", "-o", "jsonpath={..containers[0].image}")
    deployment["spec"]["template"]["spec"]["containers"][0]["image"] = image
    kubectl("-n", sandbox.name, "create", "configmap", "order-sums", f"--from-file={EXAMPLE / 'consumer.py'}")
    sandbox.apply(*others, deployment)
    rollout(sandbox)


def rollout(sandbox: Sandbox) -> None:
    kubectl("-n", sandbox.name, "rollout", "status", "deployment/order-sums", "--timeout=90s")


def answer(sandbox: Sandbox) -> dict[str, Any]:
    text = kubectl("-n", sandbox.name, "exec", "deployment/order-sums", "--", "python", "-c", _ASK)
    found: dict[str, Any] = json.loads(text)
    return found


def sums(sandbox: Sandbox, stream: Stream) -> dict[str, tuple[int, Decimal]]:
    """Return orders and money per customer, when all that was appended is in them."""
    wanted = {str(partition): position for partition, position in stream.positions.items()}

    def caught_up() -> dict[str, Any] | None:
        found = answer(sandbox)
        return found if found["positions"] == wanted else None

    found = eventually(caught_up, f"positions {wanted} in the example", timeout=60)
    return {name: (row["orders"], Decimal(row["spent"])) for name, row in found["customers"].items()}


def orders(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "subject": f"order-{number}",
            "events": [
                {"id": "1", "type": "OrderPlaced", "data": {"customerId": f"c{number % 2}", "total": 0.1}},
                {"id": "2", "type": "ItemAdded", "data": {"customerId": f"c{number % 2}", "qty": 2, "price": 1.25}},
            ],
        }
        for number in range(first, first + count)
    ]


def test_the_example_service_starts_with_the_store_goes_on_with_the_topic_and_a_new_pod_knows_the_same(
    sandbox: Sandbox,
) -> None:
    sandbox.apply(STREAM)
    stream = sandbox.stream()
    stream.bulk(orders(0, 100))
    deploy(sandbox)
    assert sums(sandbox, stream) == {"c0": (50, Decimal("130.00")), "c1": (50, Decimal("130.00"))}

    stream.bulk(orders(100, 11))
    expected = {"c0": (56, Decimal("145.60")), "c1": (55, Decimal("143.00"))}
    assert sums(sandbox, stream) == expected

    kubectl("-n", sandbox.name, "delete", "pod", "-l", "app.kubernetes.io/name=order-sums", "--grace-period=1")
    rollout(sandbox)
    assert sums(sandbox, stream) == expected
