"""One subject's state, folded from the event store's side: the row that a Projection makes of its history.

An operation of the event store's process, which itself knows no projections; `refold.cli` brings the two together. What
a Projection's live version folds stands in the store's catalog, written by the operator: so neither a read store nor
the cluster is asked, and what was parked or discarded there isn't known here.
"""

import asyncio
import re
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from refold.eventstore import http_asked
from refold.eventstore.errors import EventStoreError, InactiveStreamError, InvalidAppendError, UnavailableError
from refold.eventstore.http_asked import NAME, NAMESPACE, STREAM, SUBJECT
from refold.eventstore.problems import from_error
from refold.eventstore.store import EventStore
from refold.projection.past import MOST_STEPS, At, RowAt, RowFold, why_not
from refold.projection.readstore import UnreadableError, live_definition
from refold.query import histories, problems
from refold.query.answers import AT, at_headers
from refold.query.asked import AskedState
from refold.query.histories import Turns
from refold.web import paths
from refold.web.auth.access import ROWS, ResourceAccess
from refold.web.openapi import Operation, Parameter

_JSON = "application/json"
_LABEL = re.compile(r"[a-z0-9-]{1,63}")
_PROJECTION = Parameter(
    name="projection",
    where="query",
    description="The Projection of the same namespace by whose live version it is folded; the caller needs the verb "
    "get on its projections/rows too",
    required=True,
)


def operations(store: Callable[[], EventStore]) -> list[Operation]:
    """Return what is served of a store, which is there once the application has started."""
    return [
        Operation(
            "GET",
            STREAM + "/subjects/{subject}/state",
            States(store).state,
            verb="get",
            summary="The row that a Projection makes of a subject's history, as it was at a moment",
            parameters=[
                NAMESPACE,
                NAME,
                SUBJECT,
                _PROJECTION,
                AT,
                Parameter(
                    name="steps",
                    where="query",
                    description="Tell of so many of the last events until then what each did to the row",
                    schema={"type": "integer", "minimum": 1, "maximum": MOST_STEPS},
                ),
            ],
            answer={_JSON: RowAt},
            problems=[404, 410],
        ),
    ]


class States:
    """Folds subjects of a store."""

    def __init__(self, store: Callable[[], EventStore]) -> None:
        self._store = store
        self._turns = Turns("event store")

    async def state(self, request: Request) -> Response:
        """Answer the row of a subject at a moment."""
        namespace, name = http_asked.stream(request)
        subject = paths.parameter(request, "subject")
        wanted = AskedState.of(request)
        if _LABEL.fullmatch(wanted.projection) is None:
            raise problems.projection_not_found(f"{namespace}/{wanted.projection[:100]}")
        await request.scope["caller"].require(ResourceAccess("get", ROWS, namespace, wanted.projection))
        try:
            async with self._turns.turn():
                found = await self._folded(namespace, name, subject, wanted)
        except EventStoreError as error:
            raise from_error(error) from error
        if found.revision == 0 and found.parked is None:
            raise problems.no_events(subject)
        return Response(msgspec.json.encode(found), headers=at_headers(found), media_type=_JSON)

    async def _folded(self, namespace: str, name: str, subject: str, wanted: AskedState) -> RowAt:
        store = self._store()
        known = await store.definition(namespace, wanted.projection)
        if known is None:
            raise problems.projection_not_found(f"{namespace}/{wanted.projection}")
        try:
            definition = live_definition(known.version, known.definition)
        except UnreadableError as error:
            raise from_error(UnavailableError(str(error))) from error
        folds = [ref.name for ref in definition.streams]
        if name not in folds:
            raise problems.stream_not_folded(f"{namespace}/{wanted.projection}", name, folds)
        reason = why_not(definition)
        if reason is not None:
            raise problems.no_history(reason)
        [ref] = definition.streams
        at = wanted.at or At()
        # Compiling takes a while, once for a definition.
        fold = await asyncio.to_thread(RowFold, known.version, definition, subject, steps=wanted.steps)
        gone = problems.other_history(f"{namespace}/{name}")
        if (await store.stream(namespace, name)).incarnation != ref.incarnation:
            raise gone
        pages = store.subject_pages(namespace, name, subject, to_revision=at.revision, until=at.time)
        try:
            found = await histories.fold(fold, pages)
        except InactiveStreamError as error:
            raise gone from error
        except InvalidAppendError as error:  # no event can be about such a subject
            raise problems.no_events(subject) from error
        if (await store.stream(namespace, name)).incarnation != ref.incarnation:
            raise gone  # it was made again meanwhile, and the pages may be of either history
        return found
