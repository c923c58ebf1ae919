"""`rebuild`, `rebuild-topic`: both read models built by a new projector process, until it has caught up."""

import itertools
import re
import time
from collections.abc import Callable, Mapping, Sequence

from psycopg import sql
from refold import names
from refold.eventstore.catalog import Stream

from bench import using
from bench.appending import filled_stream
from bench.limits import folding, kafka
from bench.models import CUSTOMERS, ORDERS, check_rows, exact_fold, fold_all, make
from bench.orders import OrderEvent
from bench.relaying import relay_all
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers
from hack.servers.callers import get

_numbers = itertools.count(1)


def rebuild(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """From the event store's history; the topic is empty."""
    stream = filled_stream(servers, events)
    return _comparison("rebuild", servers, events, stream)


def rebuild_topic(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """From the topic, from its first record on."""
    stream = filled_stream(servers, events)
    relay_all(servers, stream, len(events))

    def begin_in_topic(name: str, version: str) -> None:
        with servers.rows() as conn:
            conn.execute(
                sql.SQL("update {} set topic_id = %s, kafka_offset = 0 where version = %s").format(
                    sql.Identifier(names.read_schema(stream.namespace, name), "positions")
                ),
                [stream.topic_id, version],
            )

    return _comparison("rebuild-topic", servers, events, stream, begin_in_topic, "topic")


def _comparison(
    workload: str, servers: Servers, events: Sequence[OrderEvent], stream: Stream,
    prepare: Callable[[str, str], None] = lambda *_: None, source: str = "store",
) -> Comparison:  # fmt: skip
    expected = exact_fold(servers, stream)
    topic = servers.topic()
    kafka.produce(servers.kafka.bootstrap, topic, events, typed=True)

    return Comparison(
        workload=workload,
        params={"events": len(events), "partitions": PARTITIONS, "models": "one after the other, a process each"},
        measured=lambda: build_both(servers, stream, expected, len(events), prepare=prepare, source=source),
        limit=lambda: folding.from_topic(servers.kafka.bootstrap, topic, len(events)),
        limit_name="consume, decode and a hand-written fold of both models in one process, without a database",
        usual=283_000,
    )


def build_both(
    servers: Servers, stream: Stream, expected: Mapping[str, folding.Rows], count: int, *,
    prepare: Callable[[str, str], None] = lambda *_: None, source: str = "store",
) -> Run:  # fmt: skip
    """Build both read models of the `count` events of `stream`, each by a process of its own.

    Args:
        servers: where the stream is.
        stream: nobody appends to it.
        expected: the rows that must come out, by the model's name.
        count: the stream's events.
        prepare: called with name and version before the process starts.
        source: where all events must come from, as the projector's metrics say.
    """
    seconds, peaks = 0.0, []
    number = next(_numbers)
    for model in (ORDERS, CUSTOMERS):
        name = f"{model.name}-{number}"
        began = time.perf_counter()
        version = make(servers, stream, model, name)
        prepare(name, version)
        process = fold_all(servers, stream, name, version, count)
        seconds += time.perf_counter() - began
        try:
            _check_source(process.url, source, count)
            peaks.append(using.peak_mb(process))
        finally:
            process.stop()
        check_rows(servers, stream.namespace, name, version, model, expected[model.name])
    return Run(events_per_s=count / seconds, figures={"peak_mb": max(peaks)})


def _check_source(url: str, source: str, count: int) -> None:
    """Raise RuntimeError unless all events were folded from `source`, as the projector's metrics say."""
    metrics = get(f"{url}/metrics").text
    found = re.search(rf'^refold_projector_events_total{{source="{source}",.*}} (\S+)$', metrics, re.MULTILINE)
    if found is None or float(found[1]) != count:
        raise RuntimeError(f"of {count} events {found[1] if found else 'none'} were folded from the {source}")
