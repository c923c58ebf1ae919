"""A small client of an installation on the kind cluster, for the demo and the e2e tests: kubectl, appends, rows.

Everything goes to 127.0.0.1, to node ports that the kind cluster maps there (hack/kind/).
"""

import functools
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from refold import tokens

from hack.servers.callers import NO_CERTIFICATES

CONTEXT = "kind-refold"
NAMESPACE = "refold-system"
EVENT_STORE = "http://127.0.0.1:30080"
_T = TypeVar("_T")


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    """Run kubectl against the kind cluster and return what it printed.

    Raises:
        RuntimeError: it failed, with what it said (only where `check`).
    """
    done = subprocess.run(
        ["kubectl", "--context", CONTEXT, *arguments], input=stdin, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def resource(kind: str, name: str, namespace: str) -> dict[str, Any]:
    """Return one resource."""
    found: dict[str, Any] = json.loads(kubectl("-n", namespace, "get", kind, name, "-o", "json"))
    return found


def wait_ready(namespace: str, *, timeout: int = 300) -> None:
    """Wait until each EventStream and Projection of a namespace is Ready."""
    names = kubectl("-n", namespace, "get", "eventstreams.refold.dev,projections.refold.dev", "-o", "name").split()
    kubectl("-n", namespace, "wait", *names, "--for=condition=Ready", f"--timeout={timeout}s")


def eventually(attempt: Callable[[], _T | None], what: str, *, timeout: float = 120, every: float = 0.5) -> _T:
    """Return the first answer of `attempt` that is neither None nor False.

    A connection that is refused or reset counts as no answer: a new node port takes a moment to be routed.

    Raises:
        TimeoutError: there was none within `timeout` seconds; it says `what` was waited for.
    """
    deadline = time.monotonic() + timeout
    while True:
        lost = None
        try:
            answer = attempt()
        except httpx.TransportError as error:
            answer, lost = None, error
        if answer is not None and answer is not False:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout} s") from lost
        time.sleep(every)


@functools.cache
def bearer() -> str:
    """Return a token of the caller that hack/kind/caller.yaml makes, valid for four hours."""
    return token("default", "refold-local", "--duration=4h")


def token(namespace: str, account: str, *options: str) -> str:
    """Return a new token of a ServiceAccount, for the audience `refold`."""
    return kubectl("-n", namespace, "create", "token", account, "--audience=refold", *options).strip()


def http(base: str, *, timeout: float = 60) -> httpx.Client:
    """Return a client of one service that sends the token of `bearer`."""
    # trust_env: a proxy of the environment must not come between us and 127.0.0.1
    return httpx.Client(
        base_url=base,
        headers={"Authorization": f"Bearer {bearer()}"},
        timeout=timeout,
        trust_env=False,
        verify=NO_CERTIFICATES,
    )


def _persistently(send: Callable[[], httpx.Response], *, timeout: float) -> httpx.Response:
    """Send until there is an answer other than 502, 503 and 504, for at most `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.1
    while True:
        try:
            response = send()
            if response.status_code not in (502, 503, 504):
                return response
            said = f"{response.status_code} {response.text[:200]}"
        except httpx.TransportError as error:
            said = repr(error)
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer within {timeout} s; the last try: {said}")
        time.sleep(pause)
        pause = min(pause * 2, 2)


class Stream:
    """Appends to one EventStream; retries are safe, since every event has an id."""

    def __init__(self, namespace: str, name: str, *, base: str = EVENT_STORE, timeout: float = 180) -> None:
        """`timeout`: for how many seconds an append is tried again while the event store is away."""
        self._path = f"/v1/streams/{namespace}/{name}"
        self._http, self._timeout = http(base), timeout
        #: the latest position of each partition that an append was acknowledged with
        self.positions: dict[int, int] = {}

    def append(self, subject: str, events: Sequence[dict[str, Any]], *, expected: int | str = "any") -> httpx.Response:
        """Append to one subject and return the answer, whatever it is."""
        path = f"{self._path}/subjects/{quote(subject, safe='')}/events"
        body = {"expectedRevision": expected, "events": events}
        response = _persistently(lambda: self._http.post(path, json=body), timeout=self._timeout)
        if response.status_code == httpx.codes.CREATED:
            self._saw(response.json()["token"])
        return response

    def bulk(self, appends: Sequence[dict[str, Any]]) -> int:
        """Append all lines and return how many events that were; lines that failed for want of a server go again.

        Raises:
            RuntimeError: a line was refused.
        """
        waiting = list(appends)
        deadline = time.monotonic() + self._timeout
        while waiting:
            answer = self._send_lines(waiting)
            answer.raise_for_status()
            lines = [json.loads(line) for line in answer.text.splitlines()]
            again = []
            for append, line in zip(waiting, lines, strict=False):
                if "error" not in line:
                    self._saw(line["token"])
                elif line["error"]["status"] == httpx.codes.SERVICE_UNAVAILABLE:
                    again.append(append)
                else:
                    raise RuntimeError(f"{append} was refused: {line['error']}")
            waiting = again + waiting[len(lines) :]
            if waiting and time.monotonic() > deadline:
                raise TimeoutError(f"{len(waiting)} appends were not acknowledged within {self._timeout} s")
        return sum(len(append["events"]) for append in appends)

    def _send_lines(self, appends: Sequence[dict[str, Any]]) -> httpx.Response:
        content = b"".join(json.dumps(append).encode() + b"\n" for append in appends)
        headers = {"Content-Type": "application/x-ndjson"}
        return _persistently(
            lambda: self._http.post(f"{self._path}/events", content=content, headers=headers), timeout=self._timeout
        )

    def events(self, subject: str) -> list[dict[str, Any]]:
        """Return the events of one subject."""
        response = self._http.get(f"{self._path}/subjects/{quote(subject, safe='')}/events")
        events: list[dict[str, Any]] = response.raise_for_status().json()["events"]
        return events

    def _saw(self, token: str) -> None:
        for _, partition, position in map(_fields, tokens.decode(token)):
            self.positions[partition] = max(position, self.positions.get(partition, 0))


def _fields(position: tokens.Position) -> tuple[str, int, int]:
    return position.incarnation, position.partition, position.position


class ReadModel:
    """Rows of one Projection, through its query service."""

    def __init__(self, base: str, *, timeout: float = 180) -> None:
        """`timeout`: for how many seconds a query is tried again while the query service is away."""
        self.base, self._http, self._timeout = base, http(base), timeout

    def get(self, path: str, headers: dict[str, str] | None = None, /, **parameters: str | int) -> httpx.Response:
        """Return the answer to a GET."""
        return _persistently(
            lambda: self._http.get(path, params=parameters or None, headers=headers), timeout=self._timeout
        )

    def row(self, key: str) -> dict[str, Any] | None:
        """Return the columns of one row, or None."""
        response = self.get(f"/v1/rows/{quote(key, safe='')}")
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        data: dict[str, Any] = response.raise_for_status().json()["data"]
        return data

    def rows(self, *, where: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield key and columns of all rows, or of those that a filter `column:op:value` lets through."""
        parameters: dict[str, str | int] = {"limit": 1000} | ({"where": where} if where else {})
        while True:
            page = self.get("/v1/rows", **parameters).raise_for_status().json()
            for row in page["rows"]:
                yield row["key"], row["data"]
            if page["next"] is None:
                return
            parameters["cursor"] = page["next"]

    def status(self) -> dict[str, Any]:
        """Return version, positions and lag."""
        status: dict[str, Any] = self.get("/v1/status").raise_for_status().json()
        return status

    def applied(self) -> dict[int, int]:
        """Return the applied position of each partition (of the one stream)."""
        return {entry["partition"]: entry["position"] for entry in self.status()["positions"]}

    def wait_applied(self, positions: dict[int, int], *, timeout: float = 300) -> None:
        """Wait until `positions` are applied."""
        eventually(
            lambda: all(self.applied().get(partition, 0) >= wanted for partition, wanted in positions.items()),
            f"positions {positions} in the read model", timeout=timeout,
        )  # fmt: skip
