"""Names that are made from a resource's namespace and name: schemas, topics, groups, roles, Kubernetes objects.

Kubernetes names are DNS labels (no dot), so `<namespace>.<name>` is unambiguous. A PostgreSQL identifier holds at most
63 bytes; a longer one is cut and ends in a hash of the whole, so that two long names stay apart.
"""

import hashlib

#: The NOTIFY channel that tells of appends; payload: the stream's catalog number, or empty for "look at all".
APPENDED_CHANNEL = "refold_appended"
#: The first of the two int4 keys of every advisory lock of a relay shard ("Refo"); the second is the shard.
RELAY_LOCK = 0x5265666F
#: In place of the shard: the lock that each relay holds in share mode, so that they know how many they are.
RELAY_PRESENCE = 0x7FFFFFFF
#: The name of a consumer group that the relay reads its checkpoints with, without joining it.
RELAY_GROUP = "refold.relay"
_PG_IDENTIFIER_BYTES = 63


def pg_identifier(name: str) -> str:
    """Return `name`, or where it is over 63 bytes its beginning and a hash of the whole."""
    if len(name.encode()) <= _PG_IDENTIFIER_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name.encode()[: _PG_IDENTIFIER_BYTES - 17].decode(errors='ignore')}~{digest}"


def event_schema(namespace: str, name: str) -> str:
    """Return the PostgreSQL schema of an EventStream."""
    return pg_identifier(f"{namespace}.{name}")


def read_schema(namespace: str, name: str) -> str:
    """Return the PostgreSQL schema of a Projection in the read store."""
    return pg_identifier(f"{namespace}.{name}.read")


def topic(namespace: str, name: str) -> str:
    """Return the default Kafka topic of an EventStream."""
    return f"{namespace}.{name}"


def checkpoint_topic(store_id: str) -> str:
    """Return the relay's compacted checkpoint topic for a store."""
    return f"refold.checkpoints.{store_id}"


def relay_transactional_id(store_id: str, shard: int) -> str:
    """Return the `transactional.id` of a relay shard, by which Kafka fences its former owners."""
    return f"{relay_transactional_ids(store_id)}{shard}"


def consumer_group(namespace: str, name: str, version: str) -> str:
    """Return the Kafka consumer group of one version of a Projection."""
    return f"{projector_groups(namespace, name)}{version}"


def kafka_user(store_id: str, namespace: str, name: str, part: str) -> str:
    """Return a SCRAM user that the operator makes; `part` is consumer (of an EventStream) or projector.

    Users belong to the whole Kafka cluster, so their names carry the store's id: no other installation's are like it.
    """
    return f"refold.{store_id}.{namespace}.{name}.{part}"


def consumer_groups(namespace: str, name: str) -> str:
    """Return how the names of groups begin that the consumers of an EventStream may use."""
    return f"consumers.{namespace}.{name}."


def projector_groups(namespace: str, name: str) -> str:
    """Return how the names of the consumer groups of a Projection's versions begin."""
    return f"refold.{namespace}.{name}."


def relay_transactional_ids(store_id: str) -> str:
    """Return how the transactional ids of a store's relay shards begin."""
    return f"refold.relay.{store_id}."


def consumer_name(stream: str) -> str:
    """Return the name of the Secret for those who read an EventStream's topic."""
    return f"{stream}-consumer"


def store_role(database: str, part: str) -> str:
    """Return a role of the whole store; `part` is owner, eventstore, relay or heads.

    Roles belong to the whole PostgreSQL cluster, so their names carry the database's name.
    """
    return pg_identifier(f"refold_{database}_{part}")


def resource_role(database: str, schema: str, part: str) -> str:
    """Return a role of one schema: of a stream writer or reader, of a projection projector, query or sql."""
    return pg_identifier(f"refold_{database}:{schema}:{part}")


def redis_user(namespace: str, name: str, part: str) -> str:
    """Return an ACL user of a Projection in the installation's Redis; `part` is projector or query."""
    return f"refold.{namespace}.{name}.{part}"


def projector_name(projection: str, version: str) -> str:
    """Return the name of the projector Deployment (and of its Secret) of one version."""
    return f"{projection}-projector-{version}"


def query_name(projection: str) -> str:
    """Return the name of the query Deployment, Service and Secret of a Projection."""
    return f"{projection}-query"


def sql_name(projection: str) -> str:
    """Return the name of the Secret for those who read a Projection's rows in SQL."""
    return f"{projection}-sql"
