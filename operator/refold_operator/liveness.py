"""Whether the process still gets on with its work, for its liveness probe: a restart must be worth it.

Looked at in the event loop each second, and asked from the probes' threads: a loop that doesn't turn is told, too.
"""

import asyncio
import time
from collections.abc import Callable, Iterable

#: The event loop is stuck if it hasn't run for so many seconds.
STUCK_SECONDS = 60.0
_LOOK_SECONDS = 1.0


class Liveness:
    """What `looks` find; each returns what doesn't get on, or None."""

    def __init__(self, looks: Iterable[Callable[[], str | None]]) -> None:
        self._looks = list(looks)
        self._beat = time.monotonic()
        self._wrong: str | None = None

    async def keep(self) -> None:
        """Look until cancelled."""
        while True:
            self._beat = time.monotonic()
            self._wrong = next((wrong for look in self._looks if (wrong := look()) is not None), None)
            await asyncio.sleep(_LOOK_SECONDS)

    def wrong(self) -> str | None:
        """Return what doesn't get on; None where all does. May be called from any thread."""
        silent = time.monotonic() - self._beat
        if silent > STUCK_SECONDS:
            return f"the event loop hasn't run for {silent:.0f} s"
        return self._wrong
