"""What the event store refuses, as types: callers choose by class, people read the message."""


class EventStoreError(Exception):
    """Anything that the event store refuses or can't do now."""


class ConflictError(EventStoreError):
    """A name, schema, topic or role belongs to someone else, or differs from what can't be changed.

    Attributes:
        what: name, schema, topic, partitions or role.
    """

    def __init__(self, what: str, message: str) -> None:
        super().__init__(message)
        self.what = what


class NotInstalledError(EventStoreError):
    """The database holds no event store, or an older one than this version needs."""
