"""`two-projectors`: the time on a core that an event takes, projectors and PostgreSQL together, with two of them."""

import contextlib
import functools
import itertools
import time
from collections.abc import Sequence

from refold.eventstore.catalog import Stream

from bench import using
from bench.appending import copied_stream, reveal, written_stream
from bench.models import CUSTOMERS, ORDERS, Model, applied, check_rows, exact_fold, make
from bench.orders import OrderEvent
from bench.relaying import running_relay
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers
from bench.waiting import until
from hack.servers.callers import get
from hack.servers.platform import Service

_numbers = itertools.count(1)


def two_projectors(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """Events that wait are relayed to projectors that share the partitions already; both models, one after the other.

    The relay and its sessions in PostgreSQL don't count.
    """
    history = written_stream(servers, events)
    return Comparison(
        workload="two-projectors",
        params={"events": len(events), "partitions": PARTITIONS, "models": "one after the other"},
        measured=functools.partial(_run, servers, history, len(events), projectors=2),
        limit=functools.partial(_run, servers, history, len(events), projectors=1),
        limit_name="one projector",
    )


def _run(servers: Servers, history: Stream, count: int, *, projectors: int) -> Run:
    seconds = used = 0.0
    for model in (ORDERS, CUSTOMERS):
        stream = copied_stream(servers, history)
        name = f"{model.name}-{next(_numbers)}"
        passed, spent = _fold(servers, stream, model, name, count, projectors)
        seconds, used = seconds + passed, used + spent
        servers.platform.drop_stream(stream)
    return Run(events_per_s=count / seconds, figures={"cpu_us": 1e6 * used / count})


def _fold(
    servers: Servers, stream: Stream, model: Model, name: str, count: int, projectors: int
) -> tuple[float, float]:
    """Return the seconds that a model took, and how many seconds on a core."""
    version = make(servers, stream, model, name)
    with contextlib.ExitStack() as running, servers.rows() as conn:
        processes = [servers.platform.projector(stream.namespace, name, version) for _ in range(projectors)]
        for process in processes:
            running.callback(process.stop)
            process.up()
        share = PARTITIONS // projectors
        until(
            lambda: all(_partitions(process) == share for process in processes),
            f"each projector has {share} partitions",
            log=processes[0].log,
        )
        running.enter_context(running_relay(servers))

        def used() -> float:
            return using.postgres_seconds(conn, without="refold relay") + sum(map(using.seconds, processes))

        before, began = used(), time.perf_counter()
        reveal(servers, stream)
        until(
            lambda: applied(conn, stream.namespace, name, version) >= count,
            f"{count} events are folded",
            log=processes[0].log,
        )
        spent, seconds = used() - before, time.perf_counter() - began
    check_rows(servers, stream.namespace, name, version, model, exact_fold(servers, stream)[model.name])
    return seconds, spent


def _partitions(process: Service) -> int:
    """Return of how many partitions a projector has seen the heads, which are its own."""
    return get(f"{process.url}/metrics").text.count("\nrefold_projector_lag_events{")
