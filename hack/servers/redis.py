"""Private Redis servers."""

import shutil
import socket
import tempfile
from pathlib import Path
from urllib.parse import quote

from hack.servers.process import Process, free_port

_CHART = Path(__file__).parents[2] / "charts" / "refold" / "files" / "redis"
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

    _ask, _answer = b"PING\r\n", b"+PONG"

    def __init__(self, *, settings: dict[str, str] | None = None) -> None:
        """Choose folder (`folder`) and port; `settings` go over the defaults."""
        self.folder = Path(tempfile.mkdtemp(prefix="refold-redis-"))
        self.port = free_port()
        options = {**_SETTINGS, "dir": str(self.folder), "port": str(self.port), **(settings or {})}
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._start_with(["redis-server", *arguments])

    def _start_with(self, command: list[str], **environment: str) -> None:
        self._process = Process(command, self.folder / "log", env=environment)

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
        log = max((self.folder / "appendonlydir").glob("*.incr.aof"))
        with log.open("r+b") as file:
            file.truncate(int(log.stat().st_size * (1 - share)))
        self.start()

    def remove(self) -> None:
        """Kill the server and delete its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(self._ask)
                return connection.recv(100).startswith(self._answer)
        except OSError:
            return False


class EmbeddedRedis(Redis):
    """A server as the chart starts it, with users in a file and the operator's among them."""

    # Who asks it is no user that may do more; two commands in one packet are answered in one.
    _ask, _answer = b"AUTH probe none\r\nPING\r\n", b"+OK\r\n+PONG"

    def __init__(self, password: str = "local") -> None:
        """Choose folder and port; `password` is the operator's."""
        super().__init__()
        self.use(password)

    def use(self, password: str) -> None:
        """Let the operator's password be another one from the next start on; the server doesn't run."""
        assert not self._process.running
        command = ["sh", str(_CHART / "serve.sh"), str(_CHART / "redis.conf")]
        settings = ["--bind", "127.0.0.1", "--port", str(self.port), "--maxmemory", "256mb"]
        self._start_with([*command, *settings], REFOLD_REDIS_DATA=str(self.folder), REFOLD_ADMIN_PASSWORD=password)
        self.admin_url = f"redis://refold_admin:{quote(password, safe='')}@127.0.0.1:{self.port}/0"
