"""Random definitions and histories, and what they must give: a plain interpreter that takes one event at a time."""

import datetime as dt
import json
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

import msgspec
from hypothesis import strategies as st
from refold.events import Event
from refold.projection import values
from refold.projection.definition import Definition, merges, parse
from refold.projection.fold import JOINS, RowChange

TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
#: What each type of column is changed by, as the docs say.
OPERATIONS = {
    "text": ("set", "min", "max"),
    "integer": ("set", "add", "min", "max"),
    "numeric": ("set", "add", "min", "max"),
    "timestamp": ("set", "min", "max"),
    "json": ("set", "append"),
}
#: Defaults by type, as expressions and as values.
DEFAULTS: dict[str, list[tuple[str, Any]]] = {
    "text": [("'b'", "b")],
    "integer": [("0", 0), ("-3", -3)],
    "numeric": [("0", 0), ("2.50", Decimal("2.50"))],
    "timestamp": [("'2026-01-01T00:00:00Z'", TIME)],
    "json": [("[]", []), ("['first']", ["first"])],
}
Row = dict[str, Any]


class BadEventError(Exception):
    """The event has no effect and is parked."""


class Reference:
    """One row a key, from events one by one. `several`: rows fed by several partitions."""

    def __init__(self, definition: Definition, *, several: bool) -> None:
        self.definition, self.several = definition, several
        self.types = {column.name: column.type.value for column in definition.columns}
        self.nullable = {column.name: column.nullable for column in definition.columns}
        self.defaults = defaults(definition)
        self.rows: dict[str, Row] = {}
        self.stamps: dict[tuple[str, str], Any] = {}
        self.parked: list[tuple[str, int, int, str]] = []

    def fold(self, stream: str, event: Event) -> None:
        data = json.loads(bytes(event.data), parse_float=Decimal)
        for key in dict.fromkeys(data["keys"]) if self.several else [event.subject]:
            try:
                after = self.after(self.rows.get(key), stream, event, data, key)
            except BadEventError:
                after = None
                self.parked.append((stream, event.partition, event.position, key))
                continue
            if after == "nothing":
                continue
            if any((stream, event.partition, key) == (*one[:2], one[3]) for one in self.parked):
                self.parked.append((stream, event.partition, event.position, key))
            elif after is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = after

    def after(self, before: Row | None, stream: str, event: Event, data: Any, key: str) -> Row | str | None:
        rules = [rule for rule in self.definition.fold if rule.type == event.type]
        seen = before or self.defaults
        rules = [rule for rule in rules if self.applies(rule.when, seen, data)]
        row: Row | str | None = "nothing"
        stamp = (event.time, stream, event.partition, event.position)
        for rule in rules:
            if rule.delete:
                before, row = None, None
                continue
            row = before = dict(before or self.defaults)
            for operation, column, source in rule.assignments():
                value = self.value(column, operation, source, seen, data)
                if operation == "append":
                    row[column] = appended(row[column], value)
                elif operation != "set":
                    row[column] = value if row[column] is None else self.joined(operation, row[column], value)
                elif not self.several:
                    row[column] = value
        if self.several and isinstance(row, dict) and not self.is_parked(stream, event, key):
            for rule in rules:
                for operation, column, source in rule.assignments():
                    if operation == "set" and stamp >= self.stamps.get((key, column), stamp):
                        self.stamps[key, column] = stamp
                        row[column] = self.value(column, operation, source, seen, data)
        return row

    def is_parked(self, stream: str, event: Event, key: str) -> bool:
        return any((stream, event.partition, key) == (*one[:2], one[3]) for one in self.parked)

    @staticmethod
    def applies(when: str | None, seen: Row, data: Any) -> bool:
        if when is not None and when.startswith("has(row."):
            return seen[when[len("has(row.") : -1]] is not None
        return when is None or bool(data["flag"])

    def value(self, column: str, operation: str, source: str, seen: Row, data: Any) -> Any:
        value = seen[source[len("row.") :]] if source.startswith("row.") else data[self.types[column]]
        if value is None and operation != "append" and (operation != "set" or not self.nullable[column]):
            raise BadEventError
        if source.startswith("row."):
            return value
        if self.types[column] == "timestamp" and value is not None:
            return dt.datetime.fromisoformat(value)
        return value

    @staticmethod
    def joined(operation: str, before: Any, value: Any) -> Any:
        if operation == "add":
            return before + value
        return min(before, value) if operation == "min" else max(before, value)


def appended(before: Any, value: Any) -> list[Any]:
    if before is not None and not isinstance(before, list):
        raise BadEventError
    if len(before or []) >= values.MAX_ARRAY:
        raise BadEventError
    return [*(before or []), value]


def defaults(definition: Definition) -> Row:
    """Return the row before its first event."""
    return {
        column.name: None if column.default is None else dict(DEFAULTS[column.type.value])[column.default]
        for column in definition.columns
    }


class Store:
    """Applies changes as the docstring of refold.projection.fold says."""

    def __init__(self, definition: Definition) -> None:
        self.merges = merges(definition)
        self.json = {column.name for column in definition.columns if column.type.value == "json"}
        self.defaults = defaults(definition)
        self.rows: dict[str, Row] = {}
        self.stamps: dict[tuple[str, str], Any] = {}

    def apply(self, change: RowChange) -> None:
        if not change.exists_after:
            self.rows.pop(change.key, None)
            return
        before = None if change.deleted_first else self.rows.get(change.key)
        row = dict(before or self.defaults)
        for column, value in change.set.items():
            if column in self.json and isinstance(value, str):
                value = json.loads(value, parse_float=Decimal)
            stamp = change.stamps.get(column)
            if stamp is None or (change.key, column) not in self.stamps or stamp > self.stamps[change.key, column]:
                row[column] = value
                self.stamps[change.key, column] = stamp
        for column, value in change.merge.items():
            row[column] = JOINS[self.merges[column]](row[column], value)
        self.rows[change.key] = row

    def read(self, keys: Iterable[str], columns: Iterable[str]) -> dict[str, Row]:
        """Return the rows as a fold takes them."""
        return {
            key: {
                name: as_text(self.rows[key][name]) if name in self.json else self.rows[key][name] for name in columns
            }
            for key in keys
            if key in self.rows
        }


def as_text(value: Any) -> str | None:
    return None if value is None else as_json(value).decode()


def names(draw: st.DrawFn) -> Iterator[tuple[str, str]]:
    for type_ in draw(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=4)):
        yield type_, f"{type_}_{draw(st.integers(1, 2))}"


@st.composite
def column(draw: st.DrawFn, name: str, type_: str) -> dict[str, Any]:
    declared: dict[str, Any] = {"name": name, "type": type_}
    if draw(st.booleans()):
        declared["default"] = draw(st.sampled_from(DEFAULTS[type_]))[0]
        declared["nullable"] = draw(st.booleans())
    return declared


@st.composite
def definitions(draw: st.DrawFn, *, several: bool) -> Definition:
    columns = {name: type_ for type_, name in names(draw)}
    allowed: dict[str, list[str]] = {}
    for name, type_ in columns.items():
        if several:
            allowed[name] = [draw(st.sampled_from([one for one in OPERATIONS[type_] if one != "append"]))]
        else:
            allowed[name] = sorted({"set", *draw(st.lists(st.sampled_from(OPERATIONS[type_]), max_size=3))})
    rules = []
    for _ in range(draw(st.integers(1, 4))):
        rule: dict[str, Any] = {"type": draw(st.sampled_from("AAB"))}
        if draw(st.booleans()):
            rule["when"] = "data.flag"
        elif not several and draw(st.integers(0, 3)) == 0:
            rule["when"] = f"has(row.{draw(st.sampled_from(sorted(columns)))})"
        if not several and draw(st.integers(0, 5)) == 0:
            rule["delete"] = True
        else:
            for name in draw(st.lists(st.sampled_from(sorted(columns)), min_size=1, max_size=3, unique=True)):
                operation = draw(st.sampled_from(allowed[name]))
                same = sorted(other for other, type_ in columns.items() if type_ == columns[name])
                source = f"data.{columns[name]}"
                if not several and draw(st.integers(0, 4)) == 0:
                    source = f"row.{draw(st.sampled_from(same))}"
                rule.setdefault(operation, {})[name] = source
        rules.append(rule)
    return parse(
        {
            "streams": ["s"],
            "key": "data.keys" if several else "subject",
            "columns": [draw(column(name, type_)) for name, type_ in columns.items()],
            "fold": rules,
        }
    )


datas = st.fixed_dictionaries(
    {
        "keys": st.lists(st.sampled_from("xyz"), max_size=2),
        "flag": st.booleans(),
        "text": st.sampled_from(["a", "b", "ü", "\U0001f4b6", "", None]),
        "integer": st.one_of(st.integers(-5, 5), st.none()),
        "numeric": st.one_of(st.decimals(-9, 9, places=2), st.integers(-5, 5)),
        "json": st.sampled_from([None, [], [1, {"b": Decimal("2.50"), "a": None}], "text", {"k": [1]}]),
        "timestamp": st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01T00:30:00+01:00", "2026-01-01T00:00:01Z"]),
    }
)
steps = st.tuples(
    st.sampled_from("AABBC"),
    st.sampled_from("xxyz"),  # subject
    datas,
    st.tuples(st.sampled_from(["aa", "bb"]), st.integers(0, 1)),  # stream and partition
    st.integers(0, 2),  # seconds since the partition's last event
    st.booleans(),  # whether a batch ends here
)


def events_of(history: list[Any], *, several: bool) -> Iterator[tuple[str, Event, bool]]:
    positions: dict[tuple[str, int], int] = {}
    seconds: dict[tuple[str, int], int] = {}
    for type_, subject, data, place, later, ends in history:
        place = place if several else ("aa", ord(subject) % 2)
        position = positions[place] = positions.get(place, 0) + 1
        seconds[place] = seconds.get(place, 0) + later
        time = TIME + dt.timedelta(seconds=seconds[place])
        text = msgspec.json.encode(data, decimal_format="number") if False else as_json(data)
        yield place[0], Event(place[1], position, subject, position, "i", type_, time, msgspec.Raw(text)), ends


def as_json(data: Any) -> bytes:
    return msgspec.json.Encoder(decimal_format="number").encode(data)
