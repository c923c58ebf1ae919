"""One AdmissionReview (admission.k8s.io/v1): from its JSON to the answer, which is the guard's.

Only a change of the spec is looked at, and only what the change itself brings is refused: what was wrong before, such
as of a resource that came in while no webhook was there, is told as a warning and keeps nobody from mending the rest.
What can come right by itself is a warning, too. A refusal has the form of the API server's own, with a cause for each
field, so that kubectl shows both alike.
"""

import asyncio
import datetime as dt
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from refold.projection import definition as definitions
from refold.projection.definition import Problem

from refold_operator import spec_guard
from refold_operator.cluster import GROUP

_API_VERSION, _KIND = "admission.k8s.io/v1", "AdmissionReview"
_UNPROCESSABLE = 422
#: Resources that are checked at the same time; they share the interpreter's lock with those that are answered.
_CHECKS = 2
#: What Kubernetes passes on of a warning, in characters.
_WARNING_CHARACTERS = 256
#: The most warnings, or causes of a refusal, of one answer.
_WARNINGS = 10
#: The most streams of a Projection, as the CRD says.
_STREAMS = 16

#: Tells whether there is an EventStream of this namespace and name; None: nobody knows at the moment.
Exists = Callable[[str, str], Awaitable[bool | None]]


class NoReviewError(ValueError):
    """What was sent is no AdmissionReview that can be answered."""


class Outcome(NamedTuple):
    """What became of a review.

    Attributes:
        answer: the AdmissionReview to send back.
        kind: of the resource, empty where it is none of Refold's.
        allowed: whether the resource may be stored.
    """

    answer: Mapping[str, Any]
    kind: str
    allowed: bool


class Reviewer:
    """Answers AdmissionReviews.

    Args:
        rules: what the installation allows.
        exists: asked about a Projection's streams.
    """

    def __init__(self, rules: spec_guard.Rules, *, exists: Exists) -> None:
        self._rules = rules
        self._exists = exists
        self._checks = asyncio.Semaphore(_CHECKS)

    async def review(self, body: bytes) -> Outcome:
        """Return the answer to an AdmissionReview.

        Raises:
            NoReviewError: `body` is something else.
        """
        request = _request(body)
        kind = _kind(request)
        before, after = (_object(request, name) for name in ("oldObject", "object"))
        spec = after.get("spec")
        ours = kind in ("EventStream", "Projection") and request.get("operation") in ("CREATE", "UPDATE")
        if not ours or _mapping(after.get("metadata")).get("deletionTimestamp"):
            return _answered(request, kind, [], [])
        if request["operation"] == "UPDATE" and spec == before.get("spec"):
            return _answered(request, kind, [], [])
        if not isinstance(spec, dict):
            return _answered(request, kind, [Problem("spec", "InvalidField", "an object is missing here")], [])

        namespace = _namespace(request)
        problems = await self._check(kind, namespace, spec)
        known: set[str] = set()
        if problems and isinstance(former := before.get("spec"), dict):
            known = {str(problem) for problem in await self._check(kind, namespace, former)}
        refused = [problem for problem in problems if str(problem) not in known]
        warnings = [str(problem) for problem in problems if str(problem) in known]
        if kind == "Projection" and not problems:
            warnings += await self._waits(namespace, spec)
        return _answered(request, kind, refused, warnings)

    async def _check(self, kind: str, namespace: str, spec: Mapping[str, Any]) -> list[Problem]:
        elsewhere = spec_guard.check_namespace(namespace, self._rules)
        check: Callable[[Mapping[str, Any]], list[Problem]] = spec_guard.check_projection
        if kind == "EventStream":
            check = functools.partial(spec_guard.check_event_stream, namespace=namespace, rules=self._rules)
        # In a thread, so that others are answered meanwhile.
        async with self._checks:
            return elsewhere + await asyncio.to_thread(check, spec)

    async def _waits(self, namespace: str, spec: Mapping[str, Any]) -> list[str]:
        """Return what a Projection that can work has to wait for."""
        definition = definitions.parse(spec)
        streams = definition.streams[:_STREAMS]
        there = await asyncio.gather(*(self._exists(namespace, stream) for stream in streams))
        warnings = [
            f"spec.streams[{position}]: there is no EventStream {stream} in namespace {namespace} yet; the Projection "
            "waits for it"
            for position, (stream, found) in enumerate(zip(streams, there, strict=True))
            if found is False
        ]
        if definition.as_of is not None and definition.as_of > dt.datetime.now(dt.UTC):
            warnings.append(f"spec.asOf: {spec['asOf']} has not passed yet; the read model is built when it has")
        return warnings


def _request(body: bytes) -> dict[str, Any]:
    try:
        review = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise NoReviewError(f"the body is no JSON: {error}") from error
    if not isinstance(review, dict) or (review.get("apiVersion"), review.get("kind")) != (_API_VERSION, _KIND):
        raise NoReviewError(f"the body is no {_KIND} of {_API_VERSION}")
    request = review.get("request")
    if not isinstance(request, dict) or not isinstance(request.get("uid"), str):
        raise NoReviewError("request.uid is missing: there is nothing to answer")
    return request


def _kind(request: Mapping[str, Any]) -> str:
    kind = _mapping(request.get("kind"))
    name = kind.get("kind")
    return name if kind.get("group") == GROUP and isinstance(name, str) else ""


def _namespace(request: Mapping[str, Any]) -> str:
    namespace = request.get("namespace")
    return namespace if isinstance(namespace, str) else ""


def _object(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _mapping(request.get(name))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _answered(request: Mapping[str, Any], kind: str, refused: Sequence[Problem], warnings: Sequence[str]) -> Outcome:
    response: dict[str, Any] = {"uid": request["uid"], "allowed": not refused}
    if warnings:
        response["warnings"] = [_short(warning) for warning in warnings[:_WARNINGS]]
    if refused:
        response["status"] = {
            "status": "Failure",
            "code": _UNPROCESSABLE,
            "reason": "Invalid",
            "message": spec_guard.told(refused),
            "details": {
                "group": GROUP,
                "kind": kind,
                "name": _mapping(_object(request, "object").get("metadata")).get("name") or "",
                "causes": [
                    {"reason": "FieldValueInvalid", "field": problem.path, "message": _cause(problem)}
                    for problem in refused[:_WARNINGS]
                ],
            },
        }
    return Outcome({"apiVersion": _API_VERSION, "kind": _KIND, "response": response}, kind, not refused)


def _cause(problem: Problem) -> str:
    """Return a problem without its field, which kubectl writes before it."""
    place = "" if problem.line is None else f"line {problem.line}, column {problem.column}: "
    return f"{place}{problem.message}"


def _short(text: str) -> str:
    return text if len(text) <= _WARNING_CHARACTERS else f"{text[: _WARNING_CHARACTERS - 1]}…"
