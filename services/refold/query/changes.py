"""Following a read model: when it changed, and the rows of some keys as they are after each change.

A row changes only in a transaction that moves the positions (a projector's batch), takes events out of those that are
parked, or makes another version live. So version, positions and how often events left those parked, the *state*, tell
whether anything may have changed. While somebody watches, one look at the state every tenth of a second serves all;
where it has moved, the rows that are watched are read once for all watchers, and each is told of those that differ from
what it was told before.

What a watcher is told is the rows first and then the state that was looked at *before* they were read: so whoever has
heard of a state has rows that are as new, or newer. Who comes again with a state that is still the live one missed
nothing; any other is told all its rows anew. So nothing has to be kept for those that are away, and no change is missed
across replicas and swaps; a row that changed several times between two looks is told once, as it is.

A watcher that doesn't read holds no more than the latest data of each row that it has yet to be told.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b

import msgspec
import structlog

from refold.query import problems
from refold.query.freshness import Freshness
from refold.query.reader import MOST_KEYS, Reader
from refold.web.problems import Problem
from refold.web.sent_events import block

log = structlog.get_logger(__name__)

#: Seconds between two looks; where reading takes longer, as much: half of the time is left to others.
_LOOK_SECONDS = 0.1
#: Seconds until the next look where the read store doesn't answer.
_RETRY_SECONDS = 1.0
#: Watchers of one process, and the keys that they may watch together.
_MOST_WATCHERS = 1000
_MOST_WATCHED_KEYS = 10_000


class State(msgspec.Struct, frozen=True):
    """What moves where a row changes: the live version, its positions (a token), how often parked events left it."""

    version: str
    position: str
    unparked: int

    @classmethod
    def of(cls, freshness: Freshness) -> "State":
        """Return the state of a snapshot."""
        unparked = sum(partition.unparked for partition in freshness.partitions)
        return cls(freshness.live.version, freshness.token, unparked)

    @property
    def id(self) -> str:
        """The same for equal states, another for others, at every replica."""
        return blake2b(msgspec.json.encode(self), digest_size=12).hexdigest()


class Changes:
    """Everybody who watches the read model of `reader`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._watchers: set[Watcher] = set()
        self._keys = 0
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def watch(self, keys: Sequence[str], last_id: str | None, state: State) -> "Watcher":
        """Return a watcher of the rows of `keys`, from the state with `last_id` on; close it.

        Without an id it begins with the rows as they are, or, without keys, at `state`.

        Raises:
            Problem: 503 where there are too many already, or the service stops.
        """
        if self._stopping:
            raise problems.overloaded("the service is stopping")
        distinct = tuple(dict.fromkeys(keys))
        if len(self._watchers) >= _MOST_WATCHERS or self._keys + len(distinct) > _MOST_WATCHED_KEYS:
            raise problems.overloaded(f"{len(self._watchers)} readers watch {self._keys} rows here already")
        first = state.id if last_id is None and not distinct else None
        watcher = Watcher(distinct, last_id or first, first, self._forget)
        self._watchers.add(watcher)
        self._keys += len(distinct)
        if self._task is None:
            self._task = asyncio.create_task(self._look())
        return watcher

    def stop(self) -> None:
        """End all watchers, and take no more."""
        self._stopping = True
        for watcher in self._watchers:
            watcher.end()

    def _forget(self, watcher: "Watcher") -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            self._keys -= len(watcher.keys)

    async def _look(self) -> None:
        try:
            while self._watchers:
                begin = time.monotonic()
                try:
                    await self._look_once()
                except Problem:  # the read store is away, which the reader has logged
                    await asyncio.sleep(_RETRY_SECONDS)
                except Exception:
                    log.exception("A look for changes failed unexpectedly")
                    await asyncio.sleep(_RETRY_SECONDS)
                await asyncio.sleep(max(_LOOK_SECONDS, time.monotonic() - begin))
        finally:
            self._task = None

    async def _look_once(self) -> None:
        state = State.of(await self._reader.freshness())
        behind = [watcher for watcher in self._watchers if watcher.last_id != state.id]
        wanted = list({key: None for watcher in behind for key in watcher.keys})
        rows: dict[str, str | None] = dict.fromkeys(wanted)
        for at in range(0, len(wanted), MOST_KEYS):
            _, found = await self._reader.by_keys(wanted[at : at + MOST_KEYS])
            rows.update(found)
        for watcher in behind:
            watcher.offer(state, rows)


class Watcher:
    """One who watches; where the events of an answer come from (`sent_events.Source`)."""

    def __init__(
        self, keys: tuple[str, ...], last_id: str | None, first_id: str | None, forget: Callable[["Watcher"], None]
    ) -> None:
        self.keys = keys
        self.last_id = last_id
        self._first_id = first_id
        self._forget = forget
        self._state: State | None = None
        self._told: dict[str, bytes | None] = {}
        self._pending: dict[str, str | None] = {}
        self._rung = asyncio.Event()
        self._ended = False
        self._on_end: Callable[[], None] | None = None

    def offer(self, state: State, rows: Mapping[str, str | None]) -> None:
        """Take over what is to be told: a state, and rows that are as new (JSON text; None: there is none)."""
        for key in self.keys:
            data = rows[key]
            digest = None if data is None else blake2b(data.encode(), digest_size=16).digest()
            if key not in self._told or self._told[key] != digest:
                self._told[key] = digest
                self._pending[key] = data
        self.last_id = state.id
        self._state = state
        self._rung.set()

    def first_id(self) -> str | None:
        """Return the id of where it begins, where the first event isn't all that there is."""
        return self._first_id

    async def next(self, seconds: float) -> Iterable[bytes] | None:
        """Return the rows that changed and then the state; none where nothing has moved for `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        except TimeoutError:
            return ()
        if self._ended or self._state is None:
            return None
        self._rung.clear()
        state, pending = self._state, self._pending
        self._pending = {}
        blocks = [
            block(b'{"key":%b,"data":%b}' % (msgspec.json.encode(key), (data or "null").encode()), id_=None, kind="row")
            for key, data in pending.items()
        ]
        told = msgspec.json.encode({"version": state.version, "position": state.position})
        return [*blocks, block(told, id_=state.id, kind="position")]

    def on_end(self, call: Callable[[], None]) -> None:
        """Have `call` called when it is ended; at once where it is."""
        self._on_end = call
        if self._ended:
            call()

    def end(self) -> None:
        """Have `next` return None."""
        if not self._ended:
            self._ended = True
            self._rung.set()
            if self._on_end is not None:
                self._on_end()

    def close(self) -> None:
        """Watch no more."""
        self._forget(self)
