"""The read side under attack: whatever is killed and whenever, rows are the fold of the history, in both stores.

Clients append (clients.py), on top of a history that is there already, and others read back what they append, at any
replica of the query service (readers.py). Read models of orders (rows of one partition) and of customers (rows of
several), in PostgreSQL and in Redis, are folded by three projectors each and built anew by changed definitions, again
and again (read_side.py). Meanwhile projectors are killed, stopped past their sessions, ended, added and cut off, and
the servers beneath them killed and restarted, at random. Afterwards two versions of each model, the live one and
another, are checked (checks.py).

`make test` makes 10 disturbances, each of another kind, of one model in each store; `make attack` 112, seven of each
kind, of both models in both, with more readers (`REFOLD_DISTURBANCES`).
`REFOLD_SEED` repeats a run's choices. What was done and checked is also appended to the file `REFOLD_ATTACK_LOG`.
"""

import collections
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from hack.servers import Kafka, Postgres, Redis
from hack.servers.platform import Platform
from tests.attack import checks, reports
from tests.attack.clients import Client
from tests.attack.disturbances import plan
from tests.attack.history import read_store
from tests.attack.models import CUSTOMERS, ORDERS
from tests.attack.read_side import BUILD_SECONDS, KINDS, ReadSide, Rebuilding
from tests.attack.readers import Reader

DISTURBANCES = int(os.environ.get("REFOLD_DISTURBANCES") or 10)
_AT_LENGTH = DISTURBANCES > 100
PARTITIONS = 6
#: A build gives way while the live version lags, so more clients than the machine bears keep it from its end.
CLIENTS = 6 if _AT_LENGTH else 3
#: Of a model in PostgreSQL: Redis may lose what it showed in the last second before a crash.
READERS = 8 if _AT_LENGTH else 2
#: How often they read back what they appended, together, at least.
READS = 10_000 if _AT_LENGTH else 60
#: Appends of 200 events each that are there before the attack, so that a build takes a while.
FIRST_APPENDS = 40


def test_rows_are_the_fold_of_the_history_whatever_happens_to_projectors_and_stores(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seed = int(os.environ.get("REFOLD_SEED") or random.randrange(2**32))
    draw = random.Random(seed)
    disturbances = plan(draw, KINDS, DISTURBANCES)
    in_postgres, in_redis = [ORDERS, CUSTOMERS], [CUSTOMERS, ORDERS]
    if len(KINDS) > DISTURBANCES:  # each model and each store, which costs half as many processes
        draw.shuffle(in_postgres)
        in_postgres, in_redis = in_postgres[:1], in_postgres[1:]
    with capsys.disabled():
        print(f"\nseed {seed}, {DISTURBANCES} disturbances", flush=True)
    began = time.monotonic()
    postgres, read, kafka, redis = Postgres(), Postgres(), Kafka(), Redis()
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda server: server.start(), (postgres, read, kafka, redis)))
        platform = Platform(postgres, kafka, read=read)
        stream = platform.stream("shop", "orders", partitions=PARTITIONS)
        with capsys.disabled():
            print(f"logs in {platform.logs}", flush=True)
        with ReadSide(platform, stream, redis, in_postgres=in_postgres, in_redis=in_redis) as side:
            clients = [Client(f"client {i}", [side.eventstore], draw.randrange(2**32)) for i in range(CLIENTS)]
            clients[0].fill(FIRST_APPENDS)
            readers = [
                Reader(f"reader {i}", [side.eventstore], side.queries, READS // READERS, draw.randrange(2**32))
                for i in range(READERS)
            ]
            clients += readers
            # the models of a store take turns, and the stores go on at once
            middle = len(in_postgres)
            rebuilding = [Rebuilding(side.models[:middle]), Rebuilding(side.models[middle:])]

            def failures() -> list[str]:
                return [one.failure for one in (*clients, *rebuilding) if one.failure]

            for thread in (*clients, *rebuilding):
                thread.start()
            try:
                side.disturber.disturb(disturbances, go_on=lambda: not failures())
                end(readers)  # while models are built anew and swapped
                end(rebuilding)
            finally:
                end(clients)
            assert failures() == []
            assert not any(thread.is_alive() for thread in (*clients, *rebuilding))
            acknowledged = [append for client in clients for append in client.acknowledged]
            counts = sum((client.counts for client in clients), collections.Counter[str]())
            history, heads = read_store(platform, stream)
            checks.check_history(history, heads)
            checks.check_appends(history, acknowledged)
            for group in side.groups:
                ended = [member.name for member in group.running if not member.process.running]
                assert not ended, f"projectors {ended} of {group.name} ended by themselves"
            for model in side.models:
                model.wait_live(model.building or model.live)
            built = [group.built for group in side.groups]
            checks.wait_applied(built, stream, heads)
            checks.check_rows(built, history)
            for server in (postgres, read):
                checks.check_no_deadlock(server)
            swaps = [model.swaps for model in side.models]
            assert min(swaps) > 0
            if _AT_LENGTH:
                assert side.refused > 0, "no projector whose partition another one had was refused"
            reads = sum(reader.reads for reader in readers)
            told = report(seed, side, counts, heads, len(built), reads, time.monotonic() - began)
    finally:
        for server in (postgres, read, kafka, redis):
            server.remove()
    with capsys.disabled():
        print(told, flush=True)
    reports.keep(told)


def end(threads: Sequence[Client | Rebuilding]) -> None:
    """Let threads come to their end; whoever doesn't is found alive afterwards."""
    for thread in threads:
        thread.stop()
    for thread in threads:
        thread.join(BUILD_SECONDS + 60)


def report(
    seed: int,
    side: ReadSide,
    counts: collections.Counter[str],
    heads: list[int],
    versions: int,
    reads: int,
    seconds: float,
) -> str:
    """Tell what was done and checked."""
    swaps = sum(model.swaps for model in side.models)
    return f"""{reports.heading("The read side", seed, seconds)}
{side.disturber.told(KINDS)}
{len(side.models)} read models of 3 projectors each were built anew by changed definitions and swapped {swaps} times
what a projector wrote was refused {side.refused} times, since another one had its partition meanwhile
{CLIENTS} clients, and {READERS} readers:
{reports.appends(counts)}
checked, of {sum(heads):,} events in {len(heads)} partitions:
  positions and revisions have no gap, recorded_at never goes back
  each acknowledged append is there once (an atomic one whole), nothing else is
  no deadlock in either PostgreSQL
  {reads:,} times a reader with its token saw all that it had appended, and without one nothing older than before
  {versions} versions, in PostgreSQL and Redis: positions = heads, rows = their fold, indexes = rows, nothing parked"""
