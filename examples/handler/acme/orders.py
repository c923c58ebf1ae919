"""A row an order, with its lines by product: more than expressions say well."""

from refold.projection.handler import Event, Table


def project(event: Event, table: Table) -> None:
    """Keep the order's status, its lines (quantities by product) and what they cost."""
    order = event.subject
    if event.type == "OrderPlaced":
        table.upsert(order, status="placed", customer=event.data["customerId"])
    elif event.type == "ItemAdded":
        product, quantity = event.data["product"], event.data["qty"]
        lines = (table.get(order) or {}).get("lines") or {}
        table.upsert(order, lines={**lines, product: lines.get(product, 0) + quantity})
        table.add(order, total=quantity * event.data["price"])
    elif event.type == "OrderShipped":
        row = table.get(order)
        if row is None or not row["lines"]:
            raise ValueError("an order without lines was shipped")
        table.upsert(order, status="shipped")
    elif event.type == "OrderPurged":
        table.delete(order)
