"""The EventStreams and Projections of an attack: what their specs say at random, and what shall become of each.

Nothing here depends on what happened before, so that a fresh installation of the last specs must look the same. That
is why a former version isn't kept (`keepPrevious`), and what is always refused is edited only where it leaves no trace.
"""

import random
from dataclasses import dataclass
from typing import Any

from tests.attack.control_plane import NAMESPACES
from tests.operating import event_stream, projection

#: Two EventStreams ask for this topic.
CONTESTED = "attack.contested"
#: Somebody else's topic, and somebody else's Service.
FOREIGN_TOPIC = "attack.foreign"
FOREIGN_SERVICE = {
    "apiVersion": "v1", "kind": "Service", "metadata": {"name": "taken-query", "namespace": "bank"},
    "spec": {"ports": [{"port": 1234, "protocol": "TCP", "targetPort": 1234}], "selector": {"mine": "yes"}},
}  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """One resource that may be there or not.

    Attributes:
        reason: that of Ready in the end, of status True where it is Active or Serving. Empty: Active, or the other one
            of the two that want the topic has it.
        streams: which a Projection reads.
        topic: which an EventStream asks for, where that isn't its own.
    """

    kind: str
    namespace: str
    name: str
    reason: str
    streams: tuple[str, ...] = ()
    topic: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"

    @property
    def ours(self) -> str:
        """The topic that is this EventStream's if it gets it."""
        return self.topic or f"{self.namespace}.{self.name}"

    @property
    def changing(self) -> bool:
        """Whether edits may change what a Projection folds."""
        return self.reason == "Serving"

    @property
    def expected(self) -> tuple[tuple[str, str], ...]:
        """What Ready may say in the end."""
        if self.reason:
            return ((str(self.reason in ("Active", "Serving")), self.reason),)
        return (("True", "Active"), ("False", "TopicConflict"))


#: What is in each other's way, or in that of somebody else, and what can't work.
CONFLICTS = (
    Slot("EventStream", "shop", "contested", "", topic=CONTESTED),
    Slot("EventStream", "shop-eu", "contested", "", topic=CONTESTED),
    Slot("EventStream", "bank", "foreign", "TopicConflict", topic=FOREIGN_TOPIC),
    Slot("Projection", "bank", "taken", "ObjectConflict", streams=("orders",)),
    Slot("Projection", "shop", "lonely", "StreamNotReady", streams=("nowhere",)),
    Slot("Projection", "shop", "wrong", "UnknownColumn", streams=("orders",)),
)


def slots(count: int) -> list[Slot]:
    """Return `count` slots, those of `CONFLICTS` among them; names of which the joined ones look alike, too."""
    found = [
        Slot("EventStream", "bank", "orders", "Active"),
        Slot("EventStream", "shop", "orders", "Active"),
        Slot("EventStream", "shop-eu", "orders", "Active"),
        Slot("EventStream", "shop", "eu-orders", "Active"),
        Slot("Projection", "shop", "eu-orders", "Serving", streams=("eu-orders",)),
        Slot("Projection", "shop", "orders", "Serving", streams=("orders", "eu-orders")),
        *CONFLICTS,
    ]
    number = 0
    while len(found) < count:
        namespace = NAMESPACES[number % len(NAMESPACES)]
        found.append(Slot("EventStream", namespace, f"stream-{number}", "Active"))
        found.append(Slot("Projection", namespace, f"model-{number}", "Serving", streams=(f"stream-{number}",)))
        number += 1
    return found[:count]


def wanted(slot: Slot, draw: random.Random, *, former: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a random manifest of a slot; with the `former` one's immutable fields, if there is one."""
    policy = draw.choice(("Delete", "Retain"))
    if slot.kind == "EventStream":
        partitions = draw.randint(1, 3) if former is None else former["spec"]["partitions"]
        config = draw.choice(({}, {"retention.ms": "86400000"}, {"segment.bytes": "1048576", "retention.bytes": "-1"}))
        # a map that server-side apply empties becomes null, so there are no empty ones
        topic = ({"config": config} if config else {}) | ({} if slot.topic is None else {"name": slot.topic})
        types = draw.choice((None, ("Placed",), ("Placed", "Paid")))
        more: dict[str, Any] = {"topic": topic} if topic else {}
        if types is not None:
            more["events"] = [{"name": name, "schema": {"type": "object"}} for name in types]
        return event_stream(
            slot.namespace, slot.name, partitions=partitions, deletionPolicy=policy, paused=draw.random() < 0.1, **more
        )  # fmt: skip
    columns = [{"name": "status", "type": "text", "index": draw.random() < 0.5}]
    word = draw.choice(("placed", "new", "open")) if slot.changing else "placed"
    column = "nowhere" if slot.reason == "UnknownColumn" else "status"
    fold = [{"type": "OrderPlaced", "set": {column: f"'{word}'"}}]
    if slot.changing and draw.random() < 0.3:
        columns.append({"name": "total", "type": "numeric"})
        fold.append({"type": "OrderPaid", "add": {"total": "data.total"}})
    query: dict[str, Any] = {"replicas": draw.randint(1, 3)}
    if draw.random() < 0.2:
        query = {"autoscaling": {"minReplicas": 1, "maxReplicas": draw.randint(2, 4)}}
    return projection(
        slot.namespace, slot.name, streams=list(slot.streams), columns=columns, fold=fold, deletionPolicy=policy,
        keepPrevious="0s", projector={"replicas": draw.randint(1, 2)}, query=query,
        readStore={"sql": slot.changing and draw.random() < 0.3}, paused=draw.random() < 0.1,
    )  # fmt: skip
