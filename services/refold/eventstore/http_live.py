"""Watching events over HTTP: which operations there are, and what a request for one asks for."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from refold import tokens
from refold.eventstore import http_asked
from refold.eventstore.errors import EventStoreError
from refold.eventstore.event_stream import EventStream
from refold.eventstore.http_asked import NAME, NAMESPACE, PARTITION, STREAM, SUBJECT
from refold.eventstore.live import After
from refold.eventstore.problems import from_error
from refold.eventstore.store import EventStore
from refold.web import paths, sent_events
from refold.web.openapi import Operation, Parameter
from refold.web.problems import Problem

_LAST = Parameter(
    name="last-event-id",
    where="header",
    description="The id of the last event that was read, to go on after it; goes before `after`",
)


class LiveApi:
    """The operations that watch a store."""

    def __init__(self, store: Callable[[], EventStore]) -> None:
        self._store = store

    def operations(self) -> list[Operation]:
        """Return what is served."""
        answer = {sent_events.MEDIA_TYPE: str}
        return [
            Operation(
                "GET",
                STREAM + "/subjects/{subject}/events:watch",
                self.watch_subject,
                verb="watch",
                summary="A subject's events, and those that come, as server-sent events",
                parameters=[NAMESPACE, NAME, SUBJECT, _after("a revision"), _LAST],
                answer=answer,
                problems=[404, 410, 422],
            ),
            Operation(
                "GET",
                STREAM + "/partitions/{partition}/events:watch",
                self.watch_partition,
                verb="watch",
                summary="A partition's events, and those that come, as server-sent events",
                parameters=[NAMESPACE, NAME, PARTITION, _after("a position"), _LAST],
                answer=answer,
                problems=[404, 410],
            ),
            Operation(
                "GET",
                STREAM + "/events:watch",
                self.watch_stream,
                verb="watch",
                summary="All events of a stream, and those that come, as server-sent events",
                parameters=[NAMESPACE, NAME, _after("0"), _LAST],
                answer=answer,
                problems=[404, 410],
            ),
        ]

    async def watch_subject(self, request: Request) -> Response:
        """Watch one subject."""
        return await self._watch(request, subject=paths.parameter(request, "subject"))

    async def watch_partition(self, request: Request) -> Response:
        """Watch one partition."""
        return await self._watch(request, partition=http_asked.partition(request))

    async def watch_stream(self, request: Request) -> Response:
        """Watch all partitions."""
        return await self._watch(request)

    async def _watch(self, request: Request, *, subject: str | None = None, partition: int | None = None) -> Response:
        namespace, name = http_asked.stream(request)
        where, after = _asked_after(request)
        try:
            reader = await self._store().watch(namespace, name, after, subject=subject, partition=partition)
        except EventStoreError as error:
            raise from_error(error) from error
        except tokens.InvalidTokenError as error:
            raise Problem(
                400, "invalid-token", "Invalid token", f"{where} can't be used: {error}", field=where
            ) from error
        if request.method == "HEAD":
            reader.close()
            return Response(media_type=sent_events.MEDIA_TYPE)
        return EventStream(reader)


def _after(number: str) -> Parameter:
    return Parameter(
        name="after",
        where="query",
        description=f"Begin after {number} (default 0, the beginning), `now`, an append's token or an event's id",
    )


def _asked_after(request: Request) -> tuple[str, After]:
    """Return which part of the request says after what to begin, and what it says."""
    query = http_asked.query(request, "after")
    last = request.headers.get("last-event-id")
    if last:
        return "Last-Event-ID", last
    after = query.get("after", "0")
    if after.isascii() and after.isdigit() and len(after) < 19:
        return "after", int(after)
    return "after", after
