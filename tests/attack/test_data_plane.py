"""The data plane under attack: whatever is killed and whenever, no acknowledged append is lost or counted twice.

32 clients append (clients.py) while event stores, relays, projectors and the servers beneath are killed, stopped past
their leases, cut off and restarted at random (fleet.py). Afterwards history, topic and read models are checked
(checks.py).

`make test` makes 16 disturbances, one of each kind, `make attack` 112, seven of each (`REFOLD_DISTURBANCES`).
`REFOLD_SEED` repeats a run's choices. What was done and checked is also appended to the file `REFOLD_ATTACK_LOG`.
"""

import collections
import os
import random
import time

import pytest

from hack.servers.platform import Platform
from tests.attack import checks, reports
from tests.attack.clients import Client
from tests.attack.disturbances import plan
from tests.attack.fleet import KINDS, Fleet, servers
from tests.attack.history import read_store
from tests.attack.models import CUSTOMERS, ORDERS

DISTURBANCES = int(os.environ.get("REFOLD_DISTURBANCES") or len(KINDS))
PARTITIONS = 6
CLIENTS = 32


def test_no_acknowledged_append_is_lost_or_counted_twice_whatever_is_killed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seed = int(os.environ.get("REFOLD_SEED") or random.randrange(2**32))
    draw = random.Random(seed)
    disturbances = plan(draw, KINDS, DISTURBANCES)
    with capsys.disabled():
        print(f"\nseed {seed}, {DISTURBANCES} disturbances", flush=True)
    began = time.monotonic()
    with servers() as (postgres, kafka, networks):
        platform = Platform(postgres, kafka)
        stream = platform.stream("shop", "orders", partitions=PARTITIONS)
        versions = {
            model.name: platform.projection("shop", model.name, model.spec(1), [stream])
            for model in (ORDERS, CUSTOMERS)
        }
        with capsys.disabled():
            print(f"logs in {platform.logs}", flush=True)
        with Fleet(platform, stream, versions, networks) as fleet:
            clients = [Client(f"client {i}", fleet.stores, draw.randrange(2**32)) for i in range(CLIENTS)]
            clients += [
                Client(f"client of {store.port} alone", [store], draw.randrange(2**32)) for store in fleet.stores
            ]

            def failures() -> list[str]:
                return [client.failure for client in clients if client.failure]

            for client in clients:
                client.start()
            try:
                fleet.disturber.disturb(disturbances, go_on=lambda: not failures())
                time.sleep(2)
            finally:
                for client in clients:
                    client.stop()
                for client in clients:
                    client.join(150)
            assert failures() == []
            assert not any(client.is_alive() for client in clients)
            acknowledged = [append for client in clients for append in client.acknowledged]
            counts = sum((client.counts for client in clients), collections.Counter[str]())
            # else the attack was none
            assert min(counts["atomic"], counts["refused for a revision"], counts["repeated"]) > DISTURBANCES
            history, heads = read_store(platform, stream)
            checks.check_history(history, heads)
            checks.check_appends(history, acknowledged)
            checks.check_no_deadlock(postgres)
            built = [checks.Built(platform.read_dsn(), model, 1, versions[model.name]) for model in (ORDERS, CUSTOMERS)]
            checks.wait_applied(built, stream, heads)
            checks.check_topic(kafka, stream, history)
            checks.check_rows(built, history)
    told = report(seed, fleet, counts, heads, time.monotonic() - began)
    with capsys.disabled():
        print(told, flush=True)
    reports.keep(told)


def report(seed: int, fleet: Fleet, counts: collections.Counter[str], heads: list[int], seconds: float) -> str:
    """Tell what was done and checked."""
    return f"""{reports.heading("The data plane", seed, seconds)}
{fleet.disturber.told(KINDS)}
the stream's shard of the relay was taken over {fleet.takeovers() - 1} times
{CLIENTS} clients of both event stores, and one of each alone:
{reports.appends(counts)}
checked, of {sum(heads):,} events in {len(heads)} partitions:
  positions and revisions have no gap, recorded_at never goes back
  each acknowledged append is there once (an atomic one whole), nothing else is
  no deadlock
  topic (read_committed) = store, partition by partition, in order
  both read models = their fold"""
