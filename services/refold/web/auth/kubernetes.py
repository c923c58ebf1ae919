"""Kubernetes itself decides: TokenReview says who calls, SubjectAccessReview what they may do.

Answers are remembered: yes for 30 s, no for 10 s, a token never beyond its own expiry. So a right that is taken away
(a RoleBinding, a ServiceAccount) ends after at most 30 s, and one that is given counts after at most 10 s; a caller
pays for two reviews every 30 s. Where the API server is away, what is remembered holds for its time; then the answer is
503.

Tokens are made for the audience `refold`, so that a service which is sent one can't use it anywhere else. `/metrics` is
as in all of Kubernetes' own components: a token for the API server itself, and the right to get the path `/metrics`.
"""

import base64
import binascii
import hashlib
import time
from typing import Any

import msgspec
from starlette.types import Scope

from refold.web.auth.access import (
    AUDIENCE,
    GROUP,
    METRICS,
    Access,
    PathAccess,
    ResourceAccess,
    bearer,
    forbidden,
    unauthenticated,
)
from refold.web.auth.expiring import Expiring, Fresh
from refold.web.auth.reviews import Reviews, UnavailableError, User
from refold.web.problems import Problem

#: Seconds that a yes, and a no, is remembered.
YES_SECONDS = 30.0
NO_SECONDS = 10.0
#: Tokens, and decisions, that are remembered; each takes one to two KB.
MOST = 10_000
#: Tokens, and decisions, that may wait for the API server; beyond, the answer is 503 at once.
MOST_ASKED = 1_000
#: The longest token that is asked for.
_TOKEN_BYTES = 16 * 1024


class _Claims(msgspec.Struct):
    """What a token that is a JWT says of itself. Not to be believed before the API server has said yes."""

    aud: str | list[str] = ""
    exp: float | None = None


class _Caller:
    """A user, and where to ask what they may do."""

    __slots__ = ("_authority", "user")

    def __init__(self, user: User, authority: "Kubernetes") -> None:
        self.user = user
        self._authority = authority

    @property
    def name(self) -> str:
        """The user's name."""
        return self.user.name

    async def require(self, access: Access) -> None:
        """Return where the user has this right."""
        if not await self._authority.may(self.user, access):
            raise forbidden(self.user.name, access, _remedy(access))


class Kubernetes:
    """Who may call, by the cluster's own users and roles.

    Args:
        reviews: asks the API server.
    """

    def __init__(self, reviews: Reviews) -> None:
        self._reviews = reviews
        #: By SHA-256 of the token; None: nobody's.
        self._callers: Expiring[bytes, _Caller | None] = Expiring(MOST, MOST_ASKED)
        self._decisions: Expiring[tuple[User, Access], bool] = Expiring(MOST, MOST_ASKED)

    async def __aenter__(self) -> "Kubernetes":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._reviews.close()

    async def caller(self, scope: Scope) -> _Caller:
        """Return whose token was sent."""
        token = bearer(scope)
        audience = None if scope["path"] == METRICS else AUDIENCE
        digest = hashlib.sha256(token).digest()
        key = digest if audience else digest + b"m"
        try:
            caller = await self._callers.get(key, lambda: self._whose(token, audience))
        except (UnavailableError, OverflowError) as error:
            raise _undecided() from error
        if caller is None:
            raise unauthenticated(_why_not(token, audience))
        return caller

    async def may(self, user: User, access: Access) -> bool:
        """Tell whether `user` has a right.

        Raises:
            Problem: 503 where nobody can tell now.
        """
        try:
            return await self._decisions.get((user, access), lambda: self._decide(user, access))
        except (UnavailableError, OverflowError) as error:
            raise _undecided() from error

    async def _whose(self, token: bytes, audience: str | None) -> Fresh[_Caller | None]:
        left = _seconds_left(token)
        if left <= 0 or len(token) > _TOKEN_BYTES or not token.isascii():
            return Fresh(None, NO_SECONDS, good=False)
        user = await self._reviews.whose(token.decode("ascii"), audience)
        if user is None:
            return Fresh(None, NO_SECONDS, good=False)
        return Fresh(_Caller(user, self), min(YES_SECONDS, left), good=True)

    async def _decide(self, user: User, access: Access) -> Fresh[bool]:
        allowed = await self._reviews.may(user, access)
        return Fresh(allowed, YES_SECONDS if allowed else NO_SECONDS, good=allowed)


def _undecided() -> Problem:
    return Problem(
        503,
        "authorisation-unavailable",
        "Nobody can say who may call",
        "the Kubernetes API, which decides who may call, gives no answer to this service (its log says why); "
        "what it has decided in the last seconds still holds. Try again",
        retry_after=1,
    )


def _claims(token: bytes) -> _Claims:
    """Return what a JWT says of itself; of anything else, nothing."""
    try:
        payload = token.split(b".")[1]
        return msgspec.json.decode(base64.urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)), type=_Claims)
    except (IndexError, binascii.Error, ValueError, msgspec.DecodeError):
        return _Claims()


def _seconds_left(token: bytes) -> float:
    """Return how long the token says that it is valid; what says nothing is as good as for ever."""
    expires = _claims(token).exp
    return float("inf") if expires is None else expires - time.time()


def _why_not(token: bytes, audience: str | None) -> str:
    claims = _claims(token)
    remedy = f"get one by `kubectl create token <service account>{f' --audience {audience}' if audience else ''}`"
    if claims.exp is not None and claims.exp <= time.time():
        return f"the bearer token has expired; {remedy}, or read a mounted one from its file for each request"
    made_for = [claims.aud] if isinstance(claims.aud, str) else claims.aud
    if audience is not None and any(made_for) and audience not in made_for:
        return f"the bearer token is for the audience {', '.join(made_for)[:200]}, not for {audience}; {remedy}"
    if audience is None and AUDIENCE in made_for:
        return (
            f"the bearer token is for the audience {AUDIENCE}; {METRICS} takes those for the Kubernetes API: {remedy}"
        )
    return f"the Kubernetes API doesn't know the bearer token: it isn't one of this cluster, or was revoked; {remedy}"


def _remedy(access: Access) -> str:
    if isinstance(access, PathAccess):
        return f"bind a ClusterRole with this rule to it: {_json({'nonResourceURLs': [access.path], 'verbs': ['get']})}"
    return f"bind a Role of the namespace {access.namespace!r} with this rule to it: {_json(_rule(access))}"


def _rule(access: ResourceAccess) -> dict[str, Any]:
    return {
        "apiGroups": [GROUP],
        "resources": [access.kind],
        "verbs": [access.verb],
        "resourceNames": [access.name],
    }


def _json(rule: dict[str, Any]) -> str:
    return msgspec.json.encode(rule).decode()
