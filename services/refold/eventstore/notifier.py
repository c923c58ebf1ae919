"""Telling listeners of other processes about appends: after commit, on another connection, many at once.

Inside the appends' transactions NOTIFY would serialise the commits of the whole database. A notification that is lost
costs the listener one interval of its slow poll.
"""

import asyncio
import contextlib

import psycopg
import structlog

from refold import names
from refold.eventstore.connections import Connections

log = structlog.get_logger(__name__)

#: Seconds that notifications are held together after one was sent: some hundred a second at most.
_GAP = 0.002
#: Of the payloads as PostgreSQL writes an array. The appends are on disk already; this waits for no disk, since a
#: notification doesn't outlive a crash anyway.
_CALL = (
    b"select set_config('synchronous_commit', 'off', true), pg_notify($1::text, payload) "
    b"from unnest($2::text::text[]) as payload"
)


class Notifier:
    """Sends on `control` what `note` was told."""

    def __init__(self, control: Connections) -> None:
        self._control = control
        self._appended: set[int] = set()
        self._some = asyncio.Event()

    def note(self, stream: int) -> None:
        """Note that the stream has new events, committed now."""
        self._appended.add(stream)
        self._some.set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._some.wait()
            try:
                await self._send()
                await asyncio.sleep(_GAP)
            except psycopg.Error as error:
                log.warning("Listeners can't be told of appends; they find them by their poll", error=str(error))
                await asyncio.sleep(1)

    async def finish(self) -> None:
        """Send what is left, if that can be done in a second."""
        if self._appended:
            with contextlib.suppress(psycopg.Error, TimeoutError):
                async with asyncio.timeout(1):
                    await self._send()

    async def _send(self) -> None:
        streams = [b"%d" % stream for stream in self._appended]
        self._appended.clear()
        self._some.clear()
        payloads = b"{%b}" % b",".join(streams) if len(streams) <= 100 else b'{""}'
        async with self._control.lend() as conn:
            await conn.call(b"notify", _CALL, [names.APPENDED_CHANNEL.encode(), payloads])
