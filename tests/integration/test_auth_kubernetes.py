"""Authorisation by a real Kubernetes API server with RBAC: tokens, roles, outages, over HTTP.

Needs the kube-apiserver and etcd that hack/kind builds on machines without a container registry; elsewhere tests/e2e
covers the same on a kind cluster.
"""

import asyncio
import itertools
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from refold.web.app import App
from refold.web.auth import kubernetes, reviews
from refold.web.auth.access import EVENTS, ResourceAccess
from refold.web.auth.kubernetes import Kubernetes
from refold.web.auth.reviews import Reviews, User
from refold.web.openapi import Operation
from starlette.requests import Request
from starlette.responses import Response

from hack.servers import kubernetes_api
from hack.servers.kubernetes_api import ApiServer
from tests.jwts import base64url, claims_of, signed
from tests.served import Served, serve

pytestmark = pytest.mark.skipif(
    kubernetes_api.programs() is None, reason="no kube-apiserver and etcd in the cache: see hack/kind"
)
RBAC = "rbac.authorization.k8s.io"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    """An API server with the namespaces `shop` and `refold-system`, where the service's account may ask."""
    server = ApiServer()
    server.start()
    for namespace in ("shop", "refold-system"):
        server.kubectl("create", "namespace", namespace)
    server.kubectl("-n", "refold-system", "create", "serviceaccount", "service")
    server.kubectl(
        "create", "clusterrolebinding", "service", "--clusterrole=system:auth-delegator",
        "--serviceaccount=refold-system:service",
    )  # fmt: skip
    yield server
    server.remove()


@pytest.fixture
def mount(api: ApiServer, tmp_path: Path) -> Path:
    """What Kubernetes mounts for a pod's account."""
    (tmp_path / "token").write_text(api.kubectl("-n", "refold-system", "create", "token", "service"))
    (tmp_path / "ca.crt").write_bytes(api.authority.read_bytes())
    return tmp_path


@pytest.fixture
def asked(api: ApiServer, mount: Path) -> Reviews:
    return Reviews(f"https://127.0.0.1:{api.port}", mount)


@pytest.fixture
def served(asked: Reviews) -> Iterator[Served]:
    """A service with an operation for each verb."""

    async def answer(_: Request) -> Response:
        return Response(b"done")

    async def ready() -> str | None:
        return None

    def resource(request: Request) -> tuple[str, str]:
        return request.path_params["namespace"], request.path_params["name"]

    operations = [
        Operation(
            method, f"/{verb}/{{namespace}}/{{name}}", answer, summary=verb, verb=verb, answer={"text/plain": str}
        )
        for verb, method in (("create", "POST"), ("get", "GET"), ("watch", "GET"))
    ]  # type: ignore[misc]
    app = App("Test", operations, authority=Kubernetes(asked), kind=EVENTS, resource=resource, ready=ready)
    with serve(app) as found:
        yield found


class Account:
    """A ServiceAccount of `shop` with a Role of its own."""

    def __init__(self, api: ApiServer, *verbs: str, names: tuple[str, ...] = ("orders",)) -> None:
        self.name = f"account-{next(_numbers)}"
        self._api = api
        api.kubectl("-n", "shop", "create", "serviceaccount", self.name)
        if verbs:
            self.allow(*verbs, names=names)

    def allow(self, *verbs: str, names: tuple[str, ...] = ("orders",)) -> None:
        metadata = {"name": self.name, "namespace": "shop"}
        rule = {"apiGroups": ["refold.dev"], "resources": [EVENTS], "verbs": [*verbs], "resourceNames": [*names]}
        self._api.apply(
            {"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": metadata, "rules": [rule]},
            {"apiVersion": f"{RBAC}/v1", "kind": "RoleBinding", "metadata": metadata,
             "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": self.name},
             "subjects": [{"kind": "ServiceAccount", "name": self.name, "namespace": "shop"}]},
        )  # fmt: skip

    def token(self, *options: str) -> str:
        options = options or ("--audience=refold",)
        return self._api.kubectl("-n", "shop", "create", "token", self.name, *options)


def test_each_verb_namespace_and_name_is_asked_for_on_its_own(api: ApiServer, served: Served) -> None:
    token = Account(api, "create", "get").token()
    assert served.ask("/create/shop/orders", "POST", token=token).status == 200
    assert served.ask("/get/shop/orders", token=token).status == 200
    for path in ("/watch/shop/orders", "/get/shop/payments", "/get/refold-system/orders", "/get/nowhere/orders"):
        refused = served.ask(path, token=token)
        assert (refused.status, refused.json()["type"]) == (403, "https://refold.dev/problems/forbidden")
    assert served.ask("/nothing", token=token).status == 404
    assert served.ask("/nothing").status == 401
    assert served.ask("/openapi.json", token=token).status == 200


def test_the_role_that_a_refusal_names_is_what_the_caller_lacks(api: ApiServer, served: Served) -> None:
    account = Account(api)
    token = account.token()
    refused = served.ask("/watch/shop/orders", token=token).json()
    assert refused["caller"] == f"system:serviceaccount:shop:{account.name}"
    rule = json.loads(refused["detail"][refused["detail"].index("{") :])
    metadata = {"name": account.name, "namespace": "shop"}
    api.apply({"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": metadata, "rules": [rule]})
    api.kubectl("-n", "shop", "create", "rolebinding", account.name, f"--role={account.name}",
                f"--serviceaccount=shop:{account.name}")  # fmt: skip
    # Another token of the same account is another user for the API server (its id is in `extra`), so nothing is kept.
    until(lambda: served.ask("/watch/shop/orders", token=account.token()).status == 200)


def test_tokens_that_are_not_for_refold_expired_forged_or_revoked_are_refused(api: ApiServer, served: Served) -> None:
    account = Account(api, "get")
    good = account.token()
    claims = claims_of(good)
    now = int(time.time())

    def ask(token: str) -> int:
        return served.ask("/get/shop/orders", token=token).status

    assert [ask(good), ask(signed(claims, api.key))] == [200, 200]
    assert ask(signed(claims | {"exp": now - 60, "iat": now - 900, "nbf": now - 900}, api.key)) == 401
    assert ask(account.token("--duration=10m")) == 401, "for the API server itself"
    assert ask(account.token("--audience=other")) == 401
    assert ask(account.token("--audience=other", "--audience=refold")) == 200
    assert ask(".".join([*good.split(".")[:2], base64url(b"x" * 256)])) == 401
    assert ask(kubernetes_api.TOKEN) == 401, "the administrator's own, which knows no audience"
    api.kubectl("-n", "shop", "create", "secret", "generic", account.name)
    bound = account.token("--audience=refold", "--bound-object-kind=Secret", f"--bound-object-name={account.name}")
    api.kubectl("-n", "shop", "delete", "secret", account.name)
    assert ask(bound) == 401
    api.kubectl("-n", "shop", "delete", "serviceaccount", account.name)
    assert ask(good) == 200, "remembered"
    assert ask(signed(claims | {"iat": now - 1}, api.key)) == 401


async def test_the_api_server_itself_refuses_an_expired_token(api: ApiServer, asked: Reviews) -> None:
    account = Account(api)
    claims = claims_of(account.token())
    now = int(time.time())
    assert await asked.whose(signed(claims, api.key), "refold") == User(
        f"system:serviceaccount:shop:{account.name}", claims["kubernetes.io"]["serviceaccount"]["uid"],
        ("system:serviceaccounts", "system:serviceaccounts:shop", "system:authenticated"),
        (("authentication.kubernetes.io/credential-id", (f"JTI={claims['jti']}",)),),
    )  # fmt: skip
    # Beyond the minute of grace that it gives for clocks that differ.
    old = claims | {"exp": now - 120, "iat": now - 900, "nbf": now - 900}
    assert await asked.whose(signed(old, api.key), "refold") is None
    assert await asked.whose(account.token("--duration=10m"), "refold") is None
    assert await asked.whose(kubernetes_api.TOKEN, "refold") is None
    administrator = await asked.whose(kubernetes_api.TOKEN, None)
    assert administrator is not None
    assert administrator.name == "admin"
    assert await asked.may(administrator, ResourceAccess("create", EVENTS, "shop", "orders"))
    await asked.close()


def test_a_right_counts_and_ends_within_its_time(
    api: ApiServer, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "YES_SECONDS", 1.0)
    monkeypatch.setattr(kubernetes, "NO_SECONDS", 0.5)
    account = Account(api)
    token = account.token()
    assert served.ask("/get/shop/orders", token=token).status == 403
    account.allow("get")
    until(lambda: served.ask("/get/shop/orders", token=token).status == 200)
    api.kubectl("-n", "shop", "delete", "rolebinding", account.name)
    until(lambda: served.ask("/get/shop/orders", token=token).status == 403)


async def test_a_herd_of_requests_makes_two_reviews(api: ApiServer, served: Served) -> None:
    token = await asyncio.to_thread(Account(api, "get").token)
    before = reviewed()
    async with httpx.AsyncClient(base_url=served.url, trust_env=False, timeout=30) as client:
        headers = {"authorization": f"Bearer {token}"}
        answers = await asyncio.gather(*(client.get("/get/shop/orders", headers=headers) for _ in range(100)))
    assert {answer.status_code for answer in answers} == {200}
    assert {kind: count - before.get(kind, 0) for kind, count in reviewed().items()} == {
        "TokenReview": 1, "SubjectAccessReview": 1,
    }  # fmt: skip


async def test_a_flood_of_unknown_tokens_reaches_the_api_server_in_small_portions_and_holds_up_nobody_who_is_known(
    api: ApiServer, served: Served
) -> None:
    token = await asyncio.to_thread(Account(api, "get", "watch").token)
    known = {"authorization": f"Bearer {token}"}
    limits = httpx.Limits(max_connections=400)
    async with httpx.AsyncClient(base_url=served.url, trust_env=False, timeout=30, limits=limits) as client:
        assert (await client.get("/get/shop/orders", headers=known)).status_code == 200
        # While the API server answers nobody, the first portion waits for it, and the others for the first.
        with api.frozen():
            junk = [
                asyncio.ensure_future(
                    client.get("/get/shop/orders", headers={"authorization": f"Bearer junk-{number}"})
                )
                for number in range(300)
            ]
            await asyncio.sleep(0)
            assert (await client.get("/get/shop/orders", headers=known)).status_code == 200
            assert not any(one.done() for one in junk)
            new_right = asyncio.ensure_future(client.get("/watch/shop/orders", headers=known))
            await asyncio.sleep(1)
        assert (await new_right).status_code == 200, "a right not asked for yet"
        overtaken = sum(not one.done() for one in junk)
        answers = await asyncio.gather(*junk)
    assert overtaken > 0
    assert {answer.status_code for answer in answers} == {401}


def reviewed() -> dict[str, float]:
    (family,) = reviews._REVIEWS.collect()
    counts = [one for one in family.samples if one.name.endswith("_count") and one.labels["outcome"] == "answered"]
    return {one.labels["review"]: one.value for one in counts}


def test_while_the_api_server_is_away_what_it_decided_holds_and_afterwards_it_is_asked_again(
    api: ApiServer, served: Served
) -> None:
    account = Account(api, "get")
    token, new = account.token(), account.token()
    assert served.ask("/get/shop/orders", token=token).status == 200
    api.stop_server()
    try:
        with structlog.testing.capture_logs() as logged:
            assert served.ask("/get/shop/orders", token=token).status == 200
            for other in (served.ask("/get/shop/orders", token=new), served.ask("/watch/shop/orders", token=token)):
                assert (other.status, other.headers["retry-after"]) == (503, "1")
                assert other.json()["type"] == "https://refold.dev/problems/authorisation-unavailable"
            assert served.ask("/healthz").status == served.ask("/readyz").status == 200
        assert [entry["log_level"] for entry in logged] == ["error"]
        assert token not in str(logged)
    finally:
        api.start_server()
    until(lambda: served.ask("/get/shop/orders", token=new).status == 200)


@pytest.fixture
async def lonely(api: ApiServer, mount: Path) -> AsyncIterator[Reviews]:
    """The connection of an account that nobody gave the right to ask."""
    await asyncio.to_thread(api.kubectl, "-n", "refold-system", "create", "serviceaccount", "lonely")
    own = await asyncio.to_thread(api.kubectl, "-n", "refold-system", "create", "token", "lonely")
    (mount / "token").write_text(own)
    found = Reviews(f"https://127.0.0.1:{api.port}", mount)
    yield found
    await found.close()


async def test_a_service_that_may_not_ask_says_which_role_it_lacks_and_goes_on_once_it_has_it(
    api: ApiServer, lonely: Reviews, mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reviews, "PAUSE_SECONDS", 0.0)
    with pytest.raises(reviews.UnavailableError, match="bind the ClusterRole system:auth-delegator to it"):
        await lonely.whose("anything", "refold")
    (mount / "token").write_text("not-ours")
    with pytest.raises(reviews.UnavailableError, match="doesn't know this pod's service account"):
        await lonely.whose("anything", "refold")
    # The kubelet puts a new token there, and a new authority: both are read again.
    own = await asyncio.to_thread(api.kubectl, "-n", "refold-system", "create", "token", "service")
    (mount / "token").write_text(own)
    assert await lonely.whose("anything", "refold") is None
    right = api.authority.read_bytes()
    (mount / "ca.crt").write_bytes(await asyncio.to_thread(authority_of_another_cluster))
    with pytest.raises(reviews.UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        await lonely.whose("anything", "refold")
    (mount / "ca.crt").write_bytes(right)
    assert await lonely.whose("anything", "refold") is None


def authority_of_another_cluster() -> bytes:
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=other", "-keyout", os.devnull]
    return subprocess.run(request, check=True, capture_output=True).stdout


def until(look: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
