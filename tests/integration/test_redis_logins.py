"""The installation's Redis, as the chart starts it: each projection's logins do their work there, and nothing else."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redis import Redis as Client
from redis.exceptions import AuthenticationError, ResponseError
from refold.projection.definition import Column, Definition, FoldRule, StreamRef, VersionDefinition
from refold.projection.fold import RowChange
from refold.projection.readstore import Advance, UnavailableError
from refold.query.server import app
from refold.query.settings import Settings
from refold_operator.redis import SharedRedisReadStore

from hack.servers import EmbeddedRedis, Kafka, Redis
from hack.servers.callers import tokens_file
from tests import served
from tests.projecting import World
from tests.readstores import Store

KEY = b"k" * 32
SUMS = Definition(
    streams=["orders"],
    columns=[Column(name="n", type="integer"), Column(name="label", type="text", index=True)],
    fold=[
        FoldRule(type="Placed", add={"n": "data.n"}, set={"label": "data.label"}),
        FoldRule(type="Purged", delete=True),
    ],
)

VERSION = VersionDefinition(
    definition=SUMS,
    streams=[StreamRef(namespace="shop", name="orders", incarnation="i" * 16, partitions=1, topic="o", schema="o")],
)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis()
    server.start()
    yield server
    server.remove()


@pytest.fixture
async def shared(server: EmbeddedRedis) -> AsyncIterator[SharedRedisReadStore]:
    store = SharedRedisReadStore(server.admin_url)
    yield store
    await store.close()


@contextmanager
def client(url: str) -> Iterator[Client]:
    with Client.from_url(url, protocol=2) as connected:
        yield connected


def users(server: EmbeddedRedis) -> list[str]:
    """Return the users' names that the server would find in its file after a crash."""
    return [line.split()[1] for line in (server.folder / "users.acl").read_text().splitlines()]


async def test_they_are_enough_for_projector_and_query_service(
    database: str, kafka: Kafka, server: EmbeddedRedis, shared: SharedRedisReadStore
) -> None:
    world = World(database, kafka)
    await world.install()
    await world.stream()
    store = Store(server.admin_url)
    model = await world.projection_in(store, SUMS, "sums")
    logins = await shared.logins(KEY, namespace="shop", name="sums")
    settings = Settings.model_validate(
        {"projection": "shop/sums", "readstore_dsn": logins.query, "auth": tokens_file("secret")}
    )
    most = 2**63 - 1

    def placed(subject: str, number: int, label: str = "x") -> tuple[str, str, dict[str, Any]]:
        return subject, "Placed", {"n": number, "label": label}

    with model.projector(readstore_dsn=logins.projector), served.serve(app(settings), "secret") as service:
        for event in [placed("a", most), placed("b", 1, "y"), placed("c", 1), ("c", "Purged", {}), placed("d", most)]:
            world.append([event])
        world.append([placed("a", 1), placed("d", 1)])
        model.wait()
        assert service.ask("/v1/rows/b").json()["data"] == {"n": 1, "label": "y"}
        assert service.ask("/v1/rows/c").status == 404
        page = service.ask("/v1/rows?where=label:eq:x&order=key").json()
        assert [row["key"] for row in page["rows"]] == ["a", "d"]
        parked = {one["key"]: one["id"] for one in service.ask("/v1/parked").json()["parked"]}
        assert set(parked) == {"a", "d"}
        assert service.ask(f"/v1/parked/{parked['a']}:retry", "POST").json()["type"].endswith("still-bad")
        assert service.ask(f"/v1/parked/{parked['d']}:discard", "POST").json()["outcome"] == "discarded"
        assert (await model.status()).versions[model.version].parked == 1
        other = await world.projection_in(store, SUMS, "sums", rebuild="again")
        with other.projector(readstore_dsn=logins.projector):
            other.wait()
        assert service.ask("/v1/rows?where=label:eq:y").json()["rows"][0]["key"] == "b"
    await store.close()
    await shared.drop(namespace="shop", name="sums", uid="sums")
    with client(logins.query) as connected, pytest.raises(AuthenticationError):
        connected.ping()


_OWN, _VERSION = "refold:shop.mine:", "refold:shop.mine:0a1b2c3d:"
_BOTH: list[Callable[[Client], object]] = [
    lambda one: one.hget("refold:shop.other:claim", "uid"),
    lambda one: one.hget("refold:shop.mine-too:claim", "uid"),
    lambda one: one.eval("return redis.call('HGET', 'refold:shop.other:claim', 'uid')", 1, _OWN),
    lambda one: one.set(f"{_OWN}live", "x"),
    lambda one: one.hset(f"{_OWN}definitions", "x", "y"),
    lambda one: one.eval("redis.call('HSET', KEYS[1] .. 'claim', 'uid', 'x')", 1, _OWN),
    lambda one: one.keys("*"),
    lambda one: one.scan(),
    lambda one: one.flushall(),
    lambda one: one.config_get("*"),
    lambda one: one.acl_list(),
    lambda one: one.script_flush(),
    lambda one: one.client_list(),
    lambda one: one.publish("x", "y"),
]
_QUERY: list[Callable[[Client], object]] = [
    lambda one: one.hset(f"{_VERSION}row:k", "x", "y"),
    lambda one: one.hset(f"{_VERSION}row:0a1b2c3d:asked", "x", "y"),
    lambda one: one.eval("redis.call('HSET', KEYS[1] .. '0a1b2c3d:positions', 'x', 'y')", 1, _OWN),
]


async def test_they_reach_nothing_else(server: EmbeddedRedis, shared: SharedRedisReadStore) -> None:
    await shared.claim(namespace="shop", name="mine", uid="u")
    logins = await shared.logins(KEY, namespace="shop", name="mine")
    for url, forbidden in ((logins.projector, _BOTH), (logins.query, _BOTH + _QUERY)):
        with client(url) as connected:
            assert connected.hget(f"{_OWN}claim", "uid") == b"u"
            for attempt in forbidden:
                with pytest.raises(ResponseError, match=r"no permissions|can't (access|run)"):
                    attempt(connected)
    with client(logins.projector) as connected:
        connected.hset(f"{_VERSION}row:k", "x", "y")
    with client(f"redis://127.0.0.1:{server.port}") as stranger, pytest.raises(AuthenticationError):
        stranger.hget(f"{_OWN}claim", "uid")
    with client(f"redis://default:any@127.0.0.1:{server.port}") as stranger, pytest.raises(AuthenticationError):
        stranger.ping()
    with client(f"redis://probe:any@127.0.0.1:{server.port}") as probe:
        assert probe.ping()
        with pytest.raises(ResponseError, match="no permissions"):
            probe.hget(f"{_OWN}claim", "uid")
    with client(server.admin_url) as operator:
        for attempt in (operator.flushall, operator.config_get, operator.acl_list, operator.shutdown):
            with pytest.raises(ResponseError, match="no permissions"):
                attempt()


async def test_they_outlive_a_crash_and_a_new_password_of_the_operator(
    server: EmbeddedRedis, shared: SharedRedisReadStore
) -> None:
    place = {"namespace": "shop", "name": "kept"}
    await Store(server.admin_url).make(VERSION, version="0a1b2c3d", **place)
    logins = await shared.logins(KEY, **place)
    for position, password in enumerate(("local", "an/other")):
        rows = Store(logins.projector).rows(version="0a1b2c3d", **place)
        changes = [RowChange(key, set={"n": position, "label": "x"}) for key in "ab"]
        rows.apply(changes, [], [Advance("i" * 16, 0, position, position + 1, None, None, None)])
        rows.close()
        server.kill()
        server.use(password)
        server.start()
        rows = Store(logins.projector).rows(version="0a1b2c3d", **place)
        assert rows.read("ab", ["n"]) == {key: {"n": position} for key in "ab"}
        assert [one.position for one in rows.positions([("i" * 16, 0)]).values()] == [position + 1]
        rows.close()
        assert len(await Store(logins.query).keys(**place)) == 2
    with pytest.raises(UnavailableError, match="invalid username-password pair"):
        await shared.logins(KEY, namespace="shop", name="kept")
    server.stop()
    server.use("local")
    server.start()
    assert await shared.logins(KEY, namespace="shop", name="kept") == logins


async def test_what_somebody_changed_about_them_is_put_right(
    server: EmbeddedRedis, shared: SharedRedisReadStore
) -> None:
    await shared.claim(namespace="shop", name="changed", uid="u")
    logins = await shared.logins(KEY, namespace="shop", name="changed")
    file = server.folder / "users.acl"
    before = file.stat().st_ino
    assert await shared.logins(KEY, namespace="shop", name="changed") == logins
    assert file.stat().st_ino == before, "nothing was to be written"
    projector, query = (f"refold.shop.changed.{part}" for part in ("projector", "query"))
    with client(server.admin_url) as operator:
        operator.acl_deluser(projector)
        operator.execute_command("ACL", "SETUSER", query, "nopass", "+set", "~refold:*")
    await shared.logins(KEY, namespace="shop", name="changed")
    with client(logins.projector) as connected:
        assert connected.ping()
    with client(logins.query) as connected, pytest.raises(ResponseError, match="no permissions"):
        connected.set("refold:shop.other:x", "y")
    with client(f"redis://{query}:wrong@127.0.0.1:{server.port}") as stranger, pytest.raises(AuthenticationError):
        stranger.ping()
    rotated = await shared.logins(b"n" * 32, namespace="shop", name="changed")
    with client(rotated.query) as connected:
        assert connected.ping()
    with client(logins.query) as connected, pytest.raises(AuthenticationError):
        connected.ping()


async def test_they_go_with_the_claim_and_those_of_another_resource_stay(
    server: EmbeddedRedis, shared: SharedRedisReadStore
) -> None:
    for name in ("kept-rows", "gone", "of-another"):
        await shared.claim(namespace="shop", name=name, uid="u")
        await shared.logins(KEY, namespace="shop", name=name)
    await shared.release(namespace="shop", name="kept-rows", uid="u")
    await shared.drop(namespace="shop", name="gone", uid="u")
    await shared.drop(namespace="shop", name="gone", uid="u")  # as after a crash before the finalizer was off
    assert not await shared.release(namespace="shop", name="of-another", uid="other")
    found = users(server)
    assert {"refold.shop.of-another.projector", "refold.shop.of-another.query", "refold_admin"} <= set(found)
    assert not [user for user in found if "kept-rows" in user or "gone" in user]
    await shared.claim(namespace="shop", name="kept-rows", uid="v")


async def test_a_redis_that_would_leave_out_what_its_default_user_may_not_do_is_refused() -> None:
    server = Redis()
    server.start()
    store = SharedRedisReadStore(f"redis://operator:p@127.0.0.1:{server.port}/0")
    try:
        with client(server.url()) as connected:
            connected.execute_command("ACL", "SETUSER", "operator", "on", ">p", "~*", "+@all")
            await store.install()
            connected.execute_command("ACL", "SETUSER", "default", "-flushall", "off")
            await store.install()
        with client(f"redis://operator:p@127.0.0.1:{server.port}/0") as connected:
            for rules in (("-@all", "+ping"), ("allcommands", "resetkeys", "~refold:*")):
                connected.execute_command("ACL", "SETUSER", "default", *rules)
                with pytest.raises(UnavailableError, match="default lacks rights"):
                    await store.install()
    finally:
        await store.close()
        server.remove()


async def test_a_redis_that_would_forget_them_is_refused(redis: Redis) -> None:
    store = SharedRedisReadStore(redis.url())
    try:
        with pytest.raises(UnavailableError, match="aclfile"):
            await store.logins(KEY, namespace="shop", name="forgotten")
    finally:
        await store.close()
