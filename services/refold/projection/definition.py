"""What a Projection declares: streams, key, columns and what each event type does to a row.

The operator parses a resource's spec with `parse`, which refuses what can't work and says where. What it accepted is
stored in the read store as a `VersionDefinition`, from which projector and query service work without the cluster.
"""

import datetime as dt
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

import msgspec
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from refold.projection import cel
from refold.projection.values import CONVERSIONS, Value, to_keys

#: What a rule can do to a column; all but `set` depend on what stands there.
OPERATIONS = ("set", "add", "min", "max", "append")
_COMMUTING = ("set", "add", "min", "max")
_COLUMN_NAME = r"^[a-z][a-z0-9_]{0,39}$"
_FUNCTION = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
_DIGEST = re.compile(r"@(sha256:[0-9a-f]{64})$")


class ColumnType(StrEnum):
    """What a column holds; docs/expressions.md tells which values each takes."""

    TEXT = "text"
    INTEGER = "integer"
    NUMERIC = "numeric"
    BOOLEAN = "boolean"
    TIMESTAMP = "timestamp"
    JSON = "json"


#: What the columns of a row hold, but for null.
_ROW_KINDS = {
    ColumnType.TEXT: cel.Kind.STRING,
    ColumnType.INTEGER: cel.Kind.NUMBER,
    ColumnType.NUMERIC: cel.Kind.NUMBER,
    ColumnType.BOOLEAN: cel.Kind.BOOL,
    ColumnType.TIMESTAMP: cel.Kind.TIMESTAMP,
    ColumnType.JSON: cel.Kind.JSON & ~cel.Kind.NULL,
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Column(_Model):
    """One column of the read model. `key` is the row's own and can't be declared.

    `default` is an expression without event, data and row: what stands in a new row before its first event.
    """

    name: Annotated[str, Field(pattern=_COLUMN_NAME)]
    type: ColumnType
    index: bool = False
    nullable: bool = True
    default: str | None = None


class FoldRule(_Model):
    """What one event type does to its row: expressions by column, or the row's deletion.

    docs/operations.md tells what each operation does.
    """

    type: Annotated[str, Field(min_length=1, max_length=512)]
    set: dict[str, str] = {}
    add: dict[str, str] = {}
    min: dict[str, str] = {}
    max: dict[str, str] = {}
    append: dict[str, str] = {}
    delete: bool = False
    when: str | None = None

    def assignments(self) -> Iterator[tuple[str, str, str]]:
        """Yield what the rule does to columns: operation, column, expression."""
        for operation in OPERATIONS:
            for column, source in getattr(self, operation).items():
                yield operation, column, source


class Handler(_Model):
    """Code in place of key and fold: a function of an image that is built from Refold's (docs/handlers.md).

    `function` is `module:name`, and is called as `name(event, table)`. `version` says which code it is where the image
    is named by a tag. `keys` are those of the rows that an event may change: its own subject's, or any. `adds` are the
    columns that are only ever added to, of rows fed by several partitions; there all others are only ever set.
    """

    image: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^\S+$")]
    function: Annotated[str, Field(max_length=253, pattern=_FUNCTION)]
    version: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    keys: Literal["subject", "any"] = "subject"
    adds: Annotated[list[str], Field(max_length=64)] = []

    @property
    def digest(self) -> str | None:
        """The image's digest, None where it is named by a tag."""
        found = _DIGEST.search(self.image)
        return None if found is None else found[1]

    @property
    def code(self) -> tuple[str | None, str | None, str]:
        """What tells this code from other code: where the image stands, or what its tag is, doesn't count."""
        return self.digest, self.version, self.function


def _in_utc(moment: dt.datetime) -> dt.datetime:
    try:
        return moment.astimezone(dt.UTC)
    except OverflowError:
        raise ValueError("in UTC it is beyond the years 1 to 9999") from None


class Definition(_Model):
    """The part of a Projection's spec that decides which rows come out.

    Either `fold` or `handler` says what events do to rows. `as_of` (JSON: `asOf`) is the moment of which the read model
    is; None where it follows its streams.
    """

    streams: Annotated[list[str], Field(min_length=1)]
    key: str = "subject"
    columns: Annotated[list[Column], Field(max_length=200)] = []
    fold: Annotated[list[FoldRule], Field(min_length=1, max_length=200)] = []
    handler: Handler | None = None
    # in UTC, so that one moment is one version however it is written
    as_of: Annotated[AwareDatetime, AfterValidator(_in_utc)] | None = Field(default=None, alias="asOf")


class StreamRef(_Model):
    """A stream as it was found when the version was made. `event_schema` (JSON: `schema`) is its PostgreSQL schema."""

    namespace: str
    name: str
    incarnation: str
    partitions: int
    topic: str
    event_schema: Annotated[str, Field(alias="schema")]


class VersionDefinition(_Model):
    """What the read store's `versions.definition` holds, as JSON.

    `ends` has, where the definition is as of a moment, each stream's last positions until then: by incarnation, in the
    order of the partitions. Nothing beyond them is folded.
    """

    definition: Definition
    streams: list[StreamRef]
    ends: dict[str, list[int]] = {}

    def to_json(self) -> str:
        """Return the JSON text for `versions.definition`."""
        # Without defaults, so that a process of an earlier Refold can read what uses nothing new.
        return self.model_dump_json(by_alias=True, exclude_defaults=True)

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
        fields = [field.alias or name for name, field in Definition.model_fields.items()]
        definition = Definition.model_validate({name: spec[name] for name in fields if name in spec})
    except ValidationError as error:
        raise InvalidDefinitionError([malformed(details) for details in error.errors()]) from error
    if problems := check(definition):
        raise InvalidDefinitionError(problems)
    return definition


def check(definition: Definition) -> list[Problem]:
    """Return all that keeps `definition` from working; empty where it can be folded."""
    columns = {column.name: column for column in definition.columns}
    problems = [*_check_columns(definition), *_check_key(definition.key)]
    if definition.handler is not None:
        return [*problems, *_check_handler(definition, definition.handler)]
    if not definition.fold:
        message = "nothing says what events do to a row: give it entries, or code in spec.handler"
        return [*problems, Problem("spec.fold", "NothingToDo", message)]
    row = row_fields(definition)
    for position, rule in enumerate(definition.fold):
        problems += _check_rule(f"spec.fold[{position}]", rule, columns, row)
    if not problems and not single_partition(definition):
        problems += _check_several_partitions(definition)
    return problems


def row_fields(definition: Definition) -> dict[str, tuple[str, cel.Kind]]:
    """Return what expressions know as `row`: by column the Python that reads it, and its kinds."""
    fields = {}
    for column in definition.columns:
        python, kind = f"row[{column.name!r}]", _ROW_KINDS[column.type]
        if column.type == ColumnType.JSON:
            python = f"_parsed({python})"
        fields[column.name] = (python, kind | cel.Kind.NULL if column.nullable else kind)
    return fields


def default_of(column: Column) -> Value:
    """Return what stands in the column of a new row.

    Raises:
        CelError: the default is no expression.
        EvaluationError: it has no value, or none that the column takes.
    """
    if column.default is None:
        return None
    return CONVERSIONS[column.type].functions["set"](cel.function(column.default)(None, None, None))


def read_columns(definition: Definition) -> list[str]:
    """Return the columns of which a fold must know what stands in the row before, in the order of their declaration.

    Without them a fold needs to know nothing: sums, the least and the greatest can join the value before where it
    stands. It has to know what `row` looks at, an array that is appended to (whose bound counts), and what takes
    several operations that don't commute or begins with a default.
    """
    if not single_partition(definition):
        return []
    if definition.handler is not None:  # nobody knows what it looks at
        return [column.name for column in definition.columns]
    row = row_fields(definition)
    used: set[str] = set()
    operations: dict[str, set[str]] = {column.name: set() for column in definition.columns}
    for rule in definition.fold:
        sources = [] if rule.when is None else [rule.when]
        for operation, name, source in rule.assignments():
            sources.append(source)
            if operation != "set":
                operations[name].add(operation)
        for source in sources:
            used |= cel.check(source, row=row).row_columns
    for column in definition.columns:
        joins = operations[column.name]
        begins = default_of(column) is not None and not (joins == {"add"} and default_of(column) == 0)
        if "append" in joins or len(joins) > 1 or (joins and begins):
            used.add(column.name)
    return [column.name for column in definition.columns if column.name in used]


def merges(definition: Definition) -> dict[str, str]:
    """Return the columns that take values which join the one before in the read store, each with how: add, min, max."""
    if definition.handler is not None:
        return dict.fromkeys(definition.handler.adds, "add")
    read = read_columns(definition)
    return {
        column: operation
        for rule in definition.fold
        for operation, column, _ in rule.assignments()
        if operation != "set" and column not in read
    }


def single_partition(definition: Definition) -> bool:
    """Return whether each row is fed by one partition only: one stream, keyed by subject.

    Raises:
        CelError: the key is no expression.
    """
    if definition.handler is not None:
        return len(definition.streams) == 1 and definition.handler.keys == "subject"
    return len(definition.streams) == 1 and cel.check(definition.key).fast == "event.subject"


def stamped(definition: Definition) -> list[str]:
    """Return the columns that have the stamp of who set them beside them, in the order of their declaration."""
    if single_partition(definition):
        return []
    if definition.handler is not None:
        return [column.name for column in definition.columns if column.name not in definition.handler.adds]
    set_somewhere = {column for rule in definition.fold for column in rule.set}
    return [column.name for column in definition.columns if column.name in set_somewhere]


def _check_columns(definition: Definition) -> Iterator[Problem]:
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
        yield from _check_default(f"spec.columns[{position}]", column)


def _check_default(path: str, column: Column) -> Iterator[Problem]:
    if column.default is not None:
        path = f"{path}.default"
        expression = _compiled(path, column.default)
        if isinstance(expression, Problem):
            yield expression
            return
        if not expression.constant:
            yield Problem(path, "NotConstant", "a default is the same for all rows: it can't look at the event")
            return
        if not _fits(expression.kind, CONVERSIONS[column.type].kinds):
            yield _wrong_type(path, column, "set", expression.kind)
            return
        try:
            value = default_of(column)
        except cel.EvaluationError as error:
            yield Problem(path, "InvalidDefault", error.message, error.line, error.column)
            return
    else:
        value = None
    if value is None and not column.nullable:
        message = "a row may begin with an event that doesn't set the column: give it a default, or let it be null"
        yield Problem(path, "NeedsDefault", message)


def _check_key(source: str) -> Iterator[Problem]:
    expression = _compiled("spec.key", source)
    if isinstance(expression, Problem):
        yield expression
        return
    whole = [(expression.kind, (None, None))] if not expression.kind & (cel.Kind.STRING | cel.Kind.LIST) else []
    items = [(kind, at) for kind, at in expression.items if not kind & cel.Kind.STRING]
    for kind, at in [*whole, *items]:
        message = f"a key is a string or a list of strings, not {kind.title}: use string()"
        yield Problem("spec.key", "WrongType", message, *at)
    if not (whole or items):
        yield from _check_constant("spec.key", expression, to_keys)


def _check_handler(definition: Definition, handler: Handler) -> Iterator[Problem]:
    if definition.fold:
        message = "spec.fold says what events do to rows already: remove either of them"
        yield Problem("spec.handler", "Conflict", message)
    if definition.key != "subject":
        message = "a handler names the keys itself: remove spec.key, and say in spec.handler.keys whether they are any"
        yield Problem("spec.key", "Conflict", message)
    if handler.digest is None and handler.version is None:
        message = (
            f"{handler.image} is a tag, which may name other code tomorrow: name the image by its digest "
            "(…@sha256:…), or say in spec.handler.version which code it is"
        )
        yield Problem("spec.handler.image", "NeedsVersion", message)
    columns = {column.name: column for column in definition.columns}
    if not columns:
        yield Problem("spec.columns", "NothingToDo", "a handler sets columns: declare at least one")
    for position, name in enumerate(handler.adds):
        path = f"spec.handler.adds[{position}]"
        if name in handler.adds[:position]:
            yield Problem(path, "Duplicate", f"the column {name} stands here twice")
        elif name not in columns:
            yield Problem(path, "UnknownColumn", f"{name} is not in spec.columns: declare it there")
        elif "add" not in CONVERSIONS[columns[name].type].functions:
            message = f"add needs a column of type integer or numeric, {name} is {columns[name].type}"
            yield Problem(path, "WrongColumnType", message)
    if handler.adds and single_partition(definition):
        message = "each row is fed by one partition, where every column may be set and added to: remove it"
        yield Problem("spec.handler.adds", "Conflict", message)


def _check_rule(
    path: str, rule: FoldRule, columns: Mapping[str, Column], row: Mapping[str, tuple[str, cel.Kind]]
) -> Iterator[Problem]:
    assignments = list(rule.assignments())
    if not (assignments or rule.delete):
        yield Problem(path, "NothingToDo", f"the rule does nothing: give it {', '.join(OPERATIONS)} or delete")
    if rule.delete and assignments:
        yield Problem(f"{path}.delete", "Conflict", "a rule either deletes the row or changes it: make two rules of it")
    if rule.when is not None:
        expression = _compiled(f"{path}.when", rule.when, row)
        if isinstance(expression, Problem):
            yield expression
        elif not expression.kind & cel.Kind.BOOL:
            yield Problem(f"{path}.when", "WrongType", f"when must be true or false, not {expression.kind.title}")
        else:
            yield from _check_constant(f"{path}.when", expression)
    used: dict[str, str] = {}
    for operation, column, source in assignments:
        place = f"{path}.{operation}.{column}"
        expression = _compiled(place, source, row)
        if isinstance(expression, Problem):
            yield expression
        if column not in columns:
            there_are = f"there are {', '.join(columns)}" if columns else "there are none"
            yield Problem(place, "UnknownColumn", f"{column} is not in spec.columns ({there_are}): declare it there")
        elif operation not in CONVERSIONS[columns[column].type].functions:
            takers = [name for name, conversion in CONVERSIONS.items() if operation in conversion.functions]
            message = f"{operation} needs a column of type {_listed(takers)}, {column} is {columns[column].type}"
            yield Problem(place, "WrongColumnType", message)
        elif isinstance(expression, cel.Expression) and not _fits(expression.kind, _taken(columns[column], operation)):
            yield _wrong_type(place, columns[column], operation, expression.kind)
        elif isinstance(expression, cel.Expression):
            yield from _check_constant(place, expression, CONVERSIONS[columns[column].type].functions[operation])
        if (other := used.setdefault(column, operation)) != operation:
            yield Problem(place, "Conflict", f"the rule has {other} for {column} as well: make two rules of it")


def _check_constant(
    path: str, expression: cel.Expression, take: Callable[[object], object] = lambda value: value
) -> Iterator[Problem]:
    """Refuse what is the same for all events and has no value, or none that `take` takes: all would be parked."""
    if expression.constant:
        try:
            take(cel.function(expression.source)(None, None, None))
        except cel.EvaluationError as error:
            yield Problem(path, "InvalidValue", error.message, error.line, error.column)


def _taken(column: Column, operation: str) -> cel.Kind:
    """Return the kinds that an operation takes on a column."""
    kinds = CONVERSIONS[column.type].kinds
    null = column.nullable if operation == "set" else operation == "append"
    return kinds if null else kinds & ~cel.Kind.NULL


def _fits(kind: cel.Kind, taken: cel.Kind) -> bool:
    """Return whether a value of `kind` may be taken, and not only where it is null."""
    return bool(kind & taken & ~cel.Kind.NULL) or (kind == cel.Kind.NULL and bool(taken & kind))


def _wrong_type(path: str, column: Column, operation: str, kind: cel.Kind) -> Problem:
    what = f"{column.name} is {column.type}, which" if operation == "set" else f"{operation} on {column.type}"
    way_out = ": use string()" if column.type == ColumnType.TEXT and kind != cel.Kind.NULL else ""
    message = f"{what} takes {_taken(column, operation).title}, not {kind.title}{way_out}"
    return Problem(path, "WrongType", message)


def _check_several_partitions(definition: Definition) -> Iterator[Problem]:
    """Refuse what depends on an order that events of several partitions don't have."""
    cause = "several streams feed a row" if len(definition.streams) > 1 else "the key is not the subject"
    why = f"{cause}, so its events come from several partitions, which have no common order"
    used: dict[str, str] = {}
    row = row_fields(definition)
    for position, rule in enumerate(definition.fold):
        path = f"spec.fold[{position}]"
        if rule.delete:
            yield Problem(
                f"{path}.delete",
                "NeedsOnePartition",
                f"{why}: set a column such as `deleted` instead, or use one stream with key: subject",
            )
        if rule.when is not None:
            yield from _check_row(f"{path}.when", rule.when, why, row)
        for operation, column, source in rule.assignments():
            place = f"{path}.{operation}.{column}"
            yield from _check_row(place, source, why, row)
            if operation == "append":
                message = f"{why}: make rows of what is appended, or use one stream with key: subject"
                yield Problem(place, "NeedsOnePartition", message)
            elif (other := used.setdefault(column, operation)) != operation:
                message = f"{why}: all rules for {column} use the same of {_listed(_COMMUTING)}, and one has {other}"
                yield Problem(place, "NeedsOnePartition", message)


def _check_row(path: str, source: str, why: str, row: Mapping[str, tuple[str, cel.Kind]]) -> Iterator[Problem]:
    if (at := cel.check(source, row=row).row_at) is not None:
        message = f"{why}: there is no row before the event to look at, use one stream with key: subject"
        yield Problem(path, "NeedsOnePartition", message, *at)


def _compiled(
    path: str, source: str, row: Mapping[str, tuple[str, cel.Kind]] | None = None
) -> cel.Expression | Problem:
    try:
        return cel.check(source, row=row)
    except cel.CelError as error:
        return Problem(path, "InvalidExpression", error.message, error.line, error.column)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


#: What the fields that have a pattern look like, in words.
_FORMS = {
    "name": "lower-case letters, digits and _, beginning with a letter, at most 40 characters",
    "function": "the module and the function in it, like acme.orders:project",
    "image": "an image's name has no blanks",
}


def malformed(details: ErrorDetails) -> Problem:
    """Return pydantic's error about a spec as a problem."""
    path = "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"])
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "string_type":
        message += ": write expressions and names in quotes"
    elif details["type"] == "extra_forbidden":
        message = "there is no such field: correct its name or remove it"
    elif details["type"] == "string_pattern_mismatch":
        message += f": {_FORMS[str(details['loc'][-1])]}"
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
    content["columns"] = sorted(
        [column.name, *column.model_dump(mode="json", exclude_defaults=True, exclude={"name", "index"}).values()]
        for column in definition.columns
    )
    if definition.handler is not None:
        handler = definition.handler
        content["handler"] = [*handler.code, handler.keys, sorted(handler.adds)]
    content["readStore"] = read_store
    content["rebuild"] = rebuild
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()[:8]
