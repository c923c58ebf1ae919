"""Rows as they were at a moment: the history of a row's subject is read from the event store and folded again.

It is read page by page in short transactions, while nobody waits but who asked. What the live version has set aside of
the row (parked and discarded events) is read before, so the row is the read model's as far as that is.
"""

import psycopg
import structlog

from refold.eventstore import catalog, reads
from refold.eventstore.connections import Connections
from refold.eventstore.errors import EventStoreError, InactiveStreamError, InvalidAppendError
from refold.eventstore.reads import Source
from refold.projection.past import At, RowAt, RowFold, why_not
from refold.query import histories, problems
from refold.query.histories import AT_ONCE, Turns
from refold.query.live import LiveVersion
from refold.query.parked import ParkedEvents
from refold.query.reader import Reader

log = structlog.get_logger(__name__)

_CATALOG_SECONDS = 5


class Past:
    """The rows of a Projection's live version at a moment.

    Args:
        reader: which version is live.
        parked: what it has set aside.
        dsn: of the event store's database; None: rows at a moment are refused.
    """

    def __init__(self, reader: Reader, parked: ParkedEvents, dsn: str | None) -> None:
        self._reader = reader
        self._parked = parked
        self._turns = Turns("query service")
        # One for each history that is read at once.
        self._connections = None if dsn is None else Connections(dsn, size=AT_ONCE, application="refold-query-history")

    async def close(self) -> None:
        """Close the connections."""
        if self._connections is not None:
            await self._connections.close()

    async def row(self, key: str, at: At, *, steps: int = 0) -> RowAt:
        """Return the row of `key` at a moment, with what each of the last `steps` events did.

        Raises:
            Problem: 400 where its rows have no history of their own; 404 where there were no events; 410 where the
                history is gone; 501 without an event store; 503 where it doesn't answer, or takes too long.
        """
        live = (await self._reader.freshness()).live
        reason = why_not(live.definition)
        if reason is not None:
            raise problems.no_history(reason)
        if self._connections is None:
            raise problems.without_event_store()
        async with self._turns.turn():
            found = await self._folded(self._connections, live, key, at, steps)
        if found.revision == 0 and found.parked is None:
            raise problems.no_events(key)
        return found

    async def _folded(self, connections: Connections, live: LiveVersion, key: str, at: At, steps: int) -> RowAt:
        [ref] = live.definition.streams
        aside = await self._parked.aside(live.version, key)
        fold = RowFold(live.version, live.definition, key, aside=aside, steps=steps)
        what = f"{ref.namespace}/{ref.name}"
        try:
            stream = await connections.ask(
                lambda conn: catalog.get_stream(conn, ref.namespace, ref.name), seconds=_CATALOG_SECONDS
            )
            if stream is None or stream.incarnation != ref.incarnation:
                raise problems.other_history(what)
            pages = reads.pages(connections, Source.of_subject(stream, key), last=at.revision, until=at.time)
            return await histories.fold(fold, pages)
        except InactiveStreamError as error:
            raise problems.other_history(what) from error
        except InvalidAppendError as error:  # no event can be about such a subject
            raise problems.no_events(key) from error
        # A login gets its rights at the operator's look, so it may come before them.
        except (EventStoreError, psycopg.errors.InsufficientPrivilege) as error:
            log.warning("The event store doesn't answer", error=str(error).strip())
            raise problems.history_unavailable() from error
