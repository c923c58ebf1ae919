"""Requests of reconciles that run at the same time, sent together.

A request that comes while none is under way (or fewer batches than may be) goes at once, with those that come in the
same turn of the event loop; those that come meanwhile go together once it is answered. So a lone one waits for nothing,
and there is no timer. Each request has its own outcome: where a batch fails as a whole, though its system is there, its
requests are sent again each alone, and beside the next batches, so that the guilty one neither fails nor holds up
others.

A request whose caller was cancelled before it was sent isn't sent any more: what a caller had wanted to make would
otherwise be made after others, such as the resource's deletion, have gone by.
"""

import asyncio
import contextvars
import dataclasses
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

from refold_operator.errors import BusyError, ForbiddenError, UnreachableError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclasses.dataclass
class _Answer(Generic[V]):
    """An answer that is awaited by so many callers."""

    future: asyncio.Future[V]
    callers: int = 0


class Batch(Generic[K, V]):
    """Sends requests of one sort to one system."""

    def __init__(
        self, send: Callable[[Sequence[K]], Awaitable[Sequence[V | Exception]]], *, most: int, at_once: int = 1
    ) -> None:
        """Send up to `most` requests together.

        Args:
            send: takes different requests, and returns the answer to each, or the exception that it is to raise.
            most: how many go together.
            at_once: how many such batches are under way at the same time.
        """
        self._send, self._most, self._at_once = send, most, at_once
        #: In the order in which they came; equal ones share their answer.
        self._waiting: dict[K, _Answer[V]] = {}
        self._sending: set[asyncio.Task[None]] = set()
        #: Those that are sent alone after their batch failed.
        self._alone: set[asyncio.Task[None]] = set()

    async def ask(self, request: K) -> V:
        """Return the answer to a request, which was sent after this was called.

        Raises:
            Exception: what `send` returned for it, or raised.
        """
        answer = self._waiting.get(request)
        if answer is None:
            answer = self._waiting[request] = _Answer(asyncio.get_running_loop().create_future())
            # What nobody waits for any more (a run that was cancelled) isn't told as an error that was never looked at.
            answer.future.add_done_callback(lambda done: done.cancelled() or done.exception())
        answer.callers += 1
        if len(self._sending) < self._at_once:
            # In a context of its own: what is logged meanwhile isn't of the one reconcile that happened to ask first.
            self._sending.add(asyncio.create_task(self._send_all(), context=contextvars.Context()))
        try:
            return await asyncio.shield(answer.future)
        except asyncio.CancelledError:
            answer.callers -= 1
            if not answer.callers and self._waiting.get(request) is answer:
                del self._waiting[request]
            raise

    async def _send_all(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            while self._waiting:
                await asyncio.sleep(0)  # others that are about to ask in this turn go, too
                going = list(self._waiting)[: self._most]
                if going:  # callers may have been cancelled meanwhile, or another batch has taken all
                    await self._settle({request: self._waiting.pop(request).future for request in going})
        except asyncio.CancelledError:  # the process ends
            for answer in self._waiting.values():
                answer.future.cancel()
            self._waiting.clear()
            raise
        finally:
            self._sending.discard(task)

    async def _settle(self, some: Mapping[K, "asyncio.Future[V]"]) -> None:
        """Send requests, and set their answers; those that fail together go on, each alone, after this returns."""
        try:
            answers = await self._send(list(some))
            for future, answer in zip(some.values(), answers, strict=True):
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        except Exception as error:  # noqa: BLE001 - each is raised where it was asked for
            if len(some) > 1 and not _of_all(error):
                for request, future in some.items():
                    task = asyncio.create_task(self._settle({request: future}))
                    self._alone.add(task)
                    task.add_done_callback(self._alone.discard)
            else:
                for future in some.values():
                    future.set_exception(error)
        except asyncio.CancelledError:
            for future in some.values():
                future.cancel()
            raise


def _of_all(error: Exception) -> bool:
    """Tell whether an error is of the system and not of what was asked: to ask again would only take longer."""
    return isinstance(error, UnreachableError | ForbiddenError) and not isinstance(error, BusyError)
