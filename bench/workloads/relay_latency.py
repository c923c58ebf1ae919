"""`relay-latency`: from an append's return until a `read_committed` consumer has its event."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import uvloop
from refold.eventstore import EventStore, NewEvent
from refold.eventstore.catalog import Stream

from bench.appending import check_history, new_event
from bench.limits import kafka
from bench.orders import OrderEvent
from bench.relaying import running_relay
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers
from bench.waiting import until

#: Events a second.
_RATE = 200


def relay_latency(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """One event an append, 200 a second."""
    servers.warm(events)
    return Comparison(
        workload="relay-latency",
        params={"events": len(events), "events_a_second": _RATE, "partitions": PARTITIONS},
        measured=lambda: _run(servers, events),
        limit=lambda: kafka.transactions(servers.kafka.bootstrap, servers.topic(), events, rate=_RATE),
        limit_name="one bare transaction an event: from its begin until it is read",
        usual=_RATE,
        latency=True,
    )


def _run(servers: Servers, events: Sequence[OrderEvent]) -> Run:
    stream = servers.stream()
    with (
        running_relay(servers),
        kafka.Reader(servers.kafka.bootstrap, stream.topic, len(events) + 1, _id) as reader,
    ):
        seconds, returned = uvloop.run(_append(servers.platform.store_dsn(), stream, events, reader))
    check_history(servers, stream, len(events) + 1)
    servers.platform.drop_stream(stream)
    # an event may be read before its append has returned
    latencies = [max(0.0, reader.seen[id_] - at) * 1000 for id_, at in returned.items()]
    return Run(events_per_s=len(events) / seconds, latencies_ms=latencies)


def _id(message: Any) -> str:
    return str(dict(message.headers())["ce_id"].decode())


async def _append(
    dsn: str, stream: Stream, events: Sequence[OrderEvent], reader: kafka.Reader
) -> tuple[float, dict[str, float]]:
    """Append at the rate, one after the other; return the seconds, and when each append returned by its event's id.

    A first event, that isn't counted, goes all the way before: relay and consumer are at work then.
    """
    returned: dict[str, float] = {}
    async with await EventStore.open(dsn) as store:
        await store.append(stream.namespace, stream.name, "first", [NewEvent.of("First", {})])
        await asyncio.to_thread(until, lambda: bool(reader.seen), "the first event is read")
        began = time.perf_counter()
        for number, event in enumerate(events):
            await asyncio.sleep(began + number / _RATE - time.perf_counter())
            new = new_event(event)
            await store.append(
                stream.namespace, stream.name, event.subject, [new], expected_revision=event.revision - 1
            )
            returned[new.id] = time.perf_counter()
    return time.perf_counter() - began, returned
