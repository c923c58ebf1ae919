"""Which streams a process serves: those that the catalog calls active, read again every few seconds.

A name that isn't known asks for a look at once; all that ask while one is under way share the next one.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable

import structlog

from refold.eventstore import catalog
from refold.eventstore.catalog import Stream
from refold.eventstore.connections import Connections
from refold.eventstore.errors import EventStoreError, UnavailableError, UnknownStreamError
from refold.eventstore.lane import Lane

log = structlog.get_logger(__name__)

#: Seconds between two looks at the catalog, and the least between two that unknown names ask for.
REFRESH = 5.0
REFRESH_ON_MISS = 0.25


class Directory:
    """The lanes of the active streams, by namespace and name.

    Args:
        control: connections on which the catalog is read.
        make: makes the lane of a stream that is new here.
    """

    def __init__(self, control: Connections, make: Callable[[Stream], Lane]) -> None:
        self._control = control
        self._make = make
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._refreshed = -REFRESH
        self._refused: str | None = None
        self._refreshing = asyncio.Lock()

    @property
    def streams(self) -> Iterable[Stream]:
        """The streams that are known."""
        return [lane.stream for lane in self._lanes.values()]

    def known(self, stream: Stream) -> Lane:
        """Return the lane of a stream that was found here before.

        Raises:
            UnknownStreamError: it isn't active any more.
        """
        lane = self._lanes.get((stream.namespace, stream.name))
        if lane is None:
            raise UnknownStreamError(f"the stream {stream.namespace}/{stream.name} isn't active any more")
        return lane

    def find(self, namespace: str, name: str) -> Stream | None:
        """Return the active stream of that name where it is known already."""
        lane = self._lanes.get((namespace, name))
        return None if lane is None else lane.stream

    async def lane(self, namespace: str, name: str) -> Lane:
        """Return the lane of the active stream of that name.

        Raises:
            UnknownStreamError: there is none.
            UnavailableError: it isn't known, and PostgreSQL can't be reached.
        """
        lane = self._lanes.get((namespace, name))
        if lane is None:
            asked = time.monotonic()
            async with self._refreshing:
                # All that wait here are answered by one look that began after they asked.
                if self._refreshed < asked:
                    await asyncio.sleep(self._refreshed + REFRESH_ON_MISS - asked)
                    await self.refresh()
                elif self._refused is not None:
                    raise UnavailableError(self._refused)
            lane = self._lanes.get((namespace, name))
        if lane is None:
            raise UnknownStreamError(f"the store has no active stream {namespace}/{name}; is its EventStream Ready?")
        return lane

    async def refresh(self) -> None:
        """Read the catalog; remember when, and what came of it, since every unknown name asks for it."""
        self._refreshed = time.monotonic()
        try:
            found = await self._control.ask(catalog.list_streams, seconds=10)
            self._refused = None
        except EventStoreError as error:
            self._refused = str(error)
            raise
        streams = {(stream.namespace, stream.name): stream for stream in found if stream.state == "active"}
        for key in self._lanes.keys() - streams.keys():
            del self._lanes[key]  # appends that wait in the lane are still answered by it
        for key, stream in streams.items():
            lane = self._lanes.get(key)
            if lane is None or lane.stream.stream != stream.stream:
                self._lanes[key] = self._make(stream)
            else:
                lane.stream = stream

    async def refresh_in_turn(self) -> bool:
        """Wait about `REFRESH` seconds, read the catalog, tell whether it could be; else what is known is served on."""
        await asyncio.sleep(REFRESH * random.uniform(0.8, 1.2))  # noqa: S311 (spreads load, guards nothing)
        try:
            async with self._refreshing:
                await self.refresh()
        except EventStoreError as error:
            log.warning("The catalog can't be read; the known streams are served on", error=str(error))
            return False
        return True

    def forget(self, lane: Lane) -> None:
        """Serve a stream no more that the database says isn't active, until the catalog says otherwise."""
        key = lane.stream.namespace, lane.stream.name
        if self._lanes.get(key) is lane:
            del self._lanes[key]
