"""The `refold` command as a container starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REFOLD = Path(sys.executable).with_name("refold")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REFOLD_")}
    return subprocess.run(
        [REFOLD, *arguments], env={**environment, **variables}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("command", ["eventstore", "relay", "projector", "query", "operator"])
def test_a_process_without_its_settings_names_them_in_one_json_line(command: str) -> None:
    ended = run(command)
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    logged = json.loads(line)
    assert (logged["level"], logged["process"]) == ("error", command)
    assert set(logged["variables"].values()) == {"Field required"}


def test_settings_that_are_wrong_are_named_without_their_values() -> None:
    ended = run(
        "query", REFOLD_PROJECTION="a", REFOLD_READSTORE_DSN="postgresql://u:hunter2@h/d", REFOLD_AUTH="hunter2" * 9
    )
    assert ended.returncode == 2
    assert set(json.loads(ended.stderr)["variables"]) == {"REFOLD_PROJECTION", "REFOLD_AUTH"}
    assert "hunter2" not in ended.stderr + ended.stdout


def test_an_administrator_that_cannot_be_is_named_by_its_variable(tmp_path: Path) -> None:
    file = tmp_path / "dsn"
    file.write_text("postgresql://u:hunter2@/d")
    others = {"REFOLD_IMAGE": "i", "REFOLD_NAMESPACE": "n", "REFOLD_KAFKA_BOOTSTRAP": "k:1"}
    ended = run(
        "operator", REFOLD_STORE_ADMIN_DSN_FILE=str(file), REFOLD_READSTORE_ADMIN_DSN="hunter2",
        REFOLD_REDIS_ADMIN_URL_FILE=str(tmp_path / "none"), **others,
    )  # fmt: skip
    assert ended.returncode == 2
    assert set(json.loads(ended.stderr)["variables"]) == {
        "REFOLD_STORE_ADMIN_DSN_FILE", "REFOLD_READSTORE_ADMIN_DSN", "REFOLD_REDIS_ADMIN_URL_FILE",
    }  # fmt: skip
    assert "hunter2" not in ended.stderr + ended.stdout


@pytest.mark.parametrize("process", ["operator", "webhook"])
def test_a_list_that_is_no_json_is_named_in_one_line(process: str) -> None:
    ended = run(process, REFOLD_NAMESPACES="shop, bank")
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert '"namespaces"' in json.loads(line)["why"]


@pytest.mark.parametrize(
    ("auth", "why"),
    [
        ("kubernetes", "without a cluster give REFOLD_AUTH=tokens:FILE or REFOLD_AUTH=none"),
        ("tokens:/nowhere/tokens.yaml", "the file of tokens /nowhere/tokens.yaml can't be read"),
    ],
)
def test_a_way_to_decide_who_may_call_that_cannot_work_here_ends_the_process_with_what_to_give(
    auth: str, why: str
) -> None:
    ended = run("eventstore", "--auth", auth, REFOLD_STORE_DSN="postgresql://u:p@h/d", KUBERNETES_SERVICE_HOST="")
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert why in json.loads(line)["why"]
