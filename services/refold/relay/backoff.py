"""How long to wait after a failure: doubling, bounded, with jitter so that processes don't retry in step."""

import random

FIRST_SECONDS = 0.2
LONGEST_SECONDS = 5.0


def seconds(failures: int, *, first: float = FIRST_SECONDS, longest: float = LONGEST_SECONDS) -> float:
    """Return the seconds to wait after `failures` failures in a row (1 or more)."""
    full: float = min(longest, first * 2.0 ** min(failures - 1, 16))
    return full * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
