"""What a Projection declares: streams, key, columns and what each event type does to a row.

The operator parses a resource's spec with `parse`, which refuses what can't work and says where. What it accepted is
stored in the read store as a `VersionDefinition`, from which projector and query service work without the cluster.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from refold.projection import cel
from refold.projection.values import CONVERSIONS

#: What a rule can do to a column; all but `set` depend on what stands there.
OPERATIONS = ("set", "add", "min", "max")
_COLUMN_NAME = r"^[a-z][a-z0-9_]{0,39}$"


class ColumnType(StrEnum):
    """What a column holds; docs/expressions.md tells which values each takes."""

    TEXT = "text"
    INTEGER = "integer"
    NUMERIC = "numeric"
    BOOLEAN = "boolean"
    TIMESTAMP = "timestamp"
    JSON = "json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Column(_Model):
    """One column of the read model. `key` is the row's own and can't be declared."""

    name: Annotated[str, Field(pattern=_COLUMN_NAME)]
    type: ColumnType
    index: bool = False


class FoldRule(_Model):
    """What one event type does to its row: expressions by column, or the row's deletion.

    docs/operations.md tells what each operation does.
    """

    type: Annotated[str, Field(min_length=1, max_length=512)]
    set: dict[str, str] = {}
    add: dict[str, str] = {}
    min: dict[str, str] = {}
    max: dict[str, str] = {}
    delete: bool = False
    when: str | None = None

    def assignments(self) -> Iterator[tuple[str, str, str]]:
        """Yield what the rule does to columns: operation, column, expression."""
        for operation in OPERATIONS:
            for column, source in getattr(self, operation).items():
                yield operation, column, source


class Definition(_Model):
    """The part of a Projection's spec that decides which rows come out."""

    streams: Annotated[list[str], Field(min_length=1)]
    key: str = "subject"
    columns: Annotated[list[Column], Field(max_length=200)] = []
    fold: Annotated[list[FoldRule], Field(min_length=1, max_length=200)]


class StreamRef(_Model):
    """A stream as it was found when the version was made. `event_schema` (JSON: `schema`) is its PostgreSQL schema."""

    namespace: str
    name: str
    incarnation: str
    partitions: int
    topic: str
    event_schema: Annotated[str, Field(alias="schema")]


class VersionDefinition(_Model):
    """What the read store's `versions.definition` holds, as JSON."""

    definition: Definition
    streams: list[StreamRef]

    def to_json(self) -> str:
        """Return the JSON text for `versions.definition`."""
        return self.model_dump_json(by_alias=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> "VersionDefinition":
        """Return what `to_json` wrote.

        Raises:
            pydantic.ValidationError: the text is something else.
        """
        return cls.model_validate_json(text)


class Problem(NamedTuple):
    """Why a definition can't work, and the way out.

    `path` is like `spec.fold[1].add.total`; `reason` is a CamelCase word for conditions; `line` and `column` (1-based)
    stand where an expression is to blame.
    """

    path: str
    reason: str
    message: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        """Return one line that names the field, the place in it and the way out."""
        place = "" if self.line is None else f" (line {self.line}, column {self.column})"
        return f"{self.path}{place}: {self.message}"


class InvalidDefinitionError(ValueError):
    """A definition that can't work; `problems` holds at least one."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(str(problem) for problem in problems))


def parse(spec: Mapping[str, object]) -> Definition:
    """Return the definition in a Projection's `spec` (fields that don't belong to it are left alone).

    Raises:
        InvalidDefinitionError: its form is wrong, or `check` found problems.
    """
    try:
        definition = Definition.model_validate({name: spec[name] for name in Definition.model_fields if name in spec})
    except ValidationError as error:
        raise InvalidDefinitionError([_malformed(details) for details in error.errors()]) from error
    if problems := check(definition):
        raise InvalidDefinitionError(problems)
    return definition


def check(definition: Definition) -> list[Problem]:
    """Return all that keeps `definition` from working; empty where it can be folded."""
    columns = {column.name: column.type.value for column in definition.columns}
    problems = [*_check_names(definition), *_check_key(definition.key)]
    for position, rule in enumerate(definition.fold):
        problems += _check_rule(f"spec.fold[{position}]", rule, columns)
    if not problems:
        single = single_partition(definition)
        problems += _check_merges(definition) if single else _check_several_partitions(definition)
    return problems


def merges(definition: Definition) -> dict[str, str]:
    """Return the columns that take values which join the one before, each with how: `add`, `min` or `max`."""
    return {
        column: operation
        for rule in definition.fold
        for operation, column, _ in rule.assignments()
        if operation != "set"
    }


def single_partition(definition: Definition) -> bool:
    """Return whether each row is fed by one partition only: one stream, keyed by subject.

    Raises:
        CelError: the key is no expression.
    """
    return len(definition.streams) == 1 and cel.check(definition.key).fast == "event.subject"


def _check_names(definition: Definition) -> Iterator[Problem]:
    for position, stream in enumerate(definition.streams):
        if stream in definition.streams[:position]:
            yield Problem(f"spec.streams[{position}]", "Duplicate", f"the stream {stream} stands here twice")
    names: set[str] = set()
    for position, column in enumerate(definition.columns):
        path = f"spec.columns[{position}].name"
        if column.name == "key":
            yield Problem(path, "ReservedName", "every row has its key as `key` already: choose another name")
        if column.name in names:
            yield Problem(path, "Duplicate", f"the column {column.name} stands here twice")
        names.add(column.name)


def _check_key(source: str) -> Iterator[Problem]:
    expression = _compiled("spec.key", source)
    if isinstance(expression, Problem):
        yield expression
    elif not expression.kind & (cel.Kind.STRING | cel.Kind.LIST):
        yield Problem(
            "spec.key",
            "WrongType",
            f"a key is a string or a list of strings, not {expression.kind.title}: use string()",
        )


def _check_rule(path: str, rule: FoldRule, columns: Mapping[str, str]) -> Iterator[Problem]:
    assignments = list(rule.assignments())
    if not (assignments or rule.delete):
        yield Problem(path, "NothingToDo", f"the rule does nothing: give it {', '.join(OPERATIONS)} or delete")
    if rule.delete and assignments:
        yield Problem(f"{path}.delete", "Conflict", "a rule either deletes the row or changes it: make two rules of it")
    if rule.when is not None:
        expression = _compiled(f"{path}.when", rule.when)
        if isinstance(expression, Problem):
            yield expression
        elif not expression.kind & cel.Kind.BOOL:
            yield Problem(f"{path}.when", "WrongType", f"when must be true or false, not {expression.kind.title}")
    used: dict[str, str] = {}
    for operation, column, source in assignments:
        place = f"{path}.{operation}.{column}"
        yield from _check_assignment(place, operation, column, source, columns)
        if (other := used.setdefault(column, operation)) != operation:
            yield Problem(place, "Conflict", f"the rule has {other} for {column} as well: make two rules of it")


def _check_assignment(
    path: str, operation: str, column: str, source: str, columns: Mapping[str, str]
) -> Iterator[Problem]:
    expression = _compiled(path, source)
    if isinstance(expression, Problem):
        yield expression
    if column not in columns:
        there_are = f"there are {', '.join(columns)}" if columns else "there are none"
        yield Problem(path, "UnknownColumn", f"{column} is not in spec.columns ({there_are}): declare it there")
        return
    kind = columns[column]
    if operation not in CONVERSIONS[kind].functions:
        takers = [name for name, conversion in CONVERSIONS.items() if operation in conversion.functions]
        message = f"{operation} needs a column of type {_listed(takers)}, {column} is {kind}"
        yield Problem(path, "WrongColumnType", message)
        return
    takes = CONVERSIONS[kind].kinds
    if operation != "set":
        takes &= ~cel.Kind.NULL
    if isinstance(expression, cel.Expression) and not expression.kind & takes:
        what = f"{column} is {kind}, which takes" if operation == "set" else f"{operation} on {kind} takes"
        way_out = ": use string()" if kind == ColumnType.TEXT else ""
        yield Problem(path, "WrongType", f"{what} {takes.title}, not {expression.kind.title}{way_out}")


def _check_merges(definition: Definition) -> Iterator[Problem]:
    """Refuse two ways to join a column's value with the one before."""
    used: dict[str, str] = {}
    for position, rule in enumerate(definition.fold):
        for operation, column, _ in rule.assignments():
            if operation != "set" and (other := used.setdefault(column, operation)) != operation:
                message = (
                    f"another rule has {other} for {column}: of add, min and max a column takes one, use two columns"
                )
                yield Problem(f"spec.fold[{position}].{operation}.{column}", "Conflict", message)


def _check_several_partitions(definition: Definition) -> Iterator[Problem]:
    """Refuse what depends on an order that events of several partitions don't have."""
    cause = "several streams feed a row" if len(definition.streams) > 1 else "the key is not the subject"
    why = f"{cause}, so its events come from several partitions, which have no common order"
    used: dict[str, str] = {}
    for position, rule in enumerate(definition.fold):
        path = f"spec.fold[{position}]"
        if rule.delete:
            yield Problem(
                f"{path}.delete",
                "NeedsOnePartition",
                f"{why}: set a column such as `deleted` instead, or use one stream with key: subject",
            )
        for operation, column, _ in rule.assignments():
            if (other := used.setdefault(column, operation)) != operation:
                message = f"{why}: all rules for {column} use the same of {_listed(OPERATIONS)}, and one has {other}"
                yield Problem(f"{path}.{operation}.{column}", "NeedsOnePartition", message)


def _compiled(path: str, source: str) -> cel.Expression | Problem:
    try:
        return cel.check(source)
    except cel.CelError as error:
        return Problem(path, "InvalidExpression", error.message, error.line, error.column)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _malformed(details: ErrorDetails) -> Problem:
    """Return pydantic's error as a problem."""
    path = "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"])
    message = details["msg"]
    if details["type"] == "string_type":
        message += ": write expressions and names in quotes"
    elif details["type"] == "extra_forbidden":
        message = "there is no such field: correct its name or remove it"
    elif details["type"] == "string_pattern_mismatch":
        message += ": lower-case letters, digits and _, beginning with a letter, at most 40 characters"
    return Problem(path, "InvalidField", message)


def version_of(
    definition: Definition, streams: Sequence[StreamRef], *, read_store: str = "postgres", rebuild: str = ""
) -> str:
    """Return the version's name: 8 hex digits that change with all that decides which rows come out.

    Args:
        definition: what to fold; indexes and the order of columns and streams don't count.
        streams: the streams as found; a stream that was made anew (another incarnation) gives another version.
        read_store: the read store's type.
        rebuild: the value of the annotation `refold.dev/rebuild`, empty where there is none.
    """
    # Only what differs from its default counts, so that fields added later don't rename the versions of today.
    content = definition.model_dump(mode="json", exclude_defaults=True)
    content["streams"] = sorted([ref.namespace, ref.name, ref.incarnation] for ref in streams)
    content["columns"] = sorted([column.name, column.type.value] for column in definition.columns)
    content["readStore"] = read_store
    content["rebuild"] = rebuild
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()[:8]
