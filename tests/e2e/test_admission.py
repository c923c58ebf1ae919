"""The admission webhook on the cluster, with `failurePolicy: Fail`: what it refuses, also while its replicas die."""

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from hack.client import NAMESPACE, eventually, kubectl
from tests.e2e.conftest import CHART, Sandbox, helm, scale_webhook, webhook_pods
from tests.e2e.orders import ORDER_STATUS, STREAM, changed
from tests.specs import INVALID

DENIED = "is invalid: "
AWAY = 'failed calling webhook "admission.refold.dev"'
BAD = changed(ORDER_STATUS, fold=[{"type": "OrderPlaced", "set": {"colour": "'red'"}}])


@pytest.fixture(scope="module", autouse=True)
def fail() -> Iterator[None]:
    """The chart's value for these tests; the others keep the default."""
    upgrade = ("upgrade", "refold", str(CHART), "--reuse-values", "--wait", "--timeout=5m")
    helm(*upgrade, "--set=webhook.failurePolicy=Fail")
    yield
    helm(*upgrade, "--set=webhook.failurePolicy=Ignore")


def apply(sandbox: Sandbox, resource: dict[str, Any], *options: str) -> str:
    """Apply a resource and return "" where it was taken, else what kubectl says."""
    try:
        kubectl("-n", sandbox.name, "apply", *options, "-f", "-", stdin=yaml.safe_dump(resource))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "name", ["expression-wrong-on-its-second-line", "delete-with-two-streams", "schema-of-the-second-type"]
)
def test_what_cannot_work_is_refused_with_its_field_and_never_stored(sandbox: Sandbox, name: str) -> None:
    refused = INVALID[name]
    for options in (["--dry-run=server"], []):
        said = apply(sandbox, refused.resource, *options)
        assert DENIED in said
        assert refused.field in said
    assert kubectl("-n", sandbox.name, "get", "evs,proj", "-o", "name") == ""


class Applying(threading.Thread):
    """Asks, again and again, whether a good and a bad spec would be stored, and counts the answers."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(daemon=True)
        self._sandbox, self._stopped = sandbox, threading.Event()
        self.good: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()

    def run(self) -> None:
        good = yaml.safe_load(ORDER_STATUS)
        while not self._stopped.is_set():
            for resource, counted in ((good, self.good), (BAD, self.bad)):
                said = apply(self._sandbox, resource, "--dry-run=server")
                known = next((kind for kind in (DENIED, AWAY) if kind in said), said)
                counted[known or "taken"] += 1

    def finish(self) -> None:
        self._stopped.set()
        self.join(60)
        assert not self.is_alive()


def test_each_replica_killed_lets_no_bad_spec_in_and_soon_good_ones_pass_again(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM)
    applying = Applying(sandbox)
    applying.start()
    try:
        for pod in webhook_pods():
            kubectl("-n", NAMESPACE, "delete", pod, "--grace-period=0", "--force")
            eventually(lambda: DENIED in apply(sandbox, BAD, "--dry-run=server"), "the other one answers", timeout=30)
            kubectl("-n", NAMESPACE, "rollout", "status", "deployment/refold-webhook", "--timeout=120s")
    finally:
        applying.finish()
    assert set(applying.good) <= {"taken", AWAY}, applying.good
    assert set(applying.bad) <= {DENIED, AWAY}, applying.bad
    assert applying.good["taken"] > applying.good[AWAY], applying.good


def test_without_any_replica_specs_wait_and_everything_else_goes_on(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM)
    sandbox.apply(ORDER_STATUS, ready=False)
    scale_webhook(0)
    try:
        assert AWAY in apply(sandbox, changed(ORDER_STATUS, deletionPolicy="Retain"))
        kubectl("-n", sandbox.name, "scale", "projection", "order-status", "--replicas=2")
        kubectl("-n", sandbox.name, "label", "projection", "order-status", "look=again")
        kubectl("-n", sandbox.name, "delete", "projection", "order-status", "--timeout=120s")
    finally:
        scale_webhook(2)
    eventually(lambda: apply(sandbox, yaml.safe_load(ORDER_STATUS)) == "", "specs are taken again", timeout=30)
