"""The operator's metrics, as Prometheus collects them; docs/metrics.md describes them.

The names of those about reconciles are those of Strimzi's operators, with another prefix.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

RECONCILIATIONS = Counter("refold_reconciliations", "Runs of a reconcile that ended.", ["kind"])
SUCCESSFUL = Counter("refold_reconciliations_successful", "Runs that left the resource as its spec says.", ["kind"])
FAILURES = Counter(
    "refold_reconciliations_failed", "Runs that left the resource short of its spec, by reason.", ["kind", "reason"]
)
DURATION = Histogram(
    "refold_reconciliations_duration_seconds",
    "How long a run took.",
    ["kind"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
QUEUED = Gauge("refold_reconciliations_queued", "Resources whose run is due and waits for a worker.")
RESOURCES = Gauge("refold_resources", "Resources, by what a condition of theirs says.", ["kind", "condition", "status"])
INSTALLED = Gauge("refold_installed", "1 once stores, logins and Secrets of the installation are in place.")
LEADER = Gauge("refold_operator_leader", "1 while this process holds the operator's Lease and works.")


class Census:
    """Counts resources by their conditions, as they were written last."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[tuple[str, str, str]]] = {}

    def note(self, key: Hashable, kind: str, conditions: Iterable[Mapping[str, Any]]) -> None:
        """Take in the conditions of a resource, in place of those of before."""
        self.forget(key)
        self._known[key] = [(kind, condition["type"], condition["status"]) for condition in conditions]
        for labels in self._known[key]:
            RESOURCES.labels(*labels).inc()

    def forget(self, key: Hashable) -> None:
        """Leave out a resource that is gone."""
        for labels in self._known.pop(key, []):
            RESOURCES.labels(*labels).dec()
