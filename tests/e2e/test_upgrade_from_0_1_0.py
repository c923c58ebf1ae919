"""From Refold 0.1.0 to this one, back, and to this one again, under appends and reads that nobody pauses.

Three minutes, beyond what CI has: `make e2e-upgrade` runs it. Chart and image of 0.1.0 are built from the commit in
`upgrade-from`. The installation is made anew for it, without data: a store that this release has already migrated would
not be one that 0.1.0 has made.
"""

import base64
import os
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from hack.client import EVENT_STORE, NAMESPACE, bearer, eventually, kubectl, wait_ready
from tests.e2e.conftest import CHART, Sandbox, helm
from tests.e2e.orders import ORDER_STATUS, STREAM

ROOT = Path(__file__).parents[2]
COMMIT = (Path(__file__).parent / "upgrade-from").read_text().strip()
#: Seconds without an acknowledged append, or without an answered read, that a caller may see while pods are replaced.
#: On the way back Helm deletes what 0.1.0 doesn't have, such as the right to ask who may call, while processes that
#: need it still serve.
LONGEST_GAPS = {"upgrade": 10.0, "rollback": 45.0}

pytestmark = pytest.mark.skipif(not os.environ.get("REFOLD_UPGRADE"), reason="make e2e-upgrade runs it")


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the sources of 0.1.0."""
    folder = tmp_path_factory.mktemp("refold-0.1.0")
    packed = subprocess.run(["git", "-C", ROOT, "archive", COMMIT], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def installed(former: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Install 0.1.0 on an empty namespace; yield this release's values, which stand at the end again."""
    values = yaml.safe_load(helm("get", "values", "refold", "-o", "yaml"))
    image = subprocess.run(
        [former / "hack/kind/images.sh", "refold"], check=True, capture_output=True, text=True
    ).stdout.strip()  # fmt: skip
    embedded = {name: values["embedded"][name] for name in ("enabled", "postgres", "kafka")}
    old = {
        "image": {"repository": image.partition(":")[0], "tag": image.partition(":")[2]},
        "embedded": embedded, "eventstore": {"service": values["eventstore"]["service"]},
    }  # fmt: skip
    _empty()
    (tmp_path / "former.yaml").write_text(yaml.safe_dump(old))
    (tmp_path / "present.yaml").write_text(yaml.safe_dump(values))
    try:
        helm(
            "install", "refold", str(former / "charts" / "refold"), "-f", str(tmp_path / "former.yaml"),
            "--wait", "--timeout=5m",
        )  # fmt: skip
        yield values
    finally:
        helm(
            "upgrade", "--install", "refold", str(CHART), "-f", str(tmp_path / "present.yaml"),
            "--wait", "--timeout=5m",
        )  # fmt: skip


def _empty() -> None:
    helm("uninstall", "refold", "--wait", "--timeout=5m")
    kubectl("delete", "crd", "eventstreams.refold.dev", "projections.refold.dev", "--timeout=120s")
    kubectl("-n", NAMESPACE, "delete", "persistentvolumeclaims,secrets", "--all", "--timeout=120s")
    eventually(lambda: not kubectl("-n", NAMESPACE, "get", "pods", "-o", "name").strip(), "the release's pods end")


class Caller(threading.Thread):
    """Appends one event after another and reads its row's model, with the token that the server at hand takes."""

    def __init__(self, namespace: str, query: str) -> None:
        super().__init__(daemon=True)
        self.path = f"/v1/streams/{namespace}/orders/subjects"
        secret = kubectl("-n", NAMESPACE, "get", "secret", "refold-token", "-o", "jsonpath={.data.token}")
        #: That of 0.1.0, which all callers share, and a ServiceAccount's.
        self._tokens = [base64.b64decode(secret).decode(), bearer()]
        self._query = query
        self._stopped = threading.Event()
        self.appended = self.read = 0
        self.refused: list[str] = []
        self.gaps: dict[str, float] = {"append": 0.0, "read": 0.0}
        #: What was answered, or not, in place of a success.
        self.trouble: list[str] = []

    def run(self) -> None:
        last = dict.fromkeys(self.gaps, time.monotonic())
        with httpx.Client(timeout=5, trust_env=False) as http:
            while not self._stopped.is_set():
                event = {"id": "1", "type": "OrderPlaced", "data": {"total": 1}}
                url = f"{EVENT_STORE}{self.path}/order-{self.appended}/events"
                body = {"expectedRevision": "any", "events": [event]}
                if self._send(http, "POST", url, json=body):
                    self.appended += 1
                    self._note("append", last)
                if self._send(http, "GET", f"{self._query}/v1/rows?limit=1"):
                    self.read += 1
                    self._note("read", last)
                self._stopped.wait(0.02)

    def _send(self, http: httpx.Client, method: str, url: str, **sent: Any) -> bool:
        for token in list(self._tokens):
            try:
                answer = http.request(method, url, headers={"authorization": f"Bearer {token}"}, **sent)
            except httpx.TransportError as error:
                self._told(method, repr(error))
                return False
            if answer.is_success:
                return True
            if answer.status_code not in (401, 403):
                if answer.status_code < 500:
                    self.refused.append(f"{method} {url}: {answer.status_code} {answer.text}")
                self._told(method, f"{answer.status_code} {answer.text[:200]}")
                return False
        return False

    def _told(self, method: str, what: str) -> None:
        self.trouble.append(f"{time.strftime('%H:%M:%S')} {method} {what}")

    def _note(self, what: str, last: dict[str, float]) -> None:
        now = time.monotonic()
        self.gaps[what] = max(self.gaps[what], now - last[what])
        last[what] = now

    def longest(self) -> dict[str, float]:
        """Return the longest gaps since this was asked before."""
        found, self.gaps = self.gaps, dict.fromkeys(self.gaps, 0.0)
        return found

    def finish(self) -> None:
        """Stop after what is under way."""
        self._stopped.set()
        self.join(30)
        assert not self.is_alive()


def test_an_upgrade_from_0_1_0_and_back_keeps_data_and_interrupts_nobody(
    installed: dict[str, Any], sandbox: Sandbox, tmp_path: Path
) -> None:
    sandbox.apply(STREAM, ORDER_STATUS)
    model = sandbox.read_model("order-status")
    caller = Caller(sandbox.name, model.base)
    caller.start()
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({**installed, "auth": None}))
    longest: list[tuple[str, float]] = []
    try:
        for step in (
            ("upgrade", "refold", str(CHART), "-f", str(file)),
            ("rollback", "refold", "1"),
            ("upgrade", "refold", str(CHART), "-f", str(file)),
        ):
            helm(*step, "--wait", "--timeout=5m")
            wait_ready(sandbox.name)
            appended, read = caller.appended + 50, caller.read + 50
            eventually(lambda: caller.appended > appended, f"appends go on after {step[0]}")  # noqa: B023 - at once
            eventually(lambda: caller.read > read, f"reads go on after {step[0]}")  # noqa: B023
            time.sleep(15)  # processes of Projections are replaced after helm's have been
            read = caller.read + 50
            eventually(lambda: caller.read > read, f"reads go on after {step[0]}")  # noqa: B023
            found = caller.longest()
            print(f"{step[0]}: longest gaps {found}", flush=True)
            longest.append((step[0], max(found.values())))
    finally:
        caller.finish()
    assert caller.refused == []
    trouble = "\n".join(caller.trouble)
    assert all(seconds < LONGEST_GAPS[step] for step, seconds in longest), f"{longest}\n{trouble}"
    eventually(lambda: sum(1 for _ in model.rows()) == caller.appended, "each acknowledged append has its row")
    assert {row["total"] for _, row in model.rows()} == {1}
    stream = sandbox.stream()
    assert len(stream.events(f"order-{caller.appended - 1}")) == 1
