"""What is asked of whoever decides, and how a refusal is answered."""

from contextlib import AbstractAsyncContextManager
from typing import Literal, NamedTuple, Protocol

from starlette.types import Scope

from refold.web.problems import Problem

#: API group of the resources that rights are given on.
GROUP = "refold.dev"
#: What tokens have to be made for.
AUDIENCE = "refold"
METRICS = "/metrics"
EVENTS = "eventstreams/events"
ROWS = "projections/rows"

Verb = Literal["create", "get", "update", "watch"]


class ResourceAccess(NamedTuple):
    """Do `verb` on `kind` (resource/subresource, such as eventstreams/events) of the resource `namespace/name`."""

    verb: Verb
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.verb} {self.kind} of {self.name!r} in the namespace {self.namespace!r}"


class PathAccess(NamedTuple):
    """Get a path that belongs to no resource."""

    path: str

    def __str__(self) -> str:
        return f"get {self.path}"


Access = ResourceAccess | PathAccess


class Caller(Protocol):
    """Somebody whose token was found valid."""

    @property
    def name(self) -> str:
        """What logs call the caller."""

    async def require(self, access: Access) -> None:
        """Return where the caller may do this.

        Raises:
            Problem: 403 where it may not, 503 where it can't be decided now.
        """


class Authority(AbstractAsyncContextManager["Authority"], Protocol):
    """Decides who calls and what they may do; entered before the first request, left after the last."""

    async def caller(self, scope: Scope) -> Caller:
        """Return who sent a request.

        Raises:
            Problem: 401 without a valid token, 503 where it can't be decided now.
        """


def bearer(scope: Scope) -> bytes:
    """Return the token of the request's `Authorization: Bearer <token>`.

    Raises:
        Problem: 401 where there is none.
    """
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            token = token.strip()
            if token and scheme.lower() == b"bearer":
                return bytes(token)
            break
    raise Problem(
        401,
        "unauthenticated",
        "Not authenticated",
        "no bearer token was sent; send the header 'Authorization: Bearer <token>'",
        headers={"www-authenticate": 'Bearer realm="refold"'},
    )


def unauthenticated(why: str) -> Problem:
    """Return the answer to a token that isn't valid here; `why` also says what to do."""
    return Problem(
        401,
        "unauthenticated",
        "Not authenticated",
        why,
        headers={"www-authenticate": 'Bearer realm="refold", error="invalid_token"'},
    )


def forbidden(who: str, access: Access, remedy: str) -> Problem:
    """Return the answer to a caller that lacks a right; `remedy` says how it gets it."""
    return Problem(
        403,
        "forbidden",
        "Not allowed",
        f"{who} may not {access}; {remedy}",
        headers={"www-authenticate": 'Bearer realm="refold", error="insufficient_scope"'},
        caller=who,
    )
