"""The library against a model of it in thirty lines, with random groups of appends (Hypothesis)."""

import itertools
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refold.eventstore import AppendResult, EventStore
from refold.eventstore.errors import IdConflictError, RevisionConflictError

from hack.servers import Postgres
from tests.stores import Log, check_history, event, install, together

_examples = itertools.count(1)
_event = st.tuples(st.sampled_from("abcdef"), st.sampled_from(["Made", "Sold"]), st.sampled_from([1, 2]))
_append = st.tuples(
    st.sampled_from(["s1", "s2", "s3", "s4"]),
    st.lists(_event, min_size=1, max_size=3, unique_by=lambda one: one[0]),
    st.one_of(st.sampled_from(["any", "any", "none", "exists"]), st.integers(0, 6)),
)


class Model:
    """What an event store does, one append after another."""

    def __init__(self) -> None:
        self.subjects: dict[str, list[tuple[str, str, int]]] = {}

    def append(self, subject: str, events: list[tuple[str, str, int]], expected: Any) -> tuple[Any, ...]:
        known = self.subjects.setdefault(subject, [])
        if {one[0] for one in known} & {one[0] for one in events}:
            for first in range(len(known) - len(events) + 1):
                if known[first : first + len(events)] == events:
                    return "replayed", first + len(events)
            return "id conflict", len(known)
        if expected not in ("any", len(known)) and {"none": known, "exists": not known}.get(expected, True):
            return "revision conflict", len(known)
        known += events
        return "appended", len(known)


def said(outcome: Any) -> tuple[Any, ...]:
    match outcome:
        case AppendResult():
            return "replayed" if outcome.replayed else "appended", outcome.revision
        case RevisionConflictError():
            return "revision conflict", outcome.current
        case IdConflictError():
            return "id conflict", outcome.current
    raise outcome


@pytest.fixture(scope="module")
async def log(postgres: Postgres) -> AsyncIterator[Log]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database modelled")
    installed = await install(postgres.dsn("modelled"))
    stream = await installed.stream(partitions=2)
    async with await EventStore.open(installed.service) as store:
        yield Log(installed, store, stream)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(_append, min_size=1, max_size=12), min_size=1, max_size=5))
async def test_groups_of_appends_do_what_the_model_does(log: Log, groups: list[list[Any]]) -> None:
    example = next(_examples)
    model = Model()

    async def append(subject: str, events: list[tuple[str, str, int]], expected: Any) -> tuple[Any, ...]:
        made = [event(data, id=id, type=type) for id, type, data in events]  # noqa: A001
        try:
            outcome: Any = await log.add(f"{example}:{subject}", *made, expected_revision=expected)
        except (RevisionConflictError, IdConflictError) as error:
            outcome = error
        return said(outcome)

    for group in groups:
        assert await together(*(append(*one) for one in group)) == [model.append(*one) for one in group]
    for subject, events in model.subjects.items():
        read = await log.read(f"{example}:{subject}")
        assert [(one.id, one.type, int(bytes(one.data))) for one in read] == events


async def test_after_all_of_it_history_is_gapless(log: Log) -> None:
    history = await log.history()
    assert len(history) > 100
    check_history(history)
