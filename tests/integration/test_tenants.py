"""An operator of named namespaces: with the chart's Roles alone, on a real API server, Kafka and PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hack.servers import Kafka, Postgres, kubernetes_api
from hack.servers.kubernetes_api import ApiServer
from tests.charts import EMBEDDED, NAMESPACE, at, merged, render
from tests.operating import ROOT, Operator, becomes, event_stream, live, names, projection, ready, until

TENANTS = ["bank", "shop"]
PREFIXES = '{"shop": ["legacy-"]}'
VALUES = merged(EMBEDDED, at("tenants.namespaces", TENANTS))
pytestmark = pytest.mark.skipif(
    kubernetes_api.programs() is None, reason="no kube-apiserver and etcd in the cache: see hack/kind"
)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    server = ApiServer()
    server.start()
    server.kubectl("apply", "-f", str(ROOT / "crds"))
    for namespace in (NAMESPACE, "elsewhere", *TENANTS):
        server.kubectl("create", "namespace", namespace)
    rights = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
    server.apply(*(manifest for manifest in render(VALUES) if manifest["kind"] in rights))
    yield server
    server.remove()


@pytest.fixture(scope="module")
def kubeconfig(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the operator's ServiceAccount, which has no rights but those of the chart."""
    token = api.kubectl("create", "token", "refold-operator", "-n", NAMESPACE, "--duration=1h")
    found = yaml.safe_load(api.kubeconfig.read_text())
    found["users"][0]["user"]["token"] = token
    file = tmp_path_factory.mktemp("operator") / "kubeconfig"
    file.write_text(yaml.safe_dump(found))
    return file


@pytest.fixture(scope="module")
def operator(api: ApiServer, kubeconfig: Path, postgres: Postgres, kafka: Kafka) -> Iterator[Operator]:
    operator = Operator(
        api, postgres, kafka, ("tenants_store", "tenants_reads"), KUBECONFIG=str(kubeconfig),
        REFOLD_NAMESPACES='["bank", "shop"]', REFOLD_TOPIC_PREFIXES=PREFIXES,
    )  # fmt: skip
    operator.start()
    yield operator
    operator.stop()
    assert "Traceback" not in operator.log, operator.log[-4000:]
    assert "forbidden" not in operator.log, "it asks for nothing that it has no right to"


def test_the_operator_works_in_its_namespaces_and_in_no_other(api: ApiServer, operator: Operator) -> None:
    account = f"--as=system:serviceaccount:{NAMESPACE}:refold-operator"
    assert api.kubectl("auth", "can-i", "list", "secrets", "-A", account, check=False).startswith("no")
    api.apply(event_stream("elsewhere"), event_stream("bank"), event_stream("shop"), projection("shop"))
    for namespace in TENANTS:
        becomes(api, "eventstream", namespace, "orders", "True", "Active")
    becomes(api, "projection", "shop", "status", "False", "QueryStarting")
    assert names(api, "deployments", "shop") == {"status-query", f"status-projector-{live(api, 'shop')}"}
    untouched = api.get("eventstream", "orders", "-n", "elsewhere")
    assert "status" not in untouched
    assert "finalizers" not in untouched["metadata"]


def test_a_stream_in_the_releases_own_namespace_is_told_that_nobody_works_there(
    api: ApiServer, operator: Operator
) -> None:
    api.apply(event_stream(NAMESPACE))
    becomes(api, "eventstream", NAMESPACE, "orders", "False", "NamespaceNotAllowed")


def test_a_topic_that_is_for_another_namespace_isnt_made(api: ApiServer, operator: Operator) -> None:
    api.apply(
        event_stream("bank", "squatter", topic={"name": "shop.invoices"}),
        event_stream("shop", "old", topic={"name": "legacy-orders"}),
    )
    becomes(api, "eventstream", "bank", "squatter", "False", "TopicNotAllowed")
    becomes(api, "eventstream", "shop", "old", "True", "Active")
    api.apply(event_stream("shop", "invoices"))
    becomes(api, "eventstream", "shop", "invoices", "True", "Active")
    assert ready(api, "eventstream", "bank", "squatter") == ("False", "TopicNotAllowed")


def test_who_wants_anothers_topic_waits_until_it_is_gone(api: ApiServer, operator: Operator) -> None:
    api.apply(event_stream("shop", "first", deletionPolicy="Delete"))
    becomes(api, "eventstream", "shop", "first", "True", "Active")
    api.apply(event_stream("shop", "second", topic={"name": "shop.first"}))
    becomes(api, "eventstream", "shop", "second", "False", "TopicConflict")
    api.kubectl("delete", "eventstream/first", "-n", "shop", "--timeout=60s")
    becomes(api, "eventstream", "shop", "second", "True", "Active")


def test_a_deletion_ends_and_a_child_that_is_gone_is_made_again(api: ApiServer, operator: Operator) -> None:
    api.kubectl("delete", "service", "status-query", "-n", "shop")
    until(lambda: "status-query" in names(api, "services", "shop"))
    api.kubectl("delete", "projection/status", "eventstream/orders", "-n", "shop", "--timeout=60s")
