"""The library against a model of it in sixty lines, with random appends (Hypothesis).

Appends submitted together to one store must do what the model does in the order of their submission. Concurrent clients
of two stores have no such order: there must be one that respects what came before what, and in which the model answers
each append as the store did (they are linearizable).

`REFOLD_EXAMPLES` is how many of each (default 100; `make attack`: 400).
"""

import itertools
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refold.eventstore import AllAppended, AppendResult, EventStore, SubjectAppend
from refold.eventstore.errors import IdConflictError, RevisionConflictError

from hack.servers import Postgres
from tests.stores import Log, check_history, event, install, together

#: An event: id, type, data. A part: subject, events, expected revision. An append: a part, or a list for all or none.
Event = tuple[str, str, int]
Part = tuple[str, list[Event], Any]
Append = Part | list[Part]

EXAMPLES = int(os.environ.get("REFOLD_EXAMPLES", "100"))
_examples = itertools.count(1)
_SUBJECTS = ["s1", "s2", "s3", "s4"]
_event = st.tuples(st.sampled_from("abcdef"), st.sampled_from(["Made", "Sold"]), st.sampled_from([1, 2]))


def _parts(ids: int) -> st.SearchStrategy[Part]:
    """Return parts of up to three events of `ids` different ids; the fewer, the more is known already."""
    events = _event.filter(lambda one: one[0] in "abcdef"[:ids])
    return st.tuples(
        st.sampled_from(_SUBJECTS),
        st.lists(events, min_size=1, max_size=3, unique_by=lambda one: one[0]),
        st.one_of(st.sampled_from(["any", "any", "none", "exists"]), st.integers(0, 6)),
    )


_append: st.SearchStrategy[Append] = st.one_of(
    _parts(6),
    _parts(6),
    st.lists(_parts(3), min_size=1, max_size=4, unique_by=lambda part: part[0]),
)


class Model:
    """What an event store does, one append after another."""

    def __init__(self, subjects: dict[str, tuple[Event, ...]] | None = None) -> None:
        self.subjects = dict(subjects or {})

    def append(self, asked: Append) -> tuple[Any, ...]:
        """Append; return the outcome as `said` does."""
        if isinstance(asked, list):
            return self._append_all(asked)
        outcome, number = self._decide(asked)
        if outcome == "appended":
            self._add(asked)
        return outcome, number

    def _append_all(self, parts: list[Part]) -> tuple[Any, ...]:
        decided = [self._decide(part) for part in parts]
        outcomes = [outcome for outcome, _ in decided]
        if len(set(outcomes)) == 1 and outcomes[0] in ("appended", "replayed"):
            if outcomes[0] == "appended":
                for part in parts:
                    self._add(part)
            return outcomes[0], *(number for _, number in decided)
        worst = next(one for one in ("id conflict", "replayed", "revision conflict") if one in outcomes)
        index = outcomes.index(worst)
        named = "revision conflict" if worst == "revision conflict" else "id conflict"
        return named, len(self.subjects.get(parts[index][0], ())), index

    def _decide(self, part: Part) -> tuple[str, int]:
        subject, events, expected = part
        known = self.subjects.get(subject, ())
        if {one[0] for one in known} & {one[0] for one in events}:
            for first in range(len(known) - len(events) + 1):
                if known[first : first + len(events)] == tuple(events):
                    return "replayed", first + len(events)
            return "id conflict", len(known)
        if expected not in ("any", len(known)) and {"none": known, "exists": not known}.get(expected, True):
            return "revision conflict", len(known)
        return "appended", len(known) + len(events)

    def _add(self, part: Part) -> None:
        self.subjects[part[0]] = self.subjects.get(part[0], ()) + tuple(part[1])


async def append(log: Log, example: int, asked: Append) -> tuple[Any, ...]:
    """Append to the store; return outcome, revision (of each part) and, of an atomic append refused, which part."""
    parts = [
        SubjectAppend(f"{example}:{subject}", [event(data, id=id, type=type) for id, type, data in events], expected)  # noqa: A001
        for subject, events, expected in (asked if isinstance(asked, list) else [asked])
    ]
    try:
        if isinstance(asked, list):
            return said(await log.store.append_all(log.stream.namespace, log.stream.name, parts))
        return said(await log.add(parts[0].subject, *parts[0].events, expected_revision=parts[0].expected_revision))
    except (RevisionConflictError, IdConflictError) as error:
        return said(error)


def said(outcome: Any) -> tuple[Any, ...]:
    match outcome:
        case AppendResult():
            return "replayed" if outcome.replayed else "appended", outcome.revision
        case AllAppended():
            revisions = [part.revision for part in outcome.appends]
            return "replayed" if outcome.replayed else "appended", *revisions
        case RevisionConflictError() | IdConflictError():
            named = "revision conflict" if isinstance(outcome, RevisionConflictError) else "id conflict"
            return (named, outcome.current) if outcome.index is None else (named, outcome.current, outcome.index)
    raise outcome


@pytest.fixture(scope="module")
async def log(postgres: Postgres) -> AsyncIterator[Log]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database modelled")
    installed = await install(postgres.dsn("modelled"))
    stream = await installed.stream(partitions=2)
    async with await EventStore.open(installed.service) as store:
        yield Log(installed, store, stream)


@pytest.fixture(scope="module")
async def other(log: Log) -> AsyncIterator[Log]:
    """The same stream in a second store, as another process has it."""
    async with await EventStore.open(log.installed.service) as store:
        yield replace(log, store=store)


async def check_read(log: Log, example: int, model: Model) -> None:
    for subject in _SUBJECTS:
        read = await log.read(f"{example}:{subject}")
        assert tuple((one.id, one.type, int(bytes(one.data))) for one in read) == model.subjects.get(subject, ())


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(_append, min_size=1, max_size=12), min_size=1, max_size=5))
async def test_appends_do_what_the_model_does_in_the_order_of_submission(log: Log, groups: list[list[Append]]) -> None:
    example = next(_examples)
    model = Model()
    for group in groups:
        assert await together(*(append(log, example, one) for one in group)) == [model.append(one) for one in group]
    await check_read(log, example, model)


@dataclass(frozen=True)
class Done:
    """An append, its outcome, and when it began and ended (numbers that grow)."""

    asked: Append
    outcome: tuple[Any, ...]
    began: int
    ended: int


def explain(clients: Sequence[Sequence[Done]]) -> list[Model]:
    """Return the models that the clients' appends can end in, in any order that explains their outcomes."""
    ends: list[Model] = []
    seen = set()
    open_ends: list[tuple[tuple[int, ...], Model]] = [((0,) * len(clients), Model())]
    while open_ends:
        at, model = open_ends.pop()
        waiting = [client[n] for client, n in zip(clients, at, strict=True) if n < len(client)]
        if not waiting:
            ends.append(model)
        for number, (client, n) in enumerate(zip(clients, at, strict=True)):
            # Whichever is next began before any of the others ended.
            if n == len(client) or any(other.ended < client[n].began for other in waiting):
                continue
            after = Model(model.subjects)
            if after.append(client[n].asked) != client[n].outcome:
                continue
            reached = tuple(m + (k == number) for k, m in enumerate(at))
            if (key := (reached, frozenset(after.subjects.items()))) not in seen:
                seen.add(key)
                open_ends.append((reached, after))
    return ends


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(_append, min_size=1, max_size=4), min_size=2, max_size=5))
async def test_concurrent_clients_of_two_stores_see_outcomes_that_some_order_explains(
    log: Log, other: Log, clients: list[list[Append]]
) -> None:
    example = next(_examples)
    clock = itertools.count()

    async def client(log: Log, appends: list[Append]) -> list[Done]:
        return [
            Done(one, began=next(clock), outcome=await append(log, example, one), ended=next(clock)) for one in appends
        ]

    done = await together(*(client((log, other)[n % 2], appends) for n, appends in enumerate(clients)))
    ends = explain(done)
    assert ends, done
    read = {
        subject: tuple((one.id, one.type, int(bytes(one.data))) for one in events)
        for subject in _SUBJECTS
        if (events := await log.read(f"{example}:{subject}"))
    }
    assert read in [model.subjects for model in ends]


def test_an_outcome_that_no_order_explains_is_found() -> None:
    first, second = ("s1", [("a", "Made", 1)], "none"), ("s1", [("b", "Made", 1)], "none")
    overlapping = [[Done(first, ("appended", 1), 0, 2)], [Done(second, ("revision conflict", 1), 1, 3)]]
    assert len(explain(overlapping)) == 1
    both = [[Done(first, ("appended", 1), 0, 2)], [Done(second, ("appended", 1), 1, 3)]]
    assert explain(both) == []
    one_after_the_other = [[Done(first, ("appended", 1), 2, 3)], [Done(second, ("revision conflict", 1), 0, 1)]]
    assert explain(one_after_the_other) == []


async def test_after_all_of_it_history_is_gapless(log: Log) -> None:
    history = await log.history()
    assert len(history) > 100
    check_history(history)
