"""CEL's grammar: text to a syntax tree whose nodes know their place.

The grammar is that of github.com/google/cel-spec (doc/langdef.md). What the language has and Refold leaves out (bytes,
unsigned numbers, messages) is refused here with a message that says so.
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import NoReturn

from refold.projection.cel.errors import CelError

#: The longest expression, in characters.
MAX_SOURCE = 4096
#: The deepest tree; a chain `a + b + c` counts a level for each operator. Python's tokenizer allows 200 open brackets
#: in what is generated, at most 3 for each level.
MAX_DEPTH = 50
#: The most digits of a number literal.
MAX_DIGITS = 100

_TOKEN = re.compile(
    r"""
    (?P<space>\s+|//[^\n]*)
  | (?P<number>0[xX][0-9a-fA-F]+[uU]?|(?:\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d+)?[uU]?)
  | (?P<string>[rRbB]{0,2}(?:\"\"\"|'''|"|'))
  | (?P<name>[_a-zA-Z][_a-zA-Z0-9]*)
  | (?P<operator>&&|\|\||[=!<>]=|[-+*/%!<>?:.,()\[\]{}])
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:[abfnrtv\\?\"'`]|[xX]([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-3][0-7]{2}))")
_SIMPLE_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_RESERVED = frozenset(
    (
        *("as", "break", "const", "continue", "else", "for", "function", "if", "import", "let", "loop", "package"),
        *("namespace", "return", "var", "void", "while"),
    )
)
_KEYWORDS = frozenset(("true", "false", "null", "in"))
_MACROS = frozenset(("all", "exists", "exists_one", "map", "filter"))


@dataclass(frozen=True, slots=True)
class Node:
    """A part of an expression: its place (1-based line and column), its source text, the depth of its tree."""

    at: tuple[int, int]
    text: str
    depth: int


@dataclass(frozen=True, slots=True)
class Literal(Node):
    """A number, string, bool or null."""

    value: int | Decimal | str | bool | None


@dataclass(frozen=True, slots=True)
class Name(Node):
    """A variable."""

    name: str


@dataclass(frozen=True, slots=True)
class Select(Node):
    """`operand.field`."""

    operand: Node
    field: str


@dataclass(frozen=True, slots=True)
class Index(Node):
    """`operand[index]`."""

    operand: Node
    index: Node


@dataclass(frozen=True, slots=True)
class Call(Node):
    """`function(arguments)`, or `target.function(arguments)` with the target as first argument."""

    function: str
    method: bool
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Macro(Node):
    """`range.macro(variable, steps)`: all, exists, exists_one and filter with one step, map with one or two."""

    macro: str
    range: Node
    variable: str
    steps: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Unary(Node):
    """`!operand` or `-operand`."""

    operator: str
    operand: Node


@dataclass(frozen=True, slots=True)
class Binary(Node):
    """Arithmetic, comparisons and `in`."""

    operator: str
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Logic(Node):
    """`&&` or `||` between two or more operands."""

    operator: str
    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Ternary(Node):
    """`condition ? yes : no`."""

    condition: Node
    yes: Node
    no: Node


@dataclass(frozen=True, slots=True)
class ListLiteral(Node):
    """`[items]`."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class MapLiteral(Node):
    """`{key: value}`."""

    entries: tuple[tuple[Node, Node], ...]


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # number, string, name, operator, end
    text: str
    start: int
    end: int
    value: int | Decimal | str | None = None


def place(source: str, offset: int) -> tuple[int, int]:
    """Return the 1-based line and column of `offset` in `source`."""
    return source.count("\n", 0, offset) + 1, offset - (source.rfind("\n", 0, offset) + 1) + 1


def parse(source: str) -> Node:
    """Return the syntax tree of an expression.

    Raises:
        CelError: the text is not an expression of the language, or beyond its limits.
    """
    if len(source) > MAX_SOURCE:
        raise CelError(f"the expression has {len(source)} characters, at most {MAX_SOURCE} are allowed", 1, 1)
    return _Parser(source).whole()


def _tokens(source: str) -> list[_Token]:
    tokens = []
    offset = 0
    while offset < len(source):
        match = _TOKEN.match(source, offset)
        if match is None:
            raise CelError(f"unexpected character {source[offset]!r}", *place(source, offset))
        kind = match.lastgroup or ""
        start, end = match.span()
        if kind == "number":
            tokens.append(_Token(kind, match[0], start, end, _number(source, match[0], start)))
        elif kind == "string":
            value, end = _string(source, start, end)
            tokens.append(_Token(kind, source[start:end], start, end, value))
        elif kind != "space":
            tokens.append(_Token(kind, match[0], start, end))
        offset = end
    tokens.append(_Token("end", "", offset, offset))
    return tokens


def _number(source: str, text: str, start: int) -> int | Decimal:
    if text[-1] in "uU":
        raise CelError(f"there are no unsigned numbers: write {text[:-1]}", *place(source, start))
    if len(text) > MAX_DIGITS:
        raise CelError(f"a number may have at most {MAX_DIGITS} digits", *place(source, start))
    if text[:2] in ("0x", "0X"):
        return int(text, 16)
    if text.isdigit():
        return int(text)
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise CelError(f"the number {text} is out of range", *place(source, start)) from None
    if value and not -MAX_DIGITS < value.adjusted() < MAX_DIGITS:
        raise CelError(f"the number {text} is out of range", *place(source, start))
    return value


def _string(source: str, start: int, opened: int) -> tuple[str, int]:
    """Return the value of the string literal that begins at `start` (its quotes end at `opened`) and its end."""
    prefix = source[start:opened].rstrip("\"'").lower()
    quote = source[start + len(prefix) : opened]
    if "b" in prefix:
        raise CelError("there are no bytes in this language: write a string without the b", *place(source, start))
    raw = prefix == "r"
    if prefix not in ("", "r"):
        raise CelError(f"unknown prefix {prefix!r} before a string", *place(source, start))
    parts = []
    offset = opened
    while not source.startswith(quote, offset):
        if offset >= len(source) or (len(quote) == 1 and source[offset] in "\r\n"):
            raise CelError(f"the string is not closed: {quote} is missing", *place(source, start))
        if raw or source[offset] != "\\":
            parts.append(source[offset])
            offset += 1
            continue
        match = _ESCAPE.match(source, offset)
        if match is None:
            raise CelError(f"unknown escape {source[offset : offset + 2]!r} in a string", *place(source, offset))
        parts.append(_unescape(match, source, offset))
        offset = match.end()
    value = "".join(parts)
    if "\0" in value:
        raise CelError("a string can't hold the character NUL (\\0)", *place(source, start))
    return value, offset + len(quote)


def _unescape(match: re.Match[str], source: str, offset: int) -> str:
    digits = match[1] or match[2] or match[3]
    if digits is None and match[4] is None:
        letter = match[0][1]
        return _SIMPLE_ESCAPES.get(letter, letter)
    code = int(digits, 16) if digits else int(match[4], 8)
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise CelError(f"{match[0]} is no Unicode character", *place(source, offset))
    return chr(code)


class _Parser:
    """Recursive descent; one method for each level of precedence, from the loosest to the tightest."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.tokens = _tokens(source)
        self.next = 0
        self.nesting = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.next]

    def fail(self, message: str, offset: int | None = None) -> NoReturn:
        raise CelError(message, *place(self.source, self.token.start if offset is None else offset))

    def accept(self, *operators: str) -> _Token | None:
        token = self.token
        if token.kind == "operator" and token.text in operators:
            self.next += 1
            return token
        return None

    def expect(self, operator: str) -> _Token:
        token = self.accept(operator)
        if token is None:
            self.fail(f"expected {operator!r} but found {self.found()}")
        return token

    def found(self) -> str:
        return "the end of the expression" if self.token.kind == "end" else repr(self.token.text)

    def base(self, start: int, at: int, *children: Node) -> tuple[tuple[int, int], str, int]:
        """Return the fields of a node that began at `start`, is blamed at `at` and holds `children`."""
        depth = 1 + max((child.depth for child in children), default=0)
        if depth > MAX_DEPTH:
            self.fail(f"the expression is nested, or chained, more than {MAX_DEPTH} levels deep", at)
        return place(self.source, at), self.source[start : self.tokens[self.next - 1].end], depth

    def whole(self) -> Node:
        if self.token.kind == "end":
            self.fail("the expression is empty")
        node = self.expression()
        if self.token.kind != "end":
            self.fail(f"expected an operator but found {self.found()}")
        return node

    def expression(self) -> Node:
        self.nesting += 1
        if self.nesting > MAX_DEPTH:
            self.fail(f"the expression is nested more than {MAX_DEPTH} levels deep")
        start = self.token.start
        node = self.logic("||")
        if mark := self.accept("?"):
            yes = self.logic("||")
            self.expect(":")
            no = self.expression()
            node = Ternary(*self.base(start, mark.start, node, yes, no), node, yes, no)
        self.nesting -= 1
        return node

    def logic(self, operator: str) -> Node:
        start = self.token.start
        operands = [self.logic("&&") if operator == "||" else self.relation()]
        at = self.token.start
        while self.accept(operator):
            operands.append(self.logic("&&") if operator == "||" else self.relation())
        if len(operands) == 1:
            return operands[0]
        return Logic(*self.base(start, at, *operands), operator, tuple(operands))

    def relation(self) -> Node:
        start = self.token.start
        node = self.addition()
        while True:
            mark = self.accept("==", "!=", "<", "<=", ">", ">=")
            if mark is None and self.token.kind == "name" and self.token.text == "in":
                mark = self.token
                self.next += 1
            if mark is None:
                return node
            right = self.addition()
            node = Binary(*self.base(start, mark.start, node, right), mark.text, node, right)

    def addition(self) -> Node:
        start = self.token.start
        node = self.multiplication()
        while mark := self.accept("+", "-"):
            right = self.multiplication()
            node = Binary(*self.base(start, mark.start, node, right), mark.text, node, right)
        return node

    def multiplication(self) -> Node:
        start = self.token.start
        node = self.unary()
        while mark := self.accept("*", "/", "%"):
            right = self.unary()
            node = Binary(*self.base(start, mark.start, node, right), mark.text, node, right)
        return node

    def unary(self) -> Node:
        marks: list[_Token] = []
        while mark := self.accept("!", "-"):
            if marks and marks[0].text != mark.text:
                self.fail(f"{marks[0].text!r} and {mark.text!r} can't stand together: use brackets", mark.start)
            marks.append(mark)
        node = self.member()
        for mark in reversed(marks):
            node = Unary(*self.base(mark.start, mark.start, node), mark.text, node)
        return node

    def member(self) -> Node:
        start = self.token.start
        node = self.primary()
        while True:
            if self.accept("."):
                token = self.token
                if token.kind != "name" or token.text in _KEYWORDS:
                    self.fail(f"expected a field's name after '.' but found {self.found()}")
                self.next += 1
                if self.accept("("):
                    node = self.method(start, token, node)
                else:
                    node = Select(*self.base(start, token.start, node), node, token.text)
            elif mark := self.accept("["):
                index = self.expression()
                self.expect("]")
                node = Index(*self.base(start, mark.start, node, index), node, index)
            else:
                return node

    def method(self, start: int, name: _Token, target: Node) -> Node:
        arguments = self.items(")")
        if name.text not in _MACROS:
            children = (target, *arguments)
            return Call(*self.base(start, name.start, *children), name.text, True, children)
        allowed = (2, 3) if name.text == "map" else (2,)
        if len(arguments) not in allowed:
            self.fail(f"{name.text}() takes a variable and an expression, like {name.text}(x, x > 0)", name.start)
        variable, *steps = arguments
        if not isinstance(variable, Name):
            self.fail(f"the first argument of {name.text}() must be a variable's name", name.start)
        base = self.base(start, name.start, target, *steps)
        return Macro(*base, name.text, target, variable.name, tuple(steps))

    def items(self, close: str) -> tuple[Node, ...]:
        """Return the expressions up to `close`, separated by commas; lists may end in one."""
        found: list[Node] = []
        while not self.accept(close):
            found.append(self.expression())
            if not self.accept(","):
                self.expect(close)
                break
            if close == ")" and self.token.text == ")":
                self.fail("expected an argument but found ')'")
        return tuple(found)

    def primary(self) -> Node:
        token = self.token
        start = token.start
        self.next += 1
        if token.kind in ("number", "string"):
            return Literal(*self.base(start, start), token.value)
        if token.kind == "name":
            return self.named(token)
        if token.text == "(":
            node = self.expression()
            self.expect(")")
            return node
        if token.text == "[":
            items = self.items("]")
            return ListLiteral(*self.base(start, start, *items), items)
        if token.text != "{":
            self.next -= 1
            self.fail(f"expected a value but found {self.found()}")
        return self.map_literal(start)

    def named(self, token: _Token) -> Node:
        start = token.start
        if token.text in ("true", "false", "null"):
            value = {"true": True, "false": False, "null": None}[token.text]
            return Literal(*self.base(start, start), value)
        if token.text == "in" or token.text in _RESERVED:
            self.fail(f"{token.text!r} is a reserved word", start)
        if self.accept("("):
            arguments = self.items(")")
            return Call(*self.base(start, start, *arguments), token.text, False, arguments)
        return Name(*self.base(start, start), token.text)

    def map_literal(self, start: int) -> Node:
        entries: list[tuple[Node, Node]] = []
        while not self.accept("}"):
            key = self.expression()
            self.expect(":")
            entries.append((key, self.expression()))
            if not self.accept(","):
                self.expect("}")
                break
        children = [node for entry in entries for node in entry]
        return MapLiteral(*self.base(start, start, *children), tuple(entries))
