"""Random definitions and histories, and what they must give: a plain interpreter that takes one event at a time."""

import datetime as dt
import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import msgspec
from hypothesis import strategies as st
from refold.events import Event
from refold.projection.definition import Definition, merges, parse
from refold.projection.fold import JOINS, RowChange

TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
#: What each type of column is changed by, as the docs say.
OPERATIONS = {
    "text": ("set", "min", "max"),
    "integer": ("set", "add", "min", "max"),
    "numeric": ("set", "add", "min", "max"),
    "timestamp": ("set", "min", "max"),
}
Row = dict[str, Any]


class BadEventError(Exception):
    """The event has no effect and is parked."""


class Reference:
    """One row a key, from events one by one. `several`: rows fed by several partitions."""

    def __init__(self, definition: Definition, *, several: bool) -> None:
        self.definition, self.several = definition, several
        self.types = {column.name: column.type.value for column in definition.columns}
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
        rules = [rule for rule in rules if rule.when is None or data["flag"]]
        row: Row | str | None = "nothing"
        stamp = (event.time, stream, event.partition, event.position)
        for rule in rules:
            if rule.delete:
                before, row = None, None
                continue
            row = before = dict(before or dict.fromkeys(self.types))
            for operation, column, _ in rule.assignments():
                value = self.value(column, operation, data)
                if operation != "set":
                    row[column] = value if row[column] is None else self.joined(operation, row[column], value)
                elif not self.several:
                    row[column] = value
        if self.several and isinstance(row, dict) and not self.is_parked(stream, event, key):
            for rule in rules:
                for operation, column, _ in rule.assignments():
                    if operation == "set" and stamp >= self.stamps.get((key, column), stamp):
                        self.stamps[key, column] = stamp
                        row[column] = self.value(column, operation, data)
        return row

    def is_parked(self, stream: str, event: Event, key: str) -> bool:
        return any((stream, event.partition, key) == (*one[:2], one[3]) for one in self.parked)

    def value(self, column: str, operation: str, data: Any) -> Any:
        value = data[self.types[column]]
        if value is None and operation != "set":
            raise BadEventError
        if self.types[column] == "timestamp" and value is not None:
            return dt.datetime.fromisoformat(value)
        return value

    @staticmethod
    def joined(operation: str, before: Any, value: Any) -> Any:
        if operation == "add":
            return before + value
        return min(before, value) if operation == "min" else max(before, value)


class Store:
    """Applies changes as the docstring of refold.projection.fold says."""

    def __init__(self, definition: Definition) -> None:
        self.merges = merges(definition)
        self.columns = [column.name for column in definition.columns]
        self.rows: dict[str, Row] = {}
        self.stamps: dict[tuple[str, str], Any] = {}

    def apply(self, change: RowChange) -> None:
        if not change.exists_after:
            self.rows.pop(change.key, None)
            return
        before = None if change.deleted_first else self.rows.get(change.key)
        row = dict(before or dict.fromkeys(self.columns))
        for column, value in change.set.items():
            stamp = change.stamps.get(column)
            if stamp is None or (change.key, column) not in self.stamps or stamp > self.stamps[change.key, column]:
                row[column] = value
                self.stamps[change.key, column] = stamp
        for column, value in change.merge.items():
            row[column] = JOINS[self.merges[column]](row[column], value)
        self.rows[change.key] = row


def names(draw: st.DrawFn) -> Iterator[tuple[str, str]]:
    for type_ in draw(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=4)):
        yield type_, f"{type_}_{draw(st.integers(1, 2))}"


@st.composite
def definitions(draw: st.DrawFn, *, several: bool) -> Definition:
    columns = {name: type_ for type_, name in names(draw)}
    allowed: dict[str, list[str]] = {}
    for name, type_ in columns.items():
        one = draw(st.sampled_from(OPERATIONS[type_]))
        allowed[name] = [one] if several else sorted({"set", one})
    rules = []
    for _ in range(draw(st.integers(1, 4))):
        rule: dict[str, Any] = {"type": draw(st.sampled_from("AAB"))}
        if draw(st.booleans()):
            rule["when"] = "data.flag"
        if not several and draw(st.integers(0, 5)) == 0:
            rule["delete"] = True
        else:
            for name in draw(st.lists(st.sampled_from(sorted(columns)), min_size=1, max_size=3, unique=True)):
                operation = draw(st.sampled_from(allowed[name]))
                rule.setdefault(operation, {})[name] = f"data.{columns[name]}"
        rules.append(rule)
    return parse(
        {
            "streams": ["s"],
            "key": "data.keys" if several else "subject",
            "columns": [{"name": name, "type": type_} for name, type_ in columns.items()],
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
        text = msgspec.json.encode(data, decimal_format="number") if False else _json(data)
        yield place[0], Event(place[1], position, subject, position, "i", type_, time, msgspec.Raw(text)), ends


def _json(data: Any) -> bytes:
    return msgspec.json.Encoder(decimal_format="number").encode(data)
