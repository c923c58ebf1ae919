"""The commands for people, as they are installed, against real services: at a URL, and through a Kubernetes API."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from psycopg import AsyncConnection
from refold.eventstore import catalog, server
from refold.eventstore.settings import Settings
from refold.projection.definition import VersionDefinition
from refold.query import server as query
from refold.query import state
from refold.query.settings import Settings as QuerySettings
from refold.web.app import App

from hack.servers import kubernetes_api
from hack.servers.callers import tokens_file
from hack.servers.kubernetes_api import ApiServer
from tests.integration.kubelet import Kubelet
from tests.parking import TOKEN, filled, make, notes, serve
from tests.projecting import CUSTOMERS, ORDERS, ReadModel, World
from tests.served import serve as serve_app


@dataclass
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


def run(*arguments: object, program: str = "refold", environment: Mapping[str, str] | None = None) -> Ran:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REFOLD_", "KUBE"))}
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *map(str, arguments)],
        env={**kept, "HOME": "/nonexistent", **(environment or {})}, capture_output=True, text=True, check=False,
        timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("program", ["refold", "kubectl-refold"])
async def test_parked_events_are_listed_retried_and_discarded(world: World, program: str) -> None:
    model = await filled(world, subjects=3)  # s1 and s2 are parked
    with model.projector(), serve(model) as service:
        there = {"REFOLD_URL": service.url, "REFOLD_TOKEN": TOKEN}
        table = run("parked", "list", "notes", program=program, environment=there)
        assert (table.code, table.err) == (0, "")
        assert table.out.split("\n")[0].split() == [
            "ID", "KEY", "SUBJECT", "STREAM", "PARTITION", "POSITION", "PARKED", "ERROR",
        ]  # fmt: skip
        assert "index row size" in table.out
        listed = json.loads(run("parked", "list", "notes", "--output", "json", environment=there).out)
        assert listed["version"] == model.version
        one, two = ([event["id"] for event in listed["parked"] if event["key"] == key] for key in ("s1", "s2"))
        assert run("parked", "list", "notes", "--key", "s1", environment=there).out.count("follows an event") == 1

        done = run("parked", "retry", "notes", *one, "-o", "json", environment=there)
        assert [event["outcome"] for event in json.loads(done.out)] == ["folded", "not-parked"], "both by the first"
        assert done.code == 1
        refused = run("parked", "discard", "notes", two[0], environment=there)
        assert refused.code == 1
        assert "Discard" in refused.err
        done = run("parked", "discard", "notes", two[0], "--yes", environment=there)
        assert (done.code, done.err) == (0, "")
        assert done.out.split("\n")[2].split() == [str(two[0]), "discarded"]
        assert run("parked", "list", "notes", environment=there).out.strip().count("\n") == 1
    rows, reference = model.rows(), notes(world)
    assert (rows["s0"], rows["s1"]) == (reference["s0"], reference["s1"])
    assert rows["s2"]["events"] == reference["s2"]["events"] - 1


async def test_a_retry_that_is_refused_tells_why(world: World) -> None:
    model = await make(world, ORDERS, "order-status")
    world.append([("a", "Placed", {"items": 1})])
    with model.projector(), serve(model) as service:
        model.wait()
        (file := Path(tokens_file(TOKEN).removeprefix("tokens:")).with_name("token")).write_text(TOKEN + "\n")
        done = run("parked", "retry", "order-status", 1, "--url", service.url, "--token-file", file)
    assert done.code == 1
    assert "still-bad" in done.out
    assert "no field 'total'" in done.out


async def test_the_history_of_a_subject_is_shown_as_it_is(world: World) -> None:
    evil = "\x1b[2J[red]\u202e\n"
    world.store([("a/b", "Placed", {"total": i, "note": evil}) for i in range(2)] + [("a/b", "Shipped", {"at": 0.10})])
    auth = tokens_file(TOKEN)
    with serve_app(server.make(Settings.model_validate({"store_dsn": world.dsn, "auth": auth})), TOKEN) as service:
        there = {"REFOLD_URL": service.url, "REFOLD_TOKEN": TOKEN}
        table = run("log", "orders", "a/b", "-n", "shop", environment=there)
        assert (table.code, table.err) == (0, "")
        lines = [line.split() for line in table.out.strip().split("\n")]
        assert lines[0] == ["REVISION", "TIME", "TYPE", "ID", "DATA"]
        assert [line[0] for line in lines[2:]] == ["1", "2", "3"]
        assert "\x1b" not in table.out
        assert "\u202e" not in table.out
        assert "[red]" in table.out
        assert '{"at":0.1}' in table.out
        found = json.loads(
            run("log", "orders", "a/b", "-n", "shop", "-r", "--limit", 2, "-o", "json", environment=there).out
        )
        assert [event["revision"] for event in found["events"]] == [3, 2]
        assert found["events"][1]["data"]["note"] == evil
        missing = run("log", "nothing", "a", "-n", "shop", environment=there)
        assert (missing.code, missing.out) == (1, "")
        assert missing.err.startswith("error: ")
        assert "shop/nothing" in missing.err
        wrong = run("log", "orders", "a", "-n", "shop", "--url", service.url, environment={"REFOLD_TOKEN": "x"})
        assert wrong.code == 1
        assert "token" in wrong.err


def query_service(model: ReadModel) -> App:
    dsn = model.world.dsn
    named = {"projection": f"shop/{model.name}", "readstore_dsn": dsn, "store_dsn": dsn, "auth": tokens_file(TOKEN)}
    return query.app(QuerySettings.model_validate(named))


def cells(table: str) -> list[list[str]]:
    """Return the rows of a table, without its head."""
    return [re.split(r"  +", line.strip()) for line in table.strip().split("\n")[2:]]


async def test_a_row_is_shown_as_it_was_with_what_each_event_did(world: World) -> None:
    model = await world.projection(ORDERS, "order-status")
    good = {"items": 1, "total": 0.10}
    world.store([("a/b", "Placed", good), ("a/b", "Noted\x1b[2J", {}), ("a/b", "Changed", {"items": 1, "total": 2})])
    world.store([("a/b", "Changed", {"items": 1}), ("gone", "Placed", good), ("gone", "Purged", {})])
    with serve_app(query_service(model), TOKEN) as service:
        there = {"REFOLD_URL": service.url, "REFOLD_TOKEN": TOKEN}
        shown = run("state", "order-status", "a/b", environment=there)
        assert shown.code == 0
        row, steps = shown.out.split("\n\n")
        assert cells(row) == [["status", "placed"], ["items", "2"], ["total", "2.1"]]
        assert [(one[0], one[2], one[3]) for one in cells(steps)] == [
            ("1", "Placed", "created"),
            ("2", "Noted\\x1b[2J", "none"),
            ("3", "Changed", "changed"),
            ("4", "Changed", "parked"),
        ]
        assert cells(steps)[0][4] == "status: – → placed, items: – → 1, total: – → 0.1"
        assert cells(steps)[2][4] == "items: 1 → 2, total: 0.1 → 2.1"
        assert "no field 'total'" in cells(steps)[3][4]
        assert shown.err.startswith("the row stops before event 4, which is bad: ")
        then = json.loads(
            run("state", "order-status", "a/b", "--at", 2, "--steps", 1, "-o", "json", environment=there).out
        )
        assert (then["revision"], then["data"]["items"], len(then["steps"])) == (2, 1, 1)
        gone = run("state", "order-status", "gone", environment=there)
        assert (gone.code, gone.err) == (0, "")
        assert gone.out.startswith("no row\n")
        assert cells(gone.out.split("\n\n")[1])[1][3] == "deleted"
        for arguments, says in [(("nobody",), "no events by then"), (("a/b", "--at", "yesterday"), "at is a revision")]:
            refused = run("state", "order-status", *arguments, environment=there)
            assert (refused.code, refused.out) == (1, "")
            assert says in refused.err
    customers = await world.projection(CUSTOMERS, "customers")
    world.append([("x", "Placed", {"customer": "c1", "total": 5, "note": "n"})])
    with customers.projector(), serve_app(query_service(customers), TOKEN) as service:
        customers.wait()
        there = {"REFOLD_URL": service.url, "REFOLD_TOKEN": TOKEN}
        now = run("state", "customers", "c1", environment=there)
        assert now.code == 0
        assert ["spent", "5"] in cells(now.out)
        assert "without what each event did: " in now.err
        assert run("state", "customers", "c1", "--at", 1, environment=there).code == 1


async def test_the_log_of_a_subject_shows_what_each_event_did_to_the_row_of_a_projection(world: World) -> None:
    good = {"items": 1, "total": 0.10}
    world.store([("a/b", "Placed", good), ("a/b", "Changed", good), ("a/b", "Purged", {}), ("a/b", "Changed", {})])
    definition = VersionDefinition(definition=ORDERS, streams=[world.streams["orders"]])
    async with await AsyncConnection.connect(world.dsn, autocommit=True) as conn:
        await catalog.set_definition(
            conn, namespace="shop", name="order-status", uid="u", version="v1", definition=definition.to_json()
        )
    settings = Settings.model_validate({"store_dsn": world.dsn, "auth": tokens_file(TOKEN)})
    with serve_app(server.make(settings, state.operations), TOKEN) as service:
        there = {"REFOLD_URL": service.url, "REFOLD_TOKEN": TOKEN}
        log = ("log", "orders", "a/b", "-n", "shop", "--projection", "order-status")
        table = run(*log, environment=there)
        assert (table.code, table.err) == (0, "")
        assert table.out.split("\n")[0].split() == ["REVISION", "TIME", "TYPE", "ID", "DATA", "EFFECT", "CHANGES"]
        assert [one[5] for one in cells(table.out)] == ["created", "changed", "deleted", "parked"]
        assert cells(table.out)[1][6] == "items: 1 → 2, total: 0.1 → 0.2"
        latest = cells(run(*log, "--reverse", "--limit", 2, environment=there).out)
        assert [(one[0], one[5]) for one in latest] == [("4", "parked"), ("3", "deleted")]
        first = json.loads(run(*log, "--limit", 1, "-o", "json", environment=there).out)
        assert (first["state"]["revision"], first["state"]["steps"][0]["effect"]) == (1, "created")
        assert [event["revision"] for event in first["events"]] == [1]
        nothing = run("log", "orders", "x", "-n", "shop", "--projection", "order-status", environment=there)
        assert (nothing.code, cells(nothing.out)) == (0, [])
        unknown = run("log", "orders", "a/b", "-n", "shop", "--projection", "other", environment=there)
        assert (unknown.code, unknown.out) == (1, "")
        assert "shop/other" in unknown.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--url", "http://127.0.0.1:9"), "a token is needed"),
        (("--url", "127.0.0.1:9", "--token-file", "/dev/null"), "--url is like"),
        (("--url", "http://127.0.0.1:9", "--token-file", "/nonexistent"), "can't be read"),
        (("--url", "http://127.0.0.1:9", "--token-file", "/dev/null"), "doesn't answer"),
        ((), "there is no kubeconfig"),
        (("--context", "nowhere"), "kubeconfig"),
    ],
)
def test_without_a_way_it_says_what_is_missing(arguments: tuple[str, ...], says: str) -> None:
    done = run("parked", "list", "notes", *arguments)
    assert (done.code, done.out) == (1, "")
    assert says in done.err
    assert done.err.count("\n") == 1, "no traceback"


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    if kubernetes_api.programs() is None:
        pytest.skip("no kube-apiserver and etcd in the cache: see hack/kind")
    server = ApiServer()
    server.start()
    for namespace in ("shop", "refold-system"):
        server.kubectl("create", "namespace", namespace)
    server.kubectl("-n", "shop", "create", "serviceaccount", "me")
    yield server
    server.remove()


def pod(namespace: str, name: str, service: str) -> list[dict[str, object]]:
    """Return a Service and a pod of it on the node."""
    labels = {"app": name}
    return [
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": service, "namespace": namespace},
            "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]},
        },
        {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {"nodeName": "node", "containers": [{"name": "c", "image": "i"}]},
        },
    ]  # fmt: skip


async def test_through_the_kubernetes_api_nothing_but_a_kubeconfig_is_needed(
    api: ApiServer, world: World, tmp_path: Path
) -> None:
    model = await filled(world, subjects=2)
    token = api.kubectl("-n", "shop", "create", "token", "me", "--audience=refold")
    cluster = {"KUBECONFIG": str(api.kubeconfig)}
    ask = ("parked", "list", "notes", "-n", "shop")
    nobody = run(*ask, environment=cluster)
    assert nobody.code == 1
    assert "--service-account NAME" in nobody.err
    unknown = run(*ask, "--service-account", "you", environment=cluster)
    assert unknown.code == 1
    assert 'serviceaccounts "you" not found' in unknown.err
    me = (*ask, "--service-account", "me")

    # Whose tokens the services take is their matter (test_auth_kubernetes.py): here they take one that is known.
    auth = tokens_file(token)
    with (
        serve(model) as service,
        serve_app(server.make(Settings.model_validate({"store_dsn": world.dsn, "auth": auth})), token) as store,
    ):
        kubelet = Kubelet(tmp_path, {"query-pod": service.port, "store-pod": store.port})
        node = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet.port}},
        }
        api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node"}})
        api.kubectl("patch", "node", "node", "--subresource=status", "-p", json.dumps({"status": node}))
        api.apply(*pod("shop", "query-pod", "notes-query"), *pod("refold-system", "store-pod", "refold-eventstore"))
        waiting = run(*me, environment=cluster)
        assert waiting.code == 1
        assert "has no pod that is ready, of 1" in waiting.err
        ready = json.dumps({"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
        for namespace, name in [("shop", "query-pod"), ("refold-system", "store-pod")]:
            api.kubectl("-n", namespace, "patch", "pod", name, "--subresource=status", "-p", ready)

        listed = run(*ask, "-o", "json", environment={**cluster, "REFOLD_TOKEN": TOKEN})
        assert (listed.code, listed.err) == (0, "")
        assert [event["key"] for event in json.loads(listed.out)["parked"]] == ["s1", "s1"]
        found = run("log", "orders", "s1", "-n", "shop", "-o", "json", environment={**cluster, "REFOLD_TOKEN": token})
        assert (found.code, found.err) == (0, "")
        assert [event["revision"] for event in json.loads(found.out)["events"]] == [1, 2, 3]
        own = run(*me, environment=cluster)
        assert own.code == 1
        assert "token" in own.err, "made, sent and refused by the service, which knows another one"
        kubelet.close()
