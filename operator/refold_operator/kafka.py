"""Kafka topics, ACLs and SCRAM users: look, create, configure, delete.

`confluent_kafka`'s admin client answers with futures of its own thread; here they are awaited. What reconciles that run
at the same time ask of topics goes in one request (`batching`).
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import structlog
from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ConfigSource,
    NewTopic,
    OffsetSpec,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialAlteration,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)
from refold.kafka import Brokers, CredentialsError

from refold_operator.batching import Batch
from refold_operator.calls import measured
from refold_operator.errors import ForbiddenError, UnreachableError
from refold_operator.guard import Guard, unguarded

_log = structlog.get_logger(__name__)

_TIMEOUT_SECONDS = 15.0
#: Seconds between two looks at the files of the credentials.
_LOOK_SECONDS = 10.0
#: Topics in one request, at most.
_TOPICS = 100
# What a broker answers about the request itself; everything else is an outage or a change of leaders that passes.
_REFUSALS = {
    KafkaError.INVALID_CONFIG, KafkaError.INVALID_REPLICATION_FACTOR, KafkaError.INVALID_PARTITIONS,
    KafkaError.POLICY_VIOLATION, KafkaError.TOPIC_EXCEPTION, KafkaError.INVALID_REQUEST,
    KafkaError.TOPIC_DELETION_DISABLED, KafkaError.UNSUPPORTED_VERSION,
}  # fmt: skip
# Answers that a caller of `_answer` knows what to make of.
_EXPECTED = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_ALREADY_EXISTS, KafkaError.RESOURCE_NOT_FOUND}
_FORBIDDEN = {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED}


_T = TypeVar("_T")


class TopicRefusedError(Exception):
    """A broker refused what was asked of a topic; asking the same again gets the same answer."""


class TopicExistsError(Exception):
    """There is a topic of this name."""


@dataclasses.dataclass(frozen=True)
class Topic:
    """A topic as it is.

    Attributes:
        id: Kafka's own id, another one whenever a topic of the same name is made again.
        config: what was set on the topic itself, without brokers' defaults.
    """

    name: str
    id: str
    partitions: int
    replicas: int
    config: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Made:
    """A topic that is to be made, with its own configuration."""

    name: str
    partitions: int
    replicas: int
    config: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class _Changed:
    """Configs of a topic that are to be changed; None takes one away. `values` are those that are taken away."""

    name: str
    changes: tuple[tuple[str, str | None], ...]
    values: tuple[tuple[str, str], ...]


class Kafka:
    """One Kafka cluster."""

    def __init__(self, brokers: Brokers, *, guard: Guard = unguarded) -> None:
        """Connect lazily; `guard` is called before each request that changes something."""
        self._guard = guard
        self._system = f"Kafka at {brokers.bootstrap}"
        self._brokers = brokers
        self._looked_at, self._fingerprint = time.monotonic(), brokers.fingerprint()
        self._client = self._former = self._connect()
        self._clusters = Batch(self._look_at_cluster, most=1)
        self._looks = Batch(self._look, most=_TOPICS)
        self._creations = Batch(self._create, most=_TOPICS)
        self._changes = Batch(self._configure, most=_TOPICS)

    def _connect(self) -> AdminClient:
        return AdminClient({**self._brokers.config(), "client.id": "refold-operator"})

    @property
    def _admin(self) -> AdminClient:
        """The client: another one when the credentials' files have changed, which librdkafka reads once.

        The former one stays until the next change, so that what it was asked is answered.
        """
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            found = self._brokers.fingerprint()
            if found != self._fingerprint:
                # without credentials, as while somebody writes them, the one there is goes on
                with contextlib.suppress(CredentialsError):
                    self._former, self._client = self._client, self._connect()
                    self._fingerprint = found
                    _log.info("Kafka's credentials have changed; the operator logs in with the new ones")
        return self._client

    async def cluster_id(self) -> str:
        """Return the cluster's id, which no other cluster has."""
        return await self._clusters.ask(None)

    async def _look_at_cluster(self, _: Sequence[None]) -> list[str | Exception]:
        description = await self._answer(self._admin.describe_cluster(request_timeout=_TIMEOUT_SECONDS))
        return [str(description.cluster_id)]

    async def topic(self, name: str) -> Topic | None:
        """Return a topic, or None where there is none."""
        return await self._looks.ask(name)

    async def _look(self, names: Sequence[str]) -> list[Topic | Exception | None]:
        futures = self._admin.describe_topics(TopicCollection(list(names)), request_timeout=_TIMEOUT_SECONDS)
        resources = {name: ConfigResource(ResourceType.TOPIC, name) for name in names}
        configs = self._admin.describe_configs(list(resources.values()), request_timeout=_TIMEOUT_SECONDS)
        return await _each(self._topic(name, futures[name], configs[resources[name]]) for name in names)

    async def _topic(
        self, name: str, described: "concurrent.futures.Future[Any]", configured: "concurrent.futures.Future[Any]"
    ) -> Topic | None:
        try:
            description = await self._answer(described)
            entries = await self._answer(configured)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return None
            raise
        return Topic(
            name=name,
            id=str(description.topic_id),
            partitions=len(description.partitions),
            replicas=min((len(partition.replicas) for partition in description.partitions), default=0),
            config={
                entry.name: entry.value
                for entry in entries.values()
                if entry.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value
            },
        )

    async def records(self, topic: Topic) -> int:
        """Return how many offsets the topic's partitions hold, markers of transactions included."""
        ends = []
        for spec in (OffsetSpec.earliest(), OffsetSpec.latest()):  # type: ignore[no-untyped-call]
            futures = self._admin.list_offsets(
                {TopicPartition(topic.name, partition): spec for partition in range(topic.partitions)},
                request_timeout=_TIMEOUT_SECONDS,
            )
            ends.append([(await self._answer(future)).offset for future in futures.values()])
        return int(sum(ends[1]) - sum(ends[0]))

    async def create(self, name: str, *, partitions: int, replicas: int, config: Mapping[str, str]) -> None:
        """Create a topic.

        Raises:
            TopicExistsError: there is one already.
            TopicRefusedError: the broker refuses the name, the replication factor or a config.
        """
        await self._creations.ask(_Made(name, partitions, replicas, tuple(sorted(config.items()))))

    async def _create(self, wanted: Sequence[_Made]) -> list[Exception | None]:
        topics = [
            NewTopic(
                one.name, num_partitions=one.partitions, replication_factor=one.replicas, config=dict(one.config)
            )
            for one in wanted
        ]  # fmt: skip
        futures = self._changing().create_topics(
            topics, operation_timeout=_TIMEOUT_SECONDS, request_timeout=_TIMEOUT_SECONDS + 5
        )
        return await _each(self._created(one.name, futures[one.name]) for one in wanted)

    async def _created(self, name: str, future: "concurrent.futures.Future[Any]") -> None:
        try:
            await self._answer(future)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                raise TopicExistsError(name) from error
            raise

    async def configure(self, name: str, changes: Mapping[str, str | None], *, now: Mapping[str, str]) -> None:
        """Set configs of a topic; None takes a config away, so that the broker's default applies.

        Args:
            name: the topic's.
            changes: to which values.
            now: the topic's configs as they are.

        Raises:
            TopicRefusedError: the broker refuses a config.
        """
        gone = {config: now[config] for config, value in changes.items() if value is None and config in now}
        await self._changes.ask(_Changed(name, tuple(sorted(changes.items())), tuple(sorted(gone.items()))))

    async def _configure(self, wanted: Sequence[_Changed]) -> list[Exception | None]:
        # Seen in Kafka 4.3: where a topic was deleted and made again, a broker that starts again shows the former one's
        # configs, too, and to take one away does nothing, since the controller doesn't know it. So it is set before.
        known = [one for one in wanted if one.values]
        failed = dict(zip(known, await self._alter_configs([(one.name, one.values) for one in known]), strict=True))
        left = [one for one in wanted if failed.get(one) is None]
        failed |= zip(left, await self._alter_configs([(one.name, one.changes) for one in left]), strict=True)
        return [failed[one] for one in wanted]

    async def _alter_configs(
        self, topics: Sequence[tuple[str, Iterable[tuple[str, str | None]]]]
    ) -> list[Exception | None]:
        """Change configs of topics; return why one failed, for each."""
        if not topics:
            return []
        resources = [
            ConfigResource(
                ResourceType.TOPIC,
                name,
                incremental_configs=[
                    ConfigEntry(
                        config,
                        value,
                        incremental_operation=AlterConfigOpType.DELETE if value is None else AlterConfigOpType.SET,
                    )
                    for config, value in changes
                ],
            )
            for name, changes in topics
        ]
        futures = self._changing().incremental_alter_configs(resources, request_timeout=_TIMEOUT_SECONDS)
        return await _each(self._answer(futures[resource]) for resource in resources)

    async def delete(self, name: str) -> None:
        """Delete a topic; one that is gone is no error."""
        futures = self._changing().delete_topics(
            [name], operation_timeout=_TIMEOUT_SECONDS, request_timeout=_TIMEOUT_SECONDS + 5
        )
        try:
            await self._answer(futures[name])
        except KafkaException as error:
            if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise

    async def may_manage_access(self) -> bool:
        """Tell whether the operator may look at and change ACLs and users.

        To be asked before: without the right to describe, librdkafka's answers about ACLs are empty, and
        confluent-kafka 2.16 ends the process (heap corruption) where the description of a user is refused.
        """
        description = await self._answer(
            self._admin.describe_cluster(include_authorized_operations=True, request_timeout=_TIMEOUT_SECONDS)
        )
        return {AclOperation.DESCRIBE, AclOperation.ALTER} <= set(description.authorized_operations or ())

    async def acls(self, which: AclBindingFilter) -> set[AclBinding]:
        """Return the ACLs that `which` chooses."""
        return set(await self._answer(self._admin.describe_acls(which, request_timeout=_TIMEOUT_SECONDS)))

    async def change_acls(self, *, add: Iterable[AclBinding], drop: Iterable[AclBinding]) -> None:
        """Add ACLs, then drop others; what is so already is no error.

        Raises:
            ForbiddenError: the operator may not change ACLs, or the brokers have no authorizer.
        """
        added = sorted(add)
        futures = list(self._changing().create_acls(added, request_timeout=_TIMEOUT_SECONDS).values()) if added else []
        filters = [
            AclBindingFilter(
                one.restype, one.name, one.resource_pattern_type, one.principal, one.host, one.operation,
                one.permission_type,
            )
            for one in sorted(drop)
        ]  # fmt: skip
        if filters:
            futures += self._changing().delete_acls(filters, request_timeout=_TIMEOUT_SECONDS).values()
        for future in futures:
            await self._answer(future)

    async def scram(self, user: str) -> Mapping[ScramMechanism, int] | None:
        """Return the iterations of a user's credentials by mechanism, None where there is no such user."""
        # futures by user; of all users at once it would be one
        futures: Any = self._admin.describe_user_scram_credentials([user], request_timeout=_TIMEOUT_SECONDS)
        try:
            found = await self._answer(futures[user])
        except KafkaException as error:
            if error.args[0].code() == KafkaError.RESOURCE_NOT_FOUND:
                return None
            raise
        return {info.mechanism: info.iterations for info in found.scram_credential_infos}

    async def set_scram(self, user: str, mechanism: ScramMechanism, iterations: int, password: str) -> None:
        """Make a user, or change its password."""
        credential = ScramCredentialInfo(mechanism, iterations)
        await self._alter(UserScramCredentialUpsertion(user, credential, password.encode()))

    async def drop_scram(self, user: str, mechanism: ScramMechanism) -> None:
        """Drop a user's credentials; those that are gone are no error."""
        try:
            await self._alter(UserScramCredentialDeletion(user, mechanism))
        except KafkaException as error:
            if error.args[0].code() != KafkaError.RESOURCE_NOT_FOUND:
                raise

    async def _alter(self, alteration: UserScramCredentialAlteration) -> None:
        futures = self._changing().alter_user_scram_credentials([alteration], request_timeout=_TIMEOUT_SECONDS)
        await self._answer(futures[alteration.user])

    def _changing(self) -> AdminClient:
        """Return the client for a request that changes something."""
        self._guard()
        return self._admin

    @measured("kafka", refused=(TopicRefusedError, ForbiddenError))
    async def _answer(self, future: "concurrent.futures.Future[Any]") -> Any:
        """Await an answer; outages and refusals become errors of their own, the rest stays a KafkaException."""
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS + 10):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise self._unreachable(f"no answer within {_TIMEOUT_SECONDS + 10:.0f} s") from None
        except KafkaException as error:
            answer = error.args[0]
            if answer.code() in _EXPECTED:
                raise
            if answer.code() == KafkaError.SECURITY_DISABLED:
                raise ForbiddenError(
                    f"the brokers of {self._system} have no authorizer, so ACLs can't be managed: configure one "
                    "(authorizer.class.name), or set kafka.security.manageAcls to false"
                ) from error
            if answer.code() in _FORBIDDEN:
                raise ForbiddenError(
                    f"{self._system} knows the operator and doesn't authorise this ({answer.name()}): "
                    "docs/kafka-security.md lists the rights that it needs"
                ) from error
            if answer.code() in _REFUSALS:
                raise TopicRefusedError(answer.str()) from error
            raise self._unreachable(answer.str()) from error

    def _unreachable(self, answer: str) -> UnreachableError:
        """Return the error of an outage, with what librdkafka's log tells of the connections."""
        self._admin.poll(0)
        trouble = self._brokers.trouble()
        if trouble is None:
            return UnreachableError(self._system, answer)
        known = trouble.reason in ("AuthenticationFailed", "CertificateUnknown", "CertificateRefused")
        return UnreachableError(self._system, trouble.message, reason=f"Kafka{trouble.reason}" if known else None)


async def _each(answers: Iterable[Awaitable[_T]]) -> list[_T | Exception]:
    """Return what each gives or raises."""
    found = await asyncio.gather(*answers, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, Exception):
            raise one
    return [one for one in found if isinstance(one, Exception) or not isinstance(one, BaseException)]
