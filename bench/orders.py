"""The workload "orders": lives of orders from a seed, interleaved as they would arrive.

Subjects `order-<uuid>` of five events: OrderPlaced with three items, ItemAdded, OrderPaid, OrderShipped,
OrderDelivered; one in ten ends in OrderCancelled instead. Each carries orderId and customerId (5,000 customers) and is
250 to 700 bytes of JSON. Fifty subjects are open at a time.
"""

import itertools
import json
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_WINDOW = 50
_CUSTOMERS = 5_000
_TYPES = ("OrderPlaced", "ItemAdded", "OrderPaid", "OrderShipped", "OrderDelivered")
_STREETS = ("Harbour Street", "Long Lane", "Station Road", "Mill Row", "Church Walk", "Garden Avenue", "Bridge Way")


class OrderEvent(NamedTuple):
    """One event; `revision` is its 1-based number in its subject, `data` JSON text."""

    subject: str
    revision: int
    type: str
    data: bytes


def _item(draw: random.Random) -> dict[str, Any]:
    number = draw.randrange(100_000)
    return {"sku": f"sku-{number:06}", "name": f"article number {number}", "qty": draw.randrange(1, 5),
            "price": draw.randrange(100, 20_000) / 100}  # fmt: skip


def _data(draw: random.Random, type_: str, order: str, customer: str) -> dict[str, Any]:
    """Return the data of one event, between 250 and 700 bytes of JSON."""
    data: dict[str, Any] = {
        "orderId": order,
        "customerId": customer,
        "at": f"2026-01-{draw.randrange(1, 29):02}T12:00:00Z",
    }
    address = {"street": f"{draw.choice(_STREETS)} {draw.randrange(1, 200)}", "city": "Newcastle upon Tyne",
               "postcode": f"NE{draw.randrange(1, 60)} {draw.randrange(1, 9)}XY", "country": "GB"}  # fmt: skip
    match type_:
        case "OrderPlaced":
            items = [_item(draw) for _ in range(3)]
            total = round(sum(item["qty"] * item["price"] for item in items), 2)
            data |= {"items": items, "total": total, "currency": "EUR", "shipTo": address}
        case "ItemAdded":
            data |= {"item": _item(draw), "currency": "EUR", "addedBy": "customer", "channel": "web shop"}
        case "OrderPaid":
            data |= {"amount": draw.randrange(1000, 90_000) / 100, "currency": "EUR", "method": "credit card",
                     "provider": "payment provider",
                     "reference": str(uuid.UUID(int=draw.getrandbits(128)))}  # fmt: skip
        case "OrderShipped" | "OrderDelivered":
            data |= {
                "carrier": "parcel service",
                "parcel": str(uuid.UUID(int=draw.getrandbits(128))),
                "address": address,
            }
        case "OrderCancelled":
            data |= {"reason": "the customer changed their mind before the parcel was handed over", "by": "customer",
                     "refund": draw.randrange(1000, 90_000) / 100, "currency": "EUR", "address": address}  # fmt: skip
    return data


def _life(draw: random.Random) -> Iterator[OrderEvent]:
    order = f"order-{uuid.UUID(int=draw.getrandbits(128), version=4)}"
    customer = f"customer-{draw.randrange(_CUSTOMERS):04}"
    cancelled = draw.random() < 0.1
    for revision, type_ in enumerate(_TYPES, start=1):
        ended = "OrderCancelled" if cancelled and revision == len(_TYPES) else type_
        data = json.dumps(_data(draw, ended, order, customer)).encode()
        yield OrderEvent(order, revision, ended, data)


def events(*, seed: int = 1) -> Iterator[OrderEvent]:
    """Yield events without end: in each round one of the fifty open subjects goes on, chosen at random."""
    draw = random.Random(seed)
    window = [_life(draw) for _ in range(_WINDOW)]
    while True:
        place = draw.randrange(_WINDOW)
        event = next(window[place], None)
        if event is None:
            window[place] = _life(draw)
        else:
            yield event


def from_file(path: Path) -> Iterator[OrderEvent]:
    """Yield the events of a file with a line `{"subject", "type", "data"}` each; revisions are counted here."""
    revisions: dict[str, int] = {}
    with path.open() as lines:
        for line in lines:
            event = json.loads(line)
            revision = revisions.get(event["subject"], 0) + 1
            revisions[event["subject"]] = revision
            yield OrderEvent(event["subject"], revision, event["type"], json.dumps(event["data"]).encode())


def take(count: int, *, seed: int = 1, file: Path | None = None) -> list[OrderEvent]:
    """Return the first `count` events."""
    return list(itertools.islice(events(seed=seed) if file is None else from_file(file), count))
