"""Following a read model: server-sent events of a query service on a real PostgreSQL, to clients that come and go."""

import asyncio
import contextlib
import random
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import psycopg
import pytest
from refold import tokens
from refold.query import changes
from refold.web import sent_events

from hack.servers import Postgres
from tests import querying
from tests.querying import INCARNATION, SCHEMA, TOKEN, Model
from tests.served import Served
from tests.watching import Told, Watcher


@pytest.fixture
async def model(database: str) -> Model:
    model = await querying.make(database)
    await model.version()
    return model


@pytest.fixture
def served(model: Model, postgres: Postgres) -> Iterator[Served]:
    with querying.serve(model, postgres) as service:
        yield service


def watcher(served: Served, query: str = "", last_id: str = "") -> Watcher:
    return Watcher(served.url, TOKEN, f"/v1/changes{query}", last_id)


@contextlib.asynccontextmanager
async def open_(watching: Watcher) -> AsyncIterator[AsyncIterator[Told]]:
    async with asyncio.timeout(30), contextlib.aclosing(watching.told()) as told:
        yield told


async def until_position(told: AsyncIterator[Told]) -> tuple[dict[str, Any], Told]:
    """Return the rows that are told, and the position that ends them."""
    rows: dict[str, Any] = {}
    while (one := await anext(told)).type == "row":
        rows[one.data["key"]] = one.data["data"] and one.data["data"]["items"]
    assert one.type == "position"
    return rows, one


async def told_nothing(told: AsyncIterator[Told]) -> bool:
    """Whether nothing comes for a while; `told` is worth nothing afterwards."""
    try:
        async with asyncio.timeout(0.5):
            await anext(told)
    except TimeoutError:
        return True
    return False


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not happened():  # noqa: ASYNC110 (processes and counters tell nobody)
            await asyncio.sleep(0.02)


async def test_rows_are_told_as_they_are_and_after_each_change(model: Model, served: Served) -> None:
    model.put("a", items=1)
    model.put("b/c", items=2)
    model.put("other", items=3)
    async with open_(watcher(served, "?key=a&key=none&key=b%2Fc&key=a")) as told:
        rows, position = await until_position(told)
        assert rows == {"a": 1, "none": None, "b/c": 2}
        assert position.data["version"] == "v1"
        assert tokens.decode(position.data["position"])[0] == tokens.Position(INCARNATION, 0, 0)
        model.change({"a": 5, "other": 6}, partition=0, position=1)
        rows, position = await until_position(told)
        assert rows == {"a": 5}
        assert tokens.decode(position.data["position"])[0] == tokens.Position(INCARNATION, 0, 1)
        model.change({"a": None, "none": 7}, partition=1, position=1)
        assert (await until_position(told))[0] == {"a": None, "none": 7}
        model.change({"other": 8}, partition=1, position=2)  # what isn't watched moves the position alone
        assert (await until_position(told))[0] == {}


async def test_without_keys_it_tells_that_something_has_changed(model: Model, served: Served) -> None:
    watching = watcher(served)
    async with open_(watching) as told:
        assert await told_nothing(told)
    assert watching.last_id
    assert watching.retry_ms == 1000
    async with open_(watching) as told:  # nothing has changed meanwhile
        assert await told_nothing(told)
    model.change({"a": 1}, partition=0, position=1)
    async with open_(watching) as told:  # something has
        rows, position = await until_position(told)
        assert rows == {}
        assert tokens.decode(position.data["position"])[0].position == 1
        model.change({"a": 2}, partition=0, position=2)
        assert tokens.decode((await until_position(told))[1].data["position"])[0].position == 2


async def test_who_comes_again_hears_of_what_it_missed_and_of_nothing_where_it_missed_nothing(
    model: Model, served: Served, postgres: Postgres
) -> None:
    model.put("a", items=1)
    model.put("b", items=1)
    watching = watcher(served, "?key=a&key=b")
    async with open_(watching) as told:
        await until_position(told)
    async with open_(watching) as told:
        assert await told_nothing(told)
    model.change({"a": 2}, partition=0, position=1)
    with querying.serve(model, postgres) as replica:  # another one knows as much
        async with open_(watcher(replica, "?key=a&key=b", watching.last_id)) as told:
            rows, _ = await until_position(told)
            assert rows["a"] == 2
    async with open_(watcher(served, "?key=a&key=b", "an id of nobody's")) as told:
        assert (await until_position(told))[0] == {"a": 2, "b": 1}


async def test_who_is_cut_off_in_the_middle_of_the_rows_hears_of_all_again(model: Model, served: Served) -> None:
    keys = [f"k{number}" for number in range(5)]
    for key in keys:
        model.put(key, items=1)
    watching = watcher(served, "?" + "&".join(f"key={key}" for key in keys))
    async with open_(watching) as told:
        await anext(told)
    assert not watching.last_id
    async with open_(watching) as told:
        assert len((await until_position(told))[0]) == 5
    model.change(dict.fromkeys(keys, 2), partition=0, position=1)
    before = watching.last_id
    async with open_(watching) as told:
        await anext(told)
    assert watching.last_id == before
    async with open_(watching) as told:
        assert (await until_position(told))[0] == dict.fromkeys(keys, 2)


async def test_a_swap_tells_the_rows_that_it_changed(model: Model, served: Served) -> None:
    await model.version("v2")
    for key, live, next_ in [("a", 1, 1), ("b", 1, 2), ("c", None, 3)]:
        if live:
            model.put(key, "v1", items=live)
        model.put(key, "v2", items=next_)
    watching = watcher(served, "?key=a&key=b&key=c")
    async with open_(watching) as told:
        assert (await until_position(told))[0] == {"a": 1, "b": 1, "c": None}
        model.execute("update {s}.pointer set live = 'v2'")
        rows, position = await until_position(told)
        assert rows == {"b": 2, "c": 3}
        assert position.data["version"] == "v2"
    model.execute("update {s}.pointer set live = 'v1'")
    async with open_(watching) as told:
        assert (await until_position(told))[0] == {"a": 1, "b": 1, "c": None}


async def test_a_row_that_changes_as_a_parked_event_is_retried_is_told(model: Model, served: Served) -> None:
    model.put("a", items=1)
    model.execute(
        "insert into {s}.parked (version, incarnation, partition, position, key, subject, error)"
        " values ('v1', %s, 0, 3, 'a', 'a', 'no such key: total')",
        INCARNATION,
    )
    async with open_(watcher(served, "?key=a")) as told:
        await until_position(told)
        model.execute(
            'delete from {s}.parked; update {s}."rows_v1" set items = 2; '
            "update {s}.positions set unparked = unparked + 1 where partition = 0"
        )
        assert (await until_position(told))[0] == {"a": 2}


async def test_it_waits_for_a_token_and_refuses_what_it_cannot_watch(
    model: Model, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tokens.encode([tokens.Position(INCARNATION, 0, 3)])
    answer = served.ask("/v1/changes?key=a", headers={"refold-token": token, "prefer": "wait=0"})
    assert (answer.status, answer.json()["type"]) == (504, "https://refold.dev/problems/not-applied")
    for query in ["?where=items:eq:1", "?key=%00", "?" + "&".join(["key=a"] * 101)]:
        assert served.ask(f"/v1/changes{query}").status == 400
    assert served.ask("/v1/changes", token="").status == 401
    assert served.ask("/v1/changes", "HEAD").headers["content-type"].startswith("text/event-stream")
    monkeypatch.setattr(changes, "_MOST_WATCHED_KEYS", 3)
    async with open_(watcher(served, "?key=a&key=b")) as told:
        await until_position(told)
        answer = await asyncio.to_thread(served.ask, "/v1/changes?key=c&key=d")
        assert (answer.status, answer.json()["type"]) == (503, "https://refold.dev/problems/overloaded")
        async with open_(watcher(served, "?key=c")) as third:
            await until_position(third)
    async with asyncio.timeout(10), open_(watcher(served, "?key=c&key=d&key=e")) as told:  # the places are free again
        await until_position(told)


async def test_answers_end_with_the_service_and_after_some_minutes(
    model: Model, served: Served, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    with querying.serve(model, postgres) as stopping:
        watching = watcher(stopping)
        reading = asyncio.create_task(_read(watching))
        await until(lambda: watching.retry_ms is not None)
    await reading
    assert watching.complete
    monkeypatch.setattr(sent_events, "LIFETIME", 0.0)
    short = watcher(served)
    async with asyncio.timeout(10):
        await _read(short)
    assert short.complete


async def _read(watching: Watcher) -> None:
    async for _ in watching.told():
        pass


async def test_a_client_that_reads_nothing_is_cut_off_and_holds_up_nobody(
    model: Model, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sent_events, "PATIENCE", 1.0)
    model.put("big", plain="x" * 3_000_000, items=0)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", served.port))
        sock.sendall(f"GET /v1/changes?key=big HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode())
        async with open_(watcher(served, "?key=big")) as told:
            await until_position(told)
            for number in range(1, 6):
                model.change({"big": number}, partition=0, position=number)
                assert (await until_position(told))[0] == {"big": number}
        await asyncio.sleep(1.5)
        sock.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while await asyncio.to_thread(sock.recv, 1 << 20):
                pass  # what the kernel had taken; then it ends


async def test_the_read_store_may_go_and_come_back_while_somebody_watches(
    model: Model, served: Served, postgres: Postgres
) -> None:
    model.put("a", items=1)
    async with open_(watcher(served, "?key=a")) as told:
        await until_position(told)
        postgres.kill()
        await asyncio.to_thread(postgres.start)
        model.change({"a": 2}, partition=0, position=1)
        assert (await until_position(told))[0] == {"a": 2}


async def test_no_change_is_missed_by_who_leaves_and_comes_again_across_replicas_and_swaps(
    model: Model, served: Served, postgres: Postgres
) -> None:
    # Positions go up by one with each change of some rows, whose value is the position. So whoever has been told of a
    # position must know, of each row, at least the value of its last change up to there.
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    await model.version("v2")
    keys = [f"k{number}" for number in range(6)]
    history: dict[str, list[int]] = defaultdict(list)
    done = asyncio.Event()

    async def write() -> None:
        for position in range(1, 61):
            changed = chance.sample(keys, chance.randint(1, 3))
            for key in changed:
                history[key].append(position)
            for version in ("v2", "v1"):  # both versions, as the rule of a swap demands, at once
                await asyncio.to_thread(
                    model.change, dict.fromkeys(changed, position), partition=0, position=position, version=version
                )
            if chance.random() < 0.2:
                model.execute("update {s}.pointer set live = %s", chance.choice(["v1", "v2"]))
            await asyncio.sleep(chance.uniform(0, 0.12))
        done.set()

    async def follow(query: str, wanted: list[str], replicas: list[Served]) -> None:
        known: dict[str, int] = {}
        last_id, seen = "", 0
        while seen < 60:
            watching = watcher(chance.choice(replicas), query, last_id)
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                async with asyncio.timeout(chance.uniform(0.1, 1.5)), contextlib.aclosing(watching.told()) as told:
                    async for one in told:
                        if one.type == "row":
                            known[one.data["key"]] = (one.data["data"] or {"items": 0})["items"]
                            continue
                        seen = tokens.decode(one.data["position"])[0].position
                        for key in wanted:
                            last = max((at for at in history[key] if at <= seen), default=0)
                            assert known[key] >= last, (key, known[key], last, seen)
                        if seen == 60:
                            break
            last_id = watching.last_id
        assert done.is_set() or seen == 60
        assert {key: known[key] for key in wanted} == {key: max(history[key], default=0) for key in wanted}

    with querying.serve(model, postgres) as replica:
        async with asyncio.timeout(60):
            await asyncio.gather(
                write(),
                follow("?key=k0&key=k1&key=k2", keys[:3], [served, replica]),
                follow("?key=k2&key=k5", ["k2", "k5"], [served, replica]),
                follow("", [], [served, replica]),
            )
    with psycopg.connect(model.database) as connection:
        rows = connection.execute(f'select key, items from "{SCHEMA}"."rows_v1" order by key').fetchall()
    assert rows == [(key, max(history[key])) for key in keys if history[key]]
