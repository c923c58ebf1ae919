"""How fast a build may work beside the live version."""

import pytest
from refold.projection.readstore import LiveProgress
from refold.projection.throttle import Throttle


def shares(*looks: LiveProgress | None) -> list[float]:
    throttle = Throttle()
    result = []
    for look in looks:
        throttle.look(look)
        result.append(throttle.share)
    return result


def live(position: int, lag_seconds: float) -> LiveProgress:
    return LiveProgress(position=position, lag_seconds=lag_seconds)


def test_a_build_without_another_live_version_or_one_that_keeps_up_has_full_speed() -> None:
    assert shares(None, None) == [1, 1]
    assert shares(live(1, 0.0), live(50, 0.05), live(100, 0.0)) == [1, 1, 1]


def test_a_live_version_that_lags_and_gets_on_slows_it_down_but_never_below_a_tenth() -> None:
    found = shares(*(live(position, 1.0) for position in range(10)))
    assert found[:4] == [1, 0.5, 0.25, 0.125]
    assert min(found) == 0.125
    throttle = Throttle()
    throttle.share = min(found)
    assert throttle.rest(1.0) / 9 < 1, "more than a tenth of the time is work, since smaller pages cost more"


def test_a_live_version_that_does_not_get_on_is_not_waited_for() -> None:
    assert shares(*(live(7, 60.0) for _ in range(5))) == [1] * 5


def test_full_speed_comes_back_when_the_lag_is_gone() -> None:
    lagging = [live(position, 1.0) for position in range(6)]
    found = shares(*lagging, *(live(10 + n, 0.0) for n in range(8)))
    assert found[-1] == 1
    assert sorted(found[5:]) == found[5:], "step by step"
    assert shares(*lagging, None)[-1] == 1


def test_pages_shrink_and_rests_grow_with_the_share() -> None:
    throttle = Throttle()
    assert (throttle.page(10_000), throttle.rest(0.2)) == (10_000, 0)
    throttle.share = 0.5
    assert (throttle.page(10_000), throttle.rest(0.2)) == (5_000, pytest.approx(0.2))
    throttle.share = 0.125
    assert (throttle.page(10_000), throttle.rest(0.2)) == (2_500, pytest.approx(1.4))
    assert throttle.page(1) == 1
    assert throttle.rest(100) == 5, "a database that stood still isn't waited for another ten minutes"
