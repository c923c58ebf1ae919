"""The data plane under attack: whatever is killed and whenever, no acknowledged append is lost or counted twice.

32 clients append (clients.py) while event stores, relays, projectors and the servers beneath are killed, stopped past
their leases, cut off and restarted at random (fleet.py). Afterwards history, topic and read models are checked
(checks.py).

`make test` makes 16 disturbances, one of each kind, `make attack` 112, seven of each (`REFOLD_DISTURBANCES`).
`REFOLD_SEED` repeats a run's choices. What was done and checked is also appended to the file `REFOLD_ATTACK_LOG`.
"""

import collections
import datetime as dt
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from hack.servers.platform import Platform
from tests.attack import checks
from tests.attack.clients import Client
from tests.attack.fleet import KINDS, Fleet, plan, servers

DISTURBANCES = int(os.environ.get("REFOLD_DISTURBANCES") or len(KINDS))
PARTITIONS = 6
CLIENTS = 32
ORDER_STATUS = {
    "streams": ["orders"],
    "columns": [
        {"name": "status", "type": "text"}, {"name": "items", "type": "integer"}, {"name": "total", "type": "numeric"},
    ],
    "fold": [
        {"type": "OrderPlaced", "set": {"status": "'placed'"}, "add": {"items": "1", "total": "data.total"}},
        {"type": "ItemAdded", "add": {"items": "data.qty", "total": "data.qty * data.price"}},
        {"type": "OrderPaid", "set": {"status": "'paid'"}},
        {"type": "OrderPurged", "delete": True},
    ],
}  # fmt: skip
CUSTOMERS = {
    "streams": ["orders"],
    "key": "data.customer",
    "columns": [{"name": "orders", "type": "integer"}, {"name": "spent", "type": "numeric"}],
    "fold": [
        {"type": "OrderPlaced", "add": {"orders": "1", "spent": "data.total"}},
        {"type": "ItemAdded", "add": {"spent": "data.qty * data.price"}},
    ],
}


def test_no_acknowledged_append_is_lost_or_counted_twice_whatever_is_killed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seed = int(os.environ.get("REFOLD_SEED") or random.randrange(2**32))
    draw = random.Random(seed)
    disturbances = plan(draw, DISTURBANCES)
    with capsys.disabled():
        print(f"\nseed {seed}, {DISTURBANCES} disturbances", flush=True)
    began = time.monotonic()
    with servers() as (postgres, kafka, networks):
        platform = Platform(postgres, kafka)
        stream = platform.stream("shop", "orders", partitions=PARTITIONS)
        versions = {
            "order-status": platform.projection("shop", "order-status", ORDER_STATUS, [stream]),
            "customers": platform.projection("shop", "customers", CUSTOMERS, [stream]),
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
                fleet.disturb(disturbances, go_on=lambda: not failures())
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
            history, heads = checks.read_store(platform, stream)
            checks.check_history(history, heads)
            checks.check_appends(history, acknowledged)
            checks.check_no_deadlock(platform, postgres)
            checks.wait_applied(platform, versions, heads)
            checks.check_topic(kafka, stream, history)
            checks.check_rows(platform, versions, history)
    told = report(seed, fleet, counts, heads, time.monotonic() - began)
    with capsys.disabled():
        print(told, flush=True)
    if file := os.environ.get("REFOLD_ATTACK_LOG"):
        with Path(file).open("a") as log:
            log.write(f"{told}\n")


def report(seed: int, fleet: Fleet, counts: collections.Counter[str], heads: list[int], seconds: float) -> str:
    """Tell what was done and checked."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    happened = "\n".join(f"  {fleet.happened[kind]:3} × {kind.victim} {kind.what}" for kind in KINDS)
    now = f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC"
    return f"""The data plane: commit {commit}, seed {seed}, {now}, {seconds:.0f} s
{fleet.happened.total()} disturbances:
{happened}
the stream's shard of the relay was taken over {fleet.takeovers() - 1} times
{CLIENTS} clients of both event stores, and one of each alone:
  {counts["acknowledged"]:,} appends acknowledged, {counts["atomic"]:,} of them atomic, to 2 to 8 subjects
  {counts["repeated"]:,} requests repeated, {counts["answered as replays"]:,} appends answered as replays
  {counts["refused for a revision"]:,} appends refused for a revision
checked, of {sum(heads):,} events in {len(heads)} partitions:
  positions and revisions have no gap, recorded_at never goes back
  each acknowledged append is there once (an atomic one whole), nothing else is
  no deadlock
  topic (read_committed) = store, partition by partition, in order
  both read models = their fold"""
