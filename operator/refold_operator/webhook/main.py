"""The webhook's process: reviews with TLS on one port, probes and metrics on another, certificates looked after."""

import asyncio
import re
import signal
import ssl
import time

import msgspec
import structlog
from refold import logs
from refold.web import bodies, server
from refold.web.probes import Probes
from refold.web.problems import Problem
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from refold_operator.cluster import Cluster, RefusedError
from refold_operator.errors import UnreachableError
from refold_operator.liveness import Liveness
from refold_operator.webhook.keeping import Keeper
from refold_operator.webhook.metrics import REVIEWS
from refold_operator.webhook.review import NoReviewError, Reviewer
from refold_operator.webhook.settings import Settings

_log = structlog.get_logger(__name__)

#: Bytes of one AdmissionReview: the API server takes objects of 3 MiB, and sends the former one, too. And of all that
#: are arriving.
_REVIEW_BYTES = 16 * 1024 * 1024
_ARRIVING_BYTES = 64 * 1024 * 1024
#: Seconds for the question whether a stream exists, which only a warning depends on.
_STREAM_SECONDS = 1.0
_LABEL = re.compile("[a-z0-9]([-a-z0-9]*[a-z0-9])?")


class Webhook:
    """The ASGI application: `POST /validate`."""

    def __init__(self, reviewer: Reviewer) -> None:
        self._reviewer = reviewer
        self._room = bodies.Room(_ARRIVING_BYTES, "what may arrive at once")
        self._app = Starlette(
            routes=[Route("/validate", self._validate, methods=["POST"])],
            exception_handlers={Problem: _answer_problem},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection scope."""
        await self._app(scope, receive, send)

    def stop(self) -> None:
        """Nothing here goes on without an end."""

    async def _validate(self, request: Request) -> Response:
        begin = time.perf_counter()
        kind, outcome = "", "failed"
        try:
            body = await bodies.read(request, _REVIEW_BYTES, "an AdmissionReview's limit", self._room)
            reviewed = await self._reviewer.review(body)
            kind, outcome = reviewed.kind, "allowed" if reviewed.allowed else "refused"
            return Response(msgspec.json.encode(reviewed.answer), media_type="application/json")
        except NoReviewError as error:
            raise Problem(400, "no-review", "No AdmissionReview", str(error)) from error
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to see it
        finally:
            known = kind if kind in ("EventStream", "Projection") else "other"
            REVIEWS.labels(known, outcome).observe(time.perf_counter() - begin)


async def _answer_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


class Streams:
    """Whether EventStreams exist, by the API server."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def exists(self, namespace: str, name: str) -> bool | None:
        """Tell whether there is an EventStream; None where the API server doesn't say so soon."""
        if not (_LABEL.fullmatch(namespace) and _LABEL.fullmatch(name)):  # a name could lead elsewhere
            return None
        try:
            async with asyncio.timeout(_STREAM_SECONDS):
                return await self._cluster.get("EventStream", namespace, name) is not None
        except (UnreachableError, RefusedError, TimeoutError) as error:
            _log.warning("nobody knows whether a stream exists", namespace=namespace, name=name, why=str(error))
            return None


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    # uvicorn raises the signal again when it is done, which would end the process by it and not with exit code 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    cluster = await Cluster.connect()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    keeper = Keeper(settings, cluster, context)
    webhook = Webhook(Reviewer(settings.rules, exists=Streams(cluster).exists))
    liveness = Liveness([])
    try:
        with (
            Probes(settings.port, healthy=liveness.wrong, ready=keeper.lacking),
            server.listen(settings.review_port) as sock,
        ):
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(keeper.keep()), tasks.create_task(liveness.keep())]
                await server.make(webhook, tls=context).serve(sockets=[sock])
                for task in background:
                    task.cancel()
    finally:
        await cluster.close()
    _log.info("stopped")


def main() -> None:
    """Run the webhook; settings come from the environment."""
    logs.configure("webhook")
    asyncio.run(run(Settings()))  # type: ignore[call-arg]  # required settings come from the environment
