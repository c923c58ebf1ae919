"""The read models under attack: each as a Projection defines it, and folded in plain Python.

A model comes in generations: another definition each, for a build that takes the place of the one before. All numbers
of generation n that are added up count n times, so no two have the same rows. The even generations of the orders also
look at the row before each event, which projectors do in another way.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

from tests.attack.history import History

#: Rows by their keys: the value of each column.
Rows = dict[str, dict[str, Any]]


class Model(NamedTuple):
    """A read model of the stream `orders`; `spec` and `fold` take a generation, `index` names an indexed column."""

    name: str
    spec: Callable[[int], dict[str, Any]]
    fold: Callable[[History, int], Rows]
    index: str


def _orders_spec(generation: int) -> dict[str, Any]:
    looks_back = [{"type": "ItemAdded", "set": {"before": "row.total"}}] if generation % 2 == 0 else []
    return {
        "streams": ["orders"],
        "columns": [
            {"name": "status", "type": "text", "index": True}, {"name": "items", "type": "integer"},
            {"name": "total", "type": "numeric"}, {"name": "before", "type": "numeric"},
        ],
        "fold": [
            {"type": "OrderPlaced", "set": {"status": "'placed'"}, "add": {"items": "1"}},
            {"type": "OrderPlaced", "add": {"total": f"data.total * {generation}"}},
            {"type": "ItemAdded", "add": {"items": "data.qty", "total": f"data.qty * data.price * {generation}"}},
            *looks_back,
            {"type": "OrderPaid", "set": {"status": "'paid'"}},
            {"type": "OrderPurged", "delete": True},
        ],
    }  # fmt: skip


def _fold_orders(history: History, generation: int) -> Rows:
    rows: Rows = {}
    for partition in history:
        for event in partition:
            if event.type == "OrderPurged":
                rows.pop(event.subject, None)
                continue
            row = rows.setdefault(event.subject, {"status": None, "items": None, "total": None, "before": None})
            match event.type:
                case "OrderPlaced":
                    row["status"] = "placed"
                    row["items"] = (row["items"] or 0) + 1
                    row["total"] = (row["total"] or 0) + _exact(event.data["total"]) * generation
                case "ItemAdded":
                    if generation % 2 == 0:
                        row["before"] = row["total"]
                    row["items"] = (row["items"] or 0) + event.data["qty"]
                    amount = event.data["qty"] * _exact(event.data["price"]) * generation
                    row["total"] = (row["total"] or 0) + amount
                case "OrderPaid":
                    row["status"] = "paid"
    return rows


def _customers_spec(generation: int) -> dict[str, Any]:
    return {
        "streams": ["orders"],
        "key": "data.customer",
        "columns": [
            {"name": "orders", "type": "integer", "index": True}, {"name": "spent", "type": "numeric"},
            {"name": "cheapest", "type": "numeric"}, {"name": "dearest", "type": "numeric"},
            {"name": "last", "type": "text"}, {"name": "revision", "type": "integer"},
        ],
        "fold": [
            {
                "type": "OrderPlaced",
                "set": {"last": "subject", "revision": "event.revision"},
                "add": {"orders": str(generation), "spent": "data.total"},
            },
            {
                "type": "ItemAdded",
                "set": {"last": "subject", "revision": "event.revision"},
                "add": {"spent": "data.qty * data.price"},
                "min": {"cheapest": "data.price"},
                "max": {"dearest": "data.price"},
            },
        ],
    }  # fmt: skip


def _fold_customers(history: History, generation: int) -> Rows:
    columns = ("orders", "spent", "cheapest", "dearest", "last", "revision")
    rows: Rows = {}
    stamps: dict[str, Any] = {}
    for number, partition in enumerate(history):
        for event in partition:
            if event.type not in ("OrderPlaced", "ItemAdded"):
                continue
            customer = event.data["customer"]
            row = rows.setdefault(customer, dict.fromkeys(columns))
            if event.type == "OrderPlaced":
                row["orders"] = (row["orders"] or 0) + generation
                amount = _exact(event.data["total"])
            else:
                price = _exact(event.data["price"])
                row["cheapest"] = price if row["cheapest"] is None else min(row["cheapest"], price)
                row["dearest"] = price if row["dearest"] is None else max(row["dearest"], price)
                amount = event.data["qty"] * price
            row["spent"] = (row["spent"] or 0) + amount
            # of all that set a column the one that was recorded last wins
            stamp = (event.recorded_at, number, event.position)
            if customer not in stamps or stamp > stamps[customer]:
                stamps[customer] = stamp
                row["last"], row["revision"] = event.subject, event.revision
    return rows


def _exact(number: float) -> Decimal:
    return Decimal(str(number))


#: A row an order, fed by one partition.
ORDERS = Model("order-status", _orders_spec, _fold_orders, "status")
#: A row a customer, fed by all partitions.
CUSTOMERS = Model("customers", _customers_spec, _fold_customers, "orders")
