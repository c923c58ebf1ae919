"""A private PostgreSQL server."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from hack.servers.process import Process, free_port

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "300",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "fsync": "on",
    "synchronous_commit": "on",
    "log_min_messages": "warning",
    # After a kill, recovery would else open and sync each file of the hundreds of databases that tests make: a minute.
    **({"recovery_init_sync_method": "syncfs"} if sys.platform == "linux" else {}),
}


def _programs() -> Path:
    """Return the folder of PostgreSQL's server programs: from the PATH, else Debian's newest."""
    found = shutil.which("postgres")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in candidates:
        if (folder / "initdb").exists():
            return folder
    raise RuntimeError("PostgreSQL's server programs are missing: run hack/servers/install.sh")


class Postgres:
    """A server with a data folder of its own; the superuser is `postgres`, without a password."""

    def __init__(self, *, settings: dict[str, str] | None = None) -> None:
        """Choose folder and port; `settings` go to postgresql.conf over the defaults."""
        programs = _programs()
        # root may not run PostgreSQL; Debian's package brings the user
        self._user = "postgres" if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="refold-postgres-"))
        self.port = free_port()
        self._programs = programs
        data = self._folder / "data"
        if self._user:
            shutil.chown(self._folder, self._user)
        initdb = f"{programs}/initdb -D {data} -U postgres -A trust -E UTF8 --locale C.UTF-8"
        subprocess.run(initdb.split(), check=True, stdout=subprocess.DEVNULL, user=self._user, cwd=self._folder)
        options = {**_SETTINGS, "unix_socket_directories": str(self._folder), **(settings or {})}
        with (data / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in options.items())
        self._process = Process(
            [str(programs / "postgres"), "-D", str(data), "-p", str(self.port)],
            self._folder / "log", user=self._user,
        )  # fmt: skip

    def dsn(self, database: str = "postgres", *, user: str = "postgres", password: str | None = None) -> str:
        """Return a connection URI."""
        secret = f":{password}" if password else ""
        return f"postgresql://{user}{secret}@127.0.0.1:{self.port}/{database}"

    @property
    def log(self) -> Path:
        """Return the file of the server's log, of all its starts."""
        return self._process.log

    def start(self) -> None:
        """Start and wait until queries are answered."""
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        self._process.start(lambda: subprocess.run(ready, check=False).returncode == 0)

    def stop(self) -> None:
        """Stop at once but cleanly (fast shutdown)."""
        self._process.stop(signal.SIGINT)

    def kill(self) -> None:
        """Kill with -9 the server and all its backends."""
        self._process.kill()

    def restart(self) -> None:
        """Stop cleanly and start again on the same port and data."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Kill the server and delete its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
