"""No check at all: whoever reaches the port may do everything. For trying things out, without a cluster."""

import time

import structlog
from starlette.types import Scope

from refold.web.auth.access import Access

#: Seconds between two warnings, while requests come.
REMIND_SECONDS = 600.0

_log = structlog.get_logger(__name__)


class Everyone:
    """Allows everything and everybody, and says so in the log: at the start, and again every ten minutes of use."""

    name = "anybody"

    def __init__(self) -> None:
        self._remind = 0.0

    async def __aenter__(self) -> "Everyone":
        self._warn()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing is held."""

    async def caller(self, _: Scope) -> "Everyone":
        """Return the one caller that there is."""
        if time.monotonic() >= self._remind:
            self._warn()
        return self

    async def require(self, _: Access) -> None:
        """Allow."""

    def _warn(self) -> None:
        self._remind = time.monotonic() + REMIND_SECONDS
        _log.warning(
            "NO AUTHORISATION: whoever reaches this port may read and append everything (REFOLD_AUTH=none). "
            "Give REFOLD_AUTH=tokens:FILE, or run in a cluster with REFOLD_AUTH=kubernetes"
        )
