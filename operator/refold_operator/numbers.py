"""The numbers in statuses: one query of the store tells which streams have grown, and only these are looked at."""

import asyncio

import psycopg
import structlog
from refold.eventstore.errors import EventStoreError

from refold_operator.controller import Controller
from refold_operator.errors import UnreachableError
from refold_operator.store import Store
from refold_operator.workqueue import Key

_log = structlog.get_logger(__name__)


async def watch_numbers(store: Store, controller: Controller, *, every: float) -> None:
    """Look at streams with new events, and at the Projections that read them, each `every` so many seconds."""
    known: dict[tuple[str, str], int] = {}
    while True:
        await asyncio.sleep(every)
        try:
            events = await store.all_events()
        except (UnreachableError, EventStoreError, psycopg.Error) as error:
            _log.debug("heads can't be read", why=str(error))
            continue
        for (namespace, name), count in events.items():
            if known.get((namespace, name), count) != count:
                controller.queue.add(Key("EventStream", namespace, name))
                controller.wake_readers(namespace, name)
        known = events
