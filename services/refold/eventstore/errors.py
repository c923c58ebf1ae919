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


class UnknownStreamError(EventStoreError):
    """The store has no active stream of that name, or no such partition of it."""


class InactiveStreamError(UnknownStreamError):
    """A stream that was active when it was last looked up isn't any more; another of its name may be."""

    def __init__(self, namespace: str, name: str) -> None:
        super().__init__(f"stream {namespace}/{name} isn't active any more; is its EventStream Ready?")


class OtherHistoryError(EventStoreError):
    """A position or token is none of the stream's history as it is; a reader must begin anew."""


class InvalidAppendError(EventStoreError):
    """An append that can never be accepted as it is; nothing of it was written.

    Attributes:
        field: what is wrong in it, for example `subject` or `events[2].data`.
        reason: what is wrong with it.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class UnknownTypeError(InvalidAppendError):
    """An event of a type that the stream doesn't take; nothing of its append was written.

    Attributes:
        types: those that the stream takes, at most `TOLD`.
    """

    TOLD = 100

    def __init__(self, field: str, event_type: str, types: list[str]) -> None:
        self.types = types[: self.TOLD]
        more = f" and {len(types) - self.TOLD} more" if len(types) > self.TOLD else ""
        super().__init__(field, f"the stream takes no {event_type!r}; it takes {', '.join(self.types)}{more}")


class InvalidDataError(InvalidAppendError):
    """An event whose data doesn't match the schema of its type; nothing of its append was written.

    Attributes:
        errors: the first of them, each the JSON pointer to the place in the data, and the reason; may be empty.
    """

    def __init__(self, field: str, event_type: str, errors: list[tuple[str, str]]) -> None:
        self.errors = errors
        told = "; ".join(f"at {pointer}: {reason}" if pointer else reason for pointer, reason in errors)
        super().__init__(
            field,
            f"doesn't match the schema of {event_type}: {told or 'what exactly is wrong takes too long to tell'}",
        )


class TooLargeError(InvalidAppendError):
    """An append, or something in it, is over a limit; nothing of it was written."""


class RevisionConflictError(EventStoreError):
    """The subject isn't at the expected revision; nothing was written.

    Attributes:
        subject: the subject.
        current: its revision (0: it has no events).
        index: which append of an atomic append it is, from 0; None where it stands alone.
    """

    def __init__(self, subject: str, expected: int | str, current: int, *, index: int | None = None) -> None:
        super().__init__(
            f"{_which(index)}subject {subject!r} is at revision {current}, expected was {expected}; "
            "read it and try again"
        )
        self.subject = subject
        self.current = current
        self.index = index


class IdConflictError(EventStoreError):
    """Ids of the append are known in its subject, and it isn't a retry of what was appended; nothing was written.

    Attributes:
        subject: the subject.
        current: its revision.
        index: which append of an atomic append it is, from 0; None where it stands alone.
    """

    def __init__(self, subject: str, current: int, *, index: int | None = None) -> None:
        others = "" if index is None else "or the atomic append has others whose ids aren't known, "
        super().__init__(
            f"{_which(index)}subject {subject!r} (at revision {current}) has events with some of these ids, and other "
            f"types or data, or only some of them, or in another order, {others}while a retry must repeat the append "
            "as it was; a new event needs a new id"
        )
        self.subject = subject
        self.current = current
        self.index = index


class OverloadedError(EventStoreError):
    """Too many appends are waiting; this one wasn't taken. Try again a little later."""


class UnavailableError(EventStoreError):
    """PostgreSQL couldn't be asked in time. Whether an append took effect is unknown: repeat it with the same ids."""


def _which(index: int | None) -> str:
    return "" if index is None else f"appends[{index}]: "
