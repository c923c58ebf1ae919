"""What a value can be. A static type is a set of kinds, since what `data` holds isn't known before an event comes."""

import datetime as dt
from decimal import Decimal
from enum import IntFlag


class Kind(IntFlag):
    """A set of kinds; its members are the kinds themselves, `JSON` and `ANY` are often used unions."""

    NUMBER = 1
    STRING = 2
    BOOL = 4
    LIST = 8
    MAP = 16
    NULL = 32
    TIMESTAMP = 64
    DURATION = 128
    JSON = NUMBER | STRING | BOOL | LIST | MAP | NULL
    ANY = JSON | TIMESTAMP | DURATION

    @property
    def title(self) -> str:
        """The set in words, e.g. "string or null"."""
        if self == Kind.ANY:
            return "any value"
        names = [name.lower() for name, kind in _SINGLE.items() if kind & self]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


_SINGLE = {name: Kind[name] for name in ("NUMBER", "STRING", "BOOL", "LIST", "MAP", "NULL", "TIMESTAMP", "DURATION")}

#: The Python types that stand for values.
KIND_OF: dict[type, Kind] = {
    int: Kind.NUMBER,
    Decimal: Kind.NUMBER,
    str: Kind.STRING,
    bool: Kind.BOOL,
    list: Kind.LIST,
    dict: Kind.MAP,
    type(None): Kind.NULL,
    dt.datetime: Kind.TIMESTAMP,
    dt.timedelta: Kind.DURATION,
}


def describe(value: object) -> str:
    """Return the kind of a value in one word, for messages."""
    return KIND_OF[type(value)].title
