"""How many events may be parked, and where a partition stops when they are too many."""

from collections.abc import Iterable, Mapping

from refold.projection.fold import ParkedEvent


def stops(
    parked: Iterable[ParkedEvent], counts: Mapping[tuple[str, int], int], limit: int
) -> dict[tuple[str, int], ParkedEvent]:
    """Return by (incarnation, partition) the first parked event that goes beyond the limit; empty where none does.

    Args:
        parked: what a batch would park; of one partition in the order of positions.
        counts: how many are parked already, by (incarnation, partition).
        limit: how many may be, in each partition.
    """
    taken: dict[tuple[str, int], int] = {}
    found: dict[tuple[str, int], ParkedEvent] = {}
    for one in parked:
        key = (one.incarnation, one.event.partition)
        taken[key] = taken.get(key, counts.get(key, 0)) + 1
        if taken[key] > limit:
            found.setdefault(key, one)
    return found
