"""A private Kafka broker (KRaft, one node)."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hack.servers.certificates import Authority
from hack.servers.process import Process, accepts, cache, free_port

_POM = Path(__file__).parents[2] / "images" / "kafka" / "pom.xml"
_CLUSTER_ID = "cmVmb2xkLXRlc3QtMDAwMQ"
_SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "inter.broker.listener.name": "PLAINTEXT",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "auto.create.topics.enable": "false",
    "num.partitions": "1",
    "offsets.topic.num.partitions": "8",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "8",
    "group.initial.rebalance.delay.ms": "0",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "log.retention.check.interval.ms": "1000",
    # a killed broker may register again once its former session has ended (9 s by default)
    "broker.session.timeout.ms": "5000",
    "broker.heartbeat.interval.ms": "500",
}


#: A broker that lives for minutes: the JVM's second compiler would take half a core all the time, and never pay.
_BRIEF = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
_LASTING = ("-XX:+UseG1GC",)


def jars() -> Path:
    """Return the folder of Kafka's jars, downloaded from Maven Central once for each content of the pom."""
    folder = cache() / "kafka" / hashlib.sha256(_POM.read_bytes()).hexdigest()[:12]
    if not (folder / ".done").exists():
        if shutil.which("mvn") is None or shutil.which("java") is None:
            raise RuntimeError("Kafka needs a JDK (17 or later) and Maven: run hack/servers/install.sh")
        print("downloading Kafka's jars from Maven Central (10 s once)", flush=True)
        subprocess.run(
            ["mvn", "-q", "-B", "-f", _POM, "dependency:copy-dependencies", "-DincludeScope=runtime",
             f"-DoutputDirectory={folder}"], check=True,
        )  # fmt: skip
        (folder / ".done").touch()
    return folder


def _archived() -> list[str]:
    """Return the JVM's options for an archive of the classes that a broker loads: a start takes a third of the CPU.

    It is made once. A JVM that can't make one, or can't use it since another one made it, does without.
    """
    archive = jars() / "classes.jsa"
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((jars() / "classes.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes begin at the same time
        if not archive.exists():
            print("archiving Kafka's classes (15 s once)", flush=True)
            new = archive.with_suffix(".new")
            broker = Kafka(java=[*_BRIEF, f"-XX:ArchiveClassesAtExit={new}"])
            stack.callback(broker.remove)
            broker.start()
            broker._process.stop(timeout=180)
            new.touch()
            new.replace(archive)
    return [f"-XX:SharedArchiveFile={archive}"] if archive.stat().st_size else []


class Kafka:
    """A broker with a data folder of its own, without authentication."""

    def __init__(
        self, *, settings: dict[str, str] | None = None, lasting: bool = False, java: Sequence[str] | None = None
    ) -> None:
        """Choose folder and ports and format the storage.

        Args:
            settings: go to server.properties over the defaults.
            lasting: the JVM compiles as well as it can, which takes it minutes: for measurements.
            java: the JVM's options in place of these.
        """
        if java is None:
            java = [*(_LASTING if lasting else _BRIEF), *_archived()]
        self._folder = Path(tempfile.mkdtemp(prefix="refold-kafka-"))
        self.port = free_port()
        controller = free_port()
        options = {
            **_SETTINGS,
            "log.dirs": str(self._folder / "data"),
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            **(settings or {}),
        }
        # they open one after another
        self._ports = [int(listener.rpartition(":")[2]) for listener in options["listeners"].split(",")]
        self._properties = self._folder / "server.properties"
        self._properties.write_text("".join(f"{name}={value}\n" for name, value in options.items()))
        self._java = [
            "java", *java, "-Xmx768m", "-Xms256m", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-cp", f"{jars()}/*",
        ]  # fmt: skip
        subprocess.run(
            [*self._java, "kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(self._properties)],
            check=True, capture_output=True,
        )  # fmt: skip
        self._process = Process([*self._java, "kafka.Kafka", str(self._properties)], self._folder / "log")

    @property
    def bootstrap(self) -> str:
        """Return `host:port` for clients."""
        return f"127.0.0.1:{self.port}"

    def compiled(self) -> float:
        """Return the seconds of CPU that the running JVM's compilers have taken so far (Linux only)."""
        ticks = 0
        for thread in Path(f"/proc/{self._process.pid}/task").glob("*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                name, _, fields = thread.read_text().rpartition(")")
                if "CompilerThre" in name:
                    user, system = fields.split()[11:13]
                    ticks += int(user) + int(system)
        return ticks / os.sysconf("SC_CLK_TCK")

    def start(self) -> None:
        """Start and wait until the broker accepts connections on all its ports."""
        self._process.start(lambda: all(accepts(port) for port in self._ports))

    def stop(self) -> None:
        """Stop cleanly."""
        self._process.stop()

    def kill(self) -> None:
        """Kill with -9 the broker."""
        self._process.kill()

    def restart(self) -> None:
        """Stop cleanly and start again on the same port and data."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Kill the broker and delete its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


class SecuredKafka(Kafka):
    """A broker that asks who is there: SASL_SSL (SCRAM and PLAIN), SSL (mTLS), and ACLs that deny by default.

    `bootstrap` is a listener without TLS whose (anonymous) clients are super users: the test's own way in.

    Attributes:
        authority: signed the broker's certificate, and signs those of clients (principal `User:CN=<name>`).
        sasl: `host:port` of the listener SASL_SSL.
        mtls: `host:port` of the listener SSL.
    """

    def __init__(self, *, plain_users: dict[str, str]) -> None:
        """Make certificates and format the storage; `plain_users` (name to password) may log in with PLAIN."""
        self._secrets = Path(tempfile.mkdtemp(prefix="refold-kafka-secrets-"))
        self.authority = Authority(self._secrets / "ca")
        self.authority.issue("broker", self._secrets)
        store = self._secrets / "broker.pem"
        store.write_text("".join((self._secrets / file).read_text() for file in ("user.key", "user.crt")))
        port, controller, sasl, mtls = (free_port() for _ in range(4))
        self.sasl, self.mtls = f"127.0.0.1:{sasl}", f"127.0.0.1:{mtls}"
        listeners = f"PLAINTEXT://127.0.0.1:{port},SASL_SSL://{self.sasl},SSL://{self.mtls}"
        users = " ".join(f'user_{name}="{password}"' for name, password in plain_users.items())
        modules = "org.apache.kafka.common.security"
        super().__init__(
            settings={
                "listeners": f"{listeners},CONTROLLER://127.0.0.1:{controller}",
                "advertised.listeners": listeners,
                "controller.quorum.voters": f"1@127.0.0.1:{controller}",
                "listener.security.protocol.map": (
                    "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL"
                ),
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": "User:ANONYMOUS",
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(store),
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": str(self.authority.certificate),
                "listener.name.ssl.ssl.client.auth": "required",
                "sasl.enabled.mechanisms": "SCRAM-SHA-512,SCRAM-SHA-256,PLAIN",
                "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": f"{modules}.scram.ScramLoginModule required;",
                "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": f"{modules}.scram.ScramLoginModule required;",
                "listener.name.sasl_ssl.plain.sasl.jaas.config": f"{modules}.plain.PlainLoginModule required {users};",
            }
        )
        self.port = port

    def remove(self) -> None:
        """Kill the broker and delete its data and secrets."""
        super().remove()
        shutil.rmtree(self._secrets, ignore_errors=True)
