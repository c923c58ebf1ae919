"""How fast a version that is being built may read and write, so that the live one keeps up.

A build takes what CPU and disks give, and takes it from the live version's projectors and from appends. While the live
version lags and gets on, the build works a share of the time only, in smaller pages with pauses between them; the share
is halved with each look that finds it so, and grows again with each that doesn't. A live version that lags without
getting on (its projectors are scaled to zero, or stand still) isn't helped by waiting.
"""

from refold.projection.readstore import LiveProgress

#: Seconds between two looks at the live version: as often as its projectors look at the heads.
LOOK_SECONDS = 1.0
#: Seconds of lag that readers of the live version don't notice; an event takes less than that without a build.
_LAG_SECONDS = 0.1
#: The least share. Smaller pages cost more an event, so that a tenth of full speed is left with more than a tenth.
_LEAST = 0.125
#: What took long since a database stood still says nothing of how long to rest.
_MOST_REST_SECONDS = 5.0
#: The smallest page, as a part of a full one.
_SMALLEST_PAGE = 0.25


class Throttle:
    """Of one projector process. Pure: who calls it looks and waits."""

    def __init__(self) -> None:
        #: The part of its time that a build may work, from 0.125 to 1.
        self.share = 1.0
        self._position: int | None = None

    def look(self, live: LiveProgress | None) -> None:
        """Take note of how far the live version is; None where there is no other than this one."""
        if live is None:
            self.share, self._position = 1.0, None
            return
        moved = self._position is not None and live.position > self._position
        self._position = live.position
        if moved and live.lag_seconds > _LAG_SECONDS:
            self.share = max(_LEAST, self.share / 2)
        else:
            self.share = min(1.0, self.share * 1.5)

    def page(self, events: int) -> int:
        """Return how many events to read at once, where a full page has `events`."""
        return max(1, round(events * max(_SMALLEST_PAGE, self.share)))

    def rest(self, worked: float) -> float:
        """Return for how many seconds to do nothing after so many seconds of work."""
        return min(_MOST_REST_SECONDS, worked * (1 / self.share - 1))
