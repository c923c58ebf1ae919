"""`refold rebuild`: build a read model anew from the same definition, and show how far it is.

Only the Kubernetes API is asked: the annotation is set on the Projection, and its status tells the rest.
"""

import datetime as dt
import sys
import time
from collections.abc import Mapping
from typing import Any

from refold.cli import shown
from refold.cli.reach import Way, cluster

_ANNOTATION = "refold.dev/rebuild"
#: Seconds between two looks; the status tells news at once, and numbers every half minute.
_LOOK_SECONDS = 2.0
#: Seconds for which a build must have failed: it does for a moment where events fail that were discarded before. The
#: operator looks at it again after 15.
_FAILED_SECONDS = 20.0


def rebuild(way: Way, projection: str, *, wait: bool) -> bool:
    """Rebuild a Projection's read model; with `wait` until readers see it. Return whether that went well.

    Raises:
        UnreachableError: the Kubernetes API refuses, or has no such Projection.
    """
    api, namespace = cluster(way), way.in_namespace()
    before = api.projection(namespace, projection).get("status", {})
    value = dt.datetime.now(dt.UTC).isoformat()
    api.annotate_projection(namespace, projection, {_ANNOTATION: value})
    _say(f"{projection} is rebuilt ({_ANNOTATION}: {value}); until that is done readers see {_live(before)}")
    told, failed_at = "", None
    while wait:
        time.sleep(_LOOK_SECONDS)
        status = api.projection(namespace, projection).get("status", {})
        ended, text = outcome(before, status)
        if text != told:
            _say(text)
            told = text
        if ended is not False:
            failed_at = None
        elif failed_at is None:
            failed_at = time.monotonic()
        if ended or (failed_at is not None and time.monotonic() - failed_at > _FAILED_SECONDS):
            return bool(ended)
    return True


def outcome(before: Mapping[str, Any], status: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Return whether a rebuild went well, None while it is under way, and what to say of it.

    Args:
        before: the status when it was asked for.
        status: the status now.
    """
    if _live(status) != _live(before):
        return True, f"readers see {_live(status)}"
    building = status.get("building")
    if building is None or building["version"] == before.get("building", {}).get("version"):
        return None, "waiting for the operator"
    ready: Mapping[str, Any] = next((one for one in status.get("conditions", []) if one["type"] == "Ready"), {})
    if ready.get("reason") == "BuildFailed":
        return False, str(ready["message"])
    text = f"{building['version']}: {building['progress']}"
    if "remainingSeconds" in building:
        text += f", {building['eventsPerSecond']} events a second, {building['remainingSeconds']} s to go"
    return None, text


def _live(status: Mapping[str, Any]) -> str:
    return str(status.get("live", {}).get("version", "nothing yet"))


def _say(text: str) -> None:
    print(shown.printable(text), file=sys.stdout, flush=True)
