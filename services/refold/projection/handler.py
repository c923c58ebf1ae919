"""Code in place of a definition: a function that is called as `project(event, table)` for each event.

`HandlerFold` does for it what `fold.Fold` does for expressions, with the same changes of rows and the same parking, so
that nothing behind it knows which of them made a change. An event's calls of the table are gathered while the function
runs, and take effect together once it has returned; a call that is refused makes the event a bad one, whatever the
function does about it.

Rows fed by one partition (one stream, `handler.keys: subject`): all columns are read before a batch, every call is
allowed, and what stands in the row is known when it is added to. So a change holds what is set only.

Rows fed by several partitions: nothing is known of what stands there. A column is either set, with the event's stamp,
or added to (`handler.adds`), as `definition.stamped` and `definition.merges` tell the read stores.

What a function sees of a row must not tell where a batch ended: a value that was set a moment ago and the same value
from a read store look alike (`seen`).
"""

import datetime as dt
import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any, NoReturn, cast

import msgspec

import refold
from refold import events
from refold.projection import cel
from refold.projection.definition import (
    ColumnType,
    Definition,
    Handler,
    InvalidDefinitionError,
    check,
    default_of,
    merges,
    read_columns,
    single_partition,
    stamped,
)
from refold.projection.fold import Before, Fold, Parked, ParkedEvent, RowChange, Stamp, compile_fold, decode, total
from refold.projection.values import CONVERSIONS, MAX_KEYS, Value, integer_total, not_null, to_key, to_numeric

#: What stands before all reasons why a handler can't run, so that they are known again where they are stored.
FIELD = "spec.handler"
#: The longest error of a function that is kept with its event, in characters.
_MAX_ERROR = 1_000
_VERSION = re.compile(r"(\d+)\.(\d+)")

Row = dict[str, Any]


class Event(msgspec.Struct, frozen=True):
    """An event as a function gets it.

    Args:
        stream: name of its EventStream.
        subject: the entity that it is about.
        revision: its number within the subject, from 1.
        id: unique within the subject.
        type: its type.
        time: when it was recorded (UTC, microseconds).
        data: what was appended: numbers are int, or Decimal where they have a fraction or an exponent.
        metadata: the same; empty where there is none.
    """

    stream: str
    subject: str
    revision: int
    id: str
    type: str
    time: dt.datetime
    data: Any
    metadata: Any


class TableError(ValueError):
    """A call of the table that is refused: the message says why, and what to do instead."""


class HandlerError(Exception):
    """A handler that can't run; the message names the field, the reason and the way out."""


class Table:
    """The read model, as far as one event may change it. Its calls take effect together, when the function returns.

    Values are str (text), int (integer), int or Decimal (numeric), bool (boolean), an aware datetime or its text in
    RFC 3339 (timestamp), what JSON can hold with Decimal for fractions (json), and None for null. float is refused: it
    isn't exact.
    """

    def __init__(self, plan: "_Plan", event: Event, before: "_RowBefore | None") -> None:
        self._plan = plan
        self._event = event
        self._before = before
        self._open = True
        #: Whether the function called it at all, and why a call was refused.
        self.used = False
        self.refusal: TableError | None = None
        #: What becomes of rows, by key: the event's own effects on what stands there.
        self.effects: dict[str, RowChange] = {}

    def get(self, key: str, /) -> Row | None:
        """Return what stands in the row, by column, with this event's calls so far; None where there is no row.

        Raises:
            TableError: the row is fed by several partitions, or isn't the event's own.
        """
        key = self._key(key)
        if self._before is None:
            self._refuse(f"get: {self._plan.several}: there is no row before the event to look at")
        row = self._before.row(self.effects.get(key))
        return None if row is None else {name: seen(value, self._plan.types[name]) for name, value in row.items()}

    def upsert(self, key: str, /, **values: object) -> None:
        """Set columns of the row, which is made where there is none; the others keep theirs, or get their defaults.

        Raises:
            TableError: a column takes no such value, is one of `handler.adds`, or doesn't exist.
        """
        key = self._key(key)
        found: dict[str, Value] = {}
        for name, value in values.items():
            self._column("upsert", name)
            if self._before is None and name in self._plan.merges:
                self._refuse(
                    f"upsert: {self._plan.several}: {name} stands in {FIELD}.adds, so it is only ever added to"
                )
            found[name] = self._converted("upsert", name, self._plan.set[name], value)
        effect = self._effect(key)
        effect.set.update(found)

    def add(self, key: str, /, **amounts: object) -> None:
        """Add to columns of the row, which is made where there is none; null counts as 0.

        Raises:
            TableError: an amount is no number or null, the sum is out of range, or the column can't be added to.
        """
        key = self._key(key)
        found: dict[str, Value] = {}
        for name, amount in amounts.items():
            self._column("add", name)
            convert = self._plan.add.get(name)
            if convert is None:
                self._refuse(
                    f"add: needs a column of type integer or numeric, {name} is {self._plan.types[name].value}"
                )
            if self._before is None and name not in self._plan.merges:
                self._refuse(
                    f"add: {self._plan.several}: a column is either set or added to; name {name} in {FIELD}.adds to "
                    "add to it"
                )
            found[name] = self._converted("add", name, convert, amount)
        effect = self._effect(key)
        for name, value in found.items():
            amount = cast("int | Decimal", value)
            if self._before is None:
                effect.merge[name] = total(cast("int | Decimal | None", effect.merge.get(name)), amount)
            else:
                row = self._before.row(effect) or self._plan.defaults
                effect.set[name] = self._converted("add", name, lambda one: self._sum(row, name, one), amount)  # noqa: B023

    def delete(self, key: str, /) -> None:
        """Delete the row, if there is one.

        Raises:
            TableError: the row is fed by several partitions, or isn't the event's own.
        """
        key = self._key(key)
        if self._before is None:
            self._refuse(f"delete: {self._plan.several}: set a column such as `deleted` instead")
        self.effects[key] = RowChange(key, deleted_first=True, exists_after=False)

    def close(self) -> None:
        """Refuse all further calls: the event is done."""
        self._open = False

    def _key(self, key: object) -> str:
        if not self._open:
            raise TableError("the table is that of one event, whose function has returned: don't keep it")
        self.used = True
        try:
            found = to_key(key)
        except (cel.EvaluationError, UnicodeEncodeError) as error:
            self._refuse(f"key: {error}")
        if self._plan.own and found != self._event.subject:
            self._refuse(
                f"key: {found!r} isn't the event's subject {self._event.subject!r}, whose row alone it may change: say "
                f"{FIELD}.keys: any for rows of other keys"
            )
        if found not in self.effects and len(self.effects) >= MAX_KEYS:
            self._refuse(f"key: one event changes at most {MAX_KEYS} rows")
        return found

    def _column(self, call: str, name: str) -> None:
        if name not in self._plan.types:
            there_are = ", ".join(self._plan.types) or "none"
            self._refuse(f"{call}: {name} is not in spec.columns ({there_are}): declare it there")

    def _converted(self, call: str, name: str, convert: Callable[[object], Value], value: object) -> Value:
        try:
            return convert(_given(value, self._plan.types[name]))
        except (*cel.FAILURES, UnicodeEncodeError) as error:
            self._refuse(f"{call}: {name}: {error}", error)

    def _sum(self, row: Mapping[str, Value], name: str, amount: object) -> Value:
        known = cast("Any", row[name])
        if self._plan.types[name] is ColumnType.INTEGER:
            return integer_total(known, cast("int", amount))
        return to_numeric(total(known, cast("int | Decimal", amount)))

    def _effect(self, key: str) -> RowChange:
        effect = self.effects.setdefault(key, RowChange(key))
        effect.exists_after = True
        return effect

    def _refuse(self, message: str, cause: Exception | None = None) -> NoReturn:
        error = TableError(message)
        self.refusal = self.refusal or error
        raise error from cause


#: What a projection calls for each event. It returns nothing, and depends on its arguments alone.
Function = Callable[[Event, Table], object]


class _Plan:
    """What is known of a handler's rows before an event comes."""

    def __init__(self, definition: Definition, handler: Handler) -> None:
        self.single = single_partition(definition)
        self.own = handler.keys == "subject"
        cause = "several streams feed a row" if len(definition.streams) > 1 else f"{FIELD}.keys is any"
        self.several = f"{cause}, so a row's events come from several partitions, which have no common order"
        self.types = {column.name: column.type for column in definition.columns}
        self.defaults = {column.name: default_of(column) for column in definition.columns}
        self.merges = merges(definition)
        self.stamped = stamped(definition)
        self.set: dict[str, Callable[[object], Value]] = {}
        self.add: dict[str, Callable[[object], Value]] = {}
        for column in definition.columns:
            functions = CONVERSIONS[column.type].functions
            self.set[column.name] = functions["set"] if column.nullable else not_null(functions["set"])
            if "add" in functions:
                self.add[column.name] = functions["add"]


class _RowBefore:
    """What stands in a row before an event: what the read store had, and what the batch did to it."""

    def __init__(
        self, defaults: Mapping[str, Value], read: Mapping[str, Value] | None, change: RowChange | None
    ) -> None:
        self._defaults, self._read, self._change = defaults, read, change

    def row(self, effect: RowChange | None) -> Mapping[str, Value] | None:
        """Return it with an event's own effect; None where there is no row."""
        return _changed(self._defaults, _changed(self._defaults, self._read, self._change), effect)


def _changed(
    defaults: Mapping[str, Value], row: Mapping[str, Value] | None, change: RowChange | None
) -> Mapping[str, Value] | None:
    if change is None:
        return row
    if not change.exists_after:
        return None
    return {**defaults, **({} if change.deleted_first or row is None else row), **change.set}


class HandlerFold:
    """A function that folds, free of state; used as `fold.Fold` is.

    Args:
        definition: with a handler.
        function: the handler's.
        streams: the streams' names by incarnation.
    """

    def __init__(self, definition: Definition, function: Function, streams: Mapping[str, str]) -> None:
        assert definition.handler is not None
        if problems := check(definition):
            raise InvalidDefinitionError(problems)
        self.definition = definition
        self.single_partition = single_partition(definition)
        self.reads = read_columns(definition)
        self._plan = _Plan(definition, definition.handler)
        self._name = definition.handler.function
        self._function = function
        self._streams = streams

    def batch(self, parked: Parked | None = None, before: Before | None = None) -> "HandlerBatch":
        """Return an empty batch, as `fold.Fold.batch`."""
        return HandlerBatch(self._plan, self._call, parked or Parked(), before or {})

    def _call(
        self, incarnation: str, event: events.Event, before: _RowBefore | None
    ) -> tuple[Table | None, str | None]:
        """Return the table that the function was called with, None where it wasn't, and why the event is bad."""
        try:
            data = decode(event.data)
            metadata = {} if event.metadata is None else decode(event.metadata)
        except cel.FAILURES as error:
            return None, f"the event's data or metadata can't be read: {error}"
        given = Event(
            self._streams[incarnation], event.subject, event.revision, event.id, event.type, event.time, data, metadata
        )
        table = Table(self._plan, given, before)
        failure = None
        try:
            returned = self._function(given, table)
            if returned is not None:
                failure = (
                    f"it returned {type(returned).__name__}: change rows by calls of the table, and return nothing"
                )
                if inspect.iscoroutine(returned):
                    returned.close()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - code of others: whatever it does concerns its row only
            failure = _told(error)
        finally:
            table.close()
        if table.refusal is not None:
            failure = str(table.refusal)
        return table, None if failure is None else f"{self._name}: {failure}"[:_MAX_ERROR]


class HandlerBatch:
    """The events of one transaction, folded to one change a row; as `fold.Batch`."""

    def __init__(
        self,
        plan: _Plan,
        call: Callable[[str, events.Event, _RowBefore | None], tuple[Table | None, str | None]],
        parked: Parked,
        before: Before,
    ) -> None:
        self.changes: dict[str, RowChange] = {}
        self.parked: list[ParkedEvent] = []
        self._plan = plan
        self._call = call
        self._before = before
        self._parked = Parked(set(parked.rows), set(parked.subjects))

    def fold(self, incarnation: str, events: Iterable[events.Event]) -> None:
        """Fold `events` of the stream `incarnation`; those of one partition in order of position."""
        for event in events:
            self._fold(incarnation, event)

    def _fold(self, incarnation: str, event: events.Event) -> None:
        plan, subject = self._plan, (incarnation, event.partition, event.subject)
        before = None
        if plan.single:
            change, read = self.changes.get(event.subject), self._before.get(event.subject)
            before = _RowBefore(plan.defaults, read, change)
        table, failure = self._call(incarnation, event, before)
        if failure is None and (table is None or not table.used):
            return
        if plan.single:
            # All that an event may change is its subject's row, also where it didn't come to it.
            known, parked, key = self._parked.rows, "follows an event of its row that is parked", event.subject
        else:
            known, parked, key = self._parked.subjects, "follows an event of its subject that is parked", None
        if subject in known:
            self._park(incarnation, event, key, failure if plan.single and failure else parked)
        elif failure is not None:
            known.add(subject)
            self._park(incarnation, event, key, failure)
        else:
            assert table is not None
            for effect in table.effects.values():
                if (incarnation, event.partition, effect.key) in self._parked.rows:
                    self._park(incarnation, event, effect.key, "follows an event of its row that is parked")
                else:
                    self._apply(incarnation, event, effect)

    def _apply(self, incarnation: str, event: events.Event, effect: RowChange) -> None:
        change = self.changes.get(effect.key)
        if change is None:
            change = self.changes[effect.key] = RowChange(effect.key)
        if effect.deleted_first:
            change.deleted_first = True
            change.set.clear()
        change.exists_after = effect.exists_after
        if self._plan.single:
            change.set.update(effect.set)
            return
        stamp = Stamp(event.time, incarnation, event.partition, event.position)
        for name, value in effect.set.items():
            if name not in change.stamps or stamp >= change.stamps[name]:
                change.set[name], change.stamps[name] = value, stamp
        for name, amount in effect.merge.items():
            known = cast("int | Decimal | None", change.merge.get(name))
            change.merge[name] = total(known, cast("int | Decimal", amount))

    def _park(self, incarnation: str, event: events.Event, key: str | None, error: str) -> None:
        self.parked.append(ParkedEvent(incarnation, event, key, error))


def folding(definition: Definition, streams: Mapping[str, str], *, installed: str | None) -> Fold | HandlerFold:
    """Return what folds a definition: its compiled expressions, or the function of its handler.

    Args:
        definition: of the version.
        streams: the streams' names by incarnation.
        installed: which Refold the installation runs; None where nobody says.

    Raises:
        HandlerError: the handler can't run here.
    """
    if definition.handler is None:
        return compile_fold(definition)
    if installed is not None:
        check_compatible(installed, definition.handler.image)
    return HandlerFold(definition, load(definition.handler.function), streams)


def check_compatible(installed: str, image: str) -> None:
    """Refuse an image that was built from another minor release of Refold than the installation's.

    Raises:
        HandlerError: they don't go together.
    """
    if _minor(installed) != _minor(refold.__version__):
        raise HandlerError(
            f"{FIELD}.image: {image} is built from Refold {refold.__version__}, which doesn't go together with the "
            f"installation's {installed}: build it from the installation's image"
        )


def _minor(version: str) -> str:
    found = _VERSION.match(version)
    return version if found is None else found[0]


def load(function: str) -> Function:
    """Return the function of `module:name`.

    Raises:
        HandlerError: it can't be imported, or can't be called as `name(event, table)`.
    """
    module, _, path = function.partition(":")
    found: Any
    try:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (Exception, SystemExit) as error:
        raise HandlerError(
            f"{FIELD}.function: {function} can't be imported: {_told(error)}; the module has to be on the image's "
            "PYTHONPATH"
        ) from error
    if not callable(found):
        raise HandlerError(f"{FIELD}.function: {function} is no function, but {type(found).__name__}")
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(of_kind(found) for of_kind in kinds):
        raise HandlerError(
            f"{FIELD}.function: {function} is async or a generator: make it a plain function of (event, table)"
        )
    try:
        inspect.signature(found).bind(None, None)
    except TypeError as error:
        raise HandlerError(f"{FIELD}.function: {function} can't be called as {path}(event, table): {error}") from error
    except ValueError:
        pass  # something built in that doesn't tell its parameters
    return cast("Function", found)


def _told(error: BaseException) -> str:
    """Return an error of a function with the place where it was raised."""
    text = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    where = frames[-1]
    return f"{text[: _MAX_ERROR // 2]} ({where.filename.rpartition('/')[2]}, line {where.lineno})"


def _given(value: object, type_: ColumnType) -> object:
    """Return a value that a function gave, in the form that the columns' conversions take.

    Raises:
        EvaluationError: it isn't exact, or means another moment elsewhere.
        UnicodeEncodeError: a text has no bytes.
    """
    if isinstance(value, float):
        raise cel.EvaluationError(f"the float {value!r} isn't exact: use Decimal")
    if isinstance(value, Decimal) and not value.is_finite():
        raise cel.EvaluationError(f"{value} is no number that a column holds")
    if isinstance(value, str):
        value.encode()  # a lone surrogate has no bytes
    if type(value) is dt.datetime:
        if value.utcoffset() is None:
            raise cel.EvaluationError(f"the datetime {value.isoformat()} has no time zone: use an aware one")
        return value.astimezone(dt.UTC)
    return _json(value) if type_ is ColumnType.JSON else value


def _json(value: object) -> object:
    """Return what JSON can hold; the order of a set, say, would be another in each process."""
    if isinstance(value, float):
        raise cel.EvaluationError(f"the float {value!r} isn't exact: use Decimal")
    if type(value) is list or type(value) is tuple:
        return [_json(item) for item in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _json(item) for key, item in value.items()}
    if type(value) is dt.datetime:
        return _given(value, ColumnType.TIMESTAMP)
    if value is None or type(value) in (str, int, bool):
        return value
    if type(value) is Decimal and value.is_finite():
        return value
    raise cel.EvaluationError(
        f"a json column takes None, bool, str, int, Decimal, datetime, list and dict with str keys, not "
        f"{type(value).__name__}"
    )


def seen(value: Value, type_: ColumnType) -> Any:
    """Return a column's value as a function sees it: the same whether it was just set, or came from any read store."""
    if value is None:
        return None
    if type_ is ColumnType.NUMERIC:
        return _decimal(Decimal(cast("int | Decimal", value)))
    if type_ is ColumnType.TIMESTAMP:
        return cast("dt.datetime", value).astimezone(dt.UTC)
    return _parsed(decode(cast("str", value))) if type_ is ColumnType.JSON else value


def _decimal(value: Decimal) -> Decimal:
    """Return a number in one form: neither an exponent, nor zeros that add nothing, nor a sign of zero."""
    plain = f"{value:f}"
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return Decimal("0" if plain == "-0" else plain)


def _parsed(value: object) -> object:
    """Return parsed JSON in one form: keys in order, a whole number as int."""
    if type(value) is list:
        return [_parsed(item) for item in value]
    if type(value) is dict:
        return {key: _parsed(value[key]) for key in sorted(value)}
    if type(value) is Decimal:
        number = _decimal(value)
        return int(number) if number == number.to_integral_value() else number
    return value
