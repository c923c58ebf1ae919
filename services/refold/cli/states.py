"""Rows as they were and what each event did to them, as tables: of a query service's answer or the event store's."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from refold.cli import shown
from refold.cli.reach import Client, RefusedError

#: Of how many events a service tells at once what each did.
MOST_STEPS = 1000
#: Why a service knows the row as it is now alone.
_NOW_ALONE = frozenset({"no-row-history", "no-event-store"})


def of_row(client: Client, key: str, at: str | None, steps: int) -> dict[str, Any]:
    """Return the row of `key` at a moment, with what its last events did; as it is now alone where no more is known.

    Raises:
        RefusedError: the query service refuses.
        UnreachableError: it doesn't answer.
    """
    try:
        found: dict[str, Any] = client.ask("GET", "v1", "rows", key, "history", query={"at": at, "steps": steps})
    except RefusedError as error:
        if at is not None or error.kind not in _NOW_ALONE:
            raise
        found = client.ask("GET", "v1", "rows", key)
        print(f"without what each event did: {shown.printable(str(error))}", file=sys.stderr)
    return found


def of_events(client: Client, path: Sequence[str], events: Sequence[Mapping[str, Any]], projection: str) -> Any:
    """Return the state of a subject (its `path`) at the last of `events`, with what each of them did; None of none.

    Raises:
        RefusedError: the event store refuses.
        UnreachableError: it doesn't answer.
    """
    if not events:
        return None
    revisions = [int(event["revision"]) for event in events]
    steps = min(len(events), MOST_STEPS)
    return client.ask("GET", *path, "state", query={"projection": projection, "at": max(revisions), "steps": steps})


def show(row: Mapping[str, Any]) -> None:
    """Print a row, and what its last events did."""
    if row["data"] is None:
        print("no row")
    else:
        shown.as_table(["COLUMN", "VALUE"], row["data"].items())
    if "steps" not in row:
        return
    print()
    shown.as_table(
        ["REVISION", "TIME", "TYPE", "EFFECT", "CHANGES"],
        ((one["revision"], one["time"], one["type"], *differences(one)) for one in row["steps"]),
    )
    if row["parked"] is not None:
        stops = f"the row stops before event {row['parked']['revision']}, which is bad: {row['parked']['error']}"
        print(shown.printable(stops), file=sys.stderr)


def differences(step: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return what an event did, and the columns that it changed, each before and after; of none, that it isn't told."""
    if step is None:
        return "not told", ""
    if "error" in step:
        return step["effect"], step["error"]
    changes = step.get("changes", {})
    texts = (f"{name}: {shown.printable(old)} → {shown.printable(new)}" for name, (old, new) in changes.items())
    return step["effect"], ", ".join(texts)
