"""What a schema may be, what it refuses, and that neither it nor an event can make the event store work for long."""

import json
import time
from typing import Any

import pytest
from refold.eventstore import arrays
from refold.eventstore.errors import InvalidAppendError, InvalidDataError, UnknownTypeError
from refold.eventstore.event_types import MAX_SCHEMA_BYTES, TOLD_ERRORS, EventTypes, SchemaError, encode

PLACED = {
    "type": "object",
    "required": ["orderId"],
    "properties": {"orderId": {"type": "string"}, "total": {"type": "number", "multipleOf": 0.01}},
}


def refusal(schema: Any, *data: str, event_type: str = "Placed") -> InvalidAppendError | None:
    names = [arrays.text(event_type.encode()) for _ in data]
    return EventTypes({"Placed": schema}).refusal(names, [arrays.jsonb(text.encode()) for text in data])


def schema_error(schema: Any) -> SchemaError:
    with pytest.raises(SchemaError) as refused:
        EventTypes({"Fine": True, "Placed": schema})
    assert refused.value.event_type == "Placed"
    return refused.value


def errors(schema: Any, data: str) -> list[tuple[str, str]]:
    found = refusal(schema, data)
    assert isinstance(found, InvalidDataError)
    return found.errors


def test_what_matches_is_taken() -> None:
    assert refusal(PLACED, '{"orderId": "1", "total": 1.10}', '{"orderId": "2"}') is None


def test_the_first_event_that_does_not_match_is_named_with_the_place_and_the_reason() -> None:
    found = refusal(PLACED, '{"orderId": "1"}', '{"orderId": 2, "total": "x"}')
    assert isinstance(found, InvalidDataError)
    assert found.field == "events[1].data"
    assert sorted(found.errors) == [
        ("/orderId", '2 is not of type "string"'),
        ("/total", '"x" is not of type "number"'),
    ]
    assert "events[1].data" in str(found)
    assert "/orderId" in str(found)


def test_an_unknown_type_is_refused_with_the_types_there_are() -> None:
    found = refusal(PLACED, "{}", event_type="Plcaed")
    assert isinstance(found, UnknownTypeError)
    assert (found.field, found.types) == ("events[0].type", ["Placed"])
    assert "Plcaed" in str(found)
    assert "Placed" in str(found)


@pytest.mark.parametrize(("schema", "anything"), [(True, True), ({}, True), (False, False)])
def test_a_boolean_takes_anything_or_nothing(schema: Any, anything: bool) -> None:
    assert (refusal(schema, "[1, {}]") is None) is anything


@pytest.mark.parametrize(
    ("schema", "fits", "does_not"),
    [
        ({"multipleOf": 0.01}, "0.07", "0.071"),
        ({"maximum": 9007199254740992}, "9007199254740992", "9007199254740993"),
        ({"type": "integer"}, "1" + "0" * 399, "1.5"),
        ({"type": "integer"}, "2.0", "2.01"),
        ({"maximum": 1e300}, "1e300", "1e400"),
        ({"maximum": 0.3}, "0.3", "0.30000000000000000001"),
        ({"const": 1.10}, "1.1", "1.11"),
    ],
)
def test_numbers_are_compared_exactly(schema: Any, fits: str, does_not: str) -> None:
    assert refusal(schema, fits) is None
    assert refusal(schema, does_not) is not None


def test_formats_are_checked() -> None:
    assert refusal({"format": "date-time"}, '"2026-01-31T23:59:59Z"') is None
    assert errors({"format": "date-time"}, '"yesterday"')[0][0] == ""


def test_a_pointer_escapes_names() -> None:
    assert errors({"properties": {"a/b~c": {"type": "string"}}}, '{"a/b~c": 1}')[0][0] == "/a~1b~0c"


def test_what_failed_inside_a_choice_is_told() -> None:
    schema = {"oneOf": [{"properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}}, {"required": ["y"]}]}
    assert ("/x", '"no" is not of type "integer"') in errors(schema, '{"kind": "a", "x": "no"}')


def test_of_large_data_the_first_error_is_told() -> None:
    assert [pointer for pointer, _ in errors({"items": {"type": "integer"}}, json.dumps(["x"] * 100_000))] == ["/0"]


def test_errors_are_few_and_short() -> None:
    found = errors({"items": {"type": "integer"}}, json.dumps(["x" * 1000] * 50))
    assert len(found) == TOLD_ERRORS
    assert all(len(message) <= 300 for _, message in found)


@pytest.mark.parametrize(
    ("schema", "pointer", "says"),
    [
        ({"properties": {"a/b": {"minimum": "x"}}}, "/properties/a~1b/minimum", "number"),
        ({"type": "strin"}, "/type", "strin"),
        ({"properties": {"a": {"pattern": "("}}}, "/properties/a/pattern", "regex"),
        ({"pattern": "(?=look)ahead"}, "/pattern", "look-around"),
        ({"patternProperties": {"[": True}}, "/patternProperties/[", "regex"),
        ({"pattern": "((((a{100}){100}){100}){100})"}, "/pattern", "too large"),
        ({"format": "datetime"}, "/format", "datetime"),
        ({"$ref": "https://127.0.0.1:1/schema"}, "/$ref", "out of the schema"),
        ({"items": {"$ref": "file:///etc/passwd"}}, "/items/$ref", "out of the schema"),
        ({"$dynamicRef": "other#node"}, "/$dynamicRef", "out of the schema"),
        ({"$ref": "#/$defs/gone"}, "/$ref", "isn't in the schema"),
        ({"allOf": [{"$id": "https://x.example/", "$ref": "#"}]}, "/allOf/0/$id", "$defs"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "/$schema", "2020-12"),
        ("string", "", "object or a boolean"),
        (None, "", "object or a boolean"),
        ([], "", "object or a boolean"),
        ({"enum": ["x" * MAX_SCHEMA_BYTES]}, "", "bytes"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_used_says_where_and_why(schema: Any, pointer: str, says: str) -> None:
    error = schema_error(schema)
    assert error.pointer == pointer
    assert says in str(error)
    assert "Placed" in str(error)


def test_references_within_the_document_are_followed() -> None:
    tree = {"$ref": "#/$defs/n%25", "$defs": {"n%": {"properties": {"left": {"$ref": "#"}, "value": {"$ref": "#v"}}},
                                              "v": {"$anchor": "v", "type": "integer"}}}  # fmt: skip
    assert refusal(tree, '{"left": {"left": {"value": 1}}}') is None
    assert errors(tree, '{"left": {"left": {"value": "1"}}}')[0][0] == "/left/left/value"


def doubling(levels: int) -> dict[str, Any]:
    defs: dict[str, Any] = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(levels)}
    return {"$ref": "#/$defs/a0", "$defs": {**defs, f"a{levels}": {"type": "integer"}}}


def nested(schema: dict[str, Any], levels: int) -> dict[str, Any]:
    for _ in range(levels):
        schema = {"not": schema}
    return schema


def chain(length: int) -> dict[str, Any]:
    defs: dict[str, Any] = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**defs, f"a{length}": True}}


@pytest.mark.parametrize("schema", [doubling(60), nested({}, 101), nested({}, 8000), chain(300), chain(1500)])
def test_a_schema_that_composes_to_too_much_is_refused(schema: dict[str, Any]) -> None:
    assert "at most" in str(schema_error(schema)) or "over" in str(schema_error(schema))


@pytest.mark.parametrize("schema", [doubling(8), nested({}, 90), chain(90), {"$ref": "#"}, {"allOf": [{"$ref": "#"}]}])
def test_a_schema_within_the_bounds_is_taken(schema: dict[str, Any]) -> None:
    EventTypes({"Placed": schema})


RECURSIVE = {
    "$ref": "#/$defs/n",
    "$defs": {
        "n": {
            "anyOf": [
                {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 0},
                {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 99},
            ]
        }
    },
}


@pytest.mark.parametrize(
    ("schema", "data"),
    [
        (RECURSIVE, "[" * 190 + '"x"' + "]" * 190),  # telling all that is wrong here takes 2^190 steps
        ({"pattern": "^(a+)+$"}, json.dumps("a" * 100_000 + "b")),
        ({"items": {"type": "integer"}}, json.dumps(["x"] * 100_000)),
    ],
)
def test_an_event_that_was_made_to_be_slow_is_refused_at_once(schema: dict[str, Any], data: str) -> None:
    begin = time.process_time()
    assert refusal(schema, data) is not None
    assert time.process_time() - begin < 5  # not a figure, but the difference between linear and exponential


def test_the_catalogs_text_is_the_same_for_the_same_types() -> None:
    first, second = (
        {"B": {"type": "object", "required": []}, "A": True},
        {"A": True, "B": {"required": [], "type": "object"}},
    )
    assert encode(first) == encode(second)
    assert EventTypes.decode(encode({"A": False})).refusal([arrays.text(b"A")], [arrays.jsonb(b"1")]) is not None
