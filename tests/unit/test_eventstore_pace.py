"""How many of the appends that wait go into the next group."""

import pytest
from refold.eventstore.pace import Pace


def paced(*, transaction: float, append: float, appends: int = 32) -> tuple[Pace, float]:
    """Return a pace after many groups of `appends`, and the seconds that were worked until then."""
    pace, worked = Pace(), 0.0
    for _ in range(100):
        pace.share(0, appends, worked=worked)
        pace.took(appends, transaction)
        worked += append * appends
    return pace, worked


def test_all_go_together_where_a_transaction_takes_longer_than_the_callers_work() -> None:
    pace, worked = paced(transaction=0.010, append=0.000_02)
    assert pace.share(0, 32, worked=worked) == 32
    assert pace.share(16, 16, worked=worked) == 16


@pytest.mark.parametrize("waiting", [1, 2, 31, 32, 2000])
def test_a_half_goes_where_the_callers_work_takes_longer_than_a_transaction(waiting: int) -> None:
    pace, worked = paced(transaction=0.000_05, append=0.000_1)
    assert pace.share(0, waiting, worked=worked) == (waiting + 1) // 2


def test_two_groups_that_alternate_become_equal() -> None:
    pace, worked = paced(transaction=0.000_5, append=0.000_1)
    under_way, waiting = 30, 2
    for _ in range(3):
        group = min(waiting, pace.share(under_way, waiting, worked=worked))
        under_way, waiting = group, under_way + waiting - group
    assert (under_way, waiting) == (16, 16)


def test_the_first_appends_of_all_do_not_wait_for_a_measurement() -> None:
    assert Pace().share(0, 1, worked=5.0) == 1
    assert Pace().share(0, 32, worked=5.0) == 16
