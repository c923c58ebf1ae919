"""Rows as they were at a moment, of a real event store, beside the read model that a real projector folds."""

import asyncio
import datetime as dt
import json
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from refold import names
from refold.projection.definition import Definition
from refold.projection.readstore import postgres as readstore
from refold.query import histories
from refold.query.server import app
from refold.query.settings import Settings
from refold_operator.database import Database
from refold_operator.store import Store as EventStore

from hack.servers.callers import tokens_file
from tests import served
from tests.parking import TOKEN, ask, kind, listed
from tests.projecting import CUSTOMERS, HISTORIES, NAMESPACE, ORDERS, ReadModel, World, random_events
from tests.readstores import Store
from tests.served import Answer, Served

PASSWORD = "h" * 43


async def history_login(world: World, *, reads: bool = True) -> str:
    """Return the DSN by which a query service reads histories, with the rights that the operator gives."""
    database = Database(world.dsn, "event store")
    await database.open()
    try:
        store = EventStore(database)
        stream = await store.stream(NAMESPACE, "orders")
        assert stream is not None
        name = conninfo_to_dict(world.dsn)["dbname"]
        role = names.resource_role(str(name), names.read_schema(NAMESPACE, "p"), "past")
        return await store.reader_login(role, PASSWORD, [stream] if reads else [])
    finally:
        await database.close()


@contextmanager
def serve(model: ReadModel, url: str, dsn: str | None) -> Iterator[Served]:
    settings = Settings.model_validate(
        {
            "projection": f"{NAMESPACE}/{model.name}",
            "readstore_dsn": url,
            "store_dsn": dsn,
            "auth": tokens_file(TOKEN),
        }
    )
    with served.serve(app(settings), TOKEN) as service:
        yield service


def row(service: Served, key: str, at: object = None) -> Answer:
    return service.ask(f"/v1/rows/{quote(key, safe='')}" + ("" if at is None else f"?at={quote(str(at))}"))


def data(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    return json.loads(answer.body, parse_float=Decimal)["data"]


@pytest.mark.parametrize("definition", [ORDERS, HISTORIES], ids=["orders", "histories"])
async def test_the_row_at_the_last_event_is_the_read_models_and_each_moment_is_what_it_was(
    store: Store, world: World, definition: Definition
) -> None:
    model = await world.projection_in(store, definition, "p")
    dsn = await history_login(world)
    seen: dict[str, dict[int, Any]] = {}
    with model.projector(), serve(model, store.url, dsn) as service:
        for round_ in range(4):
            events = random_events(120, subjects=15, seed=round_)
            # What fails is parked, with all behind it.
            world.append([*events, (f"order-{round_}", "Placed", {"items": 1, "note": "n"})])
            model.wait()
            for key in {event.subject for log in world.events["orders"] for event in log}:
                now, revision = row(service, key), world.revisions["orders", key]
                then = row(service, key, revision)
                assert then.status == now.status, (key, now.body, then.body)
                if now.status == 200:
                    assert data(now) == data(then)
                seen.setdefault(key, {})[revision] = now.json().get("data")
        parked = listed(service)
        assert parked
        for one in parked[:2]:  # what is discarded there, is here
            ask(service, "discard", one["id"])
        for key in seen:
            now, then = row(service, key), row(service, key, 10**17)
            assert then.status == now.status
            if now.status == 200:
                assert data(now) == data(then)
            stops = [one for one in listed(service, f"?key={key}") if "follows" not in one["error"]]
            at = int(then.headers["refold-revision"])
            assert (at == world.revisions["orders", key]) is (not stops)
            if stops:
                assert then.headers["refold-parked-revision"] == str(at + 1)
        # Earlier moments are as they were: of a row that has nothing set aside.
        for key in seen.keys() - {one["key"] for one in parked}:
            for revision, before in seen[key].items():
                then = row(service, key, revision)
                assert then.json().get("data") == before
                assert then.headers["refold-revision"] == str(revision)


async def test_a_moment_is_named_by_a_revision_or_a_time(world: World) -> None:
    model = await world.projection(ORDERS, "p")
    good = {"items": 1, "total": 0.10}
    events = world.store([("a/b", "Placed", good), ("a/b", "Changed", {"items": 2, "total": 1}), ("x", "Placed", good)])
    events += world.store([("a/b", "Purged", {}), ("a/b", "Shipped", {})])
    first, second, _, purged, _ = [event.time for event in events]
    with serve(model, world.dsn, await history_login(world)) as service:
        answer = row(service, "a/b", 2)
        assert answer.body == b'{"key":"a/b","data":{"status":"placed","items":3,"total":1.1}}'
        assert (answer.headers["refold-revision"], "refold-lag-events" in answer.headers) == ("2", False)
        again = service.ask("/v1/rows/a%2Fb?at=2", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status, again.body, again.headers["refold-revision"]) == (304, b"", "2")
        for at, items in [(1, 1), (first.isoformat(), 1), (second.isoformat(), 3)]:
            assert data(row(service, "a/b", at))["items"] == items
        assert data(row(service, "a/b", "2100-01-01T00:00:00Z")) == {"status": "shipped", "items": None, "total": None}
        assert row(service, "a/b", 99).headers["refold-revision"] == "4"
        for key, at, detail in [
            ("a/b", purged.isoformat(), "after event 3 of its subject"),
            ("a/b", (first - dt.timedelta(microseconds=1)).isoformat(), "had no events by then"),
            ("nobody", 1, "had no events by then"),
            ("k" * 600, 1, "had no events by then"),
        ]:
            answer = row(service, key, at)
            assert kind(answer) == (404, "row-not-found")
            assert detail in answer.json()["detail"]
        for query, field in [
            ("at=0", "at"),
            ("at=yesterday", "at"),
            ("at=", "at"),
            ("at=2026-01-01T00:00:00", "at"),
            ("at=1&at=2", "at"),
            ("At=1", "At"),
            ("at=%00", "at"),
            ("steps=3", "steps"),
        ]:
            answer = service.ask(f"/v1/rows/x?{query}")
            assert kind(answer) == (400, "invalid-query"), query
            assert answer.json()["field"] == field
        assert kind(service.ask("/v1/rows/%00?at=1")) == (400, "invalid-key")
        assert service.ask("/v1/rows/x?at=1", token="wrong").status == 401


async def test_the_history_of_a_row_tells_what_each_event_did(world: World) -> None:
    model = await world.projection(ORDERS, "p")
    good = {"items": 1, "total": 0.10}
    world.store([("a", "Placed", good), ("a", "Noted", {}), ("a", "Purged", {}), ("a", "Changed", {"items": 1})])
    with serve(model, world.dsn, await history_login(world)) as service:
        answer = service.ask("/v1/rows/a/history")
        assert answer.status == 200, answer.body
        told = answer.json()
        assert (told["key"], told["version"], told["revision"], told["data"]) == ("a", model.version, 3, None)
        assert [(one["revision"], one["type"], one["effect"]) for one in told["steps"]] == [
            (1, "Placed", "created"),
            (2, "Noted", "none"),
            (3, "Purged", "deleted"),
            (4, "Changed", "parked"),
        ]
        assert b'"total":[null,0.1]' in answer.body
        assert told["parked"] == {"revision": 4, "error": told["steps"][3]["error"]}
        assert answer.headers["refold-parked-revision"] == "4"
        answer = service.ask("/v1/rows/a/history?at=2&steps=1").json()
        assert [one["revision"] for one in answer["steps"]] == [2]
        assert answer["data"]["status"] == "placed"
        assert kind(service.ask("/v1/rows/nobody/history")) == (404, "row-not-found")
        for query, field in [("steps=0", "steps"), ("steps=1001", "steps"), ("at=x", "at"), ("limit=1", "limit")]:
            answer = service.ask(f"/v1/rows/a/history?{query}")
            assert (kind(answer), answer.json()["field"]) == ((400, "invalid-query"), field)


async def test_rows_without_a_history_of_their_own_say_why(world: World) -> None:
    model = await world.projection(CUSTOMERS, "p")
    dsn = await history_login(world)
    with serve(model, world.dsn, dsn) as service:
        for path in ("/v1/rows/c1?at=1", "/v1/rows/c1/history"):
            answer = service.ask(path)
            assert kind(answer) == (400, "no-row-history")
            assert "its key is not the subject" in answer.json()["detail"]
    orders = await world.projection(ORDERS, "q")
    with serve(orders, world.dsn, None) as service:
        assert kind(row(service, "a", 1)) == (501, "no-event-store")
        assert kind(row(service, "a")) == (404, "row-not-found")
    with serve(orders, world.dsn, await history_login(world, reads=False)) as service:
        answer = row(service, "a", 1)
        assert kind(answer) == (503, "history-unavailable")
    world.store([("a", "Placed", {"items": 1, "total": 1})])
    with serve(orders, world.dsn, dsn) as service:
        await history_login(world)
        assert row(service, "a", 1).status == 200
        with psycopg.connect(world.dsn, autocommit=True) as conn:
            conn.execute("update refold.streams set incarnation = 'fedcba9876543210'")
        assert kind(row(service, "a", 1)) == (410, "other-history")


async def test_the_login_of_histories_reads_the_streams_and_nothing_else(world: World) -> None:
    dsn = await history_login(world)
    other = await world.stream("other")
    model = await world.projection(ORDERS, "p")
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute('select count(*) from "shop.orders".events')
        for refused in [
            f'select from "{other.event_schema}".events',
            f'select from "{model.schema}".versions',
            'insert into "shop.orders".events default values',
            'delete from "shop.orders".events',
            "update refold.heads set head = 0",
            "select from refold_read.projections",
            "create table public.mine ()",
        ]:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(sql.SQL(refused))  # type: ignore[arg-type]


async def test_a_long_history_takes_its_turn_and_its_time_and_little_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await world.projection(ORDERS, "p")
    world.store([("long", "Changed", {"items": 1, "total": 0.01})] * 30_000)
    with serve(model, world.dsn, await history_login(world)) as service:
        answer = row(service, "long", 10**6)
        assert data(answer) == {"status": None, "items": 30_000, "total": Decimal("300.00")}
        loop = asyncio.get_running_loop()
        answers = await asyncio.gather(*(loop.run_in_executor(None, row, service, "long", at) for at in range(1, 12)))
        assert [data(one)["items"] for one in answers] == list(range(1, 12))
        monkeypatch.setattr(histories, "SECONDS", 0.01)
        assert kind(row(service, "long", 10**6)) == (503, "history-too-long")
        monkeypatch.setattr(histories, "SECONDS", 20)
        assert row(service, "long", 30_000).status == 200, "the connection is as good as another"


async def test_an_event_store_that_was_away_is_asked_again(world: World) -> None:
    model = await world.projection(ORDERS, "p")
    world.store([("a", "Placed", {"items": 1, "total": 1})])
    name = str(conninfo_to_dict(world.dsn)["dbname"])
    _, login = readstore.logins(name, model.schema)
    async with await psycopg.AsyncConnection.connect(world.dsn, autocommit=True) as conn:
        await readstore.ensure_logins(
            conn, namespace=NAMESPACE, name="p", projector_password="p" * 32, query_password="q" * 32
        )
    dsn = await history_login(world)
    role = conninfo_to_dict(dsn)["user"]
    url = make_conninfo(world.dsn, user=login, password="q" * 32)
    with serve(model, url, dsn) as service, psycopg.connect(world.dsn, autocommit=True) as conn:
        assert row(service, "a", 1).status == 200
        conn.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [role])
        assert row(service, "a", 1).status == 200
        conn.execute(sql.SQL("alter role {} nologin").format(sql.Identifier(str(role))))
        conn.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [role])
        assert kind(row(service, "a", 1)) == (503, "history-unavailable")
        assert kind(row(service, "a")) == (404, "row-not-found"), "the rows of now need no event store"
        conn.execute(sql.SQL("alter role {} login").format(sql.Identifier(str(role))))
        assert row(service, "a", 1).status == 200
