"""`takeover`: a relay is killed with -9 while events come; until another one has relayed the next of each shard."""

import asyncio
import contextlib
import re
import time
from collections.abc import Sequence

from refold.eventstore import EventStore, NewEvent
from refold.eventstore.catalog import Stream

from bench.following import Readers
from bench.orders import OrderEvent
from bench.relaying import running_relay
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers
from bench.waiting import until
from hack.servers.callers import get
from hack.servers.platform import Service

_STREAMS = 1_000
#: The relay's default.
_SHARDS = 8
#: Events a second, over one stream of each shard.
_RATE = 200
_PROMISED_SECONDS = 2.0


def takeover(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """As many streams as half the events, at most 1,000; each has been relayed, so that its shard has checkpoints."""
    count = min(_STREAMS, max(_SHARDS, len(events) // 2))
    streams = servers.streams(count)
    asyncio.run(_fill(servers, streams))
    with running_relay(servers) as process:
        until(lambda: _relayed(process) >= count * PARTITIONS, "all is relayed", log=process.log)
    return Comparison(
        workload="takeover",
        params={"streams": count, "partitions": PARTITIONS, "shards": _SHARDS},
        measured=lambda: _run(servers, streams),
        limit=lambda: Run(events_per_s=_RATE, latencies_ms=[_PROMISED_SECONDS * 1000]),
        limit_name=f"what is promised: {_PROMISED_SECONDS:g} s",
        latency=True,
    )


async def _fill(servers: Servers, streams: Sequence[Stream]) -> None:
    """Append as many events to each stream as it has partitions."""
    async with await EventStore.open(servers.platform.store_dsn()) as store:
        for stream in streams:
            for number in range(PARTITIONS):
                await store.append(stream.namespace, stream.name, f"subject {number}", [NewEvent.of("First", {})])


def _relayed(process: Service) -> float:
    return sum(_values(process, "refold_relay_events_total").values())


def _values(process: Service, metric: str) -> dict[str, float]:
    """Return the values of a metric by its one label."""
    shown = get(f"{process.url}/metrics").text
    return {label: float(value) for label, value in re.findall(rf'^{metric}{{\w+="(.*)"}} (\S+)$', shown, re.MULTILINE)}


def _run(servers: Servers, streams: Sequence[Stream]) -> Run:
    with contextlib.ExitStack() as running:
        victim = servers.platform.relay()
        running.callback(victim.kill)
        victim.up()
        heir = running.enter_context(running_relay(servers))
        until(lambda: _shared(_held(victim), _held(heir)), "the relays share the shards", log=heir.log)
        watched = {stream.stream % _SHARDS: stream for stream in streams}
        reader = running.enter_context(Readers(servers.kafka.bootstrap, list(watched.values())))
        return asyncio.run(_kill(servers, victim, heir, watched, reader))


def _held(process: Service) -> set[int]:
    return {int(shard) for shard, held in _values(process, "refold_relay_shard_held").items() if held}


def _shared(some: set[int], others: set[int]) -> bool:
    return len(some) == len(others) == _SHARDS // 2 and not some & others


async def _kill(servers: Servers, victim: Service, heir: Service, watched: dict[int, Stream], reader: Readers) -> Run:
    """Append to one stream of each shard by turns, meanwhile kill `victim`.

    Latencies: for each shard that it had, from its death until an event that was appended after it is read.
    """
    shards = sorted(watched)
    appended: dict[str, tuple[int, float]] = {}
    ended = asyncio.Event()

    async def append(store: EventStore) -> None:
        began = time.perf_counter()
        while not ended.is_set():
            shard = shards[len(appended) % len(shards)]
            new = NewEvent.of("Sent", {})
            appended[new.id] = shard, time.perf_counter()
            stream = watched[shard]
            await store.append(stream.namespace, stream.name, new.id, [new])
            await asyncio.sleep(began + len(appended) / _RATE - time.perf_counter())

    def first_read(after: float) -> dict[int, float]:
        found: dict[int, float] = {}
        for id_, (shard, at) in appended.copy().items():
            if at > after and (seen := reader.seen.get(id_)) is not None:
                found[shard] = min(found.get(shard, seen), seen)
        return found

    async with await EventStore.open(servers.platform.store_dsn()) as store:
        began = time.perf_counter()
        appending = asyncio.create_task(append(store))
        await asyncio.to_thread(until, lambda: len(first_read(0)) == len(shards), "all shards relay", log=victim.log)
        held = _held(victim)
        await asyncio.to_thread(victim.kill)
        dead = time.perf_counter()
        await asyncio.to_thread(until, lambda: first_read(dead).keys() >= held, "all is taken over", log=heir.log)
        ended.set()
        await appending
        await asyncio.to_thread(
            until, lambda: reader.seen.keys() >= appended.keys(), "nothing is left out", log=heir.log
        )
        seconds = time.perf_counter() - began
    taken = [(at - dead) * 1000 for shard, at in first_read(dead).items() if shard in held]
    return Run(events_per_s=len(appended) / seconds, latencies_ms=taken)
