"""Random histories in random batches, against a fold in plain Python that takes one event at a time."""

import datetime as dt
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from refold.events import Event
from refold.projection.definition import parse
from refold.projection.fold import Fold, Parked, RowChange, compile_fold

TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
COLUMNS = [
    {"name": "status", "type": "text"},
    {"name": "items", "type": "integer"},
    {"name": "total", "type": "numeric"},
]
Row = dict[str, Any]
Table = dict[str, Row]

ONE_PARTITION = compile_fold(
    parse(
        {
            "streams": ["orders"],
            "columns": COLUMNS,
            "fold": [
                {"type": "Placed", "set": {"status": "data.status", "items": "data.n"}, "add": {"total": "data.price"}},
                {"type": "Added", "add": {"items": "data.n", "total": "data.n * data.price"}, "when": "data.n > 0"},
                {"type": "Reset", "set": {"total": "null", "status": "null"}},
                {"type": "Purged", "delete": True},
                {"type": "Again", "delete": True, "when": "data.n > 1"},
                {"type": "Again", "set": {"status": "'again'"}, "add": {"items": "1"}},
            ],
        }
    )
)


def naive(rows: Table, event: Event, data: dict[str, Any]) -> None:
    """What ONE_PARTITION does, in plain Python; raises where the event is bad."""
    key, n, price = event.subject, data["n"], data["price"]
    row = dict(rows.get(key) or {"status": None, "items": None, "total": None})
    if event.type == "Placed":
        if n is not None and not isinstance(n, int):
            raise ValueError(n)
        row.update(status=data["status"], items=n, total=(row["total"] or 0) + price)
    elif event.type == "Added":
        if isinstance(n, str) or n is None:
            raise ValueError(n)
        if not n > 0:
            return
        row.update(items=(row["items"] or 0) + n, total=(row["total"] or 0) + n * price)
    elif event.type == "Reset":
        row.update(total=None, status=None)
    elif event.type == "Purged":
        rows.pop(key, None)
        return
    elif event.type == "Again":
        if isinstance(n, str) or n is None:
            raise ValueError(n)
        if n > 1:
            row = {"status": None, "items": None, "total": None}
        row.update(status="again", items=(row["items"] or 0) + 1)
    else:
        return
    rows[key] = row


def apply(rows: Table, stamps: dict[tuple[str, str], Any], change: RowChange) -> None:
    """Bring a change into a table, as the docstring of refold.projection.fold says."""
    if not change.exists_after:
        rows.pop(change.key, None)
        return
    row = None if change.deleted_first else rows.get(change.key)
    row = dict(row or {"status": None, "items": None, "total": None})
    for column, value in change.set.items():
        stamp = change.stamps.get(column)
        if stamp is None or stamp > stamps.get((change.key, column), (TIME - dt.timedelta(days=1),)):
            row[column] = value
            stamps[change.key, column] = stamp
    for column, added in change.merge.items():
        row[column] = (row[column] or 0) + added
    rows[change.key] = row


def event(type_: str, data: object, *, subject: str, position: int, partition: int = 0, seconds: int = 0) -> Event:
    text = json.dumps(data, default=str).encode()
    time = TIME + dt.timedelta(seconds=seconds)
    return Event(partition, position, subject, position, str(position), type_, time, msgspec.Raw(text))


prices = st.integers(-1000, 1000).map(lambda cents: Decimal(cents) / 100)
steps = st.tuples(
    st.sampled_from(["Placed", "Added", "Added", "Reset", "Purged", "Again", "Unknown"]),
    st.sampled_from(["a", "b", "c"]),
    st.one_of(st.integers(-1, 5), st.sampled_from([1, 2, None, "bad"])),
    prices,
    st.booleans(),  # whether a batch ends here
)


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, max_size=40))
def test_any_batches_give_the_table_of_the_naive_fold(history: list[tuple[str, str, Any, Decimal, bool]]) -> None:
    wanted: Table = {}
    parked_naive: list[int] = []
    parked_rows: set[str] = set()
    rows: Table = {}
    parked = Parked()
    parked_positions: list[int] = []
    batch = ONE_PARTITION.batch(parked)

    def commit() -> None:
        for change in batch.changes.values():
            apply(rows, {}, change)
        for one in batch.parked:
            assert one.key is not None
            parked.rows.add((one.incarnation, one.event.partition, one.key))
            parked_positions.append(one.event.position)

    for position, (type_, subject, n, price, ends) in enumerate(history, 1):
        # json.dumps writes floats; two digits after the point survive them.
        one = event(type_, {"n": n, "price": float(price), "status": type_}, subject=subject, position=position)
        try:
            tried = dict(wanted)
            naive(tried, one, {"n": n, "price": price, "status": type_})
        except ValueError:
            parked_rows.add(subject)
        if subject in parked_rows:
            if tried != wanted or type_ != "Unknown":
                parked_naive.append(position)
        else:
            wanted = tried
        batch.fold("i", [one])
        if ends:
            commit()
            batch = ONE_PARTITION.batch(parked)
    commit()
    assert rows == wanted
    # An event that has no effect whatever its row is, since its condition is false, is not parked either.
    idle = {
        position
        for position, (type_, _, n, _, _) in enumerate(history, 1)
        if type_ == "Added" and isinstance(n, int) and n <= 0
    }
    assert parked_positions == [position for position in parked_naive if position not in idle]


SEVERAL_PARTITIONS = compile_fold(
    parse(
        {
            "streams": ["orders", "payments"],
            "key": "data.keys",
            "columns": COLUMNS,
            "fold": [
                {"type": "E", "set": {"status": "data.status"}, "add": {"items": "data.n"}},
                {"type": "E", "add": {"total": "data.price"}, "when": "data.n > 1"},
                {"type": "F", "set": {"status": "'f'"}},
            ],
        }
    )
)


def wild(key: str, rule: dict[str, Any]) -> Fold:
    names = ("text", "integer", "numeric", "boolean", "timestamp", "json")
    columns = [{"name": name, "type": name} for name in names]
    rules = [{"type": "E", **rule}, {"type": "Good", "set": {"text": "'good'"}}]
    return compile_fold(parse({"streams": ["orders"], "key": key, "columns": columns, "fold": rules}))


WILD = [
    wild(key, rule)
    for key in ("subject", "has(data.k) ? data.k : [subject, string(data.a)]")
    for rule in (
        {"set": {"text": "data.a + data.b"}, "when": "data.a > data.b || data.a == data.b"},
        {"set": {"text": "data.a"}},
        {"set": {"integer": "data.a"}},
        {"set": {"numeric": "data.a * data.b - data.a / data.b"}, "when": "!has(data.k)"},
        {"add": {"numeric": "data.a"}},
        {"set": {"boolean": "data.a == data.b"}},
        {"set": {"json": "{'a': data.a, 'l': [data.b]}"}, "when": "data.a in data.b || data.a != null"},
        {"add": {"integer": "int(data.a) % size(data.b)"}},
        {"set": {"text": "string(data.a) + string(data.b)"}, "when": "data.b.all(x, x == data.a) || true"},
        {"set": {"timestamp": "timestamp(data.a)"}},
        {"set": {"timestamp": "event.time + duration(data.a)"}},
    )
]
numbers = st.sampled_from(
    ["0", "-1", "2.0", "1e308", "1e-308", "1E+999999", "9" * 300, "0.1", "-0.0", "9223372036854775808"]
)
texts = st.one_of(st.text(max_size=5), st.sampled_from(["", "\0", "2026-01-01T00:00:00Z", "x" * 600])).map(json.dumps)
documents = st.recursive(
    st.one_of(numbers, texts, st.sampled_from(["null", "true", "false", '{"d": [{"e": true}]}', "{", "[1,"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(st.sampled_from(["a", "b", "c", "d", "k"]), inner, max_size=5).map(
            lambda items: "{" + ", ".join(f'"{key}": {value}' for key, value in items.items()) + "}"
        ),
    ),
    max_leaves=10,
)
operands = st.one_of(numbers, texts, documents)
records = st.fixed_dictionaries({"a": operands, "b": operands}, optional={"c": documents, "k": documents}).map(
    lambda items: "{" + ", ".join(f'"{key}": {value}' for key, value in items.items()) + "}"
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(WILD), st.one_of(records, records, documents))
def test_no_event_whatever_its_data_stops_a_batch(compiled: Fold, text: str) -> None:
    bad = Event(0, 1, "a", 1, "1", "E", TIME, msgspec.Raw(text.encode(errors="surrogatepass")))
    good = event("Good", {"k": "good"}, subject="good", position=2)
    batch = compiled.batch()
    batch.fold("i", [bad, good])
    assert batch.changes["good"].set["text"] == "good"
    assert all(one.error for one in batch.parked)


facts = st.tuples(
    st.sampled_from(["E", "F"]),
    st.lists(st.sampled_from(["x", "y", "z"]), max_size=3),
    st.integers(0, 5),
    prices,
    st.integers(0, 2),  # seconds since the partition's last event
)
partitions = st.dictionaries(
    st.tuples(st.sampled_from(["aa", "bb"]), st.integers(0, 1)), st.lists(facts, max_size=8), max_size=4
)


@settings(max_examples=200, deadline=None)
@given(partitions, st.data())
def test_any_order_between_partitions_gives_the_same_table(history: dict[tuple[str, int], Any], data: Any) -> None:
    queues: dict[tuple[str, int], list[Event]] = {}
    for (incarnation, partition), found in history.items():
        seconds = 0
        queue = queues.setdefault((incarnation, partition), [])
        for position, (type_, keys, n, price, later) in enumerate(found, 1):
            seconds += later
            content = {"keys": keys, "n": n, "price": float(price), "status": f"{incarnation}{partition}/{position}"}
            queue.append(event(type_, content, subject="s", position=position, partition=partition, seconds=seconds))

    def pick_first(places: list[tuple[str, int]]) -> tuple[str, int]:
        return places[0]

    def pick_any(places: list[tuple[str, int]]) -> tuple[str, int]:
        return data.draw(st.sampled_from(places))  # type: ignore[no-any-return]

    orderly = table_of(queues, pick_first, lambda: True)
    mixed = table_of(queues, pick_any, lambda: data.draw(st.booleans()))
    assert mixed == orderly
    for incarnation, partition in queues:
        for one in queues[incarnation, partition]:
            for key in json.loads(bytes(one.data))["keys"]:
                assert key in mixed


def table_of(
    queues: dict[tuple[str, int], list[Event]],
    pick: Callable[[list[tuple[str, int]]], tuple[str, int]],
    ends: Callable[[], bool],
) -> Table:
    """Fold the partitions' events, `pick` by `pick`, in batches that `ends` ends."""
    left = {place: list(events) for place, events in queues.items() if events}
    rows: Table = {}
    stamps: dict[tuple[str, str], Any] = {}
    batch = SEVERAL_PARTITIONS.batch()
    while left:
        place = pick(sorted(left))
        batch.fold(place[0], [left[place].pop(0)])
        if not left[place]:
            del left[place]
        if ends() or not left:
            for change in batch.changes.values():
                apply(rows, stamps, change)
            assert batch.parked == []
            batch = SEVERAL_PARTITIONS.batch()
    return rows
