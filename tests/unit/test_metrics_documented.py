"""docs/metrics.md names the metrics that operator, event store, relay, projector and webhook have, and no others."""

import importlib
import re
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
MODULES = {
    "Operator": ["refold_operator.metrics", "refold_operator.calls"],
    "Event store": ["refold.eventstore.metrics", "refold.web.app", "refold.web.auth.reviews"],
    "Relay": ["refold.relay.metrics"],
    "Projector": ["refold.projection.metrics"],
    "Webhook": ["refold_operator.webhook.metrics", "refold_operator.calls"],
}


def documented(process: str) -> dict[str, set[str]]:
    """Return the words of the second column for each metric of the process's table."""
    _, _, section = PAGE.partition(f"\n## {process}\n")
    found: dict[str, set[str]] = {}
    for line in section.partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            _, names, kind, *_ = line.split("|")
            found |= {name: set(re.split(r", ", kind.strip())) for name in re.findall("`([a-z_]+)`", names)}
    return found


@pytest.mark.parametrize("process", MODULES)
def test_every_metric_is_documented_with_its_type_and_labels_and_no_other(process: str) -> None:
    metrics = [
        value
        for module in MODULES[process]
        for value in vars(importlib.import_module(module)).values()
        if isinstance(value, MetricWrapperBase)
    ]
    assert {metric._name: {metric._type, *metric._labelnames} for metric in metrics} == documented(process)
