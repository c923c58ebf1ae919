"""The proxy that the tests cut networks with does what it says: else tests of cut networks would show nothing."""

import socket
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from confluent_kafka.admin import AdminClient

from hack.servers import Postgres
from tests.network import Cut, kafka_behind


def test_a_cut_connection_is_reset_and_a_hanging_one_goes_on_when_it_heals(postgres: Postgres) -> None:
    with Cut(postgres.port) as network:
        dsn = f"host=127.0.0.1 port={network.port} user=postgres dbname=postgres connect_timeout=2"
        with psycopg.connect(dsn, autocommit=True) as connection:
            assert connection.execute("select 1").fetchone() == (1,)
            network.hang()
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(connection.execute, "select 2")
                with pytest.raises(psycopg.OperationalError, match="timeout"):
                    psycopg.connect(dsn)
                assert not waiting.done(), "nothing comes through while it hangs"
                network.heal()
                assert waiting.result(10).fetchone() == (2,)
            network.cut()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("select 3")
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", network.port), 2)
        network.heal()
        with psycopg.connect(dsn) as connection:
            assert connection.execute("select 4").fetchone() == (4,)


def test_clients_of_a_broker_behind_the_proxy_are_led_through_it() -> None:
    with kafka_behind(2) as (broker, (network, other)):
        through = AdminClient({"bootstrap.servers": f"127.0.0.1:{network.port}", "log_level": 0})
        beside = AdminClient({"bootstrap.servers": f"127.0.0.1:{other.port}", "log_level": 0})
        directly = AdminClient({"bootstrap.servers": broker.bootstrap})
        assert [str(told.port) for told in through.list_topics(timeout=10).brokers.values()] == [str(network.port)]
        network.cut()
        assert [str(told.port) for told in directly.list_topics(timeout=10).brokers.values()] == [str(broker.port)]
        assert [str(told.port) for told in beside.list_topics(timeout=10).brokers.values()] == [str(other.port)]
