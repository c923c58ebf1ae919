"""Readers that know what a read model must show: what they appended themselves, and what they saw before.

A reader appends one event at a time about one subject, which nobody else does. It reads the row of that at any replica
of the query service: with the append's token, when all that it appended must be in it, and without a token, when
nothing may be gone that it saw before. An answer that the row can't be told yet (503, 504) is none: it asks again.
"""

import http.client
import time
import urllib.parse
from collections.abc import Sequence

import msgspec

from hack.servers.callers import TOKEN
from hack.servers.platform import Service
from tests.attack.clients import Client, Failed, Part

#: Seconds that a query service waits for what a token names.
_WAIT_SECONDS = 5
#: Seconds after which what was appended must be told. While Kafka is away nobody has the partitions, and on a busy
#: machine its restarts take minutes.
_PATIENCE_SECONDS = 600.0
_AGAIN = (http.client.SERVICE_UNAVAILABLE, http.client.GATEWAY_TIMEOUT)


class Reader(Client):
    """Appends and reads back until stopped, but `least` times.

    Args:
        name: its own; also the subject and the customer of its events, and so the key of its row in any model.
        stores: where it appends.
        replicas: of the query service of a model.
        least: how often it reads at least.
        seed: of its choices.

    Attributes:
        reads: how often it read its row with a token, and as often without.
    """

    def __init__(
        self, name: str, stores: Sequence[Service], replicas: Sequence[Service], least: int, seed: int
    ) -> None:
        super().__init__(name, stores, seed)
        self._replicas = [http.client.HTTPConnection("127.0.0.1", one.port, timeout=30) for one in replicas]
        self._least = least
        self.reads = 0

    def run(self) -> None:
        """Append and read until stopped or failed."""
        appended = seen = 0
        try:
            while self.reads < self._least or not self._stopped.is_set():
                item = self._event("ItemAdded", {"customer": self.name, "qty": 1, "price": 1})
                self._append([Part(self.name, [item], "any")])
                appended += 1
                for token in (self.token, None):
                    found = self._read(token)
                    least = seen if token is None else appended
                    if found < least:
                        raise Failed(f"of {appended} events the row shows {found}, and {least} were to be seen")
                    seen = found
                self.reads += 1
                self._rest()
        except Failed as failure:
            self.failure = f"{self.name}: {failure}"
        finally:
            for connection in self._replicas:
                connection.close()

    def _read(self, token: str | None) -> int:
        """Return how many of the events the row shows."""
        path = f"/v1/rows/{urllib.parse.quote(self.name)}"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        if token is not None:
            headers |= {"Refold-Token": token, "Prefer": f"wait={_WAIT_SECONDS}"}
        deadline = time.monotonic() + _PATIENCE_SECONDS
        told = "nothing"
        while time.monotonic() < deadline:
            connection = self._random.choice(self._replicas)
            try:
                connection.request("GET", path, headers=headers)
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                told = repr(error)
            else:
                if answer.status == http.client.NOT_FOUND:
                    return 0
                if answer.status == http.client.OK:
                    row = msgspec.json.decode(body)["data"]
                    return int(row["items"] if "items" in row else row["spent"])
                told = f"{answer.status} {body.decode()}"
                if answer.status not in _AGAIN:
                    raise Failed(f"GET {path}: {told}")
            time.sleep(self._random.uniform(0.05, 0.2))
        raise Failed(f"GET {path}: no answer within {_PATIENCE_SECONDS:g} s, the last one was {told}")
