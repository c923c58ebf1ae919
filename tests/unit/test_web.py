"""The shared HTTP pieces, asked over a real socket where the wire matters."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence

import msgspec
import pytest
import structlog
from refold.web import bodies, openapi, paths
from refold.web.app import App
from refold.web.auth.access import EVENTS
from refold.web.auth.choice import authority
from refold.web.openapi import Operation, Parameter
from refold.web.probes import Probes
from refold.web.problems import Problem
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from hack.servers.callers import tokens_file
from tests.served import Served, serve

TOKEN = "a-secret"
ROOM = bodies.Room(1500, "room")


class Echo(msgspec.Struct):
    subject: str


async def echo(request: Request) -> Response:
    return Response(msgspec.json.encode(Echo(paths.parameter(request, "subject"))), media_type="application/json")


async def count(request: Request) -> Response:
    return Response(str(len(await bodies.read(request, 1000, "limit", ROOM))))


async def lines(request: Request) -> Response:
    found = [(number, line.decode()) async for number, line in bodies.lines(request, 20, "limit")]
    return Response(msgspec.json.encode(found), media_type="application/json")


async def fail(_: Request) -> Response:
    raise RuntimeError("password=hunter2")


async def refuse(_: Request) -> Response:
    raise Problem(409, "revision-conflict", "Revision conflict", "it is at 7", retry_after=0.2, currentRevision=7)


async def break_off(_: Request) -> Response:
    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        raise RuntimeError("gone")

    return StreamingResponse(body())


async def endless(_: Request) -> Response:
    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    return StreamingResponse(body())


OPERATIONS = [
    Operation(
        "GET",
        "/v1/subjects/{subject}/events",
        echo,
        summary="Echo",
        verb="get",
        parameters=[Parameter(name="subject", where="path", description="The subject")],
        answer={"application/json": Echo},
        problems=[404],
    ),
    Operation(
        "POST",
        "/count",
        count,
        summary="Count",
        verb="create",
        body={"application/json": Echo},
        answer={"text/plain": str},
    ),
    Operation("POST", "/lines", lines, summary="Lines", verb="create", answer={"application/json": list[str]}),
    Operation("GET", "/fail", fail, summary="Fail", verb="get", answer={"text/plain": str}),
    Operation("GET", "/refuse", refuse, summary="Refuse", verb="get", answer={"text/plain": str}, problems=[409]),
    Operation("GET", "/endless", endless, summary="Endless", verb="get", answer={"text/plain": str}),
    Operation("GET", "/break-off", break_off, summary="Break off", verb="get", answer={"text/plain": str}),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    async def ready() -> str | None:
        return "no database"

    app = App(
        "Echo", OPERATIONS, authority=authority(tokens_file(TOKEN)), kind=EVENTS,
        resource=lambda _: ("shop", "orders"), ready=ready,
    )  # fmt: skip
    with serve(app, TOKEN) as served:
        yield served


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ("a", "a"),
        ("a%2Fb", "a/b"),
        ("%2F", "/"),
        ("..", ".."),
        (".", "."),
        ("%2e%2E", ".."),
        ("%00", "\0"),
        ("%25", "%"),
        ("%252F", "%2F"),
        ("a+b", "a+b"),
        ("%20", " "),
        ("%E2%82%AC", "€"),
        ("%F0%9F%A6%8A", "🦊"),
        ("a%3Fb%23c", "a?b#c"),
        ("events", "events"),
        ("a%0Ab", "a\nb"),
    ],
)
def test_a_path_parameter_is_what_was_percent_encoded(served: Served, sent: str, meant: str) -> None:
    answer = served.ask(f"/v1/subjects/{sent}/events")
    assert (answer.status, answer.json()) == (200, {"subject": meant})


@pytest.mark.parametrize("sent", ["%", "%2", "%zz", "%ff", "%C0%80", "%ED%A0%80"])
def test_a_path_parameter_that_is_not_percent_encoded_utf_8_is_refused(served: Served, sent: str) -> None:
    answer = served.ask(f"/v1/subjects/{sent}/events")
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "https://refold.dev/problems/invalid-path"
    assert answer.json()["field"] == "subject"


@pytest.mark.parametrize("sent", ["/v1/subjects//events", "/v1/subjects/a/b/events", "/v1/subjects/a/events/", "/"])
def test_a_path_that_matches_no_route_is_a_problem_and_no_redirect(served: Served, sent: str) -> None:
    answer = served.ask(sent)
    assert answer.status == 404
    assert answer.json()["detail"] == f"nothing is served at {sent}"


def test_a_path_that_is_not_ascii_is_a_problem(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall("GET /v1/subjects/ü/events HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "https://refold.dev/problems/invalid-http"


def test_a_method_that_is_not_served_names_those_that_are(served: Served) -> None:
    answer = served.ask("/v1/subjects/a/events", "DELETE")
    assert answer.status == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert answer.json()["type"] == "https://refold.dev/problems/method-not-allowed"


def test_a_problem_carries_its_members_and_headers(served: Served) -> None:
    answer = served.ask("/refuse")
    assert answer.status == 409
    assert answer.headers["retry-after"] == "1"
    assert answer.json() == {
        "type": "https://refold.dev/problems/revision-conflict",
        "title": "Revision conflict",
        "status": 409,
        "detail": "it is at 7",
        "currentRevision": 7,
    }


def test_an_unexpected_error_is_logged_and_not_shown(served: Served) -> None:
    with structlog.testing.capture_logs() as logged:
        answer = served.ask("/fail")
    assert [(entry["path"], str(entry["exc_info"])) for entry in logged] == [("/fail", "password=hunter2")]
    assert answer.status == 500
    assert answer.json()["type"] == "https://refold.dev/problems/internal-error"
    assert b"hunter2" not in answer.body


def test_an_answer_that_fails_half_way_is_cut_off_and_not_ended(served: Served) -> None:
    with pytest.raises(http.client.IncompleteRead):
        served.ask("/break-off")


@pytest.mark.parametrize("path", ["/v1/subjects/a/events", "/metrics", "/openapi.json", "/nothing"])
@pytest.mark.parametrize("token", ["wrong", "a-secre", "a-secret2", "\xe4"])
def test_a_wrong_token_is_refused_everywhere_but_at_the_probes(served: Served, path: str, token: str) -> None:
    answer = served.ask(path, token=token)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="refold", error="invalid_token"'
    assert answer.json()["type"] == "https://refold.dev/problems/unauthenticated"


@pytest.mark.parametrize("sent", [None, "", "Basic YTpi", "Bearer", "Bearer ", TOKEN])
def test_a_request_without_a_bearer_token_is_refused(served: Served, sent: str | None) -> None:
    headers = {} if sent is None else {"authorization": sent}
    answer = served.ask("/metrics", token="", headers=headers)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Bearer realm="refold"')


def test_probes_are_open_and_tell_what_is_lacking(served: Served) -> None:
    assert served.ask("/healthz", token="").status == 200
    answer = served.ask("/readyz", token="")
    assert (answer.status, answer.json()["detail"]) == (503, "no database")


def test_requests_are_counted_by_route_and_not_by_path(served: Served) -> None:
    served.ask("/v1/subjects/very-special/events")
    metrics = served.ask("/metrics").body.decode()
    assert 'route="/v1/subjects/{subject}/events",status="200"' in metrics
    assert "very-special" not in metrics


@pytest.mark.parametrize(("size", "status"), [(0, 200), (1000, 200), (1001, 413), (10_000_000, 413)])
def test_a_body_is_read_up_to_its_limit(served: Served, size: int, status: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        answer = served.ask("/count", "POST", body=b"x" * size)
        assert answer.status == status
        if status == 413:
            assert answer.json()["limit"] == 1000


def test_a_body_of_unknown_length_is_read_up_to_its_limit(served: Served) -> None:
    chunk = b"400\r\n" + b"x" * 0x400 + b"\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(
            f"POST /count HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )
        client.sendall(chunk)
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_a_head_over_the_limit_is_refused(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nx: ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                client.sendall(b"x" * 1000)
        assert client.recv(100).startswith(b"HTTP/1.1 431")


def _head(target: str, method: str = "GET", length: int = 0) -> bytes:
    return (
        f"{method} {target} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def test_bodies_that_are_arriving_have_a_bound_together(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10)) for _ in range(3)]
        for client in clients:
            client.sendall(_head("/count", "POST", 900) + b"x" * 600)
            time.sleep(0.1)
        answer = clients[2].recv(65536)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in answer
        assert b"room is 1500" in answer
        for client in clients[:2]:
            client.sendall(b"x" * 300)
            assert client.recv(65536).endswith(b"\r\n\r\n900")
    assert ROOM.taken == 0


def test_requests_that_are_sent_ahead_are_answered_in_their_order(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 10) as client:
        client.sendall(b"".join(_head(f"/v1/subjects/{n}/events") for n in range(20)))
        received = b""
        while received.count(b"HTTP/1.1 200") < 20 or not received.endswith(b"}"):
            received += client.recv(65536)
    found = [part.partition(b"\r\n\r\n")[2] for part in received.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert found == [b'{"subject":"%d"}' % n for n in range(20)]


def test_a_whole_url_is_understood_as_its_path(served: Served) -> None:
    assert served.ask("http://elsewhere/v1/subjects/a/events?x=1").json() == {"subject": "a"}


def test_head_is_answered_without_a_body(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 10) as client:
        client.sendall(_head("/v1/subjects/a/events", "HEAD"))
        answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"content-length: 15\r\n" in answer
        assert answer.endswith(b"\r\n\r\n")
        client.sendall(_head("/v1/subjects/a/events"))
        assert client.recv(65536).endswith(b'{"subject":"a"}')


def test_connections_that_are_idle_for_long_are_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        socket.create_connection(("127.0.0.1", served.port), 10) as silent,
        socket.create_connection(("127.0.0.1", served.port), 10) as asked,
        socket.create_connection(("127.0.0.1", served.port), 10) as busy,
    ):
        asked.sendall(_head("/v1/subjects/a/events"))
        assert asked.recv(65536).endswith(b"}")
        busy.sendall(_head("/count", "POST", 2) + b"x")
        monkeypatch.setattr("refold.web.server.KEEP_ALIVE_SECONDS", 0.1)
        assert (silent.recv(1), asked.recv(1)) == (b"", b"")
        busy.sendall(b"x")
        assert busy.recv(65536).endswith(b"\r\n\r\n2")


def test_a_client_that_does_not_read_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refold.web.protocol.PATIENCE", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), 10) as client:
        client.sendall(_head("/endless"))
        time.sleep(1)
        with contextlib.suppress(ConnectionResetError):
            while client.recv(1 << 20):  # what was on its way; without an end where it isn't cut off
                pass


def _request(chunks: Sequence[bytes]) -> Request:
    pending = list(chunks)

    async def receive() -> Message:
        body = pending.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(pending)}

    return Request({"type": "http", "headers": []}, receive)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
async def test_lines_are_the_same_however_the_body_arrives(step: int) -> None:
    body = b'{"a":1}\n\n{"b":2}\r\n  \n{"c":3}'
    request = _request([body[i : i + step] for i in range(0, len(body), step)])
    found = [pair async for pair in bodies.lines(request, 20, "limit")]
    assert found == [(1, b'{"a":1}'), (3, b'{"b":2}'), (5, b'{"c":3}')]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", [b"\n", b""])
async def test_a_line_over_the_limit_is_refused_after_those_before_it(step: int, end: bytes) -> None:
    body = b"x" * 20 + b"\n" + b"y" * 21 + end
    request = _request([body[i : i + step] for i in range(0, len(body), step)])
    arriving = bodies.lines(request, 20, "limit")
    assert await anext(arriving) == (1, b"x" * 20)
    with pytest.raises(Problem) as refused:
        await anext(arriving)
    assert (refused.value.status, refused.value.members["line"]) == (413, 2)


def test_lines_over_a_socket_end_in_a_problem_where_one_is_too_long(served: Served) -> None:
    assert served.ask("/lines", "POST", body=b"a\nb").json() == [[1, "a"], [2, "b"]]
    assert served.ask("/lines", "POST", body=b"a\n" + b"b" * 21).json()["line"] == 2


@pytest.mark.parametrize("raw", [b"a=%ff", b"a=1&" * 101])
def test_a_query_string_that_cannot_be_read_is_refused(raw: bytes) -> None:
    with pytest.raises(Problem) as refused:
        paths.query(Request({"type": "http", "query_string": raw}))
    assert (refused.value.status, refused.value.slug) == (400, "invalid-query")


def test_query_parameters_keep_their_order_and_repetitions() -> None:
    request = Request({"type": "http", "query_string": b"where=a:eq:1%2C2&limit=&where=b:eq:%C3%BC+x"})
    assert paths.query(request) == [("where", "a:eq:1,2"), ("limit", ""), ("where", "b:eq:ü x")]


def test_the_description_names_every_operation_with_its_types() -> None:
    described = msgspec.json.decode(openapi.document("Echo", OPERATIONS, EVENTS))
    operation = described["paths"]["/v1/subjects/{subject}/events"]["get"]
    assert operation["parameters"][0]["required"]
    assert operation["responses"]["200"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Echo"
    }
    assert set(operation["responses"]) == {"200", "400", "401", "403", "404", "503"}
    assert set(described["components"]["schemas"]) == {"Echo", "ProblemBody"}


def test_probes_of_a_process_tell_what_its_checks_say() -> None:
    wrong: list[str] = []

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{probes.port}{path}") as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    with Probes(0, healthy=lambda: None, ready=lambda: wrong[0] if wrong else None) as probes:
        assert get("/healthz") == (200, "ok\n")
        assert get("/readyz") == (200, "ok\n")
        wrong.append("no partitions yet")
        assert get("/readyz") == (503, "no partitions yet\n")
        assert get("/metrics")[1].count("python_info") > 0
        assert get("/")[0] == 404


_PROGRAM = """
import asyncio
from refold import logs
from refold.web import server
from refold.web.app import App
from refold.web.auth.everyone import Everyone
from refold.web.openapi import Operation
from starlette.responses import Response

async def slow(_):
    await asyncio.sleep(1)
    return Response("done")

async def ready():
    return None

logs.configure("slow")
operation = Operation("GET", "/slow", slow, summary="Slow", verb="get", answer={"text/plain": str})
server.run(
    App("Slow", [operation], authority=Everyone(), kind="a/b", resource=lambda _: ("", ""), ready=ready), PORT
)
"""


def test_sigterm_lets_requests_finish_and_exits_with_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    program = textwrap.dedent(_PROGRAM).replace("PORT", str(port))
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = json.loads(process.stderr.readline())
    assert (first["event"], first["port"], first["process"], first["level"]) == ("Serving", port, "slow", "info")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            connection.request("GET", "/slow", headers={"authorization": "Bearer t"})
            break
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    assert connection.getresponse().read() == b"done"
    assert process.wait(10) == 0
    assert json.loads(process.stderr.readlines()[-1])["event"] == "Stopped"
