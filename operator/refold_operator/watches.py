"""Whether kopf's watch streams bring what happens: now and then they are compared with a list.

A watch that is open and silent looks as one of resources that nobody changes. So handlers note the generation of each
EventStream and Projection that they see; one that the API server lists and no handler has seen for minutes was missed.
"""

import asyncio
import time
from collections.abc import Iterable

import structlog

from refold_operator.cluster import Cluster, Object, RefusedError
from refold_operator.errors import UnreachableError
from refold_operator.watched import Watched

_log = structlog.get_logger(__name__)

KINDS = ("EventStream", "Projection")
#: Seconds between two comparisons, and after which a generation that wasn't seen counts as missed: a watch begins anew
#: after 6 minutes at most (`handlers.settings`).
LOOK_SECONDS = 60.0
MISSED_SECONDS = 480.0


class Watches:
    """What handlers have seen of EventStreams and Projections."""

    def __init__(self, cluster: Cluster, watched: Watched) -> None:
        """List resources in `cluster`; what it doesn't list is taken out of `watched`."""
        self._cluster, self._watched = cluster, watched
        self._seen: dict[str, int] = {}
        #: By UID: the generation that wasn't seen, the resource's name, and since when that is so.
        self._missing: dict[str, tuple[int, str, float]] = {}

    def seen(self, uid: str, generation: int, *, deleted: bool = False) -> None:
        """Note what a watch has brought."""
        if deleted:
            self._seen.pop(uid, None)
        else:
            self._seen[uid] = generation
        if uid in self._missing and (deleted or self._missing[uid][0] <= generation):
            del self._missing[uid]

    async def keep(self) -> None:
        """Compare until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                known = self._watched.uids()
                listed = [item for kind in KINDS for item in await self._cluster.list(kind)]
                self.compare(listed)
                self._watched.drop(known - {item["metadata"]["uid"] for item in listed})
            except (UnreachableError, RefusedError) as error:
                _log.info("resources can't be listed to compare the watches with", why=str(error))

    def compare(self, listed: Iterable[Object]) -> None:
        """Note what handlers haven't seen of what the API server has `listed`."""
        missing = {}
        for item in listed:
            metadata = item["metadata"]
            uid, generation = metadata["uid"], metadata["generation"]
            if self._seen.get(uid, 0) < generation:
                name = f"{item['kind']} {metadata['namespace']}/{metadata['name']}"
                missing[uid] = self._missing.get(uid, (generation, name, time.monotonic()))
        self._missing = missing

    def stuck(self) -> str | None:
        """Return what the watches have missed for long; None where they bring what happens."""
        now = time.monotonic()
        for _, name, since in self._missing.values():
            if now - since > MISSED_SECONDS:
                return f"no watch has brought {name}, which was there {now - since:.0f} s ago"
        return None
