"""What plain Python needs for both read models: msgspec's decoding and a fold into dicts, without a database."""

import time
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, cast

import msgspec

from bench.limits import kafka
from bench.result import Run

#: A row by its key: its columns in order, None where nothing was set.
Rows = dict[str, list[Any]]

decode = msgspec.json.Decoder().decode
decode_exactly = msgspec.json.Decoder(float_hook=Decimal).decode


def fold(
    events: Iterable[tuple[str, str, object, Any]],
    orders: Rows,
    customers: Rows,
    *,
    decode: Callable[[Any], Any] = decode,
) -> None:
    """Fold events (subject, type, time, JSON text) into the orders' and the customers' rows.

    An order's columns: customer, status, items, total, paid, updated; a customer's: orders, spent.
    """
    for subject, type_, at, text in events:
        data = decode(text)
        row = orders.get(subject)
        if row is None:
            row = orders[subject] = [None, None, None, None, None, None]
        row[5] = at
        if type_ == "OrderPlaced":
            row[0] = data["customerId"]
            row[1] = "placed"
            row[2] = (row[2] or 0) + len(data["items"])
            row[3] = (row[3] or 0) + data["total"]
            customer = customers.get(data["customerId"])
            if customer is None:
                customer = customers[data["customerId"]] = [None, None]
            customer[0] = (customer[0] or 0) + 1
        elif type_ == "ItemAdded":
            item = data["item"]
            row[2] = (row[2] or 0) + 1
            row[3] = (row[3] or 0) + item["qty"] * item["price"]
        elif type_ == "OrderPaid":
            row[1] = "paid"
            row[4] = data["amount"]
            customer = customers.get(data["customerId"])
            if customer is None:
                customer = customers[data["customerId"]] = [None, None]
            customer[1] = (customer[1] or 0) + data["amount"]
        elif type_ == "OrderShipped":
            row[1] = "shipped"
        elif type_ == "OrderDelivered":
            row[1] = "delivered"
        elif type_ == "OrderCancelled":
            row[1] = "cancelled"


def in_memory(events: Iterable[tuple[str, str, object, bytes]], count: int) -> Run:
    """Decode and fold `count` events that are in memory."""
    orders: Rows = {}
    customers: Rows = {}
    began = time.perf_counter()
    fold(events, orders, customers)
    return Run(events_per_s=count / (time.perf_counter() - began))


def from_topic(bootstrap: str, topic: str, count: int) -> Run:
    """Consume, decode and fold the `count` events of a topic that `kafka.produce` wrote with their types."""
    orders: Rows = {}
    customers: Rows = {}
    began = time.perf_counter()
    for messages in kafka.consume(bootstrap, topic, count):
        fold(
            (
                (message.key().decode(), message.headers()[0][1].decode(), message.timestamp()[1], message.value())
                for message in cast("list[Any]", messages)
            ),
            orders,
            customers,
        )
    return Run(events_per_s=count / (time.perf_counter() - began))
