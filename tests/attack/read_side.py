"""Read models in both read stores, folded by three projectors each, queried, and built anew again and again."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psycopg
from psycopg.conninfo import make_conninfo
from refold.eventstore.catalog import Stream
from refold.projection.readstore import NotFoundError, UnavailableError

from hack.servers import Kafka, Postgres, Redis
from hack.servers.platform import Platform, Service
from tests.attack.checks import Built
from tests.attack.disturbances import (
    Disturbance,
    Disturber,
    Kind,
    Member,
    Server,
    Victim,
    crash,
    cut,
    end,
    freeze,
    hang,
    kill,
    restart,
)
from tests.attack.fleet import PROJECTOR_SESSION
from tests.attack.models import Model
from tests.network import Cut

#: Of a version that is live or being built, and of one that another one has taken the place of.
_PROJECTORS, _PROJECTORS_BEFORE = 3, 1
_QUERIES = 2
#: Small, so that a build takes many transactions.
_BATCH_EVENTS = 200
#: Seconds within which a build takes the place of the live version, whatever happens meanwhile.
BUILD_SECONDS = 600.0
_LOOK_SECONDS = 0.3
#: The share of Redis' append-only file that a crash takes: some seconds of an attack.
_LOST_SHARE = 0.03
#: What is tried again: a server is away, or a crash of Redis took back what was made last.
_PASSING = (psycopg.OperationalError, UnavailableError, NotFoundError)
_READ_STORE = "its read store"
_REFUSED = re.compile("Another projector has moved a partition on")
_T = TypeVar("_T")


class Group(Victim):
    """The projectors of one version. The first of them reaches the read store through a network of its own."""

    def __init__(self, platform: Platform, built: Built, redis: Redis | None) -> None:
        super().__init__(built.told)
        self.built = built
        self.members: list[Member] = []
        self._platform, self._redis = platform, redis
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        """Start its projectors and wait until they are alive."""
        port = (self._platform.read_server if self._redis is None else self._redis).port
        network = self._stack.enter_context(Cut(port))
        members = [self._member(network), *(self._member() for _ in range(_PROJECTORS - 1))]
        for member in members:
            self._stack.callback(member.process.kill)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda member: member.process.up(), members))
        self.members = members  # from now on things happen to them

    def _member(self, network: Cut | None = None) -> Member:
        name = self.built.model.name
        settings = {"REFOLD_SESSION_SECONDS": str(PROJECTOR_SESSION), "REFOLD_BATCH_EVENTS": str(_BATCH_EVENTS)}
        if self._redis is not None:
            settings["REFOLD_READSTORE_DSN"] = self._redis.url() if network is None else _redis_url(network.port)
        elif network is not None:
            dsn = self._platform.projector_dsn("shop", name)
            settings["REFOLD_READSTORE_DSN"] = make_conninfo(dsn, port=network.port)
        process = self._platform.projector("shop", name, self.built.version, **settings)
        return Member(str(process.port), process, {} if network is None else {_READ_STORE: network})

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """Run another projector, to which partitions move, and from which they move when it ends."""
        process = self._member().process
        try:
            process.up()
            yield
            process.stop()
        finally:
            process.kill()

    def shrink(self, left: int) -> None:
        """End projectors until `left` are there, each once nothing happens to it."""
        with self.disturbed:
            for member in self.members[left:]:
                with member.disturbed:
                    member.process.stop()
                    member.gone = True
            self.gone = left == 0

    @property
    def running(self) -> list[Member]:
        """Those that weren't ended."""
        return [member for member in self.members if not member.gone]

    def close(self) -> None:
        """Kill what runs."""
        self._stack.close()


def _redis_url(port: int) -> str:
    return f"redis://127.0.0.1:{port}/0"


class ReadModel:
    """A model in one read store, and how it is built anew.

    Attributes:
        live: the projectors of the version that readers see.
        before: those of the version that was live before, which goes on; None where none was.
        building: those of one that is to take its place.
        swaps: how often one did.
    """

    def __init__(self, platform: Platform, stream: Stream, model: Model, redis: Redis | None) -> None:
        self._platform, self._stream, self._model, self._redis = platform, stream, model, redis
        self.live = self._group(1)
        self.before: Group | None = None
        self.building: Group | None = None
        self.swaps = 0

    @property
    def groups(self) -> list[Group]:
        """All that run."""
        return [group for group in (self.before, self.live, self.building) if group is not None]

    def _group(self, generation: int) -> Group:
        url = self._platform.read_dsn() if self._redis is None else self._redis.url()
        version = _settled(lambda: self._ensured(generation))
        return Group(self._platform, Built(url, self._model, generation, version), self._redis)

    def _ensured(self, generation: int) -> str:
        spec, url = self._model.spec(generation), None if self._redis is None else self._redis.url()
        return self._platform.projection("shop", self._model.name, spec, [self._stream], redis=url)

    def _swapped(self, group: Group) -> bool:
        url = None if self._redis is None else self._redis.url()
        return self._platform.swap("shop", self._model.name, group.built.version, redis=url)

    def reconcile(self, wanted: Group) -> bool:
        """Make again what a crash of Redis took back, and try to let readers see `wanted`; return whether they do."""
        for group in self.groups:
            self._ensured(group.built.generation)
        return self._swapped(wanted)

    def wait_live(self, wanted: Group, *, go_on: Callable[[], bool] = lambda: True) -> None:
        """Wait until readers see `wanted`, or `go_on` answers false."""
        deadline = time.monotonic() + BUILD_SECONDS
        while go_on() and not _settled(lambda: self.reconcile(wanted)):
            if time.monotonic() > deadline:
                at = {group.name: group.built.positions(self._stream) for group in self.groups}
                raise TimeoutError(f"{wanted.name} isn't live after {BUILD_SECONDS:g} s: they are at {at}")
            time.sleep(_LOOK_SECONDS)

    def rebuild(self, *, go_on: Callable[[], bool]) -> None:
        """Build the next generation beside the live one and let it take its place; the one before is kept, and goes on.

        Where `go_on` answers false the build is left as it is.
        """
        self.wait_live(self.live)
        if self.before is not None:
            dropped, self.before = self.before, None
            dropped.shrink(0)
            dropped.close()
            url = None if self._redis is None else self._redis.url()
            _settled(lambda: self._platform.drop_version("shop", self._model.name, dropped.built.version, redis=url))
        self.building = self._group(self.live.built.generation + 1)
        self.building.start()
        self.wait_live(self.building, go_on=go_on)
        if go_on():
            self.before, self.live, self.building = self.live, self.building, None
            self.before.shrink(_PROJECTORS_BEFORE)
            self.swaps += 1


def _settled(ask: Callable[[], _T]) -> _T:
    """Return what `ask` answers once servers are there that it needs."""
    deadline = time.monotonic() + BUILD_SECONDS
    while True:
        try:
            return ask()
        except _PASSING:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_SECONDS)


def _freeze_in_a_batch(member: Member, seconds: float) -> None:
    """Stop a projector whose batch is under way and isn't there yet; let it arrive once others have its partitions.

    What it then writes has to be refused.
    """
    member.networks[_READ_STORE].hang()
    time.sleep(0.5)
    member.process.send(signal.SIGSTOP)
    time.sleep(seconds)
    member.networks[_READ_STORE].heal()
    time.sleep(0.3)  # the answer is there when it goes on, which by then has waited for longer than it would
    member.process.send(signal.SIGCONT)


def _one_more(group: Group, seconds: float) -> None:
    with group.one_more():
        time.sleep(seconds)


def _lose(server: Server, _: float) -> None:
    assert isinstance(server.process, Redis)
    server.process.lose(_LOST_SHARE)


_IN_A_BATCH = Kind(
    # Kafka misses it after its session, the others hear of that with their next heartbeats and read their positions.
    "projector", "stopped (SIGSTOP) in a batch past its session and resumed", _freeze_in_a_batch, 11, 13
)  # fmt: skip
_NETWORKED = (
    Kind("projector", f"cut from {_READ_STORE}", cut(_READ_STORE), 1, 4),
    Kind("projector", f"without an answer from {_READ_STORE}, then all at once", hang(_READ_STORE), 3, 8),
    _IN_A_BATCH,
)
KINDS = (
    Kind("projector", "killed with -9", kill, 0, 2),
    Kind("projector", "stopped (SIGSTOP) past its session and resumed", freeze, 8, 9),
    Kind("projector", "ended (SIGTERM) and started again", end, 0, 1),
    *_NETWORKED,
    Kind("group of projectors", "one more for a while", _one_more, 1, 3),
    Kind("event store's PostgreSQL", "killed with -9", crash, 0, 1),
    Kind("event store's PostgreSQL", "restarted", restart, 0, 1),
    Kind("read store's PostgreSQL", "killed with -9", crash, 0, 1),
    Kind("read store's PostgreSQL", "restarted", restart, 0, 1),
    Kind("Redis", "killed with -9", crash, 0, 1),
    Kind("Redis", "killed with -9, and the end of its append-only file is lost", _lose, 0, 0),
    Kind("Redis", "restarted", restart, 0, 1),
    Kind("Kafka", "killed with -9", crash, 0, 1),
    Kind("Kafka", "restarted", restart, 0, 1),
)


class ReadSide:
    """An event store, a relay, and read models. A context: they run in it.

    Attributes:
        models: the read models.
        disturber: lets things happen to projectors and servers.
        eventstore: where to append.
        queries: the query service's replicas of the first model in PostgreSQL.
    """

    def __init__(
        self,
        platform: Platform,
        stream: Stream,
        redis: Redis,
        *,
        in_postgres: Sequence[Model],
        in_redis: Sequence[Model],
    ) -> None:
        """Make the processes; `stream` is one of `platform`, whose servers may be killed, as may `redis`."""
        servers: list[Postgres | Kafka | Redis] = []
        for server in (platform.postgres, platform.read_server, platform.kafka):
            assert isinstance(server, Postgres | Kafka)
            servers.append(server)
        names = ("event store's PostgreSQL", "read store's PostgreSQL", "Kafka", "Redis")
        self._servers = {name: Server(name, server) for name, server in zip(names, [*servers, redis], strict=True)}
        self._platform, self._stream = platform, stream
        self._places = [*((model, None) for model in in_postgres), *((model, redis) for model in in_redis)]
        self.eventstore = platform.eventstore()
        self._relay = platform.relay()
        self._in_postgres = in_postgres[0].name
        self.queries: list[Service] = []
        self.models: list[ReadModel] = []
        self.disturber = Disturber(self._choose, platform.logs / "disturbances.log")

    def __enter__(self) -> "ReadSide":
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            self.models = [ReadModel(self._platform, self._stream, model, redis) for model, redis in self._places]
            self.queries = [self._platform.query("shop", self._in_postgres) for _ in range(_QUERIES)]
            up = [service.up for service in (self.eventstore, self._relay, *self.queries)]
            starts = [*up, *(model.live.start for model in self.models)]
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda start: start(), starts))
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for model in self.models:
            for group in model.groups:
                group.close()
        for service in (self.eventstore, self._relay, *self.queries):
            service.kill()

    @property
    def groups(self) -> list[Group]:
        """All groups of projectors that run."""
        return [group for model in self.models for group in model.groups]

    @property
    def refused(self) -> int:
        """How often a read store refused what a projector wrote, since another one had its partition meanwhile."""
        logs = self._platform.logs.glob("projector-*.log")
        return sum(len(_REFUSED.findall(log.read_text(errors="replace"))) for log in logs)

    def _choose(self, disturbance: Disturbance) -> Victim:
        kind = disturbance.kind
        victims: list[Victim] = [self._servers[kind.victim]] if kind.victim in self._servers else []
        if kind.victim == "projector":
            least = 2 if kind is _IN_A_BATCH else 1  # somebody has to take its partitions
            groups = [running for group in self.groups if len(running := group.running) >= least]
            victims = [one for running in groups for one in running if one.networks or kind not in _NETWORKED]
        elif kind.victim == "group of projectors":
            victims = list(self.groups)
        return victims[int(disturbance.draw * len(victims))]


class Rebuilding(threading.Thread):
    """Builds models anew, one after the other, until stopped and each was swapped once.

    Attributes:
        failure: why it ended early.
    """

    def __init__(self, models: list[ReadModel]) -> None:
        super().__init__(name="rebuilding", daemon=True)
        self._models = models
        self._stopped = threading.Event()
        self.failure: str | None = None

    def stop(self) -> None:
        """Let it end once each model was swapped; join it to wait for that."""
        self._stopped.set()

    def run(self) -> None:
        """Build until stopped."""
        try:
            while not self._stopped.is_set() or any(not model.swaps for model in self._models):
                model = min(self._models, key=lambda model: model.swaps)
                model.rebuild(go_on=lambda: not self._stopped.is_set() or not model.swaps)  # noqa: B023 (used at once)
        except Exception as error:  # noqa: BLE001 (the test fails with it)
            self.failure = f"{type(error).__name__}: {error}"
