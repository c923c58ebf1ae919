"""A private Redis server."""

import shutil
import socket
import tempfile
from pathlib import Path

from hack.servers.process import Process, free_port

_SETTINGS = {
    "bind": "127.0.0.1",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "databases": "512",
    "enable-debug-command": "yes",
}


class Redis:
    """A server with a data folder of its own and an append-only file, without a password."""

    def __init__(self, *, settings: dict[str, str] | None = None) -> None:
        """Choose folder and port; `settings` go over the defaults."""
        self._folder = Path(tempfile.mkdtemp(prefix="refold-redis-"))
        self.port = free_port()
        options = {**_SETTINGS, "dir": str(self._folder), "port": str(self.port), **(settings or {})}
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = Process(["redis-server", *arguments], self._folder / "log")

    def url(self, database: int = 0) -> str:
        """Return the URL of one of 512 databases, which are empty at first."""
        return f"redis://127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start and wait until commands are answered."""
        self._process.start(self._answers)

    def stop(self) -> None:
        """Stop cleanly."""
        self._process.stop()

    def kill(self) -> None:
        """Kill with -9."""
        self._process.kill()

    def restart(self) -> None:
        """Stop cleanly and start again on the same port and data."""
        self.stop()
        self.start()

    def lose(self, share: float) -> None:
        """Kill, and take a share of the append-only file's end away, as a crash of the machine might; start again."""
        self.kill()
        log = max((self._folder / "appendonlydir").glob("*.incr.aof"))
        with log.open("r+b") as file:
            file.truncate(int(log.stat().st_size * (1 - share)))
        self.start()

    def remove(self) -> None:
        """Kill the server and delete its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(100).startswith(b"+PONG")
        except OSError:
            return False
