"""What can keep a resource from its desired state, as conditions report it."""


class ReconcileError(Exception):
    """A step of a reconcile failed in a way that the resource's status tells.

    Attributes:
        condition: the condition that the failed step belongs to, such as `TopicReady`.
        reason: one CamelCase word for programs.
        message: what was asked of which system, what it answered, and what a person can do.
        retry_after: seconds until the next try, or None for the resource's own exponential back-off.
    """

    def __init__(self, condition: str, reason: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        self.condition = condition
        self.reason = reason
        self.message = message
        self.retry_after = retry_after


class UnreachableError(Exception):
    """A backend (PostgreSQL, Kafka, the Kubernetes API) didn't answer or refused the connection; it may come back.

    Attributes:
        system: which one, for people, such as `Kafka at kafka:9092`.
        reason: one CamelCase word where more is known than that, such as `KafkaAuthenticationFailed`.
    """

    def __init__(self, system: str, answer: str, *, reason: str | None = None) -> None:
        super().__init__(f"{system} can't be reached: {answer}")
        self.system = system
        self.reason = reason


class BusyError(UnreachableError):
    """A backend gave up on this request, for example since somebody holds a lock; others may go through."""


class ForbiddenError(Exception):
    """Kafka knows the operator and doesn't authorise what it asked; until somebody grants it, it never will."""
