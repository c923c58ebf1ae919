"""What `refold rebuild` makes of a Projection's status."""

from typing import Any

import pytest
from refold.cli.rebuilding import outcome

LIVE: dict[str, Any] = {"live": {"version": "old"}}


def ready(reason: str, message: str = "m") -> dict[str, Any]:
    return {"conditions": [{"type": "Ready", "status": "False", "reason": reason, "message": message}]}


@pytest.mark.parametrize(
    ("status", "ended", "says"),
    [
        (LIVE, None, "waiting"),
        ({**LIVE, "building": {"version": "new", "progress": "0%"}, **ready("Building")}, None, "new: 0%"),
        (
            {
                **LIVE,
                **ready("Building"),
                "building": {
                    "version": "new", "progress": "63%", "eventsPerSecond": 2000, "remainingSeconds": 40,
                },
            },
            None,
            "new: 63%, 2000 events a second, 40 s to go",
        ),
        ({**LIVE, "building": {"version": "new", "progress": "9%"}, **ready("BuildFailed", "no x")}, False, "no x"),
        ({"live": {"version": "new"}}, True, "readers see new"),
    ],
)  # fmt: skip
def test_it_ends_when_readers_see_another_version_or_the_build_fails(
    status: dict[str, Any], ended: bool | None, says: str
) -> None:
    found, text = outcome(LIVE, status)
    assert found is ended
    assert says in text


def test_the_failure_of_a_build_before_it_is_not_its_own() -> None:
    before = {**LIVE, "building": {"version": "wrong", "progress": "100%"}, **ready("BuildFailed")}
    assert outcome(before, before) == (None, "waiting for the operator")
