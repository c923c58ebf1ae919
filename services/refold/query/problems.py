"""What the query service answers when it can't answer: each of its problems, in one place."""

from collections.abc import Collection, Sequence
from typing import Any

from refold.web.problems import Problem


def row_not_found(key: str) -> Problem:
    """No row has the key, in the state that the headers tell."""
    return Problem(
        404,
        "row-not-found",
        "No such row",
        f"there is no row with the key {key!r}; the Refold-Lag headers tell what isn't applied yet",
        key=key,
    )


def invalid_key() -> Problem:
    """No row can have such a key."""
    return Problem(400, "invalid-key", "Invalid key", "a key holds no NUL character", field="key")


def invalid_query(detail: str, field: str) -> Problem:
    """A parameter of the query string, or a header, has the wrong form."""
    return Problem(400, "invalid-query", "Invalid query", detail, field=field)


def unknown_column(column: str, columns: Collection[str], field: str) -> Problem:
    """A filter or an order names a column that the projection doesn't declare."""
    return Problem(
        422,
        "unknown-column",
        "Unknown column",
        f"the projection has no column {column!r}; it has {', '.join(sorted(columns))}",
        field=field,
        column=column,
    )


def column_not_indexed(column: str, indexed: Sequence[str], field: str) -> Problem:
    """A filter on the column, or an order by it, would read the whole table."""
    return Problem(
        422,
        "column-not-indexed",
        "Column not indexed",
        f"the column {column!r} has no index, so every row would be read for it; give it 'index: true' in the "
        f"Projection's columns (this rebuilds nothing). With an index: {', '.join(indexed)}",
        field=field,
        column=column,
    )


def not_comparable(column: str, type_: str, field: str) -> Problem:
    """A filter or an order names a column whose values aren't compared."""
    return Problem(
        422,
        "not-comparable",
        "Not comparable",
        f"the column {column!r} is {type_}, by which rows are neither filtered nor ordered: set a column of another "
        "type to the part of it that you look for, with 'index: true'",
        field=field,
        column=column,
    )


def unknown_operator(operator: str, operators: Collection[str]) -> Problem:
    """A filter's operator isn't known."""
    return Problem(
        422,
        "unknown-operator",
        "Unknown operator",
        f"a filter can't compare by {operator!r}; known: {', '.join(sorted(operators))}",
        field="where",
    )


def operator_not_for_type(column: str, type_: str, operator: str, operators: Sequence[str], way_out: str) -> Problem:
    """A filter's operator isn't one for the type of its column."""
    return Problem(
        422,
        "operator-not-for-type",
        "Operator not for this type",
        f"the column {column!r} is {type_}, which has no operator {operator!r} (but {', '.join(operators)}): {way_out}",
        field="where",
        column=column,
    )


def invalid_value(column: str, value: str, expected: str) -> Problem:
    """A filter's value isn't of its column's type."""
    return Problem(
        422,
        "invalid-value",
        "Invalid value",
        f"the column {column!r} is compared with {expected}, and {value[:100]!r} isn't one",
        field="where",
        column=column,
    )


def invalid_token(detail: str) -> Problem:
    """The Refold-Token isn't one, or names what this projection never applies."""
    return Problem(400, "invalid-token", "Invalid token", detail, field="Refold-Token")


def not_applied(waited: float, missing: Sequence[dict[str, Any]]) -> Problem:
    """The token's positions weren't applied in time."""
    return Problem(
        504,
        "not-applied",
        "Not applied yet",
        f"after {waited:.1f} s the read model still lacks events that the token names; try again, or send no "
        "Refold-Token to read what is there",
        retry_after=1,
        missing=list(missing),
    )


def no_live_version(projection: str) -> Problem:
    """Nothing is there yet that could be read."""
    return Problem(
        503,
        "no-live-version",
        "No live version",
        f"the Projection {projection} has no live version in the read store yet; its conditions tell why "
        f"(kubectl describe projection)",
        retry_after=2,
    )


def unavailable(detail: str) -> Problem:
    """The read store doesn't answer."""
    return Problem(503, "readstore-unavailable", "Read store unavailable", detail, retry_after=1)


def too_slow(detail: str) -> Problem:
    """A page took too long to find, or would have."""
    return Problem(
        503,
        "query-too-slow",
        "Query too slow",
        f"{detail}, since the filters leave too many to be put in order; order by "
        "a column that is filtered by (its index then gives the order), or filter by a further one. Just after "
        "'index: true' was added, the index is still being built",
        retry_after=10,
    )


def overloaded(detail: str) -> Problem:
    """More requests wait for the read store than is good."""
    return Problem(
        503,
        "overloaded",
        "Overloaded",
        f"{detail}; send fewer at once, or scale the query service",
        retry_after=1,
    )
