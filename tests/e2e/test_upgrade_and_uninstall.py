"""A release that is upgraded, uninstalled and installed again: data stays, and no finalizer hangs."""

import json
import shutil
from pathlib import Path

import yaml

from hack.client import NAMESPACE, ReadModel, eventually, kubectl, wait_ready
from tests.e2e.conftest import CHART, Sandbox, helm
from tests.e2e.orders import ORDER_STATUS, STREAM, changed


def chart_with_a_changed_crd(folder: Path) -> Path:
    """Return a copy of the chart whose EventStream CRD has one more printer column."""
    chart = folder / "refold"
    shutil.copytree(CHART, chart)
    changed = 0
    for path in chart.rglob("*eventstreams*.yaml"):
        crd = yaml.safe_load(path.read_text())
        for version in crd["spec"]["versions"]:
            version["additionalPrinterColumns"].append(
                {"name": "Upgraded", "type": "string", "jsonPath": ".metadata.uid", "priority": 1}
            )
        path.write_text(yaml.safe_dump(crd, sort_keys=False))
        changed += 1
    assert changed == 1
    return chart


def test_an_upgrade_changes_the_crds_and_keeps_data_and_an_uninstall_leaves_no_finalizer(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    in_redis = changed(ORDER_STATUS, readStore={"type": "redis"})
    in_redis["metadata"]["name"] = "in-redis"
    sandbox.apply(STREAM, ORDER_STATUS, in_redis)
    stream = sandbox.stream()
    models = [sandbox.read_model(name) for name in ("order-status", "in-redis")]
    assert stream.append("o1", [{"id": "1", "type": "OrderPlaced", "data": {"total": 1}}]).status_code == 201
    for model in models:
        model.wait_applied(stream.positions)

    helm("upgrade", "refold", str(chart_with_a_changed_crd(tmp_path)), "--reuse-values", "--wait", "--timeout=5m")
    crd = json.loads(kubectl("get", "crd", "eventstreams.refold.dev", "-o", "json"))
    assert "Upgraded" in [column["name"] for column in crd["spec"]["versions"][0]["additionalPrinterColumns"]]
    assert stream.append("o1", [{"id": "2", "type": "ItemAdded", "data": {"qty": 1, "price": 2}}]).status_code == 201
    row = {"status": "placed", "items": 2, "total": 3}
    for model in models:
        model.wait_applied(stream.positions)
        assert model.row("o1") == row

    values = helm("get", "values", "refold", "-o", "yaml")
    helm("uninstall", "refold", "--wait", "--timeout=5m")
    try:
        for kind in ("eventstreams.refold.dev", "projections.refold.dev"):
            left = json.loads(kubectl("get", kind, "-A", "-o", "json"))["items"]
            assert left, f"{kind} must outlive the release"
            assert [item["metadata"].get("finalizers", []) for item in left] == [[]] * len(left)
        volumes = kubectl("-n", NAMESPACE, "get", "persistentvolumeclaims", "-o", "name")
        assert [name in volumes for name in ("refold-postgres", "refold-redis")] == [True, True]
        eventually(lambda: not kubectl("-n", NAMESPACE, "get", "pods", "-o", "name").strip(), "the release's pods end")
    finally:
        file = tmp_path / "values.yaml"
        file.write_text(values)
        helm("upgrade", "--install", "refold", str(CHART), "-f", str(file), "--wait", "--timeout=5m")
    eventually(
        lambda: (
            kubectl("-n", sandbox.name, "get", "evs,proj", "-o", "jsonpath={.items[*].metadata.finalizers}").count(
                "refold.dev/finalizer"
            )
            == 3
        ),
        "the new operator takes the resources back",
    )
    wait_ready(sandbox.name)
    assert len(sandbox.stream().events("o1")) == 2
    for model in models:
        again = ReadModel(model.base)
        assert eventually(
            lambda again=again: again.get("/v1/status").status_code == 200, "the query pods may ask about callers again"
        )
        assert again.row("o1") == row
