"""`refold operator` as tests run it, its resources, and how they wait for what it makes of them."""

import copy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psycopg
import yaml
from confluent_kafka.admin import AdminClient

from hack.servers import Kafka, Postgres
from hack.servers.callers import get
from hack.servers.kubernetes_api import ApiServer
from hack.servers.process import Process, free_port

ROOT = Path(__file__).parents[1]
T = TypeVar("T")
#: As the chart makes it.
QUERY_BINDING = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRoleBinding",
    "metadata": {"name": "refold-query"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
}


def api_server(*namespaces: str) -> ApiServer:
    """Start an API server on which the operator can be installed, with its own namespace and `namespaces`."""
    server = ApiServer()
    try:
        server.start()
        server.kubectl("apply", "-f", str(ROOT / "crds"))
        for namespace in ("refold-system", *namespaces):
            server.kubectl("create", "namespace", namespace)
        server.apply(QUERY_BINDING)
    except BaseException:
        server.remove()
        raise
    return server


class Operator:
    """`refold operator` with databases of its own; the administrator is no superuser."""

    def __init__(
        self, api: ApiServer, postgres: Postgres, kafka: Kafka, databases: tuple[str, str], **environment: str
    ) -> None:
        admin = f"{databases[0]}_admin"
        self.port = free_port()
        self._api = api
        self.store, self.readstore = databases
        _emptied(kafka)
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(f"create role {admin} login createrole password 'local'")
            for database in databases:
                connection.execute(f"create database {database} owner {admin}")
        self.admin = {name: postgres.dsn(name, user=admin, password="local") for name in databases}
        self._environment = {
            "KUBECONFIG": str(api.kubeconfig),
            "REFOLD_STORE_ADMIN_DSN": self.admin[self.store],
            "REFOLD_READSTORE_ADMIN_DSN": self.admin[self.readstore],
            "REFOLD_KAFKA_BOOTSTRAP": kafka.bootstrap,
            "REFOLD_IMAGE": "refold/refold:test",
            "REFOLD_NAMESPACE": "refold-system",
            # nobody else takes over; it shall outlive that the API server is away
            "REFOLD_LEASE_SECONDS": "600",
            **environment,
        }
        self._log = Path(tempfile.mkdtemp(prefix="refold-operator-")) / "log"
        self._process = self._made()

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that make a process one of this installation."""
        return {**self._environment, "REFOLD_PORT": str(self.port)}

    def _made(self, **more: str) -> Process:
        return Process(
            [sys.executable, "-c", "from refold.cli.main import app; app()", "operator"], self._log,
            env={**self.environment, **more},
        )  # fmt: skip

    def restart(self, **more: str) -> None:
        """Stop, and start with `more` in the environment."""
        self._process.stop()
        self._process = self._made(**more)
        self.start()

    def replica(self, **more: str) -> "Operator":
        """Return another process of the same installation, with `more` in its environment; it isn't started."""
        other = copy.copy(self)
        other.port, other._environment = free_port(), self._environment | more
        other._log = Path(tempfile.mkdtemp(prefix="refold-operator-")) / "log"
        other._process = other._made()
        return other

    def start(self) -> None:
        self._process.start(lambda: self.answers("/healthz"))

    def launch(self) -> None:
        """Start without waiting for anything."""
        self._process.start(lambda: True)

    def crash(self) -> None:
        if self.running:
            self._process.kill()

    def kill(self) -> None:
        """Crash; the next process needn't wait until the Lease is over."""
        self.crash()
        self._api.kubectl("delete", "lease", "refold-operator", "-n", "refold-system", "--ignore-not-found")

    def stop(self) -> None:
        self._process.stop()

    def answers(self, path: str) -> bool:
        try:
            return get(f"http://127.0.0.1:{self.port}{path}").is_success
        except httpx.TransportError:
            return False

    def send(self, number: signal.Signals) -> None:
        self._process.send(number)

    @property
    def running(self) -> bool:
        return self._process.running

    @property
    def leads(self) -> bool:
        return self.answers("/healthz") and self.metric("refold_operator_leader") == 1

    @property
    def log(self) -> str:
        return self._process.log.read_text()

    def metric(self, name: str) -> float:
        lines = get(f"http://127.0.0.1:{self.port}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def _emptied(kafka: Kafka) -> None:
    """Delete the topics that another installation left: of the same name, they would be foreign ones to this one."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})

    def found() -> list[str]:
        return [name for name in admin.list_topics(timeout=10).topics if not name.startswith("__")]

    if left := found():
        for deleted in admin.delete_topics(left).values():
            deleted.result()
    until(lambda: not found())


def event_stream(namespace: str, name: str = "orders", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "refold.dev/v1alpha1",
        "kind": "EventStream",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"partitions": 2, **spec},
    }


def projection(namespace: str, name: str = "status", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "refold.dev/v1alpha1",
        "kind": "Projection",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "streams": ["orders"],
            "columns": [{"name": "status", "type": "text"}],
            "fold": [{"type": "OrderPlaced", "set": {"status": "'placed'"}}],
            **spec,
        },
    }


def until(look: Callable[[], T], *, seconds: float = 60) -> T:
    """Return what `look` answers once that is true; it may fail until then."""
    deadline = time.monotonic() + seconds
    why: Exception | None
    while True:
        try:
            why, answer = None, look()
        except (RuntimeError, AssertionError, KeyError, IndexError) as error:
            why = error
        else:
            if answer:
                return answer
        assert time.monotonic() < deadline, f"not within {seconds} s: {why}"
        time.sleep(0.1)


def condition(api: ApiServer, kind: str, namespace: str, name: str, type_: str) -> dict[str, Any]:
    """Return a condition; of the current generation, else a failed assertion."""
    found = api.get(kind, name, "-n", namespace)
    one: dict[str, Any]
    (one,) = (each for each in found["status"]["conditions"] if each["type"] == type_)
    assert one["observedGeneration"] == found["metadata"]["generation"]
    return one


def ready(api: ApiServer, kind: str, namespace: str, name: str) -> tuple[str, str]:
    """Return status and reason of Ready; of the current generation, else a failed assertion."""
    found = condition(api, kind, namespace, name, "Ready")
    return found["status"], found["reason"]


def becomes(
    api: ApiServer, kind: str, namespace: str, name: str, status: str, reason: str, *, seconds: float = 60
) -> None:
    until(lambda: ready(api, kind, namespace, name) == (status, reason), seconds=seconds)


def told(api: ApiServer, namespace: str, reason: str) -> list[str]:
    """Return the messages of the Events of a reason."""
    return [event["message"] for event in api.get("events", "-n", namespace)["items"] if event["reason"] == reason]


def roll_out(api: ApiServer, namespace: str) -> None:
    """Say that all processes of all Deployments run, as the Deployment controller would."""
    for deployment in api.get("deployments", "-n", namespace)["items"]:
        wanted = deployment["spec"]["replicas"]
        counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), wanted)
        status = {"observedGeneration": deployment["metadata"]["generation"], **counts}
        api.kubectl(
            "patch", "deployment", deployment["metadata"]["name"], "-n", namespace, "--subresource=status",
            "--type=merge", "-p", yaml.safe_dump({"status": status}),
        )  # fmt: skip


def serves(api: ApiServer, namespace: str, name: str = "status") -> bool:
    roll_out(api, namespace)
    return ready(api, "projection", namespace, name) == ("True", "Serving")


def names(api: ApiServer, kind: str, namespace: str) -> set[str]:
    return {item["metadata"]["name"] for item in api.get(kind, "-n", namespace)["items"]}


def live(api: ApiServer, namespace: str, name: str = "status") -> str:
    version: str = api.get("projection", name, "-n", namespace)["status"]["live"]["version"]
    return version
