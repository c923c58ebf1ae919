"""An EventStream that says which events it takes, from the resource to the answers of the event store."""

from pathlib import Path
from typing import Any

import yaml

from hack.client import eventually
from tests.e2e.conftest import Sandbox

EXAMPLE = yaml.safe_load((Path(__file__).parents[2] / "examples" / "eventstream-shipments.yaml").read_text())


def changed(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the example with another schema of one type."""
    events = [{"name": name, "schema": schema} if each["name"] == name else each for each in EXAMPLE["spec"]["events"]]
    return {**EXAMPLE, "spec": {**EXAMPLE["spec"], "events": events}}


def test_what_the_resource_says_is_what_the_event_store_takes(sandbox: Sandbox) -> None:
    sandbox.apply(EXAMPLE)
    stream = sandbox.stream("shipments")
    sent = {"id": "1", "type": "ShipmentSent", "data": {"carrier": "post", "sentAt": "2026-01-31T12:00:00Z"}}
    assert stream.append("s1", [sent]).status_code == 201
    pigeon = {**sent, "id": "2", "data": {**sent["data"], "carrier": "pigeon"}}
    answer = stream.append("s1", [pigeon])
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/carrier")
    lost = stream.append("s1", [{"id": "3", "type": "ShipmentLost", "data": {}}])
    assert (lost.status_code, "ShipmentSent" in lost.json()["types"]) == (422, True)

    sandbox.apply(changed("ShipmentSent", {"properties": {"carrier": {"const": "pigeon"}}}), ready=False)
    eventually(lambda: stream.append("s1", [pigeon]).status_code == 201, "the new schema holds")
    again = stream.append("s1", [sent])
    assert (again.status_code, again.headers["refold-replayed"]) == (201, "true")
    assert stream.append("s1", [{**sent, "id": "4"}]).status_code == 422
