"""The two questions to the Kubernetes API: TokenReview (whose token is it?) and SubjectAccessReview (may they?).

Plain HTTP with the pod's service account; the models of the `kubernetes` package would cost each service 30 MB and a
second at its start.
"""

import asyncio
import os
import ssl
import time
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import structlog
from prometheus_client import Histogram

from refold.setup import SetupError
from refold.web.auth.access import GROUP, Access, PathAccess

#: Where Kubernetes mounts a pod's service account: `token` and `ca.crt`.
MOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: Seconds for each step of an answer: to connect, to send, to wait for each part.
_TIMEOUT_SECONDS = 5.0
#: Questions of a kind that are asked at a time, each on a connection of its own: a flood of unknown tokens is held here
#: and not in the API server, and holds up no question about a known caller's rights.
AT_A_TIME = 8
#: Seconds without a question after one wasn't answered, so that an outage costs a caller no time.
PAUSE_SECONDS = 1.0

_REVIEWS = Histogram(
    "refold_auth_review_seconds",
    "Time for a review by the Kubernetes API, which is asked where no answer is remembered",
    ["review", "outcome"],
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
_log = structlog.get_logger(__name__)
_S = TypeVar("_S")


class UnavailableError(Exception):
    """The Kubernetes API gave no answer; the text says why."""


class User:
    """Who a token belongs to, as the Kubernetes API names them. Hashable, and the hash is computed once.

    Attributes:
        name: for example system:serviceaccount:shop:web.
        uid: of the ServiceAccount.
        groups: in the API's order.
        extra: what authenticators add (the pod that a token is bound to), sorted by key.
    """

    __slots__ = ("_hash", "extra", "groups", "name", "uid")

    def __init__(
        self,
        name: str,
        uid: str = "",
        groups: tuple[str, ...] = (),
        extra: tuple[tuple[str, tuple[str, ...]], ...] = (),
    ) -> None:
        self.name = name
        self.uid = uid
        self.groups = groups
        self.extra = extra
        self._hash = hash((name, uid, groups, extra))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, User)
            and (self.name, self.uid, self.groups, self.extra) == (other.name, other.uid, other.groups, other.extra)
        )


class _UserInfo(msgspec.Struct):
    username: str = ""
    uid: str = ""
    groups: list[str] | None = None
    extra: dict[str, list[str]] | None = None


class _TokenStatus(msgspec.Struct):
    authenticated: bool = False
    user: _UserInfo | None = None
    audiences: list[str] | None = None


class _TokenReview(msgspec.Struct):
    status: _TokenStatus


class _AccessStatus(msgspec.Struct):
    allowed: bool = False


class _AccessReview(msgspec.Struct):
    status: _AccessStatus


class Reviews:
    """A connection to the Kubernetes API.

    Args:
        url: of the API server.
        mount: folder with `token` (read anew for each question: it changes) and `ca.crt`.
    """

    def __init__(self, url: str, mount: Path = MOUNT) -> None:
        self._url = url
        self._mount = mount
        self._client: httpx.AsyncClient | None = None
        self._trusted = 0  # modification time of ca.crt that the client was made with
        self._turns = {kind: asyncio.Semaphore(AT_A_TIME) for kind in ("TokenReview", "SubjectAccessReview")}
        self._pause_until = 0.0
        self._failed = ""

    @classmethod
    def in_cluster(cls) -> "Reviews":
        """Return the connection of a pod.

        Raises:
            SetupError: this is no pod, or it has no service account's token.
        """
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "")
        if not host or not port or not (MOUNT / "token").exists():
            raise SetupError(
                "REFOLD_AUTH=kubernetes needs a pod with a service account's token, and there is no "
                f"{'KUBERNETES_SERVICE_HOST' if not host or not port else MOUNT / 'token'} here; "
                "without a cluster give REFOLD_AUTH=tokens:FILE or REFOLD_AUTH=none"
            )
        return cls(f"https://{f'[{host}]' if ':' in host else host}:{port}")

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    async def whose(self, token: str, audience: str | None) -> User | None:
        """Return who the token belongs to, or None where it isn't valid for `audience` (None: for the API itself).

        Raises:
            UnavailableError: there is no answer.
        """
        spec: dict[str, Any] = {"token": token} if audience is None else {"token": token, "audiences": [audience]}
        answer = await self._ask("authentication.k8s.io", "TokenReview", spec, _TokenReview)
        status = answer.status
        # An authenticator that knows nothing of audiences answers without: then the token is for the API itself alone.
        if not status.authenticated or status.user is None or not status.user.username:
            return None
        if audience is not None and audience not in (status.audiences or ()):
            return None
        user = status.user
        extra = tuple(sorted((name, tuple(values)) for name, values in (user.extra or {}).items()))
        return User(user.username, user.uid, tuple(user.groups or ()), extra)

    async def may(self, user: User, access: Access) -> bool:
        """Tell whether `user` has a right.

        Raises:
            UnavailableError: there is no answer.
        """
        spec: dict[str, Any] = {
            "user": user.name,
            "uid": user.uid,
            "groups": user.groups,
            "extra": dict(user.extra),
        }
        if isinstance(access, PathAccess):
            spec["nonResourceAttributes"] = {"path": access.path, "verb": "get"}
        else:
            resource, _, subresource = access.kind.partition("/")
            spec["resourceAttributes"] = {
                "group": GROUP,
                "version": "*",
                "resource": resource,
                "subresource": subresource,
                "verb": access.verb,
                "namespace": access.namespace,
                "name": access.name,
            }
        answer = await self._ask("authorization.k8s.io", "SubjectAccessReview", spec, _AccessReview)
        return answer.status.allowed

    async def _ask(self, group: str, kind: str, spec: dict[str, Any], type_: type[_S]) -> _S:
        async with self._turns[kind]:
            return await self._ask_now(group, kind, spec, type_)

    async def _ask_now(self, group: str, kind: str, spec: dict[str, Any], type_: type[_S]) -> _S:
        if time.monotonic() < self._pause_until:
            raise UnavailableError(self._failed)
        path = f"/apis/{group}/v1/{kind.lower()}s"
        body = msgspec.json.encode({"apiVersion": f"{group}/v1", "kind": kind, "spec": spec})
        began = time.perf_counter()
        try:
            answer = await self._answer(path, body, type_)
        except UnavailableError as error:
            _REVIEWS.labels(kind, "failed").observe(time.perf_counter() - began)
            self._pause_until = time.monotonic() + PAUSE_SECONDS
            if str(error) != self._failed:
                self._failed = str(error)
                _log.error("The Kubernetes API doesn't decide who may call", asked=path, why=self._failed)
            raise
        _REVIEWS.labels(kind, "answered").observe(time.perf_counter() - began)
        if self._failed:
            self._failed = ""
            _log.info("The Kubernetes API decides again who may call")
        return answer

    async def _answer(self, path: str, body: bytes, type_: type[_S]) -> _S:
        response: httpx.Response | None = None
        for last in (False, True):
            try:
                client = await self._connected()
                own = (self._mount / "token").read_text().strip()
                response = await client.post(path, content=body, headers={"authorization": f"Bearer {own}"})
                break
            except httpx.TimeoutException as error:
                raise UnavailableError(f"no answer within {_TIMEOUT_SECONDS:.0f} s ({type(error).__name__})") from error
            except httpx.TransportError as error:
                # A connection that was kept may have been closed meanwhile; asking twice does no harm.
                if last:
                    raise UnavailableError(f"{type(error).__name__}: {error}") from error
            except (OSError, ssl.SSLError) as error:
                raise UnavailableError(f"this pod's service account can't be read: {error}") from error
        assert response is not None, "the loop ends with an answer or an error"
        if response.status_code >= httpx.codes.BAD_REQUEST:
            raise UnavailableError(_refusal(response))
        try:
            return msgspec.json.decode(response.content, type=type_)
        except msgspec.DecodeError as error:
            raise UnavailableError(f"its answer can't be read: {error}") from error

    async def _connected(self) -> httpx.AsyncClient:
        """Return a client that trusts the cluster's authority as it stands in the mount now."""
        authority = self._mount / "ca.crt"
        changed = authority.stat().st_mtime_ns
        if self._client is None or changed != self._trusted:
            former = self._client
            self._client = httpx.AsyncClient(
                base_url=self._url,
                verify=ssl.create_default_context(cafile=authority),
                timeout=_TIMEOUT_SECONDS,
                limits=httpx.Limits(max_connections=2 * AT_A_TIME, max_keepalive_connections=2 * AT_A_TIME),
                headers={"content-type": "application/json", "accept": "application/json"},
                trust_env=False,
            )
            self._trusted = changed
            if former is not None:
                await former.aclose()
        return self._client


def _refusal(response: httpx.Response) -> str:
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return "401: it doesn't know this pod's service account (was it deleted? then the pod has to be replaced)"
    if response.status_code == httpx.codes.FORBIDDEN:
        return "403: this pod's service account may not ask; bind the ClusterRole system:auth-delegator to it"
    return f"{response.status_code}: {response.text[:200]}"
