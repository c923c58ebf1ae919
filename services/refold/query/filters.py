"""Filters of the form `column:operator:value`, from the query string to a condition. Pure."""

import datetime as dt
import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from refold.projection.definition import Column, ColumnType
from refold.query import problems
from refold.query.live import Condition

#: Operators by their name in a filter, and what they are in SQL.
OPERATORS = {"eq": "="}

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_NUMERIC = re.compile(r"-?[0-9]{1,200}(\.[0-9]{1,200})?([eE][+-]?[0-9]{1,3})?")
_TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def condition(text: str, columns: Mapping[str, Column]) -> Condition:
    """Return the condition that `text` (`column:operator:value`; the value may hold colons) means.

    Raises:
        Problem: 400 where it hasn't this form; 422 where the column isn't declared or indexed, the operator isn't known
            or the value isn't of the column's type.
    """
    parts = text.split(":", 2)
    if len(parts) != 3:
        raise problems.invalid_query(f"a filter is 'column:operator:value', and {text[:100]!r} isn't", "where")
    name, operator, value = parts
    if name not in columns:
        raise problems.unknown_column(name, columns)
    if operator not in OPERATORS:
        raise problems.unknown_operator(operator, OPERATORS)
    column = columns[name]
    if not column.index:
        raise problems.column_not_indexed(name, [column.name for column in columns.values() if column.index])
    expected, cast, parse = _TYPES[column.type]
    try:
        return Condition(name, OPERATORS[operator], cast, parse(value))
    except ValueError as error:
        raise problems.invalid_value(name, value, expected) from error


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


def _never(value: str) -> str:
    raise ValueError(value)


#: By column type: what a value is, PostgreSQL's type, and what reads it.
_TYPES: Mapping[ColumnType, tuple[str, str, Callable[[str], object]]] = {
    ColumnType.TEXT: ("a text without NUL", "text", _text),
    ColumnType.INTEGER: ("an integer of 64 bits", "bigint", _integer),
    ColumnType.NUMERIC: ("a decimal number", "numeric", _numeric),
    ColumnType.BOOLEAN: ("true or false", "boolean", _boolean),
    ColumnType.TIMESTAMP: (
        "a time of RFC 3339 with an offset, such as 2026-01-31T23:59:59Z (in a URL, '+' is sent as %2B)",
        "timestamptz",
        _timestamp,
    ),
    ColumnType.JSON: ("nothing (JSON columns have no filters)", "jsonb", _never),
}
