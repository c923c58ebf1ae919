"""What the relay tells Prometheus. A stream's label is `<namespace>/<name>`."""

from prometheus_client import Counter, Gauge, Histogram

RELAYED = Counter("refold_relay_events", "Events committed to Kafka", ["stream"])
LAG = Gauge("refold_relay_lag_events", "Events in the store that are not in Kafka yet", ["stream"])
REFUSED = Gauge("refold_relay_refused", "1 while a stream is held back, by reason", ["stream", "reason"])
HELD = Gauge("refold_relay_shard_held", "1 while this process relays the shard", ["shard"])
TAKEOVERS = Counter("refold_relay_takeovers", "Shards taken over, from a free start too", ["shard"])
ABORTED = Counter("refold_relay_aborted_transactions", "Transactions that were aborted", ["shard"])
FAILURES = Counter("refold_relay_failures", "Times that a shard dropped its state and started again", ["shard"])
TRANSACTION = Histogram(
    "refold_relay_transaction_seconds",
    "From the first record of a transaction to its commit",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
