"""Projectors and query services that are scaled: the operator's process against real servers.

Nothing runs pods here, so a test moves the positions as projectors would; the operator's autoscaler looks every 0.3 s,
and all that it counts in looks goes as fast.
"""

import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from hack.servers import Kafka, Postgres
from hack.servers.kubernetes_api import ApiServer
from tests.integration.test_operator_process import Positions, api, pytestmark
from tests.operating import Operator, event_stream, live, projection, roll_out, serves, until

__all__ = ["api", "pytestmark"]


@pytest.fixture(scope="module")
def operator(api: ApiServer, postgres: Postgres, kafka: Kafka) -> Iterator[Operator]:
    operator = Operator(
        api, postgres, kafka, ("scaling_store", "scaling_reads"), REFOLD_AUTOSCALER_SECONDS="0.3"
    )  # fmt: skip
    operator.start()
    yield operator
    operator.stop()


def scaled(namespace: str, *, query: dict[str, Any] | None = None, **autoscaling: int) -> dict[str, Any]:
    rules = {"maxReplicas": 9, "targetDrainSeconds": 10, "stabilizationWindowSeconds": 3, **autoscaling}
    return projection(namespace, projector={"autoscaling": rules}, **({} if query is None else {"query": query}))


class World:
    """A stream of four partitions and a read model; events come by their heads, and are folded by positions."""

    def __init__(self, api: ApiServer, operator: Operator, namespace: str, positions: Positions) -> None:
        self.api, self.namespace, self._positions = api, namespace, positions
        self._store = psycopg.connect(operator.admin[operator.store], autocommit=True)

    def come(self, head: int) -> None:
        """Let each partition have so many events."""
        self._store.execute(
            "update refold.heads set head = %s from refold.streams s "
            "where s.stream = heads.stream and (s.namespace, s.name) = (%s, 'orders')",
            [head, self.namespace],
        )

    def fold(self, position: int) -> None:
        """Let so many events of each partition be folded."""
        self._positions.execute("update {schema}.positions set position = %s", position)

    def replicas(self) -> int:
        roll_out(self.api, self.namespace)
        name = f"status-projector-{live(self.api, self.namespace)}"
        found: int = self.api.get("deployment", name, "-n", self.namespace)["spec"]["replicas"]
        return found

    def decision(self) -> dict[str, Any]:
        status = self.api.get("projection", "status", "-n", self.namespace)["status"]
        (entry,) = status["autoscaling"]
        found: dict[str, Any] = entry
        return found

    def told(self) -> list[str]:
        # listed in the order of their names, which end at random
        events = sorted(
            self.api.get("events", "-n", self.namespace)["items"],
            key=lambda each: int(each["metadata"]["resourceVersion"]),
        )
        return [each["reason"] for each in events if each["reason"].startswith("Scaled")]

    def close(self) -> None:
        self._store.close()


@pytest.fixture
def namespace(api: ApiServer, operator: Operator, request: pytest.FixtureRequest) -> str:
    name = f"scaled-{request.node.name.split('_')[1]}-{abs(hash(request.node.name)) % 10**6}"
    api.kubectl("create", "namespace", name)
    return name


@pytest.fixture
def world(api: ApiServer, operator: Operator, namespace: str) -> Iterator[World]:
    with Positions(operator, namespace) as positions:
        found = World(api, operator, namespace, positions)
        yield found
        found.close()


def test_projectors_follow_what_waits_and_sleep_where_nothing_does(
    api: ApiServer, operator: Operator, namespace: str, world: World
) -> None:
    api.apply(event_stream(namespace, partitions=4), scaled(namespace, minReplicas=0))
    until(lambda: serves(api, namespace))
    assert world.replicas() == 0, "nothing has ever come"
    assert world.decision()["reason"] == "Begun"

    world.come(1_000)
    until(lambda: world.replicas() == 1, seconds=10)
    assert world.decision()["reason"] == "EventsWait"
    folded = iter(range(0, 1_000, 5))

    def raised() -> bool:
        world.fold(next(folded))  # about 20 a second, of 4,000 within 10 s
        return world.replicas() > 1

    until(raised, seconds=20)
    assert world.replicas() == 4, "never more than there are partitions"
    until(lambda: world.decision()["desiredReplicas"] == 4)
    assert "partitions with events is 4" in world.decision()["message"]
    assert api.get("projection", "status", "-n", namespace)["spec"]["projector"]["replicas"] == 1, "the spec is left"

    world.fold(1_000)
    until(lambda: world.replicas() == 0, seconds=20)
    until(lambda: world.decision()["reason"] == "NothingToDo")
    written = api.get("projection", "status", "-n", namespace)["metadata"]["resourceVersion"]
    operator.kill()
    operator.start()
    world.come(1_001)
    until(lambda: world.replicas() >= 1, seconds=30)
    assert api.get("projection", "status", "-n", namespace)["metadata"]["resourceVersion"] != written
    until(lambda: world.told()[-1:] == ["ScaledUp"])
    assert "ScaledDown" in world.told()


def test_a_parked_event_keeps_a_projector_and_replicas_of_zero_stop_it(
    api: ApiServer, namespace: str, world: World, operator: Operator
) -> None:
    api.apply(event_stream(namespace, partitions=4), scaled(namespace, minReplicas=0, stabilizationWindowSeconds=0))
    until(lambda: serves(api, namespace))
    with Positions(operator, namespace) as positions:
        positions.park(live(api, namespace))
    world.come(1)
    until(lambda: world.replicas() == 1, seconds=10)
    world.fold(1)
    time.sleep(2)
    assert world.replicas() == 1, "somebody may want to retry it"
    api.kubectl("scale", "projection", "status", "--replicas=0", "-n", namespace)
    until(lambda: world.replicas() == 0, seconds=10)
    assert "autoscaling" not in until(lambda: api.get("projection", "status", "-n", namespace)["status"])
    api.kubectl("scale", "projection", "status", "--replicas=1", "-n", namespace)
    until(lambda: world.replicas() == 1, seconds=10)


def test_query_services_are_scaled_by_an_autoscaler_that_goes_with_the_wish_for_it(
    api: ApiServer, namespace: str
) -> None:
    def query() -> dict[str, Any]:
        found: dict[str, Any] = api.get("deployment", "status-query", "-n", namespace, "--show-managed-fields")
        return found

    def autoscalers() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = api.get("horizontalpodautoscalers", "-n", namespace)["items"]
        return found

    api.apply(event_stream(namespace), projection(namespace, query={"replicas": 3}))
    until(lambda: serves(api, namespace))
    assert autoscalers() == []
    autoscaling = {"minReplicas": 2, "maxReplicas": 5}
    api.apply(projection(namespace, query={"replicas": 3, "autoscaling": autoscaling}))
    (made,) = until(autoscalers)
    assert made["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "status-query"}
    assert made["metadata"]["ownerReferences"][0]["name"] == "status"
    assert query()["spec"]["replicas"] == 3, "as many as there were, though the operator let go of them"
    until(lambda: serves(api, namespace))
    # as the HorizontalPodAutoscaler's controller would
    api.kubectl("scale", "deployment", "status-query", "--replicas=4", "-n", namespace)
    api.kubectl("label", "projection", "status", "look=again", "-n", namespace)
    api.kubectl("delete", "service", "status-query", "-n", namespace)
    until(lambda: api.get("service", "status-query", "-n", namespace))
    assert query()["spec"]["replicas"] == 4, "another one's number is left alone"
    api.apply(projection(namespace, query={"replicas": 3, "autoscaling": {**autoscaling, "maxReplicas": 6}}))
    until(lambda: autoscalers()[0]["spec"]["maxReplicas"] == 6)
    api.apply(projection(namespace, query={"replicas": 3}))
    until(lambda: autoscalers() == [])
    until(lambda: query()["spec"]["replicas"] == 3)
