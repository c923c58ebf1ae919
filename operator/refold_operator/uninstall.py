"""What runs before the chart is uninstalled: the operator is stopped, its Lease and its finalizers are taken away.

Afterwards nobody could finish a deletion, so a finalizer that stayed would hang every later one (of a resource, of its
namespace, of the CustomResourceDefinitions). Topics, schemas and read models stay, whatever `deletionPolicy` says:
whoever wants them dropped deletes the resources first, while the operator runs. Safe to repeat.
"""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import structlog
from kubernetes import client, config
from refold import logs

from refold_operator import election
from refold_operator.resources import FINALIZER

_GROUP, _VERSION = "refold.dev", "v1alpha1"
_DEPLOYMENT = "refold-operator"
_OPERATOR_PODS = "app.kubernetes.io/name=refold,app.kubernetes.io/component=operator"
_MERGE_PATCH = "application/merge-patch+json"
_NOT_FOUND, _CONFLICT = 404, 409
#: Longer than the operator may take to stop (its pod's terminationGracePeriodSeconds is 30).
_STOP_SECONDS = 120
_PAGE = 200

_log = structlog.get_logger(__name__)


def stop_operator(namespace: str) -> None:
    """Scale the operator to zero and wait until its pods are gone: a running one would put its finalizer back.

    Raises:
        TimeoutError: a pod of the operator is still there after two minutes.
    """
    try:
        client.AppsV1Api().patch_namespaced_deployment(
            _DEPLOYMENT, namespace, {"spec": {"replicas": 0}}, _content_type=_MERGE_PATCH
        )
    except client.ApiException as error:
        if error.status != _NOT_FOUND:
            raise
    deadline = time.monotonic() + _STOP_SECONDS
    while pods := client.CoreV1Api().list_namespaced_pod(namespace, label_selector=_OPERATOR_PODS).items:
        if time.monotonic() > deadline:
            names = ", ".join(str(pod.metadata and pod.metadata.name) for pod in pods)
            raise TimeoutError(
                f"the operator in namespace {namespace} didn't stop within {_STOP_SECONDS} s ({names}): "
                "delete the pod, by force where its node is gone, and uninstall again"
            )
        time.sleep(1)


def delete_lease(namespace: str) -> None:
    """Delete the Lease of the operator that has ended; one that is gone is no error."""
    try:
        client.CoordinationV1Api().delete_namespaced_lease(election.NAME, namespace)
    except client.ApiException as error:
        if error.status != _NOT_FOUND:
            raise


def release(plural: str, namespace: str | None = None) -> int:
    """Take the operator's finalizer off all resources of a kind, of one or all namespaces; return how many had it."""
    api = client.CustomObjectsApi()
    released = 0
    token = ""
    while True:
        try:
            page: Any = (
                api.list_cluster_custom_object(_GROUP, _VERSION, plural, limit=_PAGE, _continue=token)
                if namespace is None
                else api.list_namespaced_custom_object(
                    _GROUP, _VERSION, namespace, plural, limit=_PAGE, _continue=token
                )
            )
        except client.ApiException as error:
            if error.status == _NOT_FOUND:  # the kind isn't installed, or not any more
                return released
            raise
        for item in page["items"]:
            metadata = item["metadata"]
            if FINALIZER in metadata.get("finalizers", []):
                released += _release_one(api, plural, metadata["namespace"], metadata["name"])
        token = page["metadata"].get("continue") or ""
        if not token:
            return released


def _release_one(api: client.CustomObjectsApi, plural: str, namespace: str, name: str) -> bool:
    """Take the finalizer off one resource; return whether it had it."""

    def attempt() -> bool:
        resource: Any = api.get_namespaced_custom_object(_GROUP, _VERSION, namespace, plural, name)
        metadata = resource["metadata"]
        finalizers = metadata.get("finalizers", [])
        if FINALIZER not in finalizers:
            return False
        # With the version that was read: a list is patched as a whole, and others may have finalizers, too.
        patch: dict[str, Any] = {
            "metadata": {
                "finalizers": [finalizer for finalizer in finalizers if finalizer != FINALIZER],
                "resourceVersion": metadata["resourceVersion"],
            }
        }
        api.patch_namespaced_custom_object(_GROUP, _VERSION, namespace, plural, name, patch, _content_type=_MERGE_PATCH)
        _log.info("finalizer taken off", resource=f"{plural}/{name}", namespace=namespace)
        return True

    return _until_no_conflict(attempt)


def _until_no_conflict(attempt: Callable[[], bool], *, tries: int = 5) -> bool:
    """Return what `attempt` answers; it is repeated when somebody else changed the resource, False if that is gone."""
    for i in range(tries):
        try:
            return attempt()
        except client.ApiException as error:
            if error.status == _NOT_FOUND:
                return False
            if error.status != _CONFLICT or i == tries - 1:
                raise
            time.sleep(0.1 * 2**i)
    raise AssertionError("unreachable")


def main() -> None:
    """Stop the operator of the namespace in `REFOLD_NAMESPACE`, and take its Lease and its finalizers away.

    Where `REFOLD_NAMESPACES` names those that the operator works in (a JSON list), it looks into no others.
    """
    logs.configure("uninstall")
    try:
        config.load_incluster_config()
    except config.ConfigException:
        config.load_kube_config()
    own = os.environ["REFOLD_NAMESPACE"]
    tenants: list[str] = json.loads(os.environ.get("REFOLD_NAMESPACES", "[]"))
    stop_operator(own)
    delete_lease(own)
    for plural in ("projections", "eventstreams"):
        released = sum(release(plural, namespace) for namespace in {own, *tenants}) if tenants else release(plural)
        _log.info("released", kind=plural, resources=released)


if __name__ == "__main__":
    main()
