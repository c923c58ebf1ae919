"""What a projector tells Prometheus. A partition's labels are the stream (`<namespace>/<name>`) and the number."""

from prometheus_client import Counter, Gauge, Histogram

FOLDED = Counter("refold_projector_events", "Events folded and committed to the read store", ["stream", "source"])
SKIPPED = Counter("refold_projector_skipped", "Records that were applied before", ["stream"])
IGNORED = Counter("refold_projector_ignored", "Records that the relay of this stream didn't write", ["stream"])
PARKED = Counter("refold_projector_parked", "Events parked, since they failed or follow one that did", ["stream"])
UNPARKED = Counter(
    "refold_projector_unparked",
    "Parked events that left those that are parked: folded again, or discarded",
    ["stream", "outcome"],
)
GAPS = Counter(
    "refold_projector_gaps",
    "Times that the event store was read since the topic had a gap, or was silent though there were events",
    ["stream", "reason"],
)
MOVED = Counter("refold_projector_moved", "Batches dropped since another projector had moved the partition on")
FAILURES = Counter("refold_projector_failures", "Times that a backend failed and the state was read again", ["backend"])
LAG = Gauge("refold_projector_lag_events", "Events in the store that aren't applied yet", ["stream", "partition"])
LAG_SECONDS = Gauge(
    "refold_projector_lag_seconds", "Age of the oldest event that isn't applied yet", ["stream", "partition"]
)
STOPPED = Gauge("refold_projector_stopped", "1 while a partition stands still", ["stream", "partition"])
BACKFILL_SHARE = Gauge(
    "refold_projector_backfill_share",
    "Part of its time that a build works; below 1 while the live version lags",
)
BACKFILL_SHARE.set(1)
BATCH_EVENTS = Histogram(
    "refold_projector_batch_events",
    "Events in one transaction",
    buckets=(1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000),
)
BATCH_SECONDS = Histogram(
    "refold_projector_batch_seconds",
    "From a batch's first fold to its commit",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
