"""Terrible things that happen, at random, to processes, to the servers beneath them and to the networks between."""

import collections
import datetime as dt
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hack.servers.platform import Service
from tests.network import Cut

#: Disturbances that go on at the same time, each of another victim.
AT_ONCE = 2
#: The longest rest of a victim.
_REST_SECONDS = 60.0


@dataclass
class Victim:
    """What something can happen to, one thing at a time; `gone`: nothing will any more.

    After each it is left alone for as long as that took, a minute at most, until `rests_until` (monotonic seconds): a
    broker that takes a minute to start on a busy machine would else be away all the time, and nothing would be attacked
    but patience.
    """

    name: str
    rests_until: float = field(default=0.0, kw_only=True)
    disturbed: threading.Lock = field(default_factory=threading.Lock, kw_only=True)
    gone: bool = field(default=False, kw_only=True)


class Startable(Protocol):
    """A server that comes back with its data."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


@dataclass
class Server(Victim):
    """PostgreSQL, Kafka, Redis or an API server."""

    process: Startable


@dataclass
class Member(Victim):
    """One process of the data plane, and the networks through which it alone reaches servers, by their names."""

    process: Service
    networks: dict[str, Cut]


def kill(member: Member, seconds: float) -> None:
    """Kill with -9; start again."""
    member.process.kill()
    time.sleep(seconds)
    member.process.up()


def end(member: Member, seconds: float) -> None:
    """End with SIGTERM; start again."""
    member.process.stop()
    time.sleep(seconds)
    member.process.up()


def freeze(member: Member, seconds: float) -> None:
    """Stop with SIGSTOP; resume."""
    member.process.send(signal.SIGSTOP)
    time.sleep(seconds)
    member.process.send(signal.SIGCONT)


def cut(system: str) -> Callable[[Member, float], None]:
    """Return what cuts a process from a system and heals."""

    def act(member: Member, seconds: float) -> None:
        member.networks[system].cut()
        time.sleep(seconds)
        member.networks[system].heal()

    return act


def hang(system: str) -> Callable[[Member, float], None]:
    """Return what lets a process wait for a system's answers; then they come all at once."""

    def act(member: Member, seconds: float) -> None:
        member.networks[system].hang()
        time.sleep(seconds)
        member.networks[system].heal()

    return act


def crash(server: Server, seconds: float) -> None:
    """Kill with -9; start again."""
    server.process.kill()
    time.sleep(seconds)
    server.process.start()


def restart(server: Server, seconds: float) -> None:
    """End cleanly; start again."""
    server.process.stop()
    time.sleep(seconds)
    server.process.start()


@dataclass(frozen=True)
class Kind:
    """Something that can happen to a `victim`, for at least and at most so many seconds."""

    victim: str
    what: str
    act: Callable[..., None]
    least: float
    most: float


@dataclass(frozen=True)
class Disturbance:
    """Something that happens, after a `pause`; `draw` (0 to 1) says to which of the victims."""

    kind: Kind
    pause: float
    draw: float
    seconds: float


def plan(draw: random.Random, kinds: Sequence[Kind], count: int) -> list[Disturbance]:
    """Return `count` disturbances in a random order; no kind comes again before all others came as often."""
    order: list[Kind] = []
    while len(order) < count:
        order += draw.sample(kinds, len(kinds))
    return [
        Disturbance(kind, draw.uniform(0.2, 2), draw.random(), draw.uniform(kind.least, kind.most))
        for kind in order[:count]
    ]


class Disturber:
    """Lets disturbances happen.

    Args:
        choose: returns the victim of a disturbance. Where it is gone by then, it is asked again.
        log: gets a line when one begins, and when it is over.

    Attributes:
        happened: how often each kind of disturbance came.
    """

    def __init__(self, choose: Callable[[Disturbance], Victim], log: Path) -> None:
        self._choose, self._log = choose, log
        self.happened: collections.Counter[Kind] = collections.Counter()

    def disturb(self, disturbances: Sequence[Disturbance], *, go_on: Callable[[], bool]) -> None:
        """Let all of them happen, and heal, `AT_ONCE` at a time; stop early where `go_on` answers false."""
        coming: queue.SimpleQueue[Disturbance] = queue.SimpleQueue()
        for disturbance in disturbances:
            coming.put(disturbance)

        def go() -> None:
            while go_on():
                try:
                    disturbance = coming.get_nowait()
                except queue.Empty:
                    return
                time.sleep(disturbance.pause)
                while not self._disturb(disturbance):
                    time.sleep(0.1)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in wait([pool.submit(go) for _ in range(AT_ONCE)]).done:
                done.result()

    def _disturb(self, disturbance: Disturbance) -> bool:
        """Let it happen; return False where the victim was gone."""
        victim = self._choose(disturbance)
        with victim.disturbed:
            time.sleep(max(0.0, victim.rests_until - time.monotonic()))
            if victim.gone:
                return False
            self._note("begins", disturbance, victim)
            began = time.monotonic()
            disturbance.kind.act(victim, disturbance.seconds)
            now = time.monotonic()
            victim.rests_until = now + min(now - began, _REST_SECONDS)
            self._note("is over", disturbance, victim)
        self.happened[disturbance.kind] += 1
        return True

    def _note(self, when: str, disturbance: Disturbance, victim: Victim) -> None:
        kind = disturbance.kind
        with self._log.open("a") as log:
            log.write(f"{dt.datetime.now(dt.UTC).isoformat()} {when}: {kind.victim} ({victim.name}) {kind.what}\n")

    def told(self, kinds: Sequence[Kind]) -> str:
        """Return what happened how often, for the log of an attack."""
        happened = "\n".join(f"  {self.happened[kind]:3} × {kind.victim} {kind.what}" for kind in kinds)
        return f"{self.happened.total()} disturbances:\n{happened}"
