"""One subject's state, of a real event store: what the live version of a Projection makes of its history."""

import asyncio
import datetime as dt
import hashlib
import json
import secrets
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import psycopg
import pytest
from refold.eventstore import catalog, server
from refold.eventstore.catalog import Stream
from refold.eventstore.settings import Settings
from refold.projection.definition import Definition, FoldRule, Handler, StreamRef, VersionDefinition
from refold.query import histories, state

from hack.servers.callers import tokens_file
from tests.parking import kind
from tests.projecting import CUSTOMERS, ORDERS
from tests.served import Answer, Served, serve
from tests.stores import Installed, connected, install

TOKEN = "t0ken"
UID = "a-uid"


def version(definition: Definition, *streams: Stream, **more: Any) -> VersionDefinition:
    refs = [
        StreamRef(
            namespace=one.namespace, name=one.name, incarnation=one.incarnation, partitions=one.partitions,
            topic=one.topic, schema=one.schema,
        )
        for one in streams
    ]  # fmt: skip
    return VersionDefinition(definition=definition, streams=refs, **more)


class Shop:
    """A store with the stream orders, and the event store's process that serves it."""

    def __init__(self, installed: Installed, stream: Stream, served: Served) -> None:
        self.installed, self.stream, self.served = installed, stream, served

    async def project(self, definition: VersionDefinition, name: str = "p", *, live: str = "v1") -> None:
        async with connected(self.installed.admin) as conn:
            await catalog.set_definition(
                conn, namespace="shop", name=name, uid=UID, version=live, definition=definition.to_json()
            )

    def append(self, subject: str, *events: tuple[str, Any]) -> None:
        made = [{"id": secrets.token_hex(8), "type": type_, "data": data} for type_, data in events]
        path = f"/v1/streams/shop/orders/subjects/{quote(subject, safe='')}/events"
        for at in range(0, len(made), 1000):
            body = json.dumps({"events": made[at : at + 1000]}).encode()
            assert self.served.ask(path, "POST", body=body).status == 201

    def ask(self, subject: str, query: str = "projection=p", *, stream: str = "orders", **how: Any) -> Answer:
        return self.served.ask(f"/v1/streams/shop/{stream}/subjects/{quote(subject, safe='')}/state?{query}", **how)


@pytest.fixture
async def shop(database: str) -> AsyncIterator[Shop]:
    installed = await install(database)
    stream = await installed.stream()
    settings = Settings(store_dsn=installed.service, auth=tokens_file(TOKEN))
    with serve(server.make(settings, state.operations), TOKEN) as served:
        shop = Shop(installed, stream, served)
        await shop.project(version(ORDERS, stream))
        yield shop


async def test_a_state_is_the_row_at_a_moment_and_tells_what_each_event_did(shop: Shop) -> None:
    shop.append("a/b", ("Placed", {"items": 1, "total": 0.10}), ("Changed", {"items": 2, "total": 1}))
    shop.append("a/b", ("Purged", {}), ("Shipped", {}))
    now = shop.ask("a/b")
    assert now.status == 200, now.body
    told = now.json()
    assert (told["key"], told["version"], told["revision"], told["steps"]) == ("a/b", "v1", 4, [])
    assert told["data"] == {"status": "shipped", "items": None, "total": None}
    assert now.headers["refold-revision"] == "4"
    then = shop.ask("a/b", "projection=p&at=2&steps=2")
    assert b'"data":{"status":"placed","items":3,"total":1.1}' in then.body
    assert [(one["revision"], one["effect"]) for one in then.json()["steps"]] == [(1, "created"), (2, "changed")]
    deleted = shop.ask("a/b", "projection=p&at=3&steps=1").json()
    assert (deleted["revision"], deleted["data"], deleted["steps"][0]["effect"]) == (3, None, "deleted")
    time = dt.datetime.fromisoformat(then.json()["time"])
    assert shop.ask("a/b", f"projection=p&at={quote(time.isoformat())}").json()["revision"] == 2
    before = time - dt.timedelta(microseconds=1)
    nothing = shop.ask("a/b", f"projection=p&at={quote(before.isoformat())}")
    assert kind(nothing) == (404, "row-not-found")
    assert kind(shop.ask("nobody")) == (404, "row-not-found")
    assert kind(shop.ask("k" * 600)) == (404, "row-not-found")


async def test_a_bad_event_stops_the_state_before_it(shop: Shop) -> None:
    shop.append("a", ("Placed", {"items": 1, "total": 1}), ("Changed", {"items": 1}), ("Shipped", {}))
    told = shop.ask("a", "projection=p&steps=3")
    assert (told.json()["revision"], told.json()["data"]["status"]) == (1, "placed")
    assert told.headers["refold-parked-revision"] == "2"
    assert "no field 'total'" in told.json()["parked"]["error"]
    assert [one["effect"] for one in told.json()["steps"]] == ["created", "parked"]
    shop.append("b", ("Changed", {"items": 1}))
    assert shop.ask("b").json()["data"] is None, "its first event is bad, which is no 404"


async def test_it_is_folded_by_what_is_live(shop: Shop) -> None:
    shop.append("a", ("Placed", {"items": 1, "total": 1}))
    assert shop.ask("a").json()["data"]["status"] == "placed"
    other = ORDERS.model_copy(update={"fold": [FoldRule(type="Placed", set={"status": "'other'"})]})
    await shop.project(version(other, shop.stream), live="v2")
    told = shop.ask("a").json()
    assert (told["version"], told["data"]["status"]) == ("v2", "other")
    [[partition, *_]] = await shop.installed.history(shop.stream)
    ends = {shop.stream.incarnation: [int(number == partition) for number in range(shop.stream.partitions)]}
    shop.append("a", ("Placed", {"items": 5, "total": 5}))
    await shop.project(version(ORDERS, shop.stream, ends=ends))
    assert shop.ask("a").json()["data"]["items"] == 1, "as of a moment, beyond which nothing counts"
    async with connected(shop.installed.admin) as conn:
        await catalog.drop_definition(conn, namespace="shop", name="p", uid="another")
        assert shop.ask("a").status == 200
        await catalog.drop_definition(conn, namespace="shop", name="p", uid=UID)
    assert kind(shop.ask("a")) == (404, "projection-not-found")


async def test_what_cannot_be_folded_says_why(shop: Shop) -> None:
    await shop.project(version(CUSTOMERS, shop.stream), "customers")
    answer = shop.ask("a", "projection=customers")
    assert kind(answer) == (400, "no-row-history")
    assert "its key is not the subject" in answer.json()["detail"]
    handler = Handler(image="registry/acme@sha256:" + "0" * 64, function="acme:project")
    code = Definition(streams=["orders"], columns=ORDERS.columns, handler=handler)
    await shop.project(version(code, shop.stream), "code")
    answer = shop.ask("a", "projection=code")
    assert kind(answer) == (400, "no-row-history")
    assert "spec.handler" in answer.json()["detail"]
    await shop.installed.stream("others")
    answer = shop.ask("a", stream="others")
    assert (kind(answer), answer.json()["field"]) == ((400, "stream-not-folded"), "projection")
    for name in ("nothing", "No-Label", "a/b", "x" * 100):
        assert kind(shop.ask("a", f"projection={quote(name, safe='')}")) == (404, "projection-not-found")
    for query, field in [
        ("", "projection"),
        ("projection=p&projection=p", "projection"),
        ("projection=p&at=0", "at"),
        ("projection=p&at=2026-01-01T00:00:00", "at"),
        ("projection=p&steps=0", "steps"),
        ("projection=p&steps=1001", "steps"),
        ("projection=p&until=1", "until"),
    ]:
        answer = shop.ask("a", query)
        assert (kind(answer), answer.json()["field"]) == ((400, "invalid-query"), field), query
    await shop.installed.run("update refold.definitions set definition = '{\"later\": 1}' where name = 'code'")
    answer = shop.ask("a", "projection=code")
    assert kind(answer) == (503, "store-unavailable")
    assert "made by a later one" in answer.json()["detail"]
    former = version(ORDERS, msgspec.structs.replace(shop.stream, incarnation="fedcba9876543210"))
    await shop.project(former, "former")
    assert kind(shop.ask("a", "projection=former")) == (410, "other-history")


async def test_the_caller_needs_the_rights_on_the_events_and_on_the_rows(shop: Shop, tmp_path: Path) -> None:
    shop.append("a", ("Placed", {"items": 1, "total": 1}))
    allow = {"verbs": ["get"], "namespaces": ["shop"]}
    events = {**allow, "resources": ["eventstreams/events"], "names": ["orders"]}
    rows = {**allow, "resources": ["projections/rows"], "names": ["p"]}
    callers = {"both": [events, rows], "events": [events], "rows": [rows]}
    (tmp_path / "tokens").write_text(
        json.dumps(
            {
                "tokens": [
                    {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "allow": rules}
                    for name, rules in callers.items()
                ]
            }
        )
    )
    settings = Settings(store_dsn=shop.installed.service, auth=f"tokens:{tmp_path / 'tokens'}")
    with serve(server.make(settings, state.operations), TOKEN) as shop.served:
        assert shop.ask("a", token="both").status == 200
        answer = shop.ask("a", token="events")
        assert kind(answer) == (403, "forbidden")
        assert "projections/rows" in answer.json()["detail"]
        assert kind(shop.ask("a", "projection=unknown", token="both")) == (403, "forbidden"), "before it is looked for"
        assert kind(shop.ask("a", token="rows")) == (403, "forbidden")
        assert shop.ask("a", token="nobody").status == 401


async def test_a_long_history_takes_its_time_and_appends_go_on(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.append("long", *[("Changed", {"items": 1, "total": 0.01})] * 20_000)
    asked = asyncio.create_task(asyncio.to_thread(shop.ask, "long", "projection=p&steps=1000"))
    while not asked.done():
        await asyncio.to_thread(shop.append, "short", ("Placed", {"items": 1, "total": 1}))
    answer = json.loads(asked.result().body, parse_float=Decimal)
    assert answer["data"] == {"status": None, "items": 20_000, "total": Decimal("200.00")}
    assert [one["revision"] for one in answer["steps"]] == list(range(19_001, 20_001))
    assert all(one["changes"]["items"] == [one["revision"] - 1, one["revision"]] for one in answer["steps"])
    monkeypatch.setattr(histories, "SECONDS", 0.01)
    assert kind(shop.ask("long")) == (503, "history-too-long")


async def test_the_event_store_may_read_definitions_and_not_write_them_and_relays_not_even_that(shop: Shop) -> None:
    with psycopg.connect(shop.installed.service, autocommit=True) as conn:
        assert conn.execute("select count(*) from refold.definitions").fetchone() == (1,)
        for refused in ("delete from refold.definitions", "update refold.definitions set definition = ''"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(refused)
    relay = shop.installed.service.replace("_eventstore", "_relay")
    with psycopg.connect(relay, autocommit=True) as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("select from refold.definitions")


async def test_a_store_that_was_not_upgraded_yet_says_so(shop: Shop) -> None:
    await shop.installed.run("drop table refold.definitions")
    answer = shop.ask("a")
    assert kind(answer) == (503, "store-not-installed")
    assert "upgraded" in answer.json()["detail"]
