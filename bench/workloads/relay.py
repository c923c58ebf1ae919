"""`relay`: one relay process with many events waiting in the store, until all are committed to the topic."""

from collections.abc import Sequence
from typing import Any, cast

from psycopg import sql
from refold.eventstore.catalog import Stream

from bench.appending import copied_stream, written_stream
from bench.limits import kafka
from bench.orders import OrderEvent
from bench.relaying import relay_all
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers


def relay(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """The relay runs already and is told of the events; the clock stops when the last one is committed."""
    source = written_stream(servers, events)
    return Comparison(
        workload="relay",
        params={"events": len(events), "partitions": PARTITIONS},
        measured=lambda: _run(servers, source, len(events)),
        limit=lambda: kafka.produce(servers.kafka.bootstrap, servers.topic(), events),
        limit_name="confluent-kafka's idempotent producer alone, acks=all",
        usual=268_000,
    )


def _run(servers: Servers, source: Stream, count: int) -> Run:
    stream = copied_stream(servers, source)
    seconds = relay_all(servers, stream, count)
    _check(servers, stream, count)
    servers.platform.drop_stream(stream)
    return Run(events_per_s=count / seconds)


def _check(servers: Servers, stream: Stream, count: int) -> None:
    """Compare topic and store: each partition has the store's events, once and in order."""
    relayed: dict[int, list[Any]] = {partition: [] for partition in range(stream.partitions)}
    for messages in kafka.consume(servers.kafka.bootstrap, stream.topic, count, isolation="read_committed"):
        for message in messages:
            headers = cast("dict[str, bytes]", dict(message.headers() or []))
            found = relayed[cast("int", message.partition())]
            found.append((int(headers["ce_position"]), headers["ce_id"].decode()))
    with servers.events() as conn:
        for partition, found in relayed.items():
            stored = conn.execute(
                sql.SQL("select position, id from {} where partition = %s order by position").format(
                    sql.Identifier(stream.schema, "events")
                ), [partition],
            ).fetchall()  # fmt: skip
            if found != stored:
                raise RuntimeError(f"partition {partition} of topic {stream.topic} isn't what the store holds")
