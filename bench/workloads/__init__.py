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
    operating,
    query,
    rebuild,
    rebuild_large,
    rebuild_redis,
    relay,
    relay_latency,
    takeover,
    two_projectors,
    two_replicas,
)


class Workload(NamedTuple):
    """`compare` prepares what is compared for the given events.

    `events` is how many a run gets unless told otherwise, and `in_all` how many all runs get together at least: as many
    as 10,000 latencies need. What isn't `unasked` runs only where it is named. `kubernetes` tells that it needs the
    programs of an API server.
    """

    compare: Callable[[Servers, Sequence[OrderEvent]], Comparison | Sequence[Comparison]]
    events: int
    in_all: int = 0
    unasked: bool = True
    kubernetes: bool = False

    def events_a_run(self, runs: int) -> int:
        """Return how many events each of `runs` gets."""
        return max(self.events, -(-self.in_all // runs))


#: In the order of the data flow. The sizes are meant to let all that run unasked end within 20 minutes on 2 cores.
WORKLOADS = {
    "append-32": Workload(append_library.append_32, 50_000),
    "append-1": Workload(append_library.append_1, 4_000, 10_000),
    "append-100x8": Workload(append_library.append_100x8, 100_000, 1_000_000),
    "http-append": Workload(append_http.http_append, 20_000),
    "http-bulk": Workload(append_http.http_bulk, 100_000),
    "two-replicas": Workload(two_replicas.two_replicas, 15_000),
    "relay": Workload(relay.relay, 200_000),
    "relay-latency": Workload(relay_latency.relay_latency, 2_000, 12_000),
    "growth": Workload(growth.growth, 10_000),
    "many-streams": Workload(many_streams.many_streams, 2_000, 10_000),
    "takeover": Workload(takeover.takeover, 2_000, unasked=False),
    "fold": Workload(fold.fold, 200_000),
    "rebuild": Workload(rebuild.rebuild, 500_000),
    "rebuild-topic": Workload(rebuild.rebuild_topic, 500_000),
    "rebuild-redis": Workload(rebuild_redis.rebuild_redis, 500_000),
    "rebuild-5m": Workload(rebuild_large.rebuild_5m, 10_000, unasked=False),
    "rebuild-live": Workload(rebuild_large.rebuild_live, 10_000, unasked=False),
    "two-projectors": Workload(two_projectors.two_projectors, 200_000, unasked=False),
    "query": Workload(query.query, 50_000),
    "end-to-end": Workload(end_to_end.end_to_end, 2_000, 10_000),
    "reconcile-500": Workload(operating.reconcile_500, 5_000, kubernetes=True),
    "reconcile-one": Workload(operating.reconcile_one, 20_000, unasked=False, kubernetes=True),
    "resync": Workload(operating.resync, 20_000, unasked=False, kubernetes=True),
    "projections": Workload(operating.projections, 500, kubernetes=True),
    "idle": Workload(operating.idle, 20_000, unasked=False, kubernetes=True),
}
