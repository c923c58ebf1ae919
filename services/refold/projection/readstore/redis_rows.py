"""The Redis read store as a projector sees it: one script writes a batch's rows, indexes, positions and parked events.

How a batch is written (`RedisRows.apply`):

1. What the rows hold that the batch needs to know (what is added to, stamps, places in indexes) is read.
2. What becomes of them is computed here, exactly: integers and decimals are Python's, and Redis holds them as texts.
3. A script compares positions and rows with what was read, and then writes. Each write of a row leaves another mark in
   it, so that a row that somebody else has written in the meantime is noticed: nothing happens, and the batch begins
   with 1. again. Where a position has moved: `MovedError`.

A crash of Redis may lose the last batches, rows and positions together. Whoever wrote them notices by the connection
that breaks, and reads the positions again: so there is one connection, which is never opened again without telling.
"""

import random
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import msgspec
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

from refold.projection.cel.errors import EvaluationError
from refold.projection.definition import ColumnType, VersionDefinition, default_of, merges, stamped
from refold.projection.fold import Parked, ParkedEvent, RowChange, joined
from refold.projection.readstore import (
    Advance,
    LiveProgress,
    MovedError,
    NotFoundError,
    Position,
    RefusedError,
    Seen,
    UnavailableError,
    handover,
)
from refold.projection.readstore import redis_scripts as scripts
from refold.projection.readstore.redis import (
    CONNECT_SECONDS,
    SCRIPT_ROWS,
    TIMEOUT_SECONDS,
    Indexes,
    field,
    pairs,
    prefix,
    script,
    seen_of,
    unsuitable,
    version_prefix,
)
from refold.projection.readstore.redis_parked import ParkedEntry, asked_rows
from refold.projection.readstore.redis_values import place, to_value
from refold.projection.texts import to_text
from refold.projection.unparking import Entry, ParkedRow, Settled
from refold.projection.values import Value

#: How often a batch is computed again since another projector wrote one of its rows, or an index came or went.
_TRIES = 20
#: Seconds that a batch waits at most while its version is held back; some times what one hand-over takes.
_HELD_SECONDS = 10 * handover.HELD_SECONDS


class RedisRows:
    """One version of a projection in Redis, over one connection; the methods are those of `Rows`."""

    #: More rows would keep others waiting for longer.
    most_rows = SCRIPT_ROWS

    def __init__(self, url: str, *, namespace: str, name: str, version: str) -> None:
        """Remember where the version is; nothing is connected yet."""
        self._url = url
        self._what = f"{namespace}/{name}"
        self._version = version
        self._base = prefix(namespace, name)
        self._prefix = version_prefix(namespace, name, version)
        self._redis: Redis | None = None
        self._writer: _Writer | None = None
        #: The marks of the rows that the next batch was folded from; "" where there was none.
        self._read: dict[str, str] | None = None
        #: What `asked` was of when nothing was: partitions and `scripts.ASKED`.
        self._nothing_asked: tuple[frozenset[tuple[str, int]], list[Any]] | None = None

    def close(self) -> None:
        """Close the connection."""
        if self._redis is not None:
            self._redis.close()
            self._redis = None
        self._nothing_asked = None

    def open(self) -> VersionDefinition:
        """Return the version's definition and prepare for writing."""
        found = self._command("HGET", f"{self._base}definitions", self._version)
        indexes = self._indexes()
        if found is None or indexes is None:
            raise NotFoundError(f"the projection {self._what} has no version {self._version} in the read store")
        definition = VersionDefinition.from_json(found)
        self._writer = _Writer(definition, indexes)
        return definition

    def positions(self, partitions: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Position]:
        """Return where the partitions (incarnation, number) stand; one that isn't part of the version is left out."""
        positions, hints, stopped, unparked = map(pairs, self._call(scripts.POSITIONS))
        found = {}
        for incarnation, partition in partitions:
            name = field(incarnation, partition).encode()
            if name in positions:
                topic_id, offset = msgspec.json.decode(hints.get(name, b"[null,null]"))
                reason = stopped.get(name)
                found[incarnation, partition] = Position(
                    incarnation=incarnation,
                    partition=partition,
                    position=int(positions[name]),
                    topic_id=topic_id,
                    kafka_offset=offset,
                    stopped=None if reason is None else reason.decode(),
                    unparked=int(unparked.get(name, 0)),
                )
        return found

    def parked(self, partitions: Iterable[tuple[str, int]]) -> tuple[Parked, dict[tuple[str, int], int]]:
        """Return which rows and subjects are parked in the partitions, and how many events of each partition."""
        wanted = set(partitions)
        parked = Parked()
        counts: dict[tuple[str, int], int] = {}
        for text in self._command("HVALS", f"{self._prefix}parked"):
            one = msgspec.json.decode(text, type=ParkedEntry)
            at = (one.incarnation, one.partition)
            if at not in wanted:
                continue
            counts[at] = counts.get(at, 0) + 1
            if one.key is None:
                parked.subjects.add((*at, one.subject))
            else:
                parked.rows.add((*at, one.key))
        return parked, counts

    def read(self, keys: Iterable[str], columns: Sequence[str]) -> dict[str, dict[str, Value]]:
        """Return what stands in the rows, by key and column; a row that doesn't exist is left out."""
        wanted = sorted(keys)
        types = self._writer_or_fail().types
        found = self._fields(wanted, ["~", *columns])
        self._read = {key: _text(row[0]) for key, row in zip(wanted, found, strict=True)}
        return {
            key: {
                name: None if text is None else to_value(text.decode(), types[name])
                for name, text in zip(columns, row[1:], strict=True)
            }
            for key, row in zip(wanted, found, strict=True)
            if row[0] is not None
        }

    def asked(self, partitions: Iterable[tuple[str, int]]) -> tuple[bool, list[ParkedRow]]:
        """Return whether the version is live, and the parked rows of the partitions of which something is asked."""
        wanted = frozenset(partitions)
        marks, *state = self._call(scripts.ASKED, self._base)
        looked = (wanted, state)
        if not marks and looked == self._nothing_asked:
            return False, []
        parked, asked, errors, (now, _), discarded = self._call(scripts.PARKED, self._base)
        live = self._command("GET", f"{self._base}live") == self._version.encode()
        rows = asked_rows(pairs(parked), pairs(asked), pairs(errors), discarded, wanted, int(now))
        self._nothing_asked = None if rows else looked
        return live, rows

    def refuse(self, entries: Sequence[Entry], error: str | None) -> None:
        """Do nothing of what is asked of `entries`; the first stays parked because of `error` (None: as before)."""
        asked = {
            "first": str(entries[0].id),
            "error": False if error is None else _storable(error),
            "marks": {str(entry.id): entry.asked.token for entry in entries if entry.asked is not None},
        }
        self._call(scripts.REFUSE, msgspec.msgpack.encode(asked))

    def apply(
        self,
        changes: Iterable[RowChange],
        parked: Sequence[ParkedEvent],
        advances: Sequence[Advance],
        settled: Settled | None = None,
    ) -> None:
        """Write a batch: all of it in one script, or nothing."""
        read, self._read = self._read, None
        wanted = list(changes)
        steps = [_advance(one) for one in advances]
        events = [_parked(one, time.time()) for one in parked]
        keys = [change.key for change in wanted]
        for attempt in range(_TRIES):
            writer = self._writer_or_fail()
            before = self._fields(keys, writer.fields) if keys else []
            known = {key: _text(row[0]) for key, row in zip(keys, before, strict=True)}
            try:
                batch = msgspec.msgpack.encode(
                    {
                        "indexes": writer.indexes.text,
                        "advances": steps,
                        "read": list((known | (read or {})).items()),
                        "rows": writer.rows(wanted, before),
                        "mark": secrets.token_urlsafe(9),
                        "parked": events,
                        "base": self._base,
                        "version": self._version,
                        "settled": False if settled is None else _settled(settled, self._version),
                    }
                )
            except UnicodeEncodeError as error:
                raise RefusedError(f"a text isn't valid Unicode: {error.reason}") from error
            answer = self._written(batch)
            if answer == b"":
                return
            if answer == b"indexes":
                indexes = self._indexes()
                if indexes is None:
                    raise MovedError(f"the version {self._version} was dropped")
                writer.indexes = indexes
            elif answer != b"row":
                raise MovedError(f"the read store stands at {answer.decode()}, this projector elsewhere")
            elif read is not None:
                raise MovedError("rows that the batch was folded from have been written by another projector")
            else:
                time.sleep(random.uniform(0, 0.002) * 2 ** min(attempt, 6))  # noqa: S311 (jitter)
        raise MovedError(f"other projectors wrote the batch's rows {_TRIES} times while it was computed")

    def see(self, seen: Sequence[Seen]) -> None:
        """Store what was seen of the heads; positions aren't touched."""
        asked = [[field(one.incarnation, one.partition), f"{one.head} {one.lag_seconds!r}"] for one in seen]
        self._call(scripts.SEE, msgspec.msgpack.encode({"seen": asked}))

    def stop(self, incarnation: str, partition: int, reason: str | None) -> None:
        """Store why the projector doesn't go on in a partition; None where it does."""
        self._call(scripts.STOP, field(incarnation, partition), _storable(reason or ""))

    def live(self) -> LiveProgress | None:
        """Return how far the live version is; None where it is this one, or there is none."""
        live = self._command("GET", f"{self._base}live")
        if live is None or live.decode() == self._version:
            return None
        prefix = f"{self._base}{live.decode()}:"
        seen = self._hash(f"{prefix}seen")
        positions = {name: int(position) for name, position in self._hash(f"{prefix}positions").items()}
        if not positions:
            return None
        lags = [seen_of(seen.get(name), position)[1] for name, position in positions.items()]
        return LiveProgress(sum(positions.values()), max(lags))

    def _written(self, batch: bytes) -> Any:
        """Return the script's answer to a batch, once the version isn't held back (`handover`) any more."""
        deadline = time.monotonic() + _HELD_SECONDS
        while (answer := self._call(scripts.APPLY, batch)) == b"held":
            if time.monotonic() > deadline:
                raise UnavailableError(f"the read store of {self._what} (Redis) holds the version back for too long")
            time.sleep(0.01)
        return answer

    def _hash(self, name: str) -> dict[bytes, bytes]:
        found = self._command("HGETALL", name)
        return cast("dict[bytes, bytes]", found)

    def _indexes(self) -> Indexes | None:
        """Return the version's indexes; None where it isn't there."""
        found = self._command("GET", f"{self._prefix}indexes")
        return None if found is None else Indexes.of(found.decode())

    def _fields(self, keys: Sequence[str], fields: Sequence[str]) -> list[list[bytes | None]]:
        asked = msgspec.msgpack.encode({"keys": keys, "fields": fields})
        return cast("list[list[bytes | None]]", self._call(scripts.FIELDS, asked))

    def _writer_or_fail(self) -> "_Writer":
        assert self._writer is not None, "open() comes first"
        return self._writer

    def _call(self, text: str, *arguments: str | bytes) -> Any:
        called = script(text)
        try:
            return self._execute("EVALSHA", called.sha, 1, self._prefix, *arguments)
        except NoScriptError:
            return self._command("EVAL", called.text, 1, self._prefix, *arguments)

    def _command(self, *command: str | bytes | int) -> Any:
        return self._execute(*command)

    def _execute(self, *command: str | bytes | int) -> Any:
        try:
            if self._redis is None:
                self._redis = self._connected()
            return self._redis.execute_command(*command)
        except NoScriptError:
            raise
        except RedisError as error:
            self.close()
            raise UnavailableError(f"the read store of {self._what} (Redis): {error}") from error

    def _connected(self) -> Redis:
        """Return a client of one connection, to a Redis that can keep read models."""
        client = Redis.from_url(
            self._url,
            protocol=2,
            single_connection_client=True,
            retry=Retry(NoBackoff(), 0),  # what is not known to be written is read again, not written again
            socket_connect_timeout=CONNECT_SECONDS,
            socket_timeout=TIMEOUT_SECONDS,
            client_name="refold-projector",
        )
        problem = unsuitable(cast("Mapping[str, Any]", client.execute_command("INFO")))
        if problem is not None:
            client.close()
            raise UnavailableError(f"the Redis of {self._what} can't keep read models: {problem}")
        return client


class _Column(NamedTuple):
    name: str
    type: ColumnType
    nullable: bool
    default: Value
    #: How values join the one before; null where they don't.
    join: str | None
    stamped: bool


class _Writer:
    """Computes what a batch does to its rows, in the form that the script takes."""

    def __init__(self, definition: VersionDefinition, indexes: Indexes) -> None:
        fold = definition.definition
        joins, stamps = merges(fold), stamped(fold)
        self._columns = {
            column.name: _Column(
                column.name, column.type, column.nullable, default_of(column), joins.get(column.name),
                column.name in stamps,
            )
            for column in fold.columns
        }  # fmt: skip
        self.types = {column.name: column.type for column in fold.columns}
        self._defaults = {one.name: one.default for one in self._columns.values()}
        self.indexes = indexes

    @property
    def indexes(self) -> Indexes:
        """The indexes that there are."""
        return self._indexes

    @indexes.setter
    def indexes(self, indexes: Indexes) -> None:
        self._indexes = indexes
        self._indexed = sorted(indexes.ready | indexes.building)
        read = [one.name for one in self._columns.values() if one.join or one.name in indexes.building]
        read += [f"~{one.name}" for one in self._columns.values() if one.stamped]
        #: What `rows` needs to know of the rows before; the first is the mark.
        self.fields = ["~", *read, *(f"={name}" for name in self._indexed)]

    def rows(self, changes: Sequence[RowChange], before: Sequence[Sequence[bytes | None]]) -> list[Any]:
        """Return what becomes of each row.

        That is its key, the fields that are set (False: it is deleted), those that are unset, whether it is new, and
        its moves in indexes (column, former place, place).

        Raises:
            RefusedError: a value can't be stored.
        """
        return [
            row
            for change, texts in zip(changes, before, strict=True)
            if (row := self._row(change, dict(zip(self.fields, texts, strict=True)))) is not None
        ]

    def _row(self, change: RowChange, before: Mapping[str, bytes | None]) -> list[Any] | None:
        exists = before["~"] is not None
        if not change.exists_after:
            if not exists:
                return None
            gone = [part for name in self._indexed for part in (name, _text(before[f"={name}"]), "")]
            return [change.key, False, [], False, gone]
        anew = change.deleted_first or not exists
        values: dict[str, Value] = dict(self._defaults) if anew else {}
        texts: list[str] = []
        for name, value in change.set.items():
            if self._columns[name].stamped:
                stamp = change.stamps[name].text
                if stamp.encode() <= (before[f"~{name}"] or b""):
                    continue
                texts += [f"~{name}", stamp]
            values[name] = value
        for name, value in change.merge.items():
            column = self._columns[name]
            known = before[name]
            old = values[name] if name in values else None if known is None else to_value(known.decode(), column.type)
            values[name] = _joined(column, old, value)
        unset = []
        for name, value in values.items():
            if value is not None:
                texts += [name, to_text(value, self.types[name])]
            elif not self._columns[name].nullable:
                raise RefusedError(f"the column {name} takes no null")
            elif exists:
                unset.append(name)
        moves: list[str] = []
        for name in self._indexed:
            building = name in self._indexes.building
            if name in values:
                value = values[name]
            elif building:
                known = before[name]
                value = None if known is None else to_value(known.decode(), self.types[name])
            else:
                continue
            old_place, new_place = _text(before[f"={name}"]), place(value, self.types[name]).decode()
            if old_place != new_place or building:
                moves += [name, old_place if old_place != new_place else "", new_place]
                texts += [f"={name}", new_place]
        return [change.key, texts, unset, not exists, moves]


def _joined(column: _Column, old: Value, value: Value) -> Value:
    try:
        return joined(cast("str", column.join), column.type, old, value)
    except EvaluationError as error:
        raise RefusedError(f"the column {column.name}: {error}") from error


def _advance(one: Advance) -> list[str]:
    recorded = "" if one.recorded_at is None else one.recorded_at.isoformat()
    hint = msgspec.json.encode([one.topic_id, one.kafka_offset]).decode()
    place = field(one.incarnation, one.partition)
    return [place, str(one.before), str(one.after), hint, recorded, str(one.unparked)]


def _settled(settled: Settled, version: str) -> dict[str, Any]:
    """Return parked events that leave, as the script takes them; of a discarded one with its trace."""
    now = time.time()
    return {
        "partition": field(settled.incarnation, settled.partition),
        "live": settled.live,
        "ids": [str(id_) for id_ in (*settled.folded, *settled.discarded)],
        "discarded": {
            str(id_): msgspec.json.encode({"version": version, "by": _storable(by), "at": now}).decode()
            for id_, by in settled.discarded.items()
        },
    }


def _parked(one: ParkedEvent, now: float) -> str:
    event = one.event
    key = None if one.key is None else _storable(one.key)
    parked = ParkedEntry(
        one.incarnation, event.partition, event.position, key, event.subject, _storable(one.error), now
    )
    return msgspec.json.encode(parked).decode()


def _text(found: bytes | None) -> str:
    """Return what stands in a field, "" where nothing does."""
    return "" if found is None else found.decode()


def _storable(text: str) -> str:
    """Return `text` without lone surrogates, which have no bytes."""
    return text.encode(errors="replace").decode()
