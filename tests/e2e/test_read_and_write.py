"""From `kubectl apply` to a served row, on the real thing."""

import json
from typing import Any

import httpx
import pytest

from hack.client import EVENT_STORE, http, kubectl, resource
from tests.e2e.conftest import Sandbox
from tests.e2e.orders import CUSTOMERS, ORDER_STATUS, STREAM


def placed(number: int = 1, **data: Any) -> dict[str, Any]:
    return {"id": f"placed-{number}", "type": "OrderPlaced", "data": {"customer": "c1", "total": 12.5, **data}}


def test_an_appended_event_becomes_a_row_in_both_read_models(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM, ORDER_STATUS, CUSTOMERS)
    stream = sandbox.stream()
    orders, customers = sandbox.read_model("order-status"), sandbox.read_model("customers")

    answer = stream.append("a/b %2F ..", [placed()], expected="none")
    assert answer.status_code == httpx.codes.CREATED, answer.text
    assert answer.json().keys() == {"revision", "partition", "position", "token"}
    assert answer.json()["revision"] == 1

    for model in (orders, customers):
        model.wait_applied(stream.positions)
    assert orders.row("a/b %2F ..") == {"status": "placed", "items": 1, "total": 12.5}
    assert customers.row("c1") == {"orders": 1, "items": 1, "spent": 12.5}
    assert orders.row("no such order") is None
    assert [key for key, _ in orders.rows(where="status:eq:placed")] == ["a/b %2F .."]
    assert list(orders.rows(where="status:eq:shipped")) == []


def test_a_wrong_revision_is_refused_with_the_current_one_and_a_retry_appends_nothing(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM)
    stream = sandbox.stream()
    assert stream.append("o1", [placed()], expected="none").status_code == httpx.codes.CREATED

    conflict = stream.append("o1", [placed(2)], expected=7)
    assert conflict.status_code == httpx.codes.CONFLICT
    assert conflict.headers["content-type"].startswith("application/problem+json")
    assert conflict.json()["currentRevision"] == 1

    retried = stream.append("o1", [placed()], expected="none")
    assert retried.status_code == httpx.codes.CREATED
    assert retried.json()["revision"] == 1
    assert [event["id"] for event in stream.events("o1")] == ["placed-1"]


def test_bulk_lines_are_answered_in_order_and_a_bad_line_harms_no_other(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM)
    lines = [
        {"subject": "o1", "expectedRevision": "none", "events": [placed()]},
        {"subject": "o1", "expectedRevision": 9, "events": [placed(2)]},
        {"subject": "nul \u0000", "events": [placed()]},
        {"subject": "o2", "events": [placed()]},
    ]
    body = b"\n".join(json.dumps(line).encode() for line in lines) + b"\nnot json\n"
    path = f"/v1/streams/{sandbox.name}/orders/events"
    with http(EVENT_STORE) as client:
        answer = client.post(path, content=body, headers={"Content-Type": "application/x-ndjson"})
    assert answer.status_code == httpx.codes.OK, answer.text
    answers = [json.loads(line) for line in answer.text.splitlines()]
    assert [line.get("error", {}).get("status") for line in answers[:4]] == [None, 409, 422, None]
    assert answers[4]["error"]["status"] == 400
    assert [line.get("subject") for line in answers[:4]] == ["o1", "o1", "nul \u0000", "o2"]
    assert answers[0]["revision"] == 1


EVENT = b'{"events":[{"id":"1","type":"T","data":1}]}'


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/streams/{ns}/orders/subjects/o/events", b"{", 400),
        ("POST", "/v1/streams/{ns}/orders/subjects/o/events", b'{"events": []}', 422),
        ("POST", "/v1/streams/{ns}/orders/subjects/%00/events", EVENT, 422),
        ("POST", "/v1/streams/{ns}/orders/subjects/" + "s" * 513 + "/events", EVENT, 422),
        ("POST", "/v1/streams/{ns}/orders/subjects/o/events", EVENT.replace(b"1}", b'"\\u0000"}'), 422),
        ("POST", "/v1/streams/{ns}/nothing/subjects/o/events", EVENT, 404),
        ("POST", "/v1/streams/{ns}/orders/subjects/o/events", b"[" + b" " * 40_000_000 + b"]", 413),
        ("GET", "/v1/streams/{ns}/nothing/subjects/o/events", None, 404),
        ("GET", "/v1/elsewhere", None, 404),
    ],
)  # fmt: skip
def test_bad_input_is_a_problem_and_nothing_is_written(
    bad_input: Sandbox, method: str, path: str, body: bytes | None, status: int
) -> None:
    with http(EVENT_STORE) as client:
        answer = client.request(method, path.format(ns=bad_input.name), content=body)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"].startswith("application/problem+json")
        assert answer.json()["status"] == status
        assert client.get(f"/v1/streams/{bad_input.name}/orders/subjects/o/events").json()["events"] == []


@pytest.fixture(scope="module")
def bad_input() -> Any:
    sandbox = Sandbox("e2e-bad-input")
    sandbox.apply(STREAM)
    yield sandbox
    sandbox.remove()


def test_without_a_token_nothing_but_the_probes_answers(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM, ORDER_STATUS)
    model = sandbox.read_model("order-status")
    model.status()
    base = f"http://127.0.0.1:{resource('service', 'order-status-local', sandbox.name)['spec']['ports'][0]['nodePort']}"
    for service in (EVENT_STORE, base):
        assert httpx.get(f"{service}/healthz", trust_env=False).status_code == httpx.codes.OK
        assert httpx.get(f"{service}/readyz", trust_env=False).status_code == httpx.codes.OK
        for path in ("/openapi.json", "/v1/status"):
            refused = httpx.get(service + path, trust_env=False)
            assert refused.status_code == httpx.codes.UNAUTHORIZED
            assert refused.headers["content-type"].startswith("application/problem+json")
        with http(service) as client:
            assert client.get("/openapi.json").json()["openapi"].startswith("3.1")


def test_the_resources_read_well_in_kubectl(sandbox: Sandbox) -> None:
    sandbox.apply(STREAM, ORDER_STATUS)
    table = kubectl("-n", sandbox.name, "get", "evs,proj")
    assert "eventstream.refold.dev/orders" in table
    assert "projection.refold.dev/order-status" in table
    assert "READY" in table.upper()
    described = kubectl("explain", "projection.spec", "--recursive", "--api-version=refold.dev/v1alpha1")
    for field in ("streams", "key", "columns", "fold", "when", "projector", "replicas"):
        assert field in described
    status = resource("projection", "order-status", sandbox.name)["status"]
    assert status["url"] == f"http://order-status-query.{sandbox.name}.svc"
    assert {condition["type"] for condition in status["conditions"]} >= {"Available", "Ready"}
