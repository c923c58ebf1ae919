"""What an attack tells of itself, and where it is kept."""

import collections
import datetime as dt
import os
import subprocess
from pathlib import Path


def heading(what: str, seed: int, seconds: float) -> str:
    """Return the first line: what was attacked, at which commit, with which seed, when and for how long."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return f"{what}: commit {commit}, seed {seed}, {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s"


def appends(counts: collections.Counter[str]) -> str:
    """Return what became of the clients' appends."""
    lines = (
        f"{counts['acknowledged']:,} appends acknowledged, {counts['atomic']:,} of them atomic, to 2 to 8 subjects",
        f"{counts['repeated']:,} requests repeated, {counts['answered as replays']:,} appends answered as replays",
        f"{counts['refused for a revision']:,} appends refused for a revision",
    )
    return "\n".join(f"  {line}" for line in lines)


def keep(told: str) -> None:
    """Add a report to the file that `REFOLD_ATTACK_LOG` names, if any."""
    if file := os.environ.get("REFOLD_ATTACK_LOG"):
        with Path(file).open("a") as log:
            log.write(f"{told}\n")
