"""CEL as docs/expressions.md documents it, example by example."""

import datetime as dt
import re
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from refold.events import Event
from refold.projection import cel

TIME = dt.datetime(2026, 1, 31, 23, 59, 58, 250_000, tzinfo=dt.UTC)
DATA = {
    "qty": 3,
    "price": Decimal("2.50"),
    "name": "Ada",
    "empty": "",
    "nothing": None,
    "yes": True,
    "no": False,
    "items": [1, 2, 3],
    "mixed": [1, "1", True, None],
    "nested": {"deep": {"value": 7}, "a-b": 1},
    "package": "reserved words are fine as fields",
    "far": Decimal("1E+400"),
    "big": 10**60,
}
EVENT = Event(0, 12, "order-1", 4, "id-1", "OrderPlaced", TIME, msgspec.Raw(b"{}"))


def evaluate(source: str, data: object = DATA, metadata: object = None) -> object:
    return cel.function(source)(EVENT, data, {} if metadata is None else metadata)


def same(found: object, wanted: object) -> bool:
    """Equal as JSON is: 1 and True differ, 1 and Decimal(1) don't."""
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    return found == wanted and isinstance(found, str) == isinstance(wanted, str)


VALUES = [
    # literals
    ("1", 1),
    ("0x1F", 31),
    ("1.50", Decimal("1.5")),
    (".5", Decimal("0.5")),
    ("1e3", 1000),
    ("-5", -5),
    ("--5", 5),
    ("true", True),
    ("null", None),
    ("'single'", "single"),
    ('"double"', "double"),
    (r"'\n\t\\\'\"\x41\u00e9\U0001F600\101'", "\n\t\\'\"Aé😀A"),
    (r"r'raw\n'", "raw\\n"),
    ("'''three 'quotes'\nand lines'''", "three 'quotes'\nand lines"),
    ("[1, 'a', [true],]", [1, "a", [True]]),
    ("{'a': 1, 'b': {'c': null}}", {"a": 1, "b": {"c": None}}),
    ("1 // a comment\n + 2", 3),
    # the event
    ("subject", "order-1"),
    ("event.subject", "order-1"),
    ("event.revision", 4),
    ("event.type", "OrderPlaced"),
    ("event.time", TIME),
    ("event.data.qty", 3),
    ("event.metadata", {}),
    ("has(event.metadata.user)", False),
    ("has(event.metadata)", True),
    # access
    ("data.nested.deep.value", 7),
    ("data['nested']['a-b']", 1),
    ("data.items[0]", 1),
    ("data.items[2.0]", 3),
    ("data.package", "reserved words are fine as fields"),
    ("has(data.qty)", True),
    ("has(data.absent)", False),
    ("has(data.nothing)", True),
    ("has(data.nested.deep)", True),
    ("{'a': 5}.a", 5),
    # numbers: one exact type
    ("data.qty * data.price", Decimal("7.5")),
    ("0.1 + 0.2 == 0.3", True),
    ("2 == 2.0", True),
    ("data.qty == 3.0", True),
    ("2.0 * 3", 6),
    ("7 / 2", Decimal("3.5")),
    ("6 / 3", 2),
    ("1 / 3", Decimal("0." + "3" * 34)),
    ("2 / 3", Decimal("0." + "6" * 33 + "7")),
    ("7 % 3", 1),
    ("-7 % 3", -1),
    ("7 % -3", 1),
    ("7.0 % 4", 3),
    ("1 - 2 - 3", -4),
    ("2 + 3 * 4", 14),
    ("(2 + 3) * 4", 20),
    ("-data.price", Decimal("-2.5")),
    ("9223372036854775807 + 1", 9223372036854775808),
    ("1e18 + 0.1", Decimal("1000000000000000000.1")),
    ("data.big * data.price", Decimal(25 * 10**59)),
    # equality and order
    ("data.mixed[0] == data.mixed[1]", False),
    ("data.mixed[0] == data.mixed[2]", False),
    ("data.mixed[3] == null", True),
    ("data.name == null", False),
    ("data.name != null", True),
    ("data.nothing == null", True),
    ("null == null", True),
    ("'a' == null", False),
    ("data.items == [1.0, 2, 3]", True),
    ("data.items == [1, 2]", False),
    ("data.items != [1, 2, 4]", True),
    ("{'a': 1} == {'a': 1.0}", True),
    ("{'a': 1} == {'b': 1}", False),
    ("[true] == [data.qty]", False),
    ("1 < 1.5", True),
    ("'Z' < 'a'", True),
    ("false < true", True),
    ("data.yes >= data.no", True),
    ("data.name <= 'Adb'", True),
    ("2 in data.items", True),
    ("2.0 in data.items", True),
    ("true in [data.qty, 1]", False),
    ("'qty' in data", True),
    ("'absent' in data", False),
    ("data.qty in {'3': 1}", False),
    # logic, with errors absorbed
    ("true && true", True),
    ("true && false", False),
    ("false || true", True),
    ("!data.no", True),
    ("!!data.yes", True),
    ("data.absent && false", False),
    ("false && data.absent", False),
    ("data.absent || true", True),
    ("true || data.absent", True),
    ("data.qty || true", True),
    ("data.absent == 1 || data.qty == 3 || data.absent", True),
    ("(data.absent && true) || true", True),
    ("data.yes ? 'y' : 'n'", "y"),
    ("data.no ? data.absent : 'n'", "n"),
    ("data.no ? 1 : data.no ? 2 : 3", 3),
    ("has(data.absent) ? data.absent : 0", 0),
    ("1 + 1 == 2 && 'a' + 'b' == 'ab'", True),
    # strings and lists
    ("data.name + '!'", "Ada!"),
    ("data.items + [4]", [1, 2, 3, 4]),
    ("size('añ😀')", 3),
    ("'abc'.size()", 3),
    ("size(data.items)", 3),
    ("size({})", 0),
    ("data.name.contains('d')", True),
    ("data.name.startsWith('Ad')", True),
    ("data.name.endsWith('x')", False),
    # conversions
    ("int('42')", 42),
    ("int('-7')", -7),
    ("int(2.9)", 2),
    ("int(-2.9)", -2),
    ("int(timestamp('1970-01-01T00:01:00Z'))", 60),
    ("double('2.50')", Decimal("2.5")),
    ("double(3)", 3),
    ("string(3)", "3"),
    ("string(3.0)", "3"),
    ("string(2.50)", "2.5"),
    ("string(1e20)", "100000000000000000000"),
    ("string(-0.0)", "0"),
    ("string(0.000001)", "0.000001"),
    ("string(true)", "true"),
    ("string(event.time)", "2026-01-31T23:59:58.25Z"),
    ("string(duration('90m'))", "5400s"),
    ("string(duration('-1.5s'))", "-1.5s"),
    ("bool('true')", True),
    ("bool('0')", False),
    # time
    ("timestamp('2026-02-01T01:00:00+01:00') == timestamp('2026-02-01T00:00:00Z')", True),
    ("timestamp('2026-02-01T00:00:00.1234567Z')", dt.datetime(2026, 2, 1, 0, 0, 0, 123456, tzinfo=dt.UTC)),
    ("timestamp(86400)", dt.datetime(1970, 1, 2, tzinfo=dt.UTC)),
    ("event.time + duration('1750ms')", dt.datetime(2026, 2, 1, tzinfo=dt.UTC)),
    ("duration('1h') + timestamp(0) == timestamp(3600)", True),
    ("timestamp(90) - timestamp(30) == duration('1m')", True),
    ("timestamp(90) - duration('1m')", dt.datetime(1970, 1, 1, 0, 0, 30, tzinfo=dt.UTC)),
    ("duration('1h30m').getMinutes()", 90),
    ("duration('-90s').getMinutes()", -1),
    ("event.time < timestamp('2026-02-01T00:00:00Z')", True),
    ("event.time.getFullYear()", 2026),
    ("event.time.getMonth()", 0),
    ("event.time.getDate()", 31),
    ("event.time.getDayOfMonth()", 30),
    ("event.time.getDayOfWeek()", 6),
    ("event.time.getDayOfYear()", 30),
    ("event.time.getHours()", 23),
    ("event.time.getMinutes()", 59),
    ("event.time.getSeconds()", 58),
    ("event.time.getMilliseconds()", 250),
    # macros
    ("data.items.all(x, x > 0)", True),
    ("data.items.exists(x, x > 2)", True),
    ("data.items.exists_one(x, x > 1)", False),
    ("data.items.map(x, x * 2)", [2, 4, 6]),
    ("data.items.map(x, x > 1, x * 2)", [4, 6]),
    ("data.items.filter(x, x % 2 == 1)", [1, 3]),
    ("[].all(x, x)", True),
    ("data.mixed.exists(x, x > 0)", True),
    ("data.mixed.all(x, x > 1)", False),
    ("{'a': 1, 'b': 2}.exists(k, k == 'b')", True),
    ("[[1], [2, 3]].map(x, x.map(y, y + size(x)))", [[2], [4, 5]]),
    ("data.items.filter(x, data.items.exists(y, y == x + 1))", [1, 2]),
]


@pytest.mark.parametrize(("source", "wanted"), VALUES, ids=[source for source, _ in VALUES])
def test_an_expression_has_its_documented_value(source: str, wanted: object) -> None:
    assert same(evaluate(source), wanted)


@pytest.mark.parametrize(("source", "wanted"), VALUES, ids=[source for source, _ in VALUES])
def test_the_exact_form_alone_has_the_same_value(source: str, wanted: object) -> None:
    expression = cel.check(source)
    assert same(cel.python_function(expression, expression.exact)(EVENT, DATA, {}), wanted)


REFUSED = [
    ("", "empty", 1, 1),
    ("   ", "empty", 1, 4),
    ("1 +", "expected a value but found the end", 1, 4),
    ("(1", "expected ')'", 1, 3),
    ("1 2", "expected an operator but found '2'", 1, 3),
    ("[1, 2", "expected ']'", 1, 6),
    ("data.", "expected a field's name", 1, 6),
    ("data.in", "expected a field's name", 1, 6),
    ("data.items[", "expected a value", 1, 12),
    ("'open", "not closed", 1, 1),
    ("'a\nb'", "not closed", 1, 1),
    (r"'\q'", "unknown escape", 1, 2),
    (r"'\uD800'", "no Unicode character", 1, 2),
    (r"'\x00'", "NUL", 1, 1),
    ("b'x'", "no bytes", 1, 1),
    ("1u", "no unsigned", 1, 1),
    ("9" * 101, "at most 100 digits", 1, 1),
    ("1e101", "out of range", 1, 1),
    ("data.a § 1", "unexpected character '§'", 1, 8),
    ("data = 1", "unexpected character '='", 1, 6),
    ("for", "reserved word", 1, 1),
    ("!-1", "can't stand together", 1, 2),
    ("\n  data.x +\n  foo", "unknown name 'foo'", 3, 3),
    ("name", "unknown name 'name': there are data, event, subject", 1, 1),
    ("event", "no value of its own", 1, 1),
    ("event.foo", "event has no field 'foo': it has subject, revision, type, time, data, metadata", 1, 7),
    ("has(event.foo)", "event has no field 'foo'", 1, 11),
    ("event['type']", "no value of its own", 1, 1),
    ("subject.x", "subject is string, so it has no fields", 1, 1),
    ("event.time[0]", "can't be indexed", 1, 7),
    ("data.items[true]", "can't be an index", 1, 12),
    ("foo(1)", "unknown function foo()", 1, 1),
    ("data.name.matches('a')", "regular expressions are left out", 1, 11),
    ("size()", "takes 1 argument, not 0", 1, 1),
    ("'a'.contains()", "takes 1 argument, not 0", 1, 5),
    ("contains('a', 'b')", "is called as x.contains(…)", 1, 1),
    ("'a'.int()", "is called as int(x)", 1, 5),
    ("size(1)", "size() needs string, list or map, but 1 is number", 1, 6),
    ("has(data)", "has() takes a field", 1, 1),
    ("has(subject.x)", "has no fields", 1, 5),
    ("'a' + 1", "+ is not defined for string and number: make a text of the other with string()", 1, 5),
    ("'a' * 3", "* is not defined for string and number", 1, 5),
    ("true + true", "+ is not defined for bool and bool", 1, 6),
    ("'a' < 1", "< is not defined for string and number", 1, 5),
    ("1 == 'a'", "never equal", 1, 3),
    ("1 in 'abc'", "in is not defined", 1, 3),
    ("-'a'", "has no negative", 1, 2),
    ("!1", "must be true or false", 1, 2),
    ("1 && true", "each side of && must be true or false", 1, 1),
    ("1 ? 2 : 3", "the condition before ? must be true or false", 1, 1),
    ("{1: 2}", "a map's key is a string", 1, 2),
    ("{'a': 1, 'a': 2}", "stands twice", 1, 10),
    ("[1].all(x)", "all() takes a variable and an expression", 1, 5),
    ("[1].all(1, true)", "must be a variable's name", 1, 5),
    ("[1].all(data, true)", "would hide", 1, 5),
    ("[1].all(x, 1)", "must be true or false", 1, 12),
    ("'abc'.all(x, true)", "can't be run over", 1, 1),
    ("[[[1]]].all(x, x.all(y, y.all(z, true)))", "at most 2 deep", 1, 27),
    ("x.y", "unknown name 'x'", 1, 1),
    ("[1].map(x, x) + x", "unknown name 'x'", 1, 17),
    ("1" + " + 1" * 60, "more than 50 levels", 1, 199),
    ("(" * 60 + "1" + ")" * 60, "more than 50 levels", 1, 51),
    ("'" + "a" * 5000 + "'", "at most 4096", 1, 1),
]


@pytest.mark.parametrize(("source", "message", "line", "column"), REFUSED, ids=[case[0][:40] for case in REFUSED])
def test_what_cannot_work_is_refused_with_its_place(source: str, message: str, line: int, column: int) -> None:
    with pytest.raises(cel.CelError) as refused:
        cel.check(source)
    assert message in refused.value.message
    assert (refused.value.line, refused.value.column) == (line, column)


FAILING = [
    ("data.absent", "data has no field 'absent'", 1, 6),
    ("data.nested.absent.value", "data.nested has no field 'absent'", 1, 13),
    ("data.name.first", "data.name is string, so it has no field 'first'", 1, 11),
    ("data.nothing.x", "data.nothing is null, so it has no field 'x'", 1, 14),
    ("data['absent']", "the map has no key 'absent'", 1, 5),
    ("data.items[3]", "the index 3 is beyond the list's 3 items", 1, 11),
    ("data.items[-1]", "the index -1 is beyond", 1, 11),
    ("data.items[0.5]", "number 0.5 is not a whole number", 1, 11),
    ("data.items['0']", "a list's index is a number, not string", 1, 11),
    ("data.name * 3", "* is not defined for string and number", 1, 11),
    ("data.name + 1", "+ is not defined for string and number", 1, 11),
    ("data.yes + 1", "+ is not defined for bool and number", 1, 10),
    ("data.nothing + 1", "+ is not defined for null and number", 1, 14),
    ("data.name > 1", "> is not defined for string and number", 1, 11),
    ("data.yes > 0", "> is not defined for bool and number", 1, 10),
    ("data.nothing >= data.nothing", ">= is not defined for null and null", 1, 14),
    ("data.qty / 0", "division by zero", 1, 10),
    ("data.qty % 0", "division by zero", 1, 10),
    ("data.price % 2", "number 2.50 is not a whole number", 1, 12),
    ("data.big * data.big", "more digits than are kept", 1, 10),
    ("data.big + data.far", "more digits than are kept", 1, 10),
    ("string(data.far)", "more digits than are kept", 1, 1),
    ("int(data.far)", "more digits than are kept", 1, 1),
    ("data.far % 2", "is not a whole number", 1, 10),
    ("data.qty && true", "expected true or false, not number", 1, 6),
    ("true && data.absent", "no field 'absent'", 1, 14),
    ("data.absent || false", "no field 'absent'", 1, 6),
    ("data.qty ? 1 : 2", "expected true or false, not number", 1, 6),
    ("data.absent ? 1 : 2", "no field 'absent'", 1, 6),
    ("!data.name", "expected true or false, not string", 1, 7),
    ("1 in data.name", "'in' needs a list or a map", 1, 3),
    ("has(data.name.x)", "has() needs a map, not string", 1, 1),
    ("has(data.absent.x)", "no field 'absent'", 1, 10),
    ("int('4.5')", "int() of string '4.5' is not defined", 1, 1),
    ("int('9' + data.name)", "int() of string '9Ada' is not defined", 1, 1),
    ("double('NaN')", "double() of string 'NaN' is not defined", 1, 1),
    ("string(data.items)", "string() of list is not defined", 1, 1),
    ("bool(data.name)", "bool() of string 'Ada' is not defined", 1, 1),
    ("timestamp('2026-02-30T00:00:00Z')", "is not a time", 1, 1),
    ("timestamp('2026-02-01')", "is not a time like", 1, 1),
    ("timestamp('2026-02-01T00:00:00+00:60')", "is not a time like", 1, 1),
    ("timestamp(0.5)", "number 0.5 is not a whole number", 1, 1),
    ("timestamp('0001-01-01T00:00:00+01:00')", "is not a time", 1, 1),
    ("timestamp(1e30)", "is not a time", 1, 1),
    ("duration('soon')", "is not a duration", 1, 1),
    ("event.time + duration('99999999h')", "out of range", 1, 12),
    ("data.mixed.all(x, x > 0)", "> is not defined for string and number", 1, 21),
    ("data.mixed.map(x, x > 0)", "> is not defined for string and number", 1, 21),
    ("data.qty.exists(x, true)", "a macro runs over a list or a map, not number", 1, 10),
]


@pytest.mark.parametrize(("source", "message", "line", "column"), FAILING, ids=[case[0] for case in FAILING])
def test_what_has_no_value_says_what_was_missing_and_where(source: str, message: str, line: int, column: int) -> None:
    with pytest.raises(cel.EvaluationError) as failed:
        evaluate(source)
    assert message in failed.value.message
    assert (failed.value.line, failed.value.column) == (line, column)


def test_texts_and_lists_cannot_grow_without_bound() -> None:
    data = {"text": "x" * 600_000, "list": list(range(60_000)), "long": list(range(1001))}
    for source, message in [
        ("data.text + data.text", "at most 1048576 characters"),
        ("data.list + data.list", "at most 100000 items"),
        ("data.long.all(x, x >= 0)", "at most 1000 items"),
    ]:
        with pytest.raises(cel.EvaluationError, match=message):
            evaluate(source, data)


def test_the_deepest_expressions_that_are_allowed_compile() -> None:
    deep = 46
    assert evaluate("(" * deep + "1" + ")" * deep) == 1
    assert evaluate("-(" * deep + "1" + ")" * deep) == 1
    assert evaluate("!(" * deep + "data.yes" + ")" * deep) is True
    assert evaluate("1" + " + 1" * deep) == deep + 1
    assert evaluate("data.yes ? (" * deep + "1" + ") : 2" * deep) == 1
    assert evaluate("(" * deep + "data.yes" + "? data.yes : false)" * deep) is True
    assert evaluate("[" * deep + "]" * deep) is not None
    assert evaluate("(data.absent || (data.yes && " * (deep // 2) + "data.yes" + "))" * (deep // 2)) is True
    assert evaluate("data" + "['a']" * deep, nest(deep)) == 1


def nest(depth: int) -> object:
    return {"a": nest(depth - 1)} if depth else 1


def test_a_macros_variable_hides_nothing_and_ends_with_its_macro() -> None:
    assert evaluate("data.items.map(x, x + data.items.filter(x, x > 2)[0])") == [4, 5, 6]


def examples() -> list[tuple[str, str]]:
    """The examples of docs/expressions.md: lines `expression // → value` in its cel blocks."""
    text = (Path(__file__).parents[2] / "docs" / "expressions.md").read_text()
    lines = [line for block in re.findall(r"```cel\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [(source.strip(), value) for source, value in (line.split("// → ") for line in lines)]


@pytest.mark.parametrize(("source", "value"), examples())
def test_the_documentations_examples_are_true(source: str, value: str) -> None:
    data = {
        "qty": 3,
        "price": Decimal("4.99"),
        "customer": {"name": "Ada"},
        "tags": ["pen", "blue"],
        "lines": [{"sku": "pen", "qty": 1}, {"sku": "ink", "qty": 2}],
    }
    assert same(evaluate(source, data), evaluate(value))


def test_the_documentation_names_every_function() -> None:
    text = (Path(__file__).parents[2] / "docs" / "expressions.md").read_text()
    with pytest.raises(cel.CelError) as refused:
        cel.check("nothing()")
    for name in refused.value.message.split("there are ")[1].split(", "):
        assert f"{name}(" in text
