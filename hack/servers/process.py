"""What the servers have in common: a child process that is started, waited for, killed and stopped."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def cache() -> Path:
    """Return the folder for what is downloaded or built once."""
    return Path(os.environ.get("REFOLD_CACHE") or Path.home() / ".cache" / "refold")


#: Descriptors of locked files, by the ports that this process was given; the locks end with it.
_given: dict[int, int] = {}


def free_port() -> int:
    """Return a TCP port on 127.0.0.1 that nothing listens on and that no other caller was given, here or elsewhere.

    A server begins to listen seconds after its port was chosen, so processes that choose at the same time (test runs
    of several checkouts) keep apart by locked files.
    """
    locks = Path(tempfile.gettempdir()) / f"refold-ports-{os.geteuid()}"
    locks.mkdir(exist_ok=True)
    # Below the ephemeral ports: an outgoing connection could take one while its server is down for a restart.
    for port in range(20000 + os.getpid() % 5000, 30000):
        if port not in _given and _reserve(port, locks / str(port)):
            return port
    raise RuntimeError("no free port on 127.0.0.1")


def _reserve(port: int, lock: Path) -> bool:
    """Lock a port's file for as long as this process lives; False where another has it or something listens."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OSError:
        os.close(descriptor)
        return False
    _given[port] = descriptor
    return True


class Process:
    """A server's process; its output goes to `log`."""

    def __init__(self, command: list[str], log: Path, *, user: str | None = None, env: dict[str, str] | None = None):
        """Remember how to start; `user` only has a meaning for root, who may not run PostgreSQL."""
        self._command, self.log, self._user = command, log, user
        self._env = {**os.environ, **(env or {})}
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Tell whether the process has been started and has not ended."""
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int:
        """Return the id of the running process."""
        assert self._child is not None
        return self._child.pid

    def start(self, ready: Callable[[], bool], *, timeout: float = 180) -> None:
        """Start the process and wait until `ready` answers true.

        Raises:
            RuntimeError: it ended or wasn't ready within `timeout` seconds; the message holds the log's end.
        """
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, user=self._user, env=self._env,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + timeout
        while not ready():
            if not self.running or time.monotonic() > deadline:
                state = "was not ready in time" if self.running else f"ended with {self._child.returncode}"
                self.kill()
                end = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"{self._command[0]} {state}; {self.log} ends:\n{end}")
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def stop(self, number: signal.Signals = signal.SIGTERM, *, timeout: float = 30) -> None:
        """Ask the process to end and wait; after `timeout` seconds kill it."""
        if not self.running:
            return
        self.send(number)
        assert self._child is not None
        try:
            self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process and its children at once, as a power cut would."""
        if self._child is None:
            return
        # PostgreSQL's backends are in process groups of their own: stop the parent first, so that it makes no more
        children: list[int] = []
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, signal.SIGSTOP)
            children = _children(self._child.pid)
            for pid in [*children, self._child.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._child.wait()
        # One that waits for a busy disk ends when that has answered; until then PostgreSQL refuses to start again.
        deadline = time.monotonic() + 60
        while _alive(children) and time.monotonic() < deadline:
            time.sleep(0.05)


def accepts(port: int) -> bool:
    """Tell whether something accepts connections on 127.0.0.1:`port`."""
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _alive(pids: list[int]) -> bool:
    """Tell whether one of these processes has not ended; one that nobody has asked for its exit code has."""
    if not pids:
        return False
    command = ["ps", "-o", "stat=", "-p", ",".join(map(str, pids))]
    states = subprocess.run(command, check=False, capture_output=True, text=True).stdout.split()
    return any(not state.startswith("Z") for state in states)


def _children(parent: int) -> list[int]:
    """Return the ids of the processes that `parent` started (Linux and macOS: ps)."""
    listing = subprocess.run(["ps", "-axo", "pid=,ppid="], check=True, capture_output=True, text=True).stdout
    pairs = [line.split() for line in listing.splitlines()]
    return [int(pid) for pid, ppid in pairs if int(ppid) == parent]
