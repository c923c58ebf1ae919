"""What commands for people print: tables, or JSON for programs."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Columns of a table that goes to no terminal: nobody should have to put cut lines together.
_WIDE = 400
_encode = msgspec.json.Encoder(decimal_format="number").encode


class Output(StrEnum):
    """The form of what is printed."""

    TABLE = "table"
    JSON = "json"


def as_json(value: Any) -> None:
    """Print JSON, for people and programs."""
    print(msgspec.json.format(_encode(value), indent=2).decode())


def as_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; the last column takes the room that is left."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column != columns[-1], justify="left")
    for row in rows:
        table.add_row(*(Text(printable(value)) for value in row))
    console.print(table)


def printable(value: object) -> str:
    """Return a value as text that does nothing to a terminal: events hold what anybody may have written."""
    if value is None:
        return "–"
    text = value if isinstance(value, str) else _encode(value).decode()
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )
