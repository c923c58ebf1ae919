"""Answers with rows: how fresh they are, and a validator by which a caller needn't be sent what it has.

The ETag is strong: a digest of the body, so it changes when and only when the body does. It is the same on every
replica, before and after a swap that leaves the rows as they are, and whatever happens to other rows. A caller that has
it already (`If-None-Match`) is answered with 304: no body, and how fresh the rows are now.
"""

from collections.abc import Iterable
from hashlib import blake2b

from starlette.requests import Request

from refold.projection.past import RowAt
from refold.web.answers import JsonAnswer
from refold.web.openapi import Parameter

AT = Parameter(
    name="at",
    where="query",
    description="A revision of the subject, or a time (RFC 3339): the row as it was then. Of rows that one partition "
    "feeds alone",
)

#: A cache asks each time: who reads wants to know how fresh the rows are.
_CACHE_CONTROL = (b"cache-control", b"no-cache")


class Rows(JsonAnswer):
    """The answer with `body` (JSON) and `headers`, or 304 where `request` says that the body is known."""

    def __init__(self, request: Request, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        etag = b'"%b"' % blake2b(body, digest_size=12).hexdigest().encode()
        headers = [*headers, (b"etag", etag), _CACHE_CONTROL]
        super().__init__(body, headers=headers)
        if _known(request, etag):
            self.status_code, self.body, self.raw_headers = 304, b"", headers


def at_headers(found: RowAt) -> dict[str, str]:
    """Return the headers that tell which event a row at a moment shows, and before which it stops."""
    headers = {"refold-revision": str(found.revision)}
    if found.parked is not None:
        headers["refold-parked-revision"] = str(found.parked.revision)
    return headers


def _known(request: Request, etag: bytes) -> bool:
    """Return whether If-None-Match (RFC 9110, 13.1.2) names the tag; it is compared weakly."""
    for name, value in request.scope["headers"]:
        if name == b"if-none-match":
            # No tag of ours holds a comma or a space, so one of somebody else's that does can't be mistaken for it.
            tags = [tag.strip().removeprefix(b"W/") for tag in value.split(b",")]
            if etag in tags or tags == [b"*"]:
                return True
    return False
