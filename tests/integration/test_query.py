"""The query service on a real PostgreSQL, over HTTP as it is served in earnest."""

import asyncio
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import quote, urlencode

import psycopg
import pytest
from refold import tokens
from refold.projection.readstore import postgres as readstore

from hack.servers import Postgres
from tests import querying
from tests.querying import INCARNATION, SCHEMA, TOKEN, Model, definition, where
from tests.served import Served


@pytest.fixture
async def model(database: str) -> Model:
    return await querying.make(database)


@pytest.fixture
def served(model: Model, postgres: Postgres) -> Iterator[Served]:
    with querying.serve(model, postgres) as service:
        yield service


def eventually(check: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_a_row_is_served_with_exact_values(model: Model, served: Served) -> None:
    await model.version()
    model.put(
        "o1",
        status='pla"ced\n',
        items=2**63 - 1,
        total="12345678901234567890.10",
        paid=True,
        at="2026-01-31 23:59:59.5+02",
        more='{"a": [1, 0.10]}',
    )
    answer = served.ask("/v1/rows/o1")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.body == (
        b'{"key":"o1","data":{"status":"pla\\"ced\\n","items":9223372036854775807,"total":12345678901234567890.10,'
        b'"paid":true,"at":"2026-01-31T21:59:59.500000Z","more":{"a": [1, 0.10]},"plain":null}}'
    )


@pytest.mark.parametrize(
    "key",
    ["a/b", "/", "..", ".", "%", "%2F", "a b", "€🦊", "a?b#c", "+", "rows", "a\nb", "'; drop table x --", "k" * 512],
)
async def test_any_key_can_be_read(model: Model, served: Served, key: str) -> None:
    await model.version()
    model.put(key, items=7)
    # `quote` leaves dots alone; a client that normalises paths has to send them as %2E
    answer = served.ask(f"/v1/rows/{quote(key, safe='')}")
    assert (answer.status, answer.json()["key"], answer.json()["data"]["items"]) == (200, key, 7)
    assert served.ask("/v1/rows").json()["rows"][0]["key"] == key


async def test_a_key_that_no_row_has_is_a_problem_and_no_other_row(model: Model, served: Served) -> None:
    await model.version()
    model.put("a/b")
    for sent, status, slug in [
        ("a", 404, "row-not-found"),
        ("a%252Fb", 404, "row-not-found"),
        ("a/b", 404, "not-found"),
        ("k" * 5000, 404, "row-not-found"),
        ("%00", 400, "invalid-key"),
        ("%ff", 400, "invalid-path"),
    ]:
        answer = served.ask(f"/v1/rows/{sent}")
        assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
        assert answer.json()["type"] == f"https://refold.dev/problems/{slug}"


async def test_answers_tell_how_fresh_they_are_also_where_there_is_no_row(model: Model, served: Served) -> None:
    await model.version()
    model.put("o1")
    assert "refold-lag-events" not in served.ask("/v1/rows/o1").headers
    model.advance(0, 5, 9)
    model.advance(1, 7, 7)
    for path in ["/v1/rows/o1", "/v1/rows/none", "/v1/rows", "/v1/status"]:
        headers = served.ask(path).headers
        assert headers["refold-lag-events"] == "4"
        assert 0 <= float(headers["refold-lag-seconds"]) < 5
        assert tokens.decode(headers["refold-position"]) == [
            tokens.Position(INCARNATION, 0, 5),
            tokens.Position(INCARNATION, 1, 7),
        ]


async def test_who_has_a_row_or_a_page_already_is_only_told_how_fresh_it_is(model: Model, served: Served) -> None:
    await model.version("v1")
    await model.version("v2")
    for version in ("v1", "v2"):
        model.put("a", version, items=1)
    paths = ["/v1/rows/a", "/v1/rows?where=items:eq:1", "/v1/rows?key=a"]
    tags = {path: served.ask(path).headers["etag"] for path in paths}
    model.change({"other": 7}, partition=0, position=2)
    model.advance(0, 2, 2, "v2")
    for live in ("v1", "v2"):  # neither another row nor a swap changes them
        model.execute("update {s}.pointer set live = %s", live)
        for path, tag in tags.items():
            answer = served.ask(path, headers={"if-none-match": f'"x", {tag}'})
            assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", tag)
            assert tokens.decode(answer.headers["refold-position"])[0].position == 2
            assert served.ask(path, "HEAD").headers["etag"] == tag
    model.change({"a": 2}, partition=0, position=3, version="v2")
    for path, tag in tags.items():
        answer = served.ask(path, headers={"if-none-match": tag})
        assert answer.status == 200
        assert answer.headers["etag"] != tag


async def test_filters_select_rows_by_typed_values(model: Model, served: Served) -> None:
    await model.version()
    model.put("a", status="placed", items=1, total="0.10", paid=True, at="2026-01-31T23:59:59Z")
    model.put("b", status="placed", items=2, total="1e3", paid=False, at="2026-01-31T23:59:59.000001Z")
    model.put("c", status="' or true --", items=1)
    assert where(served, "status:eq:placed") == ["a", "b"]
    assert where(served, "status:eq:placed", "items:eq:2") == ["b"]
    assert where(served, "status:eq:placed", "status:eq:paid") == []
    assert where(served, "status:eq:' or true --") == ["c"]
    assert where(served, "total:eq:0.1") == ["a"]
    assert where(served, "total:eq:1000.00") == ["b"]
    assert where(served, "paid:eq:false") == ["b"]
    assert where(served, "at:eq:2026-02-01T00:59:59+01:00") == ["a"]
    assert where(served, "items:eq:1", limit=1) == ["a"]


@pytest.mark.parametrize(
    ("query", "status", "slug"),
    [
        ("where=plain:eq:x", 422, "column-not-indexed"),
        ("where=colour:eq:x", 422, "unknown-column"),
        ("where=items:eq:x", 422, "invalid-value"),
        ("where=paid:gt:true", 422, "operator-not-for-type"),
        ("where=more:eq:x", 422, "not-comparable"),
        ("where=items:like:x", 422, "unknown-operator"),
        ("where=items", 400, "invalid-query"),
        ("order=plain", 422, "column-not-indexed"),
        ("order=more", 422, "not-comparable"),
        ("order=colour:desc", 422, "unknown-column"),
        ("order=~items", 422, "unknown-column"),
        ("order=items:down", 400, "invalid-query"),
        ("order=items&order=total", 400, "invalid-query"),
        ("key=%00", 400, "invalid-key"),
        ("&".join(["key=a"] * 101), 400, "invalid-query"),
        ("limit=0", 400, "invalid-query"),
        ("limit=1001", 400, "invalid-query"),
        ("limit=-1", 400, "invalid-query"),
        ("limit=%D9%A1", 400, "invalid-query"),
        ("limit=1&limit=2", 400, "invalid-query"),
        ("cursor=x", 400, "invalid-query"),
        ("wher=items:eq:1", 400, "invalid-query"),
        ("where=status:eq:%ff", 400, "invalid-query"),
        ("&".join(["where=items:eq:1"] * 21), 400, "invalid-query"),
    ],
)
async def test_a_query_that_cannot_be_answered_is_refused(
    model: Model, served: Served, query: str, status: int, slug: str
) -> None:
    await model.version()
    answer = served.ask(f"/v1/rows?{query}")
    assert (answer.status, answer.json()["type"]) == (status, f"https://refold.dev/problems/{slug}")


async def test_an_index_that_is_added_to_the_live_version_serves_filters(model: Model, served: Served) -> None:
    await model.version()
    model.put("a", plain="x")
    assert served.ask("/v1/rows?where=plain:eq:x").status == 422
    await asyncio.sleep(1.1)  # a definition is trusted for a second in refusing
    await model.version(wanted=definition(indexed=("plain",)))
    assert where(served, "plain:eq:x") == ["a"]


async def test_pages_hold_every_row_once_though_rows_come_and_go(model: Model, served: Served) -> None:
    await model.version()
    keys = sorted(["a", "a/b", "B", "z", "ä", "€", "🦊", *(f"k{i:03}" for i in range(50))])
    for key in keys:
        model.put(key, status="placed")
    found: list[str] = []
    cursor: str | None = ""
    pages = 0
    while cursor is not None:
        answer = served.ask("/v1/rows?" + urlencode({"where": "status:eq:placed", "limit": 7, "cursor": cursor})).json()
        found += [row["key"] for row in answer["rows"]]
        cursor = answer["next"]
        pages += 1
        model.put(f"0-before-{pages}", status="placed")
        model.execute('delete from {s}."rows_v1" where key = %s', found[-1])
    assert found == keys
    assert pages == 9  # 57 rows in pages of 7: the last one isn't full and ends it


async def test_a_last_page_that_is_full_has_no_next(model: Model, served: Served) -> None:
    await model.version()
    for key in "abcd":
        model.put(key)
    first = served.ask("/v1/rows?limit=2").json()
    assert served.ask(f"/v1/rows?limit=2&cursor={first['next']}").json()["next"] is None


async def test_status_tells_version_positions_lag_and_parked(model: Model, served: Served) -> None:
    await model.version()
    model.advance(0, 5, 9)
    model.execute("update {s}.positions set stopped = 'too many parked' where partition = 1")
    model.execute(
        "insert into {s}.parked (version, incarnation, partition, position, key, subject, error)"
        " values ('v1', %s, 0, 3, 'k', 'k', 'no such key: total')",
        INCARNATION,
    )
    assert served.ask("/v1/status").json() == {
        "version": "v1",
        "positions": [
            {"stream": "shop/orders", "partition": 0, "position": 5, "head": 9, "stopped": None},
            {"stream": "shop/orders", "partition": 1, "position": 0, "head": 0, "stopped": "too many parked"},
        ],
        "lag": {"events": None, "seconds": None},
        "parked": 1,
    }


async def test_without_a_live_version_it_says_so_and_serves_as_soon_as_there_is_one(
    model: Model, served: Served
) -> None:
    for path in ["/v1/rows/a", "/v1/rows", "/v1/status"]:
        answer = served.ask(path)
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert answer.json()["type"] == "https://refold.dev/problems/no-live-version"
    assert served.ask("/readyz", token="").status == 503
    await model.version()
    assert served.ask("/v1/rows/a").status == 404
    assert served.ask("/readyz", token="").status == 200


async def test_a_definition_of_a_later_release_is_no_internal_error(model: Model, served: Served) -> None:
    await model.version()
    model.execute("update {s}.versions set definition = definition || %s", '{"later": 1}')
    answer = served.ask("/v1/rows/a")
    assert (answer.status, answer.json()["type"]) == (503, "https://refold.dev/problems/readstore-unavailable")
    assert "later" in answer.json()["detail"]
    model.execute("update {s}.versions set definition = definition - 'later'")
    assert served.ask("/v1/rows/a").status == 404


async def test_a_swap_is_seen_at_once_and_a_dropped_version_is_never_missed(model: Model, served: Served) -> None:
    await model.version("v1")
    model.put("a", "v1", items=1)
    await model.version("v2")
    model.put("a", "v2", items=2)
    assert served.ask("/v1/rows/a").json()["data"]["items"] == 1
    model.execute("update {s}.pointer set live = 'v2'")
    assert served.ask("/v1/rows/a").json()["data"]["items"] == 2
    assert served.ask("/v1/status").json()["version"] == "v2"
    model.execute("update {s}.pointer set live = 'v1'")
    model.execute('drop table {s}."rows_v2"')
    assert served.ask("/v1/rows/a").json()["data"]["items"] == 1


async def test_readers_under_swaps_get_whole_rows_of_one_version(model: Model, served: Served) -> None:
    # The row, its lag and the version change together; every answer shows one of the two states.
    await model.version("v1")
    await model.version("v2")
    model.put("a", "v1", items=1)
    model.put("a", "v2", items=2)
    model.advance(0, 1, 1, "v1")
    model.advance(0, 2, 2, "v2")
    stop = threading.Event()
    wrong: list[object] = []
    seen: set[int] = set()

    def read() -> None:
        while not stop.is_set():
            answer = served.ask("/v1/rows/a")
            if answer.status != 200:
                wrong.append(answer)
                return
            items = answer.json()["data"]["items"]
            applied = tokens.decode(answer.headers["refold-position"])[0].position
            seen.add(items)
            if items != applied:
                wrong.append((items, applied))

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number in range(100):
        model.execute("update {s}.pointer set live = %s", f"v{number % 2 + 1}")
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert seen == {1, 2}


async def test_many_lookups_at_once_each_get_their_own_row(model: Model, served: Served) -> None:
    await model.version()
    for number in range(200):
        model.put(f"k{number}", items=number)
    wrong: list[object] = []

    def read(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
        for number in range(first, 400, 16):
            connection.request("GET", f"/v1/rows/k{number}", headers={"authorization": f"Bearer {TOKEN}"})
            response = connection.getresponse()
            body = response.read()
            expected = f'{{"key":"k{number}","data":{{"status":null,"items":{number},'.encode()
            if number < 200 and not body.startswith(expected):
                wrong.append(body)
            if number >= 200 and response.status != 404:
                wrong.append(response.status)
        connection.close()

    readers = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert not wrong


async def test_a_token_is_waited_for_until_it_is_applied(model: Model, served: Served) -> None:
    await model.version()
    token = tokens.encode([tokens.Position(INCARNATION, 0, 3)])
    model.advance(0, 2, 3)

    def apply() -> None:
        time.sleep(0.5)
        with psycopg.connect(model.database) as connection:  # one transaction, as a projector's
            connection.execute(f'insert into "{SCHEMA}"."rows_v1" (key, items) values (\'a\', 3)')
            connection.execute(f'update "{SCHEMA}".positions set position = 3 where partition = 0')

    thread = threading.Thread(target=apply)
    thread.start()
    begin = time.monotonic()
    answer = served.ask("/v1/rows/a", headers={"refold-token": token, "prefer": "wait=10"})
    took = time.monotonic() - begin
    thread.join()
    assert (answer.status, answer.json()["data"]["items"]) == (200, 3)
    assert 0.4 < took < 3
    begin = time.monotonic()
    assert where(served) == ["a"]
    assert served.ask("/v1/rows", headers={"refold-token": token}).status == 200
    assert time.monotonic() - begin < 0.4


@pytest.mark.parametrize("wait", ["0", "0.3"])
async def test_a_token_that_is_not_applied_in_time_is_answered_with_what_is_missing(
    model: Model, served: Served, wait: str
) -> None:
    await model.version()
    model.advance(0, 2, 3)
    token = tokens.encode([tokens.Position(INCARNATION, 0, 3), tokens.Position(INCARNATION, 1, 0)])
    begin = time.monotonic()
    answer = served.ask("/v1/rows/a", headers={"refold-token": token, "prefer": f"respond-async, wait={wait}"})
    assert float(wait) <= time.monotonic() - begin < float(wait) + 2
    assert answer.status == 504
    assert answer.json()["type"] == "https://refold.dev/problems/not-applied"
    assert answer.json()["missing"] == [{"stream": "shop/orders", "partition": 0, "wanted": 3, "applied": 2}]
    assert "refold-position" in answer.headers


async def test_a_token_of_another_incarnation_is_refused_at_once(model: Model, served: Served) -> None:
    await model.version()
    for token in ["nonsense", tokens.encode([tokens.Position("f" * 16, 0, 1)]), ""]:
        answer = served.ask("/v1/rows/a", headers={"refold-token": token, "prefer": "wait=10"})
        assert (answer.status, answer.json()["type"]) == (400, "https://refold.dev/problems/invalid-token")


async def test_the_position_of_an_answer_is_a_token_of_the_next(model: Model, served: Served) -> None:
    await model.version()
    model.advance(0, 2, 3)
    position = served.ask("/v1/rows").headers["refold-position"]
    assert served.ask("/v1/rows", headers={"refold-token": position, "prefer": "wait=0"}).status == 200


async def test_a_restart_of_postgresql_is_survived(model: Model, served: Served, postgres: Postgres) -> None:
    await model.version()
    model.put("a", items=1)
    assert served.ask("/v1/rows/a").status == 200
    postgres.restart()
    eventually(lambda: served.ask("/v1/rows/a").status == 200, 5)
    postgres.kill()
    try:
        answer = served.ask("/v1/rows/a")
        assert (answer.status, answer.json()["type"]) == (503, "https://refold.dev/problems/readstore-unavailable")
        assert "retry-after" in answer.headers
        assert served.ask("/readyz", token="").status == 503
        assert served.ask("/healthz", token="").status == 200
    finally:
        postgres.start()
    eventually(lambda: served.ask("/v1/rows/a").status == 200)
    assert served.ask("/readyz", token="").status == 200


async def test_the_service_cannot_write(model: Model, served: Served, postgres: Postgres) -> None:
    await model.version()
    assert served.ask("/v1/rows").status == 200
    database = model.database.rpartition("/")[2]
    _, login = readstore.logins(database, SCHEMA)
    dsn = postgres.dsn(database, user=quote(login, safe=""), password="q" * 32)
    for statement in ["delete from {}.rows_v1", "update {}.pointer set live = null", "create table {}.t ()"]:
        with psycopg.connect(dsn) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement.format(f'"{SCHEMA}"'))
