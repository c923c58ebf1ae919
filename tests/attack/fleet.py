"""All processes of an installation, each with a network of its own, and the terrible things that happen to them."""

import collections
import contextlib
import datetime as dt
import queue
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import httpx
from psycopg.conninfo import make_conninfo
from refold.eventstore.catalog import Stream

from hack.servers import Kafka, Postgres
from hack.servers.callers import get
from hack.servers.platform import Platform, Service
from tests.network import Cut, kafka_behind

EVENT_STORES = RELAYS = 2
#: Disturbances that go on at the same time, each of another process.
AT_ONCE = 2
#: Of the relays; the stream is in one of them.
_SHARDS = 8
#: Seconds after which Kafka takes a silent projector's partitions away.
_PROJECTOR_SESSION = 6


@dataclass
class Server:
    """PostgreSQL or Kafka."""

    process: Postgres | Kafka
    disturbed: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Member:
    """One process of the data plane, and the networks through which it alone reaches PostgreSQL and Kafka."""

    process: Service
    networks: dict[str, Cut]
    disturbed: threading.Lock = field(default_factory=threading.Lock)


def _kill(member: Member, seconds: float) -> None:
    member.process.kill()
    time.sleep(seconds)
    member.process.up()


def _freeze(member: Member, seconds: float) -> None:
    member.process.send(signal.SIGSTOP)
    time.sleep(seconds)
    member.process.send(signal.SIGCONT)


def _cut(system: str) -> Callable[[Member, float], None]:
    def cut(member: Member, seconds: float) -> None:
        member.networks[system].cut()
        time.sleep(seconds)
        member.networks[system].heal()

    return cut


def _hang(system: str) -> Callable[[Member, float], None]:
    def hang(member: Member, seconds: float) -> None:
        member.networks[system].hang()
        time.sleep(seconds)
        member.networks[system].heal()

    return hang


def _crash(server: Server, seconds: float) -> None:
    server.process.kill()
    time.sleep(seconds)
    server.process.start()


def _restart(server: Server, seconds: float) -> None:
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


KINDS = (
    Kind("event store", "killed with -9", _kill, 0, 2),
    # Longer than a client waits for its answer: it sends the append again, to another one.
    Kind("event store", "stopped (SIGSTOP) and resumed", _freeze, 5, 8),
    Kind("event store", "cut from PostgreSQL", _cut("PostgreSQL"), 1, 6),
    Kind("event store", "without an answer from PostgreSQL, then all at once", _hang("PostgreSQL"), 5, 8),
    Kind("relay", "killed with -9", _kill, 0, 2),
    # PostgreSQL ends the locks' session after 5 s of silence: another relay takes the shards over.
    Kind("relay", "stopped (SIGSTOP) past its locks and resumed", _freeze, 6, 9),
    Kind("relay", "cut from PostgreSQL", _cut("PostgreSQL"), 1, 6),
    Kind("relay", "without an answer from PostgreSQL past its locks, then all at once", _hang("PostgreSQL"), 6, 9),
    Kind("relay", "cut from Kafka", _cut("Kafka"), 1, 6),
    Kind("relay", "without an answer from Kafka, then all at once", _hang("Kafka"), 3, 9),
    Kind("projector", "killed with -9", _kill, 0, 2),
    Kind("projector", "stopped (SIGSTOP) past its session and resumed", _freeze, 8, 8),
    Kind("PostgreSQL", "killed with -9", _crash, 0, 1),
    Kind("PostgreSQL", "restarted", _restart, 0, 1),
    Kind("Kafka", "killed with -9", _crash, 0, 1),
    Kind("Kafka", "restarted", _restart, 0, 1),
)


@dataclass(frozen=True)
class Disturbance:
    """One of `KINDS`, after a `pause`; `draw` (0 to 1) says to which of the victims."""

    kind: Kind
    pause: float
    draw: float
    seconds: float


def plan(draw: random.Random, count: int) -> list[Disturbance]:
    """Return `count` disturbances in a random order; no kind comes again before all others came as often."""
    order: list[Kind] = []
    while len(order) < count:
        order += draw.sample(KINDS, len(KINDS))
    return [
        Disturbance(kind, draw.uniform(0.2, 2), draw.random(), draw.uniform(kind.least, kind.most))
        for kind in order[:count]
    ]


@contextlib.contextmanager
def servers() -> Iterator[tuple[Postgres, Kafka, list[Cut]]]:
    """Run a PostgreSQL and a Kafka that may be killed, and for each relay a network to this Kafka."""
    postgres = Postgres()
    try:
        postgres.start()
        with kafka_behind(RELAYS) as (kafka, networks):
            yield postgres, kafka, networks
    finally:
        postgres.remove()


class Fleet:
    """Two event stores, two relays and two projectors for each version of a projection. A context: they run in it.

    Attributes:
        happened: how often each kind of disturbance came.
    """

    def __init__(
        self, platform: Platform, stream: Stream, versions: dict[str, str], kafka_networks: Sequence[Cut]
    ) -> None:
        """Make the processes; `platform` runs on `servers`, `versions` are those of the projections of its `stream`."""
        assert isinstance(platform.postgres, Postgres)
        assert isinstance(platform.kafka, Kafka)
        self._postgres_networks = [Cut(platform.postgres.port) for _ in range(EVENT_STORES + RELAYS)]
        apart = iter(self._postgres_networks)
        stores = []
        for _ in range(EVENT_STORES):
            postgres = next(apart)
            service = platform.eventstore(REFOLD_STORE_DSN=make_conninfo(platform.store_dsn(), port=postgres.port))
            stores.append(Member(service, {"PostgreSQL": postgres}))
        relays = []
        for kafka in kafka_networks:
            postgres = next(apart)
            service = platform.relay(
                REFOLD_STORE_DSN=make_conninfo(platform.store_dsn("relay"), port=postgres.port),
                REFOLD_KAFKA_BOOTSTRAP=f"127.0.0.1:{kafka.port}",
                REFOLD_RELAY_SHARDS=str(_SHARDS),
            )
            relays.append(Member(service, {"PostgreSQL": postgres, "Kafka": kafka}))
        session = {"REFOLD_SESSION_SECONDS": str(_PROJECTOR_SESSION)}
        projectors = [
            Member(platform.projector(stream.namespace, name, version, **session), {})
            for name, version in versions.items()
            for _ in range(2)
        ]
        self._members = [*stores, *relays, *projectors]
        self._victims: dict[str, Sequence[Member | Server]] = {
            "event store": stores,
            "relay": relays,
            "projector": projectors,
            "PostgreSQL": [Server(platform.postgres)],
            "Kafka": [Server(platform.kafka)],
        }
        self.stores = [store.process for store in stores]
        self._log = platform.logs / "disturbances.log"
        self._shard = stream.stream % _SHARDS
        self.happened: collections.Counter[Kind] = collections.Counter()

    def __enter__(self) -> "Fleet":
        with contextlib.ExitStack() as stack:
            for network in self._postgres_networks:
                stack.enter_context(network)
            for member in self._members:
                stack.callback(member.process.kill)
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda member: member.process.up(), self._members))
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

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
                self._disturb(disturbance)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in wait([pool.submit(go) for _ in range(AT_ONCE)]).done:
                done.result()

    def _disturb(self, disturbance: Disturbance) -> None:
        victims = self._victims[disturbance.kind.victim]
        if disturbance.kind.victim == "relay":
            # Four times in five the one that relays the stream, until the other takes it over.
            victim = sorted(victims, key=self._relays, reverse=True)[disturbance.draw >= 0.8]
        else:
            victim = victims[int(disturbance.draw * len(victims))]
        with victim.disturbed:
            self._note("begins", disturbance, victim)
            disturbance.kind.act(victim, disturbance.seconds)
            self._note("is over", disturbance, victim)
        self.happened[disturbance.kind] += 1

    def _note(self, when: str, disturbance: Disturbance, victim: Member | Server) -> None:
        """Add a line to `disturbances.log`, beside the processes' logs."""
        kind, port = disturbance.kind, victim.process.port
        with self._log.open("a") as log:
            log.write(f"{dt.datetime.now(dt.UTC).isoformat()} {when}: {kind.victim} ({port}) {kind.what}\n")

    def _relays(self, relay: Member | Server) -> bool:
        """Tell whether a relay holds the stream's shard, as far as it can be asked."""
        assert isinstance(relay, Member)
        try:
            told = get(f"{relay.process.url}/metrics", timeout=2).text
        except httpx.TransportError:
            return False
        return f'refold_relay_shard_held{{shard="{self._shard}"}} 1.0' in told

    def takeovers(self) -> int:
        """Return how often a relay took the stream's shard over, from its free start on."""
        taken = re.compile(f'"shard": {self._shard},.*"The shard was taken over"')
        relays = [member.process for member in self._members if member.process.command == "relay"]
        return sum(len(taken.findall(relay.log.read_text(errors="replace"))) for relay in relays)
