"""Parked events in the Redis read store: how they are kept, and how the query service lists and marks them."""

import datetime as dt
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import msgspec

from refold.projection.definition import VersionDefinition
from refold.projection.past import Aside
from refold.projection.readstore import Listed, Looked, Marked, NotFoundError
from refold.projection.readstore import redis_scripts as scripts
from refold.projection.readstore.redis import pairs
from refold.projection.unparking import ASKED_SECONDS, Asked, Entry, ParkedRow

_Call = Callable[[str, dict[str, Any]], Awaitable[Any]]


class ParkedEntry(msgspec.Struct, frozen=True):
    """A parked event as Redis holds it; `parked_at` is Unix time."""

    incarnation: str
    partition: int
    position: int
    key: str | None
    subject: str
    error: str
    parked_at: float

    @property
    def row(self) -> tuple[str, int, str | None, str | None]:
        """Partition, key and, where the key failed, subject: events with the same wait for each other."""
        return self.incarnation, self.partition, self.key, self.subject if self.key is None else None

    @property
    def row_and_position(self) -> tuple[object, ...]:
        """The event and the row that it is parked for, in whichever version."""
        return *self.row, self.position


class _Trace(msgspec.Struct):
    """Of what was discarded: in which version, and by whom."""

    version: str
    by: str


class _Discarded(msgspec.Struct):
    """What was discarded, as Redis holds it."""

    trace: _Trace
    event: ParkedEntry


_DISCARDED = msgspec.json.Decoder(_Discarded)


def asked_rows(
    parked: Mapping[bytes, bytes],
    marks: Mapping[bytes, bytes],
    errors: Mapping[bytes, bytes],
    discarded: Collection[bytes],
    partitions: Collection[tuple[str, int]],
    now: int,
) -> list[ParkedRow]:
    """Return the rows of the partitions of which something is asked, with all their parked events in order.

    Of what was discarded in another version the same is asked here.

    Args:
        parked: entries by id.
        marks: by id.
        errors: that took the place of the entries' own, by id.
        discarded: what was, of any version.
        partitions: by incarnation and number.
        now: Unix time by the store's clock; older marks than `ASKED_SECONDS` don't count.
    """
    entries = _decoded(parked)
    elsewhere = {one.event.row_and_position: one.trace.by for one in map(_DISCARDED.decode, discarded)}
    valid: dict[int, Asked] = {}
    for number, entry in entries.items():
        if (by := elsewhere.get(entry.row_and_position)) is not None:
            valid[number] = Asked("", "discard", by, live=False)
    for id_, mark in marks.items():
        _, at, asked = mark.split(b" ", 2)
        if now - int(at) <= ASKED_SECONDS and id_ in parked:
            valid[int(id_)] = msgspec.json.decode(asked, type=Asked)
    wanted = {entries[number].row for number in valid}
    rows: dict[tuple[str, int, str | None, str | None], ParkedRow] = {}
    for number, entry in sorted(entries.items(), key=lambda item: (item[1].position, item[0])):
        if entry.row in wanted and entry.row[:2] in partitions:
            row = rows.setdefault(entry.row, ParkedRow(*entry.row, []))
            name = str(number).encode()
            row.entries.append(Entry(number, entry.position, _error(entry, errors.get(name)), valid.get(number)))
    return list(rows.values())


def _decoded(parked: Mapping[bytes, bytes]) -> dict[int, ParkedEntry]:
    return {int(id_): msgspec.json.decode(entry, type=ParkedEntry) for id_, entry in parked.items()}


def _error(entry: ParkedEntry, newer: bytes | None) -> str:
    return entry.error if newer is None else newer.decode()


class RedisParkedReads:
    """The parked events of a projection as its query service sees them; the methods are those of `ParkedReads`.

    Args:
        call: runs a script on the projection with its argument.
    """

    def __init__(self, call: _Call) -> None:
        self._call = call

    async def page(
        self, *, version: str | None, key: str | None, after: int, most: int
    ) -> tuple[str, list[Listed]] | None:
        """Return the version and its first `most` parked events with ids beyond `after`; None: no such version."""
        answer = await self._answer(scripts.LIST_PARKED, {"version": version or False})
        if not answer:
            return None
        name, text, parked, changed = answer
        errors = pairs(changed)
        streams = {ref.incarnation: ref for ref in VersionDefinition.from_json(text).streams}
        found = []
        for id_, entry in sorted(_decoded(pairs(parked)).items()):
            if id_ > after and key in (None, entry.key):
                ref = streams.get(entry.incarnation)
                found.append(
                    Listed(
                        id=id_,
                        stream=None if ref is None else f"{ref.namespace}/{ref.name}",
                        partition=entry.partition,
                        position=entry.position,
                        subject=entry.subject,
                        key=entry.key,
                        error=_error(entry, errors.get(str(id_).encode())),
                        parked_at=dt.datetime.fromtimestamp(entry.parked_at, dt.UTC),
                    )
                )
        return name.decode(), found[:most]

    async def aside(self, version: str, key: str) -> Aside:
        """Return what `version` has set aside of the row `key`, which one partition feeds."""
        parked, changed, traces = await self._answer(scripts.ASIDE, {"version": version})
        errors = pairs(changed)
        entries = [
            (entry.position, _error(entry, errors.get(str(id_).encode())))
            for id_, entry in _decoded(pairs(parked)).items()
            if entry.key == key
        ]
        gone = [msgspec.json.decode(text, type=_Discarded) for text in traces]
        return Aside(
            min(entries, default=None),
            frozenset(one.event.position for one in gone if (one.trace.version, one.event.key) == (version, key)),
        )

    async def ask(self, id_: int, asked: Asked, version: str | None) -> Marked:
        """Leave a mark at a parked event of `version` (None: the live one), where there is none."""
        wanted, found, done = await self._answer(
            scripts.ASK,
            {
                "id": str(id_),
                "version": version or False,
                "token": asked.token,
                "mark": msgspec.json.encode(asked).decode(),
                "valid": ASKED_SECONDS,
            },
        )
        return Marked(wanted and wanted.decode(), found and found.decode(), bool(done))

    async def look(self, id_: int, version: str) -> Looked:
        """Return what became of a parked event of `version`."""
        mark, live, there, discarded, parked, changed = await self._answer(
            scripts.LOOK_PARKED, {"id": str(id_), "version": version}
        )
        entries, errors = _decoded(pairs(parked)), pairs(changed)
        first = None
        if id_ in entries:
            of_row = [(one.position, other) for other, one in entries.items() if one.row == entries[id_].row]
            position, other = min(of_row)
            first = (other, position, _error(entries[other], errors.get(str(other).encode())))
        return Looked(
            token=None if mark is None else mark.split(b" ", 1)[0].decode(),
            first=first,
            live=live == version.encode(),
            there=bool(there),
            discarded=bool(discarded),
        )

    async def withdraw(self, id_: int, token: str) -> bool:
        """Take a mark away; return whether it was still there."""
        (there,) = await self._answer(scripts.WITHDRAW, {"id": str(id_), "token": token})
        return bool(there)

    async def _answer(self, text: str, asked: dict[str, Any]) -> list[Any]:
        answer: list[Any] = await self._call(text, asked)
        state = answer.pop(0)
        if state == b"unclaimed":
            raise NotFoundError("the projection isn't in the read store")
        return answer
