"""Pages of a read model: many keys, filters, order and cursors, on a real PostgreSQL, over HTTP."""

import datetime as dt
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psycopg import sql
from refold.projection.readstore import KEY, After, Page
from refold.projection.readstore import postgres as readstore
from refold.projection.readstore.postgres_reads import PostgresReads
from refold.query import filters, ordering

from hack.servers import Postgres
from tests import querying
from tests.querying import SCHEMA, Model, definition, where
from tests.served import Served


@pytest.fixture
async def model(database: str) -> Model:
    return await querying.make(database)


@pytest.fixture
def served(model: Model, postgres: Postgres) -> Iterator[Served]:
    with querying.serve(model, postgres) as service:
        yield service


def pages(served: Served, limit: int, parameters: Sequence[tuple[str, str]]) -> Iterator[list[dict[str, Any]]]:
    """Yield page after page, to the last."""
    cursor: str | None = ""
    while cursor is not None:
        answer = served.ask("/v1/rows?" + urlencode([*parameters, ("limit", limit), ("cursor", cursor)]))
        assert answer.status == 200, answer.body
        page = json.loads(answer.body, parse_float=Decimal)
        yield page["rows"]
        cursor = page["next"]


async def test_many_keys_are_answered_with_the_rows_that_there_are(model: Model, served: Served) -> None:
    await model.version()
    keys = ["a", "a/b", "a,b", "ü&?#", "", "%2F"]
    for number, key in enumerate(keys):
        model.put(key, items=number)
    wanted = ["a/b", "none", "a,b", "ü&?#", "", "a/b"]
    answer = served.ask("/v1/rows?" + urlencode([("key", key) for key in wanted])).json()
    assert [row["key"] for row in answer["rows"]] == sorted({*wanted} - {"none"})
    assert answer["next"] is None
    assert served.ask("/v1/rows?key=none").json() == {"rows": [], "next": None}
    assert where(served, "items:gt:0", order="items:desc", limit=2) == ["%2F", ""]
    mixed = urlencode([("key", key) for key in keys] + [("where", "items:ge:2"), ("order", "items:desc")])
    assert [row["key"] for row in served.ask(f"/v1/rows?{mixed}").json()["rows"]] == ["%2F", "", "ü&?#", "a,b"]
    most = urlencode([("key", f"k{number}") for number in range(99)] + [("key", "a")])
    assert [row["key"] for row in served.ask(f"/v1/rows?{most}").json()["rows"]] == ["a"]


async def test_operators_compare_as_their_names_say_and_null_meets_none(model: Model, served: Served) -> None:
    await model.version()
    for key, items, status in [("a", 1, "ab"), ("b", 2, "abc"), ("c", 3, "b"), ("d", None, None), ("e", 2, "a,b")]:
        model.put(key, items=items, status=status)
    for filter_, keys in {
        "items:eq:2": "be",
        "items:ne:2": "ac",
        "items:lt:2": "a",
        "items:le:2": "abe",
        "items:gt:2": "c",
        "items:ge:2": "bce",
        "items:in:1,3,9": "ac",
        "status:lt:abc": "ae",
        "status:ge:abc": "bc",
        "status:ne:b": "abe",
        "status:prefix:ab": "ab",
        "status:prefix:": "abce",
        "status:in:a\\,b,b": "ce",
        "key:gt:b": "cde",
        "key:prefix:a": "a",
        "key:in:a,d": "ad",
    }.items():
        assert where(served, filter_) == list(keys), filter_
    assert where(served, "items:ge:1", "items:lt:3", "status:prefix:ab") == ["a", "b"]


async def test_null_counts_as_the_greatest_value(model: Model, served: Served) -> None:
    await model.version()
    for key, items in [("a", 2), ("b", None), ("c", 1), ("d", 2), ("e", None)]:
        model.put(key, items=items)
    for limit in (1, 2, 3, 5):
        for order, keys in {"items": "cadbe", "items:desc": "ebdac", "key:desc": "edcba", "key": "abcde"}.items():
            found = [row["key"] for page in pages(served, limit, [("order", order)]) for row in page]
            assert found == list(keys), (order, limit)


async def test_a_cursor_is_good_for_its_order_alone(model: Model, served: Served) -> None:
    await model.version()
    for number in range(3):
        model.put(f"k{number}", items=number, status="s")
    cursor = served.ask("/v1/rows?order=items&limit=1").json()["next"]
    assert served.ask(f"/v1/rows?order=items&limit=1&cursor={cursor}").status == 200
    for order in ["", "&order=items:desc", "&order=status"]:
        answer = served.ask(f"/v1/rows?limit=1&cursor={cursor}{order}")
        assert (answer.status, answer.json()["field"]) == (400, "cursor")
        assert "order=items:asc" in answer.json()["detail"]


async def test_pages_by_a_column_survive_writes_and_swaps(model: Model, served: Served) -> None:
    # Each row that stays where it is comes exactly once, whatever comes, goes and moves around it.
    await model.version("v1")
    await model.version("v2")
    model.execute("update {s}.pointer set live = 'v1'")
    stay = [(f"k{number:02}", number // 3 if number % 5 else None) for number in range(20)]
    for version in ("v1", "v2"):
        for key, items in stay:
            model.put(key, version, items=items)
            model.put(f"{key}-moves", version, items=-1)
    for descending in (False, True):
        found = []
        for number, page in enumerate(pages(served, 5, [("order", "items:desc" if descending else "items")])):
            found += [row["key"] for row in page if row["key"].startswith("k") and "-" not in row["key"]]
            for version in ("v1", "v2"):
                model.put(f"new-{descending}-{number}", version, items=number)
                model.execute(
                    f'update {{s}}."rows_{version}" set items = coalesce(items, 0) + 5 where key = %s',
                    f"k{number:02}-moves",
                )
                model.execute(f'delete from {{s}}."rows_{version}" where key like %s', f"new-{descending}-{number - 2}")
            model.execute("update {s}.pointer set live = %s", f"v{number % 2 + 1}")
        by_items = sorted((items is None, items or 0, key) for key, items in stay)
        expected = [key for _, _, key in by_items]
        assert found == (expected[::-1] if descending else expected)


_MOMENT = dt.datetime(2026, 1, 31, 23, 59, 59, tzinfo=dt.UTC)
_VALUES: dict[str, list[Any]] = {
    "status": ["", "a", "ab", "a\U0010ffff", "b", "é", "\ud7ff", "\ue000", "A", "a,\\b", "%", "_"],
    "items": [-(2**63), -1, 0, 1, 2, 2**63 - 1],
    "total": [Decimal(text) for text in ("-1.5", "0", "0.10", "0.1000001", "1E+3", "12345678901234567890.1")],
    "paid": [True, False],
    "at": [_MOMENT + dt.timedelta(microseconds=micros) for micros in (-(10**12), 0, 1, 2, 10**9)],
}


def _sent(value: Any) -> str:
    """Return a value as a filter has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, dt.datetime) else str(value)


_TESTS = {
    "eq": lambda value, other: value == other,
    "ne": lambda value, other: value != other,
    "lt": lambda value, other: value < other,
    "le": lambda value, other: value <= other,
    "gt": lambda value, other: value > other,
    "ge": lambda value, other: value >= other,
    "in": lambda value, others: value in others,
    "prefix": lambda value, other: value.startswith(other),
}


@st.composite
def _filter(draw: st.DrawFn) -> tuple[str, str, Any]:
    column = draw(st.sampled_from(sorted(_VALUES)))
    operators = {"status": filters.OPERATORS, "paid": ("eq", "ne", "in")}
    operator = draw(st.sampled_from(operators.get(column, filters.OPERATORS[:-1])))
    value = st.sampled_from(_VALUES[column])
    return column, operator, draw(st.lists(value, min_size=1, max_size=3) if operator == "in" else value)


_ROW = st.fixed_dictionaries({column: st.none() | st.sampled_from(values) for column, values in _VALUES.items()})


async def test_pages_are_what_python_finds_in_the_rows(model: Model, served: Served) -> None:
    await model.version()

    @given(
        rows=st.lists(_ROW, max_size=25),
        asked=st.lists(_filter(), max_size=3),
        order=st.sampled_from(["key", *_VALUES]),
        descending=st.booleans(),
        limit=st.sampled_from([1, 2, 3, 7, 100]),
    )
    @settings(
        max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
    )
    def check(
        rows: list[dict[str, Any]], asked: list[tuple[str, str, Any]], order: str, descending: bool, limit: int
    ) -> None:
        model.execute('truncate {s}."rows_v1"')
        with psycopg.connect(model.database, autocommit=True) as connection, connection.cursor() as cursor:
            into = sql.SQL("copy {} (key, {}) from stdin").format(
                sql.Identifier(SCHEMA, readstore.rows_table("v1")), sql.SQL(", ").join(map(sql.Identifier, _VALUES))
            )
            with cursor.copy(into) as copy:
                for number, row in enumerate(rows):
                    copy.write_row([f"k{number}", *(row[column] for column in _VALUES)])
        found = [{"key": f"k{number}", **row} for number, row in enumerate(rows)]
        parameters = [("order", f"{order}:desc" if descending else order)]
        for column, operator, value in asked:
            found = [row for row in found if row[column] is not None and _TESTS[operator](row[column], value)]
            many = [_sent(one).replace("\\", "\\\\").replace(",", "\\,") for one in value] if operator == "in" else []
            parameters.append(("where", f"{column}:{operator}:{','.join(many) if many else _sent(value)}"))
        found.sort(key=lambda row: (row[order] is None, *([] if row[order] is None else [row[order]]), row["key"]))
        if descending:
            found.reverse()
        answered = list(pages(served, limit, parameters))
        assert [row["key"] for page in answered for row in page] == [row["key"] for row in found]
        assert all(len(page) == limit for page in answered[:-1])
        for row, expected in zip([row for page in answered for row in page], found, strict=True):
            data = row["data"]
            assert (data["status"], data["items"], data["total"], data["paid"]) == tuple(
                expected[column] for column in ("status", "items", "total", "paid")
            )

    check()


def _plan(model: Model, parameters: list[str], order: str, after: After | None) -> str:
    reads = PostgresReads(model.database, namespace="shop", name="order-status", connections=1)
    version = reads.version("v1", definition())
    comparable = {column.name: column for column in [KEY, *definition().definition.columns]}
    conditions = [one for text in parameters for one in filters.conditions(text, comparable)]
    statement = version.page_statement(Page(conditions, ordering.parse(order), after, 11))
    with psycopg.connect(model.database) as connection:
        rows = connection.execute(b"explain " + statement.sql, statement.parameters).fetchall()
    return "\n".join(row[0] for row in rows)


@pytest.mark.parametrize(
    ("wanted", "order", "after"),
    [
        (["status:eq:s5"], "key", None),
        (["status:eq:s5"], "key", After(None, "k3")),
        (["status:prefix:s5"], "status", None),
        (["status:prefix:s5"], "status:desc", After("s5", "k3")),
        (["items:gt:5000"], "items", None),
        (["items:ge:5000", "items:lt:5010"], "key", None),
        (["items:in:1,2,3"], "key", None),
        (["items:gt:9990"], "key", None),
        ([], "items:desc", None),
        ([], "items", After(5000, "k5000")),
        ([], "items:desc", After(5000, "k5000")),
        ([], "items", After(None, "k5000")),
        ([], "items:desc", After(None, "k5000")),
        (["key:prefix:k12"], "key:desc", None),
        (["at:ne:2026-01-01T00:00:00Z"], "key", None),
    ],
)
async def test_an_index_serves_it_and_no_table_is_read_through(
    model: Model, wanted: list[str], order: str, after: After | None
) -> None:
    await model.version()
    model.execute(
        'insert into {s}."rows_v1" (key, status, items, at) '
        "select 'k' || n, 's' || n %% 1000, n, "
        "case when n = 77 then timestamptz '2026-01-02 00:00:00Z' else timestamptz '2026-01-01 00:00:00Z' end "
        "from generate_series(1, 10000) n"
    )
    model.execute('analyze {s}."rows_v1"')
    plan = _plan(model, wanted, order, after)
    assert "Seq Scan on rows_v1" not in plan, plan
    assert "Index" in plan, plan


async def test_pages_that_take_too_long_say_so_and_hold_up_nothing_else(
    model: Model, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refold.projection.readstore.postgres_reads._STATEMENT_SECONDS", 2)
    await model.version()
    with querying.serve(model, postgres) as served, psycopg.connect(model.database) as connection:
        assert where(served) == []
        connection.execute(f'lock table "{SCHEMA}"."rows_v1" in access exclusive mode')
        with ThreadPoolExecutor(10) as pool:
            asked = [pool.submit(served.ask, "/v1/rows") for _ in range(10)]
            begin = time.monotonic()
            while time.monotonic() - begin < 1.5:
                assert served.ask("/v1/status").status == 200
            answers = [one.result() for one in asked]
        connection.rollback()
        assert {answer.status for answer in answers} == {503}
        assert answers[0].json()["type"] == "https://refold.dev/problems/query-too-slow"
        assert where(served) == []
