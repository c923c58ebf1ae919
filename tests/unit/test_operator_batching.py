"""Requests that are sent together."""

import asyncio
from collections.abc import Sequence

import pytest
import structlog
from refold_operator.batching import Batch
from refold_operator.errors import BusyError, UnreachableError


class System:
    """Doubles numbers, as soon as it may.

    13 is a bad number, 7 breaks the whole request that it is in, and so does 8, which is held by somebody: alone, it
    waits until it is `let_go`.
    """

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.free = asyncio.Event()
        self.free.set()
        self.let_go = asyncio.Event()
        self.away = False

    async def __call__(self, numbers: Sequence[int]) -> Sequence[int | Exception]:
        self.asked.append(list(numbers))
        await self.free.wait()
        if self.away:
            raise UnreachableError("the system", "no answer")
        if 7 in numbers:
            raise ValueError("7")
        if 8 in numbers:
            if len(numbers) > 1:
                raise BusyError("the system", "8 is held by somebody")
            await self.let_go.wait()
        return [KeyError(number) if number == 13 else 2 * number for number in numbers]


async def test_a_lone_request_goes_at_once_and_those_that_come_meanwhile_go_together() -> None:
    system = System()
    batch = Batch(system, most=100)
    system.free.clear()

    first = asyncio.create_task(batch.ask(1))
    for _ in range(3):
        await asyncio.sleep(0)
    assert system.asked == [[1]]
    others = [asyncio.create_task(batch.ask(number)) for number in (2, 3, 4)]
    for _ in range(3):
        await asyncio.sleep(0)
    system.free.set()

    assert [await first, *await asyncio.gather(*others)] == [2, 4, 6, 8]
    assert system.asked == [[1], [2, 3, 4]]


async def test_requests_of_one_turn_go_together_up_to_the_most() -> None:
    system = System()
    batch = Batch(system, most=2)

    assert await asyncio.gather(*(batch.ask(number) for number in (1, 2, 3))) == [2, 4, 6]
    assert system.asked == [[1, 2], [3]]


async def test_equal_requests_share_an_answer_that_was_asked_for_after_them() -> None:
    system = System()
    batch = Batch(system, most=100)
    system.free.clear()
    first = asyncio.create_task(batch.ask(1))
    for _ in range(3):
        await asyncio.sleep(0)

    later = [asyncio.create_task(batch.ask(1)) for _ in range(2)]
    await asyncio.sleep(0)
    system.free.set()

    assert await asyncio.gather(first, *later) == [2, 2, 2]
    assert system.asked == [[1], [1]]


async def test_as_many_batches_as_allowed_are_under_way_at_the_same_time() -> None:
    system = System()
    batch = Batch(system, most=2, at_once=2)
    system.free.clear()
    callers = [asyncio.create_task(batch.ask(number)) for number in range(1, 7)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert system.asked == [[1, 2], [3, 4]]

    system.free.set()
    assert await asyncio.gather(*callers) == [2, 4, 6, 8, 10, 12]
    assert system.asked == [[1, 2], [3, 4], [5, 6]]


async def test_a_bad_request_fails_alone() -> None:
    system = System()
    batch = Batch(system, most=100)

    answers = await asyncio.gather(*(batch.ask(number) for number in (1, 13, 2)), return_exceptions=True)

    assert [answers[0], answers[2]] == [2, 4]
    assert isinstance(answers[1], KeyError)
    assert len(system.asked) == 1


async def test_a_request_that_breaks_its_whole_batch_fails_alone() -> None:
    system = System()
    batch = Batch(system, most=100)

    answers = await asyncio.gather(*(batch.ask(number) for number in (1, 7, 2)), return_exceptions=True)

    assert [answers[0], answers[2]] == [2, 4]
    assert isinstance(answers[1], ValueError)
    assert system.asked == [[1, 7, 2], [1], [7], [2]]


async def test_an_outage_is_of_all_and_isnt_asked_about_again() -> None:
    system = System()
    batch = Batch(system, most=100)
    system.away = True

    answers = await asyncio.gather(*(batch.ask(number) for number in (1, 2)), return_exceptions=True)

    assert all(isinstance(answer, UnreachableError) for answer in answers)
    assert len(system.asked) == 1
    system.away = False
    assert await batch.ask(1) == 2


async def test_a_caller_that_is_cancelled_leaves_the_others_of_its_batch_their_answers() -> None:
    system = System()
    batch = Batch(system, most=100)
    system.free.clear()
    callers = [asyncio.create_task(batch.ask(number)) for number in (1, 13, 2)]
    for _ in range(3):
        await asyncio.sleep(0)

    callers[1].cancel()
    await asyncio.sleep(0)
    system.free.set()

    assert await callers[0] == 2
    assert await callers[2] == 4
    with pytest.raises(asyncio.CancelledError):
        await callers[1]


async def test_what_is_held_up_by_somebody_holds_up_neither_its_batch_nor_the_next_one() -> None:
    system = System()
    batch = Batch(system, most=100)
    held_up = asyncio.create_task(batch.ask(8))
    others = asyncio.create_task(batch.ask(1))

    async with asyncio.timeout(5):
        assert await others == 2
        assert await batch.ask(2) == 4
        assert not held_up.done()
        system.let_go.set()
        assert await held_up == 16


async def test_a_request_whose_caller_was_cancelled_before_it_went_is_not_sent() -> None:
    system = System()
    batch = Batch(system, most=100)
    system.free.clear()
    first = asyncio.create_task(batch.ask(1))
    for _ in range(3):
        await asyncio.sleep(0)
    wanted_by_one, wanted_by_two = asyncio.create_task(batch.ask(2)), [asyncio.create_task(batch.ask(3)) for _ in "ab"]
    await asyncio.sleep(0)

    for caller in (wanted_by_one, wanted_by_two[0]):
        caller.cancel()
    await asyncio.sleep(0)
    system.free.set()

    assert await first == 2
    assert await wanted_by_two[1] == 6
    assert system.asked == [[1], [3]]


async def test_what_is_logged_by_a_batch_is_not_said_to_be_of_the_reconcile_that_asked_first() -> None:
    told = []

    async def send(numbers: Sequence[int]) -> Sequence[int | Exception]:
        told.append(structlog.contextvars.get_contextvars())
        if len(numbers) > 1:
            raise ValueError
        return list(numbers)

    batch = Batch(send, most=100)
    with structlog.contextvars.bound_contextvars(resource="EventStream shop/orders"):
        assert await asyncio.gather(batch.ask(1), batch.ask(2)) == [1, 2]
    assert told == [{}, {}, {}]
