"""How many projectors a version of a Projection needs: enough to fold what waits within its target time. Pure.

What is needed is (events that wait ÷ target seconds + events a second that came and were folded) ÷ what one projector
folds a second.
The last of these is measured only while there is more to fold than is folded in a moment, or it would be the pace at
which events come, and only some time after the projectors' number has changed, since partitions change hands then.

More are wanted at once. Fewer are wanted once no look within the window wanted more, so that no noise in the
measurements makes the number go up and down more than once a window. Where nothing was ever measured and the
projectors keep up, one fewer is tried.
"""

import dataclasses
import math

from refold_operator.resources import ProjectorScaling

#: Looks after a change of the running projectors in which nothing is measured.
_SETTLE_LOOKS = 3
#: Looks that a measurement takes at least, and that it is made of at most; also those that arrivals are counted in.
_MEASURE_LOOKS = 2
_KNOWN_LOOKS = 12
#: So many looks in a row at which nothing was folded aren't the time that batches take, but an outage.
_PAUSES = 6
#: Projectors fold all the time where more waits than they fold in so many seconds.
_BUSY_SECONDS = 2.0
#: A need that is over what there is by no more than this share of it doesn't make them more; and fewer have to suffice
#: though each folds no more than this share of what it can, or they would be too few at the next breath of noise.
_MORE, _FEWER = 0.1, 0.8


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen of a version at one moment.

    Attributes:
        at: monotonic seconds.
        head: the sum of the heads of its partitions in the event store.
        applied: the sum of the positions that it has applied.
        lag: events that wait in partitions that don't stand still.
        busy: partitions with such events, or with events that came since the look before.
        partitions: all of them; more projectors than these have nothing to do.
        running: projectors that are ready.
        held: whether something needs a projector though no event waits, such as a parked one.
    """

    at: float
    head: int
    applied: int
    lag: int
    busy: int
    partitions: int
    running: int
    held: bool = False


@dataclasses.dataclass(frozen=True)
class Measured:
    """Events that were folded in so many seconds of one projector's time."""

    events: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is kept of a version from look to look.

    Attributes:
        replicas: how many projectors it is to have.
        since: when the number of running ones last changed.
        looks: the last ones, as many as arrivals are counted in.
        measured: the last measurements.
        wanted: (moment, projectors) of the looks in the window; of those with fewer than a later one only that one.
    """

    replicas: int
    since: float
    looks: tuple[Look, ...] = ()
    measured: tuple[Measured, ...] = ()
    wanted: tuple[tuple[float, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Change:
    """Another number of projectors: one word for programs, and for people why."""

    replicas: int
    reason: str
    message: str


def begin(replicas: int, *, now: float) -> Memory:
    """Return the memory of a version that has so many projectors."""
    return Memory(replicas, since=now, wanted=((now, replicas),))


def limits(scaling: ProjectorScaling, *, partitions: int | None, unseen: bool) -> tuple[int, int]:
    """Return the least and the greatest number of projectors.

    Args:
        scaling: what the spec says.
        partitions: of the version's streams, None where they aren't known yet.
        unseen: readers never saw the version; one projector has to find out what there is, to make it live.
    """
    most = scaling.max_replicas if partitions is None else min(scaling.max_replicas, partitions)
    return min(max(scaling.min_replicas, 1 if unseen else 0), most), most


def within(replicas: int, bounds: tuple[int, int]) -> int:
    """Return the number within `bounds` that is nearest to `replicas`."""
    least, most = bounds
    return max(least, min(most, replicas))


def step(
    memory: Memory, look: Look, scaling: ProjectorScaling, *, every: float, unseen: bool = False
) -> tuple[Memory, Change | None]:
    """Take in a look and decide.

    Args:
        memory: of the looks before.
        look: the new one.
        scaling: what the spec says.
        every: seconds between two looks.
        unseen: readers never saw the version.

    Returns:
        The memory for the next look, and the change where another number is decided.
    """
    bounds = limits(scaling, partitions=look.partitions, unseen=unseen)
    last = memory.looks[-1] if memory.looks else None
    since = memory.since if last is not None and last.running == look.running else look.at
    measured = memory.measured
    if last is not None and last.at >= since + _SETTLE_LOOKS * every:
        measured = _measured(measured, last, look, every)
    looks = (*(one for one in memory.looks if one.at > look.at - _KNOWN_LOOKS * every), look)
    pace = _pace(measured, every)
    # What came and still waits is counted once, or a burst would look like a load.
    coming = max(0, look.head - looks[0].head - look.lag) / (_KNOWN_LOOKS * every)
    wants = _wants(memory.replicas, look, looks, pace, coming, scaling, every)
    # A partition is folded by one projector: those beyond the partitions with events have nothing to do.
    useful = min(wants, max(1, *(one.busy for one in looks)))
    capped = within(max(useful, 1 if look.lag or look.held else 0), bounds)
    wanted = (
        *(
            (at, count)
            for at, count in memory.wanted
            if at > look.at - scaling.stabilization_window_seconds and count > capped
        ),
        (look.at, capped),
    )
    peak = wanted[0][1]
    replicas = within(capped if capped > memory.replicas else min(memory.replicas, peak), bounds)
    after = Memory(replicas, since, looks, measured, wanted)
    if replicas == memory.replicas:
        return after, None
    return after, _told(memory.replicas, replicas, wants, look, pace, coming, scaling, bounds)


def _measured(before: tuple[Measured, ...], last: Look, look: Look, every: float) -> tuple[Measured, ...]:
    """Return the measurements with that of the time between two looks, where it is one."""
    seconds, events = look.at - last.at, look.applied - last.applied
    at_work = min(look.running, last.busy, look.busy)
    waited = min(last.lag, look.lag)
    if events < 0 or at_work <= 0 or not 0 < seconds <= _KNOWN_LOOKS * every:
        return before
    if not waited or waited < events / seconds * _BUSY_SECONDS:
        return before
    moved = _moved(before)
    if len(before) - len(moved) >= _PAUSES:
        if not events:
            return before
        before = moved  # that was an outage
    return (*before[-(_KNOWN_LOOKS - 1) :], Measured(events, seconds * at_work))


def _moved(measured: tuple[Measured, ...]) -> tuple[Measured, ...]:
    """Return the measurements up to the last one with events: after it, a batch is under way, or something is away."""
    count = len(measured)
    while count and not measured[count - 1].events:
        count -= 1
    return measured[:count]


def _pace(measured: tuple[Measured, ...], every: float) -> float | None:
    """Return the events that one projector folds a second; None while too little was measured."""
    moved = _moved(measured)
    seconds = sum(one.seconds for one in moved)
    if len(moved) < _MEASURE_LOOKS or seconds < every:
        return None
    return sum(one.events for one in moved) / seconds


def _wants(
    replicas: int,
    look: Look,
    looks: tuple[Look, ...],
    pace: float | None,
    coming: float,
    scaling: ProjectorScaling,
    every: float,
) -> int:
    """Return how many projectors are wanted, by what waits and comes, and at which pace one folds."""
    work = look.lag / scaling.target_drain_seconds + coming
    if not work:
        return 0
    whole = look.at - looks[0].at >= (_KNOWN_LOOKS - 2) * every
    if pace is None:
        folded = (look.applied - looks[0].applied) / (_KNOWN_LOOKS * every)
        keeps_up = whole and all(one.lag < max(1.0, folded * _BUSY_SECONDS) for one in looks)
        return max(1, replicas - 1 if keeps_up else replicas)
    need = work / pace
    # Where nothing moves, more of them wouldn't either.
    stands = whole and look.applied == looks[0].applied and all(one.running and one.lag for one in looks)
    if need > replicas * (1 + _MORE) and not stands:
        return math.ceil(need)
    return min(replicas, math.ceil(need / _FEWER))


def _told(
    before: int,
    after: int,
    wants: int,
    look: Look,
    pace: float | None,
    coming: float,
    scaling: ProjectorScaling,
    bounds: tuple[int, int],
) -> Change:
    least, most = bounds
    limited = ""
    if wants > after:
        limit = "maxReplicas" if after == scaling.max_replicas else "the number of partitions with events"
        limited = f"; {wants} would be needed, and {limit} is {after}"
    elif wants < after == least:
        limited = f"; minReplicas is {scaling.min_replicas}"
    if after > before:
        known = "" if pace is None else f", and a projector folds about {pace:.0f} a second"
        why = (
            f"{look.lag} events wait, {coming:.1f} a second come besides{known} (targetDrainSeconds: "
            f"{scaling.target_drain_seconds}){limited}"
        )
        return Change(after, "EventsWait", why)
    if before > most:
        return Change(after, "Limits", f"no more than {most} are allowed and useful")
    quiet = f"for {scaling.stabilization_window_seconds} s"
    if after == 0:
        return Change(after, "NothingToDo", f"no event came {quiet}")
    return Change(after, "FewerSuffice", f"no more were needed {quiet}")
