"""Values of columns as the texts that answers hold. Pure."""

import datetime as dt
from decimal import Decimal
from typing import cast

import msgspec

from refold.projection.definition import ColumnType
from refold.projection.values import Value

#: Types whose texts stand in quotes in JSON.
QUOTED = (ColumnType.TEXT, ColumnType.TIMESTAMP)


def to_text(value: Value, type_: ColumnType) -> str:
    """Return the text of a value that isn't null."""
    if type(value) is Decimal:
        return f"{value:f}" if value else f"{abs(value):f}"  # there is no negative zero
    if type_ is ColumnType.BOOLEAN:
        return "true" if value else "false"
    if type_ is ColumnType.TIMESTAMP:
        moment = cast("dt.datetime", value).astimezone(dt.UTC).replace(tzinfo=None)
        return f"{moment.isoformat(timespec='microseconds')}Z"
    return str(value)


def to_json(value: Value, type_: ColumnType) -> str:
    """Return a value as JSON text."""
    if value is None:
        return "null"
    text = to_text(value, type_)
    return msgspec.json.encode(text).decode() if type_ in QUOTED else text
