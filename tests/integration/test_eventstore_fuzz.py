"""Anything at all is sent to the event store: it never fails, never hangs, and what it takes it gives back equal.

`REFOLD_EXAMPLES` multiplies how much (25: once; `make attack`: 16 times).
"""

import json
import os
import re
import socket
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from refold.eventstore import server
from refold.eventstore.settings import Settings
from refold.web import sent_events

from hack.servers import Postgres
from hack.servers.callers import tokens_file
from tests.served import Answer, Served, serve
from tests.stores import Installed, check_history, install

TOKEN = "t0ken"
STREAM = "/v1/streams/shop/orders"
TIMES = max(1, int(os.environ.get("REFOLD_EXAMPLES", "25")) // 25)


def examples(count: int) -> settings:
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database fuzzed")
    found = await install(postgres.dsn("fuzzed"))
    await found.stream()
    return found


@pytest.fixture(scope="module")
def api(installed: Installed) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sent_events, "LIFETIME", 0.0)  # what is watched ends at once
        own = Settings(
            store_dsn=installed.service,
            auth=tokens_file(TOKEN),
            event_bytes=20_000,
            metadata_bytes=20_000,
            append_bytes=40_000,
            body_bytes=80_000,
        )
        with serve(server.make(own), TOKEN) as served:
            yield served


@pytest.fixture(scope="module", autouse=True)
def failed_before(api: Served) -> list[str]:
    """What other tests of this process had counted: all its applications share their metrics."""
    return failures(api)


def failures(api: Served) -> list[str]:
    """Return the counts of answers that are the event store's own fault."""
    counted = api.ask("/metrics").body.decode()
    return re.findall(r'refold_http_request_seconds_count\{[^}]*status="5.*', counted)


EDGES = [
    2**53 - 1,
    2**53,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**399,
    10**400,
    0,
    -1,
]
numbers = st.sampled_from(
    [
        *map(str, EDGES),
        "-0",
        "-0.0",
        "0.10",
        "1e2",
        "1E-2",
        "1e400",
        "1e401",
        "1e-400",
        "1e999999999999",
        "-1e400",
        "0." + "1" * 400,
        "0." + "1" * 401,
        "123456789.987654321e3",
        "1.5e+0002",
        "0e0",
        "-0e400",
    ]
)
characters = st.text(
    st.sampled_from('"\\/\b\f\n\r\t\u0001\u001f\u007f\u0085\u2028é日😀\ufeff\ufffe\uffff %&=?#;+')
    | st.characters(codec="utf-8"),
    max_size=8,
)
#: JSON texts of strings, also such as no encoder writes.
strings = st.one_of(
    characters.map(lambda text: json.dumps(text, ensure_ascii=False)),
    characters.map(json.dumps),
    st.lists(
        st.sampled_from(
            [r"\u0000", r"\ud83d\ude00", r"\ud800", r"\udc00", r"\uD83D\uDE00", r"\/", r"\\u0000", r"\u0041", "x"]
        ),
        max_size=4,
    ).map(lambda parts: f'"{"".join(parts)}"'),
)
blanks = st.sampled_from(["", " ", "\n", "\t", "\r\n"])


def _object(members: list[tuple[str, str]], blank: str) -> str:
    return "{" + f",{blank}".join(f"{key}{blank}:{blank}{value}" for key, value in members) + blank + "}"


#: JSON texts: numbers at the edges, every escape, equal keys, deep nesting.
texts = st.recursive(
    st.one_of(numbers, strings, st.sampled_from(["null", "true", "false", "[]", "{}"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: "[" + ",".join(items) + "]"),
        st.builds(_object, st.lists(st.tuples(strings, inner), max_size=4), blanks),
        st.builds(
            lambda one, depth: "[" * depth + one + "]" * depth, inner, st.sampled_from([1, 5, 99, 198, 199, 200])
        ),
    ),
    max_leaves=8,
)


good_characters = characters.map(lambda text: text.replace("\0", "0"))
#: JSON texts that are kept: nothing in them is refused.
good_texts = st.recursive(
    st.one_of(
        st.sampled_from(
            [*map(str, EDGES[:9]), "-0", "-0.0", "0.10", "1e2", "1E-2", "1e400", "1e-400", "1.5e+0002", "0e0"]
        ),
        good_characters.map(json.dumps),
        good_characters.map(lambda text: json.dumps(text, ensure_ascii=False)),
        st.sampled_from(["null", "true", "[]", "{}", r'"\ud83d\ude00\/\\u0000"', "0." + "1" * 400]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: "[" + ",".join(items) + "]"),
        st.builds(_object, st.lists(st.tuples(good_characters.map(json.dumps), inner), max_size=4), blanks),
        st.builds(lambda one, depth: "[" * depth + one + "]" * depth, inner, st.sampled_from([1, 5, 90])),
    ),
    max_leaves=8,
)


def _body(events: list[dict[str, str]], expected: str, blank: str) -> bytes:
    parts = [_object([(f'"{key}"', text) for key, text in one.items()], "") for one in events]
    members = [('"events"', "[" + ",".join(parts) + "]")] + ([('"expectedRevision"', expected)] if expected else [])
    return _object(members, blank).encode()


@st.composite
def good_bodies(draw: st.DrawFn) -> bytes:
    """Bodies of appends of which nothing is refused but for what is there already."""
    named = good_characters.filter(bool).map(json.dumps)
    names = draw(st.lists(named, min_size=1, max_size=3, unique=True))
    events = [{"id": name, "type": draw(named), "data": draw(good_texts)} for name in names]
    for one in events:
        if draw(st.booleans()):
            one["metadata"] = draw(good_texts)
    return _body(events, draw(st.sampled_from(["", '"any"'])), draw(blanks))


@st.composite
def bad_bodies(draw: st.DrawFn) -> bytes:
    """Bodies of appends, most of them nearly right, some cut, changed or not UTF-8."""
    ids = st.sampled_from(["1", "2", "é", "", "x" * 256, "\0", "😀" * 63]) | characters
    events = [
        {"id": json.dumps(draw(ids)), "type": json.dumps(draw(characters)), "data": draw(texts)}
        for _ in range(draw(st.integers(0, 3)))
    ]
    expected = ["", '"any"', '"none"', '"exists"', "0", "1", "null", "1.0", "1e0", *map(str, EDGES)]
    body = _body(events, draw(st.sampled_from(expected)), draw(blanks))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(body)))
        changed = [
            body[:at],
            body[:at] + b"\xff" + body[at:],
            body[:at] + body[at + 1 :],
            b"\xef\xbb\xbf" + body,
            body * 2,
        ]
        body = draw(st.sampled_from(changed))
    return body


bodies = st.integers(0, 3).flatmap(lambda bad: good_bodies() if bad else bad_bodies())
good_subjects = good_characters.filter(bool).map(lambda text: quote(text, safe=""))
bad_subjects = st.one_of(
    st.text(
        st.characters(codec="ascii", min_codepoint=33, max_codepoint=126, exclude_characters="/?#"),
        min_size=1,
        max_size=9,
    ),
    st.lists(st.binary(min_size=1, max_size=1).map(lambda one: f"%{one.hex()}"), min_size=1, max_size=5).map("".join),
    st.sampled_from(
        [
            "..",
            ".",
            "%2e%2e",
            "%2F",
            "%252F",
            "%00",
            "%C0%80",
            "%ED%A0%80",
            "%F4%90%80%80",
            "%",
            "%4",
            "%GG",
            "s" * 512,
            "s" * 513,
            "%E6%97%A5" * 170,
            "+",
            "a+b",
            "a%20b",
            "events",
            ":watch",
        ]
    ),
)


subjects = st.integers(0, 4).flatmap(lambda bad: good_subjects if bad else bad_subjects)


def value(text: bytes | str) -> Any:
    """Return what a JSON text says, with exact numbers; -0 is 0, and of equal keys the last stands."""
    exact = json.loads(text, parse_int=lambda one: Decimal(one) + 0, parse_float=lambda one: Decimal(one))

    def plain(found: Any) -> Any:
        if isinstance(found, Decimal):
            return found.normalize() if found else Decimal(0)
        if isinstance(found, list):
            return [plain(one) for one in found]
        if isinstance(found, dict):
            return {key: plain(one) for key, one in found.items()}
        return found

    return plain(exact)


def right(answer: Answer) -> None:
    """Assert what holds for each answer: no failure of the server, and a problem where it is refused."""
    assert answer.status < 500, answer.body
    if answer.status >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status


@given(subject=subjects, body=bodies)
@examples(400)
def test_any_body_to_any_subject_is_refused_or_read_back_equal(api: Served, subject: str, body: bytes) -> None:
    path = f"{STREAM}/subjects/{subject}/events"
    before = api.ask(path)
    answer = api.ask(path, "POST", body=body)
    right(before)
    right(answer)
    assert answer.status in (201, 400, 409, 413, 422)
    if before.status != 200:
        assert answer.status >= 400
        return
    known = len(before.json()["events"])
    after = api.ask(f"{path}?from={known + 1}")
    if answer.status != 201:
        assert value(after.body) == {"events": []}
        return
    sent = value(body)["events"]
    if "refold-replayed" in answer.headers:
        assert value(after.body) == {"events": []}
        after = api.ask(f"{path}?from={answer.json()['revision'] - len(sent) + 1}&limit={len(sent)}")
    found = value(after.body)["events"]
    assert [(one["id"], one["type"], one["data"]) for one in found] == [
        (one["id"], one["type"], one["data"]) for one in sent
    ]
    if "refold-replayed" not in answer.headers:  # a retry may have other metadata: that of the first attempt stands
        assert [one["metadata"] for one in found] == [one.get("metadata") for one in sent]
    assert {one["subject"] for one in found} == {unquote_to_bytes(subject).decode()}
    told = api.ask(f"{STREAM}/subjects/{subject}/events:watch?after={known}")
    assert (told.status, told.body[:6]) == (200, b"retry:")


queries = st.lists(
    st.tuples(
        st.sampled_from(["from", "to", "until", "limit", "direction", "after", "where", ""]),
        st.one_of(
            st.sampled_from(
                [
                    *map(str, EDGES),
                    "9" * 18,
                    "1" * 19,
                    "1.0",
                    "1e1",
                    "+1",
                    " 1",
                    "١",
                    "0x1",
                    "true",
                    "now",
                    "backward",
                    "NaN",
                    "2026-01-31T23:59:59Z",
                    "0001-01-01T00:00:00+14:00",
                    "9999-12-31T23:59:59.999999999-23:59",
                    "2026-02-30",
                    "1700000000",
                ]
            ),
            characters,
        ).map(lambda text: quote(text, safe="")),
    ),
    max_size=3,
).map(lambda pairs: "&".join(f"{key}={text}" for key, text in pairs))
heads = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "accept",
                "last-event-id",
                "content-type",
                "refold-token",
                "x-anything",
                "expect",
                "range",
                "if-none-match",
                "accept-encoding",
            ]
        ),
        st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=20).map(str.strip)
        | st.sampled_from(
            [
                "0" * 16 + ".1.1.1",
                "0" * 16 + "." + "9" * 30,
                "W10",
                "W1siYSIsMCwxXV0",
                "text/event-stream",
                "application/x-ndjson;q=0",
                "*/*",
            ]
        ),
    ),
    max_size=3,
    unique_by=lambda pair: pair[0],
)
places = st.one_of(
    subjects.map(lambda one: f"/subjects/{one}/events"),
    st.sampled_from(["0", "2", "3", "-1", "00", "٣", "9" * 9, "9" * 10, "1e0", "%30", "%"]).map(
        lambda one: f"/partitions/{quote(one, safe='%')}/events"
    ),
    st.sampled_from(["/events", "/transactions", "", "/", "//events"]),
)


@given(
    place=places,
    watch=st.booleans(),
    query=queries,
    headers=heads,
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]),
)
@examples(300)
def test_any_place_query_and_header_is_answered(
    api: Served, place: str, watch: bool, query: str, headers: list[tuple[str, str]], method: str
) -> None:
    body = b"{}" if method in ("POST", "PUT") else None
    answer = api.ask(f"{STREAM}{place}{':watch' if watch else ''}?{query}", method, body=body, headers=dict(headers))
    if method == "HEAD":
        assert answer.status < 500
    else:
        right(answer)


lines = st.one_of(
    st.binary(max_size=40),
    bodies,
    st.builds(
        lambda subject, body: b'{"subject":' + json.dumps(subject).encode() + b"," + body[1:],
        characters,
        bodies,
    ),
)


@given(content=st.lists(lines, max_size=5).map(b"\n".join))
@examples(50)
def test_any_bulk_has_an_answer_for_each_line(api: Served, content: bytes) -> None:
    answer = api.ask(f"{STREAM}/events", "POST", body=content)
    assert answer.status == 200
    answers = [json.loads(line) for line in answer.body.splitlines()]
    too_large = [one for one in answers if "error" in one and one["error"]["type"].endswith("line-too-large")]
    if not too_large:
        assert len(answers) == sum(1 for line in content.split(b"\n") if line.strip())
    assert all(one["error"]["status"] < 500 for one in answers if "error" in one)


requests = st.lists(
    st.one_of(
        st.binary(max_size=30),
        st.sampled_from(
            [
                b"GET ",
                b"POST ",
                STREAM.encode() + b"/subjects/s/events",
                b" HTTP/1.1\r\n",
                b" HTTP/1.0\r\n",
                b" HTTP/2.0\r\n",
                b"host: x\r\n",
                b"\r\n",
                b"\n",
                b"\r",
                b"\0",
                b"content-length: 5\r\n",
                b"content-length: -5\r\n",
                b"content-length: 99999999999999999999\r\n",
                b"content-length: 5\r\ncontent-length: 6\r\n",
                b"transfer-encoding: chunked\r\n",
                b"transfer-encoding: chunked, gzip\r\n",
                b"5\r\nhello\r\n",
                b"0\r\n\r\n",
                b"ffffffffffffffffff\r\n",
                b"-1\r\n",
                b"expect: 100-continue\r\n",
                b"connection: upgrade\r\nupgrade: websocket\r\n",
                b"upgrade: h2c\r\n",
                f"authorization: Bearer {TOKEN}\r\n".encode(),
                b"x: " + b"y" * 70_000 + b"\r\n",
                b"GET http://else/ HTTP/1.1\r\n",
                b"CONNECT a:1 HTTP/1.1\r\n",
                b"OPTIONS * HTTP/1.1\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            ]
        ),
    ),
    min_size=1,
    max_size=10,
).map(b"".join)


@given(content=requests)
@examples(150)
def test_any_bytes_on_the_socket_are_answered_or_waited_for_and_never_a_failure(api: Served, content: bytes) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as sock:
        received = b""
        try:
            sock.sendall(content)
            sock.shutdown(socket.SHUT_WR)
            while got := sock.recv(65536):
                received += got
        except OSError:
            pass  # it was refused before all was sent
    for status in re.findall(rb"HTTP/1\.1 (\d+)", received):
        assert int(status) < 500
    assert not received or received.startswith(b"HTTP/1.1 ")


async def test_after_all_that_it_serves_and_its_history_is_right(
    api: Served, installed: Installed, failed_before: list[str]
) -> None:
    assert api.ask("/readyz").status == 200
    assert failures(api) == failed_before
    history = await installed.query(
        'select partition, position, subject, revision, id, recorded_at from "shop.orders".events '
        "order by partition, position"
    )
    assert len(history) > 30
    check_history(history)
