"""The pulse of worker threads, which tells a stuck worker from a living process.

Each worker beats at least every few seconds, whatever it waits for: all its waits are bounded. `/healthz` fails when
one is silent, so that Kubernetes restarts the process; a shard's successor is safe even if the stuck worker wakes up.
"""

import time

#: Longer than any single wait of a worker (a query's timeout is 30 s).
SILENCE_SECONDS = 60.0


class Pulse:
    """When each worker last showed that it goes on. Safe to use from several threads."""

    def __init__(self) -> None:
        self._beats: dict[str, float] = {}

    def beat(self, worker: str) -> None:
        """Note that `worker` goes on."""
        self._beats[worker] = time.monotonic()

    def end(self, worker: str) -> None:
        """Forget a worker that ended as it should."""
        self._beats.pop(worker, None)

    def silent(self, *, seconds: float = SILENCE_SECONDS) -> list[str]:
        """Return the workers that have not beaten for `seconds`."""
        limit = time.monotonic() - seconds
        return sorted(worker for worker, beat in list(self._beats.items()) if beat < limit)
