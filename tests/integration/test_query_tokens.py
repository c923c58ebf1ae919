"""Tokens of several streams, at several replicas and across swaps, on a real PostgreSQL."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from refold import tokens
from refold.projection.definition import VersionDefinition

from hack.servers import Postgres
from tests import querying
from tests.querying import Model, definition
from tests.served import Answer, Served

ORDERS, SHIPMENTS = "0123456789abcdef", "fedcba9876543210"


def two_streams() -> VersionDefinition:
    one = definition()
    [orders] = one.streams
    shipments = orders.model_copy(update={"name": "shipments", "incarnation": SHIPMENTS})
    return one.model_copy(update={"streams": [orders, shipments]})


@pytest.fixture
async def model(database: str) -> Model:
    model = await querying.make(database)
    await model.version("v1", two_streams())
    model.put("a", items=1)
    return model


@pytest.fixture
def replicas(model: Model, postgres: Postgres) -> Iterator[list[Served]]:
    with ExitStack() as stack:
        yield [stack.enter_context(querying.serve(model, postgres)) for _ in range(2)]


def apply(model: Model, incarnation: str, partition: int, position: int, version: str = "v1") -> None:
    model.execute(
        "update {s}.positions set position = %s where incarnation = %s and partition = %s and version = %s",
        position,
        incarnation,
        partition,
        version,
    )


def ask(served: Served, token: str, wait: float) -> Answer:
    return served.ask("/v1/rows/a", headers={"refold-token": token, "prefer": f"wait={wait}"})


async def test_a_token_of_several_streams_is_waited_for_in_each_of_them(model: Model, replicas: list[Served]) -> None:
    token = tokens.encode([tokens.Position(ORDERS, 0, 3), tokens.Position(SHIPMENTS, 1, 5)])
    apply(model, ORDERS, 0, 9)
    for served in replicas:
        answer = ask(served, token, 0)
        assert (answer.status, answer.json()["missing"]) == (
            504,
            [{"stream": "shop/shipments", "partition": 1, "wanted": 5, "applied": 0}],
        )
    applied = threading.Timer(0.4, apply, [model, SHIPMENTS, 1, 5])
    applied.start()
    begin = time.monotonic()
    assert ask(replicas[0], token, 10).status == 200
    assert time.monotonic() - begin >= 0.3
    applied.join()
    assert ask(replicas[1], token, 0).status == 200
    apply(model, ORDERS, 0, 2)
    assert [one["stream"] for one in ask(replicas[1], token, 0).json()["missing"]] == ["shop/orders"]


async def test_both_forms_of_a_token_and_what_answers_give_are_good_at_every_replica(
    model: Model, replicas: list[Served]
) -> None:
    apply(model, ORDERS, 0, 3)
    apply(model, ORDERS, 1, 4)
    position = replicas[0].ask("/v1/rows").headers["refold-position"]
    for token in [position, tokens.encode_all(ORDERS, [3, 4]), tokens.encode([tokens.Position(ORDERS, 1, 4)])]:
        assert [ask(served, token, 0).status for served in replicas] == [200, 200]
    assert [ask(served, tokens.encode_all(ORDERS, [3, 5]), 0).status for served in replicas] == [504, 504]


async def test_a_token_is_good_across_a_swap_for_those_who_wait_too(model: Model, replicas: list[Served]) -> None:
    token = tokens.encode([tokens.Position(ORDERS, 0, 3), tokens.Position(SHIPMENTS, 0, 1)])
    await model.version("v2", two_streams())
    model.put("a", "v2", items=2)
    apply(model, ORDERS, 0, 3, "v2")
    apply(model, SHIPMENTS, 0, 1, "v2")
    assert ask(replicas[0], token, 0).status == 504  # the live one isn't so far
    swap = threading.Timer(0.3, model.execute, ["update {s}.pointer set live = 'v2'"])
    swap.start()
    answer = ask(replicas[0], token, 10)
    swap.join()
    assert (answer.status, answer.json()["data"]["items"]) == (200, 2)
    assert ask(replicas[1], token, 0).json()["data"]["items"] == 2
    assert ask(replicas[1], answer.headers["refold-position"], 0).status == 200


async def test_what_would_be_waited_for_in_vain_is_refused_at_once(model: Model, replicas: list[Served]) -> None:
    good = tokens.Position(ORDERS, 0, 0)
    for wrong in [
        tokens.encode([good, tokens.Position("f" * 16, 0, 1)]),  # another stream, or an earlier history of this one
        tokens.encode([good, tokens.Position(SHIPMENTS, 2, 1)]),  # a partition that the stream hasn't
        tokens.encode_all(ORDERS, [0, 0, 0]),
        tokens.encode_all("0" * 16, [1]),
    ]:
        for served in replicas:
            begin = time.monotonic()
            answer = ask(served, wrong, 30)
            assert (answer.status, answer.json()["type"]) == (400, "https://refold.dev/problems/invalid-token")
            assert time.monotonic() - begin < 5


async def test_while_others_wait_what_is_applied_is_answered_and_what_is_not_is_waited_for(
    model: Model, replicas: list[Served]
) -> None:
    served = replicas[0]
    with ThreadPoolExecutor() as threads:
        in_vain = threads.submit(ask, served, tokens.encode([tokens.Position(ORDERS, 1, 1)]), 6)
        await asyncio.sleep(0.3)  # now the service looks at the positions again and again
        for position in range(1, 20):
            token = tokens.encode([tokens.Position(ORDERS, 0, position)])
            apply(model, ORDERS, 0, position)
            assert ask(served, token, 0.001).status == 200, "the last look may be older than what is applied"
        later = threads.submit(ask, served, tokens.encode([tokens.Position(SHIPMENTS, 0, 1)]), 30)
        missed = ask(served, tokens.encode([tokens.Position(SHIPMENTS, 0, 1)]), 0.2)
        apply(model, SHIPMENTS, 0, 1)
        assert later.result().status == 200
        assert (missed.status, [one["stream"] for one in missed.json()["missing"]]) == (504, ["shop/shipments"])
        assert in_vain.result().status == 504


async def test_who_waits_is_refused_where_a_swap_leaves_out_the_stream(model: Model, replicas: list[Served]) -> None:
    token = tokens.encode([tokens.Position(SHIPMENTS, 0, 1)])
    await model.version("v2")  # of orders alone
    swap = threading.Timer(0.3, model.execute, ["update {s}.pointer set live = 'v2'"])
    swap.start()
    answer = ask(replicas[0], token, 20)
    swap.join()
    assert (answer.status, answer.json()["field"]) == (400, "Refold-Token")
    assert "deleted and made anew" in answer.json()["detail"]
