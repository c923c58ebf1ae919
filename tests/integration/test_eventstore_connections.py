"""A call whose connection is cut off under it, on the event loop that the services run on."""

import asyncio
import random
import time

import psycopg
import uvloop
from refold.eventstore import connections
from refold.eventstore.connections import StoreConnection

from hack.servers import Postgres
from tests.network import Cut


def test_a_call_whose_socket_nobody_listens_to_any_more_is_answered_all_the_same(postgres: Postgres) -> None:
    """As it came with servers that were killed: the event loop lost the socket of the next connection."""

    async def run() -> float:
        conn = await connections.connect(postgres.dsn(), "test")
        asleep = asyncio.create_task(conn.call(b"sleep", b"select pg_sleep(1)", []))
        await asyncio.sleep(0.2)
        asyncio.get_running_loop().remove_reader(conn.pgconn.socket)
        began = time.monotonic()
        await asyncio.wait_for(asleep, 10)
        await conn.close()
        return time.monotonic() - began

    assert uvloop.run(run()) < 5


def test_a_call_ends_when_its_connection_is_reset_under_it(postgres: Postgres) -> None:
    async def called(network: Cut) -> float:
        conn = await connections.connect(f"host=127.0.0.1 port={network.port} user=postgres dbname=postgres", "test")
        sleep = asyncio.create_task(conn.call(b"sleep", b"select pg_sleep(20)", []))
        await asyncio.sleep(1.5)  # it has looked at the socket in vain, and listens on
        network.cut()
        began = time.monotonic()
        try:
            await asyncio.wait_for(sleep, 10)
        except psycopg.OperationalError:
            return time.monotonic() - began
        finally:
            await conn.close()
        raise AssertionError("it was answered")

    async def answered(network: Cut) -> None:
        conn = await connections.connect(f"host=127.0.0.1 port={network.port} user=postgres dbname=postgres", "test")
        for seconds in (b"0", b"1.2", b"0"):
            await asyncio.wait_for(conn.call(b"slept " + seconds, b"select pg_sleep(" + seconds + b")", []), 10)
        await conn.close()

    with Cut(postgres.port) as network:
        uvloop.run(answered(network))
        assert uvloop.run(called(network)) < 5


def test_calls_at_once_are_answered_in_their_order_and_fail_each_for_itself(postgres: Postgres) -> None:
    """Also one that is more than a socket takes at once; and between calls the connection is psycopg's."""

    async def run() -> list[object]:
        conn = await connections.connect(postgres.dsn(), "test")
        answers: list[object] = []
        ended = asyncio.get_running_loop().create_future()

        def note(answer: connections.Answer) -> None:
            failed = isinstance(answer, psycopg.Error)
            answers.append(type(answer).__name__ if failed else answer.get_value(0, 0))
            if len(answers) == 6:
                ended.set_result(None)

        length, divided = b"select octet_length($1)", b"select 1 / $1::integer"
        conn.send(b"length", length, [b"x" * 20_000_000], note)
        conn.send(b"divided", divided, [bytes(4)], note)
        conn.send(b"divided", divided, [bytes(3) + b"\1"], note)
        conn.send(b"wrong", b"select no_such_column", [], note)
        conn.send(b"wrong", b"select 5", [], note)  # behind one that failed: it was never prepared
        conn.send(b"length", length, [b"xyz"], note)
        await asyncio.wait_for(ended, 20)
        for number in (1, 2):
            answers.append(await (await conn.execute("select %s::integer", [number])).fetchone())
            answers.append((await conn.call(b"wrong", b"select 5", [])).get_value(0, 0))
        await conn.close()
        return answers

    whole = [(20_000_000).to_bytes(4, "big"), "DivisionByZero", bytes(3) + b"\1"]
    mended = [bytes(3) + b"\5"]
    assert uvloop.run(run()) == [
        *whole, "UndefinedColumn", "InvalidSqlStatementName", bytes(3) + b"\3", (1,), *mended, (2,), *mended,
    ]  # fmt: skip


async def test_calls_that_were_sent_end_with_the_connection(postgres: Postgres) -> None:
    conn = await connections.connect(postgres.dsn(), "test")
    asleep = [asyncio.create_task(conn.call(b"sleep", b"select pg_sleep(20)", [])) for _ in range(2)]
    await asyncio.sleep(0.1)
    await conn.close()
    results = await asyncio.wait_for(asyncio.gather(*asleep, return_exceptions=True), 5)
    assert [type(result) for result in results] == [psycopg.OperationalError] * 2


async def test_who_wants_a_connection_waits_a_moment_for_it_and_then_takes_another(postgres: Postgres) -> None:
    pool = connections.Connections(postgres.dsn(), size=3, application="test")
    async with pool.lend() as known:
        async with pool.lend() as other:
            assert other is not known

        async def wanted() -> StoreConnection:
            async with pool.lend(known) as conn:
                return conn

        soon = asyncio.create_task(wanted())
        await asyncio.sleep(0)
    assert await soon is known
    async with pool.lend(known) as held:
        assert held is known
        assert await asyncio.wait_for(wanted(), 1) is other
    async with pool.lend(known) as held:
        soon = asyncio.create_task(wanted())
        await asyncio.sleep(0)
        held.pgconn.finish()
        broken = time.monotonic()
    assert await asyncio.wait_for(soon, 1) is not known
    assert time.monotonic() - broken < 1
    await pool.close()


async def test_no_connection_is_lost_whoever_leaves_while_he_waits_for_one(postgres: Postgres) -> None:
    pool = connections.Connections(postgres.dsn(), size=2, application="test")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    seen: list[StoreConnection] = []

    async def use() -> None:
        async with pool.lend(chance.choice(seen) if seen else None) as conn:
            if conn not in seen:
                seen.append(conn)
            await asyncio.sleep(chance.choice((0, 0, 0.001, 0.008)))

    users = []
    for _ in range(500):
        users.append(asyncio.create_task(use()))
        await asyncio.sleep(chance.choice((0, 0, 0.001)))
        if chance.random() < 0.4:
            chance.choice(users).cancel()
    await asyncio.wait_for(asyncio.gather(*users, return_exceptions=True), 30)
    assert len(seen) == 2
    async with asyncio.timeout(1), pool.lend() as one, pool.lend() as two:
        assert {one, two} == {*seen}
    await pool.close()
