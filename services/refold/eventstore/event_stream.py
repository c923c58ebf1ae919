"""Watched events as server-sent events: `id` (a token to go on after it), `event` (its type), `data` (as in reads)."""

from collections.abc import Callable, Iterator, Sequence

import msgspec
import structlog

from refold.eventstore import metrics
from refold.eventstore.errors import EventStoreError
from refold.eventstore.live import LiveEvent, Reader
from refold.web.sent_events import SentEvents, block

log = structlog.get_logger(__name__)


class EventStream(SentEvents):
    """The answer that tells what `reader` reads; closes it."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(_Told(reader), cut=metrics.LIVE_CUT.inc)


class _Told:
    """What a reader reads, in the form that is sent."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._encoder = msgspec.json.Encoder()

    def first_id(self) -> str:
        return self._reader.token

    async def next(self, seconds: float) -> Iterator[bytes] | None:
        try:
            page = await self._reader.next(seconds)
        except EventStoreError as error:  # the client comes again and is then answered with the problem
            log.info("A live read is ended", stream=self._reader.stream.schema, error=str(error))
            return None
        return None if page is None else self._blocks(page)

    def on_end(self, call: Callable[[], None]) -> None:
        self._reader.on_end(call)

    def end(self) -> None:
        self._reader.end()

    def close(self) -> None:
        self._reader.close()

    def _blocks(self, page: Sequence[LiveEvent]) -> Iterator[bytes]:
        for one in page:
            yield block(self._encoder.encode(one.event), id_=one.token, kind=one.event.type)
