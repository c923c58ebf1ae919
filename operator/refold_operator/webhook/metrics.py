"""The webhook's metrics; docs/metrics.md describes them."""

from prometheus_client import Gauge, Histogram

REVIEWS = Histogram(
    "refold_admission_review_seconds",
    "Time from a review's body to its answer",
    ["kind", "outcome"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
EXPIRES = Gauge(
    "refold_webhook_certificate_expiration_timestamp_seconds",
    "Until when the certificate that is served is good, in seconds since 1970; 0 before there is one",
)
