"""Who may do what in Kafka: SCRAM users and ACLs of relay, projectors and consumers, as far as the settings say.

A user that the operator makes is its own: it has exactly the ACLs that it needs, others are taken away. The relay's
user isn't (it comes with the installation): what it needs is added, what it has beyond that is left. On a stream's
topic, by its name, nobody but the relay keeps a right to write. What is granted by prefix or wildcard is left to who
granted it.

Kafka doesn't tell a user's password, only the iterations of its hash. Those are chosen by the password (4096 and more),
so that they show whether it is the one that the operator derives from its key. See `docs/kafka-security.md`.
"""

import hashlib
from collections.abc import Collection, Iterable

import structlog
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
    ScramMechanism,
)
from refold import kafka as files
from refold import names
from refold.eventstore.errors import NotInstalledError

from refold_operator import credentials
from refold_operator.errors import ForbiddenError
from refold_operator.kafka import Kafka
from refold_operator.resources import EventStream, Projection
from refold_operator.settings import AccessSettings

_log = structlog.get_logger(__name__)

_MECHANISMS = {"SCRAM-SHA-256": ScramMechanism.SCRAM_SHA_256, "SCRAM-SHA-512": ScramMechanism.SCRAM_SHA_512}
#: The brokers' minimum; their maximum is four times that.
_ITERATIONS = 4096
_WRITES = frozenset({AclOperation.WRITE, AclOperation.ALL})


class Access:
    """What the installation's settings let the operator manage; without them, all of this does nothing."""

    def __init__(self, settings: AccessSettings, kafka: Kafka) -> None:
        """Nothing is asked of `kafka` yet."""
        self._settings, self._kafka = settings, kafka
        self._brokers, self._projectors = settings.brokers(), settings.projectors()
        self._key: bytes | None = None
        self._store_id = ""

    async def install(self, *, key: bytes, store_id: str) -> None:
        """Let the relay take part in transactions and keep its checkpoints.

        Args:
            key: the installation's key of passwords.
            store_id: of the event store.

        Raises:
            UnreachableError, ForbiddenError: Kafka is away, or doesn't authorise the operator.
        """
        self._key, self._store_id = key, store_id
        if self._settings.kafka_manage_acls:
            await self._check()
            wanted = relay_acls(self._settings.kafka_relay_principal, store_id)
            if not self._settings.kafka_manage_users:
                wanted |= {_acl(self._settings.kafka_projector_principal, _GROUPS, AclOperation.READ)}
            await self._add(wanted)

    async def stream(self, stream: EventStream, topic: str) -> tuple[dict[str, str], str]:
        """Let the relay write to a stream's topic, its consumers read it, and nobody else write.

        Returns:
            What the Secret of the stream's consumers holds, empty where there is none; and what was found changed.

        Raises:
            UnreachableError, ForbiddenError: Kafka is away, or doesn't authorise the operator.
            NotInstalledError: `install` comes first.
        """
        settings, found = self._settings, []
        if settings.kafka_manage_users or settings.kafka_manage_acls:
            await self._check()
        if settings.kafka_manage_acls:
            wanted = {_acl(settings.kafka_relay_principal, _topic(topic), AclOperation.WRITE)}
            if not settings.kafka_manage_users:
                wanted |= {_acl(settings.kafka_projector_principal, _topic(topic), AclOperation.READ)}
            there = await self._kafka.acls(_any(topic=topic))
            foreign = foreign_writers(there, settings.kafka_relay_principal)
            await self._kafka.change_acls(add=wanted - there, drop=foreign)
            found += [f"took the right to write to {topic} from {acl.principal}" for acl in sorted(foreign)]
        if not settings.kafka_manage_users:
            return {}, "; ".join(found)
        user, groups = self._consumer(stream), names.consumer_groups(stream.metadata.namespace, stream.metadata.name)
        password, more = await self._user(user, topics={topic}, groups=groups)
        secret = {
            "bootstrap": self._brokers.bootstrap,
            "security.protocol": self._brokers.protocol,
            "sasl.mechanism": self._brokers.mechanism,
            "topic": topic,
            "group.prefix": groups,
            files.USERNAME: user,
            files.PASSWORD: password,
        }
        authority = self._brokers.authority()
        return secret | ({files.CA: authority} if authority else {}), "; ".join(found + more)

    async def drop_stream(self, stream: EventStream, topic: str) -> None:
        """Drop the user of a stream's consumers, and what was granted on its topic, which is gone.

        Raises:
            UnreachableError, ForbiddenError: Kafka is away, or doesn't authorise the operator.
            NotInstalledError: `install` comes first.
        """
        if self._settings.kafka_manage_users:
            await self._drop(self._consumer(stream))
        if self._settings.kafka_manage_acls:
            await self._check()
            ours = {self._settings.kafka_relay_principal, self._settings.kafka_projector_principal}
            there = await self._kafka.acls(_any(topic=topic))
            await self._kafka.change_acls(add=(), drop={acl for acl in there if acl.principal in ours})

    async def projection(self, projection: Projection, topics: Collection[str]) -> tuple[dict[str, str], str]:
        """Let a Projection's projectors read `topics`; return their credentials' files, and what was found changed.

        Raises:
            UnreachableError, ForbiddenError: Kafka is away, or doesn't authorise the operator.
            NotInstalledError: `install` comes first.
        """
        if self._projectors is not None:
            return self._projectors.files(), ""
        await self._check()
        user = self._projector(projection)
        groups = names.projector_groups(projection.metadata.namespace, projection.metadata.name)
        password, found = await self._user(user, topics=topics, groups=groups)
        authority = self._brokers.authority()
        known = {files.USERNAME: user, files.PASSWORD: password}
        return known | ({files.CA: authority} if authority else {}), "; ".join(found)

    async def drop_projection(self, projection: Projection) -> None:
        """Drop the user of a Projection's projectors.

        Raises:
            UnreachableError, ForbiddenError: Kafka is away, or doesn't authorise the operator.
            NotInstalledError: `install` comes first.
        """
        if self._settings.kafka_manage_users:
            await self._drop(self._projector(projection))

    async def _user(self, user: str, *, topics: Collection[str], groups: str) -> tuple[str, list[str]]:
        """Make a user of the operator's own, which may read `topics` in groups that begin with `groups`."""
        assert self._key is not None, "`_check` comes first"
        password = credentials.password(self._key, f"kafka:{user}")
        mechanism, iterations = _MECHANISMS[self._brokers.mechanism], _iterations(password)
        found = []
        known = await self._kafka.scram(user)
        if known != {mechanism: iterations}:
            await self._kafka.set_scram(user, mechanism, iterations, password)
            for other in set(known or ()) - {mechanism}:
                await self._kafka.drop_scram(user, other)
            if known is not None:
                found.append(f"set the password of {user} again")
        if self._settings.kafka_manage_acls:
            principal = f"User:{user}"
            wanted = {_acl(principal, _topic(topic), AclOperation.READ) for topic in topics}
            wanted |= {_acl(principal, (ResourceType.GROUP, groups, ResourcePatternType.PREFIXED), AclOperation.READ)}
            there = await self._kafka.acls(_any(principal=principal))
            await self._kafka.change_acls(add=wanted - there, drop=there - wanted)
            if there - wanted:
                found.append(f"took from {user} what it doesn't need")
        return password, found

    async def _drop(self, user: str) -> None:
        await self._check()
        if self._settings.kafka_manage_acls:
            await self._kafka.change_acls(add=(), drop=await self._kafka.acls(_any(principal=f"User:{user}")))
        for mechanism in await self._kafka.scram(user) or ():
            await self._kafka.drop_scram(user, mechanism)

    async def _add(self, wanted: set[AclBinding]) -> None:
        there: set[AclBinding] = set()
        for principal in {acl.principal for acl in wanted}:
            there |= await self._kafka.acls(_any(principal=principal))
        await self._kafka.change_acls(add=wanted - there, drop=())

    async def _check(self) -> None:
        if self._key is None:
            raise NotInstalledError("the operator is still installing its stores; see its log")
        if not await self._kafka.may_manage_access():
            raise ForbiddenError(
                "Kafka doesn't let the operator manage users and ACLs: it needs Alter on the cluster "
                "(docs/kafka-security.md), or set kafka.security.manageUsers and manageAcls to false"
            )

    def _consumer(self, stream: EventStream) -> str:
        return names.kafka_user(self._store_id, stream.metadata.namespace, stream.metadata.name, "consumer")

    def _projector(self, projection: Projection) -> str:
        return names.kafka_user(self._store_id, projection.metadata.namespace, projection.metadata.name, "projector")


def relay_acls(principal: str, store_id: str) -> set[AclBinding]:
    """Return what the relay needs beside Write on each stream's topic."""
    checkpoints = _topic(names.checkpoint_topic(store_id))
    transactions = names.relay_transactional_ids(store_id)
    wanted = {
        _acl(principal, checkpoints, operation)
        for operation in (AclOperation.CREATE, AclOperation.DESCRIBE_CONFIGS, AclOperation.READ, AclOperation.WRITE)
    }
    ids = (ResourceType.TRANSACTIONAL_ID, transactions, ResourcePatternType.PREFIXED)
    # it joins no group, but librdkafka looks for the coordinator of the name that a consumer must have
    group = (ResourceType.GROUP, names.RELAY_GROUP, ResourcePatternType.LITERAL)
    return wanted | {_acl(principal, ids, AclOperation.WRITE), _acl(principal, group, AclOperation.DESCRIBE)}


def foreign_writers(there: Iterable[AclBinding], relay: str) -> set[AclBinding]:
    """Return those ACLs of a stream's topic that let somebody else than the relay write."""
    return {
        acl
        for acl in there
        if acl.permission_type == AclPermissionType.ALLOW and acl.operation in _WRITES and acl.principal != relay
    }


_Resource = tuple[ResourceType, str, ResourcePatternType]
#: The groups of all Projections.
_GROUPS = (ResourceType.GROUP, "refold.", ResourcePatternType.PREFIXED)


def _topic(name: str) -> _Resource:
    return (ResourceType.TOPIC, name, ResourcePatternType.LITERAL)


def _acl(principal: str, resource: _Resource, operation: AclOperation) -> AclBinding:
    return AclBinding(*resource, principal, "*", operation, AclPermissionType.ALLOW)


def _any(*, topic: str | None = None, principal: str | None = None) -> AclBindingFilter:
    """Return the filter of all ACLs of a topic, by its name, or of a principal."""
    of, pattern = (
        (ResourceType.ANY, ResourcePatternType.ANY)
        if topic is None
        else (ResourceType.TOPIC, ResourcePatternType.LITERAL)
    )
    return AclBindingFilter(of, topic, pattern, principal, None, AclOperation.ANY, AclPermissionType.ANY)  # type: ignore[arg-type]


def _iterations(password: str) -> int:
    """Return the iterations of a password's hash, 4096 to 8191; another password has rarely the same."""
    return _ITERATIONS + int.from_bytes(hashlib.sha256(password.encode()).digest()[:2]) % _ITERATIONS
