"""How fast versions are being built: what one look after another saw of their positions.

Nothing is kept beyond the process: after its start an operator knows a pace again once it has looked twice.
"""

import time
from collections import deque

from refold.projection.readstore import VersionStatus

#: Seconds of looks that a pace is made of; a build slows down and speeds up, so what was long ago tells nothing.
_WINDOW_SECONDS = 30.0


class Paces:
    """The paces of all Projections' builds, by (namespace, name)."""

    def __init__(self) -> None:
        self._looks: dict[tuple[str, str], tuple[str, deque[tuple[float, int]]]] = {}

    def see(self, key: tuple[str, str], building: VersionStatus | None, *, now: float | None = None) -> float | None:
        """Note how far a build is, None where nothing is being built; return its pace in events a second if known.

        Args:
            key: the Projection's namespace and name.
            building: the version that is being built.
            now: monotonic seconds, the clock's by default.
        """
        if building is None:
            self.forget(key)
            return None
        moment = time.monotonic() if now is None else now
        version, looks = self._looks.get(key, ("", deque()))
        if version != building.version:
            version, looks = building.version, deque()
            self._looks[key] = version, looks
        looks.append((moment, building.position))
        # One look from before the window stays: where looks are rare, a pace is that since the last one.
        while len(looks) > 2 and looks[1][0] < moment - _WINDOW_SECONDS:
            looks.popleft()
        began, first = looks[0]
        return (building.position - first) / (moment - began) if moment - began >= 1 else None

    def forget(self, key: tuple[str, str]) -> None:
        """Forget a Projection."""
        self._looks.pop(key, None)
