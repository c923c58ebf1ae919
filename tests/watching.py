"""A client of server-sent events, as an EventSource reads them: the last id is kept, incomplete blocks are dropped."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from hack.servers.callers import NO_CERTIFICATES


@dataclass(frozen=True)
class Told:
    """One event: `type` is "message" where the server gave none; `last_id` goes on after it."""

    last_id: str
    type: str
    data: Any


@dataclass
class Watcher:
    """Reads `path` of a server; each call of `told` is a new connection that goes on after what was read."""

    url: str
    token: str
    path: str
    last_id: str = ""
    retry_ms: int | None = None
    heartbeats: int = 0
    complete: bool = field(default=False, init=False)  # the last answer came to its end

    async def told(self) -> AsyncIterator[Told]:
        """Yield what one connection tells; ends where the answer does.

        Raises:
            httpx.HTTPError: it couldn't be asked, or the answer broke off.
            httpx.HTTPStatusError: it was refused.
        """
        headers = {"authorization": f"Bearer {self.token}", "accept": "text/event-stream"}
        if self.last_id:
            headers["last-event-id"] = self.last_id
        self.complete = False
        async with (
            httpx.AsyncClient(timeout=30, trust_env=False, verify=NO_CERTIFICATES) as client,
            client.stream("GET", f"{self.url}{self.path}", headers=headers) as answer,
        ):
            if answer.status_code != 200:
                await answer.aread()
            answer.raise_for_status()
            assert answer.headers["content-type"].split(";")[0] == "text/event-stream"
            kind, data, last = "", "", self.last_id
            async for line in answer.aiter_lines():  # which also ends lines at U+2028: nothing told holds any
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if not line:
                    self.last_id = last
                    if data:
                        yield Told(last, kind or "message", json.loads(data))
                    kind, data = "", ""
                elif not name:
                    self.heartbeats += 1
                elif name == "id":
                    last = value
                elif name == "event":
                    kind = value
                elif name == "data":
                    data += value
                else:
                    assert name == "retry"
                    self.retry_ms = int(value)
            self.complete = True
