"""What the operator tells of its backends and resources."""

import psycopg
import pytest
from prometheus_client import REGISTRY
from refold_operator.calls import call, measured
from refold_operator.errors import UnreachableError
from refold_operator.metrics import Census


def calls(outcome: str) -> float:
    labels = {"backend": "eventstore", "outcome": outcome}
    return REGISTRY.get_sample_value("refold_backend_call_seconds_count", labels) or 0.0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (LookupError("an answer that the caller expects"), "ok"),
        (psycopg.errors.InsufficientPrivilege("no"), "refused"),
        (UnreachableError("the event store", "it is away"), "unavailable"),
    ],
)
async def test_a_call_is_counted_by_how_it_ends(error: Exception | None, outcome: str) -> None:
    before = calls(outcome)
    if error is None:
        with call("eventstore", refused=psycopg.Error):
            pass
    else:
        with pytest.raises(type(error)), call("eventstore", refused=psycopg.Error):
            raise error
    assert calls(outcome) == before + 1

    @measured("eventstore", refused=psycopg.Error)
    async def ask(answer: int) -> int:
        if error is not None:
            raise error
        return answer

    if error is None:
        assert await ask(7) == 7
    else:
        with pytest.raises(type(error)):
            await ask(7)
    assert calls(outcome) == before + 2


def resources(condition: str, status: str) -> float:
    labels = {"kind": "EventStream", "condition": condition, "status": status}
    return REGISTRY.get_sample_value("refold_resources", labels) or 0.0


def test_a_resource_is_counted_once_with_what_its_conditions_said_last() -> None:
    census = Census()
    ready, not_ready = ({"type": "Ready", "status": status} for status in ("True", "False"))
    census.note("a", "EventStream", [not_ready, {"type": "TopicReady", "status": "Unknown"}])
    census.note("b", "EventStream", [ready])
    census.note("a", "EventStream", [ready])
    assert [resources("Ready", "True"), resources("Ready", "False"), resources("TopicReady", "Unknown")] == [2, 0, 0]
    census.forget("a")
    census.forget("a")
    assert resources("Ready", "True") == 1
    census.forget("b")
    assert resources("Ready", "True") == 0
