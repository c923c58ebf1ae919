"""How many of the appends that wait go into the next group."""

import pytest
from refold.eventstore.pace import Pace


def paced(*, transaction: float, append: float, appends: int = 32) -> Pace:
    """Return a pace after many groups of `appends`."""
    pace, worked = Pace(), 5.0
    for _ in range(100):
        pace.took(appends, transaction, worked=worked)
        worked += append * appends
    return pace


def test_all_go_together_where_a_transaction_takes_longer_than_the_callers_work() -> None:
    pace = paced(transaction=0.010, append=0.000_02)
    assert pace.share(0, 32) == 32
    assert pace.share(31, 1) == 32  # the callers of the 31 are waited for


@pytest.mark.parametrize("waiting", [1, 2, 31, 32, 2000])
def test_a_half_goes_where_the_callers_work_takes_longer_than_a_transaction(waiting: int) -> None:
    pace = paced(transaction=0.000_05, append=0.000_1)
    assert pace.share(0, waiting) == (waiting + 1) // 2


def test_two_groups_that_alternate_become_equal() -> None:
    pace = paced(transaction=0.000_5, append=0.000_1)
    under_way, waiting = 30, 2
    for _ in range(3):
        group = min(waiting, pace.share(under_way, waiting))
        under_way, waiting = group, under_way + waiting - group
    assert (under_way, waiting) == (16, 16)


def test_the_first_appends_of_all_do_not_wait_for_a_measurement() -> None:
    assert Pace().share(0, 1) == 1
    assert Pace().share(0, 32) == 16
