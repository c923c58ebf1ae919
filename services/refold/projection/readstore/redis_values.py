"""Values of columns as Redis holds them: as text, and as bytes whose order is that of the values. Pure.

A row is a hash; a column that is null has no field. The text is what an answer to a query has (`projection.texts`), so
a number or a time stands in Redis as it is given out, exactly: no value ever becomes a double.

An index is a sorted set in which all scores are 0, so that Redis orders its members byte by byte. A member is the
`place` of the value, and the row's key after it. So one index serves equality, ranges, and an order by value and key in
both directions; null is the greatest value, as in PostgreSQL.
"""

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple, cast

import msgspec

from refold.projection.definition import Column, ColumnType
from refold.projection.readstore import KEY, After, Comparison, Condition, Order
from refold.projection.texts import QUOTED, to_text
from refold.projection.values import Value

#: How a place begins; the greater one is null's.
_VALUE, _NULL = b"\x01", b"\x02"
#: Ends a place. No text holds it, so that a text stands before those that it begins.
_END = b"\0"
#: What ends a place, and the next byte: with it instead, a place is beyond all members that begin with it.
_NEXT = b"\x01"
#: A number's exponent with this added has four digits, whatever the sums of numeric columns come to.
_EXPONENT = 5000
_COMPLEMENT = bytes.maketrans(b"0123456789", b"9876543210")
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def to_value(text: str, type_: ColumnType) -> Value:
    """Return the value of which `text` is."""
    if type_ is ColumnType.INTEGER:
        return int(text)
    if type_ is ColumnType.NUMERIC:
        return Decimal(text)
    if type_ is ColumnType.BOOLEAN:
        return text == "true"
    if type_ is ColumnType.TIMESTAMP:
        return dt.datetime.fromisoformat(text)
    return text


def place(value: Value, type_: ColumnType) -> bytes:
    """Return bytes that are ordered as the values of a column are; none is the beginning of another."""
    if value is None:
        return _NULL + _END
    if type_ is ColumnType.INTEGER:
        text = f"{cast('int', value) + 2**63:020d}".encode()
    elif type_ is ColumnType.NUMERIC:
        text = _numeric(Decimal(cast("Decimal | int", value)))
    else:
        text = to_text(value, type_).encode()
    return _VALUE + text + _END


def _numeric(value: Decimal) -> bytes:
    """Return sign, exponent and digits; those of a negative number the other way round."""
    if not value:
        return b"1"
    digits = "".join(map(str, value.as_tuple().digits)).rstrip("0")
    text = f"{value.adjusted() + _EXPONENT:04d}{digits}".encode()
    return b"2" + text if value > 0 else b"0" + text.translate(_COMPLEMENT) + b"~"


def _beyond(place: bytes) -> bytes:
    """Return what is greater than all members of a place, and not greater than those of the next one."""
    return place[:-1] + _NEXT


class Range(NamedTuple):
    """Members of an index from `begin` to before `end`; an end of b"" is beyond all. Both are UTF-8."""

    begin: bytes
    end: bytes


_ALL = [Range(b"", b"")]


def ranges(condition: Condition) -> list[Range]:
    """Return the ranges, in order and apart, of the members whose rows meet the condition."""
    column, comparison, value = condition
    values = cast("list[Value]", value) if comparison == "in" else [cast("Value", value)]
    if column is KEY:
        return _key_ranges(comparison, [cast("str", one).encode() for one in values])
    places = sorted({place(one, column.type) for one in values})
    first, last = Range(_VALUE, places[0]), Range(_beyond(places[-1]), _NULL)
    equal = [Range(one, _beyond(one)) for one in places]
    return {
        "eq": equal,
        "in": equal,
        "ne": [first, last],
        "lt": [first],
        "le": [Range(_VALUE, _beyond(places[0]))],
        "gt": [last],
        "ge": [Range(places[0], _NULL)],
    }[comparison]


def _key_ranges(comparison: Comparison, keys: list[bytes]) -> list[Range]:
    keys = sorted(set(keys))
    after = [key + _END for key in keys]  # the next key that there can be, since none holds this byte
    equal = [Range(*pair) for pair in zip(keys, after, strict=True)]
    return {
        "eq": equal,
        "in": equal,
        "ne": [Range(b"", keys[0]), Range(after[-1], b"")] if keys else [],
        "lt": [Range(b"", keys[0])] if keys else [],
        "le": [Range(b"", after[0])] if keys else [],
        "gt": [Range(after[0], b"")] if keys else [],
        "ge": [Range(keys[0], b"")] if keys else [],
    }[comparison]


def both(some: Iterable[Range], others: Sequence[Range]) -> list[Range]:
    """Return the ranges of the members that stand in one of `some` and in one of `others`."""
    found = []
    for one in some:
        for other in others:
            begin = max(one.begin, other.begin)
            end = min(one.end or other.end, other.end or one.end)
            if not end or begin < end:
                found.append(Range(begin, end))
    return found


class Scan(NamedTuple):
    """How a page is read: along an index (of a column, or of the keys: null), within ranges, by members.

    `others` are the conditions on further columns (null: on the key), each by its ranges.
    """

    column: str | None
    ranges: list[Range]
    descending: bool
    others: list[tuple[str | None, list[Range]]]


def scan(conditions: Sequence[Condition], order: Order, after: After | None, columns: Mapping[str, Column]) -> Scan:
    """Return how the rows beyond `after` that meet all `conditions` are read in order."""
    wanted: dict[str, list[Range]] = {}
    for condition in conditions:
        name = condition.column.name
        wanted[name] = both(wanted.get(name, _ALL), ranges(condition))
    along, begin = order.column, b""
    if along == KEY.name:
        # Among the rows of one value an index is in the order of their keys.
        for name, found in wanted.items():
            if name != KEY.name and len(found) == 1 and found[0].end == _beyond(found[0].begin):
                along, begin = name, found[0].begin
                break
    elif after is not None:
        begin = place(cast("Value", after.value), columns[along].type)
    within = wanted.pop(along, _ALL)
    if after is not None:
        at = begin + after.key.encode()
        within = both(within, [Range(b"", at) if order.descending else Range(at + _END, b"")])
    others = [(None if name == KEY.name else name, found) for name, found in wanted.items()]
    return Scan(None if along == KEY.name else along, within, order.descending, others)


class Answers:
    """Rows as the JSON of an answer, of their columns' texts."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.names = [column.name for column in columns]
        self._quoted = [column.type in QUOTED for column in columns]
        self._heads = [f"{msgspec.json.encode(name).decode()}:" for name in self.names]

    def json(self, texts: Sequence[bytes | None]) -> str:
        """Return the data of a row (JSON text) whose columns, in order, have these texts."""
        parts = []
        for head, quoted, text in zip(self._heads, self._quoted, texts, strict=True):
            if text is None:
                parts.append(f"{head}null")
            elif quoted:
                parts.append(head + msgspec.json.encode(text.decode()).decode())
            else:
                parts.append(head + text.decode())
        return "{" + ",".join(parts) + "}"
