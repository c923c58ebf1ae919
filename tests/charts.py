"""The Helm chart as helm renders it, for the tests of what is in it."""

import copy
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "charts" / "refold"
NAMESPACE = "refold-system"
EMBEDDED: dict[str, Any] = {"embedded": {"enabled": True}}
EXTERNAL: dict[str, Any] = {
    "store": {"adminSecret": "my-store"},
    "readStore": {"adminSecret": "my-read-store"},
    "kafka": {"bootstrapServers": "kafka-0:9092,kafka-1:9092"},
}

Manifest = dict[str, Any]


@functools.cache
def helm_program() -> str:
    cache = Path(os.environ.get("REFOLD_CACHE") or Path.home() / ".cache" / "refold")
    found = shutil.which("helm", path=f"{cache / 'bin'}:{os.environ['PATH']}")
    if found is None:
        pytest.fail("the chart's tests need helm: `make tools` provides it (70 s once)", pytrace=False)
    return found


def helm(command: str, values: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    # a helm that was built from its Go module believes the cluster to be of version 1.20
    return subprocess.run(
        [helm_program(), *command.split(), CHART, "-n", NAMESPACE, "--kube-version=1.34.0", "--values=-", *options],
        input=json.dumps(values), text=True, capture_output=True, check=False,
    )  # fmt: skip


@functools.cache
def rendered(values: str) -> list[Manifest]:
    result = helm("template refold", json.loads(values))
    assert result.returncode == 0, result.stderr
    return [document for document in yaml.load_all(result.stdout, yaml.CSafeLoader) if document]


def render(values: dict[str, Any]) -> list[Manifest]:
    return copy.deepcopy(rendered(json.dumps(values)))


def refusal(values: dict[str, Any]) -> str:
    result = helm("template refold", values)
    assert result.returncode != 0, "the chart took the values"
    return result.stderr


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def at(path: str, value: Any) -> dict[str, Any]:
    """Return values with only `path` (dots between keys) set."""
    result = value
    for key in reversed(path.split(".")):
        result = {key: result}
    assert isinstance(result, dict)
    return result


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    found = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Yield name and pod template of everything that is or makes pods."""
    for manifest in manifests:
        if "template" in manifest.get("spec", {}):
            yield f"{manifest['kind']}/{manifest['metadata']['name']}", manifest["spec"]["template"]
        elif manifest["kind"] == "Pod":
            yield f"Pod/{manifest['metadata']['name']}", manifest
