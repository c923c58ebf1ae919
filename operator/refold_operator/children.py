"""The Kubernetes objects that a Projection needs, as pure functions of what was decided.

All pods meet the Pod Security Standard `restricted`, have a read-only root file system and, but for the
query service, no service account token.
"""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from refold import kafka, names

from refold_operator.cluster import API_VERSION
from refold_operator.resources import EventStream, Processes, Projection, QueryScaling

Manifest = dict[str, Any]

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "refold-operator"
#: Chooses what the operator made, in watches and lists.
MANAGED = f"{MANAGED_BY}={MANAGER}"
#: The labels that tell whose an object is.
STREAM_LABEL = "refold.dev/eventstream"
PROJECTION_LABEL = "refold.dev/projection"
VERSION_LABEL = "refold.dev/version"
COMPONENT_LABEL = "app.kubernetes.io/component"

PORT = 8080
_SECRET_HASH = "refold.dev/secret-hash"  # noqa: S105 - an annotation's name
_ACCOUNT = "refold.dev/account"
_WISH = "refold.dev/wish"
_USER = 65532
#: Where a projector finds its Kafka credentials.
_KAFKA_FOLDER = "/etc/refold/kafka"
# SIGTERM lets a process finish what it acknowledged: 25 s in refold.web.server, some more for what comes before it.
_GRACE_SECONDS = 35
_DEFAULT_RESOURCES = {
    "projector": {"requests": {"cpu": "50m", "memory": "96Mi"}, "limits": {"memory": "512Mi"}},
    "query": {"requests": {"cpu": "50m", "memory": "96Mi"}, "limits": {"memory": "384Mi"}},
}


@dataclasses.dataclass(frozen=True)
class Image:
    """What all processes run."""

    name: str
    pull_policy: str


def projector_secret(
    owner: Projection, version: str, *, store_dsn: str, readstore_dsn: str, kafka_files: Mapping[str, str]
) -> Manifest:
    """Return the Secret with the DSNs of one version's projectors, and the files of their Kafka credentials."""
    return _secret(
        owner, names.projector_name(owner.metadata.name, version), _labels(owner, "projector", version),
        {"store-dsn": store_dsn, "readstore-dsn": readstore_dsn, **kafka_files},
    )  # fmt: skip


def consumer_secret(owner: EventStream, data: Mapping[str, str]) -> Manifest:
    """Return the Secret for those who read an EventStream's topic."""
    labels = {
        "app.kubernetes.io/name": "refold-consumer",
        "app.kubernetes.io/instance": owner.metadata.name,
        COMPONENT_LABEL: "consumer",
        "app.kubernetes.io/part-of": "refold",
        MANAGED_BY: MANAGER,
        STREAM_LABEL: owner.metadata.name,
    }
    return _secret(owner, names.consumer_name(owner.metadata.name), labels, data)


def query_account(owner: Projection) -> Manifest:
    """Return the ServiceAccount by which the query service asks the Kubernetes API about its callers."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(owner, names.query_name(owner.metadata.name), _labels(owner, "query")),
        "automountServiceAccountToken": False,  # its pods say that they want it
    }


def query_secret(owner: Projection, *, readstore_dsn: str, store_dsn: str | None) -> Manifest:
    """Return the Secret with the query service's DSNs; that of the event store where rows have a history."""
    return _secret(
        owner, names.query_name(owner.metadata.name), _labels(owner, "query"),
        {"readstore-dsn": readstore_dsn, **({} if store_dsn is None else {"store-dsn": store_dsn})},
    )  # fmt: skip


def sql_secret(owner: Projection, data: Mapping[str, str]) -> Manifest:
    """Return the Secret for those who read the rows in SQL."""
    return _secret(owner, names.sql_name(owner.metadata.name), _labels(owner, "sql"), data)


def projector(
    owner: Projection,
    version: str,
    *,
    image: Image,
    brokers: kafka.Brokers,
    secret: Manifest,
    replicas: int,
    installed: str | None = None,
) -> Manifest:
    """Return the Deployment of one version's projectors, of which there are `replicas`.

    `installed` tells an image that isn't Refold's own which Refold it has to go together with.
    """
    env = [
        {"name": "REFOLD_PROJECTION", "value": f"{owner.metadata.namespace}/{owner.metadata.name}"},
        {"name": "REFOLD_VERSION", "value": version},
        *_kafka_env(brokers),
        _from_secret("REFOLD_STORE_DSN", secret, "store-dsn"),
        _from_secret("REFOLD_READSTORE_DSN", secret, "readstore-dsn"),
        {"name": "REFOLD_PORT", "value": str(PORT)},
    ]
    if installed is not None:
        env.append({"name": "REFOLD_INSTALLED", "value": installed})
    return _deployment(
        owner, names.projector_name(owner.metadata.name, version), "projector", _labels(owner, "projector", version),
        processes=owner.spec.projector, replicas=replicas, image=image, env=env, secret=secret,
    )  # fmt: skip


def query(owner: Projection, *, image: Image, secret: Manifest, account: Mapping[str, Any]) -> Manifest:
    """Return the query service's Deployment; `account` is its ServiceAccount as it is in the cluster.

    Where its processes are scaled, their number isn't in it: that is the HorizontalPodAutoscaler's.
    """
    env = [
        {"name": "REFOLD_PROJECTION", "value": f"{owner.metadata.namespace}/{owner.metadata.name}"},
        _from_secret("REFOLD_READSTORE_DSN", secret, "readstore-dsn"),
        {"name": "REFOLD_PORT", "value": str(PORT)},
    ]
    if "store-dsn" in secret["data"]:
        env.append(_from_secret("REFOLD_STORE_DSN", secret, "store-dsn"))
    return _deployment(
        owner, names.query_name(owner.metadata.name), "query", _labels(owner, "query"),
        processes=owner.spec.query, replicas=None if owner.spec.query.scaling else owner.spec.query.replicas,
        image=image, env=env, secret=secret, account=account,
    )  # fmt: skip


def query_service(owner: Projection) -> Manifest:
    """Return the Service of the query processes."""
    labels = _labels(owner, "query")
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(owner, names.query_name(owner.metadata.name), labels),
        "spec": {
            "type": "ClusterIP",
            "selector": _selector(labels),
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def only_replicas(deployment: Mapping[str, Any], replicas: int) -> Manifest:
    """Return what says of a Deployment that is there only how many replicas it has."""
    metadata = {name: deployment["metadata"][name] for name in ("name", "namespace")}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": {"replicas": replicas}}


def query_autoscaler(owner: Projection, scaling: QueryScaling) -> Manifest:
    """Return the HorizontalPodAutoscaler of the query processes."""
    name = names.query_name(owner.metadata.name)
    cpu = {"type": "Utilization", "averageUtilization": scaling.target_cpu}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(owner, name, _labels(owner, "query")),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": scaling.min_replicas,
            "maxReplicas": scaling.max_replicas,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": cpu}}],
        },
    }


def query_budget(owner: Projection) -> Manifest:
    """Return the PodDisruptionBudget of the query processes: a drain takes one after the other."""
    labels = _labels(owner, "query")
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(owner, names.query_name(owner.metadata.name), labels),
        # also where there is only one: a budget that lets no pod go would hold up the drain for ever
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _selector(labels)}},
    }


def url(owner: Projection) -> str:
    """Return where the rows are read, inside the cluster."""
    return f"http://{names.query_name(owner.metadata.name)}.{owner.metadata.namespace}.svc"


def projector_selector(owner: Projection, version: str) -> str:
    """Return the label selector of one version's projectors."""
    labels = _selector(_labels(owner, "projector", version))
    return ",".join(f"{name}={value}" for name, value in sorted(labels.items()))


def stamped(manifest: Manifest) -> Manifest:
    """Return `manifest` with an annotation that tells one wish of the operator from another."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), _WISH: digest}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}


def same_wish(child: Mapping[str, Any], manifest: Manifest) -> bool:
    """Tell whether `child` was last applied for the same wish; then, if it differs, someone else has changed it."""
    wish = child["metadata"].get("annotations", {}).get(_WISH)
    return wish is not None and wish == manifest["metadata"]["annotations"][_WISH]


def owned_by(child: Mapping[str, Any], owner: EventStream | Projection) -> bool:
    """Tell whether `child` is controlled by `owner`."""
    references = child["metadata"].get("ownerReferences", [])
    return any(reference["uid"] == owner.metadata.uid and reference.get("controller") for reference in references)


def installation_secret(namespace: str, name: str, data: Mapping[str, bytes | str]) -> Manifest:
    """Return a Secret of the installation itself, in the operator's namespace."""
    labels = {
        "app.kubernetes.io/name": "refold",
        "app.kubernetes.io/part-of": "refold",
        MANAGED_BY: MANAGER,
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "data": {key: _base64(value) for key, value in data.items()},
    }


def _labels(owner: Projection, component: str, version: str | None = None) -> dict[str, str]:
    labels = {
        "app.kubernetes.io/name": f"refold-{component}",
        "app.kubernetes.io/instance": owner.metadata.name,
        COMPONENT_LABEL: component,
        "app.kubernetes.io/part-of": "refold",
        MANAGED_BY: MANAGER,
        PROJECTION_LABEL: owner.metadata.name,
    }
    return labels if version is None else labels | {VERSION_LABEL: version}


def _selector(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels that tell pods apart; a Deployment's selector can't be changed later."""
    return {name: labels[name] for name in (PROJECTION_LABEL, COMPONENT_LABEL, VERSION_LABEL) if name in labels}


def _metadata(owner: EventStream | Projection, name: str, labels: Mapping[str, str]) -> Manifest:
    return {
        "name": name,
        "namespace": owner.metadata.namespace,
        "labels": dict(labels),
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": type(owner).__name__,
                "name": owner.metadata.name,
                "uid": owner.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def _secret(owner: EventStream | Projection, name: str, labels: Mapping[str, str], data: Mapping[str, str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": _metadata(owner, name, labels),
        "data": {key: _base64(value) for key, value in data.items()},
    }


def _base64(value: bytes | str) -> str:
    return base64.b64encode(value.encode() if isinstance(value, str) else value).decode()


def _kafka_env(brokers: kafka.Brokers) -> list[Manifest]:
    """Return the variables that tell a projector of Kafka, and where its credentials are mounted."""
    env = {"REFOLD_KAFKA_BOOTSTRAP": brokers.bootstrap}
    if brokers.protocol != "PLAINTEXT":
        env |= {"REFOLD_KAFKA_SECURITY_PROTOCOL": brokers.protocol, "REFOLD_KAFKA_CREDENTIALS": _KAFKA_FOLDER}
    if brokers.protocol.startswith("SASL"):
        env["REFOLD_KAFKA_SASL_MECHANISM"] = brokers.mechanism
    return [{"name": name, "value": value} for name, value in env.items()]


def _from_secret(variable: str, secret: Manifest, key: str) -> Manifest:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret["metadata"]["name"], "key": key}}}


def _deployment(
    owner: Projection,
    name: str,
    command: str,
    labels: Mapping[str, str],
    *,
    processes: Processes,
    replicas: int | None,
    image: Image,
    env: list[Manifest],
    secret: Manifest,
    account: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return a Deployment; with an `account` its pods get that ServiceAccount's token.

    Without `replicas` their number is somebody else's.
    """
    # Other credentials are another pod template, so that pods which have the former ones are replaced. The token of a
    # ServiceAccount is worth nothing once that is deleted, though one of the same name may be there.
    digest = hashlib.sha256(repr(sorted(secret["data"].items())).encode()).hexdigest()[:16]
    annotations = {_SECRET_HASH: digest}
    identity: Manifest = {"automountServiceAccountToken": account is not None}
    if account is not None:
        annotations[_ACCOUNT] = account["metadata"]["uid"]
        identity["serviceAccountName"] = account["metadata"]["name"]
    mounts: list[Manifest] = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - the one writable folder
    volumes: list[Manifest] = [{"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}]
    items = [{"key": file, "path": file} for file in kafka.FILES if file in secret["data"]]
    if items:
        mounts.append({"name": "kafka", "mountPath": _KAFKA_FOLDER, "readOnly": True})
        source = {"secretName": secret["metadata"]["name"], "items": items, "defaultMode": 0o440}
        volumes.append({"name": "kafka", "secret": source})
    container = {
        "name": command,
        "image": image.name,
        "imagePullPolicy": image.pull_policy,
        "args": [command],
        "env": env,
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": _resources(command, processes),
        "startupProbe": _probe("/healthz", period=1, failures=60),
        "livenessProbe": _probe("/healthz", period=10, failures=6),
        "readinessProbe": _probe("/readyz", period=2, failures=2),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(owner, name, labels),
        "spec": {
            **({} if replicas is None else {"replicas": replicas}),
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": _selector(labels)},
            "template": {
                "metadata": {"labels": dict(labels), "annotations": annotations},
                "spec": {
                    **identity,
                    "enableServiceLinks": False,
                    "terminationGracePeriodSeconds": _GRACE_SECONDS,
                    # One node or zone that goes should not take all of them along.
                    "topologySpreadConstraints": [
                        {
                            "maxSkew": 1,
                            "topologyKey": key,
                            "whenUnsatisfiable": "ScheduleAnyway",
                            "labelSelector": {"matchLabels": _selector(labels)},
                        }
                        for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
                    ],
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": _USER,
                        "runAsGroup": _USER,
                        "fsGroup": _USER,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [container],
                    "volumes": volumes,
                },
            },
        },
    }


def _resources(command: str, processes: Processes) -> Manifest:
    """Return requests and limits; the default of a resource stands only where the spec says nothing at all of it."""
    said = {name for of_kind in processes.resources.values() for name in of_kind}
    return {
        kind: {
            **{name: value for name, value in _DEFAULT_RESOURCES[command][kind].items() if name not in said},
            **processes.resources.get(kind, {}),
        }
        for kind in ("requests", "limits")
    }


def _probe(path: str, *, period: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": "http", "scheme": "HTTP"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
        "successThreshold": 1,
    }
