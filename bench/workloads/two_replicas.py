"""`two-replicas`: two event-store processes beside one, with equal clients; on one stream, and on two."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from refold.eventstore.catalog import Stream

from bench import wrk
from bench.appending import check_history
from bench.orders import OrderEvent
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers
from bench.workloads.append_http import append_requests, started
from hack.servers.callers import TOKEN
from hack.servers.platform import Service


def two_replicas(servers: Servers, events: Sequence[OrderEvent]) -> list[Comparison]:
    """Both processes append to one stream; each to a stream of its own. The limit is one process for the same."""
    seconds = wrk.seconds_for(len(events))
    return [
        Comparison(
            workload="two-replicas",
            params={
                "events": len(events), "seconds": seconds, "connections": wrk.CONNECTIONS, "streams": streams,
                "partitions": PARTITIONS,
            },
            measured=functools.partial(_run, servers, events, streams=streams, processes=2, seconds=seconds),
            limit=functools.partial(_run, servers, events, streams=streams, processes=1, seconds=seconds),
            limit_name="one event-store process",
        )
        for streams in (1, 2)
    ]  # fmt: skip


def _run(servers: Servers, events: Sequence[OrderEvent], *, streams: int, processes: int, seconds: int) -> Run:
    """Load by two wrk at once, each with half of the connections, its own process and stream where there are two."""
    made = [servers.stream() for _ in range(streams)]
    services: list[Service] = []

    def load(number: int) -> tuple[Stream, wrk.Answers]:
        stream, service = made[number % streams], services[number % processes]
        requests = append_requests(stream.namespace, stream.name, events, id_prefix=f"{number}-")
        connections = wrk.CONNECTIONS // 2
        return stream, wrk.load(
            service.url, requests, method="POST", token=TOKEN, seconds=seconds, connections=connections
        )

    try:
        services += [started(servers) for _ in range(processes)]
        with ThreadPoolExecutor(2) as threads:
            answers = list(threads.map(load, range(2)))
    finally:
        for service in services:
            service.stop()
    for stream in made:
        answered = sum(part.answered for to, part in answers if to is stream)
        check_history(servers, stream, answered, answered + wrk.CONNECTIONS)
        servers.platform.drop_stream(stream)
    return Run(
        events_per_s=sum(part.run.events_per_s for _, part in answers),
        latencies_ms=[value for _, part in answers for value in part.quantiles_ms],
        samples=sum(part.answered for _, part in answers),
    )
