"""The compiled fold: events in, one change per row out. Pure: no I/O, no clock.

How the projector uses it, once per transaction:

    fold = compile_fold(version.definition)                  # once per process
    before = rows.read(keys, fold.reads)                     # only where fold.reads names columns
    batch = fold.batch(parked, before)                       # what is parked already, see `Parked`
    batch.fold(incarnation, events)                          # as often as wanted; the events of a partition in order
    batch.changes                                            # {key: RowChange}: one upsert or delete each
    batch.parked                                             # [ParkedEvent]: to be written in the same transaction

A batch whose transaction failed is thrown away; `fold` itself holds no state. A row that the read store refuses (a sum
beyond 64 bits) is found by folding smaller batches; its key then goes into `Parked.rows`, and its event comes back in
`batch.parked`.

How a `RowChange` becomes SQL (`old` is the row before, which the fold never needs to know):

    not exists_after                      delete
    exists_after and deleted_first        the new row is `set`, all other columns hold their defaults (`merge` is empty)
    exists_after and not deleted_first    a column in `set` takes that value, one in `merge` what `definition.merges`
                                          says of old and value (the sum, the least, the greatest; the value where
                                          old is NULL), the others keep theirs; where there was no row, old is the
                                          column's default

What the fold needs to know of `old` (`definition.read_columns`: what `row` looks at, arrays that are appended to) is
read before: the rows of all keys of a batch, which nobody else may change until the batch is written. Such a fold is of
rows fed by one partition, whose key is the subject; the columns that it reads are only ever set.

A row fed by several partitions (`not fold.single_partition`) is never deleted, and each of its set columns has a stamp
in `stamps`: the column takes the value only where the stamp is greater than the one kept beside it (or none is kept).
Stamps compare as (recorded_at, incarnation in byte order, partition, position).

For each event type one Python function is generated. It decodes of the data only what is needed, where that is known
before, and evaluates all conditions and values before it touches a row: an event's effect on a row is all or nothing.
Where anything fails, `Batch._explain` evaluates the event again in the exact form of its expressions, and applies it
after all or parks it.
"""

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, Inexact, InvalidOperation, Overflow
from typing import Any, NamedTuple, NoReturn, cast

import msgspec

from refold.events import Event
from refold.projection import cel
from refold.projection.definition import (
    Column,
    ColumnType,
    Definition,
    FoldRule,
    InvalidDefinitionError,
    check,
    default_of,
    merges,
    read_columns,
    row_fields,
    single_partition,
)
from refold.projection.values import (
    CONVERSIONS,
    Value,
    appended,
    integer_total,
    not_null,
    to_boolean,
    to_integer,
    to_key,
    to_keys,
    to_moment,
)

#: Sums of numeric values (at most 100 digits before and 199 after the point) never need more than this.
_SUM = Context(prec=400, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[Inexact, InvalidOperation, Overflow])

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)


class Stamp(NamedTuple):
    """Which event set a column; of two, the greater one wins."""

    recorded_at: dt.datetime
    incarnation: str
    partition: int
    position: int

    @property
    def text(self) -> str:
        """The stamp as text that is ordered, byte by byte, as stamps are."""
        micros = (self.recorded_at - _EPOCH) // _MICROSECOND
        return f"{micros:017d}{self.incarnation}{self.partition:05d}{self.position:016d}"


class RowChange(msgspec.Struct):
    """What one batch does to one row; the module's docstring tells how to apply it."""

    key: str
    deleted_first: bool = False
    exists_after: bool = True
    set: dict[str, Value] = {}
    merge: dict[str, Value] = {}
    stamps: dict[str, Stamp] = {}


class ParkedEvent(msgspec.Struct, frozen=True):
    """An event without effect on a row, since it failed, or follows one of the row and partition that did.

    `key` is None where the key itself failed: then the subject is parked, and its later events follow.
    """

    incarnation: str
    event: Event
    key: str | None
    error: str


class Parked(msgspec.Struct):
    """What is parked already, by (incarnation, partition, key) and by (incarnation, partition, subject)."""

    rows: set[tuple[str, int, str]] = msgspec.field(default_factory=set)
    subjects: set[tuple[str, int, str]] = msgspec.field(default_factory=set)


#: What a generated module makes for a batch: by event type, the fold of an event and the effect of its values on a row.
_Handlers = tuple[Callable[[Event], None], Callable[..., None]]


#: What stands in rows, by key and column, of the columns that are read; a key that is missing has no row.
Before = Mapping[str, Mapping[str, Value]]


class Fold:
    """A compiled definition, free of state.

    `single_partition`: whether each row is fed by one partition only. `reads`: the columns that a batch needs to know
    of the rows before.
    """

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self.single_partition = single_partition(definition)
        self.reads = read_columns(definition)
        self._plan = _Plan(definition, single=self.single_partition, reads=self.reads)

    def batch(self, parked: Parked | None = None, before: Before | None = None) -> "Batch":
        """Return an empty batch that respects what is `parked`, which is read only.

        `before` holds the rows of all subjects of the batch's events, where the fold `reads` columns.
        """
        return Batch(self._plan, parked or Parked(), before or {})


class Batch:
    """The events of one transaction, folded to one change a row.

    `changes` holds them by key, `parked` the events that had no effect on a row and are to be parked, in order.
    """

    def __init__(self, plan: "_Plan", parked: Parked, before: Before) -> None:
        self.changes: dict[str, RowChange] = {}
        self.parked: list[ParkedEvent] = []
        self._plan = plan
        self._before = before
        self._parked = Parked(set(parked.rows), set(parked.subjects))
        self._handlers: dict[str, dict[str, _Handlers]] = {}

    def fold(self, incarnation: str, events: Iterable[Event]) -> None:
        """Fold `events` of the stream `incarnation`; those of one partition in order of position."""
        handlers = self._handlers.get(incarnation)
        if handlers is None:
            handlers = self._plan.bind(self.changes, self._parked, incarnation, self._row)
            self._handlers[incarnation] = handlers
        for event in events:
            handler = handlers.get(event.type)
            if handler is None:
                continue
            try:
                handler[0](event)
            except cel.FAILURES:
                self._explain(incarnation, event, handler[1])

    def _row(self, key: str) -> Mapping[str, Value]:
        """Return the columns that are read, as they stand now."""
        defaults = self._plan.defaults
        change = self.changes.get(key)
        if change is None:
            return {**defaults, **self._before.get(key, {})}
        if change.deleted_first:
            return {**defaults, **change.set}
        return {**defaults, **self._before.get(key, {}), **change.set}

    def _explain(self, incarnation: str, event: Event, apply: Callable[..., None]) -> None:
        """Fold an event whose fast function failed: apply it after all, or park it with the reason."""
        plan = self._plan.types[event.type]
        failure: str | None = None
        data = metadata = row = None
        conditions: list[bool] = []
        try:
            data, metadata = plan.decode(event)
            row = self._row(event.subject) if plan.uses_row else None
            conditions = [rule.condition(event, data, metadata, row) for rule in plan.rules]
            if not any(conditions):
                return
        except cel.FAILURES as error:
            failure = _reason(error)

        subject = (incarnation, event.partition, event.subject)
        if subject in self._parked.subjects:
            self._park(incarnation, event, None, "follows an event of its subject that is parked")
            return
        try:
            keys = self._plan.keys(event, data, metadata)
        except cel.FAILURES as error:
            self._parked.subjects.add(subject)
            self._park(incarnation, event, None, f"key: {_reason(error)}" if failure is None else failure)
            return

        values: list[Value] = []
        if failure is None:
            try:
                for rule, applies in zip(plan.rules, conditions, strict=True):
                    values += rule.values(event, data, metadata, row) if applies else rule.nothing
            except cel.FAILURES as error:
                failure = _reason(error)
        for key in keys:
            place = (incarnation, event.partition, key)
            if place in self._parked.rows:
                self._park(incarnation, event, key, failure or "follows an event of its row that is parked")
                continue
            reason = failure
            if reason is None:
                try:
                    apply(event, key, *conditions, *values)
                    continue
                except cel.EvaluationError as error:  # only where columns are read, and then without any effect
                    reason = str(error)
            self._parked.rows.add(place)
            self._park(incarnation, event, key, reason)

    def _park(self, incarnation: str, event: Event, key: str | None, error: str) -> None:
        self.parked.append(ParkedEvent(incarnation, event, key, error))


def compile_fold(definition: Definition) -> Fold:
    """Return the compiled fold of `definition`.

    Raises:
        InvalidDefinitionError: `check` finds problems.
    """
    assert definition.handler is None, "refold.projection.handler folds by code"
    if problems := check(definition):
        raise InvalidDefinitionError(problems)
    return Fold(definition)


def total(one: int | Decimal | None, other: int | Decimal) -> int | Decimal:
    """Return the exact sum of two values of a column; null counts as 0."""
    if type(one) is int and type(other) is int:
        return one + other
    return _SUM.add(one or 0, other)


def least(one: Any, other: Any) -> Any:
    """Return the lesser of two values of a column; `one` where they are equal, `other` where `one` is null."""
    return other if one is None or other < one else one


def greatest(one: Any, other: Any) -> Any:
    """Return the greater of two values of a column, as `least`."""
    return other if one is None or other > one else one


#: What becomes of a column's value (null where there is none) and one that an operation brings, which is never null.
JOINS: Mapping[str, Callable[[Any, Any], Any]] = {"add": total, "min": least, "max": greatest}


def joined(operation: str, type_: ColumnType, one: Value, other: Value) -> Value:
    """Return what becomes of a column's value `one`, null where there is none, and one that an operation brings.

    Raises:
        EvaluationError: a sum is beyond what the column holds.
    """
    try:
        found = cast("Value", JOINS[operation](one, other))
    except ArithmeticError as error:
        raise cel.EvaluationError("the sum has more digits than a numeric column keeps") from error
    # null and an integer come to a decimal
    return to_integer(found) if type_ is ColumnType.INTEGER else found


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, cel.EvaluationError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class _Effect:
    """One column of one rule."""

    path: str
    operation: str
    column: str
    expression: cel.Expression
    convert: Callable[[object], Value]

    def constant(self) -> tuple[Value] | None:
        """Return the value where it is the same for all events and can be taken, in a tuple."""
        if not self.expression.constant:
            return None
        try:
            return (self.convert(cel.python_function(self.expression, self.expression.exact)(None, None, None)),)
        except cel.FAILURES:
            return None  # each event is bad, and tells why

    def python(self, expression: str) -> str:
        """Return the Python of the value, of one form of its expression."""
        if (self.convert, self.expression.kind) in _TAKEN_AS_THEY_ARE:
            return expression
        return f"_{self.convert.__name__}({expression})"


#: What needs no look at the value, since it can be of one kind only.
_TAKEN_AS_THEY_ARE = ((to_moment, cel.Kind.TIMESTAMP), (to_boolean, cel.Kind.BOOL))
_RowFields = Mapping[str, tuple[str, cel.Kind]]


class _RulePlan:
    """A rule with its expressions checked."""

    def __init__(self, position: int, rule: FoldRule, columns: Mapping[str, Column], row: _RowFields) -> None:
        path = f"fold[{position}]"
        self.delete = rule.delete
        self.when = None if rule.when is None else cel.check(rule.when, prefix=f"w{position}_", row=row)
        self.effects: list[_Effect] = []
        for operation, column, source in rule.assignments():
            convert = CONVERSIONS[columns[column].type].functions[operation]
            expression = cel.check(source, prefix=f"e{position}_{len(self.effects)}_", row=row)
            if operation == "set" and not columns[column].nullable and expression.kind & cel.Kind.NULL:
                convert = not_null(convert)
            self.effects.append(_Effect(f"{path}.{operation}.{column}", operation, column, expression, convert))
        self.nothing: list[Value] = [None] * len(self.effects)
        self._when = None if self.when is None else cel.python_function(self.when, self.when.exact)
        self._exact = [cel.python_function(effect.expression, effect.expression.exact) for effect in self.effects]
        self._path = path

    @property
    def expressions(self) -> list[cel.Expression]:
        own = [effect.expression for effect in self.effects]
        return own if self.when is None else [self.when, *own]

    def condition(self, event: Event, data: object, metadata: object, row: object) -> bool:
        """Return whether the rule applies, with an error that names it."""
        if self._when is None:
            return True
        try:
            result = self._when(event, data, metadata, row)
            if result is True or result is False:
                return result
        except cel.FAILURES as error:
            raise cel.EvaluationError(f"{self._path}.when: {_reason(error)}") from error
        raise cel.EvaluationError(f"{self._path}.when: expected true or false, not {cel.describe(result)}")

    def values(self, event: Event, data: object, metadata: object, row: object) -> list[Value]:
        """Return the columns' values in order, with an error that names the column."""
        found: list[Value] = []
        for effect, exact in zip(self.effects, self._exact, strict=True):
            try:
                found.append(effect.convert(exact(event, data, metadata, row)))
            except cel.FAILURES as error:
                raise cel.EvaluationError(f"{effect.path}: {_reason(error)}") from error
        return found


class _TypePlan:
    """The rules of one event type.

    `paths` are the fields of data that are read of each event, by the names that stand for them; `whole`: whether
    something else of data is needed as well.
    """

    def __init__(self, rules: list[_RulePlan], key: cel.Expression) -> None:
        self.rules = rules
        certain = [rule.when for rule in rules if rule.when is not None]
        perhaps: list[cel.Expression] = []
        for rule in rules:
            (certain if rule.when is None else perhaps).extend(effect.expression for effect in rule.effects)
        self.always = any(rule.when is None for rule in rules)
        (certain if self.always else perhaps).append(key)
        self.paths = {name: path for expression in certain for name, path in expression.paths.items()}
        self.whole = any(one.hoisted_uses_data for one in certain) or any(one.uses_data for one in perhaps)
        expressions = [key, *(expression for rule in rules for expression in rule.expressions)]
        self.uses_data = any(expression.uses_data for expression in expressions)
        self.uses_metadata = any(expression.uses_metadata for expression in expressions)
        self.uses_row = any(expression.row_columns for expression in expressions)

    def decode(self, event: Event) -> tuple[object, object]:
        """Return the event's data and metadata as far as they are needed."""
        try:
            data = decode(event.data) if self.uses_data else None
            metadata = decode(event.metadata) if self.uses_metadata and event.metadata is not None else {}
        except cel.FAILURES as error:
            raise cel.EvaluationError(f"the event's data or metadata can't be read: {error}") from error
        return data, metadata


def _decoder(paths: Iterable[tuple[str, ...]]) -> tuple[Callable[[msgspec.Raw], Any], dict[tuple[str, ...], str]]:
    """Return a decoder of nothing but some fields of data, all of which must be there, and the Python that reads each.

    A field of data is an attribute of the decoded; what lies within one that is needed as a whole is an item of it.
    """
    wanted = set(paths)

    def structure(prefix: tuple[str, ...]) -> type:
        inner = sorted({path[len(prefix)] for path in wanted if path[: len(prefix)] == prefix})
        fields = [
            (f"f{number}", Any if (*prefix, name) in wanted else structure((*prefix, name)))
            for number, name in enumerate(inner)
        ]
        for number, name in enumerate(inner):
            attributes[(*prefix, name)] = f"f{number}"
        renamed = {f"f{number}": name for number, name in enumerate(inner)}
        return msgspec.defstruct("Data", fields, rename=renamed, gc=False)

    attributes: dict[tuple[str, ...], str] = {}
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(structure(()), float_hook=Decimal)
    read = {}
    for path in wanted:
        python = "data"
        for end in range(1, len(path) + 1):
            attribute = attributes.get(path[:end])
            python += f"[{path[end - 1]!r}]" if attribute is None else f".{attribute}"
        read[path] = python
    return decoder.decode, read


#: JSON to values: numbers with a fraction or an exponent become Decimal, so that nothing is lost.
decode = msgspec.json.Decoder(float_hook=Decimal).decode


class _Plan:
    """All that is known before an event comes, and the Python that is generated from it."""

    def __init__(self, definition: Definition, *, single: bool, reads: Sequence[str]) -> None:
        self.single = single
        self.columns = {column.name: column for column in definition.columns}
        self.merges = merges(definition)
        self.deletes = any(rule.delete for rule in definition.fold)
        self.sets = {column for rule in definition.fold for column in rule.set}
        self.defaults: dict[str, Value] = {name: default_of(self.columns[name]) for name in reads}
        key = cel.check(definition.key, prefix="k")
        self.key = key
        self._exact_key = cel.python_function(key, key.exact)
        row = row_fields(definition)
        rules: dict[str, list[_RulePlan]] = {}
        for position, rule in enumerate(definition.fold):
            rules.setdefault(rule.type, []).append(_RulePlan(position, rule, self.columns, row))
        self.types = {name: _TypePlan(found, key) for name, found in rules.items()}
        self._bind = self._generate()

    def keys(self, event: Event, data: object, metadata: object) -> list[str]:
        """Return the keys of the rows that the event goes to."""
        return to_keys(self._exact_key(event, data, metadata))

    def bind(
        self, changes: dict[str, RowChange], parked: Parked, incarnation: str, row: Callable[[str], Mapping[str, Value]]
    ) -> dict[str, _Handlers]:
        """Return the generated functions by event type, bound to a batch."""
        functions = self._bind(changes, parked.rows, parked.subjects, incarnation, row)
        return dict(zip(self.types, functions, strict=True))

    def _generate(self) -> Callable[..., list[_Handlers]]:
        namespace: dict[str, object] = {
            **cel.HELPERS,
            **self.key.constants,
            "_decode": decode,
            "_to_key": to_key,
            "_to_keys": to_keys,
            **{f"_join_{operation}": join for operation, join in JOINS.items()},
            "_join_append": appended,
            "_join_integer": integer_total,
            "_refused": _refused,
            "_row": RowChange,
            "_stamp": Stamp,
            "_parked_error": _ParkedError,
            "defaults": self.defaults,
        }
        source = _Source()
        source.line("def bind(rows, parked_rows, parked_subjects, incarnation, row_before):")
        with source:
            for number, plan in enumerate(self.types.values()):
                for rule in plan.rules:
                    for expression in rule.expressions:
                        namespace.update(expression.constants)
                    for effect in rule.effects:
                        namespace[f"_{effect.convert.__name__}"] = effect.convert
                self._write_apply(source, number, plan)
                self._write_fold(source, number, plan, namespace)
            functions = ", ".join(f"(fold{number}, apply{number})" for number in range(len(self.types)))
            source.line(f"return [{functions}]")
        # The source holds nothing of the user's but names and literals that parser and emitter have read and written.
        exec(compile(source.text, "<fold>", "exec"), namespace)  # noqa: S102
        return namespace["bind"]  # type: ignore[return-value]

    def _write_fold(self, source: "_Source", number: int, plan: _TypePlan, namespace: dict[str, object]) -> None:
        """Write the function that evaluates an event of one type, and applies it."""
        conditions, values = _locals(plan)
        source.line(f"def fold{number}(event):")
        with source:
            self._write_decode(source, number, plan, namespace)
            if plan.uses_metadata:
                source.line("metadata = {} if event.metadata is None else _decode(event.metadata)")
            if plan.uses_row:
                source.line("row = row_before(event.subject)")
            for rule, condition in zip(plan.rules, conditions, strict=True):
                if rule.when is not None:
                    source.line(f"{condition} = _boolean({rule.when.hoisted})")
            if not plan.always:
                source.line(f"if not ({' or '.join(conditions)}): return")
            key = self.key.hoisted if plan.always else self.key.fast
            many = self.key.kind != cel.Kind.STRING
            if self.key.fast == "event.subject":
                source.line("key = event.subject")
            elif many:
                source.line(f"keys = _to_keys({key})")
            else:
                source.line(f"key = _to_key({key})")
            source.line("if parked_subjects and (incarnation, event.partition, event.subject) in parked_subjects:")
            source.line("    raise _parked_error")
            source.line("if parked_rows:")
            with source:
                source.line(f"for key in {'keys' if many else '(key,)'}:")
                source.line("    if (incarnation, event.partition, key) in parked_rows: raise _parked_error")
            names = iter(values)
            for rule, condition in zip(plan.rules, conditions, strict=True):
                for effect in rule.effects:
                    name = next(names)
                    if constant := effect.constant():
                        namespace[f"constant{number}_{name}"] = constant[0]
                        source.line(f"{name} = constant{number}_{name}")
                    elif rule.when is None:
                        source.line(f"{name} = {effect.python(effect.expression.hoisted)}")
                    else:
                        source.line(f"{name} = {effect.python(effect.expression.fast)} if {condition} else None")
            if many:
                given = [
                    condition if rule.when else "True" for rule, condition in zip(plan.rules, conditions, strict=True)
                ]
                source.line(f"for key in keys: apply{number}({', '.join(['event', 'key', *given, *values])})")
            else:
                self._write_change(source, plan)

    @staticmethod
    def _write_decode(source: "_Source", number: int, plan: _TypePlan, namespace: dict[str, object]) -> None:
        """Write what decodes the event's data and looks up the fields that are read of each event."""
        if plan.whole:
            source.line("data = _decode(event.data)")
            read = {path: f"data{''.join(f'[{name!r}]' for name in path)}" for path in plan.paths.values()}
        elif plan.paths:
            namespace[f"decode{number}"], read = _decoder(plan.paths.values())
            source.line(f"data = decode{number}(event.data)")
        for name, path in plan.paths.items():
            source.line(f"{name} = {read[path]}")

    def _write_apply(self, source: "_Source", number: int, plan: _TypePlan) -> None:
        """Write the function that puts an event's values into its row's change."""
        conditions, values = _locals(plan)
        source.line(f"def apply{number}({', '.join(['event', 'key', *conditions, *values])}):")
        with source:
            self._write_change(source, plan)

    def _write_change(self, source: "_Source", plan: _TypePlan) -> None:
        """Write how an event's values come into its row's change."""
        conditions, values = _locals(plan)
        source.line("change = rows.get(key)")
        if self.defaults:
            # What joins a column that is read may be refused, so the change stays as it is until all is done.
            source.line("known = row_before(key)")
            source.line("if change is None: change = _row(key)")
            source.line("new, merged = dict(change.set), dict(change.merge)")
            source.line("deleted, exists = change.deleted_first, change.exists_after")
        else:
            source.line("if change is None: change = rows[key] = _row(key)")
            source.line("new, merged = change.set, change.merge")
        if not self.single:
            source.line("stamp = _stamp(event.time, incarnation, event.partition, event.position)")
            source.line("stamps = change.stamps")
        names = iter(values)
        for rule, condition in zip(plan.rules, conditions, strict=True):
            source.line("if True:" if rule.when is None else f"if {condition}:")
            with source:
                self._write_rule(source, rule, names)
        if self.defaults:
            source.line("change.set, change.merge = new, merged")
            source.line("change.deleted_first, change.exists_after = deleted, exists")
            source.line("rows[key] = change")

    def _write_rule(self, source: "_Source", rule: _RulePlan, names: Iterable[str]) -> None:
        deleted, exists = ("deleted", "exists") if self.defaults else ("change.deleted_first", "change.exists_after")
        if rule.delete:
            source.line(f"{deleted}, {exists} = True, False")
            source.line("new.clear(); merged.clear()")
            if self.defaults:
                source.line("known = {}")
            return
        if self.deletes:
            source.line(f"{exists} = True")
        for effect, value in zip(rule.effects, names, strict=False):
            if effect.column in self.defaults and effect.operation != "set":
                self._write_known(source, effect, value)
            else:
                self._write_effect(source, effect, value, deleted)

    def _write_known(self, source: "_Source", effect: _Effect, value: str) -> None:
        """Write what becomes of a column whose value before is known."""
        column = repr(effect.column)
        integer = effect.operation == "add" and self.columns[effect.column].type == ColumnType.INTEGER
        join = f"_join_{'integer' if integer else effect.operation}"
        before = f"new[{column}] if {column} in new else known.get({column}, defaults[{column}])"
        source.line(f"try: new[{column}] = {join}({before}, {value})")
        source.line(f"except ValueError as error: _refused({effect.path!r}, error)")

    def _write_effect(self, source: "_Source", effect: _Effect, value: str, deleted: str) -> None:
        """Write what becomes of a column whose value before stands in the read store."""
        column, join = repr(effect.column), f"_join_{effect.operation}"
        if effect.operation != "set":
            # What is in `new` needs no look where nothing can have brought it there.
            known = [deleted] * self.deletes + [f"{column} in new"] * (self.deletes or effect.column in self.sets)
            if self.single and known:
                source.line(f"if {' or '.join(known)}: new[{column}] = {join}(new.get({column}), {value})")
                source.line(f"elif {column} in merged: merged[{column}] = {join}(merged[{column}], {value})")
            else:
                source.line(f"if {column} in merged: merged[{column}] = {join}(merged[{column}], {value})")
            source.line(f"else: merged[{column}] = {value}")
        elif self.single:
            source.line(f"new[{column}] = {value}")
            if effect.column in self.merges:
                source.line(f"merged.pop({column}, None)")
        else:
            source.line(f"if {column} not in stamps or stamp >= stamps[{column}]:")
            source.line(f"    new[{column}] = {value}; stamps[{column}] = stamp")


def _refused(path: str, error: ValueError) -> NoReturn:
    raise cel.EvaluationError(f"{path}: {error}") from error


def _locals(plan: _TypePlan) -> tuple[list[str], list[str]]:
    """Return the names of the conditions, one a rule, and of the values, one an effect."""
    effects = sum(len(rule.effects) for rule in plan.rules)
    return [f"when{n}" for n in range(len(plan.rules))], [f"value{n}" for n in range(effects)]


class _ParkedError(ValueError):
    """Leads a generated function's event, whose row or subject is parked, to `Batch._explain`."""


class _Source:
    """Python source being written; `with source:` indents."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._indent = 0

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    def line(self, text: str) -> None:
        self._lines.append("    " * self._indent + text)

    def __enter__(self) -> None:
        self._indent += 1

    def __exit__(self, *_: object) -> None:
        self._indent -= 1
