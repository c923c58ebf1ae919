"""Waiting for what another process does."""

import time
from collections.abc import Callable
from pathlib import Path


def until(reached: Callable[[], bool], what: str, *, log: Path | None = None, seconds: float = 300) -> None:
    """Return when `reached` answers true, asked 50 times a second.

    Raises:
        TimeoutError: it didn't within `seconds`; the message says `what` was waited for and how `log` ends.
    """
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log else ""
            raise TimeoutError(f"waited {seconds:g} s in vain until {what}\n{end}")
        time.sleep(0.02)
