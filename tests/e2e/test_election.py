"""Two replicas of the operator on the cluster: the one that works is deleted or killed, and the other one works."""

import subprocess
import time
from collections.abc import Callable

import pytest

from hack.client import CONTEXT, NAMESPACE, eventually, kubectl, resource, wait_ready
from tests.e2e.conftest import Sandbox
from tests.e2e.orders import STREAM

NODE = f"{CONTEXT.removeprefix('kind-')}-control-plane"
_REPLICAS = ("-n", NAMESPACE, "get", "pods", "-l", "app.kubernetes.io/component=operator", "-o", "name")


def holder() -> str | None:
    """Return the identity that holds the Lease: the pod's name and what tells its processes apart."""
    identity: str | None = resource("lease", "refold-operator", NAMESPACE)["spec"].get("holderIdentity")
    return identity


def leader() -> tuple[str, str]:
    """Return the holder's identity and pod, once there is one and another replica stands by."""
    kubectl("-n", NAMESPACE, "rollout", "status", "deployment/refold-operator", "--timeout=120s")
    eventually(lambda: len(kubectl(*_REPLICAS).split()) == 2, "two replicas")

    def there() -> tuple[str, str] | None:
        identity = holder() or ""
        pod = identity.rpartition("_")[0]
        return (identity, pod) if f"pod/{pod}" in kubectl(*_REPLICAS).split() else None

    return eventually(there, "one of them holds the Lease")


def delete(pod: str) -> None:
    """Delete a pod as somebody does who doesn't wait for it."""
    kubectl("-n", NAMESPACE, "delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")


def kill(pod: str) -> None:
    """Kill a pod's process from its node; inside its container nobody may."""
    status = resource("pod", pod, NAMESPACE)["status"]["containerStatuses"][0]
    container = status["containerID"].removeprefix("containerd://")
    ctr = ["docker", "exec", NODE, "ctr", "--namespace=k8s.io", "tasks", "kill", "--signal=SIGKILL", container]
    done = subprocess.run(ctr, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("end", [delete, kill])
def test_the_leader_is_gone_without_a_word_and_the_other_one_works_within_15_s(
    sandbox: Sandbox, end: Callable[[str], None]
) -> None:
    former, pod = leader()
    end(pod)
    ended = time.monotonic()
    # a pod that was deleted works for a moment longer, and might do it
    eventually(lambda: holder() not in (None, former), "another holder of the Lease")
    sandbox.apply(STREAM, ready=False)
    wait_ready(sandbox.name, timeout=60)
    took = time.monotonic() - ended
    print(f"an EventStream is Ready {took:.1f} s after the leader's end ({end.__name__})")
    assert took < 15
