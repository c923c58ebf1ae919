"""How readers are handed over from the live version to another while events keep coming.

Both versions follow their streams on their own, so the live one is nearly always ahead somewhere, if only by the events
of some milliseconds. A moment at which it is so in no partition may never come. So a read store lets the other version
catch up, in two steps:

1. Where the live version is now is a mark. The other one must reach it soon, else nothing happens: it is too far behind
   or stands still, and that is no reason to keep the live one from its work.
2. The live version is held back: its projectors wait before they write. As soon as the other one is where the live one
   stands, readers are moved and the live one goes on; within `HELD_SECONDS` it goes on in any case, and the next try
   begins with step 1.

Who moves readers looks at both versions once more, in one step in which neither of them can write, so that holding back
is no more than help: where it doesn't work, readers stay where they are.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec

#: Seconds within which the mark must be reached, and for which the live version is held back at most.
MARK_SECONDS = 1.0
HELD_SECONDS = 2.0
#: Events behind the live version that one projector folds within `MARK_SECONDS` at its fastest: beyond them none waits.
_MOST_BEHIND = 100_000
_LOOK_SECONDS = 0.02

#: Incarnation and number of a partition.
Place = tuple[str, int]


class Standing(msgspec.Struct, frozen=True):
    """How a version stands beside the live one, at one moment.

    Both mappings have the version's partitions; they are empty where it is live itself, or none is.
    """

    #: The last applied position.
    applied: Mapping[Place, int]
    #: The position that it has to reach: the live version's; the head, where that one doesn't fold the partition, and
    #: null where nobody has seen the head yet.
    wanted: Mapping[Place, int | None]
    #: Whether more events are without effect in it than in the live one.
    lacks_more: bool

    @property
    def behind(self) -> int | None:
        """Events that it has to apply before readers may see it; None: these aren't all."""
        if self.lacks_more:
            return None
        missing = 0
        for place, wanted in self.wanted.items():
            if wanted is None:
                return None
            missing += max(0, wanted - self.applied[place])
        return missing


async def near(standing: Callable[[], Awaitable[Standing]]) -> bool:
    """Return whether a version comes to where the live one is now, soon (step 1)."""
    mark = await standing()
    if mark.behind is None or mark.behind > _MOST_BEHIND:
        return False

    async def reached() -> bool:
        now = (await standing()).applied
        # nothing is to be reached any more where it went live meanwhile, or is gone: step 2 tells
        return not now or all(now[place] >= (wanted or 0) for place, wanted in mark.wanted.items())

    return mark.behind == 0 or await within(MARK_SECONDS, reached)


async def within(seconds: float, ask: Callable[[], Awaitable[bool]]) -> bool:
    """Ask again and again for so long; return whether the answer was true."""
    deadline = time.monotonic() + seconds
    while not await ask():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_LOOK_SECONDS)
    return True
