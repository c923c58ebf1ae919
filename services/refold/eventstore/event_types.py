"""What a stream's events may be: `spec.events`, compiled once and checked at every append.

A schema is JSON Schema draft 2020-12, by jsonschema-rs, with `format` asserted and numbers exact (decimals, integers of
any length). It comes from whoever may write EventStreams, and all streams share the event store's processes. So what a
schema can cost is bounded when it is compiled: its size and depth, how many subschemas it composes to, patterns of
linear time only, and nothing is ever fetched.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Self
from urllib.parse import unquote

import jsonschema_rs
import msgspec
from jsonschema_rs import Draft202012Validator, RegexOptions

from refold.eventstore import arrays
from refold.eventstore.errors import EventStoreError, InvalidAppendError, InvalidDataError, UnknownTypeError

DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: Bytes of one schema as compact JSON, and how deep it may be nested.
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 100
#: Subschemas that may apply to one event in all, with `$ref` followed (a recursion counts once), and how deep.
MAX_SUBSCHEMAS = 10_000
MAX_SUBSCHEMA_DEPTH = 200
#: Errors of one event that are told, and the characters of each.
TOLD_ERRORS = 5
TOLD_CHARACTERS = 300
#: Work (subschemas times values, about 0.1 s) that telling all errors may take; beyond, only the first or none is told.
_TELLING = 100_000

_SCHEMAS_IN_OBJECT = ("properties", "patternProperties", "dependentSchemas")
_SCHEMAS_IN_ARRAY = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMA = (
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems",
    "unevaluatedProperties",
)  # fmt: skip
_decode = msgspec.json.Decoder(float_hook=Decimal).decode
_encode = msgspec.json.Encoder(order="deterministic").encode


class SchemaError(EventStoreError):
    """A schema of `spec.events` that can't be used.

    Attributes:
        event_type: whose schema it is.
        pointer: the JSON pointer to the place in the schema.
    """

    def __init__(self, event_type: str, pointer: str, message: str) -> None:
        super().__init__(f"the schema of {event_type}{f' at {pointer}' if pointer else ''}: {message}")
        self.event_type = event_type
        self.pointer = pointer


class EventTypes:
    """The event types of one stream, each with its compiled schema.

    Args:
        types: the JSON Schema (an object or a boolean) of each event type.

    Raises:
        SchemaError: a schema can't be used.
    """

    def __init__(self, types: Mapping[str, Any]) -> None:
        self._schemas = {name.encode(): _Schema(name, schema) for name, schema in types.items()}

    @classmethod
    def decode(cls, text: str) -> Self:
        """Return the types that `encode` made `text` of.

        Raises:
            SchemaError: a schema can't be used.
        """
        return cls(msgspec.json.decode(text))

    def refusal(self, types: Sequence[bytes], data: Sequence[bytes], path: str = "") -> InvalidAppendError | None:
        """Return why the stream doesn't take these events: the first that doesn't fit; None where it does.

        Args:
            types: the events' types, as elements of an array (`refold.eventstore.arrays`).
            data: their data, likewise; JSON text that PostgreSQL can store.
            path: what stands before `events` in the error's field.
        """
        for index, (name, element) in enumerate(zip(types, data, strict=True)):
            event_type = arrays.text_value(name)
            schema = self._schemas.get(event_type)
            if schema is None:
                known = [each.decode() for each in self._schemas]
                return UnknownTypeError(f"{path}events[{index}].type", event_type.decode(), known)
            if schema.anything:
                continue
            text = arrays.jsonb_value(element)
            value = _decode(text)
            if not schema.validator.is_valid(value):
                errors = schema.errors(value, len(text))
                return InvalidDataError(f"{path}events[{index}].data", event_type.decode(), errors)
        return None


def encode(types: Mapping[str, Any]) -> str:
    """Return `types` as the catalog keeps them: JSON text, the same for what is the same."""
    return _encode(types).decode()


class _Schema:
    """One compiled schema."""

    def __init__(self, event_type: str, schema: Any) -> None:
        self.anything = schema is True or schema == {}
        _bound(event_type, schema)
        self._weight = _weigh(event_type, schema)
        try:
            self.validator = Draft202012Validator(
                schema,
                offline=True,  # a schema reaches neither network nor files
                pattern_options=RegexOptions(),  # linear time, whatever pattern and data are
                validate_formats=True,
                ignore_unknown_formats=False,
            )
        except jsonschema_rs.ValidationError as error:
            raise SchemaError(event_type, _pointer(error.instance_path), _why(error)) from error
        except ValueError as error:
            raise SchemaError(event_type, "", str(error)) from error

    def errors(self, value: Any, size: int) -> list[tuple[str, str]]:
        """Return pointer and reason of the first errors of `value` (of `size` bytes); none where it took too long."""
        work, recursion = self._weight.subschemas * (1 + size // 4), self._weight.recursions
        if recursion > 1:
            # `is_valid` remembers what it looked at; to tell why, every way through a recursive schema is gone.
            work *= recursion ** min(_depth(value), 20)
        if work <= _TELLING:
            found: Iterable[tuple[str, str]] = (
                (error["instanceLocation"], error["error"]) for error in self.validator.evaluate(value).errors()
            )
        elif recursion > 1:
            return []
        else:
            try:
                self.validator.validate(value)
            except jsonschema_rs.ValidationError as error:
                found = [(_pointer(error.instance_path), error.message)]
            else:
                return []
        # of a recursive schema the same one may come again and again
        told = dict.fromkeys(
            (pointer, _short(message)) for pointer, message in itertools.islice(found, 20 * TOLD_ERRORS)
        )
        return list(told)[:TOLD_ERRORS]


class _Weight:
    """How much a schema composes to: subschemas in all, and how many ways lead back into a recursion."""

    def __init__(self) -> None:
        self.subschemas = 1
        self.recursions = 0


def _bound(event_type: str, schema: Any) -> None:
    """Refuse what is too large, too deep or no draft 2020-12."""
    if not isinstance(schema, dict | bool):
        raise SchemaError(event_type, "", f"a JSON Schema is an object or a boolean, not {_short(repr(schema))}")
    depth = _depth(schema)
    if depth > MAX_SCHEMA_DEPTH:
        raise SchemaError(event_type, "", f"is nested {depth} deep, at most {MAX_SCHEMA_DEPTH} are taken")
    size = len(_encode(schema))
    if size > MAX_SCHEMA_BYTES:
        raise SchemaError(event_type, "", f"has {size} bytes as compact JSON, at most {MAX_SCHEMA_BYTES} are taken")
    if isinstance(schema, dict) and (dialect := schema.get("$schema", DIALECT)) not in (DIALECT, DIALECT + "#"):
        raise SchemaError(event_type, "/$schema", f"is {dialect!r}; only draft 2020-12 ({DIALECT}) is taken")


def _depth(value: Any) -> int:
    """Return how deep objects and arrays are nested in `value`, without recursion."""
    depth, level = 0, [value]
    while level := [child for node in level for child in _children(node)]:
        depth += 1
    return depth


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _weigh(event_type: str, root: Any) -> _Weight:
    """Return the weight of a schema, which may be malformed still.

    Raises:
        SchemaError: it refers to another document, or composes to over `MAX_SUBSCHEMAS`.
    """
    known: dict[int, _Weight] = {}
    under_way: set[int] = set()
    anchors = {
        node[key]: node
        for node in _nodes(root)
        for key in ("$anchor", "$dynamicAnchor")
        if isinstance(node.get(key), str)
    }

    def weigh(node: Any, pointer: str) -> _Weight:
        weight = _Weight()
        if not isinstance(node, dict):
            return weight
        if id(node) in under_way:
            weight.recursions = 1
            return weight
        if id(node) in known:
            return known[id(node)]
        if "$id" in node and node is not root:
            raise SchemaError(event_type, f"{pointer}/$id", "documents within the schema aren't taken; use $defs")
        if len(under_way) >= MAX_SUBSCHEMA_DEPTH:
            raise SchemaError(event_type, pointer, f"composes over {MAX_SUBSCHEMA_DEPTH} deep with $ref followed")
        under_way.add(id(node))
        for child, place in _applied(node, pointer):
            _add(weight, weigh(child, place))
        for key in ("$ref", "$dynamicRef"):
            if key in node:
                place = f"{pointer}/{key}"
                target = _target(event_type, root, anchors, node[key], place)
                _add(weight, weigh(target, place))
        under_way.discard(id(node))
        if weight.subschemas > MAX_SUBSCHEMAS:
            raise SchemaError(event_type, pointer, f"composes to over {MAX_SUBSCHEMAS} subschemas with $ref followed")
        known[id(node)] = weight
        return weight

    return weigh(root, "")


def _add(weight: _Weight, other: _Weight) -> None:
    weight.subschemas += other.subschemas
    weight.recursions += other.recursions


def _applied(node: dict[str, Any], pointer: str) -> Iterator[tuple[Any, str]]:
    """Yield the subschemas of `node` that apply to an event or a part of it, with their pointers."""
    for key in _SCHEMAS_IN_OBJECT:
        if isinstance(children := node.get(key), dict):
            for name, child in children.items():
                yield child, f"{pointer}/{key}/{_escape(name)}"
    for key in _SCHEMAS_IN_ARRAY:
        if isinstance(children := node.get(key), list):
            for number, child in enumerate(children):
                yield child, f"{pointer}/{key}/{number}"
    for key in _SCHEMA:
        if key in node:
            yield node[key], f"{pointer}/{key}"


def _nodes(root: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects in `root`, subschemas and others."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
        waiting.extend(_children(node))


def _target(event_type: str, root: Any, anchors: Mapping[str, Any], reference: Any, pointer: str) -> Any:
    """Return what a reference within the document leads to."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise SchemaError(
            event_type, pointer, f"leads to {reference!r}, out of the schema; put what it needs into $defs"
        )
    fragment = reference[1:]
    if fragment and not fragment.startswith("/"):
        return anchors.get(fragment, True)
    node = root
    for part in fragment.split("/")[1:]:
        name = _unescape(part)
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict) and name in node:
            node = node[name]
        else:
            raise SchemaError(event_type, pointer, f"leads to {reference!r}, which isn't in the schema")
    return node


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _unescape(part: str) -> str:
    return unquote(part).replace("~1", "/").replace("~0", "~")


def _pointer(path: Iterable[str | int]) -> str:
    return "".join(f"/{_escape(str(part))}" for part in path)


def _short(message: str) -> str:
    return message if len(message) <= TOLD_CHARACTERS else f"{message[: TOLD_CHARACTERS - 1]}…"


def _why(error: jsonschema_rs.ValidationError) -> str:
    message = _short(error.message)
    if message.startswith("Unknown format"):
        return f"{error.instance!r} is no format that is known here: correct it, or leave it out"
    if message.endswith('is not a "regex"'):
        return f"{message} in the syntax of Rust's regex (no look-around, no back-references), or is too large"
    return message
