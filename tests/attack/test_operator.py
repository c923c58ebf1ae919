"""The operator under attack: whatever happens, it ends with what a fresh installation of the same specs has.

Resources are made, edited and deleted at random, some of which are in each other's way (resources.py, gardener.py),
what was made of them is changed and deleted by hand, and two replicas of the operator, PostgreSQL, Kafka and the API
server are killed, stopped past the Lease and restarted (control_plane.py). Nothing runs pods: the controllers that
Kubernetes has are played (api.py). In the end all that there is (inventory.py) must equal a fresh installation.

And a process is killed with -9 after each single effect of its reconciles (faults.py): before the first, after it,
which is before the second, and so on. Another one, unharmed, must get to what one that nobody killed gets to.

`make test` makes 10 disturbances, each of another kind, of 20 resources, and kills after 9 effects; `make attack` 112
of 50 (`REFOLD_DISTURBANCES`), and after each effect. `REFOLD_SEED` repeats a run's choices. What was done and checked
is also appended to the file `REFOLD_ATTACK_LOG`.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from hack.servers import kubernetes_api
from tests.attack import inventory, reports
from tests.attack.api import Controllers, Object, roll_out
from tests.attack.control_plane import KINDS, ControlPlane, Pair
from tests.attack.disturbances import Disturber, plan
from tests.attack.faults import Fuses
from tests.attack.gardener import Gardener, Vandal
from tests.attack.resources import CONTESTED, FOREIGN_SERVICE, FOREIGN_TOPIC, Slot, slots
from tests.operating import event_stream, projection

DISTURBANCES = int(os.environ.get("REFOLD_DISTURBANCES") or 10)
_AT_LENGTH = DISTURBANCES > 100
RESOURCES = 50 if _AT_LENGTH else 20
#: In each an operator is killed as a stream and its read model are made, edited and deleted.
ROUNDS = 3
#: Back-off reaches a minute.
SETTLED_SECONDS = 300.0
pytestmark = pytest.mark.skipif(
    kubernetes_api.programs() is None, reason="no kube-apiserver and etcd in the cache: see hack/kind"
)


def test_ends_with_what_a_fresh_installation_has_whatever_happens(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("REFOLD_SEED") or random.randrange(2**32))
    draw = random.Random(seed)
    disturbances = plan(draw, KINDS, DISTURBANCES)
    log = Path(tempfile.mkdtemp(prefix="refold-attack-")) / "disturbances.log"
    with capsys.disabled():
        print(f"\nseed {seed}, {DISTURBANCES} disturbances, told in {log}", flush=True)
    began = time.monotonic()
    chosen = slots(RESOURCES)
    with ExitStack() as stack:
        planes = ControlPlane(), ControlPlane()
        with ThreadPoolExecutor() as pool:
            attacked, fresh = pool.map(stack.enter_context, planes)
        for plane in (attacked, fresh):
            put_foreigners(plane)
        pair = Pair(attacked)
        gardener = Gardener(attacked.api, chosen, draw.randrange(2**32))
        vandal = Vandal(attacked, chosen, draw.randrange(2**32))
        controllers = Controllers([attacked.api, fresh.api])
        threads = (gardener, vandal, controllers)
        for thread in threads:
            stack.callback(thread.stop)
        stack.callback(fresh.installed.crash)

        def failures() -> list[str]:
            return [one.failure for one in threads if one.failure]

        with pair:
            until(lambda: any(one.running and one.leads and one.answers("/readyz") for one in pair.operators))
            attacked.audit()
            controllers.start()
            gardener.start()
            vandal.start()
            disturber = Disturber(pair.choose, log)
            disturber.disturb(disturbances, go_on=lambda: not failures())
            for thread in (gardener, vandal):
                thread.stop()
                thread.join(240)
            assert not gardener.is_alive()
            assert not vandal.is_alive()
            assert not failures(), "\n".join(failures())
            settling = time.monotonic()
            final = gardener.settle()
            wait_for(lambda: unsettled(attacked, final), "what is as it shall be")
            winner = contested(attacked, final)
            fresh.installed.launch()
            install(fresh, final, first=winner)
            wait_for(lambda: compared(attacked, fresh), "what a fresh installation has")
            wanted = inventory.take(fresh)
            settled = time.monotonic() - settling
            dropped = {uid for _, _, uid in attacked.dropped()}
            assert not dropped & gardener.deleted.retained, "what was to be retained was dropped"
            assert dropped <= gardener.deleted.dropped, "what nobody deleted was dropped"
            logins = inventory.logins(attacked)
            assert not failures(), "\n".join(failures())
            for operator in (*pair.operators, fresh.installed):
                assert "failed unexpectedly" not in operator.log, operator.log[-5000:]
        controllers.stop()
        controllers.join(60)
    told = f"""{reports.heading("The operator", seed, time.monotonic() - began)}
{disturber.told(KINDS)}
{RESOURCES} resources: {counted(gardener.counts)}
by hand: {counted(vandal.counts)}
operators were started {pair.starts} times; {controllers.collected} objects were left to the garbage collector
checked, {settled:.0f} s after the last of it:
  each resource is Ready or says what is in its way
  objects, topics, schemas, tables, grants, roles, claims: {len(wanted)} things as in a fresh installation, nothing else
  each claim is of the resource and the topic that are there; {len(dropped)} histories and read models were dropped,
  of resources with deletionPolicy: Delete alone; {logins} logins work"""
    with capsys.disabled():
        print(told, flush=True)
    reports.keep(told)


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in sorted(counts.items()))


def put_foreigners(plane: ControlPlane) -> None:
    """Make what is somebody else's."""
    admin = AdminClient({"bootstrap.servers": plane.kafka.bootstrap, "log_level": 0})
    admin.create_topics([NewTopic(FOREIGN_TOPIC, 5, 1)])[FOREIGN_TOPIC].result()
    plane.api.apply(FOREIGN_SERVICE)


def until(look: Callable[[], bool], *, seconds: float = SETTLED_SECONDS) -> None:
    wait_for(lambda: [] if look() else ["not yet"], "it", seconds=seconds)


def wait_for(look: Callable[[], list[str]], what: str, *, seconds: float = SETTLED_SECONDS) -> None:
    """Wait until `look` finds nothing that is in the way."""
    deadline = time.monotonic() + seconds
    while missing := look():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s:\n" + "\n".join(missing)
        time.sleep(0.3)


def outcomes(plane: ControlPlane) -> dict[tuple[str, str, str], tuple[str, str, str]]:
    """Return status, reason and message of Ready of each resource, of its present generation, by what it is."""
    found = {}
    for kind in ("EventStream", "Projection"):
        for one in plane.api.list(kind):
            metadata, status = one["metadata"], one.get("status", {})
            ready = [each for each in status.get("conditions", []) if each["type"] == "Ready"]
            told = ("Unknown", "NotSeen", "")
            if ready and ready[0]["observedGeneration"] == metadata["generation"]:
                told = ready[0]["status"], ready[0]["reason"], ready[0]["message"]
            found[kind, metadata["namespace"], metadata["name"]] = told
    return found


def unsettled(plane: ControlPlane, final: dict[Slot, Object]) -> list[str]:
    """Return the resources that aren't as they shall be in the end."""
    look_at_heads(plane)
    found = outcomes(plane)
    told = []
    for slot in final:
        outcome = found.pop((slot.kind, slot.namespace, slot.name), ("", "NotThere", ""))
        if outcome[:2] not in slot.expected:
            told.append(f"{slot}: {outcome}")
    told += [f"{one} is there" for one in found]
    return told or two_have_it(plane, final)


def look_at_heads(plane: ControlPlane) -> None:
    """Note that all heads were seen, as projectors would, of which none runs; nothing is appended, so they stay 0.

    A version of a stream that was dropped and made again takes the live one's place only after that.
    """
    with (
        suppress(psycopg.errors.UndefinedTable),  # nothing is installed yet, or one was dropped meanwhile
        psycopg.connect(plane.postgres.dsn(plane.installed.readstore), autocommit=True) as connection,
    ):
        for (schema,) in connection.execute("select schema from refold_read.projections").fetchall():
            positions = psycopg.sql.Identifier(schema, "positions")
            connection.execute(psycopg.sql.SQL("update {} set seen_at = now() where seen_at is null").format(positions))


def two_have_it(plane: ControlPlane, final: dict[Slot, Object]) -> list[str]:
    """Return what is wrong with the topic that two want."""
    rivals = [slot for slot in final if slot.topic == CONTESTED]
    having = contested(plane, final)
    return [] if len(having) == min(1, len(rivals)) else [f"{[str(slot) for slot in having]} have {CONTESTED}"]


def contested(plane: ControlPlane, final: dict[Slot, Object]) -> list[Slot]:
    """Return who has the topic that two want."""
    found = outcomes(plane)
    rivals = [slot for slot in final if slot.topic == CONTESTED]
    return [slot for slot in rivals if found[slot.kind, slot.namespace, slot.name][0] == "True"]


def install(plane: ControlPlane, final: dict[Slot, Object], *, first: list[Slot]) -> None:
    """Apply the specs; those that came first elsewhere come first."""
    early = {slot: manifest for slot, manifest in final.items() if slot in first}
    for some in (early, final):
        for manifest in some.values():
            plane.api.apply(manifest)
        wait_for(lambda some=some: unsettled(plane, some), "a fresh installation")


def compared(attacked: ControlPlane, fresh: ControlPlane) -> list[str]:
    """Return where what there is differs from what is in a fresh installation."""
    try:
        return inventory.differences(inventory.take(attacked), inventory.take(fresh))
    except inventory.MOVING as error:
        return [repr(error)]


def test_killed_after_any_effect_the_next_one_gets_to_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seed = int(os.environ.get("REFOLD_SEED") or random.randrange(2**32))
    draw = random.Random(seed)
    with capsys.disabled():
        print(f"\nseed {seed}, kills after {'each effect' if _AT_LENGTH else f'{ROUNDS * 3} effects'}", flush=True)
    began = time.monotonic()
    with ControlPlane() as plane, Fuses(tmp_path, environment(plane)) as fuses:
        life = Life(plane, fuses)
        life.begin()
        counts = [life.effects(phase) for phase in PHASES]
        # where one phase has more effects than another, the others come again
        rounds: list[list[int]] = [[n % (count + 1) for count in counts] for n in range(max(counts) + 1)]
        if not _AT_LENGTH:
            rounds = [[draw.randint(0, count) for count in counts] for _ in range(ROUNDS)]
        for kills in rounds:
            for phase, kill in zip(PHASES, kills, strict=True):
                life.killed(phase, kill)
        assert "failed unexpectedly" not in fuses.log
        killed = fuses.killed
    told = f"""{reports.heading("The operator, killed after single effects", seed, time.monotonic() - began)}
  {", ".join(f"{phase}: {count} effects" for phase, count in zip(PHASES, counts, strict=True))}
  {len(killed)} × killed with -9, at {len(set(killed))} different places; each time the next process got to what an
  unharmed one gets to, with nothing twice and nothing left over"""
    with capsys.disabled():
        print(told, flush=True)
    reports.keep(told)
    assert len(killed) >= len(rounds)


def environment(plane: ControlPlane) -> dict[str, str]:
    """Return that of an operator with one reconcile at a time, so that effects come in one order."""
    return plane.installed.environment | {"REFOLD_WORKERS": "1"}


#: What happens to a stream and its read model.
PHASES = ("made", "edited", "deleted")


class Life:
    """An EventStream and a Projection that are made, edited and deleted again and again."""

    def __init__(self, plane: ControlPlane, fuses: Fuses) -> None:
        self._plane, self._fuses = plane, fuses
        self._slots = [
            Slot("EventStream", "shop", "orders", "Active"),
            Slot("Projection", "shop", "status", "Serving", streams=("orders",)),
        ]
        stream = {"partitions": 2, "deletionPolicy": "Delete"}
        model: dict[str, Any] = {"keepPrevious": "0s"}
        fold = [{"type": "OrderPlaced", "set": {"status": "'new'"}}]
        self._specs: dict[str, list[Object]] = {
            "made": [event_stream("shop", **stream), projection("shop", **model)],
            "edited": [
                event_stream(
                    "shop", **stream, topic={"config": {"retention.ms": "5"}}, events=[{"name": "OrderPlaced"}]
                ),
                projection("shop", **model, fold=fold, readStore={"sql": True}, query={"replicas": 2}),
            ],
            "deleted": [],
        }
        self._reached: dict[str, inventory.Inventory] = {}

    def begin(self) -> None:
        """Start an operator."""
        self._fuses.start()
        until(lambda: self._plane.installed.answers("/readyz"))

    def _again(self) -> None:
        """Start another operator after one was killed; it needn't wait until the Lease is over."""
        self._fuses.kill()
        self._plane.api.delete("Lease", "refold-system", "refold-operator")
        self.begin()

    def effects(self, phase: str) -> int:
        """Let a phase pass unharmed, note what there is then, and return how many effects it took."""
        self._fuses.arm(1_000_000)
        self._act(phase)
        wait_for(lambda: self._missing(phase), phase, seconds=120)
        self._reached[phase] = inventory.take(self._plane)
        return self._fuses.counted

    def killed(self, phase: str, kill: int) -> None:
        """Let an operator be killed after so many effects of a phase; another one must finish it."""
        self._fuses.arm(kill)
        self._act(phase)
        # where fewer effects are enough this time, nothing is killed
        wait_for(lambda: self._missing(phase) if self._fuses.running else [], f"{phase}, killed after {kill}")
        where = self._fuses.killed[-1:]
        self._again()
        wait_for(lambda: self._missing(phase), f"{phase}, {where}", seconds=120)

    def _act(self, phase: str) -> None:
        for manifest in self._specs[phase]:
            self._plane.api.apply(manifest)
        if phase == "deleted":
            for slot in self._slots:
                self._plane.api.delete(slot.kind, slot.namespace, slot.name)

    def _under_way(self) -> list[str]:
        """Return the Projections that say that something of them is being made or replaced."""
        return [
            f"{one['metadata']['name']}: {condition['reason']}"
            for one in self._plane.api.list("Projection")
            for condition in one.get("status", {}).get("conditions", [])
            if condition["type"] == "Progressing" and condition["status"] != "False"
        ]

    def _missing(self, phase: str) -> list[str]:
        """Return what keeps a phase from its end."""
        roll_out(self._plane.api)
        final = dict(zip(self._slots, self._specs[phase], strict=False))
        missing = unsettled(self._plane, final) or self._under_way()
        if missing or phase not in self._reached:
            return missing
        try:
            return inventory.differences(inventory.take(self._plane), self._reached[phase])
        except inventory.MOVING as error:
            return [repr(error)]
