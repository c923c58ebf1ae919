"""`rebuild-redis`: both read models built in Redis by a new projector process, until it has caught up."""

import itertools
import time
from collections.abc import Sequence

from redis import Redis
from refold.eventstore.catalog import Stream
from refold.projection.readstore.redis import version_prefix
from refold.projection.readstore.redis_rows import RedisRows

from bench.appending import filled_stream
from bench.limits import folding, kafka
from bench.models import CUSTOMERS, ORDERS, Model, compare, exact_fold
from bench.orders import OrderEvent
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers
from bench.waiting import until

_numbers = itertools.count(1)


def rebuild_redis(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """From the event store's history; the topic is empty."""
    stream = filled_stream(servers, events)
    expected = exact_fold(servers, stream)
    topic = servers.topic()
    kafka.produce(servers.kafka.bootstrap, topic, events, typed=True)

    def run() -> Run:
        # a database for each run, so that none meets another one's rows
        number = next(_numbers)
        url = servers.redis.url(number)
        seconds = sum(
            _build(servers, stream, model, f"{model.name}-{number}", url, len(events), expected[model.name])
            for model in (ORDERS, CUSTOMERS)
        )
        return Run(events_per_s=len(events) / seconds)

    return Comparison(
        workload="rebuild-redis",
        params={"events": len(events), "partitions": PARTITIONS, "models": "one after the other, a process each"},
        measured=run,
        limit=lambda: folding.from_topic(servers.kafka.bootstrap, topic, len(events)),
        limit_name="consume, decode and a hand-written fold of both models in one process, without a database",
        usual=283_000,
    )


def _build(
    servers: Servers, stream: Stream, model: Model, name: str, url: str, count: int, expected: folding.Rows
) -> float:
    """Build a read model, compare it with the reference, and return how many seconds it took."""
    began = time.perf_counter()
    spec = {**model.spec, "streams": [stream.name]}
    version = servers.platform.projection(stream.namespace, name, spec, [stream], redis=url)
    process = servers.platform.projector(stream.namespace, name, version, REFOLD_READSTORE_DSN=url)
    process.up()
    rows = RedisRows(url, namespace=stream.namespace, name=name, version=version)
    rows.open()
    partitions = [(stream.incarnation, partition) for partition in range(stream.partitions)]
    try:
        until(
            lambda: sum(one.position for one in rows.positions(partitions).values()) >= count,
            f"{count} events are folded",
            log=process.log,
        )
        seconds = time.perf_counter() - began
        with Redis.from_url(url) as client:
            every = client.zrange(f"{version_prefix(stream.namespace, name, version)}keys", 0, -1)
        keys = [key.decode() for key in every]
        found = {key: list(row.values()) for key, row in rows.read(keys, model.columns).items()}
    finally:
        process.stop()
        rows.close()
    compare(model, found, expected)
    return seconds
