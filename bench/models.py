"""The two read models of the workload "orders": a row an order, a row a customer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from refold import names
from refold.eventstore.catalog import Stream
from refold.projection.readstore.postgres import rows_table

from bench.limits import folding
from bench.servers import Servers
from bench.waiting import until
from hack.servers.platform import Service

#: Events a second below which a projector counts as stuck.
_LEAST_RATE = 4_000


class Model(NamedTuple):
    """A read model: the part of a Projection's spec without its streams, and the columns as rows are compared."""

    name: str
    spec: dict[str, Any]
    columns: tuple[str, ...]


ORDERS = Model(
    "orders",
    {
        "columns": [
            {"name": "customer", "type": "text"},
            {"name": "status", "type": "text", "index": True},
            {"name": "items", "type": "integer"},
            {"name": "total", "type": "numeric"},
            {"name": "paid", "type": "numeric"},
            {"name": "updated", "type": "timestamp"},
        ],
        "fold": [
            {
                "type": "OrderPlaced",
                "set": {"customer": "data.customerId", "status": "'placed'", "updated": "event.time"},
                "add": {"items": "size(data.items)", "total": "data.total"},
            },
            {
                "type": "ItemAdded",
                "set": {"updated": "event.time"},
                "add": {"items": "1", "total": "data.item.qty * data.item.price"},
            },
            {"type": "OrderPaid", "set": {"status": "'paid'", "paid": "data.amount", "updated": "event.time"}},
            {"type": "OrderShipped", "set": {"status": "'shipped'", "updated": "event.time"}},
            {"type": "OrderDelivered", "set": {"status": "'delivered'", "updated": "event.time"}},
            {"type": "OrderCancelled", "set": {"status": "'cancelled'", "updated": "event.time"}},
        ],
    },
    ("customer", "status", "items", "total", "paid", "updated"),
)
CUSTOMERS = Model(
    "customers",
    {
        "key": "data.customerId",
        "columns": [{"name": "orders", "type": "integer"}, {"name": "spent", "type": "numeric"}],
        "fold": [
            {"type": "OrderPlaced", "add": {"orders": "1"}},
            {"type": "OrderPaid", "add": {"spent": "data.amount"}},
        ],
    },
    ("orders", "spent"),
)


def exact_fold(servers: Servers, stream: Stream) -> dict[str, folding.Rows]:
    """Return both read models of all events of `stream` by name, folded in plain Python with exact numbers."""
    orders: folding.Rows = {}
    customers: folding.Rows = {}
    query = sql.SQL("select subject, type, recorded_at, data::text from {} order by partition, position").format(
        sql.Identifier(stream.schema, "events")
    )
    with servers.events() as conn, conn.transaction(), conn.cursor("events") as cursor:
        cursor.itersize = 10_000
        folding.fold(cursor.execute(query), orders, customers, decode=folding.decode_exactly)
    return {ORDERS.name: orders, CUSTOMERS.name: customers}


def make(servers: Servers, stream: Stream, model: Model, name: str) -> str:
    """Make a projection of `model` with the given name; return its version."""
    return servers.platform.projection(stream.namespace, name, {**model.spec, "streams": [stream.name]}, [stream])


def check_rows(servers: Servers, namespace: str, name: str, version: str, model: Model, expected: folding.Rows) -> None:
    """Compare the rows of a projection's version with the reference.

    Raises:
        RuntimeError: they aren't equal.
    """
    query = sql.SQL("select key, {} from {}").format(
        sql.SQL(", ").join(map(sql.Identifier, model.columns)),
        sql.Identifier(names.read_schema(namespace, name), rows_table(version)),
    )
    with servers.rows() as conn:
        found = {row[0]: list(row[1:]) for row in conn.execute(query)}
    compare(model, found, expected)


def compare(model: Model, found: folding.Rows, expected: folding.Rows) -> None:
    """Raise RuntimeError where the rows aren't those of the reference."""
    if found != expected:
        wrong = [key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key)]
        raise RuntimeError(
            f"{len(wrong)} of {len(expected)} rows of {model.name} are wrong, so {wrong[0]}: {found.get(wrong[0])}, "
            f"the plain fold has {expected.get(wrong[0])}"
        )


def applied(conn: "psycopg.Connection[Any]", namespace: str, name: str, version: str) -> int:
    """Return how many events of its stream a version has applied; `conn` is one of `Servers.rows`."""
    query = sql.SQL("select coalesce(sum(position), 0)::bigint from {} where version = {}").format(
        sql.Identifier(names.read_schema(namespace, name), "positions"), sql.Literal(version)
    )
    row: Sequence[int] | None = conn.execute(query).fetchone()
    assert row is not None
    return row[0]


def fold_all(servers: Servers, stream: Stream, name: str, version: str, count: int) -> Service:
    """Start a projector and return it once it has applied the `count` events of `stream`."""
    process = servers.platform.projector(stream.namespace, name, version)
    process.up()
    with servers.rows() as conn:
        until(
            lambda: applied(conn, stream.namespace, name, version) >= count,
            f"{count} events are folded",
            log=process.log,
            seconds=max(300, count / _LEAST_RATE),
        )
    return process
