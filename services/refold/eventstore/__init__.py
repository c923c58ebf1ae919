"""Append and read events in PostgreSQL.

`EventStore` is the library, `server` the HTTP API around it, `catalog` what the operator does to a store.
"""

from refold.eventstore.appends import ExpectedRevision, Limits, NewEvent
from refold.eventstore.lane import AppendResult
from refold.eventstore.store import EventStore

__all__ = ["AppendResult", "EventStore", "ExpectedRevision", "Limits", "NewEvent"]
