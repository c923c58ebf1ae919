"""Relays share a store's shards: evenly, each with one owner within seconds, whoever comes, ends, dies or freezes."""

import asyncio
import itertools
import random
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from hack.servers import Kafka, Postgres
from tests.relaying import RelayProcess, World, ready, relay_world, until

SHARDS = 8


@pytest.fixture
async def world(postgres: Postgres, database: str, kafka: Kafka, tmp_path: Path) -> AsyncIterator[World]:
    async with relay_world(postgres, database, kafka, tmp_path) as made:
        yield made


def started(world: World) -> RelayProcess:
    return world.relay(REFOLD_RELAY_SHARDS=str(SHARDS))


def shared(relays: Sequence[RelayProcess]) -> bool:
    """Whether each shard is relayed by one of `relays`, and none of them has more than its share."""
    held = [relay.held() for relay in relays]
    most = -(-SHARDS // len(relays))
    return sorted(itertools.chain(*held)) == list(range(SHARDS)) and max(map(len, held)) <= most


def settled(relays: Sequence[RelayProcess], what: str, *, within: float = 30) -> None:
    began = time.monotonic()
    until(lambda: shared(relays), what, within=within)
    print(f"{what}: after {time.monotonic() - began:.1f} s")


async def test_each_shard_has_an_owner_within_seconds_whatever_becomes_of_the_others(world: World) -> None:
    streams = [await world.stream(f"share{number}", partitions=1) for number in range(SHARDS)]

    def append() -> None:
        for stream in streams:
            world.append(stream, 100)

    first = started(world)
    settled([first], "one has all shards")
    append()
    second = started(world)
    settled([first, second], "two have half of them each")
    append()
    third = started(world)
    settled([first, second, third], "three have three at most")
    append()
    first.kill()
    append()
    settled([second, third], "one was killed")
    second.send(signal.SIGSTOP)
    append()
    settled([third], "one was stopped past its locks")
    append()
    second.send(signal.SIGCONT)
    settled([second, third], "it goes on")
    append()
    third.send(signal.SIGTERM)
    append()
    settled([second], "one has ended")
    assert third.process.wait(15) == 0
    world.verify(*streams)


async def test_shards_are_left_without_a_failed_transaction(world: World) -> None:
    stream = await world.stream("gentle")
    first = started(world)
    ready(first)
    start = len(first.log.read_text())
    world.append(stream, 20000)
    second = started(world)
    settled([first, second], "both have half of the shards")
    world.append(stream, 1000)
    world.verify(stream)
    logged = first.log.read_text()[start:]
    assert "is left to another relay" in logged
    assert "aborted" not in logged
    assert "drops its state" not in logged


async def test_three_relays_that_come_end_die_and_freeze_at_random_lose_and_double_nothing(world: World) -> None:
    streams = [await world.stream(f"random{number}", partitions=2) for number in range(2 * SHARDS)]
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    running = [started(world) for _ in range(3)]
    settled(running, "all are there")
    for disturbance in [*chance.sample(["kill", "end", "freeze", "pause"], 4), *chance.choices(["kill", "pause"], k=3)]:
        for stream in chance.sample(streams, 8):
            world.append(stream, 300, size=100)
        victim = running.pop(chance.randrange(3))
        if disturbance == "kill":
            victim.kill()
            running.append(started(world))
        elif disturbance == "end":
            victim.send(signal.SIGTERM)
            running.append(started(world))
        else:
            victim.send(signal.SIGSTOP)
            await asyncio.sleep(chance.uniform(5, 7) if disturbance == "freeze" else chance.uniform(0, 2))
            victim.send(signal.SIGCONT)
            running.append(victim)
        await asyncio.sleep(chance.uniform(0, 1.5))
    settled(running, "all are there again")
    world.verify(*streams)
