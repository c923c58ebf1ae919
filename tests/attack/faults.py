"""`refold operator` that kills itself with -9 after so many effects: changes of Kafka, PostgreSQL or Kubernetes.

Run as a program it makes processes of the operator by forking, which costs a tenth of a start. Which effect is the
last one stands in a file, so that a process that runs already can be armed. Of the effects of a reconcile, and of kopf
on its behalf, none is left out; installing the stores and the Lease aren't such.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from kopf._cogs.clients import patching
from refold_operator import main
from refold_operator.cluster import Cluster
from refold_operator.kafka import Kafka
from refold_operator.readstore import ReadStore
from refold_operator.store import Store

from tests.operating import ROOT

_EFFECTS: dict[type, tuple[str, ...]] = {
    Kafka: ("create", "configure", "delete", "change_acls", "set_scram", "drop_scram"),
    Store: (
        "claim", "record_topic", "set_event_types", "activate", "release", "drop", "reader_login", "set_definition",
        "drop_definition", "drop_login",
    ),
    ReadStore: (
        "claim", "logins", "sql_login", "drop_sql_login", "ensure_version", "try_swap", "drop_version", "release",
        "drop",
    ),
    Cluster: ("apply", "create", "patch", "replace", "delete", "patch_status", "post_event"),
}  # fmt: skip
_INSTALLATION = "refold-system"
Effect = Callable[..., Awaitable[Any]]


class Fuse:
    """Counts effects since the file was written, and ends the process after as many as it says."""

    def __init__(self, file: Path) -> None:
        self._file, self._armed, self._count = file, "", 0

    def count(self, effect: str, *, begins: bool) -> None:
        """Note that an effect begins or has been made; doesn't return where it is the last one."""
        try:
            armed = self._file.read_text()
        except FileNotFoundError:
            armed = ""
        if armed != self._armed:
            self._armed, self._count = armed, 0
        if not armed:
            return
        self._count += not begins
        self._file.with_suffix(".count").write_text(str(self._count))
        # "after none" is before the first
        if self._count == int(armed.split()[1]) and (not begins or self._count == 0):
            sys.stderr.write(f"killed {'before' if begins else 'after'} {effect}, effect {self._count}\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, owner: Any, name: str) -> None:
        """Let a function that makes an effect be counted."""
        function: Effect = getattr(owner, name)

        @functools.wraps(function)
        async def counted(*args: Any, **kwargs: Any) -> Any:
            effect = f"{owner.__name__.rpartition('.')[2]}.{name}"
            if owner is Cluster:
                one = args[1]
                kind, where = (one["kind"], one["metadata"].get("namespace")) if isinstance(one, dict) else args[1:3]
                if where == _INSTALLATION:
                    return await function(*args, **kwargs)
                effect = f"{effect} ({kind})"
            self.count(effect, begins=True)
            result = await function(*args, **kwargs)
            self.count(effect, begins=False)
            return result

        setattr(owner, name, counted)


class Fuses:
    """Makes processes of the operator that can be armed; a context: the program that forks them runs.

    Attributes:
        file: which effect is the last one; without it, none is.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        """Keep what there is to keep in `folder`; `environment` is that of all processes."""
        self.file, self._log, self._marks = folder / "fuse", folder / "log", 0
        self._environment = environment
        self._pid: int | None = None

    def __enter__(self) -> "Fuses":
        self._forks = subprocess.Popen(
            [sys.executable, "-m", "tests.attack.faults"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **self._environment},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._forks.kill()
        self._forks.communicate()

    def start(self) -> None:
        """Start a process that isn't armed."""
        self.file.unlink(missing_ok=True)
        request = {"log": str(self._log), "fuse": str(self.file)}
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.write(json.dumps(request).encode() + b"\n")
        self._forks.stdin.flush()
        self._pid = int(self._forks.stdout.readline())

    def arm(self, effects: int) -> None:
        """Let the process that runs end after so many effects from now."""
        self._marks += 1
        made = self.file.with_suffix(".new")
        made.write_text(f"{self._marks} {effects}")
        made.rename(self.file)

    @property
    def counted(self) -> int:
        """Return how many effects there were since it was armed."""
        return int(self.file.with_suffix(".count").read_text())

    @property
    def running(self) -> bool:
        if self._pid is None:
            return False
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        if self.running and self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            while self.running:
                time.sleep(0.01)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def killed(self) -> list[str]:
        """Return where processes ended, in order."""
        return [line for line in self.log.splitlines() if line.startswith("killed ")]


def _run(request: dict[str, Any]) -> None:
    """Be a process of the operator."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, number)
    fuse = Fuse(Path(request["fuse"]))
    for owner, names in _EFFECTS.items():
        for name in names:
            fuse.wrap(owner, name)
    fuse.wrap(patching, "patch_obj")
    main.main()


def _fork() -> None:
    """Make a process for each line of the standard input and print its id."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for their exit codes
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            _run(json.loads(line))
            return
        print(pid, flush=True)


if __name__ == "__main__":
    _fork()
