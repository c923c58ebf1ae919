"""A service's operations and their OpenAPI 3.1 description, written in one place so that they can't differ.

Schemas come from msgspec types (`msgspec.json.schema_components`).
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import refold
from refold.web.auth.access import AUDIENCE, GROUP, Verb
from refold.web.problems import MEDIA_TYPE, ProblemBody

NDJSON = "application/x-ndjson"
_TITLES = {
    400: "The path, the query string or a header can't be read",
    401: f"No valid bearer token. In a cluster: one for the audience {AUDIENCE}, from a projected service account "
    f"token or `kubectl create token NAME --audience {AUDIENCE}`",
    404: "Not found",
    409: "In conflict with what is there",
    410: "Not there any more",
    413: "Too large",
    415: "The body's media type isn't served",
    422: "Understood, but not acceptable",
    501: "Not served by this process as it is set up",
    503: "Not now; try again",
    504: "Not in time",
}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of an operation.

    Args:
        name: as it stands in the path, the query string or the headers.
        where: "path", "query" or "header".
        description: what it means.
        schema: its JSON Schema.
        required: whether there is no answer without it; those of the path always are.
    """

    name: str
    where: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    required: bool = False


@dataclass(frozen=True)
class Operation:
    """A method on a path: how it is served and described.

    Args:
        method: "GET", "POST", …
        path: with parameters in braces, for example "/v1/rows/{key}".
        handler: answers the request.
        summary: one line.
        verb: what the caller must have the right to do with the resource that the path names.
        parameters: all of them; those of the path too.
        body: media type → the msgspec type of a request's body (of one line, for NDJSON).
        status: of a success.
        answer: media type → the msgspec type of a success's body (of one line, for NDJSON).
        problems: the statuses of its problems, besides 400, 401, 403 and 503, which each has.
    """

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str = field(kw_only=True)
    verb: Verb = field(kw_only=True)
    parameters: Sequence[Parameter] = field(default=(), kw_only=True)
    body: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    status: int = field(default=200, kw_only=True)
    answer: Mapping[str, Any] = field(kw_only=True)
    problems: Sequence[int] = field(default=(), kw_only=True)


def document(title: str, operations: Sequence[Operation], kind: str) -> bytes:
    """Return the OpenAPI 3.1 description of `operations`, whose rights are given on `kind`, as JSON."""
    types = [ProblemBody]
    for operation in operations:
        types += [*operation.body.values(), *operation.answer.values()]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    by_type = list(zip(types, schemas, strict=True))

    def content(media: Mapping[str, Any]) -> dict[str, Any]:
        return {name: {"schema": next(s for t, s in by_type if t is wanted)} for name, wanted in media.items()}

    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        responses: dict[str, Any] = {
            str(operation.status): {"description": "Success", "content": content(operation.answer)}
        }
        if any(parameter.name == "If-None-Match" for parameter in operation.parameters):
            responses["304"] = {"description": "The answer is the one that the caller has"}
        titles = {**_TITLES, 403: _forbidden(operation.verb, kind)}
        for status in sorted({400, 401, 403, 503, *operation.problems}):
            responses[str(status)] = {"description": titles[status], "content": content({MEDIA_TYPE: ProblemBody})}
        described: dict[str, Any] = {
            "operationId": operation.handler.__name__,
            "summary": operation.summary,
            "parameters": [
                {
                    "name": parameter.name,
                    "in": parameter.where,
                    "required": parameter.required or parameter.where == "path",
                    "description": parameter.description,
                    "schema": dict(parameter.schema),
                }
                for parameter in operation.parameters
            ],
            "responses": responses,
        }
        if operation.body:
            described["requestBody"] = {"required": True, "content": content(operation.body)}
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": title, "version": refold.__version__},
            "security": [{"bearer": []}],
            "paths": paths,
            "components": {"schemas": components, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
        }
    )


def _forbidden(verb: Verb, kind: str) -> str:
    return (
        f"The caller may not {verb} {kind}: bind it a Role of the namespace with "
        f"{{apiGroups: [{GROUP}], resources: [{kind}], verbs: [{verb}], resourceNames: [NAME]}}"
    )
