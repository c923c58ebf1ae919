"""Errors as HTTP answers: problem details (RFC 9457), the same form for every error of every service."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

#: A problem's `type` is this and its slug; the slugs are part of the API and don't change.
TYPE_BASE = "https://refold.dev/problems/"
MEDIA_TYPE = "application/problem+json"


class Problem(Exception):  # noqa: N818 (the RFC's word)
    """An error that a caller is told of. Raised by a handler, it becomes the answer.

    Args:
        status: the HTTP status.
        slug: the stable end of the problem's `type`, for example "revision-conflict"; programs decide by it.
        title: what kind of problem this is, the same text each time.
        detail: what was asked, what stood against it and what the caller can do.
        retry_after: seconds after which trying again makes sense; sent as the header, rounded up.
        headers: further headers of the answer.
        members: further members of the body, for example currentRevision=7 or field="events[0].id".
    """

    def __init__(
        self,
        status: int,
        slug: str,
        title: str,
        detail: str,
        *,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(f"{status} {slug}: {detail}")
        self.status = status
        self.slug = slug
        self.title = title
        self.detail = detail
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(math.ceil(retry_after))
        self.members = members

    def body(self) -> dict[str, Any]:
        """Return the problem's JSON object, as it also stands in a line of an NDJSON answer."""
        return {
            "type": TYPE_BASE + self.slug,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.members,
        }

    def response(self) -> Response:
        """Return the problem as an answer."""
        return Response(msgspec.json.encode(self.body()), self.status, headers=self.headers, media_type=MEDIA_TYPE)


class ProblemBody(msgspec.Struct):
    """The members that every problem has; each type may add its own."""

    type: str
    title: str
    status: int
    detail: str
