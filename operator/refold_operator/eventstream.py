"""EventStreams: a claim in the catalog, a Kafka topic, a schema with its roles.

`reconcile` looks at the resource, the catalog and Kafka, and makes of them what the spec says. What to do about the
topic and whether it is ours to touch is decided by `plan_topic`, a pure function.
"""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import psycopg
import structlog
from confluent_kafka import KafkaException
from refold import names
from refold.eventstore import records
from refold.eventstore.catalog import Stream
from refold.eventstore.errors import ConflictError, EventStoreError, NotInstalledError
from refold.kafka import CredentialsError
from refold.projection.definition import Problem

from refold_operator import children, spec_guard
from refold_operator.access import Access
from refold_operator.cluster import Cluster, RefusedError, covers
from refold_operator.errors import ForbiddenError, ReconcileError, UnreachableError
from refold_operator.kafka import Kafka, Topic, TopicExistsError, TopicRefusedError
from refold_operator.resources import TAKE_OVER_ANNOTATION, EventStream
from refold_operator.status import Condition, Status, find
from refold_operator.store import Store

_log = structlog.get_logger(__name__)

#: Seconds until a topic is looked at again that was just asked for and isn't known to all brokers yet.
_SOON = 0.5
#: Seconds between looks at a topic that was just made, before that: brokers hear of it right after the controller.
_PAUSES = (0.02, 0.05, 0.1, 0.2)

#: What an EventStream may configure (the CRD has the same list). What isn't in the spec gets the broker's default.
CONFIGURABLE = frozenset(
    {
        "compression.type", "flush.messages", "flush.ms", "local.retention.bytes", "local.retention.ms",
        "max.message.bytes", "min.insync.replicas", "remote.storage.enable", "retention.bytes", "retention.ms",
        "segment.bytes", "segment.jitter.ms", "segment.ms",
    }
)  # fmt: skip
_KAFKAS_MESSAGE_BYTES = 1024 * 1024 + 12  # Kafka's own default
# Always set, whatever the brokers' defaults are: compaction would drop events.
_FIXED = {"cleanup.policy": "delete"}


@dataclasses.dataclass(frozen=True)
class Refuse:
    """Leave the topic alone and say why."""

    reason: str
    message: str


@dataclasses.dataclass(frozen=True)
class Examine:
    """Look whether the topic is empty, then decide again."""


@dataclasses.dataclass(frozen=True)
class Create:
    """Claim the stream if it isn't claimed, then create the topic.

    Attributes:
        config: the new topic's own configuration.
    """

    partitions: int
    replicas: int
    config: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Keep:
    """The topic is the stream's own.

    Attributes:
        config: what to change; None resets one to the broker's default.
        note: what a person should know, or empty.
    """

    config: Mapping[str, str | None]
    note: str = ""


def plan_topic(
    stream: EventStream,
    *,
    topic: Topic | None,
    claim: Stream | None,
    kafka_cluster: str,
    default_replicas: int,
    event_bytes: int,
    held: int | None = None,
) -> Refuse | Examine | Create | Keep:
    """Decide what to do about the topic.

    A topic that somebody else made becomes the stream's where `spec.topic.adopt` says so and it is empty. One with
    records never does: a checkpoint names the id of its topic, so no other topic's records can be told from strangers'.

    Args:
        stream: the resource.
        topic: the topic of that name as it is, if there is one.
        claim: the catalog's entry of the stream, if there is one.
        kafka_cluster: the id of the Kafka cluster that was looked at.
        default_replicas: the replication factor where the spec has none.
        event_bytes: the most that one event may have in the event store; the topic must take all that are accepted.
        held: how many records the topic holds; None where nobody has looked.
    """
    name = topic_name(stream)
    least = records.message_bytes(event_bytes)
    wanted = {**_FIXED, spec_guard.MESSAGE_BYTES: str(max(_KAFKAS_MESSAGE_BYTES, least)), **stream.spec.topic.config}
    if claim is not None and claim.topic != name:
        return Refuse(
            "TopicImmutable",
            f"the stream was made with topic {claim.topic}, spec.topic.name asks for {name}; it can't be changed",
        )
    if claim is not None and claim.partitions != stream.spec.partitions:
        return Refuse(
            "PartitionsImmutable",
            f"the stream's history has {claim.partitions} partitions, spec.partitions asks for "
            f"{stream.spec.partitions}; it can't be changed: set it back, or copy the events into a new EventStream",
        )
    if topic is None:
        return Create(stream.spec.partitions, stream.spec.topic.replicas or default_replicas, wanted)
    # A claim of this cluster without an id is written just before the topic is made; so a topic that is there now was
    # made after the claim, by us, before we could record its id.
    recorded = claim.topic_id if claim is not None and claim.kafka_cluster == kafka_cluster else None
    just_made = (
        claim is not None
        and claim.kafka_cluster == kafka_cluster
        and claim.uid == stream.metadata.uid
        and not claim.topic_id
    )
    if recorded != topic.id and not just_made:
        if not stream.spec.topic.adopt:
            if not recorded:
                return Refuse("TopicConflict", _foreign(name))
            return Refuse(
                "TopicConflict",
                f"the topic {name} was deleted and made again by someone else (its id is {topic.id}, ours was "
                f"{recorded}); delete it, and it is made and filled from history again, or set spec.topic.adopt if it "
                "is empty",
            )
        if held is None:
            return Examine()
        if held:
            return Refuse(
                "TopicConflict",
                f"the topic {name} wasn't made for this EventStream and holds {held} records: spec.topic.adopt takes "
                "over an empty topic only; choose another spec.topic.name, or delete the topic if nobody needs it",
            )
    if topic.partitions < stream.spec.partitions:
        return Refuse(
            "TopicConflict",
            f"the topic {name} has {topic.partitions} partitions, spec.partitions is {stream.spec.partitions}; delete "
            "the topic, and it is made and filled from history again",
        )
    changes: dict[str, str | None] = {
        config: value for config, value in wanted.items() if topic.config.get(config) != value
    }
    changes |= {config: None for config in topic.config if config in CONFIGURABLE and config not in wanted}
    extra = topic.partitions - stream.spec.partitions
    note = f"the topic {name} has {extra} more partitions, which are never used" if extra else ""
    return Keep(changes, note)


def topic_name(stream: EventStream) -> str:
    """Return the name of the stream's topic."""
    return stream.spec.topic.name or names.topic(stream.metadata.namespace, stream.metadata.name)


def event_types(stream: EventStream) -> dict[str, Any] | None:
    """Return the JSON Schema of each event type that the stream takes; None: it takes any event."""
    if stream.spec.events is None:
        return None
    return {each.name: each.json_schema for each in stream.spec.events}


def problems(stream: EventStream, rules: spec_guard.Rules) -> list[Problem]:
    """Return what the admission webhook refuses in the stream, where it came in nevertheless."""
    namespace = stream.metadata.namespace
    found = spec_guard.check_namespace(namespace, rules)
    return found + spec_guard.check_event_stream(stream.definition, namespace=namespace, rules=rules)


def _guard(stream: EventStream, rules: spec_guard.Rules) -> None:
    """Refuse what the admission webhook refuses.

    Raises:
        ReconcileError: it says which field, and why.
    """
    found = problems(stream, rules)
    if found:
        condition = "TopicReady" if found[0].path.startswith("spec.topic") else "StoreReady"
        message = f"{spec_guard.told(found)}. Nothing was changed; events are taken as before"
        raise ReconcileError(condition, found[0].reason, message)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a reconcile came to.

    Attributes:
        conditions: in the order that they are shown in.
        status: the status without conditions and generation.
        failed: whether a condition is false, so that it has to be tried again.
        again: seconds until the next try, None for the usual back-off or resync.
        found: what was found changed by someone else, and put right where it could be, for an Event.
    """

    conditions: list[Condition]
    status: Status
    failed: bool
    again: float | None = None
    found: str = ""


async def reconcile(
    stream: EventStream,
    *,
    store: Store,
    kafka: Kafka,
    access: Access,
    cluster: Cluster,
    default_replicas: int,
    rules: spec_guard.Rules,
    older: str | None = None,
) -> Result:
    """Make topic, schema and who may read and write what the EventStream says.

    `older` is another EventStream that was there before and wants the same topic: it goes first, unless this one has
    its claim already.

    Never raises because of an outage or a refusal: these are the result's conditions.
    """
    topic = Condition("TopicReady", "Unknown", "StoreFirst", "the store's claim comes before the topic")
    stored = Condition("StoreReady", "Unknown", "TopicFirst", "the topic comes before the store")
    status: Status = {"topic": topic_name(stream)}
    if "events" in stream.status:
        status["events"] = stream.status["events"]
    again = None
    found = ""
    claim = None
    try:
        with _store_errors():
            claim = await store.stream(stream.metadata.namespace, stream.metadata.name)
        _guard(stream, rules)
        claim, note, found = await _topic(
            stream, claim, store=store, kafka=kafka, default_replicas=default_replicas, event_bytes=rules.event_bytes,
            older=older,
        )  # fmt: skip
        readers, more = await _access(stream, access=access, cluster=cluster)
        found = "; ".join(filter(None, (found, _news(stream, note), more)))
        topic = Condition(
            "TopicReady", "True", "Applied",
            "; ".join(filter(None, (f"the topic {topic_name(stream)} is as specified", note, readers))),
        )  # fmt: skip
        with _store_errors():
            # before the first append, and while Ready is still of the former generation
            claim = await store.set_event_types(claim, event_types(stream))
            if claim.state != "active":
                claim = await store.activate(claim)
            else:
                found = "; ".join(filter(None, (found, await _schema(claim, store))))
            status["events"] = await store.events(claim)
        stored = _stored(claim)
        ready = Condition("Ready", "True", "Active", "appends are accepted")
    except ReconcileError as error:
        failure = Condition(error.condition, "False", error.reason, error.message)
        if error.condition == "TopicReady":
            topic = failure
            if claim is not None and claim.state == "active" and claim.uid == stream.metadata.uid:
                stored = _stored(claim)
        else:
            stored = failure
            topic = topic if topic.status == "True" else _as_last_seen(stream, topic)
        ready = Condition("Ready", "False", error.reason, error.message)
        again = error.retry_after
    return Result([ready, topic, stored], status, failed=ready.status != "True", again=again, found=found)


def _news(stream: EventStream, note: str) -> str:
    """Return a note about the topic that the status doesn't tell yet."""
    former = find(stream.status, "TopicReady")
    return note if former is None or note not in former["message"] else ""


def _as_last_seen(stream: EventStream, unseen: Condition) -> Condition:
    """Return a condition that this run didn't get to, as a former one of the same generation left it."""
    former = find(stream.status, unseen.type)
    if former is None or former["observedGeneration"] != stream.metadata.generation:
        return unseen
    return Condition(unseen.type, former["status"], former["reason"], former["message"])


def _stored(claim: Stream) -> Condition:
    return Condition(
        "StoreReady", "True", "Active", f"the schema {claim.schema} holds the history, {claim.partitions} partitions"
    )


async def _topic(
    stream: EventStream,
    claim: Stream | None,
    *,
    store: Store,
    kafka: Kafka,
    default_replicas: int,
    event_bytes: int,
    older: str | None,
) -> tuple[Stream, str, str]:
    """Claim the stream and bring its topic about; return the claim, a note, and what was put right."""
    name = topic_name(stream)
    with _kafka_errors(name):
        cluster = await kafka.cluster_id()
        topic = await kafka.topic(name)
    if claim is None and topic is not None:
        with _store_errors():
            holder = await store.holder(cluster, name)
        if holder is not None:
            raise ReconcileError("TopicReady", "TopicConflict", _held(holder))
    if claim is None and older is not None:
        raise ReconcileError(
            "TopicReady", "TopicConflict",
            f"the EventStream {older} is older and wants the topic {name} too; choose another spec.topic.name, or "
            "delete that one",
        )  # fmt: skip
    decide = functools.partial(
        plan_topic, stream, topic=topic, claim=claim, kafka_cluster=cluster, default_replicas=default_replicas,
        event_bytes=event_bytes,
    )  # fmt: skip
    plan = decide()
    if isinstance(plan, Examine):
        assert topic is not None, "there is something to look into"
        with _kafka_errors(name):
            plan = decide(held=await kafka.records(topic))
    assert not isinstance(plan, Examine), "it was looked"
    if isinstance(plan, Refuse):
        raise ReconcileError("TopicReady", plan.reason, plan.message)
    with _store_errors():
        former = stream.metadata.annotations.get(TAKE_OVER_ANNOTATION)
        if claim is not None and former and claim.uid == former != stream.metadata.uid:
            await store.release(claim)
        first = claim is None
        if claim is None or (claim.uid, claim.kafka_cluster) != (stream.metadata.uid, cluster):
            claim = await store.claim(
                namespace=stream.metadata.namespace, name=stream.metadata.name, uid=stream.metadata.uid,
                partitions=stream.spec.partitions, topic=name, kafka_cluster=cluster,
            )  # fmt: skip
        if isinstance(plan, Create) and claim.topic_id:
            # So that a crash right after the topic was made leaves a claim that fits any topic of this name.
            lost, claim = claim.topic_id, await store.record_topic(claim, "")
        else:
            lost = None
    found = ""
    if isinstance(plan, Create):
        with _kafka_errors(name):
            try:
                await kafka.create(name, partitions=plan.partitions, replicas=plan.replicas, config=plan.config)
            except TopicExistsError:
                if first:
                    await _unclaim(stream, claim, store)
                _log.info("topic isn't known to all brokers yet", topic=name)
            topic = await _made(kafka, name)
        if lost:
            found = f"the topic {name} was gone and has been made again; the relay fills it from history"
    elif plan.config:
        with _kafka_errors(name):
            await kafka.configure(name, plan.config, now={} if topic is None else topic.config)
        if claim.topic_id:
            found = f"configured the topic {name}: {', '.join(sorted(plan.config))}"
    if topic is None:
        raise ReconcileError(
            "TopicReady", "TopicPending", f"the topic {name} was asked for and isn't known to all brokers yet",
            retry_after=_SOON,
        )  # fmt: skip
    if claim.topic_id != topic.id:
        with _store_errors():
            claim = await store.record_topic(claim, topic.id)
    return claim, plan.note if isinstance(plan, Keep) else "", found


async def _schema(claim: Stream, store: Store) -> str:
    """Look at the schema of a stream that was served already; return what was put right."""
    seen = await store.look(claim)
    if seen.lost:
        raise ReconcileError(
            "StoreReady", "HistoryDamaged",
            f"{', '.join(seen.lost)} of the schema {claim.schema} is gone: restore it from a backup. Nothing is made "
            "in its place, since Refold can't know which events it held",
        )  # fmt: skip
    if not seen.changed:
        return ""
    await store.repair(claim)
    return f"made again in the schema {claim.schema}: {', '.join(seen.changed)}"


async def _unclaim(stream: EventStream, claim: Stream, store: Store) -> NoReturn:
    """Give up a claim of a moment ago: somebody else, such as another installation, made the topic meanwhile."""
    with _store_errors():
        await store.drop(namespace=claim.namespace, name=claim.name, uid=stream.metadata.uid)
    raise ReconcileError("TopicReady", "TopicConflict", _foreign(claim.topic))


def _foreign(topic: str) -> str:
    return (
        f"the topic {topic} exists and wasn't made for this EventStream; choose another spec.topic.name, delete the "
        "topic if nobody needs it, or set spec.topic.adopt if it is empty and meant for this one"
    )


def _held(holder: Stream) -> str:
    """Say that another stream has the topic."""
    whose = f"the topic {holder.topic} is the EventStream {holder.namespace}/{holder.name}'s"
    if holder.uid is None:
        return f"{whose}, which was deleted and its history retained; choose another spec.topic.name"
    return f"{whose}; choose another spec.topic.name, or delete that one"


async def _access(stream: EventStream, *, access: Access, cluster: Cluster) -> tuple[str, str]:
    """Bring about who may read and write the topic; return who may, for people, and what was put right."""
    topic, namespace = topic_name(stream), stream.metadata.namespace
    with _store_errors(), _kafka_errors(topic):
        data, found = await access.stream(stream, topic)
    if not data:
        return "", found
    secret = children.stamped(children.consumer_secret(stream, data))
    name = secret["metadata"]["name"]
    with _cluster_errors():
        known = await cluster.get("Secret", namespace, name)
        if known is not None and not children.owned_by(known, stream):
            raise ReconcileError(
                "TopicReady", "ObjectConflict",
                f"the Secret {name} exists and isn't this EventStream's; delete or rename it",
            )  # fmt: skip
        if known is None or not covers(known, secret):
            await cluster.apply(secret)
            _log.info("applied", kind="Secret", namespace=namespace, name=name)
            if known is not None and children.same_wish(known, secret):
                found = "; ".join(filter(None, (found, f"put back the Secret {name}")))
    return f"the Secret {name} lets read it", found


async def _made(kafka: Kafka, name: str) -> Topic | None:
    """Return a topic that was made a moment ago, perhaps, once the broker that answers knows it; None: it doesn't."""
    topic = await kafka.topic(name)
    for pause in _PAUSES:
        if topic is not None:
            break
        await asyncio.sleep(pause)
        topic = await kafka.topic(name)
    return topic


async def finalize(stream: EventStream, *, store: Store, kafka: Kafka, access: Access) -> None:
    """Do what the deletion policy says; returns once nothing of the stream is held any more.

    Only what this very resource has claimed is dropped. What is gone already is no error.

    Raises:
        ReconcileError: a backend is away or refuses; to be tried again.
    """
    with _store_errors():
        claim = await store.stream(stream.metadata.namespace, stream.metadata.name)
        if claim is None or claim.uid != stream.metadata.uid:
            return
    if stream.spec.deletion_policy == "Retain":
        with _store_errors(), _kafka_errors(claim.topic):
            if not claim.topic_id and await kafka.cluster_id() == claim.kafka_cluster:
                # It was made by us, if there is one. Without its id nobody would know that once the claim is released.
                topic = await _made(kafka, claim.topic)
                if topic is not None:
                    claim = await store.record_topic(claim, topic.id)
            await store.release(claim)
        return
    with _store_errors(), _kafka_errors(claim.topic):
        cluster = await kafka.cluster_id()
        if cluster == claim.kafka_cluster:
            # Without an id the topic was made by us a moment ago, and the broker that answers may not know it yet.
            topic = await kafka.topic(claim.topic) if claim.topic_id else None
            if not claim.topic_id or (topic is not None and topic.id == claim.topic_id):
                await kafka.delete(claim.topic)
        await access.drop_stream(stream, claim.topic)
    with _store_errors():
        await store.drop(namespace=stream.metadata.namespace, name=stream.metadata.name, uid=stream.metadata.uid)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Turn the store's errors into conditions."""
    try:
        yield
    except UnreachableError as error:
        raise ReconcileError("StoreReady", "StoreUnreachable", str(error)) from error
    except NotInstalledError as error:
        raise ReconcileError("StoreReady", "StoreNotInstalled", str(error), retry_after=2.0) from error
    except ConflictError as error:
        reason = "TopicConflict" if error.what == "topic" else "Conflict"
        advice = (
            f"; if that one is gone for good, take it over by annotating this one with {TAKE_OVER_ANNOTATION}=<uid>"
        )
        raise ReconcileError("StoreReady", reason, f"{error}{advice if error.what == 'name' else ''}") from error
    except (EventStoreError, psycopg.Error) as error:
        raise ReconcileError("StoreReady", "StoreError", f"the event store answered: {error}") from error


@contextlib.contextmanager
def _cluster_errors() -> Iterator[None]:
    """Turn the API server's errors about the consumers' Secret into conditions."""
    try:
        yield
    except UnreachableError as error:
        raise ReconcileError("TopicReady", "KubernetesUnreachable", str(error)) from error
    except RefusedError as error:
        raise ReconcileError("TopicReady", "KubernetesRefused", str(error)) from error


@contextlib.contextmanager
def _kafka_errors(topic: str) -> Iterator[None]:
    """Turn Kafka's errors about `topic` into conditions."""
    try:
        yield
    except UnreachableError as error:
        raise ReconcileError("TopicReady", error.reason or "KafkaUnreachable", str(error)) from error
    except ForbiddenError as error:
        raise ReconcileError("TopicReady", "KafkaForbidden", f"topic {topic}: {error}") from error
    except CredentialsError as error:
        raise ReconcileError("TopicReady", "KafkaCredentialsMissing", str(error)) from error
    except (TopicRefusedError, KafkaException) as error:
        raise ReconcileError(
            "TopicReady",
            "TopicRefused",
            f"Kafka refused spec.topic of topic {topic}: {error}; change spec.topic.config or spec.topic.replicas",
        ) from error
