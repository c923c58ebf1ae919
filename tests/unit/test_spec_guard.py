"""The guard: what it takes, and what it refuses with which field."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refold.projection.definition import Problem
from refold_operator import spec_guard

from tests.specs import INVALID, VALID

EVENT_BYTES = 512 * 1024
BY_GUARD = [name for name, refused in INVALID.items() if refused.by == "guard"]


def check(resource: dict[str, Any], *, event_bytes: int = EVENT_BYTES) -> list[Problem]:
    if resource["kind"] == "EventStream":
        rules = spec_guard.Rules(event_bytes)
        return spec_guard.check_event_stream(resource["spec"], namespace="shop", rules=rules)
    return spec_guard.check_projection(resource["spec"])


def test_the_corpus_has_what_it_needs() -> None:
    assert len(INVALID) >= 60
    assert len(VALID) >= 40
    assert len(BY_GUARD) >= 30


@pytest.mark.parametrize("name", VALID)
def test_a_valid_spec_is_taken(name: str) -> None:
    assert check(VALID[name]) == []


@pytest.mark.parametrize("name", BY_GUARD)
def test_an_invalid_spec_is_refused_with_its_field(name: str) -> None:
    refused = INVALID[name]
    if refused.former is not None:
        assert check(refused.former) == []
    problems = check(refused.resource)
    assert {problem.path for problem in problems} == {refused.field}
    assert refused.says in str(problems[0])
    assert str(problems[0]).startswith(refused.field)


def stream(**spec: Any) -> dict[str, Any]:
    return {"kind": "EventStream", "spec": {"partitions": 1, **spec}}


def topic(event_bytes: int = EVENT_BYTES, **config: str) -> list[Problem]:
    named = {name.replace("_", "."): value for name, value in config.items()}
    return check(stream(topic={"config": named}), event_bytes=event_bytes)


@pytest.mark.parametrize(("message_bytes", "event_bytes"), [("700000", 512 * 1024), ("1048588", 1024 * 1024)])
def test_a_topic_that_would_refuse_an_accepted_event_is_refused_with_the_numbers(
    message_bytes: str, event_bytes: int
) -> None:
    (problem,) = topic(event_bytes, max_message_bytes=message_bytes)
    assert problem.reason == "MessageBytesTooSmall"
    for part in (message_bytes, str(event_bytes), "eventstore.limits.eventBytes", "spec.topic.config"):
        assert part in str(problem)


def test_a_topic_for_small_events_may_be_small() -> None:
    assert topic(32 * 1024, max_message_bytes="100000") == []


def test_every_event_type_that_cannot_be_used_is_told_with_its_place() -> None:
    listed = [{"name": "Fine"}, {"name": "Bad", "schema": 7}, {"name": "P\0"}, {"name": "Null", "schema": None}]
    problems = check(stream(events=listed))
    assert [problem.path for problem in problems] == [
        "spec.events[1].schema", "spec.events[2].name", "spec.events[3].schema",
    ]  # fmt: skip


def test_a_schema_over_its_bound_is_refused() -> None:
    schema = {"description": "x" * 65536}
    (problem,) = check(stream(events=[{"name": "A", "schema": schema}]))
    assert "at most 65536" in str(problem)


@pytest.mark.parametrize(
    ("namespace", "name", "taken"),
    [
        ("shop", None, True),
        ("shop", "shop.orders", True),
        ("shop", "shopping.orders", False),
        ("shop", "bank.orders", False),
        ("shop", "legacy-orders", True),
        ("shop", "old.orders", True),
        ("bank", "legacy-orders", False),
        ("bank", "public.rates", True),
        ("bank", "bank.orders", True),
        ("shop", "public.rates", False),
    ],
)
def test_a_namespace_has_the_topics_that_begin_with_its_name_and_those_that_it_was_given(
    namespace: str, name: str | None, taken: bool
) -> None:
    rules = spec_guard.Rules(topic_prefixes={"shop": ["legacy-", "old."], "*": ["public."]})
    spec = {"partitions": 1, "topic": {} if name is None else {"name": name}}
    problems = spec_guard.check_event_stream(spec, namespace=namespace, rules=rules)
    assert [(one.path, one.reason) for one in problems] == ([] if taken else [("spec.topic.name", "TopicNotAllowed")])
    assert taken or f"begin with {namespace}. or " in str(problems[0])
    assert not spec_guard.check_event_stream(spec, namespace=namespace, rules=spec_guard.Rules())


def test_a_namespace_that_nobody_works_in_is_told() -> None:
    rules = spec_guard.Rules(namespaces=("shop", "bank"))
    assert spec_guard.check_namespace("shop", rules) == []
    assert spec_guard.check_namespace("any", spec_guard.Rules()) == []
    (problem,) = spec_guard.check_namespace("shops", rules)
    assert str(problem).startswith("metadata.namespace: Refold doesn't work in shops")


def test_problems_of_the_definition_and_of_the_processes_are_told_together() -> None:
    spec = {
        "streams": ["orders"], "columns": [{"name": "a", "type": "text"}],
        "fold": [{"type": "A", "set": {"b": "'x'"}}, {"type": "A", "set": {"a": "("}}],
        "query": {"resources": {"limits": {"gpu": 1}}},
    }  # fmt: skip
    assert [problem.path for problem in spec_guard.check_projection(spec)] == [
        "spec.fold[0].set.b", "spec.fold[1].set.a", "spec.query.resources.limits.gpu",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("columns", [{"name": "Total", "type": "numeric"}], "beginning with a letter"),
        ("handler", {"image": "acme:7", "version": "7", "function": "project"}, "like acme.orders:project"),
        ("handler", {"image": "acme 7", "version": "7", "function": "acme:project"}, "has no blanks"),
        ("asOf", "0001-01-01T00:00:00+14:00", "spec.asOf: in UTC it is beyond"),
    ],
)
def test_a_form_that_is_not_met_is_told_in_words(field: str, value: Any, says: str) -> None:
    spec = {"streams": ["orders"], "columns": [{"name": "a", "type": "text"}], "fold": [{"type": "A", "delete": True}]}
    (problem,) = spec_guard.check_projection({**spec, field: value})
    assert says in str(problem)


def test_a_projection_that_would_take_long_to_check_is_refused_at_once() -> None:
    fold = [{"type": f"T{n}", "set": {"a": "'" + "x" * 2000 + "'"}} for n in range(150)]
    spec = {"streams": ["o"], "columns": [{"name": "a", "type": "text"}], "fold": fold}
    (problem,) = spec_guard.check_projection(spec)
    assert (problem.path, problem.reason) == ("spec", "TooLarge")


def test_many_problems_are_told_in_part_with_their_number() -> None:
    problems = [Problem(f"spec.fold[{n}]", "NothingToDo", "x") for n in range(14)]
    text = spec_guard.told(problems)
    assert "spec.fold[9]: x" in text
    assert "spec.fold[10]" not in text
    assert text.endswith("; and 4 more")
    assert spec_guard.told(problems[:1]) == "spec.fold[0]: x"


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def mutated(spec: Any, replacement: Any, path: list[int]) -> Any:
    """Return `spec` with the node that `path` leads to replaced."""
    if not path or not isinstance(spec, dict | list) or not spec:
        return replacement
    if isinstance(spec, dict):
        chosen = list(spec)[path[0] % len(spec)]
        return {**spec, chosen: mutated(spec[chosen], replacement, path[1:])}
    chosen_index = path[0] % len(spec)
    return [mutated(item, replacement, path[1:]) if i == chosen_index else item for i, item in enumerate(spec)]


@given(st.sampled_from(sorted(VALID)), json, st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_whatever_stands_in_a_spec_the_guard_answers_with_fields(name: str, value: Any, path: list[int]) -> None:
    resource = VALID[name]
    spec = mutated(resource["spec"], value, path)
    assert all(problem.path.startswith("spec") for problem in check({**resource, "spec": spec}))
