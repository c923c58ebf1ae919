"""PostgreSQL arrays in the binary format, as parameters and in results.

psycopg's own conversion of lists runs in Python for each element and took most of an append's time. Here the elements
are encoded once, when an append is checked, and an array costs one join. All arrays have one dimension.
"""

import struct
from collections.abc import Sequence

_HEADER = struct.Struct("!iiIii")  # dimensions, whether there are nulls, the elements' oid, length, lower bound
_LENGTH = struct.Struct("!i")
_BOOL, _INT8, _INT4, _TEXT, _JSONB = 16, 20, 23, 25, 3802
_JSONB_VERSION = b"\x01"
_TRUE = _LENGTH.pack(1) + b"\x01"
_FALSE = _LENGTH.pack(1) + b"\x00"
NULL = _LENGTH.pack(-1)


def text(value: bytes) -> bytes:
    """Return the element of a text[] that holds `value` (UTF-8)."""
    return _LENGTH.pack(len(value)) + value


def jsonb(value: bytes) -> bytes:
    """Return the element of a jsonb[] that holds the JSON text `value`."""
    return _LENGTH.pack(len(value) + 1) + _JSONB_VERSION + value


def value(element: bytes) -> bytes | None:
    """Return the element as a parameter of its own, in the binary format too; None for NULL."""
    return None if element == NULL else element[_LENGTH.size :]


def text_value(element: bytes) -> bytes:
    """Return what `text` made the element of."""
    return element[_LENGTH.size :]


def jsonb_value(element: bytes) -> bytes:
    """Return what `jsonb` made the element of."""
    return element[_LENGTH.size + len(_JSONB_VERSION) :]


def text_array(elements: Sequence[bytes]) -> bytes:
    """Return the text[] of `elements`, each made by `text`."""
    return _HEADER.pack(1, 0, _TEXT, len(elements), 1) + b"".join(elements)


def jsonb_array(elements: Sequence[bytes]) -> bytes:
    """Return the jsonb[] of `elements`, each made by `jsonb` or NULL."""
    return _HEADER.pack(1, 1, _JSONB, len(elements), 1) + b"".join(elements)


def bool_array(values: Sequence[bool]) -> bytes:
    """Return the boolean[] of `values`."""
    return _HEADER.pack(1, 0, _BOOL, len(values), 1) + b"".join([_TRUE if value else _FALSE for value in values])


def int4_array(values: Sequence[int]) -> bytes:
    """Return the integer[] of `values`."""
    pairs = [part for value in values for part in (4, value)]
    return _HEADER.pack(1, 0, _INT4, len(values), 1) + struct.pack(f"!{len(pairs)}i", *pairs)


def int8_array(values: Sequence[int]) -> bytes:
    """Return the bigint[] of `values`."""
    pairs = [part for value in values for part in (8, value)]
    return _HEADER.pack(1, 0, _INT8, len(values), 1) + struct.pack("!" + "iq" * len(values), *pairs)


def int8_values(array: bytes) -> tuple[int, ...]:
    """Return the values of a bigint[] that holds no nulls."""
    count = (len(array) - _HEADER.size) // 12
    return struct.unpack_from("!" + "xxxxq" * count, array, _HEADER.size)
