"""The e2e tests' resources and load: orders, folded to a row an order and a row a customer."""

import itertools
import random
import threading
from collections.abc import Iterator
from typing import Any

import yaml

from hack.client import ReadModel, Stream

STREAM = """
apiVersion: refold.dev/v1alpha1
kind: EventStream
metadata: {name: orders}
spec: {partitions: 3, deletionPolicy: Delete}
"""
ORDER_STATUS = """
apiVersion: refold.dev/v1alpha1
kind: Projection
metadata: {name: order-status}
spec:
  streams: [orders]
  columns:
    - {name: status, type: text, index: true}
    - {name: items, type: integer}
    - {name: total, type: numeric}
  fold:
    - {type: OrderPlaced, set: {status: "'placed'"}, add: {items: "1", total: data.total}}
    - {type: ItemAdded, add: {items: data.qty, total: data.qty * data.price}, when: data.qty > 0}
    - {type: OrderPurged, delete: true}
"""
CUSTOMERS = """
apiVersion: refold.dev/v1alpha1
kind: Projection
metadata: {name: customers}
spec:
  streams: [orders]
  key: data.customer
  columns:
    - {name: orders, type: integer}
    - {name: items, type: integer}
    - {name: spent, type: numeric}
  fold:
    - {type: OrderPlaced, add: {orders: "1", items: "1", spent: data.total}}
    - {type: ItemAdded, add: {items: data.qty, spent: data.qty * data.price}}
"""


def changed(document: str, **spec: Any) -> dict[str, Any]:
    """Return a resource with other values in its spec."""
    resource: dict[str, Any] = yaml.safe_load(document)
    resource["spec"].update(spec)
    return resource


class Load(threading.Thread):
    """Appends orders until it is stopped, and folds them on its own; every append is tried until it is acknowledged."""

    def __init__(self, stream: Stream, *, seed: int) -> None:
        super().__init__(daemon=True)
        self._stream, self._random = stream, random.Random(seed)
        self._stopped = threading.Event()
        self._failure: Exception | None = None
        self.orders: dict[str, dict[str, Any]] = {}
        self.customers: dict[str, dict[str, Any]] = {}
        self.appended = 0

    def run(self) -> None:
        """Append batches of fifty orders' lives."""
        try:
            for number in itertools.count():
                if self._stopped.is_set():
                    return
                lines = [line for i in range(50) for line in self._life(f"order-{number}-{i}/x")]
                self.appended += self._stream.bulk(lines)
        except Exception as error:  # noqa: BLE001 - told by finish(), in the test's own thread
            self._failure = error

    def _life(self, subject: str) -> Iterator[dict[str, Any]]:
        """Yield the appends of one order, and fold them into the expected rows."""
        customer = f"customer {self._random.randrange(20)}"
        cents = self._random.randrange(10_000)
        row = {"status": "placed", "items": 1, "cents": cents}
        who = self.customers.setdefault(customer, {"orders": 0, "items": 0, "cents": 0})
        who["orders"] += 1
        who["items"] += 1
        who["cents"] += cents
        events = [("OrderPlaced", {"customer": customer, "total": cents / 100})]
        for _ in range(self._random.randrange(3)):
            quantity, price = self._random.randrange(1, 4), self._random.randrange(500)
            events.append(("ItemAdded", {"customer": customer, "qty": quantity, "price": price / 100}))
            for counted in (row, who):
                counted["items"] += quantity
                counted["cents"] += quantity * price
        if self._random.random() < 0.1:
            events.append(("OrderPurged", {}))
        else:
            self.orders[subject] = row
        for revision, (type_, data) in enumerate(events):
            event = {"id": f"{type_}-{revision}", "type": type_, "data": data}
            yield {"subject": subject, "expectedRevision": revision or "none", "events": [event]}

    def finish(self) -> None:
        """Stop, wait for the last acknowledgement, and raise what went wrong."""
        self._stopped.set()
        self.join(240)
        assert not self.is_alive(), "the load still waits for an acknowledgement"
        if self._failure is not None:
            raise self._failure

    def wait_folded(self, *models: ReadModel) -> None:
        """Wait until the read models have applied all that was appended."""
        for model in models:
            model.wait_applied(self._stream.positions)

    def wrong_orders(self, model: ReadModel) -> list[str]:
        """Return what differs between the expected orders and the rows."""
        found = {key: _cents(row, "total") for key, row in model.rows()}
        return _differences(found, self.orders)

    def wrong_customers(self, model: ReadModel) -> list[str]:
        """Return what differs between the expected customers and the rows."""
        found = {key: _cents(row, "spent") for key, row in model.rows()}
        return _differences(found, self.customers)


def _cents(row: dict[str, Any], money: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != money} | {"cents": round(row[money] * 100)}


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert expected
    return [
        f"{key}: {found.get(key)} instead of {expected.get(key)}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]
