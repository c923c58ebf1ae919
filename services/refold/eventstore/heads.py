"""The streams' heads as a metric: how many events each holds, whoever appended them."""

from collections.abc import Iterable
from typing import Any

from psycopg import AsyncConnection

from refold.eventstore import metrics
from refold.eventstore.catalog import Stream
from refold.eventstore.connections import Connections


class Heads:
    """Shows the heads of the streams that are served; one process has one."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._shown: set[str] = set()

    async def show(self, streams: Iterable[Stream]) -> None:
        """Read all heads, by one query, and show those of `streams`; a stream that isn't among them is shown no more.

        Raises:
            UnavailableError: PostgreSQL can't be reached.
        """
        found = await self._connections.ask(_events, seconds=10)
        labels = {f"{stream.namespace}/{stream.name}": stream.stream for stream in streams}
        for gone in self._shown - labels.keys():
            metrics.HEAD.remove(gone)
        for label, number in labels.items():
            metrics.HEAD.labels(label).set(found.get(number, 0))
        self._shown = set(labels)


async def _events(conn: AsyncConnection[Any]) -> dict[int, int]:
    """Return how many events each stream holds, by its number."""
    cursor = await conn.execute("select stream, sum(head)::bigint from refold.heads group by stream")
    return dict(await cursor.fetchall())
