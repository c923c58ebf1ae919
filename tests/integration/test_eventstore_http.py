"""The event store over HTTP, served as in earnest and asked byte by byte."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psycopg
import pytest
from refold import tokens
from refold.eventstore import server
from refold.eventstore.settings import Settings

from hack.servers import Postgres
from hack.servers.callers import tokens_file
from hack.servers.process import free_port
from tests.served import Answer, Served, serve
from tests.stores import Installed, check_history, install

TOKEN = "t0ken"
PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
EVENTS = "/v1/streams/shop/orders/subjects/{}/events"


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    """A store with the active stream shop/orders of three partitions; each test has subjects of its own."""
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database over_http")
    found = await install(postgres.dsn("over_http"))
    await found.stream()
    return found


@pytest.fixture(scope="module")
def api(installed: Installed) -> Iterator[Served]:
    auth = tokens_file(TOKEN)
    settings = Settings(
        store_dsn=installed.service,
        auth=auth,
        append_events=10,
        event_bytes=2000,
        metadata_bytes=1024,
        append_bytes=4096,
        body_bytes=8192,
    )
    with serve(server.make(settings), TOKEN) as served:
        yield served


def body(*ids: str, expected: Any = None, **fields: Any) -> bytes:
    events = [{"id": id, "type": "Happened", "data": {"n": 1}, **fields} for id in ids]  # noqa: A001
    return json.dumps({"events": events} | ({} if expected is None else {"expectedRevision": expected})).encode()


def post(api: Served, subject: str, content: bytes) -> Answer:
    return api.ask(EVENTS.format(subject), "POST", body=content)


def refused(answer: Answer, status: int, slug: str) -> dict[str, Any]:
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert problem["type"].endswith("/" + slug)
    return problem


def test_an_append_is_answered_with_its_place_and_a_retry_with_the_same(api: Served) -> None:
    first = post(api, "retry", body("1", "2", expected="none"))
    assert first.status == 201
    assert first.json().keys() == {"revision", "partition", "position", "token"}
    assert first.json()["revision"] == 2
    assert "refold-replayed" not in first.headers
    again = post(api, "retry", body("1", "2", expected="none"))
    assert (again.status, again.body, again.headers["refold-replayed"]) == (201, first.body, "true")


def test_a_wrong_revision_and_a_known_id_are_409_with_the_current_revision(api: Served) -> None:
    post(api, "conflict", body("1", "2"))
    assert refused(post(api, "conflict", body("3", expected=1)), 409, "revision-conflict")["currentRevision"] == 2
    assert refused(post(api, "conflict", body("2", "3")), 409, "id-conflict")["currentRevision"] == 2
    assert len(api.ask(EVENTS.format("conflict")).json()["events"]) == 2


@pytest.mark.parametrize(
    "subject", ["a%2Fb", "..", "%2e%2E", "%252F", "%E6%97%A5%20x", "x?y".replace("?", "%3F"), "%01"]
)
def test_any_subject_can_be_written_and_read(api: Served, subject: str) -> None:
    assert post(api, subject, body("1")).json()["revision"] == 1
    (event,) = api.ask(EVENTS.format(subject)).json()["events"]
    assert event["subject"] == unquote(subject)


@pytest.mark.parametrize(
    ("subject", "content", "status", "slug", "field"),
    [
        ("bad", b"{", 400, "invalid-json", None),
        ("bad", b"", 400, "invalid-json", None),
        ("bad", b'{"events": [{"id": "\xff", "type": "T", "data": 1}]}', 400, "invalid-json", None),
        ("bad", b"[]", 422, "invalid-append", ""),
        ("bad", b'{"events": []}', 422, "invalid-append", "events"),
        ("bad", b'{"events": [{"id": "1", "type": "T"}]}', 422, "invalid-append", "events[0]"),
        ("bad", b'{"events": [{"id": 1, "type": "T", "data": 1}]}', 422, "invalid-append", "events[0].id"),
        ("bad", b'{"events": [{"id": "1", "type": "T", "data": 1, "time": 1}]}', 422, "invalid-append", "events[0]"),
        ("bad", b'{"events": [{"id": "1", "type": "T", "data": "\\u0000"}]}', 422, "invalid-append", "events[0].data"),
        ("bad", b'{"events": [{"id": "1", "type": "T", "data": 1e999}]}', 422, "invalid-append", "events[0].data"),
        ("bad", b'{"events": [{"id": "1", "type": "T", "data": "\xff"}]}', 422, "invalid-append", "events[0].data"),
        ("bad", b'{"events": [{"id": "1", "type": "T", "data": ' + b"[" * 9000 + b"]" * 9000 + b"}]}", 413, None, None),
        ("bad", b'{"events": [{"id": "1", "type": "T", "data": ' + b"[" * 900 + b"]" * 900 + b"}]}", 422, None, None),
        ("bad", body("1", expected=-1), 422, "invalid-append", "expectedRevision"),
        ("bad", body("1", expected="3"), 422, "invalid-append", "expectedRevision"),
        ("bad", body("1", expected=1.5), 422, "invalid-append", "expectedRevision"),
        ("bad", body("1", expected=10**30), 422, "invalid-append", "expectedRevision"),
        ("bad", b'{"expected": 1, "events": [{"id": "1", "type": "T", "data": 1}]}', 422, "invalid-append", ""),
        ("%00", body("1"), 422, "invalid-append", "subject"),
        ("s" * 513, body("1"), 422, "invalid-append", "subject"),
        ("%ff", body("1"), 400, "invalid-path", "subject"),
        ("%zz", body("1"), 400, "invalid-path", "subject"),
        ("bad", body("1", "1"), 422, "invalid-append", "events[1].id"),
        ("bad", body(*map(str, range(11))), 413, "append-too-large", "events"),
        ("bad", body("1", data="x" * 3000), 413, "append-too-large", "events[0]"),
        ("bad", b"x" * 10_000, 413, "body-too-large", None),
    ],
)  # fmt: skip
def test_bad_input_is_a_problem_that_names_the_field_and_writes_nothing(
    api: Served, subject: str, content: bytes, status: int, slug: str | None, field: str | None
) -> None:
    answer = post(api, subject, content)
    problem = answer.json()
    assert answer.status == status, problem
    if slug is not None:
        refused(answer, status, slug)
    if field is not None:
        assert problem["field"] == field
    assert api.ask(EVENTS.format("bad")).json() == {"events": []}


def test_an_unknown_stream_is_404_everywhere(api: Served) -> None:
    for path in ("nothing/subjects/s/events", "nothing/partitions/0/events", "orders/partitions/3/events"):
        refused(api.ask(f"/v1/streams/shop/{path}"), 404, "stream-not-found")
    for path in ("nothing/subjects/s/events", "nothing/events"):
        refused(api.ask(f"/v1/streams/shop/{path}", "POST", body=body("1")), 404, "stream-not-found")
    refused(api.ask("/v1/streams/else/orders/partitions/x/events"), 404, "stream-not-found")


def test_nothing_is_told_to_a_caller_without_the_token(api: Served) -> None:
    for path in (EVENTS.format("s"), "/metrics", "/nothing"):
        assert api.ask(path, token="").status == 401
        assert api.ask(path, token="wrong").status == 401
    assert api.ask("/healthz", token="").status == api.ask("/readyz", token="").status == 200


def test_events_are_read_as_json_or_lines_with_exact_numbers(api: Served) -> None:
    data = '{"a": 0.10, "b": 2.0, "c": 123456789012345678901234567890}'
    post(api, "numbers", f'{{"events": [{{"id": "1", "type": "T", "data": {data}, "metadata": [1]}}]}}'.encode())
    post(api, "numbers", body("2"))
    answer = api.ask(EVENTS.format("numbers"))
    assert answer.headers["content-type"] == "application/json"
    assert data.encode() in answer.body
    first, second = answer.json()["events"]
    assert (first["id"], first["revision"], first["metadata"]) == ("1", 1, [1])
    assert (second["id"], second["revision"], second["metadata"]) == ("2", 2, None)
    assert first["time"].endswith("Z")
    lines = api.ask(EVENTS.format("numbers"), headers={"accept": "application/x-ndjson"})
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in lines.body.splitlines()] == [first, second]
    none = api.ask(EVENTS.format("never seen".replace(" ", "%20")), headers={"accept": "application/x-ndjson"})
    assert (none.status, none.body) == (200, b"")


def test_a_read_keeps_its_bounds(api: Served) -> None:
    post(api, "bounds", body(*map(str, range(6))))
    path = EVENTS.format("bounds")

    def ids(query: str) -> list[str]:
        return [event["id"] for event in api.ask(f"{path}?{query}").json()["events"]]

    assert ids("from=3&to=4") == ["2", "3"]
    assert ids("from=99") == ids("to=0") == []
    time = api.ask(path).json()["events"][0]["time"]
    assert len(ids(f"until={time}")) == 6
    assert ids("until=2001-01-01T00:00:00Z") == ids("until=2001-01-01T00:00:00%2B02:00") == []
    assert ids("direction=backward&limit=2") == ["5", "4"]
    assert ids("direction=backward&from=2&to=4") == ["3", "2", "1"]
    assert ids("direction=forward&limit=1") == ["0"]
    for query in (
        "limit=0", "direction=up", "from=x", "from=-1", "from=1.5", "to=", "until=yesterday", "fron=1",
        "to=" + "9" * 30, "from=%D9%A1",
    ):  # fmt: skip
        refused(api.ask(f"{path}?{query}"), 400, "invalid-query")


def test_a_partition_is_read_after_a_position(api: Served) -> None:
    place = post(api, "partition", body("1", "2", "3")).json()
    path = f"/v1/streams/shop/orders/partitions/{place['partition']}/events"
    events = api.ask(f"{path}?after={place['position'] - 3}&limit=2").json()["events"]
    assert [(event["subject"], event["id"]) for event in events] == [("partition", "1"), ("partition", "2")]
    rest = api.ask(f"{path}?after={place['position']}")
    assert rest.json() == {"events": []}
    assert rest.headers["refold-incarnation"] == tokens.decode(place["token"])[0].incarnation
    for query in ("limit=0", "after=x", "from=1"):
        refused(api.ask(f"{path}?{query}"), 400, "invalid-query")


def bulk(api: Served, *lines: bytes) -> list[dict[str, Any]]:
    answer = api.ask("/v1/streams/shop/orders/events", "POST", body=b"\n".join(lines))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
    return [json.loads(line) for line in answer.body.splitlines()]


def line(subject: str, *ids: str, **other: Any) -> bytes:
    return json.dumps(
        {"subject": subject, "events": [{"id": i, "type": "T", "data": 1} for i in ids], **other}
    ).encode()


def test_a_bulk_answers_each_line_in_order_as_the_single_append_would_have(api: Served) -> None:
    answers = bulk(
        api,
        line("bulk-a", "1"),
        line("bulk-b", "1", "2", expectedRevision="none"),
        line("bulk-a", "2", expectedRevision=7),
        b"{bad",
        line("bulk-a", "3", expectedRevision=1),
        b"",
        line("", "1"),
        json.dumps({"subject": "bulk-c", "events": [{"id": "1"}]}).encode(),
        line("bulk-a", "1"),
        b'{"subject": "\xff", "events": []}',
        line("bulk-b", *map(str, range(11))),
        line("bulk-b", "3", expectedRevision=2) + b"\r",
    )
    said = [
        (a["subject"], a["error"]["status"], a["error"]["line"]) if "error" in a else (a["subject"], a["revision"])
        for a in answers
    ]
    assert said == [
        ("bulk-a", 1), ("bulk-b", 2), ("bulk-a", 409, 3), (None, 400, 4), ("bulk-a", 2), ("", 422, 7),
        ("bulk-c", 422, 8), ("bulk-a", 1), (None, 400, 10), ("bulk-b", 413, 11), ("bulk-b", 3),
    ]  # fmt: skip
    assert answers[2]["error"]["currentRevision"] == 1
    assert [answer.get("replayed") for answer in answers] == [None] * 7 + [True] + [None] * 3
    assert all(answer["token"] for answer in answers if "error" not in answer)


def test_a_line_that_is_too_large_ends_the_bulk_with_its_problem(api: Served) -> None:
    answers = bulk(api, line("large", "1"), b"x" * 20_000, line("large", "2"))
    assert answers[0]["revision"] == 1
    assert answers[1]["error"]["status"] == 413
    assert len(answers) == 2
    assert len(api.ask(EVENTS.format("large")).json()["events"]) == 1


async def test_a_large_bulk_is_taken_whole_and_in_order_before_its_answers_are_read(
    api: Served, installed: Installed
) -> None:
    lines = [line(f"many-{n % 50}", str(n), expectedRevision=n // 50) for n in range(8000)]
    answers = await asyncio.to_thread(bulk, api, *lines)
    assert [answer.get("revision") for answer in answers] == [n // 50 + 1 for n in range(8000)]
    rows = await installed.query(
        'select subject, array_agg(id::int order by revision) from "shop.orders".events '
        "where subject like 'many-%' group by 1"
    )
    assert {subject: ids == sorted(ids) and len(ids) == 160 for subject, ids in rows} == {
        f"many-{n}": True for n in range(50)
    }


def test_a_bulk_answers_while_it_is_sent(api: Served) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as sock:
        head = f"POST /v1/streams/shop/orders/events HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n"
        sock.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        received = b""
        for number in range(3):
            chunk = line("live", str(number), expectedRevision=number) + b"\n"
            sock.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            while received.count(b'"subject":"live"') <= number:
                received += sock.recv(65536)
        sock.sendall(b"0\r\n\r\n")
        while not received.endswith(b"0\r\n\r\n"):
            received += sock.recv(65536)


async def test_a_client_that_goes_away_in_a_bulk_leaves_a_right_history(api: Served, installed: Installed) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as sock:
        head = f"POST /v1/streams/shop/orders/events HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n"
        sock.sendall(f"{head}content-length: 1000000\r\n\r\n".encode())
        sock.sendall(b"\n".join(line(f"gone-{n}", "1") for n in range(100)))
    assert api.ask("/readyz").status == 200
    stream = await installed.stream()
    check_history(await installed.history(stream))


def test_the_description_names_every_path(api: Served) -> None:
    described = api.ask("/openapi.json").json()
    assert described["paths"].keys() == {
        "/v1/streams/{namespace}/{name}/subjects/{subject}/events",
        "/v1/streams/{namespace}/{name}/events",
        "/v1/streams/{namespace}/{name}/transactions",
        "/v1/streams/{namespace}/{name}/partitions/{partition}/events",
        "/v1/streams/{namespace}/{name}/subjects/{subject}/events:watch",
        "/v1/streams/{namespace}/{name}/partitions/{partition}/events:watch",
        "/v1/streams/{namespace}/{name}/events:watch",
    }


def test_a_method_that_isnt_served_is_told_all_that_are_of_operations_that_share_a_path(api: Served) -> None:
    answer = api.ask(EVENTS.format("s"), "DELETE")
    refused(answer, 405, "method-not-allowed")
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


def test_what_was_done_is_counted(api: Served) -> None:
    def value(name: str) -> float:
        lines = api.ask("/metrics").body.decode().splitlines()
        return sum(float(one.split()[-1]) for one in lines if one.startswith(name))

    names = (
        'refold_appended_events_total{stream="shop/orders"}',
        'refold_refused_appends_total{reason="RevisionConflict"}',
    )
    before = [value(name) for name in names]
    post(api, "counted", body("1", "2"))
    post(api, "counted", body("3", expected=9))
    assert [value(name) for name in names] == [before[0] + 2, before[1] + 1]
    assert value("refold_group_appends_count") > 0
    assert value("refold_commit_seconds_count") > 0


def test_without_its_database_it_is_alive_but_not_ready_and_says_when_to_try_again(
    api: Served, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refold.eventstore.lane.PATIENCE", 0.5)
    postgres.stop()
    try:
        assert api.ask("/healthz").status == 200
        assert api.ask("/readyz").status == 503
        for answer in (post(api, "away", body("1")), api.ask(EVENTS.format("away"))):
            refused(answer, 503, "store-unavailable")
            assert int(answer.headers["retry-after"]) >= 1
        refused(api.ask("/v1/streams/shop/not-known/subjects/s/events"), 503, "store-unavailable")
    finally:
        postgres.start()
    assert api.ask("/readyz").status == 200
    assert post(api, "away", body("1")).json()["revision"] == 1


async def test_the_process_serves_before_its_database_is_there_and_ends_with_0_on_sigterm(
    installed: Installed, postgres: Postgres
) -> None:
    port = free_port()
    env = {
        **os.environ,
        "REFOLD_STORE_DSN": installed.service,
        "REFOLD_AUTH": tokens_file(TOKEN),
        "REFOLD_PORT": str(port),
    }
    api = Served(port, TOKEN)
    postgres.stop()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from refold.cli.main import app; app()", "eventstore", env=env,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(600):
            try:
                assert api.ask("/healthz").status == 200
                break
            except OSError:
                await asyncio.sleep(0.1)
        assert (await asyncio.to_thread(api.ask, "/readyz")).status == 503
    finally:
        postgres.start()
    calls = [asyncio.to_thread(post, api, f"term-{n}", body("1")) for n in range(8)]
    answers = await asyncio.gather(*calls)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 30) == 0
    assert [answer.status for answer in answers] == [201] * 8


@pytest.fixture(scope="module")
async def counts(installed: Installed) -> str:
    """The path of a stream that takes events of one type, with a schema."""
    stream = await installed.stream("counts")
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    await installed.event_types(stream, {"Counted": schema})
    return "/v1/streams/shop/counts"


def counted(id: str, n: Any, type: str = "Counted") -> dict[str, Any]:  # noqa: A002
    return {"id": id, "type": type, "data": {"n": n}}


def test_data_that_does_not_match_is_422_with_the_event_the_place_and_the_reason(api: Served, counts: str) -> None:
    content = {"events": [counted("1", 1), counted("2", "two")]}
    answer = api.ask(f"{counts}/subjects/a/events", "POST", body=json.dumps(content).encode())
    problem = refused(answer, 422, "invalid-data")
    assert problem["field"] == "events[1].data"
    assert problem["errors"] == [{"pointer": "/n", "message": '"two" is not of type "integer"'}]
    assert "/n" in problem["detail"]
    assert api.ask(f"{counts}/subjects/a/events").json() == {"events": []}


def test_an_unknown_type_is_422_with_the_types_there_are(api: Served, counts: str) -> None:
    content = {"events": [counted("1", 1, "Conuted")]}
    answer = api.ask(f"{counts}/subjects/b/events", "POST", body=json.dumps(content).encode())
    problem = refused(answer, 422, "unknown-event-type")
    assert (problem["field"], problem["types"]) == ("events[0].type", ["Counted"])


def test_a_line_of_a_bulk_that_does_not_match_is_refused_alone(api: Served, counts: str) -> None:
    lines = [{"subject": "c", "events": [counted(str(n), n if n != 1 else "one")]} for n in range(3)]
    answer = api.ask(f"{counts}/events", "POST", body="\n".join(map(json.dumps, lines)).encode())
    answers = [json.loads(line) for line in answer.body.splitlines()]
    assert [line.get("revision") for line in answers] == [1, None, 2]
    error = answers[1]["error"]
    assert (error["field"], error["line"], error["errors"][0]["pointer"]) == ("events[0].data", 2, "/n")


def test_an_atomic_append_that_does_not_match_names_the_append_and_the_event(api: Served, counts: str) -> None:
    parts = [("d", [counted("1", 1)]), ("e", [counted("1", 1), counted("2", "two")])]
    content = {"appends": [{"subject": subject, "events": events} for subject, events in parts]}
    answer = api.ask(f"{counts}/transactions", "POST", body=json.dumps(content).encode())
    problem = refused(answer, 422, "invalid-data")
    assert (problem["field"], problem["errors"][0]["pointer"]) == ("appends[1].events[1].data", "/n")
    assert api.ask(f"{counts}/subjects/d/events").json() == {"events": []}


def test_the_documented_metrics_are_exposed(api: Served) -> None:
    exposed = {line.split()[2].removesuffix("_total") for line in _metrics(api) if line.startswith("# TYPE")}
    documented = re.findall(r"`(refold_[a-z_]+)`", PAGE.partition("## Event store")[2].partition("## Relay")[0])
    assert len(documented) > 10
    # callers are in a file here, not in Kubernetes: unless another test loaded what asks it, its metric is missing
    assert set(documented) - exposed <= {"refold_auth_review_seconds"}


def _metrics(api: Served) -> list[str]:
    return api.ask("/metrics").body.decode().splitlines()


def test_a_body_or_a_line_over_the_limit_is_413_with_the_limits_name_and_number(api: Served) -> None:
    large = b'{"events": [' + b" " * 9000
    problem = refused(post(api, "large", large), 413, "body-too-large")
    assert "eventstore.limits.bodyBytes is 8192" in problem["detail"]
    answer = api.ask("/v1/streams/shop/orders/events", "POST", body=large)
    assert "eventstore.limits.bodyBytes, which is 8192" in json.loads(answer.body)["error"]["detail"]
    problem = refused(post(api, "large", body("1", data="x" * 3000)), 413, "append-too-large")
    assert problem["field"] == "events[0]"
    assert "eventstore.limits.eventBytes is 2000" in problem["detail"]
