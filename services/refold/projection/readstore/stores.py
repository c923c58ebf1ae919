"""The read stores that there are, by how their URLs begin: what projector and query service are given."""

from refold.projection.readstore import Reads, Rows
from refold.projection.readstore.postgres_reads import PostgresReads
from refold.projection.readstore.postgres_rows import PostgresRows
from refold.projection.readstore.redis import SCHEMES
from refold.projection.readstore.redis_reads import RedisReads
from refold.projection.readstore.redis_rows import RedisRows


def rows(url: str, *, namespace: str, name: str, version: str) -> Rows:
    """Return a version of the projection as its projector writes it; nothing is connected yet."""
    kind = RedisRows if url.startswith(SCHEMES) else PostgresRows
    return kind(url, namespace=namespace, name=name, version=version)


def reads(url: str, *, namespace: str, name: str, connections: int) -> Reads:
    """Return the projection as its query service reads it, over at most `connections`; open it."""
    kind = RedisReads if url.startswith(SCHEMES) else PostgresReads
    return kind(url, namespace=namespace, name=name, connections=connections)
