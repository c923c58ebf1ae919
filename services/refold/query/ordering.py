"""The order of a page, and cursors: where a page ended, opaque to callers. Pure.

Rows are ordered by one indexed column and, among equals, by their key, both in one direction, as the column's index
has them. null counts as greater than every value: it comes last, and first where the order is descending.

A cursor holds column value and key of the last row that was given out. The next page begins beyond that place,
whatever was written, deleted or swapped in the meantime.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from refold.projection.definition import Column
from refold.projection.readstore import After, Order
from refold.query import filters, problems
from refold.web.problems import Problem

#: The order without `order=`.
BY_KEY = Order("key", descending=False)
_DIRECTIONS = {"asc": False, "desc": True}


class _Place(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    key: str
    order: str = "key:asc"
    value: str | None = None


_decoder = msgspec.json.Decoder(_Place)


class Cursor(NamedTuple):
    """A place in an `order`: after the row of `key`, whose value in the order's column has the text `value`."""

    order: Order
    value: str | None
    key: str

    def encode(self) -> str:
        """Return the cursor's text."""
        place = [self.key] if self.order == BY_KEY else [self.key, _text(self.order), self.value]
        return base64.urlsafe_b64encode(msgspec.json.encode(place)).rstrip(b"=").decode()


def parse(text: str) -> Order:
    """Return the order that `column`, `column:asc` or `column:desc` means.

    Raises:
        Problem: 400 where it hasn't this form.
    """
    column, colon, direction = text.partition(":")
    if colon and direction not in _DIRECTIONS:
        raise problems.invalid_query(f"an order is 'column' or 'column:desc', and {text[:100]!r} isn't", "order")
    return Order(column, _DIRECTIONS[direction or "asc"])


def after(cursor: str, order: Order, columns: Mapping[str, Column]) -> After:
    """Return the place in `order` that `cursor` names.

    Raises:
        Problem: 400 where the cursor wasn't made by `Cursor.encode`, or for another order.
    """
    try:
        place = _decoder.decode(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        made = Cursor(parse(place.order), place.value, place.key)
        if "\0" in made.key:
            raise ValueError(made.key)
    except (binascii.Error, ValueError, msgspec.DecodeError, Problem) as error:
        raise problems.invalid_query("the cursor isn't one that this service gave out", "cursor") from error
    if made.order != order:
        raise problems.invalid_query(
            f"the cursor is of a page with order={_text(made.order)}: ask for the next one with the same parameters",
            "cursor",
        )
    if made.value is None or order.column == "key":
        return After(None, made.key)
    try:
        return After(filters.value_of(columns[order.column], made.value), made.key)
    except ValueError as error:
        raise problems.invalid_query(
            f"the cursor has no value of the column {order.column!r}, whose type has changed: begin anew without it",
            "cursor",
        ) from error


def _text(order: Order) -> str:
    return f"{order.column}:{'desc' if order.descending else 'asc'}"
