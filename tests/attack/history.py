"""What the event store holds: its history, which everything else is held against."""

import datetime as dt
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from refold.eventstore.catalog import Stream

from hack.servers.platform import STORE, Platform


@dataclass(frozen=True, slots=True)
class Stored:
    """An event of the store."""

    position: int
    subject: str
    revision: int
    id: str
    type: str
    data: Any
    recorded_at: dt.datetime


#: The events of the store, by partition, in the order of their positions.
History = list[list[Stored]]


def read_store(platform: Platform, stream: Stream) -> tuple[History, list[int]]:
    """Return the store's events, and the heads of the partitions."""
    history: History = [[] for _ in range(stream.partitions)]
    with psycopg.connect(platform.postgres.dsn(STORE)) as connection:
        query = sql.SQL(
            "select partition, position, subject, revision, id, type, data, recorded_at from {}.events "
            "order by partition, position"
        ).format(sql.Identifier(stream.schema))
        with connection.cursor("events") as cursor:
            for partition, *event in cursor.execute(query):
                history[partition].append(Stored(*event))
        heads = connection.execute(
            "select head from refold.heads where stream = %s order by partition", [stream.stream]
        ).fetchall()
    return history, [head for (head,) in heads]
