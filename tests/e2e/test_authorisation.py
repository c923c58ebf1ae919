"""Kubernetes decides who appends, reads and queries: with tokens of ServiceAccounts and Roles, on the real thing."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from hack.client import EVENT_STORE, NAMESPACE, eventually, kubectl, resource, token
from tests.e2e.conftest import Sandbox
from tests.e2e.orders import ORDER_STATUS, STREAM, changed
from tests.jwts import base64url, claims_of, signed

EVENT = {"id": "1", "type": "OrderPlaced", "data": {"total": 1}}
NODE = "refold-control-plane"


class Caller:
    """What a ServiceAccount's token can do."""

    def __init__(self, bearer: str) -> None:
        self._headers = {"Authorization": f"Bearer {bearer}"}

    def append(self, namespace: str, name: str = "orders") -> httpx.Response:
        path = f"{EVENT_STORE}/v1/streams/{namespace}/{name}/subjects/o1/events"
        return httpx.post(path, json={"events": [EVENT]}, headers=self._headers, trust_env=False, timeout=30)

    def read(self, namespace: str, name: str = "orders") -> httpx.Response:
        return self.get(f"{EVENT_STORE}/v1/streams/{namespace}/{name}/subjects/o1/events")

    def first_line(self, url: str) -> str:
        """Return how an answer that doesn't end begins."""
        with httpx.stream("GET", url, headers=self._headers, trust_env=False, timeout=30) as answer:
            return next(answer.iter_lines())

    def get(self, url: str) -> httpx.Response:
        return httpx.get(url, headers=self._headers, trust_env=False, timeout=30)


def role(namespace: str, account: str, *rules: dict[str, Any]) -> None:
    """Make a ServiceAccount with a Role of these rules in its namespace."""
    metadata = {"name": account, "namespace": namespace}
    rbac = "rbac.authorization.k8s.io"
    objects = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": metadata,
         "rules": [{"apiGroups": ["refold.dev"], **rule} for rule in rules]},
        {"apiVersion": f"{rbac}/v1", "kind": "RoleBinding", "metadata": metadata,
         "roleRef": {"apiGroup": rbac, "kind": "Role", "name": account},
         "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}]},
    ]  # fmt: skip
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))


@pytest.fixture(scope="module")
def shop() -> Any:
    """A namespace with two streams and two read models; `writer` and `reader` have rights on one of each."""
    sandbox = Sandbox("e2e-authorisation")
    other = changed(ORDER_STATUS)
    other["metadata"]["name"] = "secrets"
    payments = yaml.safe_load(STREAM)
    payments["metadata"]["name"] = "payments"
    sandbox.apply(STREAM, payments, ORDER_STATUS, other)
    role(sandbox.name, "writer", {"resources": ["eventstreams/events"], "resourceNames": ["orders"],
                                  "verbs": ["create", "get"]})  # fmt: skip
    role(
        sandbox.name, "reader",
        {"resources": ["eventstreams/events"], "resourceNames": ["orders"], "verbs": ["get"]},
        {"resources": ["projections/rows"], "resourceNames": ["order-status"], "verbs": ["get"]},
    )  # fmt: skip
    sandbox.rows = sandbox.read_model("order-status").base  # type: ignore[attr-defined]
    sandbox.secrets = sandbox.read_model("secrets").base  # type: ignore[attr-defined]
    yield sandbox
    sandbox.remove()


def test_a_caller_does_what_its_role_allows_and_no_more(shop: Any) -> None:
    writer, reader = Caller(token(shop.name, "writer")), Caller(token(shop.name, "reader"))
    assert writer.append(shop.name).status_code == 201
    assert reader.read(shop.name).json()["events"][0]["id"] == "1"
    assert eventually(lambda: reader.get(f"{shop.rows}/v1/rows/o1").status_code == 200, "the row is there")

    orders = f"{EVENT_STORE}/v1/streams/{shop.name}/orders"
    role(shop.name, "watcher", {"resources": ["eventstreams/events"], "verbs": ["watch"]})
    watcher = Caller(token(shop.name, "watcher"))
    assert watcher.first_line(f"{orders}/events:watch").startswith("retry:")

    who = f"system:serviceaccount:{shop.name}"
    for refused, name, why in [
        (reader.append(shop.name), "reader", "create eventstreams/events of 'orders'"),
        (writer.append(shop.name, "payments"), "writer", "create eventstreams/events of 'payments'"),
        (reader.read(shop.name, "payments"), "reader", "get eventstreams/events of 'payments'"),
        (writer.append("default"), "writer", "in the namespace 'default'"),
        (writer.append(shop.name, "nothing"), "writer", "create eventstreams/events of 'nothing'"),
        (reader.get(f"{orders}/events:watch"), "reader", "watch eventstreams/events of 'orders'"),
        (watcher.read(shop.name), "watcher", "get eventstreams/events of 'orders'"),
        (reader.get(f"{shop.secrets}/v1/rows/o1"), "reader", "get projections/rows of 'secrets'"),
        (writer.get(f"{shop.rows}/v1/rows/o1"), "writer", "get projections/rows of 'order-status'"),
        (writer.get(f"{shop.rows}/v1/status"), "writer", "get projections/rows of 'order-status'"),
    ]:
        assert refused.status_code == 403, refused.text
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["type"] == "https://refold.dev/problems/forbidden"
        assert refused.json()["caller"] == f"{who}:{name}"
        assert why in refused.json()["detail"]
    for service in (EVENT_STORE, shop.rows):
        assert writer.get(f"{service}/openapi.json").status_code == 200


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The key by which the cluster signs its ServiceAccounts' tokens, from the node."""
    found = subprocess.run(
        ["docker", "exec", NODE, "cat", "/etc/kubernetes/pki/sa.key"], capture_output=True, check=True
    )
    file = tmp_path_factory.mktemp("key") / "sa.key"
    file.write_bytes(found.stdout)
    return file


@pytest.mark.parametrize("service", ["event store", "query service"])
def test_a_token_that_expired_or_is_for_another_audience_or_was_revoked_is_refused(
    shop: Any, key: Path, service: str
) -> None:
    def ask(bearer: str) -> httpx.Response:
        caller = Caller(bearer)
        return caller.read(shop.name) if service == "event store" else caller.get(f"{shop.rows}/v1/rows/o1")

    good = token(shop.name, "reader")
    claims = claims_of(good)
    assert claims["aud"] == ["refold"]
    # What the test signs is as good as what the API server signs: only the time makes the difference.
    assert ask(signed(claims, key)).status_code in (200, 404)
    now = int(time.time())
    soon = signed(claims | {"exp": now + 3}, key)
    assert ask(soon).status_code in (200, 404)
    time.sleep(max(0.0, now + 3.1 - time.time()))

    kubectl("-n", shop.name, "create", "secret", "generic", "bound")
    uid = resource("secret", "bound", shop.name)["metadata"]["uid"]
    bound = token(
        shop.name, "reader", "--bound-object-kind=Secret", "--bound-object-name=bound", f"--bound-object-uid={uid}"
    )
    kubectl("-n", shop.name, "delete", "secret", "bound")
    other = kubectl("-n", shop.name, "create", "token", "reader").strip()
    forged = ".".join([*good.split(".")[:2], base64url(b"x" * 256)])
    for bearer, why in [
        (soon, "the bearer token has expired"),
        (
            signed(claims | {"exp": now - 3600, "iat": now - 7200, "nbf": now - 7200}, key),
            "the bearer token has expired",
        ),
        (other, "is for the audience https://kubernetes.default.svc"),
        (bound, "or was revoked"),
        (forged, "isn't one of this cluster"),
        ("no-token", "isn't one of this cluster"),
    ]:
        refused = ask(bearer)
        assert refused.status_code == 401, (why, refused.text)
        assert why in refused.json()["detail"]
        assert refused.headers["www-authenticate"] == 'Bearer realm="refold", error="invalid_token"'


def test_metrics_are_for_who_may_get_the_path_with_a_token_of_the_cluster_itself(shop: Any) -> None:
    kubectl("-n", shop.name, "create", "serviceaccount", "prometheus")
    binding = f"{shop.name}-metrics"
    kubectl("create", "clusterrole", binding, "--verb=get", "--non-resource-url=/metrics")
    try:
        scraper = Caller(kubectl("-n", shop.name, "create", "token", "prometheus").strip())
        subject = f"--serviceaccount={shop.name}:prometheus"
        kubectl("create", "clusterrolebinding", binding, f"--clusterrole={binding}", subject)
        for service in (EVENT_STORE, shop.rows):
            assert "refold_http_request_seconds" in scraper.get(f"{service}/metrics").text
            assert scraper.get(f"{service}/openapi.json").status_code == 401
            wrong = Caller(kubectl("-n", shop.name, "create", "token", "reader").strip()).get(f"{service}/metrics")
            assert (wrong.status_code, "nonResourceURLs" in wrong.json()["detail"]) == (403, True)
    finally:
        kubectl("delete", "clusterrolebinding,clusterrole", binding)


def test_the_operator_may_bind_the_one_role_and_touch_the_one_binding_only() -> None:
    operator = f"--as=system:serviceaccount:{NAMESPACE}:refold-operator"

    def may(*asked: str) -> bool:
        return kubectl("auth", "can-i", *asked, operator, "-A", check=False).startswith("yes")

    assert may("patch", "clusterrolebindings/refold-query")
    assert may("bind", "clusterroles/system:auth-delegator")
    for refused in [
        ("create", "clusterrolebindings"), ("delete", "clusterrolebindings/refold-query"),
        ("patch", "clusterrolebindings/cluster-admin"), ("bind", "clusterroles/cluster-admin"),
        ("escalate", "clusterroles"), ("create", "tokenreviews.authentication.k8s.io"),
        ("create", "serviceaccounts", "--subresource=token"),
    ]:  # fmt: skip
        assert not may(*refused), refused


def test_query_services_have_an_account_each_that_goes_with_its_projection(shop: Any) -> None:
    def subjects() -> set[tuple[str, str]]:
        found = resource("clusterrolebinding", "refold-query", "default").get("subjects", [])
        return {(one["namespace"], one["name"]) for one in found}

    ours = {(shop.name, "order-status-query"), (shop.name, "secrets-query")}
    assert ours <= subjects()
    pods = json.loads(kubectl("-n", shop.name, "get", "pods", "-o", "json"))["items"]
    mounts = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: [
            volume["name"] for volume in pod["spec"]["volumes"] if "projected" in volume
        ]
        for pod in pods
    }
    assert len(mounts["query"]) == 1
    assert mounts["projector"] == []
    kubectl("-n", shop.name, "delete", "projection", "secrets", "--timeout=60s")
    assert ours & subjects() == {(shop.name, "order-status-query")}
