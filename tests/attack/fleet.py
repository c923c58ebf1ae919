"""All processes of an installation, each with a network of its own, and what happens to them (disturbances.py)."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
from psycopg.conninfo import make_conninfo
from refold.eventstore.catalog import Stream

from hack.servers import Kafka, Postgres
from hack.servers.callers import get
from hack.servers.platform import Platform
from tests.attack.disturbances import (
    Disturbance,
    Disturber,
    Kind,
    Member,
    Server,
    Victim,
    crash,
    cut,
    freeze,
    hang,
    kill,
    restart,
)
from tests.network import Cut, kafka_behind

EVENT_STORES = RELAYS = 2
#: Of the relays; the stream is in one of them.
_SHARDS = 8
#: Seconds after which Kafka takes a silent projector's partitions away.
PROJECTOR_SESSION = 6

KINDS = (
    Kind("event store", "killed with -9", kill, 0, 2),
    # Longer than a client waits for its answer: it sends the append again, to another one.
    Kind("event store", "stopped (SIGSTOP) and resumed", freeze, 5, 8),
    Kind("event store", "cut from PostgreSQL", cut("PostgreSQL"), 1, 6),
    Kind("event store", "without an answer from PostgreSQL, then all at once", hang("PostgreSQL"), 5, 8),
    Kind("relay", "killed with -9", kill, 0, 2),
    # PostgreSQL ends the locks' session after 5 s of silence: another relay takes the shards over.
    Kind("relay", "stopped (SIGSTOP) past its locks and resumed", freeze, 6, 9),
    Kind("relay", "cut from PostgreSQL", cut("PostgreSQL"), 1, 6),
    Kind("relay", "without an answer from PostgreSQL past its locks, then all at once", hang("PostgreSQL"), 6, 9),
    Kind("relay", "cut from Kafka", cut("Kafka"), 1, 6),
    Kind("relay", "without an answer from Kafka, then all at once", hang("Kafka"), 3, 9),
    Kind("projector", "killed with -9", kill, 0, 2),
    Kind("projector", "stopped (SIGSTOP) past its session and resumed", freeze, 8, 8),
    Kind("PostgreSQL", "killed with -9", crash, 0, 1),
    Kind("PostgreSQL", "restarted", restart, 0, 1),
    Kind("Kafka", "killed with -9", crash, 0, 1),
    Kind("Kafka", "restarted", restart, 0, 1),
)


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
        disturber: lets things happen to them.
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
            stores.append(Member(str(service.port), service, {"PostgreSQL": postgres}))
        relays = []
        for kafka in kafka_networks:
            postgres = next(apart)
            service = platform.relay(
                REFOLD_STORE_DSN=make_conninfo(platform.store_dsn("relay"), port=postgres.port),
                REFOLD_KAFKA_BOOTSTRAP=f"127.0.0.1:{kafka.port}",
                REFOLD_RELAY_SHARDS=str(_SHARDS),
            )
            relays.append(Member(str(service.port), service, {"PostgreSQL": postgres, "Kafka": kafka}))
        session = {"REFOLD_SESSION_SECONDS": str(PROJECTOR_SESSION)}
        projectors = []
        for name, version in versions.items():
            for _ in range(2):
                service = platform.projector(stream.namespace, name, version, **session)
                projectors.append(Member(str(service.port), service, {}))
        self._members = [*stores, *relays, *projectors]
        self._victims: dict[str, Sequence[Victim]] = {
            "event store": stores,
            "relay": relays,
            "projector": projectors,
            "PostgreSQL": [Server(str(platform.postgres.port), platform.postgres)],
            "Kafka": [Server(str(platform.kafka.port), platform.kafka)],
        }
        self.stores = [store.process for store in stores]
        self._shard = stream.stream % _SHARDS
        self.disturber = Disturber(self._choose, platform.logs / "disturbances.log")

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

    def _choose(self, disturbance: Disturbance) -> Victim:
        victims = self._victims[disturbance.kind.victim]
        if disturbance.kind.victim == "relay":
            # Four times in five the one that relays the stream, until the other takes it over.
            return sorted(victims, key=self._relays, reverse=True)[disturbance.draw >= 0.8]
        return victims[int(disturbance.draw * len(victims))]

    def _relays(self, relay: Victim) -> bool:
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
