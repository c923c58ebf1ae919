"""Which event types a stream takes, as this process knows it, and what becomes of appends that it would refuse.

Each append is checked when it comes, with the types that are known then. What is known may be old, so

- a group says with which revision its appends were checked, and the database refuses it where the stream is at another
  (see migrations/store/0002_event_types.sql): the types are read again, the group is checked again;
- an append that doesn't fit is refused only after the database was asked whether the types are still those, and whether
  any of its ids stands in the history. Then it is a retry of what was accepted under former types, or a conflict, and
  goes to the database, which never appends it: history doesn't change, so the id is still there.

So a change of the types holds for all appends from its commit on, in every process and in both directions.
"""

from collections.abc import Sequence

import msgspec
import structlog
from psycopg import sql

from refold.eventstore import arrays, catalog
from refold.eventstore.appends import Append
from refold.eventstore.catalog import Stream
from refold.eventstore.connections import Connections
from refold.eventstore.errors import EventStoreError, UnavailableError
from refold.eventstore.event_types import EventTypes, SchemaError

log = structlog.get_logger(__name__)


class Guard:
    """The event types of one stream.

    Attributes:
        types: None where it takes any event.
        revision: the catalog's number of them; 0: never read, or the stream never had any.
        broken: why this process can't use the types that it read.
    """

    def __init__(self, stream: Stream, connections: Connections) -> None:
        self.types: EventTypes | None = None
        self.revision = 0
        self._stream = stream.stream
        self._connections = connections
        self.broken: str | None = None
        self._question = (
            sql.SQL(
                "select (select types_revision from refold.streams where stream = %s), "
                "array(select distinct a.n from unnest(%s::int[], %s::int[], %s::text[], %s::text[]) "
                "as a (n, partition, subject, id) where "
                # Not exists: that may become a join, which may scan the history.
                "(select true from {}.events e "
                "where e.partition = a.partition and e.subject = a.subject and e.id = a.id) is not null)"
            )
            .format(sql.Identifier(stream.schema))
            .as_string()
        )

    def check(self, append: Append) -> Append:
        """Return `append` with what the types, as they are known now, say against it."""
        if append.types_revision == self.revision:
            return append
        refusal = None if self.types is None else self.types.refusal(append.types, append.data, append.path)
        return msgspec.structs.replace(append, refusal=refusal, types_revision=self.revision)

    async def read(self) -> None:
        """Read the types from the catalog.

        Raises:
            psycopg.Error: PostgreSQL can't be asked, or refuses.
        """
        async with self._connections.lend() as conn:
            revision, types = await catalog.get_event_types(conn, self._stream)
        self.revision, self.types, self.broken = revision, None, None
        if types is None:
            return
        try:
            self.types = EventTypes.decode(types)
        except SchemaError as error:
            # The operator took it, so it is of another version.
            self.broken = f"this event store can't use the stream's event types; is it of an old version? {error}"
            log.error("Event types can't be used", stream=self._stream, revision=revision, error=str(error))

    async def decide(self, appends: Sequence[Append]) -> dict[int, EventStoreError] | None:
        """Return the errors that refuse some of `appends`, by id() of these; the others go to the database.

        In place of that, None: the types have changed; to be read, and all to be checked again.

        Raises:
            psycopg.Error: PostgreSQL can't be asked, or refuses.
        """
        if self.broken is not None:
            return {id(append): UnavailableError(self.broken) for append in appends}
        refused = {id(append): append.refusal for append in appends if append.refusal is not None}
        doubtful = [append for append in appends if append.refusal is not None]
        events = [(number, append, element) for number, append in enumerate(doubtful) for element in append.ids]
        arguments = [
            self._stream,
            [number for number, _, _ in events],
            [append.partition for _, append, _ in events],
            [arrays.text_value(append.subject_element).decode() for _, append, _ in events],
            [arrays.text_value(element).decode() for _, _, element in events],
        ]
        async with self._connections.lend() as conn:
            row = await (await conn.execute(self._question.encode(), arguments)).fetchone()
        assert row is not None, "a select without from gives one row"
        revision, known = row
        if revision != self.revision:
            return None
        retried = {id(doubtful[number]) for number in known}
        return {append: error for append, error in refused.items() if append not in retried}
