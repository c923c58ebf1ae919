"""Clients that append over HTTP and repeat each append, with its ids, until they know what became of it.

Each does three things at random, on one stream that all share:

- it lives an order: event after event to a subject of its own, each with the revision that must stand before it;
- it transfers: one atomic append to several accounts in a random order. All clients draw from the same few accounts, so
  their transactions cross, in different orders of partitions;
- it races: an append to a counter that all want to write to, with the revision that it saw last; whoever comes too late
  reads the counter again.

An append that was acknowledged goes to `acknowledged`. A refusal because of a revision is final, since revisions only
grow: that append must not be in the history. Anything else (no answer, a broken connection, 503) leaves the client in
doubt, and it sends the same again. So at the end nothing is in doubt.

A client of one event store alone waits longer for its answer than anything that happens to the store takes, and fails
without one: the others would go to another store and never notice that one answers nobody any more.
"""

import collections
import http.client
import itertools
import random
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from hack.servers.callers import TOKEN
from hack.servers.platform import Service

ACCOUNTS = [f"account/{number}" for number in range(24)]
COUNTERS = [f"counter/{number}" for number in range(4)]
#: Seconds that a client waits for an answer; less than an event store is stopped or cut off for.
ANSWER_SECONDS = 4.0
#: The same for a client of one event store alone.
FAITHFUL_SECONDS = 60.0
#: Seconds after which an append must have been acknowledged, whatever happens meanwhile.
PATIENCE_SECONDS = 120.0
#: Seconds that a client rests at most between two appends.
REST_SECONDS = 0.25
_STREAM = "/v1/streams/shop/orders"

Event = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Events to one subject, and the revision that must stand before them (`any`: whichever)."""

    subject: str
    events: list[Event]
    expected: int | str


@dataclass(frozen=True)
class Place:
    """Where an append's last event stands."""

    revision: int
    partition: int
    position: int


#: An acknowledged append: its parts (several: it was atomic) and their places.
Acknowledged = Sequence[tuple[Part, Place]]


class Failed(Exception):  # noqa: N818
    """An answer that no client may get."""


class Client(threading.Thread):
    """Appends until stopped.

    Attributes:
        acknowledged: the acknowledged appends, in their order.
        counts: how many were acknowledged and how many events they hold, how many were atomic, answered as replays and
            refused for a revision, and how often one was repeated.
        token: the latest acknowledged append's.
        failure: the first answer that no client may get.
    """

    def __init__(self, name: str, stores: Sequence[Service], seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self._random = random.Random(seed)
        self._faithful = len(stores) == 1
        seconds = FAITHFUL_SECONDS if self._faithful else ANSWER_SECONDS
        self._connections = [http.client.HTTPConnection("127.0.0.1", one.port, timeout=seconds) for one in stores]
        self._stopped = threading.Event()
        self._numbers = itertools.count()
        self._seen: collections.Counter[str] = collections.Counter()  # the revision of each subject, as last told
        self.acknowledged: list[Acknowledged] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.token = ""
        self.failure: str | None = None

    def stop(self) -> None:
        """Let the client finish the append that it is at; join it to wait for that."""
        self._stopped.set()

    def fill(self, appends: int) -> None:
        """Append a history before running: atomic appends of 25 events to each of 8 subjects.

        Raises:
            Failed: one was refused.
        """
        for _ in range(appends):
            parts = []
            for _ in range(8):
                customer = self._customer()
                placed = self._event("OrderPlaced", {"customer": customer, "total": self._random.randrange(9999) / 100})
                events = [placed, *(self._item(customer) for _ in range(24))]
                parts.append(Part(f"{self.name} order/{next(self._numbers)}", events, "none"))
            if not self._append(parts):
                raise Failed(f"{parts}: a revision conflict on subjects that nobody else writes to")

    def run(self) -> None:
        """Append until stopped or failed."""
        try:
            while not self._stopped.is_set():
                self._random.choice([self._live, self._transfer, self._race])()
        except Failed as failure:
            self.failure = f"{self.name}: {failure}"
        finally:
            for connection in self._connections:
                connection.close()

    def _live(self) -> None:
        subject = f"{self.name} order/{next(self._numbers)}"
        customer = self._customer()
        events = [self._event("OrderPlaced", {"customer": customer, "total": self._random.randrange(9999) / 100})]
        events += [self._item(customer) for _ in range(self._random.randrange(3))]
        events.append(self._event(self._random.choice(["OrderPaid", "OrderPurged"]), {}))
        for revision, event in enumerate(events):
            if not self._append([Part(subject, [event], revision or "none")]):
                raise Failed(f"{subject}: a revision conflict on a subject that nobody else writes to")
            self._rest()

    def _transfer(self) -> None:
        subjects = self._random.sample(ACCOUNTS, self._random.randrange(2, 9))
        for _ in range(3):
            parts = [
                Part(
                    subject,
                    [self._item(self._customer()) for _ in range(self._random.randrange(1, 3))],
                    self._seen[subject] if self._random.random() < 0.1 else "any",
                )
                for subject in subjects
            ]
            if self._append(parts):
                break
            for part in parts:
                if part.expected != "any":
                    self._read_again(part.subject)
        self._rest()

    def _race(self) -> None:
        subject = self._random.choice(COUNTERS)
        event = self._item(self._customer())
        while not self._append([Part(subject, [event], self._seen[subject])]) and not self._stopped.is_set():
            self._read_again(subject)
            if self._random.random() < 0.5:  # the refused event comes back, or never
                event = self._item(self._customer())
        self._rest()

    def _customer(self) -> str:
        return f"customer {self._random.randrange(30)}"

    def _item(self, customer: str) -> Event:
        price = self._random.randrange(999) / 100
        return self._event("ItemAdded", {"customer": customer, "qty": self._random.randrange(1, 5), "price": price})

    def _event(self, type_: str, data: dict[str, Any]) -> Event:
        return {"id": f"{self.name}/{next(self._numbers)}", "type": type_, "data": data}

    def _rest(self) -> None:
        self._stopped.wait(self._random.choice([0, self._random.uniform(0, REST_SECONDS)]))

    def _append(self, parts: Sequence[Part]) -> bool:
        """Append until it is acknowledged (true) or refused for its revisions (false)."""
        if len(parts) > 1:
            path = f"{_STREAM}/transactions"
            body: Any = {
                "appends": [
                    {"subject": part.subject, "events": part.events, "expectedRevision": part.expected}
                    for part in parts
                ]
            }
        else:
            path = f"{_subject(parts[0].subject)}/events"
            body = {"events": parts[0].events, "expectedRevision": parts[0].expected}
        status, headers, answer = self._settle("POST", path, msgspec.json.encode(body))
        if status == 409 and answer["type"].endswith("/revision-conflict"):
            self.counts["refused for a revision"] += 1
            refused = answer["subject"] if len(parts) > 1 else parts[0].subject
            self._seen[refused] = max(self._seen[refused], answer["currentRevision"])
            return False
        if status != 201:
            raise Failed(f"{parts}: {status} {answer}")
        places = [
            Place(told["revision"], told["partition"], told["position"]) for told in answer.get("appends", [answer])
        ]
        for part, place in zip(parts, places, strict=True):
            self._seen[part.subject] = max(self._seen[part.subject], place.revision)
        self.acknowledged.append(list(zip(parts, places, strict=True)))
        self.token = answer["token"]
        self.counts["acknowledged"] += 1
        self.counts["events"] += sum(len(part.events) for part in parts)
        self.counts["atomic"] += len(parts) > 1
        self.counts["answered as replays"] += headers.get("refold-replayed") == "true"
        return True

    def _read_again(self, subject: str) -> None:
        """Learn the subject's revision; it must be at least the one that was told of before."""
        path = f"{_subject(subject)}/events?direction=backward&limit=1"
        status, _, answer = self._settle("GET", path)
        if status != 200:
            raise Failed(f"reading {subject}: {status} {answer}")
        revision = answer["events"][0]["revision"] if answer["events"] else 0
        if revision < self._seen[subject]:
            raise Failed(f"{subject} was read at revision {revision}, after {self._seen[subject]} had been told of")
        self._seen[subject] = revision

    def _settle(self, method: str, path: str, body: bytes | None = None) -> tuple[int, http.client.HTTPMessage, Any]:
        """Ask one event store or another until one answers with something else than 503."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        answered: Any = "nothing"
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        while time.monotonic() < deadline:
            connection = self._random.choice(self._connections)
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                answered = msgspec.json.decode(answer.read())
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if self._faithful and isinstance(error, TimeoutError):
                    raise Failed(f"{method} {path}: no answer within {FAITHFUL_SECONDS:g} s") from error
                answered = repr(error)
            else:
                if "deadlock" in str(answered):
                    raise Failed(f"{method} {path}: {answered}")
                if answer.status != http.client.SERVICE_UNAVAILABLE:
                    return answer.status, answer.headers, answered
            self.counts["repeated"] += 1
            time.sleep(self._random.uniform(0.05, 0.2))
        raise Failed(f"{method} {path}: no answer within {PATIENCE_SECONDS:g} s, the last one was {answered}")


def _subject(subject: str) -> str:
    return f"{_STREAM}/subjects/{urllib.parse.quote(subject, safe='')}"
