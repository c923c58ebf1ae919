"""`two-replicas-one-stream`, `two-replicas-two-streams`: two event-store processes beside one, with equal clients."""

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


def one_stream(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """Both processes append to one stream; the limit is one process."""
    return _comparison("two-replicas-one-stream", servers, events, streams=1)


def two_streams(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """Each process appends to a stream of its own; the limit is one process for both streams."""
    return _comparison("two-replicas-two-streams", servers, events, streams=2)


def _comparison(workload: str, servers: Servers, events: Sequence[OrderEvent], *, streams: int) -> Comparison:
    seconds = wrk.seconds_for(len(events))
    run = functools.partial(_run, servers, events, streams=streams, seconds=seconds)
    return Comparison(
        workload=workload,
        params={
            "events": len(events), "seconds": seconds, "connections": wrk.CONNECTIONS, "streams": streams,
            "partitions": PARTITIONS,
        },
        measured=functools.partial(run, processes=2),
        limit=functools.partial(run, processes=1),
        limit_name="one event-store process",
    )  # fmt: skip


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
    )
