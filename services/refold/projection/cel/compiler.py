"""Checks a syntax tree and turns it into Python source, once; Python then runs it as it runs its own.

Each expression has two forms of the same meaning. The *fast* form is what runs: plain subscripts for fields, `and` and
`or`, helpers only where Python's own operators would do something else than CEL. Whatever goes wrong in it raises one
of `FAILURES`. Only then the *exact* form runs: it absorbs errors in `&&`, `||`, all() and exists() as CEL says, and its
own errors name the place and what was missing. A fast form that returns has met no error, so there was none to absorb.

A third form is the fast one with names in place of the fields of `data` that are read in any case (`data.a.b` outside
of what may be left out: the branches of `? :`, all but the first operand of `&&`, the steps of macros). Who runs it
looks them up before, each once, and may decode nothing else.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import NamedTuple, NoReturn

from refold.projection.cel import runtime
from refold.projection.cel.errors import CelError, EvaluationError
from refold.projection.cel.kinds import Kind
from refold.projection.cel.syntax import (
    Binary,
    Call,
    Index,
    ListLiteral,
    Literal,
    Logic,
    Macro,
    MapLiteral,
    Name,
    Node,
    Select,
    Ternary,
    Unary,
    parse,
)

#: What the fast form of an expression may raise; the exact form then tells the error, or absorbs it.
FAILURES = (EvaluationError, LookupError, TypeError, ArithmeticError, ValueError, RecursionError)

#: The fields of `event`: the Python that reads them and their kinds.
EVENT_FIELDS: dict[str, tuple[str, Kind]] = {
    "subject": ("event.subject", Kind.STRING),
    "revision": ("event.revision", Kind.NUMBER),
    "type": ("event.type", Kind.STRING),
    "time": ("event.time", Kind.TIMESTAMP),
    "data": ("data", Kind.JSON),
    "metadata": ("metadata", Kind.JSON),
}
_VARIABLES: dict[str, tuple[str, Kind]] = {"data": ("data", Kind.JSON), "subject": ("event.subject", Kind.STRING)}

#: How deep macros stand within each other, at most: their cost multiplies.
MAX_MACROS = 2


class _Function(NamedTuple):
    """A function: its helper in `runtime`, what its arguments may be, what it returns, how it may be called."""

    helper: str
    arguments: tuple[Kind, ...]
    result: Kind
    plain: bool = False
    method: bool = False


_HELPER = "_"
#: All that generated Python calls, by the name that it uses.
HELPERS: dict[str, object] = {
    f"{_HELPER}{name}": helper
    for name, helper in vars(runtime).items()
    if not name.startswith("_") and callable(helper) and getattr(helper, "__module__", "") == runtime.__name__
}
_CONVERTIBLE = Kind.NUMBER | Kind.STRING | Kind.BOOL | Kind.TIMESTAMP | Kind.DURATION
_TEXTS = (Kind.STRING, Kind.STRING)
_TIMES = (Kind.TIMESTAMP,)
_TIMES_AND_DURATIONS = (Kind.TIMESTAMP | Kind.DURATION,)
_FUNCTIONS = {
    "size": _Function("size", (Kind.STRING | Kind.LIST | Kind.MAP,), Kind.NUMBER, plain=True, method=True),
    "contains": _Function("contains", _TEXTS, Kind.BOOL, method=True),
    "startsWith": _Function("starts_with", _TEXTS, Kind.BOOL, method=True),
    "endsWith": _Function("ends_with", _TEXTS, Kind.BOOL, method=True),
    "int": _Function("to_int", (Kind.NUMBER | Kind.STRING | Kind.TIMESTAMP,), Kind.NUMBER, plain=True),
    "double": _Function("to_double", (Kind.NUMBER | Kind.STRING,), Kind.NUMBER, plain=True),
    "string": _Function("to_string", (_CONVERTIBLE,), Kind.STRING, plain=True),
    "bool": _Function("to_bool", (Kind.BOOL | Kind.STRING,), Kind.BOOL, plain=True),
    "timestamp": _Function("to_timestamp", (Kind.NUMBER | Kind.STRING | Kind.TIMESTAMP,), Kind.TIMESTAMP, plain=True),
    "duration": _Function("to_duration", (Kind.STRING | Kind.DURATION,), Kind.DURATION, plain=True),
    "getFullYear": _Function("get_full_year", _TIMES, Kind.NUMBER, method=True),
    "getMonth": _Function("get_month", _TIMES, Kind.NUMBER, method=True),
    "getDate": _Function("get_date", _TIMES, Kind.NUMBER, method=True),
    "getDayOfMonth": _Function("get_day_of_month", _TIMES, Kind.NUMBER, method=True),
    "getDayOfWeek": _Function("get_day_of_week", _TIMES, Kind.NUMBER, method=True),
    "getDayOfYear": _Function("get_day_of_year", _TIMES, Kind.NUMBER, method=True),
    "getHours": _Function("get_hours", _TIMES_AND_DURATIONS, Kind.NUMBER, method=True),
    "getMinutes": _Function("get_minutes", _TIMES_AND_DURATIONS, Kind.NUMBER, method=True),
    "getSeconds": _Function("get_seconds", _TIMES_AND_DURATIONS, Kind.NUMBER, method=True),
    "getMilliseconds": _Function("get_milliseconds", _TIMES, Kind.NUMBER, method=True),
}
_LEFT_OUT = {
    "matches": "regular expressions are left out, since their cost can't be bounded: "
    "use contains(), startsWith() or endsWith()",
    "uint": "there is one number type: leave uint() away",
    "dyn": "all of data is dynamic already: leave dyn() away",
    "type": "type() is left out: use has() to tell events apart",
    "bytes": "there are no bytes in this language",
}

_COMPARISONS = {"<": "less", "<=": "less_or_equal", ">": "greater", ">=": "greater_or_equal"}
_ARITHMETIC = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide", "%": "remainder"}
_ORDERED = (Kind.NUMBER, Kind.STRING, Kind.BOOL, Kind.TIMESTAMP, Kind.DURATION)
#: Which kinds each operator takes and gives: (left, right, result).
_SIGNATURES: dict[str, tuple[tuple[Kind, Kind, Kind], ...]] = {
    "+": (
        (Kind.NUMBER, Kind.NUMBER, Kind.NUMBER),
        (Kind.STRING, Kind.STRING, Kind.STRING),
        (Kind.LIST, Kind.LIST, Kind.LIST),
        (Kind.TIMESTAMP, Kind.DURATION, Kind.TIMESTAMP),
        (Kind.DURATION, Kind.TIMESTAMP, Kind.TIMESTAMP),
        (Kind.DURATION, Kind.DURATION, Kind.DURATION),
    ),
    "-": (
        (Kind.NUMBER, Kind.NUMBER, Kind.NUMBER),
        (Kind.TIMESTAMP, Kind.TIMESTAMP, Kind.DURATION),
        (Kind.TIMESTAMP, Kind.DURATION, Kind.TIMESTAMP),
        (Kind.DURATION, Kind.DURATION, Kind.DURATION),
    ),
    "*": ((Kind.NUMBER, Kind.NUMBER, Kind.NUMBER),),
    "/": ((Kind.NUMBER, Kind.NUMBER, Kind.NUMBER),),
    "%": ((Kind.NUMBER, Kind.NUMBER, Kind.NUMBER),),
    "in": ((Kind.ANY, Kind.LIST, Kind.BOOL), (Kind.STRING, Kind.MAP, Kind.BOOL)),
    **{operator: tuple((kind, kind, Kind.BOOL) for kind in _ORDERED) for operator in _COMPARISONS},
}


@dataclass(frozen=True)
class Expression:
    """A checked expression.

    `kind` is what its value can be, `fast` and `exact` are Python expressions over `event` (an Event), `data` and
    `metadata` (decoded JSON), `row` (see `check`) and over the names in `constants` and `HELPERS`. `row_columns` are
    the columns of the row that it looks at, and `row_at` is the place of the first (1-based line and column). `items`
    are the kinds and places of a list literal's items, empty where it is something else.

    `hoisted` is the fast form over `paths` (the fields of data by the names that stand for them), and over `data` only
    where `hoisted_uses_data`.
    """

    source: str
    node: Node
    kind: Kind
    fast: str
    exact: str
    constants: Mapping[str, object]
    uses_data: bool
    uses_metadata: bool
    constant: bool
    row_columns: frozenset[str]
    row_at: tuple[int, int] | None
    items: tuple[tuple[Kind, tuple[int, int]], ...]
    hoisted: str
    hoisted_uses_data: bool
    paths: Mapping[str, tuple[str, ...]]


class _Code(NamedTuple):
    python: str
    kind: Kind


def check(source: str, *, prefix: str = "c", row: Mapping[str, tuple[str, Kind]] | None = None) -> Expression:
    """Return the checked expression of a source text.

    Args:
        source: the CEL text.
        prefix: the beginning of the names of its constants, so that several expressions can share a namespace.
        row: the row's columns, each with the Python over `row` that reads it, and its kinds; None where there is no
            row to look at.

    Raises:
        CelError: the text isn't an expression, names what doesn't exist, or can never have a value.
    """
    node = parse(source)
    fast, exact = _Emitter(prefix, row, exact=False), _Emitter(prefix, row, exact=True)
    hoisting = _Emitter(prefix, row, exact=False, hoisting=True)
    code = fast.emit(node)
    items = node.items if isinstance(node, ListLiteral) else ()
    return Expression(
        source=source,
        node=node,
        kind=code.kind,
        fast=code.python,
        exact=exact.emit(node).python,
        constants=fast.constants,
        uses_data="data" in fast.used,
        uses_metadata="metadata" in fast.used,
        constant=not fast.used and fast.row_at is None,
        row_columns=frozenset(fast.row_columns),
        row_at=fast.row_at,
        hoisted=hoisting.emit(node).python,
        hoisted_uses_data="data" in hoisting.used,
        paths=hoisting.paths,
        items=tuple((_Emitter(prefix, row, exact=False).emit(item).kind, item.at) for item in items),
    )


def function(source: str) -> Callable[[object, object, object], object]:
    """Return a Python function of (event, data, metadata) that evaluates an expression.

    Raises:
        CelError: as `check`. The function raises EvaluationError where the expression has no value.
    """
    expression = check(source)
    fast, exact = python_function(expression, expression.fast), python_function(expression, expression.exact)

    def evaluate(event: object, data: object, metadata: object) -> object:
        try:
            return fast(event, data, metadata)
        except FAILURES:
            return exact(event, data, metadata)

    return evaluate


def python_function(expression: Expression, python: str) -> Callable[..., object]:
    """Return one form of `expression` as a function of (event, data, metadata), and the row where it has one."""
    namespace = {**HELPERS, **expression.constants}
    # The source holds nothing of the user's but names and literals that the parser has read and the emitter written.
    return eval(f"lambda event, data, metadata, row=None: {python}", namespace)  # type: ignore[no-any-return]  # noqa: S307


class _Emitter:
    """Emits one form of an expression, children first; raises CelError where the kinds can't fit."""

    def __init__(
        self, prefix: str, row: Mapping[str, tuple[str, Kind]] | None, *, exact: bool, hoisting: bool = False
    ) -> None:
        self.prefix = prefix
        self.row = row
        self.exact = exact
        self.hoisting = hoisting
        self.paths: dict[str, tuple[str, ...]] = {}
        self.row_columns: set[str] = set()
        self.row_at: tuple[int, int] | None = None
        self.constants: dict[str, object] = {}
        self.used: set[str] = set()
        self.scope: list[str] = []

    def emit(self, node: Node) -> _Code:
        match node:
            case Literal():
                return self.literal(node)
            case Name():
                return self.name(node)
            case Select():
                return self.select(node)
            case Index():
                return self.index(node)
            case Call():
                return self.call(node)
            case Macro():
                return self.macro(node)
            case Unary():
                return self.unary(node)
            case Binary():
                return self.binary(node)
            case Logic():
                return self.logic(node)
            case Ternary():
                return self.ternary(node)
            case ListLiteral():
                return _Code(f"[{', '.join(self.emit(item).python for item in node.items)}]", Kind.LIST)
            case MapLiteral():
                return self.map_literal(node)
        raise AssertionError(node)

    def helper(self, name: str, node: Node, *arguments: str) -> str:
        """Return a helper's call, in the exact form with the node's place."""
        place = [f"at={node.at}"] if self.exact else []
        return f"{_HELPER}{name}({', '.join([*arguments, *place])})"

    def literal(self, node: Literal) -> _Code:
        value = node.value
        if isinstance(value, Decimal):
            name = f"{_HELPER}{self.prefix}{len(self.constants)}"
            self.constants[name] = value
            return _Code(name, Kind.NUMBER)
        if value is None or isinstance(value, bool):
            return _Code(repr(value), Kind.NULL if value is None else Kind.BOOL)
        return _Code(repr(value), Kind.STRING if isinstance(value, str) else Kind.NUMBER)

    def name(self, node: Name) -> _Code:
        if node.name in self.scope:
            return _Code(_local(node.name), Kind.ANY)
        if node.name == "event":
            _fail(node, "event is no value of its own: select one of its fields, " + _listed(EVENT_FIELDS))
        if node.name == "row":
            if self.row is None:
                _fail(node, "there is no row here: only conditions and values of the fold can look at the row before")
            _fail(node, f"row is no value of its own: select one of its columns, {_listed(self.row)}")
        if node.name not in _VARIABLES:
            known = sorted({*_VARIABLES, "event", *self.scope})
            _fail(node, f"unknown name {node.name!r}: there are {_listed(known)}; a text stands in quotes")
        python, kind = _VARIABLES[node.name]
        self.used.add(python)
        return _Code(python, kind)

    def event_field(self, node: Select) -> _Code | None:
        """Return the code of `event.field`, or None where the node is something else."""
        if not isinstance(node.operand, Name) or node.operand.name != "event" or "event" in self.scope:
            return None
        if node.field not in EVENT_FIELDS:
            _fail(node, f"event has no field {node.field!r}: it has {_listed(EVENT_FIELDS)}")
        python, kind = EVENT_FIELDS[node.field]
        self.used.add(python)
        return _Code(python, kind)

    def row_column(self, node: Select) -> _Code | None:
        """Return the code of `row.column`, or None where the node is something else."""
        if not isinstance(node.operand, Name) or node.operand.name != "row" or "row" in self.scope or self.row is None:
            return None
        if node.field not in self.row:
            _fail(node, f"row has no column {node.field!r}: it has {_listed(self.row)}")
        self.row_columns.add(node.field)
        self.row_at = self.row_at or node.operand.at
        return _Code(*self.row[node.field])

    def data_path(self, node: Node) -> tuple[str, ...] | None:
        """Return the fields of `data.a.b`, or None where the node is something else."""
        if isinstance(node, Name):
            return () if node.name == "data" and "data" not in self.scope else None
        if not isinstance(node, Select):
            return None
        if isinstance(node.operand, Name) and node.operand.name == "event" and "event" not in self.scope:
            return () if node.field == "data" else None
        above = self.data_path(node.operand)
        return None if above is None else (*above, node.field)

    @contextmanager
    def perhaps(self) -> Iterator[None]:
        """Emit what isn't evaluated in any case."""
        hoisting, self.hoisting = self.hoisting, False
        yield
        self.hoisting = hoisting

    def select(self, node: Select) -> _Code:
        if code := self.event_field(node) or self.row_column(node):
            return code
        if self.hoisting and (path := self.data_path(node)):
            name = f"d_{'.'.join(path).encode().hex()}"
            self.paths[name] = path
            return _Code(name, Kind.ANY)
        operand = self.emit(node.operand)
        self.need(node.operand, operand, Kind.MAP, "has no fields")
        if self.exact:
            return _Code(
                f"{_HELPER}select({operand.python}, {node.field!r}, {node.operand.text!r}, {node.at})", Kind.ANY
            )
        return _Code(f"{operand.python}[{node.field!r}]", Kind.ANY)

    def index(self, node: Index) -> _Code:
        operand, key = self.emit(node.operand), self.emit(node.index)
        self.need(node.operand, operand, Kind.LIST | Kind.MAP, "can't be indexed")
        self.need(node.index, key, Kind.NUMBER | Kind.STRING, "can't be an index")
        return _Code(self.helper("index", node, operand.python, key.python), Kind.ANY)

    def need(self, node: Node, code: _Code, kinds: Kind, otherwise: str) -> None:
        if not code.kind & kinds:
            _fail(node, f"{node.text} is {code.kind.title}, so it {otherwise}")

    def boolean(self, node: Node, what: str) -> str:
        """Return the code of an operand that must be a bool."""
        code = self.emit(node)
        if not code.kind & Kind.BOOL:
            _fail(node, f"{what} must be true or false, but {node.text} is {code.kind.title}")
        return code.python if code.kind == Kind.BOOL else self.helper("boolean", node, code.python)

    def call(self, node: Call) -> _Code:
        if node.function == "has" and not node.method:
            return self.has(node)
        signature = _FUNCTIONS.get(node.function)
        if signature is None:
            way_out = _LEFT_OUT.get(node.function, f"there are {_listed(sorted([*_FUNCTIONS, 'has']))}")
            _fail(node, f"unknown function {node.function}(): {way_out}")
        if not (signature.method if node.method else signature.plain):
            right = f"x.{node.function}(…)" if signature.method else f"{node.function}(x)"
            _fail(node, f"{node.function}() is called as {right}")
        if len(node.arguments) != len(signature.arguments):
            needed, given = len(signature.arguments) - node.method, len(node.arguments) - node.method
            _fail(node, f"{node.function}() takes {needed} argument{'s' * (needed != 1)}, not {given}")
        codes = [self.emit(argument) for argument in node.arguments]
        for argument, code, kinds in zip(node.arguments, codes, signature.arguments, strict=True):
            if not code.kind & kinds:
                _fail(argument, f"{node.function}() needs {kinds.title}, but {argument.text} is {code.kind.title}")
        return _Code(self.helper(signature.helper, node, *(code.python for code in codes)), signature.result)

    def has(self, node: Call) -> _Code:
        if len(node.arguments) != 1 or not isinstance(node.arguments[0], Select):
            _fail(node, "has() takes a field, like has(data.total)")
        field = node.arguments[0]
        if self.event_field(field):
            return _Code("True", Kind.BOOL)
        if column := self.row_column(field):
            return _Code(f"({column.python} is not None)", Kind.BOOL)
        operand = self.emit(field.operand)
        self.need(field.operand, operand, Kind.MAP, "has no fields")
        return _Code(self.helper("has", node, operand.python, repr(field.field)), Kind.BOOL)

    def macro(self, node: Macro) -> _Code:
        if len(self.scope) >= MAX_MACROS:
            _fail(node, f"macros may stand at most {MAX_MACROS} deep within each other")
        items = self.emit(node.range)
        self.need(node.range, items, Kind.LIST | Kind.MAP, f"can't be run over by {node.macro}()")
        if node.variable in _VARIABLES or node.variable == "event":
            _fail(node, f"the variable {node.variable!r} would hide what has this name already")
        self.scope.append(node.variable)
        steps = []
        for position, step in enumerate(node.steps):
            mapped = node.macro == "map" and position == len(node.steps) - 1
            with self.perhaps():
                python = self.emit(step).python if mapped else self.boolean(step, f"the condition of {node.macro}()")
            steps.append(f"(lambda {_local(node.variable)}: {python})")
        self.scope.pop()
        name = "map_where" if len(steps) == 2 else node.macro
        name = f"absorbing_{name}" if self.exact and name in ("all", "exists") else f"macro_{name}"
        kind = Kind.LIST if node.macro in ("map", "filter") else Kind.BOOL
        return _Code(self.helper(name, node, items.python, *steps), kind)

    def unary(self, node: Unary) -> _Code:
        if node.operator == "!":
            return _Code(f"(not {self.boolean(node.operand, 'the operand of !')})", Kind.BOOL)
        if isinstance(node.operand, Literal) and isinstance(node.operand.value, int | Decimal):
            return self.literal(replace(node.operand, value=-node.operand.value))
        operand = self.emit(node.operand)
        self.need(node.operand, operand, Kind.NUMBER, "has no negative")
        return _Code(self.helper("negate", node, operand.python), Kind.NUMBER)

    def binary(self, node: Binary) -> _Code:
        left, right = self.emit(node.left), self.emit(node.right)
        operator = node.operator
        if operator in ("==", "!="):
            return self.equality(node, left, right)
        results = [result for one, other, result in _SIGNATURES[operator] if left.kind & one and right.kind & other]
        if not results:
            texts = operator == "+" and Kind.STRING in (left.kind, right.kind)
            way_out = ": make a text of the other with string()" if texts else ""
            _fail(node, f"{operator} is not defined for {left.kind.title} and {right.kind.title}{way_out}")
        kind = results[0]
        for result in results[1:]:
            kind |= result
        if operator == "in":
            return _Code(self.helper("contained", node, left.python, right.python), kind)
        if operator in _COMPARISONS:
            if left.kind == right.kind and left.kind in _ORDERED:
                return _Code(f"({left.python} {operator} {right.python})", kind)
            return _Code(self.helper(_COMPARISONS[operator], node, left.python, right.python), kind)
        return _Code(self.helper(_ARITHMETIC[operator], node, left.python, right.python), kind)

    def equality(self, node: Binary, left: _Code, right: _Code) -> _Code:
        kinds = (left.kind, right.kind)
        if not left.kind & right.kind and Kind.NULL not in kinds:
            _fail(node, f"{left.kind.title} and {right.kind.title} are never equal")
        if Kind.STRING in kinds:
            # A str equals nothing but the same str in Python too; a number may equal a bool there.
            return _Code(f"({left.python} {node.operator} {right.python})", Kind.BOOL)
        return _Code(
            f"{_HELPER}{'equal' if node.operator == '==' else 'unequal'}({left.python}, {right.python})", Kind.BOOL
        )

    def logic(self, node: Logic) -> _Code:
        operands = [self.boolean(node.operands[0], f"each side of {node.operator}")]
        with self.perhaps():
            operands += [self.boolean(operand, f"each side of {node.operator}") for operand in node.operands[1:]]
        if not self.exact:
            return _Code(f"({(' and ' if node.operator == '&&' else ' or ').join(operands)})", Kind.BOOL)
        name = "absorbing_and" if node.operator == "&&" else "absorbing_or"
        lambdas = ", ".join(f"(lambda: {operand})" for operand in operands)
        return _Code(f"{_HELPER}{name}({node.at}, {lambdas})", Kind.BOOL)

    def ternary(self, node: Ternary) -> _Code:
        condition = self.boolean(node.condition, "the condition before ?")
        with self.perhaps():
            yes, no = self.emit(node.yes), self.emit(node.no)
        return _Code(f"({yes.python} if {condition} else {no.python})", yes.kind | no.kind)

    def map_literal(self, node: MapLiteral) -> _Code:
        entries = []
        literals: set[object] = set()
        for key, value in node.entries:
            if isinstance(key, Literal):
                if key.value in literals:
                    _fail(key, f"the key {key.text} stands twice in the map")
                literals.add(key.value)
            code = self.emit(key)
            if not code.kind & Kind.STRING:
                _fail(key, f"a map's key is a string, but {key.text} is {code.kind.title}")
            python = code.python if code.kind == Kind.STRING else self.helper("string_key", key, code.python)
            entries.append(f"{python}: {self.emit(value).python}")
        return _Code(f"{{{', '.join(entries)}}}", Kind.MAP)


def _local(name: str) -> str:
    return f"v_{name}"


def _listed(names: object) -> str:
    return ", ".join(names)  # type: ignore[arg-type]


def _fail(node: Node, message: str) -> NoReturn:
    raise CelError(message, *node.at)
