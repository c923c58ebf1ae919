"""A call whose connection is cut off under it, on the event loop that the services run on."""

import asyncio
import time

import psycopg
import uvloop
from refold.eventstore import connections

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
