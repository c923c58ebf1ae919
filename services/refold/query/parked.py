"""Parked events: which there are, and asking the projector to fold them again or to discard them.

This service writes no rows. It leaves a mark at the parked event (`refold.projection.unparking`), and waits for the
projector that owns the event's partition to have done what was asked, or to have refused it:

    mark there        nobody has looked yet; at the end of the patience it is taken away again, and nothing has happened
    event gone        it took effect, or stands among those that were discarded
    only mark gone    refused: the first event of its row still fails, or the version isn't live any more

A mark that is left by a process which died counts for half a minute only, so that nothing is done that nobody waits
for.
"""

import asyncio
import datetime as dt
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import structlog

from refold.projection.past import Aside
from refold.projection.readstore import Looked, NotFoundError, ParkedReads, UnavailableError
from refold.projection.unparking import ASKED_SECONDS, Asked, Verb
from refold.query import problems
from refold.web.problems import Problem

log = structlog.get_logger(__name__)

#: Seconds that a projector has; it looks twice a second, between two batches.
_PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 0.1
assert _PATIENCE_SECONDS < ASKED_SECONDS, "a mark has to count for as long as somebody waits"


class ParkedEvent(msgspec.Struct, rename="camel"):
    """An event without effect on a row: it failed, or follows one of its row and partition that did.

    Args:
        id: to ask for it to be folded again or discarded; unique in the Projection.
        stream: `namespace/name`.
        partition: of the stream.
        position: in the partition.
        subject: the event's.
        key: of the row; null where the key failed, and with it all that the event does.
        error: why it has no effect.
        parked_at: when.
    """

    id: int
    stream: str | None
    partition: int
    position: int
    subject: str
    key: str | None
    error: str
    parked_at: dt.datetime


class ParkedPage(msgspec.Struct):
    """Parked events of a version in the order in which they were parked; `next`: the `after` of the next page."""

    version: str
    parked: list[ParkedEvent]
    next: int | None


class Outcome(msgspec.Struct):
    """What became of a parked event: `folded` or `discarded`, in this version."""

    id: int
    outcome: str
    version: str


class ParkedEvents:
    """The parked events of a Projection.

    Args:
        reads: where they are.
        projection: the Projection's `namespace/name`.
    """

    def __init__(self, reads: ParkedReads, projection: str) -> None:
        self._reads = reads
        self._projection = projection

    async def page(self, *, version: str | None, key: str | None, after: int, limit: int) -> ParkedPage:
        """Return `limit` parked events with ids beyond `after`.

        They are of `version` (None: the live one) and of the row `key` (None: all).

        Raises:
            Problem: 404 where there is no such version; 503 where none is live, or the read store doesn't answer.
        """
        with self._problems():
            found = await self._reads.page(version=version, key=key, after=after, most=limit + 1)
        if found is None:
            raise self._no_version(version)
        events = [ParkedEvent(*msgspec.structs.astuple(one)) for one in found[1]]
        return ParkedPage(found[0], events[:limit], events[limit - 1].id if len(events) > limit else None)

    async def aside(self, version: str, key: str) -> Aside:
        """Return what `version` has set aside of the row `key`, which one partition feeds.

        Raises:
            Problem: 503 where the read store doesn't answer, or the projection is gone.
        """
        with self._problems():
            return await self._reads.aside(version, key)

    async def settle(self, id_: int, verb: Verb, *, version: str | None, by: str) -> Outcome:
        """Have a parked event folded again (`retry`) or discarded, and return once it is.

        Args:
            id_: the event's.
            verb: which.
            version: the version that it is of; None: it must be of the live one.
            by: who asks.

        Raises:
            Problem: 404 where it isn't parked; 409 where it is of another version, somebody else asks at the same time,
                or it still fails; 504 where no projector did it; 503 where the read store doesn't answer.
        """
        asked = Asked(secrets.token_hex(8), verb, by, live=version is None)
        with self._problems():
            marked = await self._reads.ask(id_, asked, version)
        if marked.wanted is None:
            raise self._no_version(None)
        if marked.version is None:
            raise problems.not_parked(id_)
        if marked.version != marked.wanted:
            raise problems.of_another_version(id_, marked.version, marked.wanted)
        if not marked.done:
            raise problems.parked_event_busy(id_)
        log.info("Asked for a parked event", projection=self._projection, id=id_, verb=verb, by=by)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            with self._problems():
                looked = await self._reads.look(id_, marked.wanted)
            if looked.token != asked.token:
                return _outcome(id_, marked.wanted, asked, looked)
            if time.monotonic() > deadline:
                with self._problems():
                    withdrawn = await self._reads.withdraw(id_, asked.token)
                if withdrawn:
                    raise problems.not_settled(id_, marked.wanted, _PATIENCE_SECONDS)

    def _no_version(self, version: str | None) -> Problem:
        if version is None:
            return problems.no_live_version(self._projection)
        return problems.version_not_found(version, self._projection)

    @contextmanager
    def _problems(self) -> Iterator[None]:
        """Turn the read store's errors into answers."""
        try:
            yield
        except NotFoundError as error:
            raise problems.no_live_version(self._projection) from error
        except UnavailableError as error:
            log.warning("The read store doesn't answer", projection=self._projection, error=str(error))
            raise problems.unavailable(
                "the read store didn't answer in time or refused; this passes by itself once it is back"
            ) from error


def _outcome(id_: int, version: str, asked: Asked, looked: Looked) -> Outcome:
    """Return what became of a parked event whose mark is gone.

    Raises:
        Problem: not what was asked for.
    """
    if looked.first is not None:  # it is parked still
        if asked.live and not looked.live:
            raise problems.swapped(id_, version)
        raise problems.still_bad(id_, *looked.first)
    if not looked.there:
        raise problems.swapped(id_, version)
    outcome = "discarded" if looked.discarded else "folded"
    if outcome != ("folded" if asked.verb == "retry" else "discarded"):
        raise problems.otherwise_settled(id_, outcome)
    return Outcome(id_, outcome, version)
