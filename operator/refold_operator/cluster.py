"""The Kubernetes API: plain objects in and out, server-side apply, statuses and Events.

The objects are dictionaries as the API has them; what is made is a manifest of `children`.
"""

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from refold_operator.calls import measured
from refold_operator.errors import UnreachableError
from refold_operator.guard import Guard, unguarded
from refold_operator.status import timestamp

#: The field manager of all that the operator applies.
MANAGER = "refold-operator"
#: Of a Deployment's replicas, from when the operator leaves them to somebody else until that one sets them.
HAND_OVER = "refold-handover"
GROUP = "refold.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

_TIMEOUT_SECONDS = 30.0
_PATHS = {
    "EventStream": (f"/apis/{API_VERSION}", "eventstreams"),
    "Projection": (f"/apis/{API_VERSION}", "projections"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "Service": ("/api/v1", "services"),
    "Secret": ("/api/v1", "secrets"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "HorizontalPodAutoscaler": ("/apis/autoscaling/v2", "horizontalpodautoscalers"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "ClusterRoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "clusterrolebindings"),
    "ValidatingWebhookConfiguration": (
        "/apis/admissionregistration.k8s.io/v1",
        "validatingwebhookconfigurations",
    ),
    "Event": ("/api/v1", "events"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "Pod": ("/api/v1", "pods"),
}

Object = dict[str, Any]


class RefusedError(Exception):
    """The API server refused a request, for example because of a quota, an admission webhook or missing rights.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, asked: str, answer: str) -> None:
        super().__init__(f"the Kubernetes API refused to {asked}: {answer}")
        self.status = status


class Cluster:
    """A connection to the API server; in a pod as its service account, else as the kubeconfig says."""

    def __init__(self, api: client.ApiClient, *, guard: Guard = unguarded, namespaces: Sequence[str] = ()) -> None:
        """Use `api`.

        Args:
            api: the client.
            guard: called before each request that changes something.
            namespaces: those where there is work; empty: all.
        """
        self._api, self._guard, self._namespaces = api, guard, namespaces

    @classmethod
    async def connect(cls, *, guard: Guard = unguarded, namespaces: Sequence[str] = ()) -> "Cluster":
        """Read the credentials; no request is made yet."""
        configuration = client.Configuration()
        try:
            config.load_incluster_config(configuration)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)
        return cls(client.ApiClient(configuration), guard=guard, namespaces=namespaces)

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        """Return an object, or None where there is none."""
        return await self._request("GET", kind, namespace, name, missing_ok=True)

    async def list(self, kind: str, namespace: str | None = None, *, selector: str = "") -> Sequence[Object]:
        """Return the objects that `selector` (labels) chooses, of one namespace or all where there is work."""
        if namespace is None and self._namespaces:
            found = [await self.list(kind, each, selector=selector) for each in self._namespaces]
            return [item for items in found for item in items]
        answer = await self._request("GET", kind, namespace, query={"labelSelector": selector} if selector else {})
        assert answer is not None
        # The items of a list don't repeat what they are.
        return [item | {"apiVersion": answer["apiVersion"], "kind": kind} for item in answer["items"]]

    async def apply(self, manifest: Mapping[str, Any], *, manager: str = MANAGER) -> Object:
        """Apply `manifest` server-side, taking its fields over from other managers, and return the object."""
        answer = await self._request(
            "PATCH",
            manifest["kind"],
            manifest["metadata"]["namespace"],
            manifest["metadata"]["name"],
            query={"fieldManager": manager, "force": "true"},
            body=manifest,
            content_type="application/apply-patch+yaml",
        )
        assert answer is not None
        return answer

    async def create(self, manifest: Mapping[str, Any]) -> bool:
        """Create an object; return False where one of this name exists."""
        try:
            await self._request("POST", manifest["kind"], manifest["metadata"]["namespace"], body=manifest)
        except RefusedError as error:
            if error.status == 409:
                return False
            raise
        return True

    async def patch(self, kind: str, namespace: str | None, name: str, patch: Mapping[str, Any]) -> Object:
        """Merge `patch` into an object that exists, and return the object."""
        answer = await self._request(
            "PATCH", kind, namespace, name,
            query={"fieldManager": MANAGER}, body=patch, content_type="application/merge-patch+json",
        )  # fmt: skip
        assert answer is not None
        return answer

    async def replace(self, changed: Object) -> Object:
        """Replace an object by what it is `changed` to, in the version that it was read in, and return the object.

        Raises:
            RefusedError: it was changed (409) or deleted (404) meanwhile.
        """
        metadata = changed["metadata"]
        answer = await self._request("PUT", changed["kind"], metadata["namespace"], metadata["name"], body=changed)
        assert answer is not None
        return answer

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str | None = None) -> None:
        """Delete an object and, in the background, what it owns; one that is gone is no error.

        With a `uid` no other object of this name is deleted: `RefusedError`.
        """
        body: dict[str, Any] = {"propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        await self._request("DELETE", kind, namespace, name, body=body, missing_ok=True)

    async def patch_status(self, kind: str, namespace: str, name: str, patch: Mapping[str, Any]) -> Object | None:
        """Merge `patch` into an object's status, and return the object, None where it is gone."""
        return await self._request(
            "PATCH", kind, namespace, f"{name}/status",
            query={"fieldManager": MANAGER}, body={"status": patch},
            content_type="application/merge-patch+json", missing_ok=True,
        )  # fmt: skip

    async def post_event(self, about: Mapping[str, Any], *, warning: bool, reason: str, message: str) -> None:
        """Write a Kubernetes Event about an object."""
        now = dt.datetime.now(dt.UTC)
        metadata = about["metadata"]
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": about["apiVersion"], "kind": about["kind"], "name": metadata["name"],
                "namespace": metadata["namespace"], "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
            },
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message[:1024],
            "source": {"component": MANAGER},
            "firstTimestamp": timestamp(now),
            "lastTimestamp": timestamp(now),
            "count": 1,
        }  # fmt: skip
        await self._request("POST", "Event", metadata["namespace"], body=event)

    async def serves_our_kinds(self) -> bool:
        """Tell whether the API server knows EventStreams and Projections."""
        answer = await self._call("GET", f"/apis/{API_VERSION}", missing_ok=True)
        served = {resource["kind"] for resource in (answer or {}).get("resources", [])}
        return {"EventStream", "Projection"} <= served

    async def _request(
        self,
        method: str,
        kind: str,
        namespace: str | None,
        name: str | None = None,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        missing_ok: bool = False,
    ) -> Object | None:
        root, plural = _PATHS[kind]
        path = root if namespace is None else f"{root}/namespaces/{quote(namespace)}"
        path = f"{path}/{plural}" if name is None else f"{path}/{plural}/{quote(name)}"
        return await self._call(method, path, query=query, body=body, content_type=content_type, missing_ok=missing_ok)

    @measured("kubernetes", refused=RefusedError)
    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        missing_ok: bool = False,
    ) -> Object | None:
        if query:
            path = f"{path}?{urlencode(query)}"
        try:
            serialized = await self._api.param_serialize(
                method, path, header_params={"Accept": "application/json", "Content-Type": content_type},
                body=body, auth_settings=["BearerToken"],
            )  # fmt: skip
            if method != "GET":
                self._guard()
            response = await self._api.call_api(*serialized, _request_timeout=_TIMEOUT_SECONDS)
            data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError, ApiException) as error:
            raise UnreachableError("the Kubernetes API", f"{type(error).__name__}: {error}") from error
        if missing_ok and response.status == 404:
            return None
        if response.status >= 300:
            raise _failure(response.status, f"{method} {path.partition('?')[0]}", data)
        answer: Object = json.loads(data)
        return answer


def _failure(status: int, asked: str, data: bytes) -> Exception:
    """Return the error of an answer: refusals are told apart from a server that is overloaded or starting."""
    try:
        answer = str(json.loads(data).get("message", ""))
    except (ValueError, AttributeError):
        answer = data[:200].decode(errors="replace")
    if status == 429 or status >= 500:
        return UnreachableError("the Kubernetes API", f"{asked}: {status} {answer}")
    return RefusedError(status, asked, answer)


def owns_replicas(deployment: Mapping[str, Any]) -> bool:
    """Tell whether the operator has applied how many replicas a Deployment has."""
    return any(
        entry["manager"] == MANAGER
        and entry["operation"] == "Apply"
        and "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {})
        for entry in deployment["metadata"].get("managedFields", [])
    )


def covers(live: Any, wanted: Any) -> bool:
    """Tell whether `live` has all that `wanted` says: dictionaries by their keys, everything else as it is.

    Lists must have the same length, each item covered by the one at its place. Where the API server writes a value
    another way (quantities), the answer is False, which costs an apply that changes nothing.
    """
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and all(name in live and covers(live[name], wanted[name]) for name in wanted)
    if isinstance(wanted, list):
        return (
            isinstance(live, list)
            and len(live) == len(wanted)
            and all(covers(has, wants) for has, wants in zip(live, wanted, strict=True))
        )
    return bool(live == wanted)
