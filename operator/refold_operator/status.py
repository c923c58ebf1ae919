"""Statuses: conditions as Kubernetes' API conventions have them, and the smallest patch from one status to the next.

Pure: nothing here talks to a server.
"""

import dataclasses
import datetime as dt
from collections.abc import Iterable, Mapping
from typing import Any, Literal

ConditionStatus = Literal["True", "False", "Unknown"]
Status = dict[str, Any]

_MESSAGE_CHARACTERS = 4096


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition, before it is known when its status last changed."""

    type: str
    status: ConditionStatus
    reason: str
    message: str


def conditions(
    wanted: Iterable[Condition],
    *,
    before: Iterable[Mapping[str, Any]],
    generation: int,
    now: dt.datetime,
) -> list[dict[str, Any]]:
    """Return `wanted` as in a status; `lastTransitionTime` stays that of `before` where the status is the same."""
    former = {condition["type"]: condition for condition in before}
    result = []
    for condition in wanted:
        known = former.get(condition.type)
        changed = (
            timestamp(now) if known is None or known["status"] != condition.status else known["lastTransitionTime"]
        )
        result.append(
            {
                "type": condition.type,
                "status": condition.status,
                "reason": condition.reason,
                "message": condition.message[:_MESSAGE_CHARACTERS],
                "observedGeneration": generation,
                "lastTransitionTime": changed,
            }
        )
    return result


def timestamp(moment: dt.datetime) -> str:
    """Return a moment as Kubernetes has it, in UTC and whole seconds."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def find(status: Mapping[str, Any], condition: str) -> Mapping[str, Any] | None:
    """Return one condition of a status."""
    for candidate in status.get("conditions", []):
        if candidate["type"] == condition:
            found: Mapping[str, Any] = candidate
            return found
    return None


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> Status:
    """Return the JSON merge patch (RFC 7396) that makes `after` of `before`; empty where they are equal."""
    patch: Status = {name: None for name in before if name not in after}
    for name, value in after.items():
        known = before.get(name)
        if known == value:
            continue
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            patch[name] = merge_patch(known, value)
        else:
            patch[name] = value
    return patch


def only_numbers_changed(before: Mapping[str, Any], after: Mapping[str, Any], numbers: Iterable[str]) -> bool:
    """Tell whether nothing but the top-level fields `numbers` differs."""
    ignored = set(numbers)
    return {name: value for name, value in before.items() if name not in ignored} == {
        name: value for name, value in after.items() if name not in ignored
    }
