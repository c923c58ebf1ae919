"""Projections: a read model in the read store, projectors that fold into it, a query service that serves it.

A version is one build of the read model: a table, a consumer group, a Deployment. `reconcile` makes the version that
the spec asks for beside the live one and moves readers to it once it has caught up. The former one goes on folding for
`spec.keepPrevious`, so that going back to it is a move of readers like any other, without a build; then it is taken
away. Which versions to keep and what to say about them is decided by pure functions.
"""

import contextlib
import dataclasses
import datetime as dt
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import psycopg
import pydantic
import refold
import structlog
from confluent_kafka import KafkaException
from refold import names
from refold.eventstore.catalog import Stream
from refold.eventstore.errors import ConflictError as StoreConflictError
from refold.eventstore.errors import EventStoreError
from refold.kafka import Brokers, CredentialsError
from refold.projection import definition as definitions
from refold.projection.definition import Handler, StreamRef, VersionDefinition
from refold.projection.past import why_not
from refold.projection.readstore import (
    BusyError,
    ConflictError,
    ProjectionStatus,
    ReadStoreError,
    UnavailableError,
    VersionStatus,
)

from refold_operator import children, cluster, credentials, dsn, spec_guard
from refold_operator.access import Access
from refold_operator.autoscaler import Autoscaler
from refold_operator.children import Image
from refold_operator.cluster import Cluster, Object
from refold_operator.delegation import Account, Delegation
from refold_operator.errors import ForbiddenError, ReconcileError, UnreachableError
from refold_operator.kafka import TopicRefusedError
from refold_operator.pace import Paces
from refold_operator.readstore import ReadStore
from refold_operator.redis import NO_REDIS, RedisReadStore, RedisReadStores
from refold_operator.resources import REBUILD_ANNOTATION, TAKE_OVER_ANNOTATION, Projection
from refold_operator.status import Condition, ConditionStatus, Status, find, timestamp
from refold_operator.store import Store

_log = structlog.get_logger(__name__)

#: Reasons that go by themselves when something else is done; no person has to look.
PASSING = frozenset({"StreamNotReady", "Installing", "ProcessesEnding", "AsOfNotPassed", "ReadModelInUse"})
#: The reason where somebody else has an object of a child's name; and children that no other child needs.
_OBJECT_CONFLICT = "ObjectConflict"
_NEEDED_BY_NOTHING = frozenset({"Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"})
#: The reason where a swap or a deletion waits for who reads in SQL.
_BUSY = "ReadModelInUse"
#: The reason where the read store doesn't answer.
_AWAY = "ReadStoreUnreachable"
#: What is made for a Projection, in the order in which it is needed.
_CHILDREN = ("ServiceAccount", "Secret", "Service", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget")
#: Seconds until a version that is being built is looked at again.
_BUILDING_SECONDS = 2.0
#: Seconds until a version with events to fold is looked at again.
_LAGGING_SECONDS = 30.0
#: Seconds until processes that start are looked at again; their Deployments' own changes come sooner.
_STARTING_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a reconcile works with.

    Attributes:
        readstore: the projection's own; until it is known (`_at_its_readstore`), the installation's.
        redis: where those are whose read store is a Redis.
        paces: how fast versions are being built, as seen by the reconciles before.
        autoscaler: decides how many projectors there are where the spec leaves it to it.
        rules: what the installation allows.
        key: the installation's key of passwords, None until the installation has read it.
    """

    cluster: Cluster
    store: Store
    readstore: ReadStore | RedisReadStore
    redis: RedisReadStores
    image: Image
    delegation: Delegation
    brokers: Brokers
    access: Access
    paces: Paces
    autoscaler: Autoscaler
    rules: spec_guard.Rules
    key: bytes | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a reconcile came to: see `eventstream.Result`."""

    conditions: list[Condition]
    status: Status
    failed: bool
    again: float | None = None
    found: str = ""


@dataclasses.dataclass(frozen=True)
class Versions:
    """Which versions are kept and which go.

    Attributes:
        previous: the one that readers saw before the live one, while it is kept.
        keep: the live one, the previous one, and the one that the spec asks for.
        drop: others that the read store or the cluster still holds.
    """

    previous: VersionStatus | None
    keep: frozenset[str]
    drop: frozenset[str]


def plan_versions(
    *, target: str | None, state: ProjectionStatus, running: Collection[str], keep_previous: dt.timedelta
) -> Versions:
    """Decide which versions stay: readers', their previous one for a while, and the wanted one.

    A superseded build goes at once. Where nobody knows which version the spec asks for (`target` is None), only those
    that readers saw once are dropped: a build may be what it turns out to ask for.
    """
    retired = {name: one for name, one in state.versions.items() if one.retired_seconds is not None}
    latest = min(retired.values(), key=lambda one: one.retired_seconds or 0.0, default=None)
    previous = latest if latest is not None and _left(latest, keep_previous) > 0 else None
    keep = {target, state.live, previous.version if previous else None} - {None}
    drop = set(retired) if target is None else {*state.versions, *running}
    return Versions(previous, frozenset(name for name in keep if name), frozenset(drop - keep))


def _left(version: VersionStatus, keep_previous: dt.timedelta) -> float:
    """Return for how many seconds a version that readers saw once is still kept; negative where it isn't."""
    return keep_previous.total_seconds() - (version.retired_seconds or 0.0)


async def reconcile(projection: Projection, around: Surroundings) -> Result:
    """Make the read model, its projectors and its query service what the Projection says.

    Never raises because of an outage or a refusal: these are the result's conditions.
    """
    namespace, name = projection.metadata.namespace, projection.metadata.name
    target: str | None = None
    found: list[str] = []
    problem: ReconcileError | None = None
    state: ProjectionStatus | None = None
    deployments: Mapping[str, Object] | None = None
    behind = 0
    try:
        around = await _at_its_readstore(projection, around)
        state = await _claim(projection, around)
        try:
            version, wanted = await _wanted(projection, around)
        except ReconcileError:
            # What serves is looked after, whatever is wrong with what is to come.
            if state.live is not None:
                plan = _plan(projection, None, state, {})
                made = await _definitions(projection, around)
                deployments, _ = await _apply(projection, around, plan.keep, found, state=state, made=made)
                await _tell_store(projection, around, state, made)
                await _drop(projection, around, plan)
            raise
        target = version
        with _readstore_errors():
            if await around.readstore.ensure_version(
                namespace=namespace, name=name, version=version, definition=wanted
            ):
                _log.info("version made", namespace=namespace, name=name, version=version)
                if version in state.versions:
                    found.append(f"the rows of version {version}, which are folded from history again")
            state = await around.readstore.status(namespace=namespace, name=name)
        plan = _plan(projection, version, state, {})
        made = await _definitions(projection, around)
        deployments, problem = await _apply(projection, around, plan.keep, found, state=state, made=made)
        with _readstore_errors():
            await around.readstore.try_swap(namespace=namespace, name=name, version=version)
            state = await around.readstore.status(namespace=namespace, name=name)
        await _tell_store(projection, around, state, made)
        behind = await _behind(projection, around, state, made)
        await _drop(projection, around, _plan(projection, version, state, deployments))
    except ReconcileError as error:
        problem = error
        if deployments is None:
            deployments = await _look(projection, around)
    if state is None:
        assert problem is not None, "who has claimed the read model knows its versions"
        return _unseen(projection, deployments=deployments, problem=problem)
    finished = _finished(projection, state)
    kept = _plan(projection, target, state, {}).keep if problem is None else state.versions.keys()
    around.autoscaler.see(projection, kept - finished, deployments or {}, around.readstore)
    return _result(
        projection,
        target=target,
        state=state,
        deployments=deployments,
        problem=problem,
        found=found,
        behind=behind,
        pace=around.paces.see((namespace, name), _building(projection, target, state)),
        scaling=around.autoscaler.status(projection, state.live),
    )


async def finalize(projection: Projection, around: Surroundings) -> None:
    """Take the processes away, then do with the read model what the deletion policy says.

    Raises:
        ReconcileError: a backend is away or refuses; to be tried again.
    """
    namespace, name = projection.metadata.namespace, projection.metadata.name
    there = True
    try:
        around = await _at_its_readstore(projection, around)
    except ReconcileError as error:
        if error.reason != NO_REDIS:
            raise
        there = False
    with _cluster_errors():
        # The garbage collector would come for them only after the Projection is gone, and they hold tables and logins.
        for kind in reversed(_CHILDREN):
            for child in await around.cluster.list(kind, namespace, selector=_children_of(projection)):
                if children.owned_by(child, projection):
                    await around.cluster.delete(kind, namespace, child["metadata"]["name"])
        await around.delegation.take(Account(namespace, names.query_name(name)))
    schema = names.read_schema(namespace, name)
    with _store_errors():
        for part in ("history", "past"):
            await around.store.drop_login(_store_login(around, schema, part))
        await around.store.drop_definition(namespace=namespace, name=name, uid=projection.metadata.uid)
    with _store_errors(), _kafka_errors():
        await around.access.drop_projection(projection)
    if not there:
        # It was refused from the beginning, or the installation's Redis went away with all that was in it.
        _log.info("no read store to look for the read model in", namespace=namespace, name=name)
        return
    with _readstore_errors():
        if projection.spec.deletion_policy == "Retain":
            await around.readstore.release(namespace=namespace, name=name, uid=projection.metadata.uid)
            return
        try:
            await around.readstore.drop(namespace=namespace, name=name, uid=projection.metadata.uid)
        except ConflictError as error:
            _log.info("read model is someone else's and stays", namespace=namespace, name=name, why=str(error))
        except StoreConflictError as error:
            # A projector has a temporary table of its own for as long as its session lasts.
            raise ReconcileError(
                "Ready", "ProcessesEnding", f"its projectors are still ending: {error}", retry_after=1.0
            ) from error


async def _definitions(projection: Projection, around: Surroundings) -> Mapping[str, VersionDefinition]:
    """Return what each version folds that was made."""
    with _readstore_errors():
        return await around.readstore.definitions(
            namespace=projection.metadata.namespace, name=projection.metadata.name
        )


async def _tell_store(
    projection: Projection, around: Surroundings, state: ProjectionStatus, made: Mapping[str, VersionDefinition]
) -> None:
    """Tell the event store what the live version folds, by which it folds single subjects."""
    namespace, name, uid = projection.metadata.namespace, projection.metadata.name, projection.metadata.uid
    with _store_errors():
        if state.live is None or state.live not in made:
            await around.store.drop_definition(namespace=namespace, name=name, uid=uid)
            return
        await around.store.set_definition(
            namespace=namespace, name=name, uid=uid, version=state.live, definition=made[state.live].to_json()
        )


async def _behind(
    projection: Projection, around: Surroundings, state: ProjectionStatus, made: Mapping[str, VersionDefinition]
) -> int:
    """Return how many events of the store the live version's projectors have still to fold, seen by them or not."""
    live = state.versions.get(state.live) if state.live is not None else None
    if live is None or projection.spec.as_of is not None or not projection.spec.projector.replicas:
        return 0
    if live.version not in made:
        return 0
    heads = 0
    for stream in await _readable(around, made[live.version].streams):
        with _store_errors():
            heads += await around.store.events(stream)
    return max(0, heads - live.position)


async def _at_its_readstore(projection: Projection, around: Surroundings) -> Surroundings:
    """Return the surroundings with the Projection's own read store."""
    if projection.spec.read_store.type == "postgres":
        return around
    with _cluster_errors(), _readstore_errors():
        return dataclasses.replace(around, readstore=await around.redis.of(projection))


async def _wanted(projection: Projection, around: Surroundings) -> tuple[str, VersionDefinition]:
    """Return the version that the spec asks for, and what it folds."""
    problems = spec_guard.check_namespace(projection.metadata.namespace, around.rules)
    if problems := problems + spec_guard.check_projection(projection.definition):
        raise ReconcileError("Ready", problems[0].reason, spec_guard.told(problems))
    definition = definitions.parse(projection.definition)
    streams = await _streams(projection, around, definition.streams)
    refs = [
        StreamRef(
            namespace=stream.namespace, name=stream.name, incarnation=stream.incarnation,
            partitions=stream.partitions, topic=stream.topic, event_schema=stream.schema,
        )
        for stream in streams
    ]  # fmt: skip
    rebuild = projection.metadata.annotations.get(REBUILD_ANNOTATION, "")
    version = definitions.version_of(definition, refs, read_store=projection.spec.read_store.type, rebuild=rebuild)
    ends = {} if definition.as_of is None else await _ends(projection, around, version, streams, definition.as_of)
    return version, VersionDefinition(definition=definition, streams=refs, ends=ends)


async def _ends(
    projection: Projection, around: Surroundings, version: str, streams: Sequence[Stream], moment: dt.datetime
) -> dict[str, list[int]]:
    """Return the streams' last positions until `moment`; those that the version was made with, if it was."""
    made = await _definitions(projection, around)
    if version in made:
        return made[version].ends
    ends = {}
    for stream in streams:
        with _store_errors():
            positions = await around.store.positions_at(stream, moment)
        if positions is None:
            raise ReconcileError(
                "Ready",
                "AsOfNotPassed",
                f"spec.asOf: {moment.isoformat()} hasn't passed by the event store's clock; it goes on then",
                retry_after=min(60.0, max(1.0, (moment - dt.datetime.now(dt.UTC)).total_seconds() + 0.5)),
            )
        ends[stream.incarnation] = positions
    return ends


async def _streams(projection: Projection, around: Surroundings, wanted: Sequence[str]) -> list[Stream]:
    streams = []
    for name in wanted:
        with _store_errors():
            stream = await around.store.stream(projection.metadata.namespace, name)
        if stream is None or stream.state != "active":
            state = "doesn't exist or was never ready" if stream is None else f"is {stream.state}, not active"
            raise ReconcileError(
                "Ready",
                "StreamNotReady",
                f"spec.streams: the EventStream {projection.metadata.namespace}/{name} {state}; this goes on by itself "
                "once it is Ready",
            )
        streams.append(stream)
    return streams


async def _claim(projection: Projection, around: Surroundings) -> ProjectionStatus:
    """Claim the read model and return how far its versions are."""
    namespace, name = projection.metadata.namespace, projection.metadata.name
    with _readstore_errors():
        former = projection.metadata.annotations.get(TAKE_OVER_ANNOTATION)
        if former and former != projection.metadata.uid:
            await around.readstore.release(namespace=namespace, name=name, uid=former)
        await around.readstore.claim(namespace=namespace, name=name, uid=projection.metadata.uid)
        return await around.readstore.status(namespace=namespace, name=name)


async def _apply(
    projection: Projection,
    around: Surroundings,
    versions: Collection[str],
    found: list[str],
    *,
    state: ProjectionStatus,
    made: Mapping[str, VersionDefinition],
) -> tuple[dict[str, Object], ReconcileError | None]:
    """Make the logins and the Kubernetes objects of `versions`; those that are finished need no projectors any more.

    Returns:
        The Deployments by name, and what can't be made because somebody else has one of its name and nothing else
        needs it: that must not hold up the read model. `found` gets what was put right.
    """
    if around.key is None:
        raise ReconcileError(
            "Ready", "Installing", "the operator is still installing its stores; see its log", retry_after=2.0
        )
    namespace, name = projection.metadata.namespace, projection.metadata.name
    with _readstore_errors():
        logins = await around.readstore.logins(around.key, namespace=namespace, name=name)
    readable = await _readable(around, [ref for version in versions for ref in made[version].streams])
    schema = names.read_schema(namespace, name)
    role = _store_login(around, schema, "history")
    with _store_errors():
        store_dsn = await around.store.reader_login(role, credentials.password(around.key, role), readable)
    past_dsn = await _past_login(around, around.key, schema, [made[version] for version in versions])
    with _store_errors(), _kafka_errors():
        topics = {ref.topic for version in versions for ref in made[version].streams}
        kafka_files, put_right = await around.access.projection(projection, topics)
    if put_right:
        found.append(put_right)
    query_secret = children.query_secret(projection, readstore_dsn=logins.query, store_dsn=past_dsn)
    wanted = [query_secret, children.query_service(projection), *await _sql_secret(projection, around, around.key)]
    with _cluster_errors():
        there = {
            (child["kind"], child["metadata"]["name"]): child
            for kind in _CHILDREN
            for child in await around.cluster.list(kind, namespace, selector=_children_of(projection))
        }
        finished = _finished(projection, state)
        for version in sorted(versions):
            secret = children.projector_secret(
                projection, version, store_dsn=store_dsn, readstore_dsn=logins.projector, kafka_files=kafka_files
            )
            deployment = there.get(("Deployment", names.projector_name(name, version)))
            one = state.versions[version]
            unseen = not one.live and one.retired_at is None
            replicas = 0
            if version not in finished:
                replicas = around.autoscaler.replicas(projection, version, deployment, unseen=unseen)
            handler = made[version].definition.handler
            manifest = children.projector(
                projection, version, image=projector_image(projection, handler, around.image), brokers=around.brokers,
                secret=secret, replicas=replicas,
                installed=None if handler is None else refold.__version__,
            )  # fmt: skip
            wanted += [secret, manifest]

        async def ensure(manifest: Object) -> Object:
            manifest = children.stamped(manifest)
            identity = (manifest["kind"], manifest["metadata"]["name"])
            known = there.get(identity)
            if known is None or not cluster.covers(known, manifest):
                there[identity] = await _apply_one(projection, around, manifest, known, found)
            return there[identity]

        account = await ensure(children.query_account(projection))
        wanted.append(children.query(projection, image=around.image, secret=query_secret, account=account))
        scaling = projection.spec.query.scaling
        wanted.append(children.query_budget(projection))
        if scaling is not None:
            wanted.append(children.query_autoscaler(projection, scaling))
        await _leave_query(projection, around, there)
        refused = None
        for manifest in wanted:
            try:
                await ensure(manifest)
            except ReconcileError as error:
                if error.reason != _OBJECT_CONFLICT or manifest["kind"] not in _NEEDED_BY_NOTHING:
                    raise
                refused = refused or error
        former = there.get(("Secret", names.sql_name(name)))
        if not projection.spec.read_store.sql and former is not None and children.owned_by(former, projection):
            await around.cluster.delete("Secret", namespace, names.sql_name(name))
        # Only now: an account of this name that isn't the Projection's would have been refused.
        await around.delegation.give(Account(namespace, names.query_name(name)))
    return {child_name: child for (kind, child_name), child in there.items() if kind == "Deployment"}, refused


async def _leave_query(projection: Projection, around: Surroundings, there: Mapping[tuple[str, str], Object]) -> None:
    """Let one of the two have the number of query processes: the HorizontalPodAutoscaler or the operator."""
    namespace, name = projection.metadata.namespace, names.query_name(projection.metadata.name)
    scaling = projection.spec.query.scaling
    if scaling is None:
        former = there.get(("HorizontalPodAutoscaler", name))
        if former is not None and children.owned_by(former, projection):
            await around.cluster.delete("HorizontalPodAutoscaler", namespace, name)
        return
    deployment = there.get(("Deployment", name))
    if deployment is None or not children.owned_by(deployment, projection) or not cluster.owns_replicas(deployment):
        return
    # What its only manager doesn't apply any more is removed, and the default is 1: so there is another manager first.
    replicas = max(scaling.min_replicas, min(scaling.max_replicas, deployment["spec"]["replicas"]))
    await around.cluster.apply(children.only_replicas(deployment, replicas), manager=cluster.HAND_OVER)


def projector_image(projection: Projection, handler: Handler | None, installed: Image) -> Image:
    """Return what the projectors of a version run: Refold's own image, or its handler's.

    Where the spec's handler is the same code, its image is taken as the spec names it now: it may stand elsewhere.
    """
    if handler is None:
        return installed
    try:
        wanted = Handler.model_validate(projection.definition.get("handler"))
    except pydantic.ValidationError:  # the version was made of another definition
        wanted = handler
    name = wanted.image if wanted.code == handler.code else handler.image
    return Image(name, installed.pull_policy)


async def _past_login(around: Surroundings, key: bytes, schema: str, folded: Sequence[VersionDefinition]) -> str | None:
    """Make the login by which query services read the histories of rows; None where rows have none of their own."""
    role = _store_login(around, schema, "past")
    refs = [ref for definition in folded if why_not(definition) is None for ref in definition.streams]
    if not refs:
        with _store_errors():
            await around.store.drop_login(role)
        return None
    readable = await _readable(around, refs)
    with _store_errors():
        return await around.store.reader_login(role, credentials.password(key, role), readable)


async def _sql_secret(projection: Projection, around: Surroundings, key: bytes) -> list[Object]:
    """Make the login of those who read rows in SQL, and return its Secret; drop it where the spec asks for none."""
    namespace, name = projection.metadata.namespace, projection.metadata.name
    if not isinstance(around.readstore, ReadStore):
        return []
    with _readstore_errors():
        if not projection.spec.read_store.sql:
            await around.readstore.drop_sql_login(namespace=namespace, name=name)
            return []
        login = await around.readstore.sql_login(key, namespace=namespace, name=name)
    return [children.sql_secret(projection, dsn.binding(login))]


async def _apply_one(
    projection: Projection, around: Surroundings, manifest: Object, known: Object | None, found: list[str]
) -> Object:
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    if known is None:
        known = await around.cluster.get(kind, manifest["metadata"]["namespace"], name)
    if known is not None and not children.owned_by(known, projection):
        raise ReconcileError(
            "Ready",
            _OBJECT_CONFLICT,
            f"the {kind} {name} exists and isn't this Projection's; delete or rename it",
        )
    applied = await around.cluster.apply(manifest)
    if known is None:
        drifted = _was_there(projection, manifest)
    else:
        # An apply that leaves the object as it was only says a value in the API server's own words (quantities).
        drifted = children.same_wish(known, manifest) and _revision(known) != _revision(applied)
    if drifted:
        found.append(f"{kind} {name}")
    _log.info("applied", kind=kind, namespace=manifest["metadata"]["namespace"], name=name, drifted=drifted)
    return applied


def _was_there(projection: Projection, manifest: Object) -> bool:
    """Tell whether the status says that this object had been made before."""
    live = projection.status.get("live", {}).get("version")
    version = manifest["metadata"]["labels"].get(children.VERSION_LABEL, live)
    return live is not None and version == live


def _revision(child: Object) -> object:
    """Return what changes with an object's content, and not with its status where it has one."""
    return child["metadata"].get("generation", child["metadata"]["resourceVersion"])


async def _readable(around: Surroundings, refs: Sequence[StreamRef]) -> list[Stream]:
    """Return the streams of `refs` that still are what they were; one that is gone has nothing to read."""
    readable = {}
    for ref in refs:
        with _store_errors():
            stream = await around.store.stream(ref.namespace, ref.name)
        if stream is not None and stream.incarnation == ref.incarnation:
            readable[stream.stream] = stream
    return list(readable.values())


def _plan(
    projection: Projection, target: str | None, state: ProjectionStatus, deployments: Mapping[str, Object]
) -> Versions:
    """Plan with the versions that have one of `deployments`, too."""
    running = {
        deployment["metadata"]["labels"][children.VERSION_LABEL]
        for deployment in deployments.values()
        if children.VERSION_LABEL in deployment["metadata"]["labels"] and children.owned_by(deployment, projection)
    }
    return plan_versions(target=target, state=state, running=running, keep_previous=projection.spec.keep_previous)


def _finished(projection: Projection, state: ProjectionStatus) -> set[str]:
    """Return the versions that are of a moment and hold all until then; parked events may still need a projector."""
    if projection.spec.as_of is None:
        return set()
    return {name for name, version in state.versions.items() if version.complete and not version.parked}


def _building(projection: Projection, target: str | None, state: ProjectionStatus) -> VersionStatus | None:
    """Return the version that is being built: readers don't see it yet, or it is of a moment and isn't complete."""
    version = state.versions.get(target) if target is not None else None
    if version is None or (target == state.live and (projection.spec.as_of is None or version.complete)):
        return None
    return version


def seconds_left(projection: Projection, *, now: dt.datetime) -> float | None:
    """Return how long the Projection has to live by its `spec.ttl`; None where it has none."""
    created = projection.metadata.creation_timestamp
    if projection.spec.ttl is None or created is None:
        return None
    return (created + projection.spec.ttl - now).total_seconds()


async def _drop(projection: Projection, around: Surroundings, plan: Versions) -> None:
    """Take away the versions that go."""
    namespace, name = projection.metadata.namespace, projection.metadata.name
    for former in sorted(plan.drop):
        child = names.projector_name(name, former)
        with _cluster_errors():
            await around.cluster.delete("Deployment", namespace, child)
            await around.cluster.delete("Secret", namespace, child)
        try:
            with _readstore_errors():
                await around.readstore.drop_version(namespace=namespace, name=name, version=former)
        except ReconcileError as error:
            if error.reason != _BUSY:
                raise
            # Nobody waits for it: it goes at a later look.
            _log.info("version not dropped yet", namespace=namespace, name=name, version=former, why=error.message)
            continue
        _log.info("version dropped", namespace=namespace, name=name, version=former)


async def _look(projection: Projection, around: Surroundings) -> dict[str, Object] | None:
    """Return the Deployments as they are, to tell what serves although something failed; None if that fails, too."""
    try:
        found = await around.cluster.list(
            "Deployment", projection.metadata.namespace, selector=_children_of(projection)
        )
    except (UnreachableError, cluster.RefusedError):
        return None
    return {child["metadata"]["name"]: child for child in found}


def _result(
    projection: Projection,
    *,
    target: str | None,
    state: ProjectionStatus,
    deployments: Mapping[str, Object] | None,
    problem: ReconcileError | None,
    found: Sequence[str],
    behind: int,
    pace: float | None,
    scaling: Sequence[Status],
) -> Result:
    """Make conditions and status of what was found. Pure.

    `behind`: events that the live version's projectors have still to fold; `pace`: the build's, in events a second;
    `scaling`: what was decided about the versions' projectors.
    """
    live = state.versions.get(state.live) if state.live is not None else None
    building = _building(projection, target, state)
    name = projection.metadata.name
    there = deployments or {}
    query = there.get(names.query_name(name))
    projector = there.get(names.projector_name(name, state.live)) if state.live is not None else None
    away = problem if problem is not None and problem.reason == _AWAY else None
    available = _available(projection, live.version if live else None, deployments, away)
    builder = there.get(names.projector_name(name, building.version)) if building is not None else None
    failing = _failing(building, live, builder)
    ready = _ready(projection, target, live, available, projector, problem, failing)
    progressing = _progressing(building, [query, projector], problem, failing)
    degraded = _degraded(live, problem, failing)
    status: Status = {"url": children.url(projection), "parked": 0, "replicas": 0}
    if deployments is None:
        status["replicas"] = projection.status.get("replicas", 0)
    if live is not None:
        status["live"] = {"version": live.version}
        status["lag"] = {"events": live.lag_events, "seconds": round(live.lag_seconds, 1)}
        status["parked"] = live.parked
        status["selector"] = children.projector_selector(projection, live.version)
    if projector is not None:
        status["replicas"] = projector.get("status", {}).get("replicas", 0)
    if scaling:
        status["autoscaling"] = list(scaling)
    if building is not None:
        status["building"] = build_status(building, live, pace)
    previous = _plan(projection, target, state, {}).previous
    if previous is not None and previous.retired_at is not None and previous.version != target:
        until = previous.retired_at + projection.spec.keep_previous
        status["previous"] = {
            "version": previous.version,
            "keptUntil": timestamp(until),
        }
    again = None
    if problem is not None:
        again = problem.retry_after
    elif failing is not None:
        again = _STARTING_SECONDS
    elif building is not None:
        again = _BUILDING_SECONDS
    elif ready.status != "True" or progressing.status == "True":
        again = _STARTING_SECONDS
    elif behind or (live is not None and live.lag_events):
        # Nothing else tells when they are folded, or set aside.
        again = _LAGGING_SECONDS
    if previous is not None and problem is None:
        left = max(1.0, _left(previous, projection.spec.keep_previous))
        again = left if again is None else min(again, left)
    return Result(
        [ready, available, progressing, degraded],
        status,
        failed=problem is not None,
        again=again,
        found=f"put back what was changed or deleted: {', '.join(found)}" if found else "",
    )


def _unseen(projection: Projection, *, deployments: Mapping[str, Object] | None, problem: ReconcileError) -> Result:
    """Make conditions and status where nobody could look at the versions: what was last known of them stays. Pure."""
    known = {
        name: value for name, value in projection.status.items() if name not in ("conditions", "observedGeneration")
    }
    status: Status = {"url": children.url(projection), "parked": 0, "replicas": 0, **known}
    live = known.get("live", {}).get("version")
    if deployments is not None and live is not None:
        projector = deployments.get(names.projector_name(projection.metadata.name, live), {})
        status["replicas"] = projector.get("status", {}).get("replicas", 0)
    return Result(
        [
            Condition("Ready", "False", problem.reason, problem.message),
            _available(projection, live, deployments, problem),
            _progressing(None, [], problem, None),
            _degraded(None, problem, None),
        ],
        status,
        failed=True,
        again=problem.retry_after,
    )


def build_status(building: VersionStatus, live: VersionStatus | None, pace: float | None) -> Status:
    """Return how far a build is, and how long it takes at its `pace` (events a second) where that is known."""
    # What the live version's projectors saw of a partition counts until the build's own look at it.
    heads = {(one.incarnation, one.partition): one.head for one in live.partitions} if live is not None else {}
    head = sum(
        max(one.head, one.position, heads.get((one.incarnation, one.partition), 0)) for one in building.partitions
    )
    applied = building.position
    percent = applied * 100 // head if head else 100
    if any(one.seen_at is None for one in building.partitions):
        percent = 0 if not head else min(99, percent)
    status: Status = {"version": building.version, "progress": f"{percent}%", "applied": applied, "events": head}
    if pace:
        status["eventsPerSecond"] = round(pace)
        status["remainingSeconds"] = math.ceil((head - applied) / pace)
    return status


def _failing(building: VersionStatus | None, live: VersionStatus | None, builder: Object | None) -> str | None:
    """Return why a build can't take the live version's place unless somebody does something."""
    if building is None or building is live:
        return None
    if building.stopped:
        return "; ".join(dict.fromkeys(building.stopped))
    lacking = live.without_effect if live is not None else 0
    if building.without_effect > lacking:
        if not building.parked:
            return (
                f"{building.without_effect} of its events were discarded, {lacking} of the live version's, so readers "
                "would go back; change the definition so that they have an effect or need none"
            )
        return (
            f"{building.without_effect} of its events failed and were set aside, or follow one that did, {lacking} of "
            f"the live version's, so readers would go back; the first: {building.parked_error} "
            f"(GET /v1/parked?version={building.version})"
        )
    for condition in builder.get("status", {}).get("conditions", []) if builder is not None else []:
        if (condition["type"], condition["status"]) in (("Progressing", "False"), ("ReplicaFailure", "True")):
            return f"its projectors don't start: {condition.get('message', condition.get('reason'))}"
    return None


def _available(
    projection: Projection, live: str | None, deployments: Mapping[str, Object] | None, away: ReconcileError | None
) -> Condition:
    """Tell whether the version `live` serves; `away` says why nobody can ask the read store now."""
    if deployments is None:
        # Nobody could look at the processes either.
        former = find(projection.status, "Available")
        if former is not None:
            return Condition("Available", former["status"], former["reason"], former["message"])
        return Condition("Available", "Unknown", "NotSeen", "nobody could look yet; Ready says why")
    if live is None:
        if away is not None:
            message = f"no version of the read model is known of: {away.message}"
            return Condition("Available", "False", away.reason, message)
        return Condition("Available", "False", "NoVersion", "no version of the read model was made yet")
    if projection.spec.query.replicas == 0:
        return Condition("Available", "False", "ScaledToZero", "spec.query.replicas is 0")
    query = deployments.get(names.query_name(projection.metadata.name), {})
    if not query.get("status", {}).get("availableReplicas", 0):
        if away is not None:
            message = f"no process of the query service is ready: {away.message}"
            return Condition("Available", "False", away.reason, message)
        return Condition("Available", "False", "QueryStarting", "no process of the query service is ready yet")
    if away is not None:
        message = f"version {live} serves, as far as is known: {away.message}"
        return Condition("Available", "True", away.reason, message)
    return Condition("Available", "True", "Serving", f"version {live} serves")


def _ready(
    projection: Projection,
    target: str | None,
    live: VersionStatus | None,
    available: Condition,
    projector: Object | None,
    problem: ReconcileError | None,
    failing: str | None,
) -> Condition:
    if problem is not None:
        return Condition("Ready", "False", problem.reason, problem.message)
    if failing is not None:
        return Condition(
            "Ready",
            "False",
            "BuildFailed",
            f"version {target} doesn't take the place of {live.version if live else 'none'}: {failing}. Readers see "
            "what they saw; the next change of the definition builds another version",
        )
    if live is None or live.version != target:
        return Condition(
            "Ready",
            "False",
            "Building",
            f"version {target} is being built; readers see {live.version if live else 'none'}",
        )
    as_of = projection.spec.as_of
    if as_of is not None and not live.complete:
        return Condition("Ready", "False", "Building", f"version {target} isn't yet what it was at {as_of.isoformat()}")
    if available.status != "True":
        return Condition("Ready", "False", available.reason, available.message)
    if as_of is not None:
        return Condition(
            "Ready", "True", "Complete", f"version {live.version} serves, as it was at {as_of.isoformat()}"
        )
    asleep = projector is not None and not projector["spec"].get("replicas", 1)
    if not asleep and (projector is None or not projector.get("status", {}).get("availableReplicas", 0)):
        return Condition("Ready", "False", "ProjectorStarting", "no projector is ready yet")
    return Condition("Ready", "True", "Serving", f"version {live.version} serves")


def _progressing(
    building: VersionStatus | None,
    deployments: Sequence[Object | None],
    problem: ReconcileError | None,
    failing: str | None,
) -> Condition:
    if problem is not None:
        going_on: ConditionStatus = "True" if problem.reason in PASSING else "False"
        return Condition("Progressing", going_on, problem.reason, problem.message)
    if failing is not None:
        return Condition("Progressing", "False", "BuildFailed", failing)
    if building is not None:
        return Condition("Progressing", "True", "Building", f"version {building.version} is being built")
    if any(deployment is None or not rolled_out(deployment) for deployment in deployments):
        return Condition("Progressing", "True", "Starting", "processes are being started or replaced")
    return Condition("Progressing", "False", "Complete", "nothing is under way")


def _degraded(live: VersionStatus | None, problem: ReconcileError | None, failing: str | None) -> Condition:
    if live is not None and live.stopped:
        return Condition("Degraded", "True", "PartitionStopped", "; ".join(dict.fromkeys(live.stopped)))
    if live is not None and live.parked:
        return Condition(
            "Degraded",
            "True",
            "EventsParked",
            f"{live.parked} events failed and were set aside, or follow one that did (kubectl refold parked list); the "
            f"first: {live.parked_error}",
        )
    if problem is not None and problem.reason not in PASSING:
        return Condition("Degraded", "True", problem.reason, problem.message)
    if failing is not None:
        return Condition("Degraded", "True", "BuildFailed", failing)
    return Condition("Degraded", "False", "AsExpected", "nothing needs a person")


def rolled_out(deployment: Mapping[str, Any]) -> bool:
    """Tell whether all processes of a Deployment run what its spec says."""
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    return bool(
        status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
        and status.get("updatedReplicas", 0) == wanted
        and status.get("replicas", 0) == wanted
        and status.get("availableReplicas", 0) == wanted
    )


def _children_of(projection: Projection) -> str:
    return f"{children.MANAGED},{children.PROJECTION_LABEL}={projection.metadata.name}"


def _store_login(around: Surroundings, schema: str, part: str) -> str:
    """Return a login in the event store: `history` is the projectors', `past` the query services'.

    They are others than those in a read store of the same database.
    """
    return names.resource_role(around.store.database.name, schema, part)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Turn the event store's errors into conditions."""
    try:
        yield
    except UnreachableError as error:
        raise ReconcileError("Ready", "StoreUnreachable", str(error)) from error
    except (EventStoreError, psycopg.Error) as error:
        raise ReconcileError("Ready", "StoreError", f"the event store answered: {error}") from error


@contextlib.contextmanager
def _kafka_errors() -> Iterator[None]:
    """Turn Kafka's errors about the projectors' user into conditions."""
    try:
        yield
    except UnreachableError as error:
        raise ReconcileError("Ready", error.reason or "KafkaUnreachable", str(error)) from error
    except ForbiddenError as error:
        raise ReconcileError("Ready", "KafkaForbidden", str(error)) from error
    except CredentialsError as error:
        raise ReconcileError("Ready", "KafkaCredentialsMissing", str(error)) from error
    except (TopicRefusedError, KafkaException) as error:
        raise ReconcileError("Ready", "KafkaRefused", f"Kafka refused the projectors' user: {error}") from error


@contextlib.contextmanager
def _readstore_errors() -> Iterator[None]:
    """Turn the read store's errors into conditions."""
    try:
        yield
    except UnreachableError as error:
        raise ReconcileError("Ready", _AWAY, str(error)) from error
    except UnavailableError as error:
        raise ReconcileError("Ready", _AWAY, f"the read store: {error}") from error
    except BusyError as error:
        raise ReconcileError("Ready", _BUSY, str(error), retry_after=_STARTING_SECONDS) from error
    except ConflictError as error:
        advice = f"if that one is gone for good, annotate this one with {TAKE_OVER_ANNOTATION}=<uid>"
        raise ReconcileError("Ready", "Conflict", f"{error} ({advice})") from error
    except StoreConflictError as error:
        raise ReconcileError("Ready", "Conflict", str(error)) from error
    except (ReadStoreError, EventStoreError, psycopg.Error) as error:
        raise ReconcileError("Ready", "ReadStoreError", f"the read store answered: {error}") from error


@contextlib.contextmanager
def _cluster_errors() -> Iterator[None]:
    """Turn the API server's errors into conditions."""
    try:
        yield
    except UnreachableError as error:
        raise ReconcileError("Ready", "KubernetesUnreachable", str(error)) from error
    except cluster.RefusedError as error:
        raise ReconcileError("Ready", "KubernetesRefused", str(error)) from error
