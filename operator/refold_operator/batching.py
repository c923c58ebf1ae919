"""Requests of reconciles that run at the same time, sent together.

A request that comes while none is under way goes at once, with those that come in the same turn of the event loop;
those that come meanwhile go together once it is answered. So a lone one waits for nothing, and there is no timer. Each
request has its own outcome: where a batch fails as a whole, though its system is there, its requests are sent again one
by one, so that the guilty one fails alone.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

from refold_operator.errors import ForbiddenError, UnreachableError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

#: Errors that are of the system and not of what was asked: to ask again one by one would only take longer.
_OF_ALL = (UnreachableError, ForbiddenError)


class Batch(Generic[K, V]):
    """Sends requests of one sort to one system."""

    def __init__(self, send: Callable[[Sequence[K]], Awaitable[Sequence[V | Exception]]], *, most: int) -> None:
        """Send up to `most` requests at once.

        Args:
            send: takes different requests, and returns the answer to each, or the exception that it is to raise.
            most: how many go together.
        """
        self._send, self._most = send, most
        #: In the order in which they came; equal ones share their answer.
        self._waiting: dict[K, asyncio.Future[V]] = {}
        self._sending: asyncio.Task[None] | None = None

    async def ask(self, request: K) -> V:
        """Return the answer to a request, which was sent after this was called.

        Raises:
            Exception: what `send` returned for it, or raised.
        """
        answer = self._waiting.get(request)
        if answer is None:
            answer = self._waiting[request] = asyncio.get_running_loop().create_future()
            # What nobody waits for any more (a run that was cancelled) isn't told as an error that was never looked at.
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_all())
        return await asyncio.shield(answer)

    async def _send_all(self) -> None:
        some: dict[K, asyncio.Future[V]] = {}
        try:
            while self._waiting:
                await asyncio.sleep(0)  # others that are about to ask in this turn go, too
                some = {request: self._waiting.pop(request) for request in list(self._waiting)[: self._most]}
                answers = await self._answers(list(some))
                for future, answer in zip(some.values(), answers, strict=True):
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        finally:
            self._sending = None
            for future in (*some.values(), *self._waiting.values()):
                future.cancel()  # where this task was cancelled: the process ends
            self._waiting.clear()

    async def _answers(self, requests: list[K]) -> Sequence[V | Exception]:
        try:
            return await self._send(requests)
        except _OF_ALL as error:
            return [error] * len(requests)
        except Exception as error:  # noqa: BLE001 - each is raised where it was asked for
            if len(requests) == 1:
                return [error]
        return [answer for request in requests for answer in await self._answers([request])]
