"""What a Projection declares: streams, key, columns and what each event type does to a row.

The operator parses a resource's spec with `parse`, which refuses what can't work and says where. What it accepted is
stored in the read store as a `VersionDefinition`, from which projector and query service work without the cluster.
"""

import hashlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec
from pydantic import BaseModel, ConfigDict, Field

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
    """What one event type does to its row: expressions by column, or the row's deletion."""

    type: Annotated[str, Field(min_length=1, max_length=512)]
    set: dict[str, str] = {}
    add: dict[str, str] = {}
    delete: bool = False
    when: str | None = None


class Definition(_Model):
    """The part of a Projection's spec that decides which rows come out."""

    streams: Annotated[list[str], Field(min_length=1)]
    key: str = "subject"
    columns: list[Column] = []
    fold: Annotated[list[FoldRule], Field(min_length=1)]


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
    definition = Definition.model_validate({name: spec[name] for name in Definition.model_fields if name in spec})
    if problems := check(definition):
        raise InvalidDefinitionError(problems)
    return definition


def check(definition: Definition) -> list[Problem]:
    """Return all that keeps `definition` from working; empty where it can be folded."""
    return []


def single_partition(definition: Definition) -> bool:
    """Return whether each row is fed by one partition only: one stream, keyed by subject."""
    return len(definition.streams) == 1 and definition.key.strip() in ("subject", "event.subject")


def version_of(
    definition: Definition, streams: Sequence[StreamRef], *, read_store: str = "postgres", rebuild: str = ""
) -> str:
    """Return the version's name: 8 hex digits that change with all that decides which rows come out.

    Args:
        definition: what to fold; indexes and the order of columns don't count.
        streams: the streams as found; a stream that was made anew (another incarnation) gives another version.
        read_store: the read store's type.
        rebuild: the value of the annotation `refold.dev/rebuild`, empty where there is none.
    """
    # Only what differs from its default counts, so that fields added later don't rename the versions of today.
    content = definition.model_dump(mode="json", exclude_defaults=True)
    content["streams"] = [[ref.namespace, ref.name, ref.incarnation] for ref in streams]
    content["columns"] = sorted(([column.name, column.type.value] for column in definition.columns))
    content["readStore"] = read_store
    content["rebuild"] = rebuild
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()[:8]
