"""The event store's settings: which limits fit together."""

import pytest
from pydantic import ValidationError
from refold.eventstore import Limits
from refold.eventstore.settings import Settings


def settings(**limits: int) -> Settings:
    return Settings(store_dsn="x", **limits)  # type: ignore[arg-type]


def test_the_limits_are_what_the_settings_say() -> None:
    given = {
        "append_events": 1, "event_bytes": 2048, "metadata_bytes": 1024, "append_bytes": 4096, "body_bytes": 8192,
        "waiting_appends": 5, "waiting_bytes": 10_000,
    }  # fmt: skip
    assert settings(**given).limits() == Limits(**given)


@pytest.mark.parametrize(
    ("part", "whole"),
    [("metadata_bytes", "event_bytes"), ("event_bytes", "append_bytes"), ("append_bytes", "body_bytes")],
)
def test_a_limit_above_what_holds_it_is_refused_with_both_numbers(part: str, whole: str) -> None:
    with pytest.raises(ValidationError) as refused:
        settings(**{part: 20_000_001, whole: 20_000_000})
    assert f"REFOLD_{part.upper()} is 20000001, over REFOLD_{whole.upper()}, which is 20000000" in str(refused.value)


@pytest.mark.parametrize("name", ["event_bytes", "metadata_bytes", "append_bytes", "body_bytes", "waiting_bytes"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        settings(**{name: 0})
