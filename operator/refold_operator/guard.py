"""What adapters call right before they change something; it returns where this process may act (see `election`)."""

from collections.abc import Callable

#: Returns where this process may act; else it doesn't return, since the process ends.
Guard = Callable[[], None]


def unguarded() -> None:
    """Let everything pass: nobody else acts."""
