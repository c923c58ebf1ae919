"""Two replicas of the operator and the servers that it works with, and what happens to them."""

import contextlib
import dataclasses
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg

from hack.servers import Kafka, Postgres
from hack.servers.kubernetes_api import ApiServer
from tests.attack.api import Api
from tests.attack.disturbances import Disturbance, Kind, Server, Victim, crash, restart
from tests.operating import Operator, api_server

NAMESPACES = ("shop", "shop-eu", "bank")
STORE, READS = "attack_store", "attack_reads"
#: Not too short for a busy machine, where a leader that can't renew it ends.
LEASE_SECONDS = 5
#: So that drift is found soon.
RESYNC_SECONDS = 10
#: Kubernetes gives a container that long to end.
_GRACE_SECONDS = 30.0
_AUDIT = """
create schema audit;
create table audit.dropped (namespace text, name text, uid text);
create function audit.note() returns trigger language plpgsql security definer as
  $$ begin insert into audit.dropped values (old.namespace, old.name, old.uid); return old; end $$;
create trigger audit before delete on {} for each row execute function audit.note();
"""


class ControlPlane:
    """An API server, PostgreSQL and Kafka of its own, with an operator's installation; a context: the servers run.

    Attributes:
        installed: the installation; its process isn't started.
    """

    def __init__(self) -> None:
        self.postgres, self.kafka = Postgres(), Kafka()

    def __enter__(self) -> "ControlPlane":
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove)
            with ThreadPoolExecutor() as pool:
                started = pool.submit(api_server, *NAMESPACES)
                list(pool.map(lambda server: server.start(), (self.postgres, self.kafka)))
                self.server: ApiServer = started.result()
            stack.callback(self.server.remove)
            self.api = Api(self.server)
            self.installed = Operator(
                self.server, self.postgres, self.kafka, (STORE, READS),
                REFOLD_LEASE_SECONDS=str(LEASE_SECONDS), REFOLD_RESYNC_SECONDS=str(RESYNC_SECONDS),
            )  # fmt: skip
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.api.close()
        self.server.remove()
        self._remove()

    def _remove(self) -> None:
        for server in (self.postgres, self.kafka):
            server.remove()

    def audit(self) -> None:
        """Note from now on of which resources a history or a read model is dropped."""
        for database, table in ((STORE, "refold.streams"), (READS, "refold_read.projections")):
            with psycopg.connect(self.postgres.dsn(database), autocommit=True) as connection:
                connection.execute(_AUDIT.format(table))

    def dropped(self) -> list[tuple[str, str, str]]:
        """Return namespace, name and UID of each history and each read model that was dropped."""
        found = []
        for database in (STORE, READS):
            with psycopg.connect(self.postgres.dsn(database)) as connection:
                found += connection.execute("select namespace, name, uid from audit.dropped").fetchall()
        return found


class ApiServerProcess:
    """The API server alone, without etcd."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server

    def start(self) -> None:
        self._server.start_server()

    def stop(self) -> None:
        self._server.stop_server()

    def kill(self) -> None:
        self._server.kill_server()


@dataclasses.dataclass
class Replica(Victim):
    """A process of the operator; `down` keeps it from being started again."""

    operator: Operator
    down: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass
class Replicas(Victim):
    """All processes of the operator."""

    all: list[Replica]


def _kill(replica: Replica, seconds: float) -> None:
    replica.down.set()
    replica.operator.crash()
    time.sleep(seconds)
    replica.down.clear()


def _end(replica: Replica, seconds: float) -> None:
    replica.down.set()
    began = time.monotonic()
    replica.operator.stop()
    assert time.monotonic() - began < _GRACE_SECONDS, "SIGTERM doesn't end the operator"
    time.sleep(seconds)
    replica.down.clear()


def _freeze(replica: Replica, seconds: float) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself, as without an API server
        replica.operator.send(signal.SIGSTOP)
        time.sleep(seconds)
        replica.operator.send(signal.SIGCONT)


def _kill_all(replicas: Replicas, seconds: float) -> None:
    for replica in replicas.all:
        replica.down.set()
        replica.operator.crash()
    time.sleep(seconds)
    for replica in replicas.all:
        replica.down.clear()


KINDS = (
    Kind("operator", "killed with -9", _kill, 0, 2),
    Kind("operator", "stopped (SIGSTOP) past its Lease and resumed", _freeze, LEASE_SECONDS + 1, LEASE_SECONDS + 3),
    Kind("operator", "ended (SIGTERM)", _end, 0, 1),
    Kind("operators", "killed with -9 together", _kill_all, 0, 1),
    Kind("PostgreSQL", "killed with -9", crash, 0, 3),
    Kind("PostgreSQL", "restarted", restart, 0, 1),
    Kind("Kafka", "killed with -9", crash, 0, 3),
    Kind("Kafka", "restarted", restart, 0, 1),
    Kind("API server", "killed with -9", crash, 0, 5),
    Kind("API server", "restarted", restart, 0, 1),
)


class Pair:
    """Two replicas of the operator, started again whenever they end, as Kubernetes would; a context: they run.

    Attributes:
        starts: how often a process was started.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self._replicas = [Replica(f"replica {n}", plane.installed.replica()) for n in range(2)]
        self._both = Replicas("both", self._replicas)
        self._servers = {
            "PostgreSQL": Server("PostgreSQL", plane.postgres),
            "Kafka": Server("Kafka", plane.kafka),
            "API server": Server("API server", ApiServerProcess(plane.server)),
        }
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self.starts = 0

    def __enter__(self) -> "Pair":
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._keeper.join()
        for replica in self._replicas:
            replica.operator.crash()

    def _keep(self) -> None:
        while not self._ended.wait(0.2):
            for replica in self._replicas:
                if not replica.operator.running and not replica.down.is_set():
                    replica.operator.launch()
                    self.starts += 1

    @property
    def operators(self) -> list[Operator]:
        return [replica.operator for replica in self._replicas]

    @property
    def leader(self) -> Operator | None:
        return next((operator for operator in self.operators if operator.running and operator.leads), None)

    def choose(self, disturbance: Disturbance) -> Victim:
        """Return a victim; of the replicas the one that works more often than the other."""
        victim = disturbance.kind.victim
        if victim in self._servers:
            return self._servers[victim]
        if victim == "operators":
            return self._both
        if disturbance.draw < 0.7:
            for replica in self._replicas:
                # One that is frozen doesn't answer, and has its disturbance already.
                if not replica.disturbed.locked() and replica.operator.running and replica.operator.leads:
                    return replica
        return self._replicas[int(disturbance.draw * 1000) % 2]
