"""Someone who edits, deletes and makes resources at random, and someone who changes by hand what was made of them."""

import collections
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from tests.attack.api import Api, Object
from tests.attack.control_plane import READS, ControlPlane
from tests.attack.resources import Slot, wanted

_GONE_SECONDS = 300.0


@dataclass
class Plant:
    """What a slot holds.

    Attributes:
        manifest: what was applied last; None: nothing is to be there.
        history: what a new one has to agree with, since a former one may be retained.
        going: it was deleted and may still be there.
    """

    slot: Slot
    manifest: Object | None = None
    history: Object | None = None
    going: bool = False


@dataclass
class Deleted:
    """UIDs of what was deleted, by whether it was to be dropped."""

    dropped: set[str] = field(default_factory=set)
    retained: set[str] = field(default_factory=set)


class Gardener(threading.Thread):
    """Edits, deletes and makes resources until stopped; each of the slots is one's own.

    Attributes:
        counts: how often what was done.
        deleted: of which resources.
        failure: why it ended early.
    """

    def __init__(self, api: Api, slots: Sequence[Slot], seed: int) -> None:
        super().__init__(name="gardener", daemon=True)
        self._api, self._draw = api, random.Random(seed)
        self.plants = [Plant(slot) for slot in slots]
        self._stopped = threading.Event()
        self.counts: collections.Counter[str] = collections.Counter()
        self.deleted = Deleted()
        self.failure: str | None = None

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        try:
            for plant in self._draw.sample(self.plants, len(self.plants)):
                self._make(plant)
            while not self._stopped.wait(self._draw.uniform(0, 0.5)):
                plant = self._draw.choice(self.plants)
                if plant.manifest is None:
                    self._make(plant)
                elif self._draw.random() < 0.25:
                    self._remove(plant)
                else:
                    self._edit(plant)
        except Exception as error:  # noqa: BLE001 (the test fails with it)
            self.failure = f"gardener: {type(error).__name__}: {error}"

    def settle(self) -> dict[Slot, Object]:
        """Bring it to an end, from the caller's thread: nothing is paused, what is retained is there again.

        What a Projection reads is there, too.

        Returns:
            What is to be there.
        """
        for plant in self.plants:
            gone_for_good = plant.manifest is None and plant.history is None and plant.slot.kind == "Projection"
            if plant.manifest is None and not (gone_for_good and self._draw.random() < 0.5):
                self._make(plant, patient=True)
            if plant.manifest is not None and plant.manifest["spec"]["paused"]:
                plant.manifest["spec"]["paused"] = False
                self._api.apply(plant.manifest)
        return {plant.slot: plant.manifest for plant in self.plants if plant.manifest is not None}

    def _make(self, plant: Plant, *, patient: bool = False) -> None:
        """Apply a new manifest, unless the former resource isn't gone yet."""
        slot, deadline = plant.slot, time.monotonic() + _GONE_SECONDS
        while plant.going:
            plant.going = self._api.get(slot.kind, slot.namespace, slot.name) is not None
            if plant.going and not patient:
                return
            assert time.monotonic() < deadline, f"{slot} isn't gone {_GONE_SECONDS} s after it was deleted"
        plant.manifest = plant.history = wanted(slot, self._draw, former=plant.history)
        self._api.apply(plant.manifest)
        self.counts["made"] += 1

    def _edit(self, plant: Plant) -> None:
        plant.manifest = plant.history = wanted(plant.slot, self._draw, former=plant.manifest)
        self._api.apply(plant.manifest)
        self.counts["edited"] += 1

    def _remove(self, plant: Plant) -> None:
        """Delete, and remember whether its history or read model may be dropped."""
        slot = plant.slot
        assert plant.manifest is not None
        found = self._api.get(slot.kind, slot.namespace, slot.name)
        assert found is not None, f"{slot} is gone, and nobody has deleted it"
        spec, uid = plant.manifest["spec"], found["metadata"]["uid"]
        dropping = spec["deletionPolicy"] == "Delete" and not spec["paused"]
        (self.deleted.dropped if dropping else self.deleted.retained).add(uid)
        # one that was never reconciled has claimed nothing: what a former one has retained outlives it
        if dropping and _was_ready(found):
            plant.history = None
        plant.manifest, plant.going = None, True
        self._api.delete(slot.kind, slot.namespace, slot.name, uid=uid)
        self.counts["deleted, to be dropped" if dropping else "deleted, to be retained"] += 1


def _was_ready(found: Object) -> bool:
    return any(
        one["type"] == "Ready" and one["status"] == "True" for one in found.get("status", {}).get("conditions", [])
    )


class Vandal(threading.Thread):
    """Changes and deletes by hand what was made of resources, until stopped.

    Attributes:
        counts: how often what was done.
        failure: why it ended early.
    """

    def __init__(self, plane: ControlPlane, slots: Sequence[Slot], seed: int) -> None:
        super().__init__(name="vandal", daemon=True)
        self._plane, self._api, self._draw = plane, plane.api, random.Random(seed)
        self._topics = [slot.ours for slot in slots if slot.reason == "Active"]
        self._admin = AdminClient({"bootstrap.servers": plane.kafka.bootstrap, "log_level": 0})
        self._stopped = threading.Event()
        self.counts: collections.Counter[str] = collections.Counter()
        self.failure: str | None = None

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        acts: list[Callable[[], str | None]] = [
            self._delete_topic, self._configure_topic, self._delete_child, self._delete_child, self._change_child,
            self._lock_login,
        ]  # fmt: skip
        try:
            while not self._stopped.wait(self._draw.uniform(0, 1.5)):
                try:
                    done = self._draw.choice(acts)()
                except (KafkaException, psycopg.OperationalError):
                    continue  # away; or the topic isn't there
                if done:
                    self.counts[done] += 1
        except Exception as error:  # noqa: BLE001 (the test fails with it)
            self.failure = f"vandal: {type(error).__name__}: {error}"

    def _delete_topic(self) -> str:
        topic = self._draw.choice(self._topics)
        self._admin.delete_topics([topic], request_timeout=5)[topic].result(10)
        return "topic deleted"

    def _configure_topic(self) -> str:
        entry = ConfigEntry("retention.ms", "5", incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, self._draw.choice(self._topics), incremental_configs=[entry])
        self._admin.incremental_alter_configs([resource], request_timeout=5)[resource].result(10)
        return "topic's retention changed"

    def _child(self, kinds: Sequence[str]) -> tuple[str, str, str] | None:
        kind = self._draw.choice(kinds)
        found = [one["metadata"] for one in self._api.list(kind) if "ownerReferences" in one["metadata"]]
        found.sort(key=lambda one: (one["namespace"], one["name"]))
        one = self._draw.choice(found) if found else None
        return None if one is None else (kind, one["namespace"], one["name"])

    def _delete_child(self) -> str | None:
        child = self._child(("Deployment", "Service", "Secret", "ServiceAccount"))
        if child is None:
            return None
        self._api.delete(*child)
        return f"{child[0]} deleted"

    def _change_child(self) -> str | None:
        """Change what the operator has said of an object; what it says nothing of is anybody's."""
        child = self._child(("Deployment", "Service", "Secret"))
        found = child and self._api.get(*child)
        if child is None or not found:
            return None
        patch: dict[str, Any]
        if child[0] == "Secret":
            patch = {"data": {self._draw.choice(sorted(found["data"])): "eA=="}}
        elif child[0] == "Service":
            patch = {"spec": {"type": "NodePort"}}
        else:
            patch = {"spec": {"replicas": 7, "revisionHistoryLimit": 9}}
        return f"{child[0]} changed" if self._api.patch(*child, patch) else None

    def _lock_login(self) -> str | None:
        """Take the right to log in from a Projection's login."""
        with psycopg.connect(self._plane.postgres.dsn(READS), autocommit=True) as connection:
            query = "select rolname from pg_roles where rolname ~ ':(projector|query|history|sql)$' and rolcanlogin"
            logins = sorted(name for (name,) in connection.execute(query))
            if not logins:
                return None
            try:
                connection.execute(f'alter role "{self._draw.choice(logins)}" nologin')
            except psycopg.errors.UndefinedObject:
                return None  # gone meanwhile
        return "login locked"
