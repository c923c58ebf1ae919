"""PostgreSQL arrays as parameters in the binary format, built from pieces that were encoded beforehand.

psycopg's own conversion of lists runs in Python for each element and took most of an append's time; here an array costs
one join. Each class is the finished array of one type; `register` teaches a connection to send them as they are.
"""

import struct
from collections.abc import Sequence
from typing import Any

from psycopg import AsyncConnection
from psycopg.adapt import Dumper
from psycopg.pq import Format

_HEADER = struct.Struct("!iiIii")  # dimensions, whether there are nulls, the elements' oid, length, lower bound
_LENGTH = struct.Struct("!i")
_JSONB_VERSION = b"\x01"
NULL = _LENGTH.pack(-1)
_TRUE = _LENGTH.pack(1) + b"\x01"
_FALSE = _LENGTH.pack(1) + b"\x00"


class TextArray(bytes):
    """A text[]."""


class Int4Array(bytes):
    """An integer[]."""


class Int8Array(bytes):
    """A bigint[]."""


class BoolArray(bytes):
    """A boolean[]."""


class JsonbArray(bytes):
    """A jsonb[]."""


def text(value: bytes) -> bytes:
    """Return the element of a text[] that holds `value` (UTF-8)."""
    return _LENGTH.pack(len(value)) + value


def jsonb(value: bytes) -> bytes:
    """Return the element of a jsonb[] that holds the JSON text `value`."""
    return _LENGTH.pack(len(value) + 1) + _JSONB_VERSION + value


def text_array(elements: Sequence[bytes]) -> TextArray:
    """Return the array of `elements`, each made by `text`."""
    return TextArray(_HEADER.pack(1, 0, 25, len(elements), 1) + b"".join(elements))


def jsonb_array(elements: Sequence[bytes]) -> JsonbArray:
    """Return the array of `elements`, each made by `jsonb` or NULL."""
    return JsonbArray(_HEADER.pack(1, 1, 3802, len(elements), 1) + b"".join(elements))


def bool_array(values: Sequence[bool]) -> BoolArray:
    """Return the array of `values`."""
    return BoolArray(
        _HEADER.pack(1, 0, 16, len(values), 1) + b"".join([_TRUE if value else _FALSE for value in values])
    )


def int4_array(values: Sequence[int]) -> Int4Array:
    """Return the array of `values`."""
    pairs = [part for value in values for part in (4, value)]
    return Int4Array(_HEADER.pack(1, 0, 23, len(values), 1) + struct.pack(f"!{len(pairs)}i", *pairs))


def int8_array(values: Sequence[int]) -> Int8Array:
    """Return the array of `values`."""
    pairs = [part for value in values for part in (8, value)]
    return Int8Array(_HEADER.pack(1, 0, 20, len(values), 1) + struct.pack("!" + "iq" * len(values), *pairs))


class _AsIs(Dumper):
    format = Format.BINARY

    def dump(self, obj: Any) -> bytes:
        return bytes(obj)


class _TextArrayDumper(_AsIs):
    oid = 1009


class _Int4ArrayDumper(_AsIs):
    oid = 1007


class _Int8ArrayDumper(_AsIs):
    oid = 1016


class _BoolArrayDumper(_AsIs):
    oid = 1000


class _JsonbArrayDumper(_AsIs):
    oid = 3807


def register(conn: AsyncConnection[Any]) -> None:
    """Let `conn` send the arrays of this module."""
    conn.adapters.register_dumper(TextArray, _TextArrayDumper)
    conn.adapters.register_dumper(Int4Array, _Int4ArrayDumper)
    conn.adapters.register_dumper(Int8Array, _Int8ArrayDumper)
    conn.adapters.register_dumper(BoolArray, _BoolArrayDumper)
    conn.adapters.register_dumper(JsonbArray, _JsonbArrayDumper)
