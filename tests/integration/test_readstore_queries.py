"""Every read store answers queries alike: rows, filters, orders, cursors, and the positions that the rows are of."""

import asyncio
import datetime as dt
import json
import random
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any, get_args

import pytest
from redis import Redis as Client
from refold import tokens
from refold.projection.definition import Column, ColumnType, Definition, FoldRule, StreamRef, VersionDefinition
from refold.projection.fold import RowChange
from refold.projection.readstore import (
    KEY,
    Advance,
    After,
    Comparison,
    Condition,
    LiveProgress,
    NotFoundError,
    Order,
    Page,
    Reads,
    Seen,
    TooSlowError,
    UnavailableError,
    stores,
)
from refold.projection.readstore.redis import unsuitable
from refold.query.server import app
from refold.query.settings import Settings

from hack.servers import Redis
from hack.servers.callers import tokens_file
from tests import served
from tests.readstores import Store

INCARNATION = "a" * 16
CHANCE = random.Random(5)
COLUMNS = [Column(name=name, type=ColumnType(name), index=name != "json") for name in (one.value for one in ColumnType)]
VALUES: dict[str, list[Any]] = {
    "text": [None, "", "a", "ab", "b", "\x01", "\u00e9", "\ud7ff", "\ue000", "\U0010ffff", 'q"\\', "a\n"],
    "integer": [None, 0, 1, -1, 9, 10, -10, 2**63 - 1, -(2**63), 2**53, 2**53 + 1],
    "numeric": [
        None, Decimal(0), Decimal("0.10"), Decimal("0.1001"), Decimal("-0.1"), 1, 10, Decimal("9.99"), -10,
        Decimal("-9.99"), Decimal(-99), 10**99, -(10**99), Decimal("1e-199"), Decimal("-1e-199"), 2**53 + 1,
    ],
    "boolean": [None, True, False],
    "timestamp": [
        None, dt.datetime(1, 1, 1, tzinfo=dt.UTC), dt.datetime(2026, 1, 1, 0, 0, 0, 1, dt.UTC),
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(9999, 12, 31, 23, 59, 59, 999999, dt.UTC),
    ],
    "json": [None, "[1,2.50]", '{"a":null}', "true"],
}  # fmt: skip


def definition(*, indexed: bool = True) -> VersionDefinition:
    columns = COLUMNS if indexed else [one.model_copy(update={"index": False}) for one in COLUMNS]
    stream = StreamRef(namespace="n", name="aa", incarnation=INCARNATION, partitions=2, topic="a", schema="a")
    return VersionDefinition(
        definition=Definition(streams=["aa"], columns=columns, fold=[FoldRule(type="T", delete=True)]),
        streams=[stream],
    )


def random_row() -> dict[str, Any]:
    return {name: CHANCE.choice(values) for name, values in VALUES.items()}


def holds(condition: Condition, key: str, row: dict[str, Any]) -> bool:
    value = key if condition.column is KEY else row[condition.column.name]
    other: Any = condition.value
    if value is None:
        return False
    return bool(
        {
            "eq": lambda: value == other, "ne": lambda: value != other, "in": lambda: value in other,
            "lt": lambda: value < other, "le": lambda: value <= other,
            "gt": lambda: value > other, "ge": lambda: value >= other,
        }[condition.comparison]()
    )  # fmt: skip


def sort_key(order: Order) -> Any:
    def of(item: tuple[str, dict[str, Any]]) -> Any:
        key, row = item
        if order.column == "key":
            return key
        value = row[order.column]
        return (value is None, 0 if value is None else value, key)

    return of


def random_condition() -> Condition:
    column = CHANCE.choice([KEY, *(one for one in COLUMNS if one.index)])
    values = [f"k{n}" for n in range(60)] if column is KEY else [v for v in VALUES[column.name] if v is not None]
    comparison: Comparison = CHANCE.choice(get_args(Comparison))
    if column.type is ColumnType.NUMERIC:
        values = [Decimal(one) for one in values]  # as a filter has it
    value = CHANCE.sample(values, CHANCE.randrange(1, len(values))) if comparison == "in" else CHANCE.choice(values)
    return Condition(column, comparison, value)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the JSON of an answer has it."""
    answer = dict(row)
    if row["timestamp"] is not None:
        answer["timestamp"] = row["timestamp"].replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    if row["json"] is not None:
        answer["json"] = json.loads(row["json"], parse_float=Decimal)
    return answer


@pytest.fixture
async def reads(store: Store) -> AsyncIterator[Reads]:
    reads = store.reads()
    await reads.open()
    yield reads
    await reads.close()


async def filled(store: Store, count: int = 60) -> dict[str, dict[str, Any]]:
    """Write rows, some of them several times or deleted, and return them."""
    await store.make(definition())
    rows = store.rows()
    known: dict[str, dict[str, Any]] = {}
    for number in range(count * 2):
        key = f"k{CHANCE.randrange(count)}"
        if number % 7 == 6 and key in known:
            change = RowChange(key, exists_after=False, deleted_first=True)
            del known[key]
        else:
            known[key] = random_row()
            change = RowChange(key, set=dict(known[key]), deleted_first=number % 3 == 0)
        rows.apply([change], [], [Advance(INCARNATION, 0, number, number + 1, None, None, None)])
    rows.close()
    return known


async def test_pages_hold_the_rows_that_meet_all_filters_in_order(store: Store, reads: Reads) -> None:
    known = await filled(store)
    live = await reads.live()
    assert live is not None
    version = reads.version(*live)
    for _ in range(300):
        conditions = [random_condition() for _ in range(CHANCE.randrange(3))]
        order = Order(CHANCE.choice(["key", *(one.name for one in COLUMNS if one.index)]), CHANCE.random() < 0.5)
        expected = sorted(
            ((key, row) for key, row in known.items() if all(holds(one, key, row) for one in conditions)),
            key=sort_key(order), reverse=order.descending,
        )  # fmt: skip
        after = None
        found: list[tuple[str, str, str | None]] = []
        while True:
            snapshot, page = await version.page(Page(conditions, order, after, 7))
            found += page
            if len(page) < 7:
                break
            key, data, place = page[-1]
            value = None if order.column == "key" else known[key][order.column]
            assert (place is None) == (value is None)
            after = After(value, key)
        assert [key for key, _, _ in found] == [key for key, _ in expected], (conditions, order)
        assert snapshot.live == "v"
    for key, data, _ in found:
        assert json.loads(data, parse_float=Decimal) == plain(known[key])


async def test_rows_by_key_are_exact_and_of_the_positions_that_stand_beside_them(store: Store, reads: Reads) -> None:
    known = await filled(store)
    version = reads.version("v", definition())
    snapshot, found = await version.by_keys([*known, "none", "k\u00fc"])
    assert {key: json.loads(data, parse_float=Decimal) for key, data in found} == {
        key: plain(row) for key, row in known.items()
    }
    assert [(p.incarnation, p.partition, p.position, p.seen_at) for p in snapshot.partitions] == [
        (INCARNATION, 0, 120, None), (INCARNATION, 1, 0, None),
    ]  # fmt: skip
    rows = store.rows()
    rows.see([Seen(INCARNATION, 0, 125, 1.5), Seen(INCARNATION, 1, 0, 0.0), Seen("b" * 16, 0, 9, 0.0)])
    rows.stop(INCARNATION, 1, "why not")
    snapshot = await version.status()
    first, second = snapshot.partitions
    assert (first.head, first.lag_seconds, first.stopped) == (125, 1.5, None)
    assert (second.head, second.lag_seconds, second.stopped) == (0, 0.0, "why not")
    assert first.seen_at is not None
    assert abs(first.seen_at - snapshot.now) < 60
    rows.apply([], [], [Advance(INCARNATION, partition, at, 126, None, "t", 7) for partition, at in [(0, 120), (1, 0)]])
    first, second = (await version.state()).partitions
    assert (first.position, first.head, first.lag_seconds, second.stopped) == (126, 126, 0.0, None)
    positions = rows.positions([(INCARNATION, 0), (INCARNATION, 7)])
    assert [(p.position, p.topic_id, p.kafka_offset) for p in positions.values()] == [(126, "t", 7)]
    rows.close()


async def test_an_index_of_rows_that_exist_serves_pages_while_they_are_written(store: Store, reads: Reads) -> None:
    await store.make(definition(indexed=False))
    rows = store.rows()
    known = {f"k{n:04d}": random_row() for n in range(1200)}
    for number, begin in enumerate(range(0, 1200, 400)):
        part = list(known.items())[begin : begin + 400]
        advance = Advance(INCARNATION, 0, number, number + 1, None, None, None)
        rows.apply([RowChange(key, set=dict(row)) for key, row in part], [], [advance])
    assert not await store.admin.ensure_version(namespace="n", name="p", version="v", definition=definition())
    for number in range(3, 60):  # by one who knew of no index
        key = CHANCE.choice(list(known))
        known[key] |= {"integer": CHANCE.choice(VALUES["integer"])}
        change = RowChange(key, set={"integer": known[key]["integer"]})
        rows.apply([change], [], [Advance(INCARNATION, 0, number, number + 1, None, None, None)])
    rows.close()
    live = await reads.live()
    assert live is not None
    for column in ("integer", "numeric", "text"):
        _, found = await reads.version(*live).page(Page([], Order(column, True), None, 2000))
        expected = sorted(known.items(), key=sort_key(Order(column, True)), reverse=True)
        assert [key for key, _, _ in found] == [key for key, _ in expected]
    await store.make(definition(indexed=False))
    assert not any(
        one.index for one in (await store.admin.definitions(namespace="n", name="p"))["v"].definition.columns
    )


async def test_a_swap_and_a_drop_are_seen_at_once(store: Store, reads: Reads) -> None:
    known = await filled(store, 30)
    await store.make(definition(), version="w")
    assert not await store.admin.try_swap(namespace="n", name="p", version="w")
    former = reads.version("v", definition())
    assert (await former.state()).live == "v"
    rows = store.rows(version="w")
    progress = rows.live()
    assert progress is not None
    assert (progress.position, progress.lag_seconds) == (60, 0)
    live_rows = store.rows()
    assert live_rows.live() is None
    live_rows.see([Seen(INCARNATION, 0, 70, 2.5)])
    assert rows.live() == LiveProgress(60, 2.5)
    live_rows.close()
    rows.apply([RowChange("k", set=random_row())], [], [Advance(INCARNATION, 0, 0, 60, None, None, None)])
    rows.close()
    assert await store.admin.try_swap(namespace="n", name="p", version="w")
    assert (await former.state()).live == "w"
    versions = (await store.admin.status(namespace="n", name="p")).versions
    assert [(name, one.live, one.retired_at is None) for name, one in versions.items()] == [
        ("v", False, False), ("w", True, True),
    ]  # fmt: skip
    assert 0 <= (versions["v"].retired_seconds or -1) < 60
    assert {key for key, _ in (await former.by_keys(list(known)))[1]} == set(known)
    await store.admin.drop_version(namespace="n", name="p", version="v")
    with pytest.raises(NotFoundError):
        await former.by_keys(["k1"])
    live = await reads.live()
    assert live is not None
    assert live[0] == "w"
    status = await store.admin.status(namespace="n", name="p")
    assert (status.live, list(status.versions)) == ("w", ["w"])
    await store.admin.drop(namespace="n", name="p", uid="p")
    assert await reads.live() is None


@pytest.mark.parametrize("store", ["redis"], indirect=True)
async def test_a_version_that_comes_and_goes_is_there_or_not_there_for_all_who_look(store: Store) -> None:
    """As where two operators are at work, or a crash of Redis takes back what was made last."""
    await store.make(definition())
    here = {"namespace": "n", "name": "p", "version": "w"}
    ended = False

    async def come_and_go() -> None:
        for _ in range(40):
            await store.make(definition(), version="w")
            await store.admin.drop_version(**here)

    async def make() -> None:
        indexed = True
        while not ended:
            indexed = not indexed
            await store.make(definition(indexed=indexed), version="w")

    def look() -> set[str]:
        found = set()
        rows = stores.rows(store.url, namespace="n", name="p", version="w")
        while not ended:
            try:
                rows.open()
                found.add("there")
            except NotFoundError:
                found.add("not there")
        rows.close()
        return found

    others = [asyncio.create_task(make()), asyncio.create_task(asyncio.to_thread(look))]
    try:
        await come_and_go()
    finally:
        ended = True
        _, found = await asyncio.gather(*others)
    assert found == {"there", "not there"}


async def test_a_version_with_ends_knows_them_as_heads_from_the_beginning(store: Store) -> None:
    await store.make(definition().model_copy(update={"ends": {INCARNATION: [7, 0]}}))
    [version] = (await store.admin.status(namespace="n", name="p")).versions.values()
    assert [(one.position, one.head, one.lag_seconds) for one in version.partitions] == [(0, 7, 0), (0, 0, 0)]
    assert not version.complete
    assert all(one.seen_at is not None for one in version.partitions)
    rows = store.rows()
    rows.apply([], [], [Advance(INCARNATION, 0, 0, 7, None, None, None)])
    rows.close()
    [version] = (await store.admin.status(namespace="n", name="p")).versions.values()
    assert version.complete


async def test_the_query_service_serves_it_and_waits_for_tokens(store: Store) -> None:
    place = {"namespace": "shop", "name": "order-status"}
    await store.make(definition(), **place)
    rows = store.rows(**place)
    row = dict.fromkeys(VALUES) | {"text": "a", "integer": 2**53 + 1, "numeric": Decimal("0.10")}
    rows.apply([RowChange("k/1", set=row)], [], [Advance(INCARNATION, 0, 0, 1, None, None, None)])
    settings = Settings.model_validate(
        {"projection": "shop/order-status", "readstore_dsn": store.url, "auth": tokens_file("secret")}
    )
    with served.serve(app(settings), "secret") as service:
        found = service.ask("/v1/rows/k%2F1")
        assert found.status == 200
        assert b'"integer":9007199254740993,"numeric":0.10,' in found.body
        assert service.ask("/v1/rows/none").status == 404
        page = service.ask("/v1/rows?where=integer:gt:9007199254740992&where=text:prefix:a&order=numeric:desc")
        assert [one["key"] for one in page.json()["rows"]] == ["k/1"]
        assert service.ask("/v1/rows?where=json:eq:1").status == 422
        token = tokens.encode([tokens.Position(INCARNATION, 0, 2)])
        waiting = {"refold-token": token, "prefer": "wait=0.2"}
        assert service.ask("/v1/rows/k%2F1", headers=waiting).status == 504
        rows.apply([RowChange("k/1", set={"integer": 5})], [], [Advance(INCARNATION, 0, 1, 2, None, None, None)])
        assert service.ask("/v1/rows/k%2F1", headers=waiting).json()["data"]["integer"] == 5
        status = service.ask("/v1/status").json()
        assert ([one["position"] for one in status["positions"]], status["parked"]) == ([2, 0], 0)
    rows.close()


async def test_a_page_that_would_look_at_too_many_rows_is_refused(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(redis.url(500))
    await store.open()
    await filled(store)
    monkeypatch.setattr("refold.projection.readstore.redis_reads.MOST_LOOKED_AT", 3)
    reads = store.reads()
    version = reads.version("v", definition())
    conditions = [Condition(KEY, "ge", "k"), Condition(COLUMNS[1], "ge", -(2**63))]
    with pytest.raises(TooSlowError, match="over 3 rows"):
        await version.page(Page(conditions, Order("numeric", False), None, 50))
    assert (await version.page(Page([], Order("numeric", False), None, 50)))[1]
    await reads.close()
    await store.close()


def test_a_redis_that_cannot_keep_read_models_is_refused() -> None:
    good = {"redis_version": "7.0.15", "cluster_enabled": 0, "role": "master", "aof_enabled": 1, "maxmemory": 0}
    assert unsuitable(good) is None
    for said, why in [
        ({"redis_version": "6.2.1"}, "too old"),
        ({"cluster_enabled": 1}, "Cluster"),
        ({"role": "slave", "master_host": "10.0.0.1"}, "replica of 10.0.0.1"),
        ({"aof_enabled": 0}, "appendonly yes"),
        ({"maxmemory": 1, "maxmemory_policy": "allkeys-lru"}, "noeviction"),
    ]:
        assert why in (unsuitable(good | said) or "")


async def test_neither_operator_nor_projector_begins_with_one() -> None:
    server = Redis(settings={"appendonly": "no"})
    server.start()
    store = Store(server.url())
    try:
        with pytest.raises(UnavailableError, match="appendonly yes"):
            await store.open()
        with pytest.raises(UnavailableError, match="appendonly yes"):
            store.rows()
    finally:
        await store.close()
        server.remove()


async def test_a_redis_that_is_full_refuses_batches_and_lets_projections_go() -> None:
    server = Redis()
    server.start()
    store = Store(server.url())
    try:
        for name in ("large", "other"):
            await store.make(definition(), name=name)
        large, other = (store.rows(name=name) for name in ("large", "other"))
        changes = [RowChange(f"{row}", set=random_row()) for row in range(500)]
        large.apply(changes, [], [Advance(INCARNATION, 0, 0, 1, None, None, None)])
        one_row = [RowChange("k", set=random_row())], [], [Advance(INCARNATION, 0, 0, 1, None, None, None)]
        with Client.from_url(server.url()) as connection:
            connection.config_set("maxmemory", 1)
            for rows in (large, other):
                with pytest.raises(UnavailableError, match="maxmemory"):
                    rows.apply(*one_row)
            other.see([Seen(INCARNATION, 0, 70, 2.5)])
            # as the operator looks at the one, and does away with the other
            await store.make(definition(), name="other")
            assert (await store.admin.status(namespace="n", name="other")).versions["v"].lag_events == 70
            await store.admin.drop(namespace="n", name="large", uid="large")
            assert connection.keys("refold:n.large:*") == []
            connection.config_set("maxmemory", 0)
        other.apply(*one_row)
        large.close()
        other.close()
    finally:
        await store.close()
        server.remove()
