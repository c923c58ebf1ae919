"""Kafka topics, ACLs and SCRAM users: look, create, configure, delete.

`confluent_kafka`'s admin client answers with futures of its own thread; here they are awaited.
"""

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
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
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialAlteration,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)
from refold.kafka import Brokers

from refold_operator.calls import measured
from refold_operator.errors import ForbiddenError, UnreachableError
from refold_operator.guard import Guard, unguarded

_TIMEOUT_SECONDS = 15.0
# What a broker answers about the request itself; everything else is an outage or a change of leaders that passes.
_REFUSALS = {
    KafkaError.INVALID_CONFIG, KafkaError.INVALID_REPLICATION_FACTOR, KafkaError.INVALID_PARTITIONS,
    KafkaError.POLICY_VIOLATION, KafkaError.TOPIC_EXCEPTION, KafkaError.INVALID_REQUEST,
    KafkaError.TOPIC_DELETION_DISABLED, KafkaError.UNSUPPORTED_VERSION,
}  # fmt: skip
# Answers that a caller of `_answer` knows what to make of.
_EXPECTED = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_ALREADY_EXISTS, KafkaError.RESOURCE_NOT_FOUND}
_FORBIDDEN = {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED}


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


class Kafka:
    """One Kafka cluster."""

    def __init__(self, brokers: Brokers, *, guard: Guard = unguarded) -> None:
        """Connect lazily; `guard` is called before each request that changes something."""
        self._guard = guard
        self._system = f"Kafka at {brokers.bootstrap}"
        self._brokers = brokers
        self._admin = AdminClient({**brokers.config(), "client.id": "refold-operator"})

    async def cluster_id(self) -> str:
        """Return the cluster's id, which no other cluster has."""
        description = await self._answer(self._admin.describe_cluster(request_timeout=_TIMEOUT_SECONDS))
        return str(description.cluster_id)

    async def topic(self, name: str) -> Topic | None:
        """Return a topic, or None where there is none."""
        futures = self._admin.describe_topics(TopicCollection([name]), request_timeout=_TIMEOUT_SECONDS)
        try:
            description = await self._answer(futures[name])
            resource = ConfigResource(ResourceType.TOPIC, name)
            configs = self._admin.describe_configs([resource], request_timeout=_TIMEOUT_SECONDS)
            entries = await self._answer(configs[resource])
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

    async def create(self, name: str, *, partitions: int, replicas: int, config: Mapping[str, str]) -> None:
        """Create a topic.

        Raises:
            TopicExistsError: there is one already.
            TopicRefusedError: the broker refuses the name, the replication factor or a config.
        """
        topic = NewTopic(name, num_partitions=partitions, replication_factor=replicas, config=dict(config))
        futures = self._changing().create_topics(
            [topic], operation_timeout=_TIMEOUT_SECONDS, request_timeout=_TIMEOUT_SECONDS + 5
        )
        try:
            await self._answer(futures[name])
        except KafkaException as error:
            if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                raise TopicExistsError(name) from error
            raise

    async def configure(self, name: str, changes: Mapping[str, str | None]) -> None:
        """Set configs of a topic; None takes a config away, so that the broker's default applies.

        Raises:
            TopicRefusedError: the broker refuses a config.
        """
        entries = [
            ConfigEntry(
                config,
                value,
                incremental_operation=AlterConfigOpType.DELETE if value is None else AlterConfigOpType.SET,
            )
            for config, value in changes.items()
        ]
        resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)
        futures = self._changing().incremental_alter_configs([resource], request_timeout=_TIMEOUT_SECONDS)
        await self._answer(futures[resource])

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
