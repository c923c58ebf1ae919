"""The kind cluster with Refold installed (`make up`), a namespace a test, and the read models on 127.0.0.1."""

import itertools
import json
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.client import CONTEXT, NAMESPACE, ReadModel, Stream, eventually, kubectl, wait_ready

CHART = Path(__file__).parents[2] / "charts" / "refold"
#: Of this session's namespaces: where tests are run once more, what an earlier try left claimed isn't in their way.
_SESSION = secrets.token_hex(2)
_numbers = itertools.count(1)
#: node ports that the kind cluster maps to 127.0.0.1 (30080 to 30082 are the event store's and the demo's)
_PORTS = range(30083, 30090)


@pytest.fixture(scope="session", autouse=True)
def installation() -> Iterator[None]:
    """Fail at once, with the way out, where there is no installation; in the end, see that no finalizer hangs."""
    try:
        kubectl("-n", NAMESPACE, "rollout", "status", "deployment", "--timeout=120s")
    except FileNotFoundError as error:
        pytest.exit(f"the e2e tests need `make up` first: {error}", returncode=1)
    except RuntimeError as error:
        pytest.exit(f"the e2e tests need `make up` first: {error}\n{unready()}", returncode=1)
    yield
    kubectl("wait", "namespace", "-l", "refold.dev/test=e2e", "--for=delete", "--timeout=180s")


def helm(*arguments: str) -> str:
    """Run helm on the release's namespace and return what it printed."""
    done = subprocess.run(
        ["helm", "--kube-context", CONTEXT, "-n", NAMESPACE, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"helm {' '.join(arguments)}: {done.stderr}\n{unready()}", pytrace=False)
    return done.stdout


def unready() -> str:
    """Describe the release's pods that aren't ready: their state, and what they logged last."""
    told = []
    try:
        pods = json.loads(kubectl("-n", NAMESPACE, "get", "pods", "-o", "json"))["items"]
    except RuntimeError as error:
        return str(error)
    for pod in pods:
        name, status = pod["metadata"]["name"], pod["status"]
        conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
        if conditions.get("Ready", {}).get("status") == "True" or status.get("phase") == "Succeeded":
            continue
        told.append(f"{name}: {status.get('phase')}, {conditions.get('PodScheduled', {}).get('message', 'scheduled')}")
        for container in status.get("containerStatuses", []):
            state = {kind: container.get(kind) for kind in ("state", "lastState")}
            told.append(f"  restarted {container['restartCount']} times: {json.dumps(state)[:600]}")
        logged = kubectl("-n", NAMESPACE, "logs", name, "--tail=12", check=False).splitlines()
        told += [f"  {line[:300]}" for line in logged]
    return "\n".join(told) or "all of the release's pods are ready"


def scale_webhook(replicas: int) -> None:
    """Let this many replicas of the admission webhook run, and wait until they are ready or gone."""
    kubectl("-n", NAMESPACE, "scale", "deployment/refold-webhook", f"--replicas={replicas}")
    kubectl("-n", NAMESPACE, "rollout", "status", "deployment/refold-webhook", "--timeout=120s")
    eventually(lambda: len(webhook_pods()) == replicas, "the webhook's other pods end")


def webhook_pods() -> list[str]:
    """Return the admission webhook's pods, as `pod/NAME`."""
    return kubectl("-n", NAMESPACE, "get", "pods", "-l", "app.kubernetes.io/component=webhook", "-o", "name").split()


@pytest.fixture(scope="module")
def without_webhook() -> Iterator[None]:
    """No replica of the admission webhook runs: with `failurePolicy: Ignore` the operator alone refuses a spec."""
    scale_webhook(0)
    yield
    scale_webhook(2)


class Sandbox:
    """A namespace for one test: resources go in, read models come out; all of it is deleted at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ports = iter(_PORTS)
        kubectl("create", "namespace", name)
        kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted", "refold.dev/test=e2e")

    def apply(self, *documents: dict[str, Any] | str | Path, ready: bool = True) -> None:
        """Apply resources (dicts, YAML text or files) and wait until they are Ready."""
        for document in documents:
            text = document.read_text() if isinstance(document, Path) else document
            kubectl("-n", self.name, "apply", "-f", "-", stdin=text if isinstance(text, str) else yaml.safe_dump(text))
        if ready:
            wait_ready(self.name)

    def stream(self, name: str = "orders", **options: Any) -> Stream:
        """Return a client of one EventStream."""
        return Stream(self.name, name, **options)

    def read_model(self, projection: str) -> ReadModel:
        """Return a client of one Projection's query service, by a node port of its own."""
        port = next(self._ports)
        selector = {"app.kubernetes.io/component": "query", "refold.dev/projection": projection}
        kubectl("-n", self.name, "apply", "-f", "-", stdin=yaml.safe_dump({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": f"{projection}-local", "labels": {"refold.dev/test": "local"}},
            "spec": {
                "type": "NodePort", "selector": selector,
                "ports": [{"port": 80, "targetPort": 8080, "nodePort": port}],
            },
        }))  # fmt: skip
        return ReadModel(f"http://127.0.0.1:{port}")

    def remove(self) -> None:
        """Give back the node ports and begin to delete the namespace; the session's end waits for all of them."""
        kubectl("-n", self.name, "delete", "services", "-l", "refold.dev/test=local")
        kubectl("delete", "namespace", self.name, "--wait=false")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A namespace for this test alone."""
    sandbox = Sandbox(f"e2e-{_SESSION}-{next(_numbers)}")
    yield sandbox
    sandbox.remove()
