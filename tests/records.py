"""Events as the relay's records hold them."""

import datetime as dt

from refold.events import Event, Headers

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def headers(event: Event, *, namespace: str, name: str, incarnation: str) -> list[tuple[str, bytes]]:
    """Return the headers of an event's record."""
    return Headers(namespace=namespace, name=name, incarnation=incarnation).of(
        event.position, event.subject.encode(), event.revision, event.id.encode(), event.type.encode(),
        microseconds(event.time), None if event.metadata is None else bytes(event.metadata),
    )  # fmt: skip


def microseconds(time: dt.datetime) -> int:
    """Return the microseconds since 1970."""
    return (time - _EPOCH) // dt.timedelta(microseconds=1)
