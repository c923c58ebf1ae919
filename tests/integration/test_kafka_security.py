"""Kafka that asks who is there: TLS, SCRAM, PLAIN and mTLS, and ACLs by which the relay alone may write.

One broker with a deny-by-default authorizer; what the operator makes of users and rights is made by its own code, which
logs in as a user that has the rights of docs/kafka-security.md and no others.
"""

import asyncio
import base64
import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from refold import names
from refold.eventstore import EventStore, NewEvent
from refold.eventstore.catalog import Stream
from refold.kafka import Brokers, Settings
from refold.relay import checkpoint
from refold.relay.checkpoint import CheckpointTopic, CheckpointTopicError
from refold.relay.producer import AbortedError, LostError, TransactionalProducer
from refold.relay.topics import Topics
from refold_operator import access, credentials, eventstream, resources
from refold_operator.access import Access
from refold_operator.errors import ForbiddenError, UnreachableError
from refold_operator.kafka import Kafka
from refold_operator.settings import AccessSettings

from hack.servers import Postgres, SecuredKafka, kubernetes_api
from hack.servers.callers import get
from hack.servers.certificates import Authority
from hack.servers.kubernetes_api import ApiServer
from hack.servers.platform import Platform, Service
from tests import operating as cluster
from tests.integration.test_consumer_example import Example

KEY = b"k" * credentials.KEY_BYTES
PASSWORD = "right"
#: A topic that is none: see World.acls.
_LAST = "the-last-change"
READABLE = {
    "streams": ["orders"],
    "columns": [{"name": "status", "type": "text"}],
    "fold": [{"type": "Happened", "set": {"status": "'seen'"}}],
}
_numbers = itertools.count(1)
T = TypeVar("T")

Acls = set[AclBinding]


class World:
    """The broker, its users, a store with two streams, and the operator's access to it all."""

    def __init__(self, kafka: SecuredKafka, postgres: Postgres, folder: Path) -> None:
        self.kafka, self.folder = kafka, folder
        self.admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 2})
        self.platform = Platform(postgres, kafka, store_database="secured_store", read_database="secured_reads")
        self.orders, self.invoices = (
            self.platform.stream("shop", name, partitions=2) for name in ("orders", "invoices")
        )
        for user in ("operator", "relay", "stranger"):
            self.user(user)
        self.grant(operator_acls())
        self.operator = self.access("operator")
        asyncio.run(self._install())

    def access(self, user: str, **more: Any) -> Access:
        """The operator's access to Kafka, logged in as `user`."""
        settings = AccessSettings(
            **self.login(user), kafka_manage_users=True, kafka_manage_acls=True, kafka_relay_principal="User:relay",
            **more,
        )  # fmt: skip
        return Access(settings, Kafka(settings.brokers()))

    async def _install(self) -> None:
        await self.operator.install(key=KEY, store_id=self.platform.store_id)

    def user(self, name: str, password: str = PASSWORD) -> None:
        """Make a SCRAM user, or set its password."""
        credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion(name, credential, password.encode())
        self.admin.alter_user_scram_credentials([change])[name].result(10)

    def files(self, name: str, files: dict[str, str]) -> Path:
        """Write a folder as a Secret is mounted."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text)
        return folder

    def login(self, user: str, password: str = PASSWORD) -> dict[str, Any]:
        """Settings of a SCRAM user."""
        return {
            "kafka_bootstrap": self.kafka.sasl,
            "kafka_security_protocol": "SASL_SSL",
            "kafka_credentials": self.files(f"{user}-{next(_numbers)}", {"username": user, "password": password}),
            "kafka_ca": self.kafka.authority.certificate,
        }

    def brokers(self, user: str) -> Brokers:
        return Settings(**self.login(user)).brokers()

    def grant(self, acls: Acls) -> None:
        """Add ACLs; the broker goes by them then."""
        for future in self.admin.create_acls(list(acls)).values():
            future.result(10)
        assert acls <= self.acls()

    def revoke(self, acls: Acls) -> None:
        """Take ACLs away; the broker goes by it then."""
        for future in self.admin.delete_acls([exactly(acl) for acl in acls]).values():
            future.result(10)
        assert not acls & self.acls()

    def acls(self, principal: str | None = None) -> Acls:
        """Return what the broker goes by, all changes that were answered before included.

        The controller answers a change before the broker, which is asked here, has taken it over. Brokers take changes
        over in their order, so the one that is made here comes last.
        """
        last = acl(f"User:{uuid.uuid4()}", ResourceType.TOPIC, _LAST, AclOperation.READ)
        for future in self.admin.create_acls([last]).values():
            future.result(10)
        eventually(lambda: self.admin.describe_acls(exactly(last)).result(10))
        found = self.admin.describe_acls(access._any(principal=principal)).result(10)
        return {one for one in found if one.name != _LAST}

    def stream(self, stream: Stream) -> tuple[dict[str, str], str]:
        """Reconcile who may read and write a stream's topic."""
        return asyncio.run(self.operator.stream(resource(stream), stream.topic))

    def append(self, stream: Stream, subject: str) -> None:
        async def append() -> None:
            async with await EventStore.open(self.platform.store_dsn()) as store:
                await store.append(stream.namespace, stream.name, subject, [NewEvent.of("Happened", {}, id="1")])

        asyncio.run(append())


def resource(stream: Stream) -> resources.EventStream:
    metadata = {
        "namespace": stream.namespace, "name": stream.name, "uid": stream.uid, "generation": 1, "resourceVersion": "1",
    }  # fmt: skip
    return resources.event_stream({"metadata": metadata, "spec": {"partitions": stream.partitions}})


def acl(
    principal: str, kind: ResourceType, name: str, operation: AclOperation, *, prefixed: bool = False
) -> AclBinding:
    pattern = ResourcePatternType.PREFIXED if prefixed else ResourcePatternType.LITERAL
    return AclBinding(kind, name, pattern, principal, "*", operation, AclPermissionType.ALLOW)


def exactly(acl: AclBinding) -> AclBindingFilter:
    return AclBindingFilter(
        acl.restype, acl.name, acl.resource_pattern_type, acl.principal, acl.host, acl.operation, acl.permission_type
    )


def operator_acls() -> Acls:
    """The rights of the operator in docs/kafka-security.md."""
    operations = AclOperation
    topics = (operations.CREATE, operations.DELETE, operations.ALTER_CONFIGS)
    return {acl("User:operator", ResourceType.TOPIC, "*", operation) for operation in topics} | {
        acl("User:operator", ResourceType.BROKER, "kafka-cluster", operations.ALTER)
    }


@pytest.fixture(scope="module")
def world(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    broker = SecuredKafka(plain_users={"plain-relay": PASSWORD})
    try:
        broker.start()
        yield World(broker, postgres, tmp_path_factory.mktemp("kafka-security"))
    finally:
        broker.remove()


def eventually(look: Callable[[], T], *, seconds: float = 30) -> T:
    """Return what `look` answers once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return found


def environment(settings: dict[str, Any]) -> dict[str, str]:
    return {f"REFOLD_{name}".upper(): str(value) for name, value in settings.items()}


def relayed(world: World, topic: str, subject: str) -> Message:
    """Wait for the record of a subject, as a super user."""
    consumer = Consumer(
        {"bootstrap.servers": world.kafka.bootstrap, "group.id": "test", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([topic])
    deadline = time.monotonic() + 30
    try:
        while time.monotonic() < deadline:
            for message in consumer.consume(100, 0.1):
                if message.key() == subject.encode():
                    return message
    finally:
        consumer.close()
    raise AssertionError(f"{subject} isn't in {topic}")


def relay(world: World, settings: dict[str, Any]) -> Service:
    return world.platform.relay(**environment({"relay_shards": 2, **settings}))


# --- the relay ---


def mtls(world: World, name: str, authority: Authority | None = None) -> dict[str, Any]:
    folder = world.folder / f"{name}-{next(_numbers)}"
    (authority or world.kafka.authority).issue(name, folder)
    return {
        "kafka_bootstrap": world.kafka.mtls, "kafka_security_protocol": "SSL", "kafka_credentials": folder,
        "kafka_ca": world.kafka.authority.certificate,
    }  # fmt: skip


@pytest.mark.parametrize("how", ["SCRAM", "PLAIN", "mTLS"])
def test_the_relay_relays_over_tls(world: World, how: str) -> None:
    world.stream(world.orders)
    if how == "SCRAM":
        settings, principal = world.login("relay"), "User:relay"
    elif how == "PLAIN":
        settings, principal = world.login("plain-relay") | {"kafka_sasl_mechanism": "PLAIN"}, "User:plain-relay"
    else:
        settings, principal = mtls(world, "relay"), "User:CN=relay"
    granted: Acls = set()
    if principal != "User:relay":  # the operator has granted what that one needs
        granted = access.relay_acls(principal, world.platform.store_id)
        granted |= {acl(principal, ResourceType.TOPIC, world.orders.topic, AclOperation.WRITE)}
        world.grant(granted)
    process = relay(world, settings)
    process.up()
    try:
        world.append(world.orders, f"by {how}")
        assert relayed(world, world.orders.topic, f"by {how}").value() == b"{}"
    finally:
        process.stop()
        if granted:
            world.revoke(granted)
    assert PASSWORD not in process.log.read_text()


def test_a_refused_login_is_told_plainly_and_the_relay_recovers_when_it_is_put_right(world: World) -> None:
    world.stream(world.orders)
    settings = world.login("relay", "wrong")
    process = relay(world, settings)
    process.up()
    try:
        eventually(lambda: "authentication failed" in why(process))
        assert "authentication failed" in logged(process)
        assert "relay" in logged(process)
        (settings["kafka_credentials"] / "password").write_text(PASSWORD)
        eventually(lambda: not process.running)
        assert "credentials have changed" in logged(process)
        process.up()  # as Kubernetes does
        world.append(world.orders, "after the right password")
        relayed(world, world.orders.topic, "after the right password")
    finally:
        process.stop()


def test_a_broker_that_is_not_trusted_is_told_plainly(world: World) -> None:
    other = Authority(world.folder / "other-ca")
    brokers = Settings(**world.login("relay") | {"kafka_ca": other.certificate}).brokers()
    producer = TransactionalProducer(brokers, "refold.relay.any.0", control="any", check=lambda: None)

    def trouble() -> str:
        producer.poll()
        heard = brokers.trouble()
        return heard.message if heard else ""

    assert "certificate isn't signed by the CA that we know" in eventually(trouble)
    producer.close()


def why(process: Service) -> str:
    """What a process says of why it isn't ready."""
    return get(f"{process.url}/readyz").text


def logged(process: Service) -> str:
    return process.log.read_text()


def test_each_right_of_the_relay_is_needed_and_all_together_are_enough(world: World) -> None:
    world.stream(world.orders)
    principal = "User:prober"
    world.user("prober")
    store_id = "0123456789abcdef"  # another store's: its checkpoint topic isn't there yet
    topic = names.checkpoint_topic(store_id)
    rights = access.relay_acls(principal, store_id)
    rights |= {acl(principal, ResourceType.TOPIC, world.orders.topic, AclOperation.WRITE)}

    def work() -> None:
        """What a shard does from its lock to its first event, and what its successor reads."""
        brokers = world.brokers("prober")
        topics = Topics(brokers)
        made = CheckpointTopic(topics, topic, shards=1, replicas=1).ensure()
        producer = TransactionalProducer(
            brokers, names.relay_transactional_id(store_id, 0), control=made, check=lambda: None
        )
        try:
            producer.init(timeout=10)
            topics.describe([world.orders.topic])
            producer.begin()
            producer.send(world.orders.topic, 0, b"probe", b"{}")
            producer.send(made, 0, *checkpoint.encode("probe", 0, checkpoint.Checkpoint(1, "id")))
            producer.commit(lambda _: ())
        finally:
            producer.close()
        end = topics.high_watermark(made, 0)
        assert checkpoint.load(brokers, made, 0, end=end, timeout=10, check=lambda: None)

    refusals = (KafkaException, LostError, AbortedError, CheckpointTopicError)
    try:
        for missing in sorted(rights, key=lambda one: one.operation != AclOperation.CREATE):
            world.grant(rights - {missing})
            with pytest.raises(refusals) as refused:
                work()
            guilty = getattr(refused.value, "guilty", {})
            said = f"{refused.value} {[error.str() for error in guilty.values()]}"
            assert "authorization" in said.lower() or "doesn't let the relay write" in said, missing
            world.grant({missing})
            work()
            world.revoke(rights)
    finally:
        world.revoke(rights)


# --- readers ---


def client(secret: dict[str, str]) -> dict[str, Any]:
    """librdkafka's settings of a consumers' Secret."""
    return {
        "bootstrap.servers": secret["bootstrap"], "security.protocol": secret["security.protocol"],
        "sasl.mechanism": secret["sasl.mechanism"], "sasl.username": secret["username"],
        "sasl.password": secret["password"], "ssl.ca.pem": secret["ca.crt"], "log_level": 2,
    }  # fmt: skip


def read(secret: dict[str, str], topic: str, *, group: str | None = None) -> list[bytes]:
    """Read the keys of a topic from its beginning with a consumer group.

    Raises:
        KafkaException: what Kafka answers.
    """
    consumer = Consumer(
        client(secret)
        | {
            "group.id": group or f"{secret['group.prefix']}test", "auto.offset.reset": "earliest",
            "enable.partition.eof": True, "enable.auto.commit": False,
        }
    )  # fmt: skip
    consumer.subscribe([topic])
    found, ended, deadline = [], set(), time.monotonic() + 20
    try:
        while len(ended) < 2:
            assert time.monotonic() < deadline
            for message in consumer.consume(100, 0.1):
                error = message.error()
                if error is None:
                    found.append(message.key())
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended.add(message.partition())
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()
    return found


def write(config: dict[str, Any], topic: str) -> KafkaError | None:
    """Write a record; return what Kafka says."""
    answers: list[KafkaError | None] = []
    producer = Producer({**config, "message.timeout.ms": 10_000})
    producer.produce(topic, b"forged", b"forged", partition=0, on_delivery=lambda error, _: answers.append(error))
    producer.flush(15)
    return answers[0]


def test_a_consumer_secret_reads_its_own_stream_and_nothing_else(world: World) -> None:
    secret, _ = world.stream(world.orders)
    world.stream(world.invoices)
    assert write({"bootstrap.servers": world.kafka.bootstrap}, world.orders.topic) is None
    assert b"forged" in read(secret, world.orders.topic)
    with pytest.raises(KafkaException, match="TOPIC_AUTHORIZATION_FAILED"):
        read(secret, world.invoices.topic)
    with pytest.raises(KafkaException, match="GROUP_AUTHORIZATION_FAILED"):
        read(secret, world.orders.topic, group=names.consumer_group("shop", "status", "v1"))


def test_only_the_relay_may_write(world: World) -> None:
    secret, _ = world.stream(world.orders)
    stranger = world.brokers("stranger").config() | {"log_level": 2}
    for config in (client(secret), stranger):
        error = write(config, world.orders.topic)
        assert error is not None
        assert error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
    assert write(world.brokers("relay").config(), world.orders.topic) is None


def test_what_somebody_else_changes_is_put_right_and_nothing_else_is_touched(world: World) -> None:
    secret, _ = world.stream(world.orders)
    assert world.stream(world.orders) == (secret, ""), "nothing to do"
    topic, user = world.orders.topic, f"User:{secret['username']}"
    intruder = acl("User:stranger", ResourceType.TOPIC, topic, AclOperation.WRITE)
    reader = acl("User:stranger", ResourceType.TOPIC, topic, AclOperation.READ)
    too_much = acl(user, ResourceType.TOPIC, world.invoices.topic, AclOperation.READ)
    own = world.acls(user)
    world.grant({intruder, reader, too_much})
    world.revoke(own)
    world.user(secret["username"], "changed")
    with pytest.raises(AssertionError):
        read_within(secret, topic, seconds=1)
    again, found = world.stream(world.orders)
    assert again == secret
    for word in ("stranger", "password", "doesn't need"):
        assert word in found
    assert world.acls(user) == own
    assert world.acls("User:stranger") == {reader}, "who else may read is not the operator's business"
    read(secret, topic)
    assert world.stream(world.orders) == (secret, "")
    world.revoke({reader})


def read_within(secret: dict[str, str], topic: str, *, seconds: float) -> None:
    consumer = Consumer(client(secret) | {"group.id": f"{secret['group.prefix']}test", "log_level": 0})
    consumer.subscribe([topic])
    deadline = time.monotonic() + seconds
    try:
        while not consumer.assignment():
            assert time.monotonic() < deadline
            consumer.consume(1, 0.1)
    finally:
        consumer.close()


def test_users_and_rights_go_with_the_stream_and_its_topic(world: World) -> None:
    stream = world.platform.stream("shop", "short-lived", partitions=2)
    secret, _ = world.stream(stream)
    assert world.acls(f"User:{secret['username']}")
    asyncio.run(world.operator.drop_stream(resource(stream), stream.topic))
    assert not world.acls(f"User:{secret['username']}")
    assert not [one for one in world.acls() if one.name == stream.topic]
    (described,) = world.admin.describe_user_scram_credentials([secret["username"]]).values()
    with pytest.raises(KafkaException, match="RESOURCE_NOT_FOUND"):
        described.result(10)
    asyncio.run(world.operator.drop_stream(resource(stream), stream.topic))  # again, as after a crash


def test_users_that_were_given_get_their_rights_and_lose_them_with_the_topic(world: World) -> None:
    settings = AccessSettings(
        **world.login("operator"), kafka_manage_acls=True, kafka_relay_principal="User:CN=relay",
        kafka_projector_principal="User:given", kafka_projector_credentials=world.files("given", {"password": "p"}),
        kafka_projector_username="given",
    )  # fmt: skip
    given = Access(settings, Kafka(settings.brokers()))
    stream = world.platform.stream("shop", "with-given-users", partitions=2)
    metadata = {"namespace": "shop", "name": "status", "uid": "u", "generation": 1, "resourceVersion": "1"}
    projection = resources.projection({"metadata": metadata, "spec": READABLE})

    async def reconcile() -> dict[str, str]:
        await given.install(key=KEY, store_id=world.platform.store_id)
        assert await given.stream(resource(stream), stream.topic) == ({}, ""), "nobody gets a Secret"
        return (await given.projection(projection, {stream.topic}))[0]

    for _ in range(2):
        files = asyncio.run(reconcile())
        assert (files["username"], files["password"]) == ("given", "p")
    groups = acl("User:given", ResourceType.GROUP, "refold.", AclOperation.READ, prefixed=True)
    topic = acl("User:given", ResourceType.TOPIC, stream.topic, AclOperation.READ)
    relay_writes = acl("User:CN=relay", ResourceType.TOPIC, stream.topic, AclOperation.WRITE)
    assert world.acls("User:given") == {groups, topic}
    assert relay_writes in world.acls()
    asyncio.run(given.drop_stream(resource(stream), stream.topic))
    assert world.acls("User:given") == {groups}
    assert relay_writes not in world.acls()
    world.revoke({groups} | access.relay_acls("User:CN=relay", world.platform.store_id))


def test_a_projector_folds_over_tls_with_rights_of_its_own(world: World) -> None:
    secret, _ = world.stream(world.orders)
    del secret
    version = world.platform.projection("shop", "status", READABLE, [world.orders])
    metadata = {"namespace": "shop", "name": "status", "uid": "u", "generation": 1, "resourceVersion": "1"}
    projection = resources.projection({"metadata": metadata, "spec": READABLE})
    files, found = asyncio.run(world.operator.projection(projection, {world.orders.topic}))
    assert not found
    settings = world.login("relay") | {"kafka_credentials": world.files("projector", files)}
    relaying = relay(world, world.login("relay"))
    projector = world.platform.projector("shop", "status", version, **environment(settings))
    relaying.up()
    projector.up()
    try:
        world.append(world.orders, "projected")
        schema = names.read_schema("shop", "status")
        with psycopg.connect(world.platform.read_dsn(), autocommit=True) as reads:
            query = f'select 1 from "{schema}"."rows_{version}" where key = %s'
            eventually(lambda: reads.execute(query.encode(), ["projected"]).fetchone())
        # read from the topic, not from the store beside it
        world.append(world.orders, "projected from the topic")
        eventually(lambda: 'source="topic"' in get(f"{projector.url}/metrics").text)
    finally:
        projector.stop()
        relaying.stop()
    assert write(Settings(**settings).brokers().config(), world.orders.topic) is not None
    asyncio.run(world.operator.drop_projection(projection))
    assert not world.acls(f"User:{files['username']}")


def test_the_example_service_follows_with_the_consumer_secret(world: World, tmp_path: Path) -> None:
    secret, _ = world.stream(world.invoices)
    relaying, eventstore = relay(world, world.login("relay")), world.platform.eventstore()
    variables = {
        "KAFKA": secret["bootstrap"], "KAFKA_SECURITY_PROTOCOL": secret["security.protocol"],
        "KAFKA_SASL_MECHANISM": secret["sasl.mechanism"], "KAFKA_USERNAME": secret["username"],
        "KAFKA_PASSWORD": secret["password"], "KAFKA_CA": secret["ca.crt"],
        "KAFKA_GROUP_PREFIX": secret["group.prefix"],
    }  # fmt: skip
    example = Example(world.platform, world.invoices, eventstore, tmp_path, **variables)
    try:
        relaying.up()
        eventstore.up()
        example.up()
        world.append(world.invoices, "an invoice")
        eventually(lambda: example.position() == 1)
    finally:
        for process in (example, eventstore, relaying):
            process.stop()


def test_each_right_of_a_reader_is_needed(world: World) -> None:
    secret, _ = world.stream(world.orders)
    principal = f"User:{secret['username']}"
    for missing, answer in (
        (acl(principal, ResourceType.TOPIC, world.orders.topic, AclOperation.READ), "TOPIC_AUTHORIZATION_FAILED"),
        (
            acl(principal, ResourceType.GROUP, secret["group.prefix"], AclOperation.READ, prefixed=True),
            "GROUP_AUTHORIZATION_FAILED",
        ),
    ):
        world.revoke({missing})
        with pytest.raises(KafkaException, match=answer):
            read(secret, world.orders.topic)
        world.grant({missing})
    assert world.acls(principal) == {
        acl(principal, ResourceType.TOPIC, world.orders.topic, AclOperation.READ),
        acl(principal, ResourceType.GROUP, "consumers.shop.orders.", AclOperation.READ, prefixed=True),
    }
    read(secret, world.orders.topic)


# --- the operator ---


def test_each_right_of_the_operator_is_needed_and_all_together_are_enough(world: World) -> None:
    kafka = Kafka(world.brokers("operator"))

    async def work(name: str) -> None:
        await kafka.create(name, partitions=1, replicas=1, config={})
        while await kafka.topic(name) is None:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.02)
        await kafka.configure(name, {"retention.ms": "1000"}, now={})
        await world.operator.stream(resource(world.orders), world.orders.topic)
        await kafka.delete(name)

    def refused() -> bool:
        try:
            asyncio.run(work(f"shop.work-{next(_numbers)}"))
        except ForbiddenError:
            return True
        return False

    # the controller, which makes topics, goes by new ACLs a moment after the broker does
    for missing in sorted(operator_acls()):
        eventually(lambda: not refused())
        world.revoke({missing})
        try:
            eventually(refused)
        finally:
            world.grant({missing})
    eventually(lambda: not refused())


def test_what_keeps_the_operator_out_is_the_streams_condition(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refold_operator.kafka._TIMEOUT_SECONDS", 1.0)

    def reason(settings: dict[str, Any]) -> tuple[str, str]:
        """Look for the topic alone: the store is out of the picture."""
        kafka = Kafka(Settings(**settings).brokers())
        with pytest.raises(eventstream.ReconcileError) as failed, eventstream._kafka_errors(world.orders.topic):
            asyncio.run(kafka.topic(world.orders.topic))
        return failed.value.reason, failed.value.message

    other = Authority(world.folder / "strange-ca")
    wrong, message = reason(world.login("operator", "wrong"))
    assert wrong == "KafkaAuthenticationFailed"
    assert "password" in message
    assert reason(world.login("operator") | {"kafka_ca": other.certificate})[0] == "KafkaCertificateUnknown"
    assert reason(mtls(world, "operator", other))[0] == "KafkaCertificateRefused"
    forbidden, message = reason(world.login("stranger"))
    assert forbidden == "KafkaForbidden"
    assert "docs/kafka-security.md" in message


def test_the_operator_takes_over_a_password_that_was_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refold_operator.kafka._TIMEOUT_SECONDS", 5.0)
    monkeypatch.setattr("refold_operator.kafka._LOOK_SECONDS", 0.0)
    login = world.login("operator")
    kafka = Kafka(Settings(**login).brokers())

    async def rotate() -> None:
        assert await kafka.topic(world.orders.topic) is not None
        file = login["kafka_credentials"] / "password"
        file.unlink()
        assert await kafka.topic(world.orders.topic) is not None, "nobody has written the new one yet"
        file.write_text("wrong")
        with pytest.raises(UnreachableError, match="authentication failed"):
            await kafka.topic(world.orders.topic)
        file.write_text(PASSWORD)
        assert await kafka.topic(world.orders.topic) is not None

    asyncio.run(rotate())


@pytest.mark.skipif(kubernetes_api.programs() is None, reason="no kube-apiserver and etcd in the cache: see hack/kind")
def test_the_operator_hands_out_users_and_takes_them_back(world: World, postgres: Postgres) -> None:
    settings = world.login("operator") | {
        "kafka_manage_users": True, "kafka_manage_acls": True, "kafka_relay_principal": "User:relay",
    }  # fmt: skip
    api = ApiServer()
    api.start()
    operator = cluster.Operator(
        api, postgres, world.kafka, ("secured_operator_store", "secured_operator_reads"), **environment(settings)
    )
    try:
        api.kubectl("apply", "-f", str(cluster.ROOT / "crds"))
        for namespace in ("refold-system", "secure"):
            api.kubectl("create", "namespace", namespace)
        api.apply(cluster.QUERY_BINDING)
        operator.start()
        api.apply(cluster.event_stream("secure", deletionPolicy="Delete"), cluster.projection("secure"))
        cluster.becomes(api, "eventstream", "secure", "orders", "True", "Active")
        secret = contents(api, "orders-consumer")
        assert secret["topic"] == "secure.orders"
        assert read(secret, "secure.orders") == []
        granted = world.acls(f"User:{secret['username']}")
        version = cluster.until(lambda: cluster.live(api, "secure"))
        reader = contents(api, f"status-projector-{version}")
        assert world.acls(f"User:{reader['username']}") == {
            acl(f"User:{reader['username']}", ResourceType.TOPIC, "secure.orders", AclOperation.READ),
            acl(
                f"User:{reader['username']}", ResourceType.GROUP, "refold.secure.status.", AclOperation.READ,
                prefixed=True,
            ),
        }  # fmt: skip
        api.kubectl("delete", "secret", "orders-consumer", "-n", "secure")
        assert cluster.until(lambda: contents(api, "orders-consumer")) == secret, "the same password again"
        world.revoke(granted)
        api.kubectl("annotate", "eventstream", "orders", "-n", "secure", "look=again")
        cluster.until(lambda: world.acls(f"User:{secret['username']}") == granted)
        api.kubectl("delete", "projection,eventstream", "--all", "-n", "secure", "--timeout=60s")
        assert not [one for one in world.acls() if "secure" in one.name or ".secure." in one.principal]
        assert secret["password"] not in operator.log
    finally:
        operator.stop()
        api.remove()


def contents(api: ApiServer, name: str) -> dict[str, str]:
    """A Secret's content."""
    data = api.get("secret", name, "-n", "secure")["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}
