"""`helm test` on the installation."""

from hack.client import NAMESPACE, eventually, kubectl
from tests.e2e.conftest import helm


def test_the_charts_test_passes_and_leaves_nothing_behind() -> None:
    assert "Phase:          Succeeded" in helm("test", "refold", "--timeout=5m")
    made = "eventstreams.refold.dev,projections.refold.dev,pods,roles,rolebindings,serviceaccounts"
    selector = "app.kubernetes.io/component=test"
    eventually(lambda: not kubectl("-n", NAMESPACE, "get", made, "-l", selector, "-o", "name"), "what it made goes")
