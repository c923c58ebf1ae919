"""What `helm test` runs, against two ends that answer as they should, or as they shouldn't."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from refold_operator import selftest
from refold_operator.selftest import FailedError, Settings, run


class Installation:
    """Both ends of an installation at one port; `spoil` changes what is answered."""

    def __init__(self) -> None:
        self.events: dict[str, list[Any]] = {}
        self.callers: list[str] = []
        self.waited: list[tuple[str, str]] = []
        self.spoil: Callable[[str, int, Any], tuple[int, Any]] = lambda _, status, answer: (status, answer)
        ends = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                subject = self.path.split("/")[-2]
                ends.events.setdefault(subject, json.loads(self.rfile.read(length))["events"])
                self._answer("append", 201, {"token": "t"})

            def do_GET(self) -> None:
                if self.path.startswith("/v1/rows/"):
                    ends.waited.append((self.headers["refold-token"], self.headers["prefer"]))
                    (event,) = ends.events[self.path.split("/")[-1]]
                    self._answer("row", 200, {"data": event["data"]})
                else:
                    self._answer("events", 200, {"events": ends.events[self.path.split("/")[-2]]})

            def _answer(self, what: str, status: int, body: Any) -> None:
                ends.callers.append(self.headers["authorization"])
                status, body = ends.spoil(what, status, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def installation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    monkeypatch.setattr(selftest, "_PAUSE_SECONDS", 0.02)
    ends = Installation()
    thread = Thread(target=ends.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield ends
    ends.server.shutdown()
    ends.server.server_close()
    thread.join()


@pytest.fixture
def settings(installation: Installation, tmp_path: Path) -> Settings:
    url = f"http://127.0.0.1:{installation.server.server_port}"
    (tmp_path / "token").write_text("a-token\n")
    return Settings(
        eventstore_url=url, query_url=url, stream="shop/orders", token_file=tmp_path / "token", within_seconds=0.5
    )


def test_an_event_whose_row_comes_out_with_it_is_enough(installation: Installation, settings: Settings) -> None:
    run(settings)
    (events,) = installation.events.values()
    assert [event["type"] for event in events] == ["Tested"]
    assert set(installation.callers) == {"Bearer a-token"}
    assert installation.waited == [("t", "wait=5")], "it asks for rows that hold the event"


def test_what_is_not_there_yet_is_asked_again(installation: Installation, settings: Settings) -> None:
    refused = iter([401, 404, 503, 201, 200, 504, 503])

    def spoil(_: str, status: int, answer: Any) -> tuple[int, Any]:
        return next(refused, status), answer

    installation.spoil = spoil
    run(settings)
    assert next(refused, None) is None
    assert len(installation.events) == 1, "the same append each time"


@pytest.mark.parametrize(
    ("end", "status", "answer", "said"),
    [
        ("append", 403, {"detail": "may not"}, "append an event: POST .* didn't answer 201 in time.*403 .*may not"),
        ("append", 500, "", "didn't answer 201 in time.*500"),
        ("events", 200, {"events": []}, "other events of test-.* than the one that was appended"),
        ("row", 504, {"detail": "not applied"}, "read the event's row: .*504 .*not applied"),
        ("row", 200, {"data": {"number": -1}}, "its data should be"),
    ],
)
def test_an_installation_that_does_not_work_fails_the_test_with_what_it_answered(
    installation: Installation, settings: Settings, end: str, status: int, answer: Any, said: str
) -> None:
    installation.spoil = lambda what, was, body: (status, answer) if what == end else (was, body)
    with pytest.raises(FailedError, match=said):
        run(settings)


def test_an_end_that_is_not_there_fails_it_too(settings: Settings) -> None:
    with pytest.raises(FailedError, match=r"append an event.*ConnectError"):
        run(settings.model_copy(update={"eventstore_url": "http://127.0.0.1:1"}))
