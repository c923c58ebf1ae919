"""The CRDs: structural, bounded, described, and equal to the models that read the resources."""

import datetime as dt
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import celpy
import pytest
import yaml
from refold.projection.definition import OPERATIONS, Column, ColumnType, Definition, FoldRule, Handler
from refold_operator import eventstream, resources

BAD_DURATIONS = ["", "1", "1d", "-1h", "1.5h", "1h 30m", "30m1h", "1H", "h"]
CRDS = Path(__file__).parents[2] / "crds"
FILES = {"EventStream": CRDS / "eventstreams.yaml", "Projection": CRDS / "projections.yaml"}


def version(kind: str) -> dict[str, Any]:
    (only,) = yaml.safe_load(FILES[kind].read_text())["spec"]["versions"]
    return only


def schema(kind: str, *path: str) -> dict[str, Any]:
    node = version(kind)["schema"]["openAPIV3Schema"]
    for name in path:
        node = node["items"] if name == "[]" else node["properties"][name]
    return node


def nodes(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from nodes(node["additionalProperties"], f"{path}{{}}")


ALL = [(kind, path, node) for kind in FILES for path, node in nodes(schema(kind), kind)]
PARAMETERS = pytest.mark.parametrize(("kind", "path", "node"), ALL, ids=[path for _, path, _ in ALL])


SCHEMA = "EventStream.spec.events[].schema"  # of people's own data; its size is bounded by the operator


@PARAMETERS
def test_every_field_is_described(kind: str, path: str, node: dict[str, Any]) -> None:
    if path == f"{kind}.metadata":
        assert set(node) == {"type"}, "the API server describes metadata itself and refuses anything else here"
    else:
        assert len(node["description"]) > 10
        assert node["description"].rstrip().endswith(".")


@PARAMETERS
def test_the_schema_is_structural(kind: str, path: str, node: dict[str, Any]) -> None:
    assert "properties" not in node or "additionalProperties" not in node
    if path == SCHEMA:
        assert node["x-kubernetes-preserve-unknown-fields"], "a JSON Schema is an object of any form, or a boolean"
        return
    assert "type" in node or node.get("x-kubernetes-int-or-string"), "a structural schema types every node"
    assert not node.get("x-kubernetes-preserve-unknown-fields")


@PARAMETERS
def test_what_people_write_is_bounded_so_that_rules_stay_cheap(kind: str, path: str, node: dict[str, Any]) -> None:
    if not path.startswith(f"{kind}.spec"):
        return
    kind_of = node.get("type")
    if kind_of == "array":
        assert "maxItems" in node
    elif kind_of == "object" and "additionalProperties" in node:
        assert "maxProperties" in node
    elif kind_of == "string":
        assert "maxLength" in node or "enum" in node
    elif kind_of == "integer":
        assert {"minimum", "maximum"} <= set(node)


@PARAMETERS
def test_no_field_is_called_what_yaml_1_1_takes_for_a_boolean(kind: str, path: str, node: dict[str, Any]) -> None:
    names = set(node.get("properties", {}))
    assert all(isinstance(name, str) for name in names)
    assert not {name.lower() for name in names} & {"on", "off", "yes", "no", "y", "n", "true", "false"}


@PARAMETERS
def test_lists_of_named_things_are_maps(kind: str, path: str, node: dict[str, Any]) -> None:
    if node.get("type") == "array" and "name" in node["items"].get("properties", {}):
        assert node["x-kubernetes-list-type"] == "map"


@pytest.mark.parametrize(("kind", "short"), [("EventStream", "evs"), ("Projection", "proj")])
def test_names_are_the_contract(kind: str, short: str) -> None:
    spec = yaml.safe_load(FILES[kind].read_text())["spec"]
    assert spec["group"] == "refold.dev"
    assert spec["scope"] == "Namespaced"
    assert spec["names"]["kind"] == kind
    assert spec["names"]["shortNames"] == [short]
    assert spec["names"]["categories"] == ["all", "refold"]
    assert version(kind)["name"] == "v1alpha1"
    assert "status" in version(kind)["subresources"]


def test_scaling_a_projection_is_scaling_its_projectors() -> None:
    assert version("Projection")["subresources"]["scale"] == {
        "specReplicasPath": ".spec.projector.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    # kubectl scale needs a value to begin with
    assert schema("Projection", "spec", "projector")["default"] == {}
    assert schema("Projection", "spec", "projector", "replicas")["default"] == 1


def test_printer_columns_show_fields_that_exist() -> None:
    for kind in FILES:
        for column in version(kind)["additionalPrinterColumns"]:
            path = column["jsonPath"].partition("[?")[0].strip(".").split(".")
            if path[0] != "metadata":
                schema(kind, *path)


def test_the_definitions_model_has_the_projections_fields() -> None:
    own = {"readStore", "projector", "query", "keepPrevious", "ttl", "deletionPolicy", "paused"}
    assert set(schema("Projection", "spec")["properties"]) - own == aliases(Definition)
    assert set(schema("Projection", "spec", "columns", "[]")["properties"]) == set(Column.model_fields)
    assert set(schema("Projection", "spec", "fold", "[]")["properties"]) == set(FoldRule.model_fields)
    handler = schema("Projection", "spec", "handler")
    assert set(handler["properties"]) == set(Handler.model_fields)
    keys = handler["properties"]["keys"]
    assert (tuple(keys["enum"]), keys["default"]) == (
        get_args(Handler.model_fields["keys"].annotation),
        Handler.model_fields["keys"].default,
    )
    assert schema("Projection", "spec", "columns", "[]", "type")["enum"] == [str(each) for each in ColumnType]


def aliases(model: type[Any]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_the_operators_models_have_the_resources_fields() -> None:
    assert aliases(resources.EventStreamSpec) == set(schema("EventStream", "spec")["properties"])
    assert aliases(resources.EventType) == set(schema("EventStream", "spec", "events", "[]")["properties"])
    assert aliases(resources.Topic) == set(schema("EventStream", "spec", "topic")["properties"])
    for part, processes, scaling in (
        ("projector", resources.Projectors, resources.ProjectorScaling),
        ("query", resources.Queries, resources.QueryScaling),
    ):
        assert aliases(processes) == set(schema("Projection", "spec", part)["properties"])
        fields = schema("Projection", "spec", part, "autoscaling")["properties"]
        assert aliases(scaling) == set(fields)
        assert {field.alias: field.default for field in scaling.model_fields.values() if not field.is_required()} == {
            name: field["default"] for name, field in fields.items() if "default" in field
        }
    own = {"readStore", "projector", "query", "keepPrevious", "asOf", "ttl", "deletionPolicy", "paused"}
    assert aliases(resources.ProjectionSpec) - {"streams"} == own
    store = schema("Projection", "spec", "readStore")
    assert aliases(resources.ReadStoreChoice) == set(store["properties"])
    assert aliases(resources.SecretReference) == set(store["properties"]["connectionRef"]["properties"])
    assert store["default"] == {"type": resources.ReadStoreChoice().type}
    assert set(store["properties"]["type"]["enum"]) == set(get_args(resources.ReadStoreChoice.__annotations__["type"]))


def test_the_rule_allows_the_topic_configs_that_the_operator_manages() -> None:
    config = schema("EventStream", "spec", "topic", "config")
    rule = config["x-kubernetes-validations"][0]["rule"]
    allowed = {part for part in rule.replace("'", '"').split('"') if "." in part and "self" not in part}
    assert allowed == eventstream.CONFIGURABLE
    assert all(name in config["description"] for name in allowed)
    assert not any(name.startswith("cleanup") for name in allowed)


@pytest.mark.parametrize("kind", FILES)
def test_the_models_read_the_defaults_that_the_api_server_fills_in(kind: str) -> None:
    policy = schema(kind, "spec", "deletionPolicy")
    model = resources.EventStreamSpec if kind == "EventStream" else resources.ProjectionSpec
    assert model.model_fields["deletion_policy"].default == policy["default"]
    assert set(policy["enum"]) == {"Retain", "Delete"}
    kept = schema("Projection", "spec", "keepPrevious")["default"]
    assert resources.ProjectionSpec.model_fields["keep_previous"].default == resources.duration(kept)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("1h", 3600), ("1h30m", 5400), ("90s", 90), ("1h1s", 3601), *((bad, None) for bad in BAD_DURATIONS)],
)
def test_durations_are_what_the_schema_lets_pass(text: str, seconds: int | None) -> None:
    pattern = schema("Projection", "spec", "keepPrevious")["pattern"]
    assert schema("Projection", "spec", "ttl")["pattern"] == pattern
    if seconds is None:
        assert not re.search(pattern, text) or len(text) < 2
        with pytest.raises(ValueError, match="duration"):
            resources.duration(text)
    else:
        assert re.search(pattern, text)
        assert resources.duration(text) == dt.timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("fold", {"type": "A"}, False),
        ("fold", {"type": "A", "when": "true"}, False),
        *(("fold", {"type": "A", operation: {"c": "1"}}, True) for operation in OPERATIONS),
        ("fold", {"type": "A", **{operation: {"c": "1"} for operation in OPERATIONS}}, True),
        ("fold", {"type": "A", "delete": True}, True),
        *(("fold", {"type": "A", operation: {"c": "1"}, "delete": True}, False) for operation in OPERATIONS),
        ("columns", {"name": "c", "type": "text", "nullable": True}, True),
        ("columns", {"name": "c", "type": "text", "nullable": False}, False),
        ("columns", {"name": "c", "type": "text", "nullable": False, "default": "'x'"}, True),
    ],
)
def test_rules_refuse_what_cannot_work(path: str, value: dict[str, Any], *, allowed: bool) -> None:
    (rule,) = schema("Projection", "spec", path, "[]")["x-kubernetes-validations"]
    assert allows(rule["rule"], value) is allowed


def allows(rule: str, value: dict[str, Any]) -> bool:
    environment = celpy.Environment()
    program = environment.program(environment.compile(rule))
    return bool(program.evaluate({"self": celpy.json_to_cel(value)}))


DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("handler", "allowed"),
    [
        ({"image": "registry/acme:1"}, False),
        ({"image": "registry/acme:1", "version": "1"}, True),
        ({"image": f"registry/acme@{DIGEST}"}, True),
        ({"image": f"registry/acme@{DIGEST[:-1]}"}, False),
        ({"image": f"registry/acme@{DIGEST}0"}, False),
    ],
)
def test_the_schema_takes_the_images_that_the_model_takes(handler: dict[str, Any], *, allowed: bool) -> None:
    (rule,) = schema("Projection", "spec", "handler")["x-kubernetes-validations"]
    assert allows(rule["rule"], handler) is allowed
    model = Handler(function="m:f", **handler)
    assert (model.digest is not None or model.version is not None) is allowed


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [
        ({"key": "subject", "fold": []}, True),
        ({"key": "subject", "handler": {}}, True),
        ({"key": "data.k", "fold": []}, True),
        ({"key": "data.k", "handler": {}}, False),
        ({"key": "subject", "fold": [], "handler": {}}, False),
        ({"key": "subject"}, False),
    ],
)
def test_a_projection_has_either_a_fold_or_a_handler(spec: dict[str, Any], *, allowed: bool) -> None:
    rules = [rule["rule"] for rule in schema("Projection", "spec")["x-kubernetes-validations"]]
    about = [rule for rule in rules if "handler" in rule]
    assert len(about) == 2
    assert all(allows(rule, spec) for rule in about) is allowed


def test_the_schema_takes_the_functions_that_the_model_takes() -> None:
    (pattern,) = [found.pattern for found in Handler.model_fields["function"].metadata if hasattr(found, "pattern")]
    assert schema("Projection", "spec", "handler", "function")["pattern"] == pattern
