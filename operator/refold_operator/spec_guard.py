"""The guard: what a resource asks for that can't work, though it has the form that the CRDs' schemas and rules ask for.

Each kind has one function, with two callers: the admission webhook refuses a resource before it is stored, and
reconcile doesn't act on one. So a resource that came in while no webhook was there is refused in its conditions, with
the same words.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec
import pydantic
from kubernetes.utils.quantity import parse_quantity
from refold.eventstore import records
from refold.eventstore.appends import MAX_TYPE_BYTES, check_text
from refold.eventstore.errors import InvalidAppendError
from refold.eventstore.event_types import EventTypes, SchemaError
from refold.projection import definition as definitions
from refold.projection.definition import Problem

from refold_operator.resources import (
    EventStreamSpec,
    EventType,
    Processes,
    ProjectionSpec,
    ProjectorScaling,
    QueryScaling,
    Topic,
)

MESSAGE_BYTES = "max.message.bytes"
#: What Kafka takes, least and greatest, of those topic configurations that are numbers (`LogConfig` has the same).
_NUMBERS = {
    "flush.messages": (1, 2**63 - 1),
    "flush.ms": (0, 2**63 - 1),
    "local.retention.bytes": (-2, 2**63 - 1),
    "local.retention.ms": (-2, 2**63 - 1),
    MESSAGE_BYTES: (0, 2**31 - 1),
    "min.insync.replicas": (1, 2**31 - 1),
    "retention.bytes": (-2, 2**63 - 1),
    "retention.ms": (-1, 2**63 - 1),
    "segment.bytes": (1024 * 1024, 2**31 - 1),
    "segment.jitter.ms": (0, 2**63 - 1),
    "segment.ms": (1, 2**63 - 1),
}
#: Bytes that a Projection's spec may have as compact JSON, so that it is checked within about 2 s.
MAX_PROJECTION_BYTES = 256 * 1024
#: The resources of a container that Kubernetes knows by themselves; all others have a domain, such as nvidia.com/gpu.
_RESOURCES = ("cpu", "memory", "ephemeral-storage")


@dataclasses.dataclass(frozen=True)
class Rules:
    """What an installation allows.

    Attributes:
        event_bytes: the most that one event may have in the event store; topics must take all that are accepted.
        topic_prefixes: how the names of topics may begin, by namespace; `*`: in those that aren't named here. What
            begins with `<namespace>.` may always be. None: any topic may be had from anywhere.
        namespaces: those that the operator works in; empty: all.
    """

    event_bytes: int = 512 * 1024
    topic_prefixes: Mapping[str, Sequence[str]] | None = None
    namespaces: Sequence[str] = ()

    def prefixes(self, namespace: str) -> tuple[str, ...]:
        """Return how the names of a namespace's topics may begin."""
        if self.topic_prefixes is None:
            return ("",)
        return (f"{namespace}.", *self.topic_prefixes.get(namespace, self.topic_prefixes.get("*", ())))


def check_namespace(namespace: str, rules: Rules) -> list[Problem]:
    """Return why nobody would look at a resource of a namespace; empty where the operator works there."""
    if not rules.namespaces or namespace in rules.namespaces:
        return []
    message = (
        f"Refold doesn't work in {namespace}: use one of its namespaces, or add it to the chart's tenants.namespaces"
    )
    return [Problem("metadata.namespace", "NamespaceNotAllowed", message)]


def check_event_stream(spec: Mapping[str, Any], *, namespace: str, rules: Rules) -> list[Problem]:
    """Return all that keeps an EventStream of a namespace from working; empty where nothing does.

    Args:
        spec: its whole spec, as it was written.
        namespace: where it is.
        rules: what the installation allows.
    """
    try:
        stream = EventStreamSpec.model_validate(spec)
    except pydantic.ValidationError as error:
        return [definitions.malformed(details) for details in error.errors()]
    return [
        *_topic_name(stream.topic, namespace, rules),
        *_topic(stream.topic, rules.event_bytes),
        *_event_types(stream.events or []),
    ]


def check_projection(spec: Mapping[str, Any]) -> list[Problem]:
    """Return all that keeps a Projection with this whole spec, as it was written, from working."""
    size = len(msgspec.json.encode(spec))
    if size > MAX_PROJECTION_BYTES:
        message = (
            f"has {size} bytes as compact JSON, at most {MAX_PROJECTION_BYTES} are taken: make several Projections"
        )
        return [Problem("spec", "TooLarge", message)]
    try:
        projection = ProjectionSpec.model_validate(spec)
        definitions.parse(spec)
    except pydantic.ValidationError as error:
        return [definitions.malformed(details) for details in error.errors()]
    except definitions.InvalidDefinitionError as error:
        problems = error.problems
    else:
        problems = []
    return [
        *problems,
        *_processes("spec.projector.resources", projection.projector),
        *_processes("spec.query.resources", projection.query),
        *_scaling("spec.projector.autoscaling", projection.projector.autoscaling),
        *_scaling("spec.query.autoscaling", projection.query.autoscaling),
        *_utilisation(projection),
    ]


def told(problems: Sequence[Problem], *, most: int = 10) -> str:
    """Return one text of all problems, or of the first `most` of them and how many there are besides."""
    text = "; ".join(str(problem) for problem in problems[:most])
    return text if len(problems) <= most else f"{text}; and {len(problems) - most} more"


def _topic_name(topic: Topic, namespace: str, rules: Rules) -> Iterator[Problem]:
    """Refuse the topic of another namespace's streams: whoever made it first would keep them from it."""
    allowed = rules.prefixes(namespace)
    if topic.name is not None and not topic.name.startswith(allowed):
        message = (
            f"{topic.name} isn't for namespace {namespace}, whose topics begin with {' or '.join(allowed)}: leave it "
            "out, choose such a name, or add a prefix to the chart's tenants.topicPrefixes"
        )
        yield Problem("spec.topic.name", "TopicNotAllowed", message)


def _topic(topic: Topic, event_bytes: int) -> Iterator[Problem]:
    for name, value in topic.config.items():
        path = f"spec.topic.config.{name}"
        if name not in _NUMBERS:
            continue
        least, greatest = _NUMBERS[name]
        try:
            number = int(value)
        except ValueError:
            yield Problem(path, "InvalidField", f"{value} is no whole number")
            continue
        if not least <= number <= greatest:
            yield Problem(path, "InvalidField", f"{value} is not within {least} and {greatest}, which Kafka takes")
        elif name == MESSAGE_BYTES and number < (needed := records.message_bytes(event_bytes)):
            message = (
                f"{value} is too small: events of up to {event_bytes} bytes (eventstore.limits.eventBytes) need "
                f"{needed}, or the stream could get stuck at an event that its topic refuses; leave it out, raise it, "
                "or lower the event store's limit"
            )
            yield Problem(path, "MessageBytesTooSmall", message)
        elif name == "min.insync.replicas" and topic.replicas is not None and number > topic.replicas:
            message = f"{value} is more than spec.topic.replicas, {topic.replicas}: no event could ever be relayed"
            yield Problem(path, "InvalidField", message)


def _event_types(events: Sequence[EventType]) -> Iterator[Problem]:
    for position, event_type in enumerate(events):
        path = f"spec.events[{position}]"
        try:
            check_text("name", event_type.name, MAX_TYPE_BYTES)
        except InvalidAppendError as error:
            yield Problem(f"{path}.name", "InvalidField", str(error))
            continue
        try:
            EventTypes({event_type.name: event_type.json_schema})
        except SchemaError as error:
            yield Problem(f"{path}.schema", "InvalidSchema", str(error))


def _processes(path: str, processes: Processes) -> Iterator[Problem]:
    """Refuse resources with which the API server takes no Deployment."""
    amounts: dict[str, dict[str, Decimal]] = {}
    for kind, named in processes.resources.items():
        for name, quantity in named.items():
            place, amount = f"{path}.{kind}.{name}", _amount(quantity)
            if name not in _RESOURCES and "/" not in name and not name.startswith("hugepages-"):
                message = f"there is no such resource: use {', '.join(_RESOURCES)}, or one with a domain"
                yield Problem(place, "InvalidField", message)
            elif amount is None:
                yield Problem(place, "InvalidField", f"{quantity} is no quantity: write one like 100m or 256Mi")
            elif amount < 0:
                yield Problem(place, "InvalidField", f"{quantity} is negative")
            else:
                amounts.setdefault(kind, {})[name] = amount
    limits = amounts.get("limits", {})
    for name, amount in amounts.get("requests", {}).items():
        if name in limits and amount > limits[name]:
            asked, most = (processes.resources[kind][name] for kind in ("requests", "limits"))
            message = f"{asked} is over {path}.limits.{name}, which is {most}: raise that, or lower this"
            yield Problem(f"{path}.requests.{name}", "InvalidField", message)


def _scaling(path: str, scaling: ProjectorScaling | QueryScaling | None) -> Iterator[Problem]:
    if scaling is not None and scaling.min_replicas > scaling.max_replicas:
        message = (
            f"{scaling.min_replicas} is over maxReplicas, which is {scaling.max_replicas}: raise that, or lower this"
        )
        yield Problem(f"{path}.minReplicas", "InvalidField", message)


def _utilisation(projection: ProjectionSpec) -> Iterator[Problem]:
    """Refuse what a HorizontalPodAutoscaler can't work with: it counts in shares of the CPU that is asked for."""
    resources = projection.query.resources
    asked = resources.get("requests", {}).get("cpu", resources.get("limits", {}).get("cpu"))
    if projection.query.autoscaling is not None and asked is not None and _amount(asked) == 0:
        message = (
            f"{asked} leaves nothing that spec.query.autoscaling.targetCPUUtilizationPercentage could be a share of: "
            "ask for some CPU, such as 50m"
        )
        yield Problem("spec.query.resources.requests.cpu", "InvalidField", message)


def _amount(quantity: str | int) -> Decimal | None:
    """Return a quantity of Kubernetes as a number; None where it is none."""
    try:
        amount = Decimal(parse_quantity(quantity))
    except (ValueError, ArithmeticError):
        return None
    return amount if amount.is_finite() else None
