"""EventStreams and Projections as watches have brought them, so that a reconcile needn't ask for its resource.

What the operator writes itself is taken in from the API server's answer, which may come before the watch's event. Which
of two states is the later one is told by their resource versions: the API server counts them up.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from refold import names

from refold_operator.cluster import Object
from refold_operator.resources import FINALIZER
from refold_operator.workqueue import Key

#: Parts of an object's metadata that nobody here reads, and that are most of it.
_LEFT_OUT = ("managedFields",)


class _Asked(NamedTuple):
    """What of a resource a reconcile goes by."""

    uid: str
    generation: int
    #: A label says nothing to the operator; to change one is a way to have a resource looked at.
    labels: dict[str, str]
    annotations: dict[str, str]
    #: Before the finalizer is there nothing may be made that it would have to undo.
    has_finalizer: bool


class Watched:
    """The resources by their keys."""

    def __init__(self) -> None:
        self._objects: dict[Key, Object] = {}
        self._told: dict[Key, _Asked] = {}
        self._topics: dict[str, set[Key]] = {}  # the EventStreams that want each topic

    def bring(self, body: Object, *, listed: bool = False) -> bool:
        """Take in what a watch has brought; return whether it asks for something else than what was known.

        What was `listed`, as at the start of a watch, replaces what is known in any case: after the API server was
        restored from a backup its versions are earlier ones.
        """
        key = _key(body)
        known = self._objects.get(key)
        if listed or known is None or known["metadata"]["uid"] != body["metadata"]["uid"]:
            self._keep(key, body)
        else:
            self.take(body)
        metadata = body["metadata"]
        asked = _Asked(
            metadata["uid"], metadata["generation"], dict(metadata.get("labels") or {}),
            dict(metadata.get("annotations") or {}), FINALIZER in metadata.get("finalizers", []),
        )  # fmt: skip
        news = asked.has_finalizer and self._told.get(key) != asked
        self._told[key] = asked
        return news

    def take(self, body: Object) -> None:
        """Take in the state that the API server has answered with, unless a later one is known or it is gone."""
        key = _key(body)
        known = self._objects.get(key)
        if (
            known is not None
            and known["metadata"]["uid"] == body["metadata"]["uid"]
            and _version(known) <= _version(body)
        ):
            self._keep(key, body)

    def _keep(self, key: Key, body: Object) -> None:
        metadata = {name: value for name, value in body["metadata"].items() if name not in _LEFT_OUT}
        self._leave(key)
        self._objects[key] = {**body, "metadata": metadata}
        if key.kind == "EventStream":
            self._topics.setdefault(_topic(body), set()).add(key)

    def older(self, key: Key) -> list[Object]:
        """Return the EventStreams that want the same topic and are older than this one, the oldest first."""
        body = self._objects.get(key)
        if body is None or len(rivals := self._topics.get(_topic(body), ())) < 2:
            return []
        before = [one for rival in rivals if _age(one := self._objects[rival]) < _age(body)]
        return sorted(before, key=_age)

    def get(self, key: Key) -> Object | None:
        """Return a resource, or None where there is none."""
        return self._objects.get(key)

    def forget(self, key: Key) -> set[Key]:
        """Forget a resource that is gone; return the EventStreams that want the topic that it wanted."""
        body = self._objects.get(key)
        self._leave(key)
        self._told.pop(key, None)
        wanted = None if body is None or key.kind != "EventStream" else _topic(body)
        return set(self._topics.get(wanted, ())) if wanted else set()

    def _leave(self, key: Key) -> None:
        body = self._objects.pop(key, None)
        if body is not None and key.kind == "EventStream":
            wanting = self._topics[_topic(body)]
            wanting.discard(key)
            if not wanting:
                del self._topics[_topic(body)]

    def uids(self) -> set[str]:
        """Return the UIDs of all."""
        return {body["metadata"]["uid"] for body in self._objects.values()}

    def drop(self, uids: Collection[str]) -> None:
        """Forget those of `uids`: no watch has told that they were deleted."""
        for key in [key for key, body in self._objects.items() if body["metadata"]["uid"] in uids]:
            self.forget(key)


def _key(body: Object) -> Key:
    return Key(body["kind"], body["metadata"]["namespace"], body["metadata"]["name"])


def _topic(body: Object) -> str:
    """Return the topic that an EventStream wants; that of a name can't be changed."""
    named: str | None = (body.get("spec", {}).get("topic") or {}).get("name")
    return named or names.topic(body["metadata"]["namespace"], body["metadata"]["name"])


def _age(body: Object) -> tuple[str, str]:
    """Return what sorts resources by their age, the oldest first."""
    return body["metadata"]["creationTimestamp"], body["metadata"]["uid"]


def _version(body: Any) -> int:
    return int(body["metadata"]["resourceVersion"])
