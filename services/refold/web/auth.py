"""Who may call: one token for all callers, until Kubernetes itself decides (TokenReview and SubjectAccessReview).

A service asks nothing but `await authorise(request)`, so that another way to decide replaces this module's class alone.
"""

import hmac
from typing import Protocol

from starlette.requests import Request

from refold.web.problems import Problem


class Authorise(Protocol):
    """Decides whether a request may go on to its handler."""

    async def __call__(self, request: Request) -> None:
        """Return, or refuse.

        Raises:
            Problem: 401 without valid credentials, 403 where they don't suffice, 503 where it can't be decided now.
        """


class SharedToken:
    """One secret token, sent as `Authorization: Bearer <token>`, allows everything.

    Raises:
        ValueError: the token is empty.
    """

    def __init__(self, token: str) -> None:
        if not token.strip():
            raise ValueError("the token is empty: set REFOLD_TOKEN to the secret that callers send as a bearer token")
        self._token = token.strip().encode()

    async def __call__(self, request: Request) -> None:
        """Compare in constant time."""
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not credentials:
            raise Problem(
                401,
                "unauthenticated",
                "Not authenticated",
                "no bearer token was sent; send the header 'Authorization: Bearer <token>'",
                headers={"www-authenticate": 'Bearer realm="refold"'},
            )
        if not hmac.compare_digest(credentials.strip().encode(), self._token):
            raise Problem(
                401,
                "unauthenticated",
                "Not authenticated",
                "the bearer token isn't valid here",
                headers={"www-authenticate": 'Bearer realm="refold", error="invalid_token"'},
            )
