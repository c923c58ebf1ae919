"""The admission webhook before a real API server: what the chart makes, the whole corpus of specs, rotation, outages.

Needs the kube-apiserver and etcd that hack/kind builds on machines without a container registry, and helm. There are no
pods here: the Service is one of type ExternalName that leads to this machine, where the webhook's process runs as the
ServiceAccount that the chart makes. The API server verifies its certificate as it does on a cluster.
"""

import base64
import functools
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from hack.servers import kubernetes_api
from hack.servers.kubernetes_api import TOKEN, ApiServer
from hack.servers.process import Process, cache, free_port
from tests.specs import INVALID, VALID, Refused

ROOT = Path(__file__).parents[2]
SYSTEM = "refold-system"
CONFIGURATION = "admissionregistration.k8s.io/v1/validatingwebhookconfigurations/refold-webhook"
NAMESPACED = "refold.dev/v1alpha1/namespaces/shop"
PLURALS = {"EventStream": "eventstreams", "Projection": "projections"}
HELM = shutil.which("helm", path=f"{cache() / 'bin'}:{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(
    kubernetes_api.programs() is None or HELM is None,
    reason="no kube-apiserver, etcd and helm in the cache: see hack/kind",
)


@functools.cache
def chart() -> dict[str, dict[str, Any]]:
    """Return what the chart makes for the webhook, by kind."""
    assert HELM is not None
    values = ("embedded.enabled=true", "webhook.failurePolicy=Fail")
    made = subprocess.run(
        [HELM, "template", "refold", ROOT / "charts" / "refold", "-n", SYSTEM, "--kube-version=1.34.0",
         *(f"--set={value}" for value in values)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = [one for one in yaml.safe_load_all(made) if one and one["metadata"]["name"] == "refold-webhook"]
    return {one["kind"]: one for one in found}


class Webhook:
    """One replica, as the chart's Deployment starts it, with the rights of its ServiceAccount."""

    def __init__(self, api: ApiServer, **environment: str) -> None:
        self.port, self._probes = free_port(), free_port()
        folder = Path(tempfile.mkdtemp(prefix="refold-webhook-"))
        template = chart()["Deployment"]["spec"]["template"]["spec"]
        config = yaml.safe_load(api.kubeconfig.read_text())
        token = api.kubectl("-n", SYSTEM, "create", "token", template["serviceAccountName"])
        config["users"] = [{"name": "admin", "user": {"token": token}}]
        (folder / "kubeconfig").write_text(yaml.safe_dump(config))
        (container,) = template["containers"]
        fields = {"metadata.namespace": SYSTEM}
        self._process = Process(
            [str(Path(sys.executable).with_name("refold")), *container["args"]],  # the image's entry point
            folder / "log",
            env={
                **{
                    one["name"]: one["value"] if "value" in one else fields[one["valueFrom"]["fieldRef"]["fieldPath"]]
                    for one in container["env"]
                },
                "KUBECONFIG": str(folder / "kubeconfig"),
                "REFOLD_REVIEW_PORT": str(self.port),
                "REFOLD_PORT": str(self._probes),
                "REFOLD_LOOK_SECONDS": "0.3",
                **environment,
            },
        )

    def start(self) -> None:
        self._process.start(self.ready)

    def kill(self) -> None:
        self._process.kill()

    def stop(self) -> None:
        self._process.stop()

    def ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self._probes}/readyz").is_success
        except httpx.TransportError:
            return False

    def shown(self, authorities: str) -> str:
        """Return the certificate that it shows, as PEM, to who trusts `authorities` (PEM) and knows it by its Service.

        Raises:
            ssl.SSLCertVerificationError: nobody of them has signed it.
        """
        trusting = ssl.create_default_context(cadata=authorities)
        with (
            socket.create_connection(("127.0.0.1", self.port)) as sock,
            trusting.wrap_socket(sock, server_hostname=f"refold-webhook.{SYSTEM}.svc") as tls,
        ):
            certificate = tls.getpeercert(binary_form=True)
        assert certificate is not None
        return ssl.DER_cert_to_PEM_cert(certificate)

    @property
    def log(self) -> str:
        return self._process.log.read_text()


class Client:
    """Creates and changes objects as an administrator, over one connection, without kubectl's own time."""

    def __init__(self, api: ApiServer) -> None:
        context = ssl.create_default_context(cafile=str(api.authority))
        self._http = httpx.Client(
            base_url=f"https://127.0.0.1:{api.port}/apis/", verify=context, timeout=30,
            headers={"authorization": f"Bearer {TOKEN}"},
        )  # fmt: skip

    def create(self, resource: dict[str, Any], *, dry_run: bool = True) -> httpx.Response:
        return self._send("POST", PLURALS[resource["kind"]], resource, dry_run)

    def change(self, former: dict[str, Any], resource: dict[str, Any], *, dry_run: bool = True) -> httpx.Response:
        kind, name = resource["kind"], resource["metadata"]["name"]
        version = former["metadata"]["resourceVersion"]
        changed = {**resource, "metadata": {**resource["metadata"], "resourceVersion": version}}
        return self._send("PUT", f"{PLURALS[kind]}/{name}", changed, dry_run)

    def delete(self, resource: dict[str, Any]) -> None:
        path = f"{NAMESPACED}/{PLURALS[resource['kind']]}/{resource['metadata']['name']}"
        self._http.delete(path).raise_for_status()

    @property
    def authorities(self) -> str:
        """Whom the API server was told to trust, as PEM."""
        (webhook,) = self._http.get(CONFIGURATION).raise_for_status().json()["webhooks"]
        return base64.b64decode(webhook["clientConfig"].get("caBundle", "")).decode()

    def ask(self, webhook: Webhook, failure_policy: str = "Fail") -> None:
        """Let the API server ask this replica; what it trusts stays."""
        changes = [
            {"op": "replace", "path": "/webhooks/0/clientConfig/service/port", "value": webhook.port},
            {"op": "replace", "path": "/webhooks/0/failurePolicy", "value": failure_policy},
        ]
        content_type = {"content-type": "application/json-patch+json"}
        self._http.patch(CONFIGURATION, content=json.dumps(changes), headers=content_type).raise_for_status()

    def _send(self, method: str, path: str, body: dict[str, Any], dry_run: bool) -> httpx.Response:
        query = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        return self._http.request(method, f"{NAMESPACED}/{path}", json=body, params=query)


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    server.start()
    server.kubectl("apply", "-f", str(ROOT / "crds"))
    for namespace in (SYSTEM, "shop"):
        server.kubectl("create", "namespace", namespace)
    made = chart()
    server.apply(
        *(made[kind] for kind in ("ServiceAccount", "Secret", "Role", "RoleBinding", "ClusterRole")),
        *(made[kind] for kind in ("ClusterRoleBinding", "ValidatingWebhookConfiguration")),
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "refold-webhook", "namespace": SYSTEM},
            "spec": {"type": "ExternalName", "externalName": "localhost"},
        },
    )  # fmt: skip
    yield server
    server.remove()


@pytest.fixture(scope="module")
def webhook(api: ApiServer) -> Iterator[Webhook]:
    webhook = Webhook(api)
    Client(api).ask(webhook)
    webhook.start()
    yield webhook
    webhook.stop()


@pytest.fixture
def client(api: ApiServer, webhook: Webhook) -> Client:
    client = Client(api)
    until(lambda: client.create(VALID["stream-of-one-partition"]).is_success)
    return client


def until(look: Any, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def denied(answer: httpx.Response) -> bool:
    return 'admission webhook "admission.refold.dev" denied the request' in answer.json()["message"]


def away(answer: httpx.Response) -> bool:
    return 'failed calling webhook "admission.refold.dev"' in answer.json().get("message", "")


def why_not_as_expected(client: Client, refused: Refused) -> str | None:
    """Return what is wrong with the answer to a spec that must be refused; None where nothing is."""
    if refused.former is None:
        answer = client.create(refused.resource)
    else:
        made = client.create(refused.former, dry_run=False)
        if not made.is_success:
            return f"{refused.name}: the former one was refused: {made.json()['message']}"
        try:
            answer = client.change(made.json(), refused.resource)
        finally:
            client.delete(refused.former)
    if answer.is_success:
        return f"{refused.name}: was taken"
    message = answer.json()["message"]
    if refused.field not in message or refused.says not in message:
        return f"{refused.name}: {refused.field} and {refused.says!r} aren't in: {message}"
    if denied(answer) != (refused.by == "guard"):
        return f"{refused.name}: isn't refused by {refused.by}: {message}"
    return None


def test_every_invalid_spec_of_the_corpus_is_refused_with_a_message_that_names_its_field(client: Client) -> None:
    found = [why for refused in INVALID.values() if (why := why_not_as_expected(client, refused)) is not None]
    assert not found, "\n".join(found)


def test_every_valid_spec_of_the_corpus_is_taken_and_streams_that_are_not_there_are_warnings(client: Client) -> None:
    for name, resource in VALID.items():
        answer = client.create(resource)
        assert answer.is_success, f"{name}: {answer.text}"
        warned = "there is no EventStream" in answer.headers.get("warning", "")
        assert warned == (resource["kind"] == "Projection"), name
    stream = VALID["stream-of-one-partition"]
    client.create(stream, dry_run=False).raise_for_status()
    try:
        assert "warning" not in client.create(VALID["projection-of-one-text"]).headers
    finally:
        client.delete(stream)


def test_kubectl_shows_what_is_wrong_before_anything_is_applied(api: ApiServer, client: Client) -> None:
    def dry_run(resource: dict[str, Any]) -> str:
        manifest = {**resource, "metadata": {**resource["metadata"], "namespace": "shop"}}
        return api.kubectl("apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(manifest), check=False)

    assert "created (server dry run)" in dry_run(VALID["projection-of-one-text"])
    said = dry_run(INVALID["expression-wrong-on-its-second-line"].resource)
    assert 'The Projection "order-status" is invalid: spec.fold[1].set.status: line 2, column 3: expected' in said


def test_the_webhook_has_no_rights_but_its_own(api: ApiServer, client: Client) -> None:
    account = f"--as=system:serviceaccount:{SYSTEM}:refold-webhook"

    def may(*question: str) -> bool:
        return api.kubectl("auth", "can-i", *question, account, check=False).split("\n")[-1] == "yes"

    assert may("patch", "secrets/refold-webhook", "-n", SYSTEM)
    assert may("get", "eventstreams.refold.dev", "-n", "shop")
    for question in (
        ("create", "secrets", "-n", SYSTEM), ("get", "secrets/refold-relay", "-n", SYSTEM),
        ("list", "secrets", "-n", SYSTEM), ("get", "secrets", "-n", "shop"),
        ("create", "validatingwebhookconfigurations"), ("patch", "validatingwebhookconfigurations/other"),
        ("get", "projections.refold.dev", "-n", "shop"), ("patch", "eventstreams.refold.dev", "-n", "shop"),
    ):  # fmt: skip
        assert not may(*question), question


def test_killed_it_keeps_nothing_from_being_deleted_and_the_failure_policy_decides_on_the_rest(
    api: ApiServer, client: Client, webhook: Webhook
) -> None:
    stream, projection = VALID["stream-of-one-partition"], VALID["projection-of-one-text"]
    client.create(stream, dry_run=False).raise_for_status()
    shown = webhook.shown(client.authorities)
    webhook.kill()
    try:
        until(lambda: away(client.create(projection)))
        api.kubectl("-n", "shop", "label", "eventstream", "orders", "look=again")
        api.kubectl(
            "-n", "shop", "patch", "eventstream", "orders", "--type=merge", "-p", '{"metadata": {"finalizers": []}}'
        )
        client.delete(stream)
        client.ask(webhook, "Ignore")
        until(lambda: client.create(INVALID["column-unknown"].resource).is_success)
        assert not client.create(INVALID["partitions-none"].resource).is_success, "the CRDs' rules are always there"
    finally:
        client.ask(webhook)
        webhook.start()
    assert webhook.shown(client.authorities) == shown, "started again it takes what its Secret holds"
    until(lambda: denied(client.create(INVALID["column-unknown"].resource)))


def test_two_replicas_begin_together_and_replace_their_authority_without_a_single_refusal(
    api: ApiServer, client: Client, webhook: Webhook
) -> None:
    """The Secret is emptied; lives of seconds instead of months; a client creates all the time."""
    former = webhook.shown(client.authorities)
    webhook.stop()
    lives = {
        "REFOLD_AUTHORITY_SECONDS": "36", "REFOLD_CERTIFICATE_SECONDS": "18", "REFOLD_OVERLAP_SECONDS": "3",
        "REFOLD_LOOK_SECONDS": "0.2",
    }  # fmt: skip
    empty = json.dumps({"data": dict.fromkeys(["ca.crt", "ca.key", "tls.crt", "tls.key"])})
    api.kubectl("-n", SYSTEM, "patch", "secret", "refold-webhook", "--type=merge", "-p", empty)
    replicas = [Webhook(api, **lives), Webhook(api, **lives)]
    client.ask(replicas[0])
    try:
        with ThreadPoolExecutor() as threads:
            for started in [threads.submit(replica.start) for replica in replicas]:
                started.result()
        until(lambda: client.create(VALID["stream-of-one-partition"]).is_success)
        first = client.authorities
        shown = {replica.shown(first) for replica in replicas}
        assert len(shown) == 1
        assert former not in shown, "a Secret that was emptied is filled again"

        told, asked, deadline = [first], 0, time.monotonic() + 120
        while first in told[-1]:
            assert time.monotonic() < deadline, "the authority isn't replaced"
            client.ask(replicas[asked % 2])
            answer = client.create(VALID["projection-of-one-text"])
            assert answer.is_success, answer.text
            # the API server keeps its connections; a new one is shown the certificate of now
            shown |= {replica.shown(told[-1]) for replica in replicas}
            if (authorities := client.authorities) != told[-1]:
                told.append(authorities)
            asked += 1
        assert told[1].startswith(first), "the next authority is told beside the former one"
        assert told[1] == first + told[2], "which goes when it signs nothing any more"
        assert len(shown) >= 3, "the serving certificate is replaced more often than its authority"
        until(lambda: client.create(VALID["projection-of-one-text"]).is_success)
    finally:
        for replica in replicas:
            replica.kill()
    for log in (webhook.log, *(replica.log for replica in replicas)):
        assert "PRIVATE KEY" not in log
        assert "Traceback" not in log
