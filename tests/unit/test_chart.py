"""The Helm chart, rendered by helm: what it makes, what it refuses, and that it agrees with the code beside it."""

import copy
import dataclasses
import importlib
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from refold.eventstore import Limits
from refold.eventstore.settings import Settings
from refold.projection.definition import Definition
from refold_operator import children, election, main, resources, selftest

from tests.charts import (
    CHART,
    EMBEDDED,
    EXTERNAL,
    NAMESPACE,
    ROOT,
    Manifest,
    at,
    helm,
    merged,
    one,
    pods,
    refusal,
    render,
)  # fmt: skip

SECURITY: dict[str, Any] = {
    "protocol": "SASL_SSL", "relaySecret": "my-relay", "operatorSecret": "my-operator", "projectorSecret": "my-reader",
    "caSecret": "my-ca",
}  # fmt: skip
BOTH = pytest.mark.parametrize("values", [EMBEDDED, EXTERNAL], ids=["embedded", "external"])


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("resources", "labels", "annotations", "topicPrefixes"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


SECURED = merged(EXTERNAL, {"kafka": {"security": SECURITY}})
PRINCIPALS = {"relayPrincipal": "User:relay", "projectorPrincipal": "User:reader"}
WITH_PRINCIPALS = merged(SECURED, {"kafka": {"security": PRINCIPALS}})
WITH_ACLS = merged(WITH_PRINCIPALS, at("kafka.security.manageAcls", True))
SCRAPED = merged(EMBEDDED, at("networkPolicy.metricsFrom", [{"namespaceSelector": {}}]))
MONITORED = merged(
    SCRAPED, *(at(f"monitoring.{part}.enabled", True) for part in ("podMonitors", "alerts", "dashboard"))
)
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
RESOURCES = {"requests": {"cpu": "7m"}, "limits": {"memory": "77Mi"}}
#: Another than the default for every value, with what else must be set for it to matter.
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "image.repository": ("registry.example/refold", EMBEDDED),
    "image.tag": ("7", EMBEDDED),
    "image.digest": (f"sha256:{'0a' * 32}", EMBEDDED),
    "image.pullPolicy": ("Always", EMBEDDED),
    "crds.install": (False, EMBEDDED),
    "store.adminSecret": ("other", EXTERNAL),
    "readStore.adminSecret": ("other", EXTERNAL),
    "redis.adminSecret": ("other", EXTERNAL),
    "kafka.bootstrapServers": ("other:9092", EXTERNAL),
    "kafka.replicas": (3, EXTERNAL),
    "kafka.security.protocol": ("SSL", EXTERNAL),
    "kafka.security.mechanism": ("PLAIN", SECURED),
    "kafka.security.caSecret": ("other", SECURED),
    "kafka.security.relaySecret": ("other", SECURED),
    "kafka.security.operatorSecret": ("other", SECURED),
    "kafka.security.projectorSecret": ("other", SECURED),
    "kafka.security.manageUsers": (True, SECURED),
    "kafka.security.manageAcls": (True, WITH_PRINCIPALS),
    "kafka.security.relayPrincipal": ("User:other", WITH_ACLS),
    "kafka.security.projectorPrincipal": ("User:other", WITH_ACLS),
    "operator.replicas": (1, EMBEDDED),
    "operator.priorityClassName": ("system-cluster-critical", EMBEDDED),
    "operator.resources": (RESOURCES, EMBEDDED),
    "eventstore.replicas": (1, EMBEDDED),
    "eventstore.liveReaders": (50, EMBEDDED),
    "eventstore.limits.appendEvents": (500, EMBEDDED),
    "eventstore.limits.eventBytes": (600_000, EMBEDDED),
    "eventstore.limits.metadataBytes": (2048, EMBEDDED),
    "eventstore.limits.appendBytes": (8_000_000, EMBEDDED),
    "eventstore.limits.bodyBytes": (16_000_000, EMBEDDED),
    "eventstore.limits.waitingAppends": (100, EMBEDDED),
    "eventstore.limits.waitingBytes": (1_000_000, EMBEDDED),
    "eventstore.priorityClassName": ("system-cluster-critical", EMBEDDED),
    "eventstore.resources": (RESOURCES, EMBEDDED),
    "eventstore.service.type": ("NodePort", EMBEDDED),
    "eventstore.service.nodePort": (30080, merged(EMBEDDED, at("eventstore.service.type", "NodePort"))),
    "tenants.namespaces": (["shop"], EMBEDDED),
    "tenants.topicPrefixes": ({"*": []}, EMBEDDED),
    "relay.replicas": (1, EMBEDDED),
    "relay.shards": (4, EMBEDDED),
    "relay.priorityClassName": ("system-cluster-critical", EMBEDDED),
    "relay.resources": (RESOURCES, EMBEDDED),
    "webhook.enabled": (False, EMBEDDED),
    "webhook.failurePolicy": ("Fail", EMBEDDED),
    "webhook.replicas": (1, EMBEDDED),
    "webhook.priorityClassName": ("system-cluster-critical", EMBEDDED),
    "webhook.resources": (RESOURCES, EMBEDDED),
    "networkPolicy.enabled": (False, EMBEDDED),
    "networkPolicy.apiServerPorts": ([8443], EMBEDDED),
    "networkPolicy.postgresEgress": ([{"ports": [{"port": 5433}]}], EXTERNAL),
    "networkPolicy.kafkaEgress": ([{"ports": [{"port": 9093}]}], EXTERNAL),
    "networkPolicy.redisEgress": ([{"ports": [{"port": 6380}]}], EXTERNAL),
    "networkPolicy.metricsFrom": ([{"namespaceSelector": {}}], EMBEDDED),
    "monitoring.podMonitors.enabled": (True, SCRAPED),
    "monitoring.podMonitors.interval": ("7s", MONITORED),
    "monitoring.podMonitors.labels": ({"release": "other"}, MONITORED),
    "monitoring.alerts.enabled": (True, EMBEDDED),
    "monitoring.alerts.labels": ({"release": "other"}, MONITORED),
    "monitoring.alerts.runbook": ("https://runbooks.example/refold", MONITORED),
    "monitoring.dashboard.enabled": (True, EMBEDDED),
    "monitoring.dashboard.labels": ({"other_dashboard": "1"}, MONITORED),
    "monitoring.dashboard.annotations": ({"grafana_folder": "Refold"}, MONITORED),
    "embedded.enabled": (True, EXTERNAL),
    "embedded.postgres.image": ("my/postgres:15", EMBEDDED),
    "embedded.postgres.storage": ("7Gi", EMBEDDED),
    "embedded.postgres.storageClassName": ("fast", EMBEDDED),
    "embedded.postgres.resources": (RESOURCES, EMBEDDED),
    "embedded.kafka.image": ("my/kafka:4", EMBEDDED),
    "embedded.kafka.storage": ("7Gi", EMBEDDED),
    "embedded.kafka.storageClassName": ("fast", EMBEDDED),
    "embedded.kafka.heap": ("77m", EMBEDDED),
    "embedded.kafka.resources": (RESOURCES, EMBEDDED),
    "embedded.redis.image": ("my/redis:7", EMBEDDED),
    "embedded.redis.storage": ("7Gi", EMBEDDED),
    "embedded.redis.storageClassName": ("fast", EMBEDDED),
    "embedded.redis.maxmemory": ("1gb", EMBEDDED),
    "embedded.redis.resources": (RESOURCES, EMBEDDED),
}


def file_of(manifests: list[Manifest], variable: str) -> tuple[str, str]:
    """Return Secret and key of a file that a variable of the operator names."""
    pod = one(manifests, "Deployment", "refold-operator")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (path,) = (each["value"] for each in container["env"] if each["name"] == variable)
    folder, _, key = path.rpartition("/")
    (mount,) = (each for each in container["volumeMounts"] if each["mountPath"] == folder)
    assert mount["readOnly"]
    assert "subPath" not in mount, "a change of the Secret wouldn't come through"
    (secret,) = (each["secret"] for each in pod["volumes"] if each["name"] == mount["name"])
    assert secret["defaultMode"] == 0o440
    return secret["secretName"], key


def kafka_of(manifests: list[Manifest], process: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return what a process is told of Kafka: its variables, and its Secrets by folder."""
    pod = one(manifests, "Deployment", f"refold-{process}")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    secrets = {volume["name"]: volume["secret"] for volume in pod["volumes"] if "secret" in volume}
    assert all(secret["defaultMode"] == 0o440 for secret in secrets.values())
    mounts = {
        mount["mountPath"]: secrets[mount["name"]]["secretName"]
        for mount in container["volumeMounts"]
        if mount["name"] in secrets and mount["mountPath"].startswith("/etc/refold/kafka/")
    }
    variables = {
        variable["name"].removeprefix("REFOLD_KAFKA_"): variable["value"]
        for variable in container["env"]
        if variable["name"].startswith("REFOLD_KAFKA_")
    }
    return variables, mounts


def without_random(manifests: list[Manifest]) -> list[Manifest]:
    result = copy.deepcopy(manifests)
    for manifest in result:
        manifest.pop("stringData", None)
    for _, template in pods(result):
        template["metadata"].get("annotations", {}).pop("checksum/password", None)
    return result


# --- the chart as a whole ---


@BOTH
def test_helm_lint_finds_nothing(values: dict[str, Any]) -> None:
    result = helm("lint", values, "--strict")
    assert result.returncode == 0, result.stdout + result.stderr


def test_chart_and_application_have_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = importlib.import_module("refold").__version__
    assert (chart["version"], chart["appVersion"]) == (version, version)


@BOTH
def test_everything_is_in_the_release_namespace_and_named_after_refold(values: dict[str, Any]) -> None:
    cluster_wide = {
        "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "ValidatingWebhookConfiguration",
    }  # fmt: skip
    for manifest in render(values):
        if manifest["kind"] != "CustomResourceDefinition":
            assert manifest["metadata"]["name"].startswith("refold-"), manifest["metadata"]
        if manifest["kind"] not in cluster_wide:
            assert manifest["metadata"]["namespace"] == NAMESPACE, manifest["metadata"]


# --- values ---


def test_every_value_has_a_test_that_it_is_used() -> None:
    assert set(leaves(DEFAULTS)) == set(OTHER)


@pytest.mark.parametrize("path", OTHER)
def test_every_value_changes_what_is_rendered(path: str) -> None:
    other, given = OTHER[path]
    before = without_random(render(given))
    after = without_random(render(merged(given, at(path, other))))
    assert before != after


@pytest.mark.parametrize("parent", ["", *sorted({path.rpartition(".")[0] for path in leaves(DEFAULTS)})])
def test_an_unknown_value_is_refused(parent: str) -> None:
    path = f"{parent}.typo".lstrip(".")
    message = refusal(merged(EMBEDDED, at(path, 1)))
    assert "typo" in message
    assert "additional properties" in message.lower()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("eventstore.replicas", 0),
        ("eventstore.limits.eventBytes", 100),
        ("eventstore.limits.eventBytes", 64 * 1024 * 1024),
        ("eventstore.limits.waitingAppends", 0),
        ("eventstore.replicas", "2"),
        ("eventstore.liveReaders", -1),
        ("relay.shards", 0),
        ("webhook.failurePolicy", "Warn"),
        ("webhook.replicas", 0),
        ("webhook.enabled", "yes"),
        ("image.pullPolicy", "Sometimes"),
        ("image.tag", "a b"),
        ("image.digest", "sha256:0a"),
        ("relay.priorityClassName", "Not a name"),
        ("kafka.bootstrapServers", "kafka"),
        ("kafka.security.protocol", "TLS"),
        ("kafka.security.mechanism", "GSSAPI"),
        ("kafka.security.relayPrincipal", "relay"),
        ("kafka.bootstrapServers", "kafka:9092, other:9092"),
        ("eventstore.service.nodePort", 70000),
        ("embedded.enabled", "yes"),
        ("embedded.kafka.heap", "half"),
        ("embedded.postgres.storage", "much"),
        ("embedded.redis.maxmemory", "0"),
        ("operator.resources", {"request": {}}),
        ("store.adminSecret", "Not_A_Name"),
        ("monitoring.podMonitors.interval", "often"),
        ("monitoring.podMonitors.labels", {"release": 1}),
        ("monitoring.alerts.runbook", "docs/alerts.md#there"),
    ],
)
def test_a_value_that_cant_be_is_refused_with_its_name(path: str, value: Any) -> None:
    message = refusal(merged(EMBEDDED, at(path, value)))
    assert path.replace(".", "/") in message.replace(".", "/")


@pytest.mark.parametrize("path", ["store.adminSecret", "readStore.adminSecret", "kafka.bootstrapServers"])
def test_a_missing_backend_is_named_with_what_to_give(path: str) -> None:
    message = refusal(merged(EXTERNAL, at(path, "")))
    assert f"{path} is missing: give" in message
    assert "embedded.enabled=true" in message


@pytest.mark.parametrize(
    ("part", "whole"), [("metadataBytes", "eventBytes"), ("eventBytes", "appendBytes"), ("appendBytes", "bodyBytes")]
)
def test_a_limit_above_what_holds_it_is_refused_with_both_numbers(part: str, whole: str) -> None:
    path = "eventstore.limits."
    values = merged(EMBEDDED, at(path + part, 20_000_001), at(path + whole, 20_000_000))
    said = refusal(values)
    assert f"{path}{part} is 20000001" in said
    assert f"{path}{whole}, which is 20000000" in said


def test_the_charts_limits_are_the_defaults_of_process_and_library_and_the_operator_knows_them() -> None:
    manifests = render(EMBEDDED)
    variables = {}
    for name in ("refold-eventstore", "refold-operator", "refold-webhook"):
        (container,) = one(manifests, "Deployment", name)["spec"]["template"]["spec"]["containers"]
        variables[name] = {each["name"]: each.get("value") for each in container["env"]}
    defaults = {f"REFOLD_{name.upper()}": str(value) for name, value in dataclasses.asdict(Limits()).items()}
    assert defaults.items() <= variables["refold-eventstore"].items()
    for name in ("refold-operator", "refold-webhook"):
        assert variables[name]["REFOLD_EVENT_BYTES"] == defaults["REFOLD_EVENT_BYTES"]
    settings = Settings(store_dsn="x")  # type: ignore[arg-type]
    assert settings.limits() == Limits()


def test_topics_cant_have_more_replicas_than_the_embedded_kafka_has_brokers() -> None:
    assert "the embedded Kafka has one broker" in refusal(merged(EMBEDDED, at("kafka.replicas", 2)))


# --- CustomResourceDefinitions ---


def crd_files() -> list[str]:
    return sorted(path.name for path in (ROOT / "crds").glob("*.yaml"))


def test_the_chart_carries_every_crd() -> None:
    assert len(crd_files()) == 2
    assert sorted(path.name for path in (CHART / "files" / "crds").iterdir()) == crd_files()


@pytest.mark.parametrize("name", crd_files())
def test_a_crd_in_the_chart_is_a_copy_of_the_repositorys(name: str) -> None:
    same = (CHART / "files" / "crds" / name).read_bytes() == (ROOT / "crds" / name).read_bytes()
    assert same, "crds/ was changed: run `cp crds/*.yaml charts/refold/files/crds/`"


def test_rendered_crds_equal_the_repositorys_and_are_kept_on_uninstall() -> None:
    wanted = [yaml.safe_load((ROOT / "crds" / name).read_text()) for name in crd_files()]
    made = [m for m in render(EMBEDDED) if m["kind"] == "CustomResourceDefinition"]
    for crd in made:
        assert crd["metadata"]["annotations"].pop("helm.sh/resource-policy") == "keep"
        if not crd["metadata"]["annotations"]:
            del crd["metadata"]["annotations"]
    assert sorted(made, key=str) == sorted(wanted, key=str)


# --- pods ---


VOLUMES = {"emptyDir", "configMap", "secret", "persistentVolumeClaim", "projected"}


@BOTH
def test_every_pod_satisfies_the_restricted_pod_security_standard(values: dict[str, Any]) -> None:
    templates = dict(pods(render(values)))
    assert len(templates) == (9 if values is EMBEDDED else 6)
    for name, template in templates.items():
        spec = template["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")), name
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= VOLUMES, name
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert not any("hostPort" in port for port in container.get("ports", [])), name


@BOTH
def test_every_container_has_resources_and_every_long_running_one_probes(values: dict[str, Any]) -> None:
    for name, template in pods(render(values)):
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            assert container["resources"]["requests"]["memory"], name
            assert container["resources"]["limits"]["memory"], name
        if not name.startswith(("Job/", "Pod/")):
            for container in template["spec"]["containers"]:
                assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container), name


REPLICATED = ("operator", "eventstore", "relay", "webhook")


def test_replicas_are_spread_over_nodes_and_zones_and_have_the_priority_that_is_given() -> None:
    manifests = render(merged(EMBEDDED, *(at(f"{process}.priorityClassName", process) for process in REPLICATED)))
    for process in REPLICATED:
        deployment = one(manifests, "Deployment", f"refold-{process}")["spec"]
        pod = deployment["template"]["spec"]
        assert pod["priorityClassName"] == process
        spread = pod["topologySpreadConstraints"]
        assert [each["topologyKey"] for each in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        for each in spread:
            assert (each["maxSkew"], each["whenUnsatisfiable"]) == (1, "ScheduleAnyway")
            assert each["labelSelector"] == deployment["selector"]


def test_a_digest_decides_which_image_runs_also_in_what_the_operator_starts() -> None:
    digest = f"sha256:{'0a' * 32}"
    manifests = render(
        merged(EMBEDDED, {"image": {"repository": "registry.example/refold", "tag": "7", "digest": digest}})
    )
    image = f"registry.example/refold:7@{digest}"
    for process in REPLICATED:
        (container,) = one(manifests, "Deployment", f"refold-{process}")["spec"]["template"]["spec"]["containers"]
        assert container["image"] == image
    (operator,) = one(manifests, "Deployment", "refold-operator")["spec"]["template"]["spec"]["containers"]
    assert {"name": "REFOLD_IMAGE", "value": image} in operator["env"]


@BOTH
def test_no_pod_gets_variables_named_after_services(values: dict[str, Any]) -> None:
    # a Service named refold would set REFOLD_PORT=tcp://…
    for name, template in pods(render(values)):
        assert template["spec"]["enableServiceLinks"] is False, name


@BOTH
def test_only_those_that_need_it_may_speak_to_the_api_server(values: dict[str, Any]) -> None:
    with_token = {name for name, pod in pods(render(values)) if pod["spec"].get("automountServiceAccountToken", True)}
    assert with_token == {
        "Deployment/refold-operator", "Deployment/refold-eventstore", "Deployment/refold-webhook",
        "Job/refold-uninstall",
    }  # fmt: skip
    reach = set()
    for policy in [m for m in render(values) if m["kind"] == "NetworkPolicy"]:
        for rule in policy["spec"].get("egress") or []:
            if "to" not in rule and {"port": 6443} in rule.get("ports", []):
                reach.add(policy["metadata"]["name"])
    assert reach == {name.split("/")[1] for name in with_token}


@BOTH
def test_selectors_find_the_pods_of_their_own_component_only(values: dict[str, Any]) -> None:
    manifests = render(values)
    labels = {name: template["metadata"]["labels"] for name, template in pods(manifests)}

    def found(selector: dict[str, str]) -> list[str]:
        return [name for name, has in labels.items() if selector.items() <= has.items()]

    for manifest in manifests:
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] == "Service":
            assert [pod.split("/")[1] for pod in found(manifest["spec"]["selector"])] == [manifest["metadata"]["name"]]
        elif name in labels and manifest["kind"] not in {"Job", "Pod"}:
            assert found(manifest["spec"]["selector"]["matchLabels"]) == [name]
        elif manifest["kind"] == "PodDisruptionBudget":
            assert found(manifest["spec"]["selector"]["matchLabels"]) == [f"Deployment/{manifest['metadata']['name']}"]


def test_a_new_chart_version_alone_restarts_no_pod() -> None:
    for name, template in pods(render(EMBEDDED)):
        if name != "Pod/refold-test":  # made anew each time
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(template["metadata"]["labels"])


@BOTH
@pytest.mark.parametrize("process", ["operator", "eventstore", "relay", "webhook"])
def test_the_variables_of_a_process_are_those_that_its_settings_know(process: str, values: dict[str, Any]) -> None:
    modules = {"operator": "refold_operator.settings", "webhook": "refold_operator.webhook.settings"}
    module = modules.get(process, f"refold.{process}.settings")
    settings = importlib.import_module(module).Settings
    prefix = settings.model_config["env_prefix"]
    known = {f"{prefix}{name}".upper(): field for name, field in settings.model_fields.items()}
    (container,) = one(render(values), "Deployment", f"refold-{process}")["spec"]["template"]["spec"]["containers"]
    given = [variable["name"] for variable in container["env"]]
    assert set(given) <= set(known)
    assert {name for name, field in known.items() if field.is_required()} <= set(given)
    assert len(given) == len(set(given))
    assert container["args"] == [process]
    assert known["REFOLD_PORT"].default == container["ports"][0]["containerPort"]


def test_backends_that_are_given_are_used() -> None:
    manifests = render(EXTERNAL)
    (operator,) = one(manifests, "Deployment", "refold-operator")["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable for variable in operator["env"]}
    assert file_of(manifests, "REFOLD_STORE_ADMIN_DSN_FILE") == ("my-store", "dsn")
    assert file_of(manifests, "REFOLD_READSTORE_ADMIN_DSN_FILE") == ("my-read-store", "dsn")
    assert variables["REFOLD_KAFKA_BOOTSTRAP"]["value"] == EXTERNAL["kafka"]["bootstrapServers"]
    assert "REFOLD_REDIS_ADMIN_URL_FILE" not in variables
    assert not [m for m in manifests if m["kind"] in {"StatefulSet", "ConfigMap"}]
    assert {m["metadata"]["name"] for m in manifests if m["kind"] == "Secret"} == {"refold-webhook"}


def test_one_replica_gets_no_disruption_budget() -> None:
    processes = ("operator", "eventstore", "relay", "webhook")
    values = merged(EMBEDDED, *(at(f"{process}.replicas", 1) for process in processes))
    assert "PodDisruptionBudget" in {m["kind"] for m in render(EMBEDDED)}
    assert "PodDisruptionBudget" not in {m["kind"] for m in render(values)}


# --- secrets ---


def test_one_password_stands_in_all_secrets_of_the_embedded_postgres() -> None:
    manifests = render(EMBEDDED)
    password = one(manifests, "Secret", "refold-postgres")["stringData"]["password"]
    assert re.fullmatch(r"[A-Za-z0-9]{32}", password)
    host = f"refold_admin:{password}@refold-postgres.{NAMESPACE}.svc:5432"
    assert one(manifests, "Secret", "refold-store-admin")["stringData"]["dsn"] == f"postgresql://{host}/refold_store"
    assert one(manifests, "Secret", "refold-readstore-admin")["stringData"]["dsn"] == f"postgresql://{host}/refold_read"


def test_the_operator_alone_logs_in_to_redis_with_the_charts_password() -> None:
    manifests = render(EMBEDDED)
    password = one(manifests, "Secret", "refold-redis")["stringData"]["password"]
    assert re.fullmatch(r"[A-Za-z0-9]{32}", password)
    assert password != one(manifests, "Secret", "refold-postgres")["stringData"]["password"]
    url = f"redis://refold_admin:{password}@refold-redis.{NAMESPACE}.svc:6379/0"
    assert one(manifests, "Secret", "refold-redis-admin")["stringData"] == {"url": url}
    assert [name for name, pod in pods(manifests) if "refold-redis-admin" in str(pod)] == ["Deployment/refold-operator"]
    assert [name for name, pod in pods(manifests) if "'name': 'refold-redis', 'key'" in str(pod)] == [
        "StatefulSet/refold-redis"
    ]
    given = render(merged(EXTERNAL, at("redis.adminSecret", "my-redis")))
    assert file_of(given, "REFOLD_REDIS_ADMIN_URL_FILE") == ("my-redis", "url")


def test_values_of_0_1_come_along_and_its_shared_token_is_refused_with_what_to_do() -> None:
    for auth in ({"existingSecret": ""}, {}, None):  # None: what the message says to set
        former = render(merged(EMBEDDED, {"auth": auth}))
        assert without_random(former) == without_random(render(EMBEDDED))
    message = refusal(merged(EMBEDDED, at("auth.existingSecret", "my-token")))
    assert "auth.existingSecret is of Refold 0.1" in message
    assert "docs/authorisation.md" in message


# --- Kafka ---


def test_without_security_a_process_is_told_where_kafka_is_and_nothing_else() -> None:
    for process in ("relay", "operator"):
        variables, mounts = kafka_of(render(EXTERNAL), process)
        assert set(variables) == {"BOOTSTRAP"}
        assert not mounts


def test_relay_and_operator_log_in_with_secrets_of_their_own() -> None:
    manifests = render(SECURED)
    common = {
        "BOOTSTRAP": EXTERNAL["kafka"]["bootstrapServers"], "SECURITY_PROTOCOL": "SASL_SSL",
        "SASL_MECHANISM": "SCRAM-SHA-512", "CREDENTIALS": "/etc/refold/kafka/login",
        "CA": "/etc/refold/kafka/ca/ca.crt",
    }  # fmt: skip
    variables, mounts = kafka_of(manifests, "relay")
    assert variables == common | {"USERNAME": "my-relay"}
    assert mounts == {"/etc/refold/kafka/login": "my-relay", "/etc/refold/kafka/ca": "my-ca"}
    variables, mounts = kafka_of(manifests, "operator")
    assert variables == common | {
        "USERNAME": "my-operator", "PROJECTOR_USERNAME": "my-reader",
        "PROJECTOR_CREDENTIALS": "/etc/refold/kafka/projectors",
    }  # fmt: skip
    assert mounts == {
        "/etc/refold/kafka/login": "my-operator", "/etc/refold/kafka/ca": "my-ca",
        "/etc/refold/kafka/projectors": "my-reader",
    }  # fmt: skip


def test_an_operator_that_makes_users_gets_no_credentials_of_projectors() -> None:
    variables, mounts = kafka_of(render(merged(SECURED, at("kafka.security.manageUsers", True))), "operator")
    assert variables["MANAGE_USERS"] == "true"
    assert "my-reader" not in mounts.values()
    assert not [name for name in variables if name.startswith("PROJECTOR")]


@pytest.mark.parametrize("values", [None, "manageUsers", "manageAcls", "SSL"])
def test_a_process_takes_what_the_chart_tells_it_of_kafka(values: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {
        None: SECURED, "manageUsers": merged(SECURED, at("kafka.security.manageUsers", True)), "manageAcls": WITH_ACLS,
        "SSL": merged(EXTERNAL, at("kafka.security.protocol", "SSL")),
    }  # fmt: skip
    for process, module, kind in (
        ("relay", "refold.kafka", "Settings"), ("operator", "refold_operator.settings", "AccessSettings"),
    ):  # fmt: skip
        with monkeypatch.context() as environment:
            variables, _ = kafka_of(render(layers[values]), process)
            for name, value in variables.items():
                environment.setenv(f"REFOLD_KAFKA_{name}", value)
            getattr(importlib.import_module(module), kind)()


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"relaySecret": ""}, "relaySecret"),
        ({"operatorSecret": ""}, "operatorSecret"),
        ({"projectorSecret": ""}, "projectorSecret"),
        ({"manageUsers": True, "mechanism": "PLAIN"}, "SCRAM"),
        ({"manageUsers": True, "protocol": "SSL"}, "SCRAM"),
        ({"manageAcls": True}, "relayPrincipal"),
        ({"manageAcls": True, "relayPrincipal": "User:relay"}, "projectorPrincipal"),
    ],
)
def test_security_that_cant_work_is_refused_with_what_is_missing(changes: dict[str, Any], missing: str) -> None:
    assert missing in refusal(merged(SECURED, {"kafka": {"security": changes}}))


def test_the_embedded_kafka_speaks_plaintext_only() -> None:
    values = merged(EMBEDDED, {"kafka": {"security": SECURITY}})
    assert "the embedded Kafka speaks PLAINTEXT only" in refusal(values)


# --- rights ---


def test_the_operator_has_the_rights_that_its_readme_names_and_no_others() -> None:
    readme = (ROOT / "operator" / "refold_operator" / "README.md").read_text()
    blocks = re.findall(r"```yaml\n(rules:.*?)```", readme, re.DOTALL)

    def rights(rules: list[dict[str, list[str]]]) -> set[tuple[str, str, str, str]]:
        return {
            (group, resource, verb, name)
            for rule in rules
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
            for name in rule.get("resourceNames", [""])
        }

    for kind, block in zip(("ClusterRole", "Role"), blocks, strict=True):
        role = one(render(EMBEDDED), kind, "refold-operator")
        assert rights(role["rules"]) == rights(yaml.safe_load(block)["rules"])


def test_in_named_namespaces_the_operator_has_the_same_rights_by_roles_only() -> None:
    tenants = ["bank", "shop"]
    manifests = render(merged(EMBEDDED, at("tenants.namespaces", tenants)))
    everywhere = one(render(EMBEDDED), "ClusterRole", "refold-operator")["rules"]
    roles = [m for m in manifests if m["kind"] == "Role" and m["metadata"]["name"] == "refold-operator-tenant"]
    assert [role["metadata"]["namespace"] for role in roles] == [*tenants, NAMESPACE]
    of_the_cluster = [rule for rule in everywhere if rule["apiGroups"] == ["rbac.authorization.k8s.io"]]
    for role in roles:
        assert role["rules"] == [rule for rule in everywhere if rule not in of_the_cluster]
    for kind, namespaces in (("ClusterRoleBinding", []), ("RoleBinding", [*tenants, NAMESPACE, NAMESPACE])):
        bound = [m for m in manifests if m["kind"] == kind and "'refold-operator'" in str(m.get("subjects"))]
        assert [m["metadata"]["namespace"] for m in bound] == namespaces
        for binding in bound:
            assert binding["subjects"] == [
                {"kind": "ServiceAccount", "name": "refold-operator", "namespace": NAMESPACE}
            ]
    assert not [m for m in manifests if m["kind"] == "ClusterRole" and m["metadata"]["name"] == "refold-operator"]
    groups = one(manifests, "ClusterRoleBinding", "refold-query")["subjects"]
    assert [group["name"] for group in groups] == [f"system:serviceaccounts:{each}" for each in [*tenants, NAMESPACE]]
    (job,) = (m for m in manifests if m["kind"] == "Job" and m["metadata"]["name"] == "refold-uninstall")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {"name": "REFOLD_NAMESPACES", "value": '["bank","shop"]'} in container["env"]


def test_the_operators_lease_is_the_one_that_it_may_change_and_its_pods_say_that_they_wait_for_it() -> None:
    manifests = render(EMBEDDED)
    (named,) = (
        rule["resourceNames"]
        for rule in one(manifests, "Role", "refold-operator")["rules"]
        if rule["resources"] == ["leases"] and rule["verbs"] != ["create"]
    )
    assert named == [election.NAME]
    deployment = one(manifests, "Deployment", "refold-operator")
    label = main.UNELECTED.rpartition("!")[2]
    assert label in deployment["spec"]["template"]["metadata"]["labels"]
    assert label not in deployment["spec"]["selector"]["matchLabels"], "it can't be changed in an upgrade"


@BOTH
def test_no_role_has_a_wildcard(values: dict[str, Any]) -> None:
    roles = [m for m in render(values) if m["kind"] in {"Role", "ClusterRole"}]
    assert roles
    for role in roles:
        for rule in role["rules"]:
            assert not [value for values_ in rule.values() for value in values_ if "*" in value]


def test_services_may_ask_the_api_server_about_callers_and_nothing_else() -> None:
    manifests = render(EMBEDDED)
    delegator = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"}
    ours, queries = (one(manifests, "ClusterRoleBinding", name) for name in ("refold-eventstore", "refold-query"))
    assert ours["roleRef"] == queries["roleRef"] == delegator
    assert ours["subjects"] == [{"kind": "ServiceAccount", "name": "refold-eventstore", "namespace": NAMESPACE}]
    assert "subjects" not in queries, "they are the operator's"
    bound = [m for m in manifests if m["kind"].endswith("Binding") and "refold-eventstore" in str(m.get("subjects"))]
    assert bound == [ours]


def test_who_may_view_a_namespace_reads_events_and_rows_and_only_who_may_edit_it_appends_and_unparks() -> None:
    def rights(name: str) -> set[tuple[str, str]]:
        rules = one(render(EMBEDDED), "ClusterRole", name)["rules"]
        return {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}

    data = {"eventstreams/events", "projections/rows"}
    view = {right for right in rights("refold-view") if right[0] in data}
    assert view == {(resource, verb) for resource in data for verb in ("get", "watch")}
    assert {right for right in rights("refold-edit") if right[0] in data} == {
        ("eventstreams/events", "create"),
        ("projections/rows", "update"),
    }


# --- admission webhook ---


def test_the_webhook_may_change_its_own_secret_and_configuration_and_look_for_streams() -> None:
    manifests = render(EMBEDDED)
    role = one(manifests, "Role", "refold-webhook")
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["refold-webhook"], "verbs": ["get", "patch"]}
    ]
    assert one(manifests, "ClusterRole", "refold-webhook")["rules"] == [
        {
            "apiGroups": ["admissionregistration.k8s.io"], "resources": ["validatingwebhookconfigurations"],
            "resourceNames": ["refold-webhook"], "verbs": ["get", "patch"],
        },
        {"apiGroups": ["refold.dev"], "resources": ["eventstreams"], "verbs": ["get"]},
    ]  # fmt: skip
    assert not {"data", "stringData"} & set(one(manifests, "Secret", "refold-webhook")), "they are the webhook's"


def test_in_named_namespaces_the_webhook_looks_for_streams_there_only() -> None:
    manifests = render(merged(EMBEDDED, at("tenants.namespaces", ["shop"])))
    rules = one(manifests, "ClusterRole", "refold-webhook")["rules"]
    assert [rule["apiGroups"] for rule in rules] == [["admissionregistration.k8s.io"]]
    role = one(manifests, "Role", "refold-webhook-tenant")
    assert role["metadata"]["namespace"] == "shop"
    assert role["rules"] == [{"apiGroups": ["refold.dev"], "resources": ["eventstreams"], "verbs": ["get"]}]


def test_the_webhook_is_asked_about_specs_of_our_kinds_and_nothing_else() -> None:
    manifests = render(EMBEDDED)
    (webhook,) = one(manifests, "ValidatingWebhookConfiguration", "refold-webhook")["webhooks"]
    (rule,) = webhook["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["refold.dev"], ["eventstreams", "projections"])
    assert set(rule["operations"]) == {"CREATE", "UPDATE"}
    assert [each["expression"] for each in webhook["matchConditions"]] == [
        "oldObject == null || object.spec != oldObject.spec"
    ]
    assert (webhook["failurePolicy"], webhook["sideEffects"]) == ("Ignore", "None")
    assert "caBundle" not in webhook["clientConfig"], "it is the webhook's, and an upgrade must leave it alone"


def test_the_api_server_finds_the_webhook_where_its_settings_say() -> None:
    manifests = render(EMBEDDED)
    settings = importlib.import_module("refold_operator.webhook.settings").Settings(namespace=NAMESPACE)
    (webhook,) = one(manifests, "ValidatingWebhookConfiguration", settings.webhook)["webhooks"]
    called = webhook["clientConfig"]["service"]
    assert f"{called['name']}.{called['namespace']}.svc" == settings.host
    (port,) = one(manifests, "Service", called["name"])["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (called["port"], settings.review_port)
    policy = one(manifests, "NetworkPolicy", "refold-webhook")["spec"]
    assert policy["ingress"] == [{"ports": [{"port": settings.review_port}]}]


def test_without_the_webhook_nothing_of_it_is_there() -> None:
    manifests = render(merged(EMBEDDED, at("webhook.enabled", False)))
    assert not [m["kind"] for m in manifests if m["metadata"]["name"] == "refold-webhook"]


# --- helm test ---


def test_what_the_test_makes_are_hooks_that_go_when_it_has_passed() -> None:
    made = [m for m in render(EMBEDDED) if m["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "test"]
    hooks = {m["kind"]: m["metadata"]["annotations"] for m in made if m["kind"] != "NetworkPolicy"}
    assert set(hooks) == {"ServiceAccount", "Role", "RoleBinding", "EventStream", "Projection", "Pod"}
    for annotations in hooks.values():
        assert annotations["helm.sh/hook"] == "test"
        assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    order = sorted(hooks, key=lambda kind: int(hooks[kind]["helm.sh/hook-weight"]))
    assert order[-3:] == ["EventStream", "Projection", "Pod"]


def test_the_test_appends_to_its_own_stream_and_reads_its_own_rows_and_may_nothing_else() -> None:
    manifests = render(EMBEDDED)
    pod = one(manifests, "Pod", "refold-test")["spec"]
    assert pod["automountServiceAccountToken"] is False
    (token,) = [volume["projected"]["sources"] for volume in pod["volumes"] if "projected" in volume]
    assert [source["serviceAccountToken"]["audience"] for source in token] == ["refold"]
    binding = one(manifests, "RoleBinding", "refold-test")
    assert [subject["name"] for subject in binding["subjects"]] == [pod["serviceAccountName"]]
    rights = {
        (resource, verb, name)
        for rule in one(manifests, "Role", "refold-test")["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule["resourceNames"]
    }
    stream, projection = (one(manifests, kind, "refold-test") for kind in ("EventStream", "Projection"))
    assert rights == {
        ("eventstreams/events", "create", stream["metadata"]["name"]),
        ("eventstreams/events", "get", stream["metadata"]["name"]),
        ("projections/rows", "get", projection["metadata"]["name"]),
    }
    assert stream["spec"]["deletionPolicy"] == projection["spec"]["deletionPolicy"] == "Delete"
    definition = Definition.model_validate({name: projection["spec"][name] for name in ("streams", "columns", "fold")})
    assert [rule.type for rule in definition.fold] == ["Tested"]


def test_with_tenants_the_test_makes_its_stream_where_refold_works() -> None:
    manifests = render(merged(EMBEDDED, at("tenants.namespaces", ["shop", "bank"])))
    for kind in ("Role", "RoleBinding", "EventStream", "Projection"):
        assert one(manifests, kind, "refold-test")["metadata"]["namespace"] == "shop"
    for kind in ("ServiceAccount", "Pod"):
        assert one(manifests, kind, "refold-test")["metadata"]["namespace"] == NAMESPACE
    assert one(manifests, "RoleBinding", "refold-test")["subjects"][0]["namespace"] == NAMESPACE
    (container,) = one(manifests, "Pod", "refold-test")["spec"]["containers"]
    told = {variable["name"]: variable["value"] for variable in container["env"]}
    assert told["REFOLD_STREAM"] == "shop/refold-test"
    assert told["REFOLD_QUERY_URL"] == "http://refold-test-query.shop.svc"
    assert told["REFOLD_EVENTSTORE_URL"] == f"http://refold-eventstore.{NAMESPACE}.svc"
    policy = one(manifests, "NetworkPolicy", "refold-test")["spec"]
    assert {"matchLabels": {"kubernetes.io/metadata.name": "shop"}} in [
        peer.get("namespaceSelector") for rule in policy["egress"] for peer in rule.get("to", [])
    ]


def test_the_test_finds_both_ends_and_is_let_through_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = render(EMBEDDED)
    (container,) = one(manifests, "Pod", "refold-test")["spec"]["containers"]
    assert container["command"][-1] == selftest.__name__
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    settings = selftest.Settings()  # type: ignore[call-arg]
    service = one(manifests, "Service", "refold-eventstore")
    assert settings.eventstore_url == f"http://{service['metadata']['name']}.{NAMESPACE}.svc"
    projection = resources.projection(
        merged(
            one(manifests, "Projection", "refold-test"),
            {"metadata": {"uid": "u", "generation": 1, "resourceVersion": "1"}},
        )
    )
    assert settings.query_url == children.url(projection)
    (to,) = [rule["to"] for rule in one(manifests, "NetworkPolicy", "refold-test")["spec"]["egress"] if "to" in rule]
    labels = children.query_service(projection)["spec"]["selector"] | {"app.kubernetes.io/part-of": "refold"}
    assert to[1]["podSelector"]["matchLabels"].items() <= labels.items()
    mounted = {volume["mountPath"] for volume in container["volumeMounts"]}
    assert str(settings.token_file.parent) in mounted


# --- network policies ---


@BOTH
def test_every_pod_is_denied_all_but_what_a_policy_of_its_own_allows(values: dict[str, Any]) -> None:
    manifests = render(values)
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    for name, template in pods(manifests):
        labels = template["metadata"]["labels"]
        matching = [p for p in policies if p["podSelector"]["matchLabels"].items() <= labels.items()]
        assert len(matching) == 2, name
        assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in matching)
        deny = [policy for policy in matching if not policy.get("ingress") and not policy.get("egress")]
        assert len(deny) == 1, name


def test_network_policies_allow_the_arrows_of_the_data_flow_only() -> None:
    manifests = render(EMBEDDED)
    labels = (
        {name: template["metadata"]["labels"] | {"namespace": NAMESPACE} for name, template in pods(manifests)}
        | {
            f"{part} of a tenant": {
                "app.kubernetes.io/part-of": "refold",
                "app.kubernetes.io/component": part,
                "namespace": "shop",
            }
            for part in ("projector", "query", "consumer")
        }
        | {
            "stranger": {"namespace": "shop"},
        }
    )

    def matches(peer: dict[str, Any], pod: dict[str, str]) -> bool:
        same = peer.get("namespaceSelector") == {} or pod["namespace"] == NAMESPACE
        return same and peer["podSelector"]["matchLabels"].items() <= pod.items()

    def allowed(rules: list[dict[str, Any]], direction: str, other: str, port: int | str) -> bool:
        return any(
            (direction not in rule or any(matches(peer, labels[other]) for peer in rule[direction]))
            and ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]])
            for rule in rules
        )

    policies = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"}
    servers: dict[str, int | str] = {
        "StatefulSet/refold-postgres": 5432,
        "StatefulSet/refold-kafka": 9092,
        "StatefulSet/refold-redis": 6379,
        "Deployment/refold-eventstore": "http",
    }
    arrows = set()
    for client in labels:
        for server, port in servers.items():
            leaves_ = (
                client.endswith("tenant")
                or client == "stranger"
                or allowed(policies[client.split("/")[1]].get("egress") or [], "to", server, port)
            )
            if leaves_ and allowed(policies[server.split("/")[1]]["ingress"], "from", client, port):
                arrows.add((client.split("/")[-1], server.split("/")[-1]))
    assert arrows == {
        ("refold-operator", "refold-postgres"),
        ("refold-operator", "refold-kafka"),
        ("refold-operator", "refold-redis"),
        ("refold-eventstore", "refold-postgres"),
        ("refold-test", "refold-eventstore"),
        ("refold-relay", "refold-postgres"),
        ("refold-relay", "refold-kafka"),
        *((f"{part} of a tenant", "refold-redis") for part in ("projector", "query")),
        *(
            (f"{part} of a tenant", server)
            for part in ("projector", "query", "consumer")
            for server in ("refold-postgres", "refold-kafka", "refold-eventstore")
        ),
        ("stranger", "refold-eventstore"),
    }


def test_the_operator_reaches_the_embedded_redis_whatever_is_said_of_others() -> None:
    policy = one(render(merged(EMBEDDED, at("networkPolicy.redisEgress", []))), "NetworkPolicy", "refold-operator")
    (rule,) = [rule for rule in policy["spec"]["egress"] if {"port": 6379} in rule["ports"]]
    (peer,) = rule["to"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "redis"


# --- embedded backends ---


def test_the_public_kafka_image_is_of_the_version_that_our_image_has() -> None:
    pom = (ROOT / "images" / "kafka" / "pom.xml").read_text()
    (version,) = re.findall(r"<kafka.version>(.*?)</kafka.version>", pom)
    assert DEFAULTS["embedded"]["kafka"]["image"].endswith(f"/kafka:{version}")


def test_the_public_postgres_image_is_of_the_version_that_our_image_has() -> None:
    dockerfile = (ROOT / "images" / "postgres" / "Dockerfile").read_text()
    (version,) = set(re.findall(r"postgresql-(\d+)", dockerfile))
    assert DEFAULTS["embedded"]["postgres"]["image"].endswith(f"/postgres:{version}")


def test_the_embedded_postgres_keeps_its_durability() -> None:
    settings = one(render(EMBEDDED), "ConfigMap", "refold-postgres")["data"]["postgresql.conf"]
    assert not re.search(r"^\s*(fsync|full_page_writes|synchronous_commit)\s*=", settings, re.MULTILINE)


def test_the_embedded_redis_keeps_every_batch_and_evicts_nothing() -> None:
    manifests = render(EMBEDDED)
    settings = one(manifests, "ConfigMap", "refold-redis")["data"]["redis.conf"].splitlines()
    assert {"appendonly yes", "appendfsync always", "maxmemory-policy noeviction"} <= set(settings)
    (redis,) = one(manifests, "StatefulSet", "refold-redis")["spec"]["template"]["spec"]["containers"]
    assert redis["command"][-2:] == ["--maxmemory", "256mb"]
    assert int(redis["resources"]["limits"]["memory"].removesuffix("Mi")) > 2 * 256


def test_the_public_redis_image_is_named_where_ours_tells_what_it_stands_for() -> None:
    image = DEFAULTS["embedded"]["redis"]["image"].removeprefix("docker.io/library/")
    assert f"`{image}`" in (ROOT / "images" / "redis" / "Dockerfile").read_text()


def test_the_embedded_kafka_advertises_the_address_that_clients_are_given() -> None:
    manifests = render(EMBEDDED)
    properties = one(manifests, "ConfigMap", "refold-kafka")["data"]["server.properties"]
    (relay,) = one(manifests, "Deployment", "refold-relay")["spec"]["template"]["spec"]["containers"]
    (bootstrap,) = [variable["value"] for variable in relay["env"] if variable["name"] == "REFOLD_KAFKA_BOOTSTRAP"]
    assert bootstrap == f"refold-kafka.{NAMESPACE}.svc:9092"
    assert f"advertised.listeners=CLIENT://{bootstrap}," in properties
    assert "auto.create.topics.enable=false" in properties


def test_start_scripts_pass_shellcheck() -> None:
    scripts = sorted(CHART.glob("files/*/*.sh"))
    assert len(scripts) == 4
    result = subprocess.run([ROOT / ".venv/bin/shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
