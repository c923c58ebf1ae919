"""EventStreams and Projections as the operator reads them; the API server has checked them against the CRDs."""

import datetime as dt
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

#: Changing its value builds a new version of a Projection from the same definition.
REBUILD_ANNOTATION = "refold.dev/rebuild"
#: Its value is the UID of a former resource of the same name, gone without the operator; its data is taken over.
TAKE_OVER_ANNOTATION = "refold.dev/take-over"
#: Where its value is anything but false, the operator leaves the resource alone, as with `spec.paused`.
PAUSED_ANNOTATION = "refold.dev/paused"
#: Where its value is true, a deletion doesn't wait for a backend that can't be reached: what stands there stays.
LET_GO_ANNOTATION = "refold.dev/let-go"
FINALIZER = "refold.dev/finalizer"

DeletionPolicy = Literal["Retain", "Delete"]


_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def duration(text: object) -> dt.timedelta:
    """Return a duration like 1h30m, 90s or 0s, as the CRDs let them pass.

    Raises:
        ValueError: `text` is something else.
    """
    found = _DURATION.fullmatch(text) if isinstance(text, str) and text else None
    if found is None:
        raise ValueError(f"not a duration like 1h30m: {text!r}")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return dt.timedelta(hours=hours, minutes=minutes, seconds=seconds)


Duration = Annotated[dt.timedelta, BeforeValidator(duration)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Metadata(_Model):
    """What the operator needs to know of a resource itself."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str = Field(alias="resourceVersion")
    finalizers: list[str] = []
    annotations: dict[str, str] = {}
    creation_timestamp: dt.datetime | None = Field(default=None, alias="creationTimestamp")
    deletion_timestamp: str | None = Field(default=None, alias="deletionTimestamp")


class Spec(_Model):
    """What the specs of both kinds have."""

    paused: bool = False


class Topic(_Model):
    """`spec.topic` of an EventStream."""

    name: str | None = None
    replicas: int | None = None
    config: dict[str, str] = {}
    adopt: bool = False


class EventType(_Model):
    """One of `spec.events` of an EventStream; the schema is whatever was written, true where nothing was."""

    name: str
    json_schema: Any = Field(default=True, alias="schema")


class EventStreamSpec(Spec):
    """`spec` of an EventStream."""

    partitions: int
    topic: Topic = Topic()
    events: list[EventType] | None = None
    deletion_policy: DeletionPolicy = Field(default="Retain", alias="deletionPolicy")


class EventStream(_Model):
    """An EventStream. `definition` is the whole spec as it is."""

    metadata: Metadata
    spec: EventStreamSpec
    definition: Mapping[str, Any]
    status: dict[str, Any] = {}


class Processes(_Model):
    """What `spec.projector` and `spec.query` of a Projection have in common."""

    replicas: int = 1
    resources: dict[str, dict[str, str | int]] = {}


class ProjectorScaling(_Model):
    """`spec.projector.autoscaling` of a Projection: how many projectors, by the time that they need for what waits."""

    min_replicas: int = Field(default=1, alias="minReplicas", ge=0)
    max_replicas: int = Field(alias="maxReplicas", ge=1)
    target_drain_seconds: int = Field(default=30, alias="targetDrainSeconds", ge=1)
    stabilization_window_seconds: int = Field(default=300, alias="stabilizationWindowSeconds", ge=0)


class QueryScaling(_Model):
    """`spec.query.autoscaling` of a Projection: what the HorizontalPodAutoscaler of its query processes says."""

    min_replicas: int = Field(default=1, alias="minReplicas", ge=1)
    max_replicas: int = Field(alias="maxReplicas", ge=1)
    target_cpu: int = Field(default=70, alias="targetCPUUtilizationPercentage", ge=1)


class Projectors(Processes):
    """`spec.projector` of a Projection."""

    autoscaling: ProjectorScaling | None = None

    @property
    def scaling(self) -> ProjectorScaling | None:
        """By what the number of projectors is decided; None where it is `replicas`, which 0 always is."""
        return self.autoscaling if self.replicas else None


class Queries(Processes):
    """`spec.query` of a Projection."""

    autoscaling: QueryScaling | None = None

    @property
    def scaling(self) -> QueryScaling | None:
        """By what the number of processes is decided; None where it is `replicas`, which 0 always is."""
        return self.autoscaling if self.replicas else None


class SecretReference(_Model):
    """The name of a Secret in the resource's namespace."""

    name: str


class ReadStoreChoice(_Model):
    """`spec.readStore` of a Projection: the installation's, or for a Redis of one's own its connection.

    `sql` asks for a login that may read the live version's rows in SQL.
    """

    type: Literal["postgres", "redis"] = "postgres"
    sql: bool = False
    connection_ref: SecretReference | None = Field(default=None, alias="connectionRef")


class ProjectionSpec(Spec):
    """The parts of a Projection's `spec` that aren't its definition (`refold.projection.definition` has that)."""

    streams: list[str]
    read_store: ReadStoreChoice = Field(default=ReadStoreChoice(), alias="readStore")
    projector: Projectors = Projectors()
    query: Queries = Queries()
    keep_previous: Duration = Field(default=dt.timedelta(hours=1), alias="keepPrevious", validate_default=False)
    as_of: dt.datetime | None = Field(default=None, alias="asOf")
    ttl: Duration | None = None
    deletion_policy: DeletionPolicy = Field(default="Delete", alias="deletionPolicy")


class Projection(_Model):
    """A Projection. `definition` is the whole spec as it is."""

    metadata: Metadata
    spec: ProjectionSpec
    definition: Mapping[str, Any]
    status: dict[str, Any] = {}


def event_stream(body: Mapping[str, Any]) -> EventStream:
    """Return the EventStream of an object of the API.

    Raises:
        pydantic.ValidationError: the object isn't one that the CRD lets pass.
    """
    return EventStream.model_validate({**body, "definition": body.get("spec", {})})


def projection(body: Mapping[str, Any]) -> Projection:
    """Return the Projection of an object of the API.

    Raises:
        pydantic.ValidationError: the object isn't one that the CRD lets pass.
    """
    return Projection.model_validate({**body, "definition": body.get("spec", {})})


def why_paused(resource: EventStream | Projection) -> str | None:
    """Return what keeps the operator from a resource, `spec.paused` or the annotation; None where nothing does."""
    if resource.spec.paused:
        return "spec.paused is true"
    value = resource.metadata.annotations.get(PAUSED_ANNOTATION, "false")
    return None if value == "false" else f"the annotation {PAUSED_ANNOTATION} is {value or 'there'}"


def may_let_go(resource: EventStream | Projection) -> bool:
    """Tell whether its deletion goes on without a backend that can't be reached."""
    return resource.metadata.annotations.get(LET_GO_ANNOTATION) == "true"


def retained(resource: EventStream | Projection) -> EventStream | Projection:
    """Return the resource with `deletionPolicy: Retain`, whatever it says."""
    spec = resource.spec.model_copy(update={"deletion_policy": "Retain"})
    return resource.model_copy(update={"spec": spec})
