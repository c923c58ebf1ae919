"""The event store's process: settings from the environment, the HTTP API, a graceful end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import structlog

from refold import logs
from refold.eventstore import http_asked
from refold.eventstore.errors import EventStoreError
from refold.eventstore.http import Api
from refold.eventstore.settings import Settings
from refold.eventstore.store import EventStore
from refold.web import server
from refold.web.app import App
from refold.web.auth.access import EVENTS
from refold.web.auth.choice import authority
from refold.web.openapi import Operation

log = structlog.get_logger(__name__)

#: Seconds that closing the store may take, after those that requests under way had: what still waits then waits for a
#: database that doesn't answer, and nobody waits for it.
_CLOSE_SECONDS = 2.0


#: Makes operations on the store, which is there once the application has started.
More = Callable[[Callable[[], EventStore]], Sequence[Operation]]


def make(settings: Settings, more: More = lambda _: ()) -> App:
    """Return the application; it connects when it is started, and serves also while the database is away.

    Args:
        settings: of the process.
        more: makes further operations: of what comes after the event store, which it therefore doesn't know.
    """
    limits = settings.limits()
    api = Api(limits)

    async def ready() -> str | None:
        try:
            await api.store.ping()
        except EventStoreError as error:
            return str(error)
        return None

    @contextlib.asynccontextmanager
    async def lifespan(_: App) -> AsyncIterator[None]:
        api.store = EventStore(settings.store_dsn.get_secret_value(), limits=limits, live_readers=settings.live_readers)
        api.store.start()
        try:
            yield
        finally:
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await api.store.close()
            except TimeoutError:
                log.warning("The database doesn't answer; what waits for it has no outcome, and is left")

    return App(
        "Refold event store",
        [*api.operations(), *more(lambda: api.store)],
        authority=authority(settings.auth),
        kind=EVENTS,
        resource=http_asked.resource,
        ready=ready,
        lifespan=lifespan,
        stop=lambda: api.store.end_watches(),
    )


def main(auth: str, more: More) -> None:
    """Serve until SIGTERM; finish what was acknowledged.

    `auth` tells who may call, the environment everything else; for `more` see `make`.
    """
    logs.configure("eventstore")
    settings = Settings(auth=auth)  # type: ignore[call-arg]  # from the environment
    server.run(make(settings, more), settings.port)
