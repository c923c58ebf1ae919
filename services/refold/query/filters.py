"""Filters of the form `column:operator:value`, from the query string to conditions. Pure.

No condition holds for a column that is null. Each is of a form that the column's index serves: a prefix is a range,
since the texts that begin with it stand together in the order of code points.
"""

import datetime as dt
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import NamedTuple, cast, get_args

from refold.projection.definition import Column, ColumnType
from refold.projection.readstore import KEY, Comparison, Condition
from refold.query import problems

#: Operators by their name in a filter: comparisons of the read store, and one that is made of two.
OPERATORS = (*get_args(Comparison), "prefix")
#: Values that an `in` may list.
MOST_VALUES = 1000

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_NUMERIC = re.compile(r"-?[0-9]{1,200}(\.[0-9]{1,200})?([eE][+-]?[0-9]{1,3})?")
_TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_ESCAPED = re.compile(r"\\([\\,])|,")
_LAST_CODE_POINT, _SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)


def conditions(text: str, columns: Mapping[str, Column]) -> list[Condition]:
    """Return the conditions that `text` (`column:operator:value`; the value may hold colons) means; all must hold.

    Raises:
        Problem: 400 where it hasn't this form; 422 where the column can't be filtered by (see `indexed`), the operator
            isn't known or not one for the column's type, or the value isn't of the column's type.
    """
    parts = text.split(":", 2)
    if len(parts) != 3:
        raise problems.invalid_query(f"a filter is 'column:operator:value', and {text[:100]!r} isn't", "where")
    name, operator, value = parts
    column = indexed(name, columns, "where")
    if operator not in OPERATORS:
        raise problems.unknown_operator(operator, OPERATORS)
    kind = _KINDS[column.type]
    if operator not in kind.operators:
        raise problems.operator_not_for_type(name, column.type, operator, kind.operators, kind.way_out)
    if operator == "in":
        values = _split(value)
        if len(values) > MOST_VALUES:
            raise problems.invalid_query(f"'in' lists over {MOST_VALUES} values; ask in parts", "where")
        return [Condition(column, "in", [_parse(kind, name, one) for one in values])]
    if operator == "prefix":
        begin = _parse(kind, name, value)
        found = [Condition(column, "ge", begin)]
        end = after_prefix(value)
        return found if end is None else [*found, Condition(column, "lt", end)]
    return [Condition(column, cast("Comparison", operator), _parse(kind, name, value))]


def any_key(keys: list[str]) -> Condition:
    """Return the condition that a row's key is one of `keys`."""
    return Condition(KEY, "in", keys)


def indexed(name: str, columns: Mapping[str, Column], field: str) -> Column:
    """Return the column called `name`; `field` is the parameter that errors name.

    Raises:
        Problem: 422 where it isn't among `columns`, has no index, or is of a type that isn't compared (json).
    """
    if name not in columns:
        raise problems.unknown_column(name, columns, field)
    if columns[name].type not in _KINDS:
        raise problems.not_comparable(name, columns[name].type, field)
    if not columns[name].index:
        raise problems.column_not_indexed(name, [one.name for one in columns.values() if one.index], field)
    return columns[name]


def value_of(column: Column, text: str) -> object:
    """Return the value of the column's type that `text` is.

    Raises:
        ValueError: it isn't one.
    """
    return _KINDS[column.type].parse(text)


def after_prefix(prefix: str) -> str | None:
    """Return the first text, by code points, beyond all that begin with `prefix`; None where there is none."""
    for at in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[at]) + 1
        if _SURROGATES[0] <= code <= _SURROGATES[1]:
            code = _SURROGATES[1] + 1
        if code <= _LAST_CODE_POINT:
            return prefix[:at] + chr(code)
    return None


def _split(text: str) -> list[str]:
    r"""Return the values that `text` lists, separated by commas; `\,` is a comma and `\\` a backslash in a value."""
    values = [""]
    end = 0
    for found in _ESCAPED.finditer(text):
        values[-1] += text[end : found.start()]
        if found[1] is None:
            values.append("")
        else:
            values[-1] += found[1]
        end = found.end()
    values[-1] += text[end:]
    return values


def _parse(kind: "_Kind", column: str, value: str) -> object:
    try:
        return kind.parse(value)
    except ValueError as error:
        raise problems.invalid_value(column, value, kind.expected) from error


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError(value)
    return value


def _integer(value: str) -> int:
    if not _INTEGER.fullmatch(value) or not -(2**63) <= (number := int(value)) < 2**63:
        raise ValueError(value)
    return number


def _numeric(value: str) -> Decimal:
    if not _NUMERIC.fullmatch(value):
        raise ValueError(value)
    return Decimal(value)


def _boolean(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(value)
    return value == "true"


def _timestamp(value: str) -> dt.datetime:
    if not _TIMESTAMP.fullmatch(value):
        raise ValueError(value)
    return dt.datetime.fromisoformat(value.upper())


class _Kind(NamedTuple):
    """A type of columns: what a value is, what reads it, its operators, and what to do without the others."""

    expected: str
    parse: Callable[[str], object]
    operators: tuple[str, ...]
    way_out: str


_ORDERED = get_args(Comparison)
_KINDS: Mapping[ColumnType, _Kind] = {
    ColumnType.TEXT: _Kind("a text without NUL", _text, OPERATORS, ""),
    ColumnType.INTEGER: _Kind("an integer of 64 bits", _integer, _ORDERED, "ask for a range by ge and lt"),
    ColumnType.NUMERIC: _Kind("a decimal number", _numeric, _ORDERED, "ask for a range by ge and lt"),
    ColumnType.BOOLEAN: _Kind("true or false", _boolean, ("eq", "ne", "in"), "compare by eq or ne"),
    ColumnType.TIMESTAMP: _Kind(
        "a time of RFC 3339 with an offset, such as 2026-01-31T23:59:59Z (in a URL, '+' is sent as %2B)",
        _timestamp,
        _ORDERED,
        "ask for a range by ge and lt",
    ),
}
