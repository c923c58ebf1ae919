"""How fresh an answer is: the positions of the snapshot that it was read from. Pure."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from refold import tokens
from refold.projection.readstore import Snapshot
from refold.query.live import LiveVersion

#: Seconds without a look at the head after which nobody seems to look: the projector stores one every ten.
_UNSEEN_SECONDS = 30.0


class Freshness:
    """The positions of a snapshot of `live`."""

    def __init__(self, live: LiveVersion, snapshot: Snapshot) -> None:
        self.live = live
        self.partitions = snapshot.partitions
        self._now = snapshot.now

    @cached_property
    def applied(self) -> dict[tuple[str, int], int]:
        """The positions by incarnation and partition."""
        return {(p.incarnation, p.partition): p.position for p in self.partitions}

    @cached_property
    def token(self) -> str:
        """All that is applied, as a token: sent as Refold-Token, the next answer is never older than this one."""
        return tokens.encode(tokens.Position(p.incarnation, p.partition, p.position) for p in self.partitions)

    @cached_property
    def lag_events(self) -> int | None:
        """Events that the projector knew of and had not applied; None before it looked at every partition."""
        if any(p.seen_at is None for p in self.partitions):
            return None
        return sum(max(0, p.head - p.position) for p in self.partitions)

    @cached_property
    def lag_seconds(self) -> float | None:
        """How long the oldest event that may be missing has been waiting; None before every partition was looked at.

        Where the projector is gone this grows: nobody knows what came after its last look.
        """
        lag = 0.0
        for p in self.partitions:
            if p.seen_at is None:
                return None
            unseen = max(0.0, self._now - p.seen_at)
            if p.head > p.position:
                lag = max(lag, p.lag_seconds + unseen)
            elif unseen > _UNSEEN_SECONDS and not self.live.ended:
                lag = max(lag, unseen)
        return round(lag, 3)

    @cached_property
    def headers(self) -> dict[str, str]:
        """The headers that every answer from this snapshot carries."""
        headers = {"refold-position": self.token}
        if self.lag_events is not None and self.lag_seconds is not None:
            headers["refold-lag-events"] = str(self.lag_events)
            headers["refold-lag-seconds"] = f"{self.lag_seconds:.3f}"
        return headers

    @cached_property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """The same as ASGI has them."""
        return [(name.encode(), value.encode()) for name, value in self.headers.items()]

    def missing(self, wanted: Iterable[tokens.Position]) -> list[dict[str, Any]]:
        """Return, for people and programs, which positions of `wanted` aren't applied; empty where all are.

        Raises:
            KeyError: a position is of a stream (or an incarnation or a partition of it) that the version doesn't fold.
        """
        missing = []
        for position in wanted:
            reached = self.applied[position.incarnation, position.partition]
            if reached < position.position:
                stream = self.live.streams[position.incarnation]
                missing.append(
                    {
                        "stream": f"{stream.namespace}/{stream.name}",
                        "partition": position.partition,
                        "wanted": position.position,
                        "applied": reached,
                    }
                )
        return missing
