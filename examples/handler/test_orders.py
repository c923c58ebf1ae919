"""The projection tried out without servers: `pytest` in this folder, with Refold installed."""

from decimal import Decimal
from pathlib import Path

import pytest
from refold.testing import BadEventError, event, fold

PROJECTION = Path(__file__).with_name("projection.yaml")
PLACED = event("order-1", "OrderPlaced", {"customerId": "c1"})


def test_an_order_has_its_lines_by_product() -> None:
    rows = fold(
        PROJECTION,
        [
            PLACED,
            event("order-1", "ItemAdded", {"product": "tea", "qty": 2, "price": 2.50}),
            event("order-1", "ItemAdded", {"product": "tea", "qty": 1, "price": 2.50}),
            event("order-1", "OrderShipped"),
        ],
    )
    assert rows == {
        "order-1": {"status": "shipped", "customer": "c1", "lines": {"tea": 3}, "total": Decimal("7.5")},
    }


def test_a_purged_order_is_gone() -> None:
    assert fold(PROJECTION, [PLACED, event("order-1", "OrderPurged")]) == {}


def test_an_order_without_lines_is_not_shipped() -> None:
    with pytest.raises(BadEventError, match=r"event 1 is bad: .*without lines"):
        fold(PROJECTION, [PLACED, event("order-1", "OrderShipped")])
