"""What kopf calls: every handler only names the resource that is to be looked at.

kopf brings watch streams, their restarts, the finalizer, and the order in which an object's changes are seen. What is
to be done is decided by `Controller`, from what is there and not from what has changed.
"""

import asyncio
from typing import Any

import aiohttp
import kopf

from refold_operator.children import COMPONENT_LABEL, MANAGED, PROJECTION_LABEL, STREAM_LABEL
from refold_operator.cluster import GROUP, VERSION, Object
from refold_operator.controller import Controller
from refold_operator.installation import Installation
from refold_operator.resources import FINALIZER
from refold_operator.watched import Watched
from refold_operator.watches import Watches
from refold_operator.workqueue import Key

_PREFIX = "operator.refold.dev"
#: How many of kopf's own changes are under way at the same time. Without a limit, many new resources would open a
#: connection each, whose handshakes cost more than the requests.
_CHANGES = 16
_CHILDREN = (
    ("apps", "v1", "deployments"),
    ("", "v1", "services"),
    ("", "v1", "secrets"),
    ("", "v1", "serviceaccounts"),
)


class _NoDifferences(kopf.DiffBaseStorage):
    """Tells kopf that no object has ever changed, so that it writes no annotations: `Watched` tells what is new."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:  # noqa: ARG002 - kopf's form
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence:
        return self.build(body=body)

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Keep nothing."""


def settings() -> kopf.OperatorSettings:
    """Return kopf's settings."""
    result = kopf.OperatorSettings()
    result.persistence.finalizer = FINALIZER
    result.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=_PREFIX, v1=False)
    result.persistence.diffbase_storage = _NoDifferences()
    result.peering.standalone = True  # kopf runs only where the Lease is held (`election`)
    result.scanning.disabled = True  # the CRDs are there before kopf starts, so no rights on CRDs and namespaces
    result.posting.enabled = False  # the controller writes Events itself: one a change of outcome
    result.watching.server_timeout = 5 * 60
    result.watching.client_timeout = 6 * 60  # a watch that the server forgot to end
    result.watching.connect_timeout = 15
    result.networking.request_timeout = 30
    result.networking.connect_timeout = 10
    result.networking.error_backoffs = (0.5, 1, 2, 3, 5, 8, 13, 21)
    for kind in _CHILDREN:
        result.watching.label_selectors[kind] = MANAGED
    return result


@kopf.on.login()
async def log_in(memo: Any, **known: Any) -> kopf.AiohttpSession:
    """Let kopf's own requests (finalizers, annotations) pass the guard as all others do."""
    found = kopf.login_via_client(**known)
    assert found is not None, "the client's package is there"
    changes = asyncio.Semaphore(_CHANGES)

    async def guarded(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        if request.method == "GET":
            return await send(request)
        async with changes:
            memo.guard()  # after the waiting
            return await send(request)

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=found.as_ssl_context()),
        headers=found.as_http_headers(),
        trust_env=found.trust_env,
        middlewares=[guarded],
    )
    return kopf.AiohttpSession(server=found.server, aiohttp_session=session)


@kopf.on.event(GROUP, VERSION, "eventstreams")
@kopf.on.event(GROUP, VERSION, "projections")
async def seen(memo: Any, type: str | None, event: Any, **_: Any) -> None:  # noqa: A002 - kopf's name
    """A watch has brought an EventStream or Projection: one that was there at the start, was changed or has gone."""
    body: Object = event["object"]
    metadata = body["metadata"]
    watches: Watches = memo.watches
    watched: Watched = memo.watched
    controller: Controller = memo.controller
    key = _key(body["kind"], metadata["namespace"], metadata["name"])
    watches.seen(metadata["uid"], metadata["generation"], deleted=type == "DELETED")
    if type == "DELETED":
        for one in {key, *watched.forget(key)}:
            controller.queue.add(one)
    elif watched.bring(body, listed=type is None):
        controller.queue.add(key)


@kopf.on.delete(GROUP, VERSION, "eventstreams")
async def event_stream_deleted(memo: Any, namespace: str | None, name: str, retry: int, **_: Any) -> None:
    """An EventStream is being deleted; kopf takes the finalizer away when this returns."""
    await _finalize(memo.controller, _key("EventStream", namespace, name), retry)


@kopf.on.delete(GROUP, VERSION, "projections")
async def projection_deleted(memo: Any, namespace: str | None, name: str, retry: int, **_: Any) -> None:
    """A Projection is being deleted; kopf takes the finalizer away when this returns."""
    await _finalize(memo.controller, _key("Projection", namespace, name), retry)


@kopf.on.event("apps", "v1", "deployments", labels={PROJECTION_LABEL: kopf.PRESENT})
@kopf.on.event("", "v1", "services", labels={PROJECTION_LABEL: kopf.PRESENT})
@kopf.on.event("", "v1", "secrets", labels={PROJECTION_LABEL: kopf.PRESENT})
@kopf.on.event("", "v1", "serviceaccounts", labels={PROJECTION_LABEL: kopf.PRESENT})
async def child_changed(memo: Any, namespace: str | None, labels: Any, **_: Any) -> None:
    """Something that was made for a Projection was changed, by someone or by its own progress."""
    controller: Controller = memo.controller
    controller.queue.add(_key("Projection", namespace, labels[PROJECTION_LABEL]))


@kopf.on.event("", "v1", "secrets", labels={STREAM_LABEL: kopf.PRESENT})
async def consumer_secret_changed(memo: Any, namespace: str | None, labels: Any, **_: Any) -> None:
    """The Secret of an EventStream's consumers was changed."""
    controller: Controller = memo.controller
    controller.queue.add(_key("EventStream", namespace, labels[STREAM_LABEL]))


@kopf.on.event("", "v1", "secrets", labels={COMPONENT_LABEL: kopf.ABSENT})
async def installation_changed(memo: Any, namespace: str | None, **_: Any) -> None:
    """A Secret of an installation was changed."""
    installation: Installation = memo.installation
    if namespace == installation.namespace:
        installation.wake()


def _key(kind: str, namespace: str | None, name: str) -> Key:
    assert namespace is not None, "all kinds that are watched are namespaced"
    return Key(kind, namespace, name)


async def _finalize(controller: Controller, key: Key, retry: int) -> None:
    outcome = await controller.queue.now(key, controller.finalize)
    if outcome.failed:
        raise kopf.TemporaryError(
            outcome.message, delay=min(2.0**retry, 30.0) if outcome.again is None else outcome.again
        )
    controller.queue.forget(key)
