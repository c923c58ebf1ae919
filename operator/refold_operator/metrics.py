"""The operator's metrics, as Prometheus collects them."""

from prometheus_client import Counter, Gauge, Histogram

RECONCILIATIONS = Counter("refold_reconciliations_total", "Runs of a reconcile.", ["kind"])
FAILURES = Counter("refold_reconciliations_failed_total", "Runs that left the resource short of its spec.", ["kind"])
DURATION = Histogram(
    "refold_reconciliations_duration_seconds",
    "How long a run took.",
    ["kind"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
QUEUED = Gauge("refold_reconciliations_queued", "Resources that wait for a run, at once or at a time to come.")
INSTALLED = Gauge("refold_installed", "1 once stores, logins and Secrets of the installation are in place.")
LEADER = Gauge("refold_operator_leader", "1 while this process holds the operator's Lease and works.")
