"""Which versions readers may be handed over to soon, so that the live one may be held back for them."""

import pytest
from refold.projection.readstore.handover import Standing, near

FIRST, SECOND = ("a", 0), ("a", 1)


async def asked_of(*standings: Standing) -> tuple[bool, int]:
    """Return whether a version that stands so, and last so for good, is near, and how often that was asked."""
    asked = 0

    async def ask() -> Standing:
        nonlocal asked
        asked += 1
        return standings[min(asked, len(standings)) - 1]

    return await near(ask), asked


@pytest.mark.parametrize(
    "standing",
    [
        Standing({FIRST: 6}, {FIRST: 6}, lacks_more=True),
        Standing({FIRST: 6, SECOND: 0}, {FIRST: 6, SECOND: None}, lacks_more=False),
        Standing({FIRST: 6}, {FIRST: 10_000_000}, lacks_more=False),
    ],
    ids=["it lacks more events", "nobody has seen a head", "it is far behind"],
)
async def test_a_version_that_can_not_follow_is_not_waited_for(standing: Standing) -> None:
    assert await asked_of(standing) == (False, 1)


async def test_a_version_that_is_where_the_live_one_is_is_not_waited_for() -> None:
    assert await asked_of(Standing({FIRST: 7}, {FIRST: 6}, lacks_more=False)) == (True, 1)
    assert await asked_of(Standing({}, {}, lacks_more=False)) == (True, 1)


async def test_a_version_is_near_once_it_is_where_the_live_one_was() -> None:
    first = Standing({FIRST: 6, SECOND: 5}, {FIRST: 6, SECOND: 7}, lacks_more=False)
    second = Standing({FIRST: 6, SECOND: 6}, {FIRST: 8, SECOND: 8}, lacks_more=False)
    third = Standing({FIRST: 6, SECOND: 7}, {FIRST: 9, SECOND: 9}, lacks_more=False)
    assert await asked_of(first, second, third) == (True, 3)


async def test_a_version_that_went_live_or_is_gone_meanwhile_is_not_waited_for() -> None:
    behind = Standing({FIRST: 6}, {FIRST: 7}, lacks_more=False)
    assert await asked_of(behind, Standing({}, {}, lacks_more=False)) == (True, 2)


async def test_a_version_that_stands_still_is_not_near() -> None:
    found, asked = await asked_of(Standing({FIRST: 6}, {FIRST: 7}, lacks_more=False))
    assert not found
    assert asked > 2
