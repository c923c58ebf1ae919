"""The example resources are what the platform accepts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from refold.projection import definition
from refold_operator import spec_guard

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    (path, document)
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
    if document and document.get("apiVersion") == "refold.dev/v1alpha1"
]


def test_there_is_an_example_of_each_kind() -> None:
    assert {document["kind"] for _, document in EXAMPLES} == {"EventStream", "Projection"}
    single = {
        definition.single_partition(definition.parse(document["spec"]))
        for _, document in EXAMPLES
        if document["kind"] == "Projection"
    }
    assert single == {True, False}, "of rows fed by one partition and of rows fed by several"


@pytest.mark.parametrize(
    "document",
    [document for _, document in EXAMPLES],
    ids=[f"{path.name}:{document['metadata']['name']}" for path, document in EXAMPLES],
)
def test_an_example_can_work(document: dict[str, Any]) -> None:
    if document["kind"] == "EventStream":
        assert spec_guard.check_event_stream(document["spec"], namespace="shop", rules=spec_guard.Rules()) == []
    else:
        assert spec_guard.check_projection(document["spec"]) == []
