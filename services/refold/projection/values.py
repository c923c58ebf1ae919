"""From an expression's value to a column's: what each column type takes, and in which bounds.

A value beyond them would be refused by the read store together with its whole batch; refused here it is one bad event.
null is NULL in every column. Every function raises EvaluationError.
"""

import datetime as dt
import functools
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import NamedTuple, NoReturn, cast

import msgspec

from refold.projection.cel.errors import EvaluationError
from refold.projection.cel.kinds import Kind
from refold.projection.cel.runtime import BOUND, EXACT, show, to_string, to_timestamp, whole

#: A column's value: text, integer, numeric, boolean, timestamp (aware), json (its text), NULL.
Value = str | int | Decimal | bool | dt.datetime | None

_INTEGER_MIN, _INTEGER_MAX = -(2**63), 2**63 - 1
#: The longest key of a row, in bytes of UTF-8, and the most rows that one event may key.
MAX_KEY_BYTES = 512
MAX_KEYS = 1_000
#: The longest array that `append` makes, in items, and the longest item, in bytes of JSON.
MAX_ARRAY = 1_000
MAX_ITEM_BYTES = 4_096
# A backslash that is itself escaped comes in pairs, so an odd one begins the escape.
_NUL_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def to_text(value: object) -> str | None:
    """Return the value of a text column."""
    if type(value) is str:
        if "\0" in value:
            raise EvaluationError("a text can't hold the character NUL (\\0)")
        return value
    if value is None:
        return None
    raise EvaluationError(f"a text column takes a string, not {show(value)}: use string()")


def to_integer(value: object) -> int | None:
    """Return the value of an integer column: whole, of 64 bits."""
    if value is None:
        return None
    if type(value) is int or type(value) is Decimal:
        number = whole(value)
        if _INTEGER_MIN <= number <= _INTEGER_MAX:
            return number
        raise EvaluationError(f"{show(value)} is beyond an integer column's 64 bits: use a numeric column")
    raise EvaluationError(f"an integer column takes a number, not {show(value)}")


def to_numeric(value: object) -> int | Decimal | None:
    """Return the value of a numeric column: below 10^100, at most 199 digits after the point and 200 in all."""
    if value is None:
        return None
    if type(value) is int and -BOUND < value < BOUND:
        return value
    if type(value) is int or type(value) is Decimal:
        try:
            return EXACT.add(value, 0)
        except ArithmeticError:
            raise EvaluationError(f"{show(value)} has more digits than a numeric column keeps") from None
    raise EvaluationError(f"a numeric column takes a number, not {show(value)}")


def to_boolean(value: object) -> bool | None:
    """Return the value of a boolean column."""
    if value is None or type(value) is bool:
        return value
    raise EvaluationError(f"a boolean column takes true or false, not {show(value)}")


def to_moment(value: object) -> dt.datetime | None:
    """Return the value of a timestamp column: of a timestamp or a text in RFC 3339, cut to microseconds."""
    if value is None:
        return None
    if type(value) is dt.datetime or type(value) is str:
        return to_timestamp(value)
    raise EvaluationError(f"a timestamp column takes a timestamp or its text, not {show(value)}")


def to_json(value: object) -> str | None:
    """Return the value of a json column as JSON text; timestamps and durations are written as string() writes them."""
    if value is None:
        return None
    try:
        text = _encoder.encode(_plain(value)).decode()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise EvaluationError(f"the value can't be written as JSON: {error}") from error
    if "\\u0000" in text and _NUL_ESCAPE.search(text):
        raise EvaluationError("a json column can't hold the character NUL (\\0)")
    return text


def to_addend(value: object) -> int | Decimal:
    """Return what a numeric column is added."""
    number = to_numeric(value)
    if number is None:
        raise EvaluationError("null can't be added: guard it, like has(data.x) ? data.x : 0")
    return number


def to_integer_addend(value: object) -> int:
    """Return what an integer column is added."""
    number = to_integer(value)
    if number is None:
        raise EvaluationError("null can't be added: guard it, like has(data.x) ? data.x : 0")
    return number


def to_text_bound(value: object) -> str:
    """Return what a text column is compared with, by code points."""
    text = to_text(value)
    return _no_order() if text is None else text


def to_integer_bound(value: object) -> int:
    """Return what an integer column is compared with."""
    number = to_integer(value)
    return _no_order() if number is None else number


def to_numeric_bound(value: object) -> int | Decimal:
    """Return what a numeric column is compared with, in one form: of 2 and 2.0 it doesn't matter which came first."""
    number = to_numeric(value)
    if type(number) is Decimal:
        return number.normalize(EXACT)
    return _no_order() if number is None else number


def to_moment_bound(value: object) -> dt.datetime:
    """Return what a timestamp column is compared with."""
    moment = to_moment(value)
    return _no_order() if moment is None else moment


def to_item(value: object) -> str:
    """Return what is appended to an array, as JSON text of at most 4,096 bytes; null is an item like any other."""
    text = to_json(value)
    if text is None:
        return "null"
    if len(text) > MAX_ITEM_BYTES or len(text.encode()) > MAX_ITEM_BYTES:
        raise EvaluationError(f"what is appended has at most {MAX_ITEM_BYTES} bytes of JSON, not {len(text.encode())}")
    return text


def appended(array: str | None, item: str) -> str:
    """Return the JSON text of an array (null counts as an empty one) with one item more, of at most 1,000."""
    if array is None:
        return f"[{item}]"
    try:
        items = _decode_items(array)
    except msgspec.MsgspecError:
        raise EvaluationError("the column holds something else than an array, to which nothing is appended") from None
    if len(items) >= MAX_ARRAY:
        raise EvaluationError(f"the array holds {len(items)} items, and at most {MAX_ARRAY} are kept")
    return f"{array[:-1]},{item}]" if items else f"[{item}]"


def integer_total(one: int | None, other: int) -> int:
    """Return the sum of two values of an integer column; null counts as 0."""
    return cast("int", to_integer((one or 0) + other))


@functools.cache
def not_null(convert: Callable[[object], Value]) -> Callable[[object], Value]:
    """Return a function like `convert` for a column that can't be null."""

    def required(value: object) -> Value:
        found = convert(value)
        if found is None:
            raise EvaluationError("the column takes no null (nullable: false): guard it, like has(data.x) ? data.x : 0")
        return found

    required.__name__ = f"{convert.__name__}_not_null"
    return required


def _no_order() -> NoReturn:
    raise EvaluationError("null is neither less nor greater: guard it, like when: has(data.x)")


def to_key(value: object) -> str:
    """Return a row's key: 1 to 512 bytes of UTF-8 without NUL."""
    if type(value) is not str:
        raise EvaluationError(f"a key is a string, not {show(value)}: use string()")
    if not value:
        raise EvaluationError("a key can't be empty")
    if len(value) > MAX_KEY_BYTES or len(value.encode()) > MAX_KEY_BYTES:
        raise EvaluationError(f"a key has at most {MAX_KEY_BYTES} bytes, this one has {len(value.encode())}")
    if "\0" in value:
        raise EvaluationError("a key can't hold the character NUL (\\0)")
    return value


def to_keys(value: object) -> list[str]:
    """Return the keys of the rows that an event goes to, each once: of one key or a list of keys."""
    if type(value) is not list:
        return [to_key(value)]
    if len(value) > MAX_KEYS:
        raise EvaluationError(f"one event keys at most {MAX_KEYS} rows, not {len(value)}")
    return list(dict.fromkeys(to_key(item) for item in value))


def _plain(value: object) -> object:
    """Return `value` with timestamps and durations as text: msgspec would write them in forms of its own."""
    if type(value) is list:
        return [_plain(item) for item in value]
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return to_string(value) if type(value) is dt.datetime or type(value) is dt.timedelta else value


_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_encoder = msgspec.json.Encoder(decimal_format="number")


class Conversion(NamedTuple):
    """What a column type takes: the kinds of an expression that it is set to, and by operation the functions."""

    kinds: Kind
    functions: Mapping[str, Callable[[object], Value]]


#: By column type.
CONVERSIONS = {
    "text": Conversion(Kind.STRING | Kind.NULL, {"set": to_text, "min": to_text_bound, "max": to_text_bound}),
    "integer": Conversion(
        Kind.NUMBER | Kind.NULL,
        {"set": to_integer, "add": to_integer_addend, "min": to_integer_bound, "max": to_integer_bound},
    ),
    "numeric": Conversion(
        Kind.NUMBER | Kind.NULL,
        {"set": to_numeric, "add": to_addend, "min": to_numeric_bound, "max": to_numeric_bound},
    ),
    "boolean": Conversion(Kind.BOOL | Kind.NULL, {"set": to_boolean}),
    "timestamp": Conversion(
        Kind.TIMESTAMP | Kind.STRING | Kind.NULL, {"set": to_moment, "min": to_moment_bound, "max": to_moment_bound}
    ),
    "json": Conversion(Kind.ANY, {"set": to_json, "append": to_item}),
}
