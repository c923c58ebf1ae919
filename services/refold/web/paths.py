"""Parameters of paths and queries, strictly decoded.

Routes match on the path as it was sent (`App` routes on ASGI's `raw_path`), so a segment may hold any character in its
percent-encoded form: `%2F` is a slash inside of a subject, `..` is a subject like any other. Each service decodes a
parameter once, here.
"""

import re
from urllib.parse import parse_qsl, unquote_to_bytes

from starlette.requests import Request

from refold.web.problems import Problem

_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_MOST_QUERY_PARAMETERS = 100


def parameter(request: Request, name: str) -> str:
    """Return the decoded path parameter `name`: never empty, may hold any character, a slash or NUL too.

    Raises:
        Problem: 400 where it isn't percent-encoded UTF-8.
    """
    return decode(request.path_params[name], name)


def decode(raw: str, name: str) -> str:
    """Return the text that a percent-encoded path segment stands for; `name` is what errors call it.

    Raises:
        Problem: 400 where it isn't percent-encoded UTF-8.
    """
    if "%" not in raw:
        return raw
    bad = _BAD_ESCAPE.search(raw)
    if bad is not None:
        raise Problem(
            400,
            "invalid-path",
            "Invalid path",
            f"the {name} in the path has a '%' at character {bad.start() + 1} without two hexadecimal digits; "
            "send a percent sign as %25",
            field=name,
        )
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError as error:
        raise Problem(
            400,
            "invalid-path",
            "Invalid path",
            f"the {name} in the path isn't percent-encoded UTF-8: {error}",
            field=name,
        ) from error


def query(request: Request) -> list[tuple[str, str]]:
    """Return the parameters of the query string in their order.

    Raises:
        Problem: 400 where they aren't UTF-8, or over 100.
    """
    try:
        text = request.scope["query_string"].decode("ascii")
        return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MOST_QUERY_PARAMETERS)
    except ValueError as error:
        raise Problem(
            400, "invalid-query", "Invalid query string", f"the query string isn't form-encoded UTF-8: {error}"
        ) from error
