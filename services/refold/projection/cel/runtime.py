"""What compiled expressions call: operators and functions over values, exact and bounded.

Values are int and Decimal (one exact number), str, bool, list, dict with str keys, None, aware datetime, timedelta.
Every helper takes the place in the source as last argument `at`, for its error; fast code leaves it out (a failed fast
evaluation is repeated with places, see `compiler`). Python's own `+`, `*` and `==` would let through what CEL refuses
("ab" * 3, True == 1) and round decimals to 28 digits, hence the helpers.
"""

import datetime as dt
import re
from collections.abc import Callable, Iterable
from decimal import (
    ROUND_HALF_EVEN,
    Context,
    Decimal,
    DecimalException,
    DivisionByZero,
    Inexact,
    InvalidOperation,
    Overflow,
)
from functools import partial, reduce
from typing import NoReturn

import msgspec

from refold.projection.cel.errors import EvaluationError
from refold.projection.cel.kinds import describe

At = tuple[int, int] | None
Number = int | Decimal

#: Numbers stay below 10^100, with at most 199 digits after the point and 200 in all; what needs more is an error.
EXACT = Context(
    prec=200, Emax=99, Emin=0, rounding=ROUND_HALF_EVEN, traps=[Inexact, InvalidOperation, DivisionByZero, Overflow]
)
#: Division is the one operation that rounds: to 34 significant digits, half to even (IEEE 754 decimal128).
QUOTIENT = Context(
    prec=34, Emax=99, Emin=-99, rounding=ROUND_HALF_EVEN, traps=[InvalidOperation, DivisionByZero, Overflow]
)
BOUND = 10**100
#: The longest string and the longest list that `+` may make.
MAX_TEXT = 1_048_576
MAX_ITEMS = 100_000
#: The longest list or map that a macro runs over.
MAX_RANGE = 1_000

_decode = msgspec.json.Decoder(float_hook=Decimal).decode
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_TIMESTAMP = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(\.\d{1,9})?([Zz]|[+-]\d{2}:[0-5]\d)", re.ASCII)
_DURATION = re.compile(r"([+-]?)((?:\d{1,15}(?:\.\d{1,9})?(?:h|ms|us|µs|ns|m|s))+|0)", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(h|ms|us|µs|ns|m|s)", re.ASCII)
_MICROSECONDS = {
    "h": Decimal(3_600_000_000),
    "m": Decimal(60_000_000),
    "s": Decimal(1_000_000),
    "ms": Decimal(1_000),
    "us": Decimal(1),
    "µs": Decimal(1),
    "ns": Decimal("0.001"),
}
_WHOLE = re.compile(r"[+-]?\d{1,100}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?\d{1,100}(\.\d{1,199})?([eE][+-]?\d{1,3})?", re.ASCII)
_TRUE = frozenset(("true", "True", "TRUE", "t", "1"))
_FALSE = frozenset(("false", "False", "FALSE", "f", "0"))


def _refuse(what: str, at: At, *values: object) -> NoReturn:
    kinds = " and ".join(describe(value) for value in values)
    raise EvaluationError(f"{what} is not defined for {kinds}", at)


def _too_large(at: At) -> NoReturn:
    raise EvaluationError("the number needs more digits than are kept (100 before the point, 200 in all)", at)


def _is_number(value: object) -> bool:
    kind = type(value)
    return kind is int or kind is Decimal


# Operators

_ADDABLE = ({dt.timedelta}, {dt.timedelta, dt.datetime})
_SUBTRACTABLE = {dt.datetime: (dt.datetime, dt.timedelta), dt.timedelta: (dt.timedelta,)}


def add(a: object, b: object, at: At = None) -> object:
    """Return `a + b`: numbers, strings, lists, timestamp or duration plus duration."""
    kind, other = type(a), type(b)
    if kind is int and other is int:
        total = a + b  # type: ignore[operator]
        return total if -BOUND < total < BOUND else _too_large(at)
    if _is_number(a) and _is_number(b):
        return _exact(EXACT.add, a, b, at)
    if kind is str and other is str:
        if len(a) + len(b) > MAX_TEXT:  # type: ignore[arg-type]
            raise EvaluationError(f"a string may have at most {MAX_TEXT} characters", at)
        return a + b  # type: ignore[operator]
    if kind is list and other is list:
        if len(a) + len(b) > MAX_ITEMS:  # type: ignore[arg-type]
            raise EvaluationError(f"a list may have at most {MAX_ITEMS} items", at)
        return a + b  # type: ignore[operator]
    if {kind, other} in _ADDABLE:
        try:
            return a + b  # type: ignore[operator]
        except OverflowError:
            raise EvaluationError("the time is out of range (years 1 to 9999)", at) from None
    _refuse("+", at, a, b)


def subtract(a: object, b: object, at: At = None) -> object:
    """Return `a - b`: numbers, timestamps (a duration), durations, timestamp minus duration."""
    kind, other = type(a), type(b)
    if kind is int and other is int:
        total = a - b  # type: ignore[operator]
        return total if -BOUND < total < BOUND else _too_large(at)
    if _is_number(a) and _is_number(b):
        return _exact(EXACT.subtract, a, b, at)
    if other in _SUBTRACTABLE.get(kind, ()):
        try:
            return a - b  # type: ignore[operator]
        except OverflowError:
            raise EvaluationError("the time is out of range (years 1 to 9999)", at) from None
    _refuse("-", at, a, b)


def multiply(a: object, b: object, at: At = None) -> Number:
    """Return `a * b` of two numbers, exactly."""
    if type(a) is int and type(b) is int:
        product = a * b
        return product if -BOUND < product < BOUND else _too_large(at)
    if _is_number(a) and _is_number(b):
        return _exact(EXACT.multiply, a, b, at)
    _refuse("*", at, a, b)


def divide(a: object, b: object, at: At = None) -> Number:
    """Return `a / b` of two numbers: exact where it has at most 34 significant digits, else rounded to them."""
    if not (_is_number(a) and _is_number(b)):
        _refuse("/", at, a, b)
    if not b:
        raise EvaluationError("division by zero", at)
    return _exact(QUOTIENT.divide, a, b, at)


def remainder(a: object, b: object, at: At = None) -> int:
    """Return `a % b` of two whole numbers, with the sign of `a`."""
    if not (_is_number(a) and _is_number(b)):
        _refuse("%", at, a, b)
    left, right = whole(a, at), whole(b, at)
    if right == 0:
        raise EvaluationError("remainder of a division by zero", at)
    rest = abs(left) % abs(right)
    return rest if left >= 0 else -rest


def negate(a: object, at: At = None) -> Number:
    """Return `-a` of a number."""
    if type(a) is int:
        return -a
    if type(a) is Decimal:
        return a.copy_negate()
    _refuse("-", at, a)


def negation(a: object, at: At = None) -> bool:
    """Return `!a` of a bool."""
    return not boolean(a, at)


def _exact(operation: Callable[[Decimal, Decimal], Decimal], a: object, b: object, at: At) -> Decimal:
    try:
        return operation(a, b)  # type: ignore[arg-type]
    except DecimalException:
        _too_large(at)


def whole(value: object, at: At = None) -> int:
    """Return a number without fraction as int."""
    if type(value) is int:
        return value
    if type(value) is Decimal and value.adjusted() < 200 and value == value.to_integral_value():
        return int(value)
    raise EvaluationError(f"{show(value)} is not a whole number", at)


def equal(a: object, b: object) -> bool:
    """Return `a == b`: values of different kinds are unequal, numbers are equal by value, lists and maps by content."""
    kind, other = type(a), type(b)
    if kind is list:
        return other is list and len(a) == len(b) and all(map(equal, a, b))  # type: ignore[arg-type,call-overload]
    if kind is dict:
        if other is not dict or len(a) != len(b):  # type: ignore[arg-type]
            return False
        return all(key in b and equal(value, b[key]) for key, value in a.items())  # type: ignore
    if kind is bool or other is bool:
        return a is b
    return a == b


def unequal(a: object, b: object) -> bool:
    """Return `a != b`."""
    return not equal(a, b)


_ORDERED = (str, bool, dt.datetime, dt.timedelta)


def _comparable(a: object, b: object, operator: str, at: At) -> None:
    if type(a) is type(b) and type(a) in _ORDERED:
        return
    if not (_is_number(a) and _is_number(b)):
        _refuse(operator, at, a, b)


def less(a: object, b: object, at: At = None) -> bool:
    """Return `a < b` of two numbers, strings, bools, timestamps or durations."""
    if not (type(a) is int and type(b) is int):
        _comparable(a, b, "<", at)
    return a < b  # type: ignore[operator,no-any-return]


def less_or_equal(a: object, b: object, at: At = None) -> bool:
    """Return `a <= b`, as `less`."""
    if not (type(a) is int and type(b) is int):
        _comparable(a, b, "<=", at)
    return a <= b  # type: ignore[operator,no-any-return]


def greater(a: object, b: object, at: At = None) -> bool:
    """Return `a > b`, as `less`."""
    if not (type(a) is int and type(b) is int):
        _comparable(a, b, ">", at)
    return a > b  # type: ignore[operator,no-any-return]


def greater_or_equal(a: object, b: object, at: At = None) -> bool:
    """Return `a >= b`, as `less`."""
    if not (type(a) is int and type(b) is int):
        _comparable(a, b, ">=", at)
    return a >= b  # type: ignore[operator,no-any-return]


def contained(a: object, b: object, at: At = None) -> bool:
    """Return `a in b`: an item of a list or a key of a map."""
    if type(b) is list:
        return any(equal(a, item) for item in b)
    if type(b) is dict:
        return type(a) is str and a in b
    raise EvaluationError(f"'in' needs a list or a map on its right, not {describe(b)}", at)


def boolean(value: object, at: At = None) -> bool:
    """Return `value` where it is a bool."""
    if value is True or value is False:
        return value
    raise EvaluationError(f"expected true or false, not {describe(value)}", at)


# Access


def select(operand: object, field: str, text: str, at: At) -> object:
    """Return `operand.field`; `text` is the operand's source."""
    if type(operand) is not dict:
        raise EvaluationError(f"{text} is {describe(operand)}, so it has no field {field!r}", at)
    if field not in operand:
        raise EvaluationError(f"{text} has no field {field!r}", at)
    return operand[field]


def has(operand: object, field: str, at: At = None) -> bool:
    """Return `has(operand.field)`."""
    if type(operand) is not dict:
        raise EvaluationError(f"has() needs a map, not {describe(operand)}", at)
    return field in operand


def index(operand: object, key: object, at: At = None) -> object:
    """Return `operand[key]`: an item of a list (0-based) or a value of a map."""
    if type(operand) is dict:
        if type(key) is not str:
            raise EvaluationError(f"a map's key is a string, not {describe(key)}", at)
        if key not in operand:
            raise EvaluationError(f"the map has no key {key!r}", at)
        return operand[key]
    if type(operand) is list:
        if not _is_number(key):
            raise EvaluationError(f"a list's index is a number, not {describe(key)}", at)
        number = whole(key, at)
        if not 0 <= number < len(operand):
            raise EvaluationError(f"the index {number} is beyond the list's {len(operand)} items", at)
        return operand[number]
    raise EvaluationError(f"[] needs a list or a map, not {describe(operand)}", at)


def string_key(value: object, at: At = None) -> str:
    """Return the key of a map literal."""
    if type(value) is str:
        return value
    raise EvaluationError(f"a map's key is a string, not {describe(value)}", at)


def parsed(text: str | None) -> object:
    """Return the value of a JSON text, of None null; maps in the order of their keys, whoever wrote the text."""
    return None if text is None else _ordered(_decode(text))


def _ordered(value: object) -> object:
    if type(value) is list:
        return [_ordered(item) for item in value]
    if type(value) is dict:
        return {key: _ordered(value[key]) for key in sorted(value)}
    return value


# Logic and macros. Those named `absorbing_` follow CEL's rule that a decided result absorbs the other operands' errors;
# compiled code uses them only when its fast form, which is Python's own `and` and `or`, has failed.


def absorbing_and(at: At, *operands: Callable[[], object]) -> bool:
    """Return `a && b && …`: false where any is false, else the first error, else true."""
    return _absorbing(operands, decisive=False, at=at)


def absorbing_or(at: At, *operands: Callable[[], object]) -> bool:
    """Return `a || b || …`: true where any is true, else the first error, else false."""
    return _absorbing(operands, decisive=True, at=at)


def _absorbing(operands: Iterable[Callable[[], object]], *, decisive: bool, at: At) -> bool:
    error: EvaluationError | None = None
    for operand in operands:
        try:
            if boolean(operand(), at) is decisive:
                return decisive
        except EvaluationError as failure:
            error = error or failure
    if error is not None:
        raise error
    return not decisive


def items_of(value: object, at: At = None) -> list[object]:
    """Return what a macro runs over: a list's items or a map's keys."""
    if type(value) is not list and type(value) is not dict:
        raise EvaluationError(f"a macro runs over a list or a map, not {describe(value)}", at)
    if len(value) > MAX_RANGE:
        raise EvaluationError(f"a macro runs over at most {MAX_RANGE} items, here are {len(value)}", at)
    return list(value)


def absorbing_all(items: object, step: Callable[[object], object], at: At) -> bool:
    """Return `items.all(x, step)`."""
    return _absorbing([partial(step, item) for item in items_of(items, at)], decisive=False, at=at)


def absorbing_exists(items: object, step: Callable[[object], object], at: At) -> bool:
    """Return `items.exists(x, step)`."""
    return _absorbing([partial(step, item) for item in items_of(items, at)], decisive=True, at=at)


def macro_all(items: object, step: Callable[[object], object], at: At = None) -> bool:
    """Return `items.all(x, step)`, with an error where one comes before the decision."""
    return all(boolean(step(item), at) for item in items_of(items, at))


def macro_exists(items: object, step: Callable[[object], object], at: At = None) -> bool:
    """Return `items.exists(x, step)`, with an error where one comes before the decision."""
    return any(boolean(step(item), at) for item in items_of(items, at))


def macro_exists_one(items: object, step: Callable[[object], object], at: At = None) -> bool:
    """Return `items.exists_one(x, step)`."""
    return sum([boolean(step(item), at) for item in items_of(items, at)]) == 1


def macro_filter(items: object, step: Callable[[object], object], at: At = None) -> list[object]:
    """Return `items.filter(x, step)`: the items for which step is true."""
    return [item for item in items_of(items, at) if boolean(step(item), at)]


def macro_map(items: object, step: Callable[[object], object], at: At = None) -> list[object]:
    """Return `items.map(x, step)`."""
    return [step(item) for item in items_of(items, at)]


def macro_map_where(
    items: object, where: Callable[[object], object], step: Callable[[object], object], at: At = None
) -> list[object]:
    """Return `items.map(x, where, step)`."""
    return [step(item) for item in items_of(items, at) if boolean(where(item), at)]


# Functions


def size(value: object, at: At = None) -> int:
    """Return the characters of a string, the items of a list, the entries of a map."""
    if type(value) is str or type(value) is list or type(value) is dict:
        return len(value)
    _refuse("size()", at, value)


def contains(text: object, part: object, at: At = None) -> bool:
    """Return whether `part` stands in `text`."""
    return _string(part, "contains", at) in _string(text, "contains", at)


def starts_with(text: object, part: object, at: At = None) -> bool:
    """Return whether `text` begins with `part`."""
    return _string(text, "startsWith", at).startswith(_string(part, "startsWith", at))


def ends_with(text: object, part: object, at: At = None) -> bool:
    """Return whether `text` ends with `part`."""
    return _string(text, "endsWith", at).endswith(_string(part, "endsWith", at))


def _string(value: object, function: str, at: At) -> str:
    if type(value) is str:
        return value
    raise EvaluationError(f"{function}() needs a string, not {describe(value)}", at)


def to_int(value: object, at: At = None) -> int:
    """Return `int(value)`: a number cut towards zero, the number in a string, a timestamp's seconds since 1970."""
    if type(value) is int:
        return value
    if type(value) is Decimal:
        return int(value) if value.adjusted() < 100 else _too_large(at)
    if type(value) is str and _WHOLE.fullmatch(value):
        return int(value)
    if type(value) is dt.datetime:
        return (value - _EPOCH) // dt.timedelta(seconds=1)
    raise EvaluationError(f"int() of {show(value)} is not defined", at)


def to_double(value: object, at: At = None) -> Number:
    """Return `double(value)`: a number as it is, or the number in a string, exactly."""
    if type(value) is int or type(value) is Decimal:
        return value
    if type(value) is str and _DECIMAL.fullmatch(value):
        return _exact(EXACT.add, Decimal(value), 0, at)
    raise EvaluationError(f"double() of {show(value)} is not defined", at)


def to_bool(value: object, at: At = None) -> bool:
    """Return `bool(value)` of a bool or of a string such as "true"."""
    if type(value) is bool:
        return value
    if type(value) is str:
        if value in _TRUE:
            return True
        if value in _FALSE:
            return False
    raise EvaluationError(f"bool() of {show(value)} is not defined", at)


def to_string(value: object, at: At = None) -> str:
    """Return `string(value)`; equal numbers give the same text: no exponent, no zeros at the end of a fraction."""
    if type(value) is str:
        return value
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is int:
        return str(value)
    if type(value) is Decimal:
        if not value:
            return "0"
        text = format(_exact(EXACT.add, value, 0, at), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    if type(value) is dt.datetime:
        moment = value.astimezone(dt.UTC)
        fraction = f".{moment.microsecond:06d}".rstrip("0") if moment.microsecond else ""
        return f"{moment.replace(microsecond=0, tzinfo=None).isoformat()}{fraction}Z"
    if type(value) is dt.timedelta:
        return f"{to_string(EXACT.divide(Decimal(value // dt.timedelta(microseconds=1)), 1_000_000))}s"
    raise EvaluationError(f"string() of {show(value)} is not defined", at)


def to_timestamp(value: object, at: At = None) -> dt.datetime:
    """Return `timestamp(value)`: of an RFC 3339 text (cut to microseconds) or of seconds since 1970."""
    seconds = whole(value, at) if _is_number(value) else None
    try:
        if type(value) is dt.datetime:
            return value
        if seconds is not None:
            return _EPOCH + dt.timedelta(seconds=seconds)
        if type(value) is str and _TIMESTAMP.fullmatch(value):
            return dt.datetime.fromisoformat(value.upper()).astimezone(dt.UTC)
    except OverflowError:
        raise EvaluationError(f"{show(value)} is not a time in the years 1 to 9999", at) from None
    except ValueError as error:
        raise EvaluationError(f"{show(value)} is not a time: {error}", at) from error
    raise EvaluationError(f"{show(value)} is not a time like 2026-01-31T23:59:59Z (RFC 3339)", at)


def to_duration(value: object, at: At = None) -> dt.timedelta:
    """Return `duration(value)`: of a text such as "1h30m" or "0.5s"; parts of a microsecond are cut."""
    if type(value) is dt.timedelta:
        return value
    if type(value) is str and (match := _DURATION.fullmatch(value)):
        parts = [EXACT.multiply(Decimal(n), _MICROSECONDS[unit]) for n, unit in _DURATION_PART.findall(match[2])]
        microseconds = int(reduce(EXACT.add, parts, Decimal(0)))
        try:
            return dt.timedelta(microseconds=-microseconds if match[1] == "-" else microseconds)
        except OverflowError:
            raise EvaluationError(f"the duration {show(value)} is out of range", at) from None
    raise EvaluationError(f'{show(value)} is not a duration like "1h30m" or "0.5s"', at)


def time_part(name: str) -> Callable[..., int]:
    """Return the method `name` of timestamps (in UTC) and, where they have it, of durations (the whole of it)."""
    of_timestamp = _TIMESTAMP_PARTS[name]
    unit = _DURATION_UNITS.get(name)

    def part(value: object, at: At = None) -> int:
        if type(value) is dt.datetime:
            return of_timestamp(value.astimezone(dt.UTC))
        if type(value) is dt.timedelta and unit is not None:
            # Cut towards zero, as CEL does, where Python's // goes down.
            return value // unit if value >= dt.timedelta() else -(-value // unit)
        _refuse(f"{name}()", at, value)

    return part


_TIMESTAMP_PARTS: dict[str, Callable[[dt.datetime], int]] = {
    "getFullYear": lambda moment: moment.year,
    "getMonth": lambda moment: moment.month - 1,
    "getDate": lambda moment: moment.day,
    "getDayOfMonth": lambda moment: moment.day - 1,
    "getDayOfWeek": lambda moment: moment.isoweekday() % 7,
    "getDayOfYear": lambda moment: moment.timetuple().tm_yday - 1,
    "getHours": lambda moment: moment.hour,
    "getMinutes": lambda moment: moment.minute,
    "getSeconds": lambda moment: moment.second,
    "getMilliseconds": lambda moment: moment.microsecond // 1000,
}
_DURATION_UNITS = {
    "getHours": dt.timedelta(hours=1),
    "getMinutes": dt.timedelta(minutes=1),
    "getSeconds": dt.timedelta(seconds=1),
}


get_full_year = time_part("getFullYear")
get_month = time_part("getMonth")
get_date = time_part("getDate")
get_day_of_month = time_part("getDayOfMonth")
get_day_of_week = time_part("getDayOfWeek")
get_day_of_year = time_part("getDayOfYear")
get_hours = time_part("getHours")
get_minutes = time_part("getMinutes")
get_seconds = time_part("getSeconds")
get_milliseconds = time_part("getMilliseconds")


def show(value: object) -> str:
    """Return a value, cut, with its kind, for messages."""
    if type(value) is list or type(value) is dict or value is None:
        return describe(value)
    text = repr(value) if type(value) is str else str(value)
    return f"{describe(value)} {text if len(text) <= 60 else text[:60] + '…'}"
