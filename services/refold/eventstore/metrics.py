"""What the event store counts and measures (Prometheus)."""

from prometheus_client import Counter, Gauge, Histogram

APPENDED = Counter("refold_appended_events", "Events appended", ["stream"])
REPLAYED = Counter(
    "refold_replayed_appends", "Appends that were repeated and answered with the first outcome", ["stream"]
)
REFUSED = Counter("refold_refused_appends", "Appends refused, by reason", ["reason"])
HEAD = Gauge("refold_head_events", "Events in the stream, all processes' appends, as read every 5 seconds", ["stream"])
GROUP = Histogram(
    "refold_group_appends", "Appends in one transaction", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
)
COMMIT = Histogram(
    "refold_commit_seconds",
    "Time of one group's transaction",
    buckets=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 5),
)
RETRIES = Counter("refold_group_retries", "Groups tried again since PostgreSQL was away or refused for a moment")
WAITING = Gauge("refold_waiting_appends", "Appends that wait for a transaction or are in one")
WAITING_BYTES = Gauge("refold_waiting_bytes", "Bytes of the appends that wait")
LIVE_READERS = Gauge("refold_live_readers", "Readers that watch events")
LIVE_EVENTS = Counter("refold_live_events", "Events handed to readers that watch")
LIVE_BEHIND = Counter("refold_live_behind", "Times that a live reader was too slow and went back to the history")
LIVE_CUT = Counter("refold_live_cut", "Readers that were cut off since they didn't read for long")
