"""One AdmissionReview and its answer: the guard's problems with their fields, warnings, and whatever odd is sent."""

import asyncio
import datetime as dt
import json
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refold_operator.spec_guard import Rules
from refold_operator.webhook.main import Webhook
from refold_operator.webhook.review import NoReviewError, Outcome, Reviewer

from tests.specs import INVALID, VALID

BY_GUARD = [name for name, refused in INVALID.items() if refused.by == "guard"]


async def there_are_all(namespace: str, name: str) -> bool | None:
    return True


async def there_are_none(namespace: str, name: str) -> bool | None:
    return False


async def nobody_knows(namespace: str, name: str) -> bool | None:
    return None


def reviewer(exists: Any = there_are_all, **rules: Any) -> Reviewer:
    return Reviewer(Rules(**rules), exists=exists)


def request(resource: dict[str, Any] | None, former: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    kind = (resource or former or {}).get("kind", "Projection")
    return {
        "uid": "u-1", "namespace": "shop", "operation": "UPDATE" if former else "CREATE",
        "kind": {"group": "refold.dev", "version": "v1alpha1", "kind": kind}, "object": resource, "oldObject": former,
        **more,
    }  # fmt: skip


def body(asked: Any) -> bytes:
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": asked}).encode()


async def review(
    resource: dict[str, Any] | None, former: dict[str, Any] | None = None, *, exists: Any = there_are_all, **more: Any
) -> dict[str, Any]:
    outcome = await reviewer(exists).review(body(request(resource, former, **more)))
    assert (outcome.answer["apiVersion"], outcome.answer["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    response: dict[str, Any] = outcome.answer["response"]
    assert response["uid"] == "u-1"
    assert outcome.allowed is response["allowed"]
    return response


@pytest.mark.parametrize("name", VALID)
async def test_a_valid_spec_is_allowed_without_a_word(name: str) -> None:
    assert await review(VALID[name]) == {"uid": "u-1", "allowed": True}


@pytest.mark.parametrize("name", BY_GUARD)
async def test_an_invalid_spec_is_refused_as_the_api_server_would(name: str) -> None:
    refused = INVALID[name]
    response = await review(refused.resource, refused.former)
    assert response["allowed"] is False
    status = response["status"]
    assert (status["code"], status["reason"]) == (422, "Invalid")
    assert status["message"].startswith(refused.field)
    assert refused.says in status["message"]
    assert status["details"]["kind"] == refused.resource["kind"]
    assert status["details"]["name"] == refused.resource["metadata"]["name"]
    cause = status["details"]["causes"][0]
    assert cause["field"] == refused.field
    assert not cause["message"].startswith((refused.field, ":"))


BAD = INVALID["column-unknown"].resource
GOOD = VALID["projection-with-every-operation"]


async def test_what_was_wrong_before_is_a_warning_so_that_the_rest_can_be_changed() -> None:
    changed = {**BAD, "spec": {**BAD["spec"], "deletionPolicy": "Retain"}}
    response = await review(changed, BAD)
    assert response["allowed"] is True
    (warning,) = response["warnings"]
    assert warning.startswith("spec.fold[0].set.state")


async def test_what_a_change_adds_is_refused_whatever_was_wrong_before() -> None:
    worse = {**BAD, "spec": {**BAD["spec"], "key": "data."}}
    response = await review(worse, BAD)
    assert response["allowed"] is False
    assert [cause["field"] for cause in response["status"]["details"]["causes"]] == ["spec.key"]
    assert response["warnings"][0].startswith("spec.fold[0].set.state")


async def test_a_change_beside_the_spec_is_never_refused() -> None:
    labelled = {**BAD, "metadata": {**BAD["metadata"], "labels": {"a": "b"}, "finalizers": []}}
    assert (await review(labelled, BAD))["allowed"] is True


async def test_a_resource_that_is_being_deleted_is_let_go() -> None:
    going = {**BAD, "metadata": {**BAD["metadata"], "deletionTimestamp": "2026-01-31T23:59:59Z"}}
    assert (await review(going, GOOD))["allowed"] is True


@pytest.mark.parametrize("operation", ["DELETE", "CONNECT", None, 7])
async def test_other_operations_are_allowed(operation: Any) -> None:
    assert (await review(BAD, operation=operation))["allowed"] is True


@pytest.mark.parametrize("kind", [{"group": "apps", "kind": "Projection"}, {"group": "refold.dev", "kind": "X"}, None])
async def test_other_kinds_are_allowed(kind: Any) -> None:
    assert (await review(BAD, kind=kind))["allowed"] is True


async def test_a_stream_that_is_not_there_yet_is_a_warning_that_names_it() -> None:
    response = await review(VALID["two-streams"], exists=there_are_none)
    assert response["allowed"] is True
    assert [warning.split(";")[0] for warning in response["warnings"]] == [
        "spec.streams[0]: there is no EventStream orders in namespace shop yet",
        "spec.streams[1]: there is no EventStream payments in namespace shop yet",
    ]


async def test_a_stream_of_which_nobody_knows_is_no_warning() -> None:
    assert await review(GOOD, exists=nobody_knows) == {"uid": "u-1", "allowed": True}


async def test_a_moment_that_has_not_passed_is_a_warning() -> None:
    soon = (dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)).isoformat()
    response = await review({**GOOD, "spec": {**GOOD["spec"], "asOf": soon}})
    assert response["allowed"] is True
    assert response["warnings"][0].startswith(f"spec.asOf: {soon} has not passed yet")


@pytest.mark.parametrize("missing", [None, {}, {"spec": None}, {"spec": []}, {"spec": {}}, []])
async def test_an_object_without_its_spec_is_refused_with_a_field(missing: Any) -> None:
    response = await review(missing, kind={"group": "refold.dev", "kind": "Projection"})
    assert response["allowed"] is False
    assert response["status"]["message"].startswith("spec")


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"{", b"[]", b"null", b"7", b'"AdmissionReview"', b"\xff", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview", "request": {"uid": "u"}}',
        body(None), body([]), body({}), body({"uid": 7}),
    ],
)  # fmt: skip
async def test_what_is_no_review_is_told_so(sent: bytes) -> None:
    with pytest.raises(NoReviewError):
        await reviewer().review(sent)


def asked(sent: bytes, method: str = "POST", path: str = "/validate") -> httpx.Response:
    """Return the application's answer, without a server between."""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(Webhook(reviewer(nobody_knows)), raise_app_exceptions=False),
            base_url="https://refold-webhook",
        ) as client:
            return await client.request(method, path, content=sent)

    return asyncio.run(ask())


def test_no_review_is_400_and_says_why() -> None:
    answer = asked(b"{")
    assert answer.status_code == 400
    assert "no JSON" in answer.json()["detail"]
    assert asked(b"", "GET").status_code == 405
    assert asked(b"", "POST", "/else").status_code == 404


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def replaced(node: Any, value: Any, path: list[int]) -> Any:
    """Return `node` with what `path` leads to replaced."""
    if not path or not isinstance(node, dict | list) or not node:
        return value
    if isinstance(node, dict):
        chosen = list(node)[path[0] % len(node)]
        return {**node, chosen: replaced(node[chosen], value, path[1:])}
    at = path[0] % len(node)
    return [replaced(item, value, path[1:]) if i == at else item for i, item in enumerate(node)]


@given(
    st.sampled_from([*VALID.values(), *(refused.resource for refused in INVALID.values())]),
    st.sampled_from([None, GOOD, BAD]),
    st.lists(st.tuples(json_values, st.lists(st.integers(0, 9), min_size=1, max_size=8)), max_size=3),
)
def test_whatever_is_sent_is_answered_and_never_with_a_server_error(
    resource: dict[str, Any], former: dict[str, Any] | None, changes: list[tuple[Any, list[int]]]
) -> None:
    sent: Any = json.loads(body(request(resource, former)))
    for value, path in changes:
        sent = replaced(sent, value, path)
    answer = asked(json.dumps(sent).encode())
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        assert isinstance(answer.json()["response"]["allowed"], bool)


def test_the_answer_is_json_that_the_api_server_reads() -> None:
    answer = asked(body(request(GOOD)))
    assert answer.headers["content-type"] == "application/json"
    assert msgspec.json.decode(answer.content) == {
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": {"uid": "u-1", "allowed": True},
    }  # fmt: skip


async def test_reviews_are_answered_while_a_large_one_is_checked() -> None:
    fold = [{"type": f"T{n}", "set": {"a": "data.a + data.b + data.c"}} for n in range(60)]
    columns = [{"name": "a", "type": "numeric"}]
    large = {**GOOD, "spec": {"streams": ["orders"], "columns": columns, "fold": fold}}
    one = reviewer()
    done: list[str] = []

    async def answer(name: str, resource: dict[str, Any]) -> Outcome:
        outcome = await one.review(body(request(resource)))
        done.append(name)
        return outcome

    outcomes = await asyncio.gather(answer("large", large), answer("small", VALID["stream-of-one-partition"]))
    assert all(outcome.allowed for outcome in outcomes)
    assert done == ["small", "large"]
