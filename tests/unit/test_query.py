"""The pure parts of the query service: filters, cursors, freshness."""

import asyncio
import datetime as dt
from decimal import Decimal
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refold import tokens
from refold.projection.definition import Column, ColumnType, Definition, FoldRule, StreamRef, VersionDefinition
from refold.projection.readstore import After, AppliedPartition, Order, Reads, Snapshot, VersionReads
from refold.query import filters, ordering
from refold.query.answers import Rows
from refold.query.freshness import Freshness
from refold.query.live import LiveVersion
from refold.query.ordering import BY_KEY, Cursor
from refold.query.reader import Reader
from refold.web.problems import Problem
from starlette.requests import Request

COLUMNS = {
    name: Column(name=name, type=ColumnType(kind), index=name != "plain")
    for name, kind in {
        "status": "text",
        "items": "integer",
        "total": "numeric",
        "paid": "boolean",
        "at": "timestamp",
        "more": "json",
        "plain": "text",
    }.items()
}

KEYED = {"key": Column(name="key", type=ColumnType.TEXT, index=True), **COLUMNS}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("status:eq:placed", "placed"),
        ("status:eq:", ""),
        ("status:eq:a:b'\";--", "a:b'\";--"),
        ("items:eq:-9223372036854775808", -(2**63)),
        ("items:eq:9223372036854775807", 2**63 - 1),
        ("total:eq:0.10", Decimal("0.10")),
        ("total:eq:-1e3", Decimal(-1000)),
        ("paid:eq:true", True),
        ("paid:eq:false", False),
        ("at:eq:2026-01-31T23:59:59Z", dt.datetime(2026, 1, 31, 23, 59, 59, tzinfo=dt.UTC)),
        ("at:eq:2026-02-01t01:59:59.123456+02:00", dt.datetime(2026, 1, 31, 23, 59, 59, 123456, tzinfo=dt.UTC)),
    ],
)
def test_a_filter_compares_a_column_with_a_value_of_its_type(text: str, value: object) -> None:
    [condition] = filters.conditions(text, COLUMNS)
    assert (condition.column.name, condition.comparison, condition.value) == (text.partition(":")[0], "eq", value)
    assert type(condition.value) is type(value)


@pytest.mark.parametrize("column", ["status", "items", "total", "at"])
@pytest.mark.parametrize("operator", ["ne", "lt", "le", "gt", "ge"])
def test_what_has_an_order_is_compared_by_it(column: str, operator: str) -> None:
    value = {"status": "a", "items": "1", "total": "1.5", "at": "2026-01-31T23:59:59Z"}[column]
    [condition] = filters.conditions(f"{column}:{operator}:{value}", COLUMNS)
    assert (condition.column.name, condition.comparison) == (column, operator)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("status:in:a", ["a"]),
        ("status:in:a,b,a", ["a", "b", "a"]),
        ("status:in:", [""]),
        ("status:in:,", ["", ""]),
        (r"status:in:a\,b,c\\,d\e:f", ["a,b", "c\\", "d\\e:f"]),
        ("items:in:1,-2", [1, -2]),
        ("total:in:1,2.50", [Decimal(1), Decimal("2.50")]),
        ("paid:in:true,false", [True, False]),
    ],
)
def test_in_lists_values_between_commas(text: str, values: list[object]) -> None:
    [condition] = filters.conditions(text, COLUMNS)
    assert (condition.comparison, condition.value) == ("in", values)


@given(st.lists(st.text(st.sampled_from("ab,\\:")), min_size=1))
def test_any_text_can_be_listed(values: list[str]) -> None:
    listed = ",".join(value.replace("\\", r"\\").replace(",", r"\,") for value in values)
    [condition] = filters.conditions(f"status:in:{listed}", COLUMNS)
    assert condition.value == values


_POINTS = st.sampled_from("aé\ud7ff\ue000\U0010ffff") | st.characters(codec="utf-8", exclude_characters="\0")


@given(st.text(_POINTS, max_size=3), st.text(_POINTS, max_size=5))
def test_a_prefix_is_the_range_of_the_texts_that_begin_with_it(prefix: str, text: str) -> None:
    begin, *end = filters.conditions(f"status:prefix:{prefix}", COLUMNS)
    for one in (text, prefix + text):
        inside = begin.value <= one and all(one < last.value for last in end)  # type: ignore[operator]
        assert inside == one.startswith(prefix)


@pytest.mark.parametrize(
    ("text", "status", "slug"),
    [
        ("status", 400, "invalid-query"),
        ("status:eq", 400, "invalid-query"),
        ("", 400, "invalid-query"),
        ("colour:eq:red", 422, "unknown-column"),
        ("key:eq:red", 422, "unknown-column"),
        ("~status:eq:red", 422, "unknown-column"),
        ("plain:eq:red", 422, "column-not-indexed"),
        ("status:=:red", 422, "unknown-operator"),
        ("status:like:red", 422, "unknown-operator"),
        ("status:eq:a\0b", 422, "invalid-value"),
        ("items:eq:9223372036854775808", 422, "invalid-value"),
        ("items:eq:1.0", 422, "invalid-value"),
        ("items:eq:١", 422, "invalid-value"),
        ("items:eq:1_0", 422, "invalid-value"),
        ("items:eq:", 422, "invalid-value"),
        ("total:eq:NaN", 422, "invalid-value"),
        ("total:eq:Infinity", 422, "invalid-value"),
        ("total:eq:1e99999", 422, "invalid-value"),
        ("paid:eq:TRUE", 422, "invalid-value"),
        ("at:eq:2026-01-31T23:59:59", 422, "invalid-value"),
        ("at:eq:2026-02-30T23:59:59Z", 422, "invalid-value"),
        ("at:eq:2026-01-31T23:59:59.1234567Z", 422, "invalid-value"),
        ("items:in:1,x", 422, "invalid-value"),
        ("items:in:", 422, "invalid-value"),
        ("status:in:a,b\0", 422, "invalid-value"),
        ("items:in:" + ",".join(["1"] * 1001), 400, "invalid-query"),
        ("status:prefix:a\0", 422, "invalid-value"),
        ("items:prefix:1", 422, "operator-not-for-type"),
        ("at:prefix:2026", 422, "operator-not-for-type"),
        ("paid:lt:true", 422, "operator-not-for-type"),
        ("paid:prefix:t", 422, "operator-not-for-type"),
        ("more:eq:{}", 422, "not-comparable"),
    ],
)
def test_a_filter_that_cannot_work_is_refused_with_the_reason(text: str, status: int, slug: str) -> None:
    with pytest.raises(Problem) as refused:
        filters.conditions(text, COLUMNS)
    assert (refused.value.status, refused.value.slug, refused.value.members["field"]) == (status, slug, "where")


_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
_ORDERS = st.sampled_from([BY_KEY, Order("key", True), Order("status", False), Order("status", True)])


@given(_ORDERS, st.none() | _TEXTS, _TEXTS)
def test_a_cursor_is_the_place_that_it_was_made_of(order: Order, value: str | None, key: str) -> None:
    if order.column == "key":
        value = None
    cursor = Cursor(order, value, key).encode()
    assert ordering.after(cursor, order, KEYED) == After(value, key)
    assert cursor.isascii()
    assert not set(cursor) & set("+/=&?#%")


@pytest.mark.parametrize(
    ("column", "text", "value"),
    [
        ("items", "-9223372036854775808", -(2**63)),
        ("total", "9" * 100 + "." + "1" * 100, Decimal("9" * 100 + "." + "1" * 100)),
        ("paid", "true", True),
        ("at", "0001-01-01T00:00:00.000001Z", dt.datetime(1, 1, 1, 0, 0, 0, 1, dt.UTC)),
    ],
)
def test_a_cursor_holds_a_value_of_any_type(column: str, text: str, value: object) -> None:
    order = Order(column, True)
    assert ordering.after(Cursor(order, text, "k").encode(), order, KEYED) == After(value, "k")


@pytest.mark.parametrize("text", ["", "a", "%", "ü", "e30", "WzFd", "WyJhIiwiYiJd", "WyJcdTAwMDAiXQ", "_____w"])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(Problem) as refused:
        ordering.after(text, BY_KEY, KEYED)
    assert (refused.value.status, refused.value.members["field"]) == (400, "cursor")


@pytest.mark.parametrize(
    ("made", "value", "asked"),
    [
        (BY_KEY, None, Order("key", True)),
        (BY_KEY, None, Order("items", False)),
        (Order("items", False), "1", BY_KEY),
        (Order("items", False), "1", Order("items", True)),
        (Order("items", False), "one", Order("items", False)),  # it was a text once
        (Order("items", False), "", Order("items", False)),
    ],
)
def test_a_cursor_of_another_order_is_refused(made: Order, value: str | None, asked: Order) -> None:
    with pytest.raises(Problem) as refused:
        ordering.after(Cursor(made, value, "k").encode(), asked, KEYED)
    assert (refused.value.status, refused.value.members["field"]) == (400, "cursor")


def test_an_order_is_a_column_and_a_direction() -> None:
    assert ordering.parse("items") == ordering.parse("items:asc") == Order("items", False)
    assert ordering.parse("items:desc") == Order("items", True)
    for text in ["items:", "items:up", "items:desc:desc", "items:DESC"]:
        with pytest.raises(Problem) as refused:
            ordering.parse(text)
        assert (refused.value.status, refused.value.members["field"]) == (400, "order")


STREAM = StreamRef(
    namespace="shop", name="orders", incarnation="i1", partitions=2, topic="shop.orders", event_schema="shop.orders"
)
LIVE = LiveVersion(
    "abc",
    VersionDefinition(
        definition=Definition(streams=["orders"], fold=[FoldRule(type="A", delete=True)]), streams=[STREAM]
    ),
    cast("VersionReads", None),  # nothing is read
)


def fresh(*partitions: tuple[str, int, int, int, float, float | None, str | None]) -> Freshness:
    """What was read at 1000.0, when the version stood at `partitions`."""
    return Freshness(LIVE, Snapshot("abc", [AppliedPartition(*one) for one in partitions], 1000.0))


def test_lag_is_unknown_until_every_partition_was_looked_at() -> None:
    freshness = fresh(("i1", 0, 5, 9, 1.5, 1000.0, None), ("i1", 1, 0, 0, 0, None, None))
    assert (freshness.lag_events, freshness.lag_seconds) == (None, None)
    assert set(freshness.headers) == {"refold-position"}


def test_lag_is_summed_in_events_and_the_largest_in_seconds() -> None:
    freshness = fresh(("i1", 0, 5, 9, 1.5, 999.0, None), ("i1", 1, 7, 8, 4.0, 999.5, None))
    assert freshness.headers == {
        "refold-position": tokens.encode([tokens.Position("i1", 0, 5), tokens.Position("i1", 1, 7)]),
        "refold-lag-events": "5",
        "refold-lag-seconds": "4.500",
    }


def test_there_is_no_lag_where_all_that_was_seen_is_applied() -> None:
    freshness = fresh(("i1", 0, 9, 9, 0, 975.0, None), ("i1", 1, 9, 8, 0, 990.0, None))
    assert (freshness.lag_events, freshness.lag_seconds) == (0, 0.0)


def test_where_nobody_has_looked_for_long_something_may_be_missing_since_then() -> None:
    freshness = fresh(("i1", 0, 9, 9, 0, 900.0, None), ("i1", 1, 9, 8, 0, 990.0, None))
    assert (freshness.lag_events, freshness.lag_seconds) == (0, 100.0)


def test_as_of_a_moment_nothing_is_missing_once_it_is_complete_however_long_nobody_looks() -> None:
    definition = VersionDefinition(
        definition=Definition(streams=["orders"], fold=[FoldRule(type="A", delete=True)], as_of="2026-01-31T23:59:59Z"),  # type: ignore[arg-type]
        streams=[STREAM],
        ends={"i1": [9, 0]},
    )
    ended = LiveVersion("abc", definition, cast("VersionReads", None))
    places = [AppliedPartition("i1", 0, 9, 9, 0, 1.0, None), AppliedPartition("i1", 1, 0, 0, 0, 1.0, None)]
    freshness = Freshness(ended, Snapshot("abc", places, 1000.0))
    assert (freshness.lag_events, freshness.lag_seconds) == (0, 0.0)


def test_a_lag_grows_where_the_projector_is_gone() -> None:
    freshness = fresh(("i1", 0, 8, 9, 1.5, 900.0, None), ("i1", 1, 8, 8, 0, 990.0, None))
    assert (freshness.lag_events, freshness.lag_seconds) == (1, 101.5)


def test_what_is_missing_of_a_token_names_stream_and_partition() -> None:
    freshness = fresh(("i1", 0, 5, 9, 1.5, 999.0, None), ("i1", 1, 7, 8, 4.0, 999.5, None))
    assert freshness.missing([tokens.Position("i1", 0, 5), tokens.Position("i1", 1, 1)]) == []
    assert freshness.missing([tokens.Position("i1", 0, 6), tokens.Position("i1", 1, 7)]) == [
        {"stream": "shop/orders", "partition": 0, "wanted": 6, "applied": 5}
    ]


@pytest.mark.parametrize(("incarnation", "partition"), [("i1", 2), ("i0", 0), ("i1", -1)])
def test_a_token_of_another_stream_or_incarnation_is_told_apart(incarnation: str, partition: int) -> None:
    freshness = fresh(("i1", 0, 5, 9, 1.5, 999.0, None), ("i1", 1, 7, 8, 4.0, 999.5, None))
    with pytest.raises(KeyError):
        freshness.missing([tokens.Position(incarnation, partition, 1)])


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([], 200),
        (["{tag}"], 304),
        (["W/{tag}"], 304),
        (['"a", {tag} ,W/"b"'], 304),
        (['"a"', "{tag}"], 304),
        (["*"], 304),
        (['"a"'], 200),
        (['"{tag}"'], 200),
        ([""], 200),
        (["*, *"], 200),
    ],
)
def test_who_has_the_body_already_is_not_sent_it(sent: list[str], status: int) -> None:
    freshness = fresh(("i1", 0, 9, 9, 0, 975.0, None), ("i1", 1, 9, 8, 0, 990.0, None))
    plain = Rows(Request({"type": "http", "headers": []}), freshness.raw_headers, b'{"rows":[],"next":null}')
    tag = plain.headers["etag"]
    given = [(b"if-none-match", text.format(tag=tag).encode()) for text in sent]
    answer = Rows(Request({"type": "http", "headers": given}), freshness.raw_headers, b'{"rows":[],"next":null}')
    assert answer.status_code == status
    assert answer.body == (b"" if status == 304 else b'{"rows":[],"next":null}')
    assert answer.headers["etag"] == tag
    assert answer.headers["refold-position"] == freshness.token
    assert answer.headers["refold-lag-events"] == "0"
    other = Rows(Request({"type": "http", "headers": given}), freshness.raw_headers, b'{"rows":[{}],"next":null}')
    assert other.headers["etag"] != tag
    assert other.status_code == (304 if sent == ["*"] else 200)


class _Store(Reader):
    """A reader whose reads are answered after a turn of the event loop."""

    def __init__(self) -> None:
        super().__init__(cast("Reads", None), "shop/order-status")  # no read reaches the store

    async def by_keys(self, keys: list[str]) -> tuple[Freshness, list[tuple[str, str]]]:
        await asyncio.sleep(0)
        return fresh(), [(key, f"row of {key}") for key in keys]


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("callers", [1, 2, 5])
async def test_no_lookup_is_forgotten_that_comes_while_a_lane_ends(
    monkeypatch: pytest.MonkeyPatch, lanes: int, callers: int
) -> None:
    # Who asks again in the very turn of the loop in which it was answered finds a lane that is about to end.
    monkeypatch.setattr("refold.query.reader._LANES", lanes)
    reader = _Store()

    async def ask(caller: int) -> None:
        for number in range(20):
            assert (await reader.row(f"{caller}-{number}"))[1] == f"row of {caller}-{number}"

    async with asyncio.timeout(2):
        await asyncio.gather(*map(ask, range(callers)))
