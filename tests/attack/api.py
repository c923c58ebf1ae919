"""The API server as an attack uses it, from many threads and through its outages, and the controllers that it lacks."""

import json
import ssl
import threading
import time
from collections.abc import Iterable
from typing import Any

import httpx

from hack.servers.kubernetes_api import TOKEN, ApiServer

Object = dict[str, Any]

_PLURALS = {
    "EventStream": "apis/refold.dev/v1alpha1/{}/eventstreams",
    "Projection": "apis/refold.dev/v1alpha1/{}/projections",
    "Deployment": "apis/apps/v1/{}/deployments",
    "Service": "api/v1/{}/services",
    "Secret": "api/v1/{}/secrets",
    "ServiceAccount": "api/v1/{}/serviceaccounts",
    "HorizontalPodAutoscaler": "apis/autoscaling/v2/{}/horizontalpodautoscalers",
    "PodDisruptionBudget": "apis/policy/v1/{}/poddisruptionbudgets",
    "Lease": "apis/coordination.k8s.io/v1/{}/leases",
}
RESOURCES = ("EventStream", "Projection")
#: What the operator makes for resources.
CHILDREN = ("Deployment", "Service", "Secret", "ServiceAccount", "HorizontalPodAutoscaler", "PodDisruptionBudget")
#: For so long an outage is waited for.
_OUTAGE_SECONDS = 180.0
_LOOK_SECONDS = 0.5


class Api:
    """Requests as administrator; what an outage answers is asked again, so each request must be safe to repeat."""

    def __init__(self, server: ApiServer) -> None:
        """Use a server that has been started."""
        self._http = httpx.Client(
            base_url=f"https://127.0.0.1:{server.port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            verify=ssl.create_default_context(cafile=str(server.authority)),
            timeout=10,
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        answer = self._ask("GET", _path(kind, namespace, name))
        return None if answer.status_code == httpx.codes.NOT_FOUND else _object(answer)

    def list(self, kind: str) -> list[Object]:
        """Return the objects of all namespaces; the items don't say their kind by themselves."""
        return [{**item, "kind": kind} for item in _object(self._ask("GET", _path(kind)))["items"]]

    def read(self, path: str) -> Object:
        """Return the object at a path."""
        return _object(self._ask("GET", path))

    def apply(self, manifest: Object) -> Object:
        """Make an object what the manifest says (server-side apply)."""
        metadata = manifest["metadata"]
        return _object(
            self._ask(
                "PATCH", _path(manifest["kind"], metadata["namespace"], metadata["name"]),
                params={"fieldManager": "attack", "force": "true"}, content=json.dumps(manifest),
                headers={"Content-Type": "application/apply-patch+yaml"},
            )
        )  # fmt: skip

    def patch(self, kind: str, namespace: str, name: str, patch: Object, *, status: bool = False) -> bool:
        """Merge `patch` into an object, or into its status; return whether it is there."""
        answer = self._ask(
            "PATCH", _path(kind, namespace, name) + ("/status" if status else ""), content=json.dumps(patch),
            headers={"Content-Type": "application/merge-patch+json"},
        )  # fmt: skip
        return answer.status_code != httpx.codes.NOT_FOUND and bool(_object(answer))

    def delete(self, kind: str, namespace: str, name: str, *, uid: str | None = None) -> None:
        """Delete an object (of this UID); one that is gone, or another one of its name, is left alone."""
        body: Object = {"propagationPolicy": "Background"} | ({} if uid is None else {"preconditions": {"uid": uid}})
        answer = self._ask("DELETE", _path(kind, namespace, name), content=json.dumps(body))
        if answer.status_code not in (httpx.codes.NOT_FOUND, httpx.codes.CONFLICT):
            _object(answer)

    def _ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        deadline = time.monotonic() + _OUTAGE_SECONDS
        while True:
            try:
                answer = self._http.request(method, path, **arguments)
                passing = answer.status_code == httpx.codes.TOO_MANY_REQUESTS or answer.status_code >= 500
                # An API server that has just started may not know yet who is allowed what, and which kinds there are.
                passing |= answer.status_code == httpx.codes.FORBIDDEN or _unknown_kind(answer)
                if not passing:
                    return answer
                why = answer.text
            except httpx.TransportError as error:
                why = repr(error)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{method} {path}: no answer for {_OUTAGE_SECONDS} s: {why}")
            time.sleep(0.2)


def _unknown_kind(answer: httpx.Response) -> bool:
    """Tell whether it is the kind that isn't found, and not the object."""
    if answer.status_code != httpx.codes.NOT_FOUND:
        return False
    try:
        return "name" not in answer.json().get("details", {})
    except ValueError:
        return True


def _path(kind: str, namespace: str | None = None, name: str | None = None) -> str:
    path = _PLURALS[kind].format("" if namespace is None else f"namespaces/{namespace}").replace("//", "/")
    return f"/{path}" if name is None else f"/{path}/{name}"


def _object(answer: httpx.Response) -> Object:
    if not answer.is_success:
        raise RuntimeError(f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}")
    found: Object = answer.json()
    return found


def roll_out(api: Api) -> None:
    """Say that all processes of all Deployments run, as the Deployment controller would."""
    for deployment in api.list("Deployment"):
        metadata, wanted = deployment["metadata"], deployment["spec"]["replicas"]
        counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), wanted)
        status = {"observedGeneration": metadata["generation"], **counts}
        if any(deployment.get("status", {}).get(name, 0) != value for name, value in status.items()):
            api.patch("Deployment", metadata["namespace"], metadata["name"], {"status": status}, status=True)


def collect(api: Api) -> int:
    """Delete what belongs to a resource that is gone, as the garbage collector would; return how much that was."""
    children = [(kind, child) for kind in CHILDREN for child in api.list(kind)]
    # after the children: one that was made meanwhile has an owner that was there before
    living = {one["metadata"]["uid"] for kind in RESOURCES for one in api.list(kind)}
    orphans = [
        (kind, child)
        for kind, child in children
        for owner in child["metadata"].get("ownerReferences", [])
        if owner["uid"] not in living
    ]
    for kind, child in orphans:
        metadata = child["metadata"]
        api.delete(kind, metadata["namespace"], metadata["name"], uid=metadata["uid"])
    return len(orphans)


class Controllers(threading.Thread):
    """Rolls Deployments out and collects garbage until stopped.

    Attributes:
        collected: how many objects the operator had left to the garbage collector.
        failure: why it ended early.
    """

    def __init__(self, apis: Iterable[Api]) -> None:
        super().__init__(name="controllers", daemon=True)
        self._apis = list(apis)
        self._stopped = threading.Event()
        self.collected = 0
        self.failure: str | None = None

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        try:
            while not self._stopped.wait(_LOOK_SECONDS):
                for api in self._apis:
                    roll_out(api)
                    self.collected += collect(api)
        except Exception as error:  # noqa: BLE001 (the test fails with it)
            self.failure = f"controllers: {type(error).__name__}: {error}"
