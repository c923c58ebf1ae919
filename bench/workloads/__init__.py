"""All workloads, by name, in the order in which `python -m bench` runs them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.orders import OrderEvent
from bench.result import Comparison
from bench.servers import Servers
from bench.workloads import (
    append_http,
    append_library,
    end_to_end,
    fold,
    growth,
    many_streams,
    query,
    rebuild,
    relay,
    relay_latency,
    two_replicas,
)


class Workload(NamedTuple):
    """`compare` prepares what is compared for the given events; `events` is how many it gets unless told otherwise."""

    compare: Callable[[Servers, Sequence[OrderEvent]], Comparison | Sequence[Comparison]]
    events: int


WORKLOADS = {
    "append-32": Workload(append_library.append_32, 50_000),
    "append-1": Workload(append_library.append_1, 5_000),
    "append-100x8": Workload(append_library.append_100x8, 100_000),
    "relay": Workload(relay.relay, 200_000),
    "fold": Workload(fold.fold, 200_000),
    "http-append": Workload(append_http.http_append, 50_000),
    "http-bulk": Workload(append_http.http_bulk, 100_000),
    "rebuild": Workload(rebuild.rebuild, 500_000),
    "rebuild-topic": Workload(rebuild.rebuild_topic, 500_000),
    "two-replicas": Workload(two_replicas.two_replicas, 50_000),
    "relay-latency": Workload(relay_latency.relay_latency, 2_400),
    "end-to-end": Workload(end_to_end.end_to_end, 2_400),
    "query": Workload(query.query, 50_000),
    "growth": Workload(growth.growth, 10_000),
    "many-streams": Workload(many_streams.many_streams, 2_400),
}
