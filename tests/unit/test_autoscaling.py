"""How many projectors are decided on: bounds, the window, and a simulated version with a noisy pace."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from refold_operator import autoscaler, autoscaling
from refold_operator.autoscaling import Look, Memory
from refold_operator.resources import Projectors, ProjectorScaling

EVERY = 5.0


def scaling(**changes: int) -> ProjectorScaling:
    values = {"minReplicas": 0, "maxReplicas": 20, "targetDrainSeconds": 30, "stabilizationWindowSeconds": 60}
    return ProjectorScaling.model_validate({**values, **changes})


@st.composite
def scalings(draw: st.DrawFn) -> ProjectorScaling:
    least, most = sorted((draw(st.integers(0, 12)), draw(st.integers(1, 12))))
    return scaling(
        minReplicas=least,
        maxReplicas=most,
        targetDrainSeconds=draw(st.integers(1, 120)),
        stabilizationWindowSeconds=draw(st.sampled_from([0, 5, 60, 300])),
    )


#: What can happen between two looks: seconds, events that came, the share of what waited that was folded, the share of
#: the rest that stands still, the share of busy partitions and of running projectors, whether something is held.
CHANGES = st.tuples(
    st.sampled_from([EVERY, EVERY * 1.1, EVERY * 30]), st.sampled_from([0, 0, 1, 300, 10**4, 10**9]),
    st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]), st.booleans(),
)  # fmt: skip


@st.composite
def histories(draw: st.DrawFn) -> list[Look]:
    """Return looks at a version of some partitions."""
    partitions = draw(st.integers(1, 12))
    looks, at, head, applied = [], 0.0, 0, 0
    for seconds, came, folded, stands, busy, running, held in draw(st.lists(CHANGES, min_size=1, max_size=30)):
        at += seconds
        head += came
        applied += round((head - applied) * folded)
        lag = round((head - applied) * (1 - stands))
        at_work = max(1 if lag else 0, round(partitions * busy))
        looks.append(Look(at, head, applied, lag, at_work, partitions, round(partitions * running), held))
    return looks


def decided(
    looks: list[Look], rules: ProjectorScaling, begun: int, *, unseen: bool = False
) -> Iterator[tuple[Look, int, int]]:
    """Yield each look with the number of projectors before and after it."""
    memory = autoscaling.begin(begun, now=0.0)
    for look in looks:
        before = memory.replicas
        memory, change = autoscaling.step(memory, look, rules, every=EVERY, unseen=unseen)
        assert (change is None) == (memory.replicas == before)
        assert change is None or (change.replicas == memory.replicas and change.message)
        yield look, before, memory.replicas


@settings(max_examples=60)
@given(histories(), scalings(), st.integers(0, 12), st.booleans())
def test_there_are_never_more_than_allowed_or_than_partitions_nor_fewer_than_allowed(
    looks: list[Look], rules: ProjectorScaling, begun: int, unseen: bool
) -> None:
    for look, _, after in decided(looks, rules, begun, unseen=unseen):
        assert after <= rules.max_replicas
        assert after <= look.partitions
        assert after >= min(rules.min_replicas, look.partitions)
        if look.lag or look.held or unseen:
            assert after >= 1, "what waits is folded by somebody"


@settings(max_examples=60)
@given(histories(), scalings(), st.integers(1, 12))
def test_after_more_there_are_fewer_only_after_the_window(
    looks: list[Look], rules: ProjectorScaling, begun: int
) -> None:
    assume(begun <= min(rules.max_replicas, looks[0].partitions))
    raised = 0.0  # as if it had just been begun
    for look, before, after in decided(looks, rules, begun):
        if after < before:
            assert look.at - raised >= rules.stabilization_window_seconds
        if after > before:
            raised = look.at


@settings(max_examples=60)
@given(histories(), scalings())
def test_what_is_kept_does_not_grow(looks: list[Look], rules: ProjectorScaling) -> None:
    memory = autoscaling.begin(0, now=0.0)
    for look in looks:
        memory, _ = autoscaling.step(memory, look, rules, every=EVERY)
    assert len(memory.looks) <= 13
    assert len(memory.measured) <= 12
    assert len(memory.wanted) <= rules.max_replicas + 1


class Version:
    """A version that is simulated: its projectors fold `pace` events a second each, give or take `noise`."""

    def __init__(
        self, rules: ProjectorScaling, *, pace: float, noise: float = 0.0, partitions: int = 12, begun: int = 1,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.rules, self.pace, self.noise, self.partitions = rules, pace, noise, partitions
        self.memory: Memory = autoscaling.begin(begun, now=0.0)
        self.at = self.head = self.applied = 0.0
        self.running, self.starting = begun, 0.0
        self.history: list[tuple[float, int]] = [(0.0, begun)]
        self._random = random.Random(seed)

    @property
    def lag(self) -> int:
        return int(self.head) - int(self.applied)

    def run(self, seconds: float, *, coming: float | Callable[[float], float] = 0.0) -> None:
        """Let so many seconds pass in which so many events come each second."""
        end = self.at + seconds
        while self.at < end:
            self.at += EVERY
            came = (coming(self.at) if callable(coming) else coming) * EVERY
            self.head += came
            able = self.pace * self.running * EVERY * self._random.uniform(1 - self.noise, 1 + self.noise)
            if self.starting > 0:
                able *= 0.3  # partitions change hands
                self.starting -= EVERY
            self.applied = min(self.head, self.applied + able)
            busy = self.partitions if self.lag or came else 0
            look = Look(self.at, int(self.head), int(self.applied), self.lag, busy, self.partitions, self.running)
            self.memory, change = autoscaling.step(self.memory, look, self.rules, every=EVERY)
            if change is not None:
                self.history.append((self.at, change.replicas))
            if self.running != self.memory.replicas:
                self.running, self.starting = self.memory.replicas, 10.0

    @property
    def turns(self) -> int:
        """How often it went up after it had gone down."""
        counts = [count for _, count in self.history]
        steps = [after - before for before, after in itertools.pairwise(counts)]
        return sum(1 for before, after in itertools.pairwise(steps) if before < 0 < after)


@settings(max_examples=12, phases=[Phase.reuse, Phase.generate])
@given(
    st.floats(0, 0.4), st.integers(10, 2000), st.floats(0.3, 8.0), st.integers(0, 2**32), st.sampled_from([60, 300])
)  # fmt: skip
def test_a_steady_load_with_a_noisy_pace_does_not_make_it_flap(
    noise: float, pace: int, load: float, seed: int, window: int
) -> None:
    rules = scaling(minReplicas=1, stabilizationWindowSeconds=window)
    version = Version(rules, pace=pace, noise=noise, seed=seed)
    version.run(1800, coming=pace * load)
    settled = len(version.history)
    version.run(3600, coming=pace * load)
    assert version.memory.replicas >= math.ceil(load * 0.9), "it keeps up"
    assert version.lag <= pace * load * 60
    assert len(version.history) - settled <= 2, version.history
    assert version.turns <= 2, version.history


def test_a_backlog_is_drained_in_about_the_target_and_then_there_are_fewer() -> None:
    version = Version(scaling(minReplicas=1), pace=100)
    version.head = 15_000
    version.run(80)
    most = max(count for _, count in version.history)
    assert most in (4, 5), "15,000 events in 30 s at 100 a second, less what was folded while that was measured"
    assert version.lag == 0
    version.run(120)
    assert version.memory.replicas == 1
    assert version.turns == 0


def test_an_idle_version_goes_to_zero_and_comes_back_with_the_first_event() -> None:
    version = Version(scaling(), pace=100)
    version.run(65)
    assert version.memory.replicas == 0
    version.head += 1
    version.run(EVERY)
    assert version.memory.replicas == 1
    version.run(200)
    assert version.memory.replicas == 0
    assert [count for _, count in version.history] == [1, 0, 1, 0]


def test_a_known_pace_serves_at_once_after_zero() -> None:
    version = Version(scaling(), pace=100)
    version.head = 20_000
    version.run(600)
    assert version.memory.replicas == 0
    version.head += 20_000
    version.run(EVERY)
    assert version.memory.replicas == 7


def test_a_load_that_grows_is_followed_before_the_backlog_is_long() -> None:
    version = Version(scaling(minReplicas=1), pace=100)
    version.run(600, coming=lambda at: at)  # 600 events a second in the end
    assert version.memory.replicas in (6, 7, 8)
    assert version.lag < 30 * 600
    assert version.turns == 0


def test_projectors_that_keep_up_without_ever_being_measured_are_tried_with_one_fewer() -> None:
    version = Version(scaling(minReplicas=1), pace=100, begun=6)  # as after a restart of the operator
    version.run(1800, coming=150)
    assert version.memory.replicas == 2
    assert version.turns <= 1
    assert version.lag < 150 * 60


def test_batches_that_take_longer_than_a_look_are_measured_with_their_pauses() -> None:
    memory = autoscaling.begin(1, now=0.0)
    for number in range(1, 30):  # 1,000 events each 10 s
        look = Look(number * EVERY, 100_000, number // 2 * 1000, 100_000 - number // 2 * 1000, 12, 12, running=1)
        memory, change = autoscaling.step(memory, look, scaling(), every=EVERY)
        if change is not None:
            assert "folds about 100 a second" in change.message or "folds about 200 a second" in change.message
    assert autoscaling._pace(memory.measured, EVERY) == pytest.approx(100, rel=0.1)


def test_an_outage_is_no_pace() -> None:
    version = Version(scaling(minReplicas=1), pace=100)
    version.head = 10**6
    version.run(60)
    pace = autoscaling._pace(version.memory.measured, EVERY)
    version.pace = 0
    version.run(300)
    assert autoscaling._pace(version.memory.measured, EVERY) == pace
    version.pace = 100
    version.run(30)
    assert autoscaling._pace(version.memory.measured, EVERY) == pytest.approx(pace, rel=0.2)


def test_where_nothing_moves_more_projectors_are_not_tried() -> None:
    version = Version(scaling(minReplicas=1), pace=100, begun=2)
    version.run(120, coming=190)
    version.pace = 0
    before = version.memory.replicas
    version.run(55, coming=190)
    version.run(600, coming=190)
    assert version.memory.replicas <= version.partitions
    assert [count for at, count in version.history if at > 190] == []
    assert before <= version.memory.replicas


def test_one_hot_partition_takes_one_projector() -> None:
    memory = autoscaling.begin(1, now=0.0)
    for number in range(1, 40):
        look = Look(number * EVERY, 10**6, number * 500, 10**6 - number * 500, 1, 12, running=1)
        memory, _ = autoscaling.step(memory, look, scaling(), every=EVERY)
    assert memory.replicas == 1


def test_what_is_decided_is_told_with_its_numbers() -> None:
    memory = autoscaling.begin(1, now=0.0)
    memory = dataclasses.replace(memory, measured=(autoscaling.Measured(500, 5.0),) * 2)
    look = Look(EVERY, 40_000, 10_000, 30_000, 6, 6, running=1)
    after, change = autoscaling.step(memory, look, scaling(), every=EVERY)
    assert change is not None
    assert (after.replicas, change.reason) == (6, "EventsWait")
    assert change.message == (
        "30000 events wait, 0.0 a second come besides, and a projector folds about 100 a second (targetDrainSeconds: "
        "30); 10 would be needed, and the number of partitions with events is 6"
    )
    _, change = autoscaling.step(memory, look, scaling(maxReplicas=4), every=EVERY)
    assert change is not None
    assert change.message.endswith("; 10 would be needed, and maxReplicas is 4")


@pytest.mark.parametrize(
    ("spec", "seen"),
    [
        ({"autoscaling": {"maxReplicas": 3}}, True),
        ({"autoscaling": {"maxReplicas": 3}, "replicas": 0}, False),
        ({"replicas": 2}, False),
    ],
)
def test_zero_replicas_stop_folding_whatever_is_scaled(spec: dict[str, Any], seen: bool) -> None:
    assert (Projectors.model_validate(spec).scaling is not None) == seen


def test_each_change_that_a_status_tells_is_an_event_once() -> None:
    def status(**replicas: int) -> dict[str, Any]:
        entries = [
            {"version": version, "desiredReplicas": count, "reason": "EventsWait", "message": "12 events wait"}
            for version, count in replicas.items()
        ]
        return {"autoscaling": entries} if entries else {}

    assert autoscaler.told(status(a=1, b=3), status(a=4, b=0)) == [
        ("ScaledUp", "projectors of version a from 1 to 4: 12 events wait"),
        ("ScaledDown", "projectors of version b from 3 to 0: 12 events wait"),
    ]
    for before in (status(), status(a=4), status(b=1)):
        assert autoscaler.told(before, status(a=4)) == []
    assert autoscaler.told(status(a=4), status()) == []
