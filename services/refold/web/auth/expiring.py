"""Answers that are kept for a time, in bounded memory, and asked for once however many wait for them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Fresh(NamedTuple, Generic[V]):
    """An answer as it comes in.

    Args:
        value: the answer.
        seconds: how long it may be used; 0 or less: by those who wait for it only.
        good: answers that aren't (tokens that nobody knows, for one) are kept apart, so that a flood of them can't
            push the good ones out.
    """

    value: V
    seconds: float
    good: bool


class Expiring(Generic[K, V]):
    """A cache of answers.

    Args:
        most: how many good answers are kept, and how many others. Where there is no room the oldest goes.
        asked: how many may be asked for at a time.
        clock: seconds that never go back.
    """

    def __init__(self, most: int, asked: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._most_asked = asked
        self._clock = clock
        self._good: dict[K, tuple[V, float]] = {}
        self._others: dict[K, tuple[V, float]] = {}
        self._asked: dict[K, asyncio.Future[V]] = {}

    def __len__(self) -> int:
        return len(self._good) + len(self._others)

    async def get(self, key: K, ask: Callable[[], Awaitable[Fresh[V]]]) -> V:
        """Return the answer for `key`, from `ask` where none is kept.

        A caller that is cancelled doesn't take the answer from the others. An error of `ask` is raised to all who wait
        for it, and not kept.

        Raises:
            OverflowError: as many answers as may be are being asked for already.
        """
        now = self._clock()
        kept = self._good.get(key) or self._others.get(key)
        if kept is not None and kept[1] > now:
            return kept[0]
        asked = self._asked.get(key)
        if asked is None:
            if len(self._asked) >= self._most_asked:
                raise OverflowError
            # Nothing is awaited between the look-up and here, so there is one for a key.
            asked = self._asked[key] = asyncio.ensure_future(self._ask(key, ask, now))
            asked.add_done_callback(_retrieve)
        return await asyncio.shield(asked)

    async def _ask(self, key: K, ask: Callable[[], Awaitable[Fresh[V]]], began: float) -> V:
        try:
            value, seconds, good = await ask()
        finally:
            del self._asked[key]
        self._good.pop(key, None)
        self._others.pop(key, None)
        if seconds > 0:
            # An answer is as old as its question.
            self._keep(self._good if good else self._others, key, value, began + seconds)
        return value

    def _keep(self, kept: dict[K, tuple[V, float]], key: K, value: V, until: float) -> None:
        # Dictionaries keep the order of insertion, so the first are the oldest.
        while kept and (len(kept) >= self._most or kept[next(iter(kept))][1] <= self._clock()):
            del kept[next(iter(kept))]
        kept[key] = (value, until)


def _retrieve(done: "asyncio.Future[V]") -> None:
    """Look at an outcome that nobody may wait for any more, so that asyncio doesn't complain."""
    if not done.cancelled():
        done.exception()
