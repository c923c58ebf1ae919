"""Watching events over HTTP: server-sent events from processes that are killed, to clients that leave or don't read."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from refold import tokens
from refold.eventstore import EventStore, catalog, metrics, server
from refold.eventstore.settings import Settings
from refold.web import sent_events

from hack.servers import Postgres
from hack.servers.callers import tokens_file
from hack.servers.process import Process, free_port
from tests.served import Served, serve
from tests.stores import Installed, Log, connected, event, install
from tests.watching import Told, Watcher

TOKEN = "t0ken"
STREAM = "/v1/streams/shop/orders"


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database event_stream")
    return await install(postgres.dsn("event_stream"))


@pytest.fixture(scope="module")
async def log(installed: Installed) -> AsyncIterator[Log]:
    """shop/orders, appended to by another process than the one that is watched at."""
    stream = await installed.stream()
    async with await EventStore.open(installed.service) as store:
        yield Log(installed, store, stream)


@pytest.fixture(scope="module")
def api(log: Log) -> Iterator[Served]:
    settings = Settings(store_dsn=log.installed.service, auth=tokens_file(TOKEN), live_readers=3)
    with serve(server.make(settings), TOKEN) as served:
        yield served


def watcher(api: Served, path: str, last_id: str = "") -> Watcher:
    return Watcher(api.url, TOKEN, STREAM + path, last_id)


async def take(watcher: Watcher, count: int) -> list[Told]:
    found = []
    async with asyncio.timeout(30), contextlib.aclosing(watcher.told()) as told:
        while len(found) < count:
            found.append(await anext(told))
    return found


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not happened():  # noqa: ASYNC110 (processes and counters tell nobody)
            await asyncio.sleep(0.02)


async def test_an_event_has_an_id_its_type_and_its_data_as_reads_give_it(api: Served, log: Log) -> None:
    await log.add(
        "form",
        event({"text": "a\nb\u2028\u2029\u0085", "n": 1}, type="Größe"),
        event(None, type="two\nlines"),
        event(None, type="end\u0085"),
    )
    read = api.ask(STREAM + "/subjects/form/events").json()["events"]
    watching = watcher(api, "/subjects/form/events:watch")
    first, second, third = await take(watching, 3)
    assert (first.type, first.data) == ("Größe", read[0])
    assert (second.type, second.data) == ("message", read[1])
    assert (third.type, third.data) == ("message", read[2])
    assert watching.retry_ms == 1000
    assert tokens.decode(first.last_id)[0].position == read[0]["position"]


async def test_a_client_goes_on_after_the_last_id_and_after_what_it_asks_for(api: Served, log: Log) -> None:
    last = await log.add("resume", *(event(n) for n in range(6)))
    path = "/subjects/resume/events:watch"
    watching = watcher(api, path)
    data = [one.data["data"] for _ in range(3) for one in await take(watching, 2)]
    assert data == list(range(6))
    assert [one.data["data"] for one in await take(watcher(api, path + "?after=4"), 2)] == [4, 5]
    # the header goes before the query, as an EventSource that comes again sends both
    assert [one.data["data"] for one in await take(watcher(api, path + "?after=now", watching.last_id), 0)] == []
    partition = f"/partitions/{last.partition}/events:watch?after={last.position - 1}"
    assert [one.data["data"] for one in await take(watcher(api, partition), 1)] == [5]
    whole = watcher(api, f"/events:watch?after={last.token}")
    assert all(one.data["partition"] != last.partition for one in await take(whole, 0))


async def test_a_client_that_is_cut_off_before_the_first_event_misses_none(api: Served, log: Log) -> None:
    watching = watcher(api, "/events:watch?after=now")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5), contextlib.aclosing(watching.told()) as told:
            await anext(told)
    assert watching.last_id
    await log.add("missed", event("meanwhile"))
    assert [one.data["data"] for one in await take(watching, 1)] == ["meanwhile"]


def refused(api: Served, path: str, status: int, slug: str, **headers: str) -> Any:
    answer = api.ask(STREAM + path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json()["type"].endswith("/" + slug)
    return answer


async def test_what_cant_be_watched_is_a_problem(api: Served, log: Log) -> None:
    foreign = tokens.encode([tokens.Position("0" * 16, 0, 1)])
    for path in ("/events:watch", "/partitions/0/events:watch", "/subjects/s/events:watch"):
        refused(api, path, 410, "other-history", last_event_id=foreign)
        refused(api, path, 410, "other-history", last_event_id=f"{'0' * 16}.1.1.1")
        refused(api, path + "?after=nonsense", 400, "invalid-token")
        refused(api, path + "?from=1", 400, "invalid-query")
        assert api.ask(STREAM + path, "HEAD").headers["content-type"].startswith("text/event-stream")
    refused(api, "/subjects/s/events:watch?after=99", 410, "other-history")
    refused(api, "/partitions/3/events:watch", 404, "stream-not-found")
    refused(api, "/partitions/x/events:watch", 404, "stream-not-found")
    refused(api, "/subjects/%00/events:watch", 422, "invalid-append")
    assert api.ask("/v1/streams/shop/nothing/events:watch").status == 404
    assert api.ask(STREAM + "/events:watch", token="wrong").status == 401


async def test_readers_are_bounded_and_a_silent_one_gets_heartbeats(
    api: Served, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sent_events, "HEARTBEAT", 0.05)
    watching = [watcher(api, "/events:watch?after=now") for _ in range(3)]
    reading = [asyncio.create_task(take(one, 1)) for one in watching]
    await until(lambda: all(one.heartbeats >= 3 for one in watching))
    answer = await asyncio.to_thread(refused, api, "/events:watch", 503, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1
    await log.add("bounded", event("x"))
    assert [[one.data["data"] for one in found] for found in await asyncio.gather(*reading)] == [["x"]] * 3
    async with asyncio.timeout(10):  # their places are free again, once the process has seen that they are gone
        while True:
            try:
                await take(watcher(api, "/events:watch"), 1)
                break
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 503:
                    raise


async def test_a_reader_that_doesnt_read_is_cut_off_and_an_answer_ends_when_its_time_is_up(
    api: Served, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sent_events, "PATIENCE", 0.5)
    text = "x" * 100_000
    for _ in range(20):
        await log.add("cut", *(event(text) for _ in range(5)))
    cut = metrics.LIVE_CUT._value.get()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else some kernels take all of it for the client
        sock.connect(("127.0.0.1", api.port))
        sock.sendall(f"GET {STREAM}/subjects/cut/events:watch HTTP/1.1\r\nhost: x\r\n".encode())
        sock.sendall(f"authorization: Bearer {TOKEN}\r\n\r\n".encode())
        await until(lambda: metrics.LIVE_CUT._value.get() > cut)
    monkeypatch.setattr(sent_events, "LIFETIME", 0.0)
    watching = watcher(api, "/subjects/cut/events:watch")
    assert [one async for one in watching.told()] == []
    assert watching.complete


async def test_a_watched_stream_that_is_dropped_ends_the_answer_and_refuses_the_id(
    api: Served, installed: Installed
) -> None:
    stream = await installed.stream("gone")
    async with await EventStore.open(installed.service) as store:
        await Log(installed, store, stream).append("s", "1")
    watching = Watcher(api.url, TOKEN, "/v1/streams/shop/gone/events:watch")
    async with asyncio.timeout(20), contextlib.aclosing(watching.told()) as told:
        assert (await anext(told)).data["id"] == "1"
        assert stream.uid is not None
        async with connected(installed.admin) as conn:
            await catalog.drop_stream(conn, namespace="shop", name="gone", uid=stream.uid)
        with pytest.raises(StopAsyncIteration):
            await anext(told)
    assert watching.complete
    await installed.stream("gone")
    with pytest.raises(httpx.HTTPStatusError) as refusal:
        await take(watching, 1)
    assert refusal.value.response.json()["type"].endswith("/other-history")


@pytest.fixture
def process(log: Log, tmp_path: Path) -> Iterator[tuple[Process, Served]]:
    """The event store's own process, to be started, killed and stopped."""
    port = free_port()
    env = {
        "REFOLD_STORE_DSN": log.installed.service,
        "REFOLD_AUTH": tokens_file(TOKEN),
        "REFOLD_PORT": str(port),
    }
    api = Served(port, TOKEN)
    found = Process(
        [sys.executable, "-c", "from refold.cli.main import app; app()", "eventstore"],
        tmp_path / "log", env=env,
    )  # fmt: skip
    found.start(lambda: ready(api))
    yield found, api
    found.kill()


def ready(api: Served) -> bool:
    try:
        return api.ask("/readyz").status == 200
    except OSError:
        return False


async def test_clients_and_the_process_are_killed_while_two_processes_append_and_nothing_is_lost_or_told_twice(
    process: tuple[Process, Served], installed: Installed
) -> None:
    server_process, api = process
    stream = await installed.stream("killed")
    done = {f"worker-{n}": 0 for n in range(4)}
    appenders = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.appender", installed.service, "killed",
            json.dumps(dict.fromkeys(list(done)[at::2], 0)), stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        for at in range(2)
    ]  # fmt: skip
    wanted: dict[str, list[tuple[int, int]]] = {}  # by path, once nobody appends any more
    told: dict[str, list[Any]] = {}
    paths = ["/events:watch", "/events:watch?after=0", "/subjects/shared/events:watch", "/partitions/0/events:watch"]

    async def follow(number: int, path: str) -> None:
        watching = Watcher(api.url, TOKEN, "/v1/streams/shop/killed" + path)
        found = told[path] = []
        while True:
            # whoever has all of history looks once more, for what would be told twice
            had_all = path in wanted and len(found) >= len(wanted[path])
            with contextlib.suppress(httpx.HTTPError, TimeoutError):
                # every answer is left after some events, and each may break off where the server is killed
                async with asyncio.timeout(1.5), contextlib.aclosing(watching.told()) as answers:
                    async for one in answers:
                        found.append(one.data)
                        if len(found) % (200 + 50 * number) == 0:
                            break
                continue
            if had_all:
                return
            await asyncio.sleep(0.1)

    following = [asyncio.create_task(follow(number, path)) for number, path in enumerate(paths)]
    for _ in range(3):
        await asyncio.sleep(0.7)
        server_process.kill()
        await asyncio.to_thread(server_process.start, lambda: ready(api))
    for appender in appenders:
        appender.terminate()
        await appender.wait()
    history = await installed.history(stream)
    assert len(history) > 100
    for path in paths:
        wanted[path] = [
            (row[0], row[1])
            for row in history
            if ("shared" not in path or row[2] == "shared") and ("partitions" not in path or row[0] == 0)
        ]
    with contextlib.suppress(TimeoutError):  # then something is missing, as is told below
        async with asyncio.timeout(120):
            await asyncio.gather(*following)
    for path, found in told.items():
        got = [(one["partition"], one["position"]) for one in found]
        assert sorted(got, key=lambda place: place[0]) == wanted[path]


def memory(pid: int) -> int:
    """Return the bytes of memory that a process holds."""
    with open(f"/proc/{pid}/statm") as file:  # noqa: PTH123 (no file)
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_readers_that_stop_reading_keep_memory_bounded_and_the_others_at_full_speed(
    process: tuple[Process, Served], installed: Installed
) -> None:
    server_process, api = process
    stream = await installed.stream("slow")
    path = "/v1/streams/shop/slow/events:watch"
    async with await EventStore.open(installed.service) as store:
        log = Log(installed, store, stream)
        stuck = []
        for _ in range(20):
            sock = socket.create_connection(("127.0.0.1", api.port))
            sock.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode())
            assert sock.recv(1)  # its answer has begun
            stuck.append(sock)
        quick = Watcher(api.url, TOKEN, path)
        reading = asyncio.create_task(take(quick, 20_000))
        before = memory(server_process.pid)
        data = {"text": "x" * 2000}
        for batch in range(200):
            await log.add(f"s{batch % 50}", *(event(data) for _ in range(100)))
        assert len({one.last_id for one in await reading}) == 20_000
        # 40 MB were told to one reader and wanted by 20 more
        assert memory(server_process.pid) - before < 60 * 2**20
        server_process.send(signal.SIGTERM)
        await until(lambda: not server_process.running)  # it doesn't wait for those that don't read
        for sock in stuck:
            sock.close()


async def test_a_graceful_stop_ends_the_answers_cleanly(process: tuple[Process, Served], log: Log) -> None:
    server_process, api = process
    await log.add("stop", event(1))
    watching = watcher(api, "/subjects/stop/events:watch")
    async with asyncio.timeout(10), contextlib.aclosing(watching.told()) as told:
        await anext(told)
        server_process.send(signal.SIGTERM)
        with pytest.raises(StopAsyncIteration):
            await anext(told)
        assert watching.complete
    await until(lambda: not server_process.running)
