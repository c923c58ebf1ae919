"""The example of code in place of a definition: its image is built from Refold's, loaded, and folds."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hack.client import NAMESPACE, eventually, kubectl
from tests.e2e.conftest import Sandbox
from tests.e2e.orders import STREAM

EXAMPLE = Path(__file__).parents[2] / "examples" / "handler"
IMAGE = "refold/acme:e2e"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The example's image, in the cluster; `hack/kind/images.sh` has built Refold's as refold/refold:dev."""
    archive = tmp_path_factory.mktemp("image") / "acme.tar"
    for command in (
        ["docker", "build", "-q", "--build-arg", "REFOLD_IMAGE=refold/refold:dev", "-t", IMAGE, str(EXAMPLE)],
        ["docker", "save", "-o", str(archive), IMAGE],
        ["kind", "load", "image-archive", "--name", "refold", str(archive)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    yield IMAGE
    subprocess.run(["docker", "rmi", IMAGE], capture_output=True, check=False)


def test_the_example_folds_in_its_own_image_and_queries_run_refolds(sandbox: Sandbox, image: str) -> None:
    resource = yaml.safe_load((EXAMPLE / "projection.yaml").read_text())
    resource["spec"]["handler"]["image"] = image
    sandbox.apply(STREAM)
    placed = {"id": "1", "type": "OrderPlaced", "data": {"customerId": "c1"}}
    added = {"id": "2", "type": "ItemAdded", "data": {"product": "tea", "qty": 2, "price": 2.5}}
    shipped = {"id": "3", "type": "OrderShipped", "data": {}}
    stream = sandbox.stream()
    assert stream.append("o1", [placed, added, shipped]).status_code == 201
    assert stream.append("o2", [placed, shipped]).status_code == 201, "without lines it can't be shipped"
    sandbox.apply(resource)
    model = sandbox.read_model("order-lines")
    o1 = {"status": "shipped", "customer": "c1", "lines": {"tea": 2}, "total": 5}
    o2 = {"status": "placed", "customer": "c1", "lines": None, "total": None}
    eventually(lambda: dict(model.rows()) == {"o1": o1, "o2": o2}, "the rows")
    found = json.loads(kubectl("-n", sandbox.name, "get", "deployments", "-o", "json"))["items"]
    images = {
        each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]["template"]["spec"]["containers"][0][
            "image"
        ]
        for each in found
    }
    operators = kubectl("-n", NAMESPACE, "get", "deployments", "-o", "jsonpath={..containers[*].image}").split()
    assert images["projector"] == image
    assert images["query"] in operators

    (parked,) = model.get("/v1/parked").raise_for_status().json()["parked"]
    assert parked["key"] == "o2"
    assert "without lines was shipped (orders.py, line " in parked["error"]
