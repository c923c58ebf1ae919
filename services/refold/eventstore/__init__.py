"""Append and read events in PostgreSQL.

`EventStore` is the library, `server` the HTTP API around it, `catalog` what the operator does to a store.
"""

from refold.eventstore.appends import ExpectedRevision, Limits, NewEvent, SubjectAppend
from refold.eventstore.lane import AllAppended, AppendResult
from refold.eventstore.store import EventStore

__all__ = ["AllAppended", "AppendResult", "EventStore", "ExpectedRevision", "Limits", "NewEvent", "SubjectAppend"]
