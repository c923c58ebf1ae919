"""Which shards this process may relay: advisory locks of PostgreSQL, all held by the watcher's session.

The lock decides who takes a shard over; it isn't what makes the relay exact. A process that was stopped past its locks
and goes on is fenced by Kafka, since its successor has called `init_transactions`; whoever initialises, rightly or not,
reads the checkpoints afterwards.

The shards are spread evenly: no process holds more than its share, the number of shards divided by that of the relays
that are there, rounded up. Each relay's session holds one more lock, in share mode, by which they count each other.
Whoever has too many lets its shards end their transactions, then frees their locks, and tells the others.
"""

import threading
import time
from collections.abc import Callable, Iterable

#: The holder trusts a lock for less long than PostgreSQL keeps it without a heartbeat (`wake.IDLE_SESSION`).
_TRUST_SECONDS = 4.0


def surplus(held: Iterable[int], leaving: frozenset[int], share: int) -> frozenset[int]:
    """Return which of the `held` shards are to be given up, so that `share` are left: first those that are on it."""
    ordered = sorted(held, key=lambda shard: (shard not in leaving, -shard))
    return frozenset(ordered[: max(0, len(ordered) - share)])


class Locks:
    """What this process holds: written by the watcher, which has the session, and asked by the shards' threads."""

    def __init__(self, shards: int, *, changed: Callable[[int], None]) -> None:
        """`changed` is called with each shard that was locked, is to be given up, or no longer is."""
        self.shards = shards
        self._changed = changed
        self._mutex = threading.Lock()
        self._held: frozenset[int] = frozenset()
        self._leaving: frozenset[int] = frozenset()
        self._left: set[int] = set()
        self._beat = float("-inf")
        self._closing = False

    def holds(self, shard: int) -> bool:
        """Tell whether the shard's lock is held, as far as the last heartbeat tells."""
        return shard in self._held and self.alive

    def wants(self, shard: int) -> bool:
        """Tell whether the shard is held and to be kept."""
        return self.holds(shard) and shard not in self._leaving

    def leave(self, shard: int) -> None:
        """Note that nothing of this process works on the shard, so that its lock can be freed if it is to be."""
        with self._mutex:
            if self._closing or shard in self._leaving:
                self._left.add(shard)

    def close(self) -> None:
        """Take no more shards, and give up those that are held as they are left."""
        self._closing = True

    @property
    def alive(self) -> bool:
        """Whether the session has a heartbeat."""
        return time.monotonic() - self._beat < _TRUST_SECONDS

    @property
    def held(self) -> frozenset[int]:
        """The shards whose locks the session holds."""
        return self._held

    @property
    def closing(self) -> bool:
        """Whether the process is about to end."""
        return self._closing

    @property
    def unsettled(self) -> bool:
        """Whether a lock is to be freed now."""
        return bool(self._left) or (self._closing and self._leaving != self._held)

    def settle(self, locked: Iterable[int], *, relays: int, beat: float) -> frozenset[int]:
        """Note a heartbeat, sent at `beat`: shards that it locked, and how many relays there are.

        Returns:
            The shards to unlock now: they were left, and this process no longer works on them.
        """
        with self._mutex:
            self._beat = beat
            self._held |= frozenset(locked)
            share = 0 if self._closing else -(-self.shards // relays)
            former, self._leaving = self._leaving, surplus(self._held, self._leaving, share)
            freed = self._leaving & self._left
            self._left.clear()
            self._held -= freed
            self._leaving -= freed
            changed = frozenset(locked) | (former ^ self._leaving)
        for shard in changed:
            self._changed(shard)
        return freed

    def lost(self) -> None:
        """Note that the session is gone, and the locks with it."""
        with self._mutex:
            self._held = self._leaving = frozenset()
            self._left.clear()
