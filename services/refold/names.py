"""Names that are made from a resource's namespace and name: schemas, topics, groups, roles, Kubernetes objects.

Kubernetes names are DNS labels (no dot), so `<namespace>.<name>` is unambiguous. A PostgreSQL identifier holds at most
63 bytes; a longer one is cut and ends in a hash of the whole, so that two long names stay apart.
"""

import hashlib

#: The NOTIFY channel that tells of appends; payload: the stream's catalog number, or empty for "look at all".
APPENDED_CHANNEL = "refold_appended"
#: The first of the two int4 keys of every advisory lock of a relay shard ("Refo"); the second is the shard.
RELAY_LOCK = 0x5265666F
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
    return f"refold.relay.{store_id}.{shard}"


def consumer_group(namespace: str, name: str, version: str) -> str:
    """Return the Kafka consumer group of one version of a Projection."""
    return f"refold.{namespace}.{name}.{version}"


def store_role(database: str, part: str) -> str:
    """Return a role of the whole store; `part` is owner, eventstore, relay or heads.

    Roles belong to the whole PostgreSQL cluster, so their names carry the database's name.
    """
    return pg_identifier(f"refold_{database}_{part}")


def resource_role(database: str, schema: str, part: str) -> str:
    """Return a role of one schema: of a stream writer or reader, of a projection projector or query."""
    return pg_identifier(f"refold_{database}:{schema}:{part}")


def projector_name(projection: str, version: str) -> str:
    """Return the name of the projector Deployment (and of its Secret) of one version."""
    return f"{projection}-projector-{version}"


def query_name(projection: str) -> str:
    """Return the name of the query Deployment, Service and Secret of a Projection."""
    return f"{projection}-query"
