"""The event store's process under load: what waits is bounded, a slow reader slows nobody, a stop is graceful."""

import asyncio
import contextlib
import json
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import AsyncConnection
from refold.eventstore.catalog import Stream

from hack.servers import Postgres
from hack.servers.callers import tokens_file
from hack.servers.process import Process, free_port
from tests.served import Served
from tests.stores import Installed, check_history, connected, install

TOKEN = "t0ken"
CONNECTIONS = 10_000
#: Open files beside those of the connections.
_OTHER_FILES = 200
_MB = 1024 * 1024
_PROGRAM = "from refold.web import server; server.GRACE_SECONDS = {grace}; from refold.cli.main import app; app()"


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    """A store for all tests of this module; each has a stream of its own."""
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database under_load")
    return await install(postgres.dsn("under_load"))


@pytest.fixture
async def stream(installed: Installed, request: pytest.FixtureRequest) -> Stream:
    return await installed.stream(f"s{abs(hash(request.node.name))}")


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process, and those that it starts, have an open file for each connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < CONNECTIONS + _OTHER_FILES:
        pytest.skip(f"a process may have {hard} open files here, {CONNECTIONS} connections need more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (CONNECTIONS + _OTHER_FILES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Eventstore(Process):
    """A real process, as the chart runs it."""

    def __init__(self, installed: Installed, folder: Path, *, grace: float = 25, **settings: str) -> None:
        self.api = Served(free_port(), TOKEN)
        env = {"REFOLD_STORE_DSN": installed.service, "REFOLD_AUTH": tokens_file(TOKEN, folder), **settings}
        super().__init__(
            [sys.executable, "-c", _PROGRAM.format(grace=grace), "eventstore"], folder / "log",
            env={**env, "REFOLD_PORT": str(self.api.port)},
        )  # fmt: skip

    def __enter__(self) -> "Eventstore":
        self.start(self._ready, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _ready(self) -> bool:
        try:
            return self.api.ask("/readyz").status == 200
        except OSError:
            return False

    def metric(self, name: str) -> float:
        lines = self.api.ask("/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def megabytes(self, field: str = "VmRSS") -> float:
        """Return the process's memory: VmRSS is what it has now, VmHWM the most that it ever had."""
        path = Path(f"/proc/{self.pid}/status")
        if not path.exists():
            pytest.skip("a process's memory is read from /proc, which isn't there")
        line = next(line for line in path.read_text().splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) / 1024

    def ended(self, seconds: float) -> int:
        """Wait until the process has ended by itself; return its exit code."""
        assert self._child is not None
        return self._child.wait(seconds)


def request(target: str, method: str = "GET", body: bytes = b"") -> bytes:
    head = (
        f"{method} {target} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def append_request(stream: Stream, subject: str, id: str, *, size: int = 300) -> bytes:  # noqa: A002
    event = {"id": id, "type": "Happened", "data": {"text": "x" * size}}
    return request(f"/v1/streams/shop/{stream.name}/subjects/{subject}/events", "POST", json.dumps(
        {"expectedRevision": "any", "events": [event]}
    ).encode())  # fmt: skip


@contextmanager
def connections(port: int, count: int, *, receive_buffer: int | None = None) -> Iterator[list[socket.socket]]:
    """Open so many connections at once."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(60)
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.connect(("127.0.0.1", port))
            opened.append(sock)
        yield opened


def statuses(opened: Sequence[socket.socket]) -> list[int]:
    """Return the status of each one's next answer, which is short."""
    return [int(sock.recv(65536).split(b" ", 2)[1]) for sock in opened]


@asynccontextmanager
async def heads_locked(installed: Installed) -> AsyncIterator[AsyncConnection]:
    """Hold the heads of all streams: appends wait in the database until it is left, or rolled back before."""
    async with connected(installed.superuser) as conn, conn.transaction():
        await conn.execute("select from refold.heads for update")
        yield conn


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (of another process)
            await asyncio.sleep(0.05)


async def waiting(eventstore: Eventstore, count: int) -> None:
    await until(lambda: eventstore.metric("refold_waiting_appends") >= count)


def test_ten_thousand_idle_connections_take_little_and_all_are_served(
    installed: Installed, stream: Stream, tmp_path: Path, many_files: None
) -> None:
    with Eventstore(installed, tmp_path) as eventstore, connections(eventstore.api.port, CONNECTIONS) as opened:
        for sock in opened:
            sock.sendall(request("/healthz"))
        assert set(statuses(opened)) == {200}
        assert eventstore.megabytes() < 150
        began = time.monotonic()
        opened[0].sendall(append_request(stream, "s", "1"))
        assert statuses(opened[:1]) == [201]
        assert time.monotonic() - began < 2
        for sock in opened:
            sock.sendall(request("/healthz"))
        assert set(statuses(opened)) == {200}
        assert eventstore.megabytes("VmHWM") < 150


async def test_ten_thousand_appends_wait_in_little_and_further_ones_are_refused_at_once(
    installed: Installed, stream: Stream, tmp_path: Path, many_files: None
) -> None:
    with Eventstore(installed, tmp_path) as eventstore, connections(eventstore.api.port, CONNECTIONS) as opened:
        async with heads_locked(installed):
            for number, sock in enumerate(opened):
                sock.sendall(append_request(stream, f"s{number % 500}", str(number)))
            await waiting(eventstore, CONNECTIONS)
            began = time.monotonic()
            refused = eventstore.api.ask(
                f"/v1/streams/shop/{stream.name}/transactions", "POST",
                body=b'{"appends":[{"subject":"s","events":[{"id":"a","type":"Happened","data":1}]}]}',
            )  # fmt: skip
            assert time.monotonic() - began < 2
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert "waitingAppends is 10000" in refused.json()["detail"]
            assert eventstore.megabytes() < 300
        assert set(statuses(opened)) == {201}
        assert eventstore.megabytes("VmHWM") < 300
    history = await installed.history(stream)
    check_history(history)
    assert {row[4] for row in history} == {str(number) for number in range(CONNECTIONS)}


async def test_beyond_the_bound_of_bytes_appends_and_bodies_are_refused_at_once(
    installed: Installed, stream: Stream, tmp_path: Path
) -> None:
    with (
        Eventstore(installed, tmp_path, REFOLD_WAITING_BYTES=str(_MB)) as eventstore,
        connections(eventstore.api.port, 40) as opened,
    ):
        async with heads_locked(installed):
            for number, sock in enumerate(opened[:20]):
                sock.sendall(append_request(stream, "s", str(number), size=100_000))
            await waiting(eventstore, 11)  # the eleventh is the first that is over it
            # Bodies that never come to their end: what has arrived of them is held too.
            for sock in opened[20:]:
                sock.sendall(append_request(stream, "s", "late", size=200_000)[:-100_000])
            await until(lambda: sum(map(_answered, opened[:20])) == 9, 10)
            await until(lambda: sum(map(_answered, opened[20:])) >= 9, 10)
            assert eventstore.metric("refold_waiting_appends") == 11
        assert sorted(statuses(opened[:20])) == [201] * 11 + [503] * 9


def _answered(sock: socket.socket) -> bool:
    """Tell whether an answer has begun to come, and take nothing of it."""
    sock.setblocking(False)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        sock.settimeout(60)


async def test_slow_readers_slow_nobody_and_the_process_holds_little_for_each(
    installed: Installed, stream: Stream, tmp_path: Path
) -> None:
    history = f"/v1/streams/shop/{stream.name}/subjects/large/events"
    slow, events, size = 8, 50, 400_000
    with Eventstore(installed, tmp_path) as eventstore:
        api = eventstore.api
        for first in range(0, events, 10):
            content = {"events": [
                {"id": str(number), "type": "Happened", "data": {"text": "x" * size}}
                for number in range(first, first + 10)
            ]}  # fmt: skip
            assert api.ask(history, "POST", body=json.dumps(content).encode()).status == 201
        assert len(api.ask(history).json()["events"]) == events  # what one reader takes is in the peak before
        before = eventstore.megabytes("VmHWM")
        with (
            connections(api.port, slow, receive_buffer=4096) as readers,
            connections(api.port, slow, receive_buffer=4096) as watchers,
        ):
            for reader, watcher in zip(readers, watchers, strict=True):
                reader.sendall(request(history))
                watcher.sendall(request(f"{history}:watch"))
            for number in range(40):
                began = time.monotonic()
                found = api.ask(f"/v1/streams/shop/{stream.name}/subjects/small/events", "POST", body=json.dumps(
                    {"events": [{"id": str(number), "type": "Happened", "data": {}}]}
                ).encode())  # fmt: skip
                assert found.status == 201
                assert time.monotonic() - began < 2
            assert len(api.ask(history).json()["events"]) == events
            # All of it 16 times would be 320 MB. A page has 2 MB, and is held as events, JSON, and what is on its way.
            assert eventstore.megabytes("VmHWM") - before < 2 * slow * 8
            assert await asyncio.to_thread(_read_to_end, readers[0]) > events * size
            watched = 0
            while watched < events * size:
                watched += len(watchers[0].recv(_MB))


def _read_to_end(sock: socket.socket) -> int:
    """Return how many bytes a chunked answer has."""
    size, last = 0, b""
    while not last.endswith(b"0\r\n\r\n"):
        piece = sock.recv(_MB)
        assert piece, "the answer broke off"
        size += len(piece)
        last = (last + piece)[-10:]
    return size


class Appender:
    """A client that appends one event after the other on one connection, until the server ends it."""

    def __init__(self, stream: Stream, number: int) -> None:
        self._stream = stream
        self._number = number
        self.acknowledged: list[str] = []
        self.refused: list[bytes] = []
        self.torn = False

    async def run(self, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in range(1_000_000):
            id = f"{self._number}-{number}"  # noqa: A001
            head = b""
            try:
                writer.write(append_request(self._stream, f"s{number % 7}", id))
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
                await reader.readexactly(int(length.partition(b": ")[2]))
            except asyncio.IncompleteReadError as error:
                self.torn = bool(head or error.partial)
                break
            except ConnectionError:  # it was closed while this request was on its way
                self.torn = bool(head)
                break
            if head.startswith(b"HTTP/1.1 201"):
                self.acknowledged.append(id)
            else:
                self.refused.append(head)
        writer.close()


async def test_a_stop_finishes_what_is_under_way_and_keeps_all_that_was_acknowledged(
    installed: Installed, stream: Stream, tmp_path: Path
) -> None:
    appenders = [Appender(stream, number) for number in range(32)]
    with Eventstore(installed, tmp_path) as eventstore, connections(eventstore.api.port, 100) as idle:
        async with asyncio.TaskGroup() as running:
            for appender in appenders:
                running.create_task(appender.run(eventstore.api.port))
            await until(lambda: sum(len(appender.acknowledged) for appender in appenders) > 500)
            began = time.monotonic()
            eventstore.send(signal.SIGTERM)
        assert await asyncio.to_thread(eventstore.ended, 10) == 0
        assert time.monotonic() - began < 10
        assert [sock.recv(1) for sock in idle] == [b""] * 100
    history = await installed.history(stream)
    check_history(history)
    assert {id for appender in appenders for id in appender.acknowledged} <= {row[4] for row in history}  # noqa: A001
    assert [appender.refused for appender in appenders] == [[]] * 32
    assert not any(appender.torn for appender in appenders)


async def test_a_stop_ends_in_time_though_the_database_and_a_reader_stand_still(
    installed: Installed, stream: Stream, tmp_path: Path
) -> None:
    with Eventstore(installed, tmp_path, grace=1) as eventstore:
        content = {"events": [{"id": str(n), "type": "Happened", "data": "x" * 400_000} for n in range(10)]}
        history = f"/v1/streams/shop/{stream.name}/subjects/large/events"
        assert eventstore.api.ask(history, "POST", body=json.dumps(content).encode()).status == 201
        with (
            connections(eventstore.api.port, 3) as appends,
            connections(eventstore.api.port, 1, receive_buffer=4096) as readers,
        ):
            readers[0].sendall(request(history))
            async with heads_locked(installed) as conn:
                for number, sock in enumerate(appends):
                    sock.sendall(append_request(stream, "s", f"stuck-{number}"))
                await waiting(eventstore, 3)
                began = time.monotonic()
                eventstore.send(signal.SIGTERM)
                assert await asyncio.to_thread(eventstore.ended, 15) == 0
                assert time.monotonic() - began < 10
                # Whether they took effect isn't known; here the database goes on without who asked, and gives up.
                assert statuses(appends) == [503] * 3
                await conn.execute("select 1")
    check_history(await installed.history(stream))
