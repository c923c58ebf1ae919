"""The read stores that there are, by how their URLs begin: what projector and query service are given.

A process has one. The others' modules and clients aren't imported: each costs a tenth of the time that a projector
takes to start.
"""

from refold.projection.readstore import Reads, Rows

#: How the URLs of a Redis begin; the second speaks TLS.
REDIS = ("redis://", "rediss://")


def rows(url: str, *, namespace: str, name: str, version: str) -> Rows:
    """Return a version of the projection as its projector writes it; nothing is connected yet."""
    if url.startswith(REDIS):
        from refold.projection.readstore.redis_rows import RedisRows

        return RedisRows(url, namespace=namespace, name=name, version=version)
    from refold.projection.readstore.postgres_rows import PostgresRows

    return PostgresRows(url, namespace=namespace, name=name, version=version)


def reads(url: str, *, namespace: str, name: str, connections: int) -> Reads:
    """Return the projection as its query service reads it, over at most `connections`; open it."""
    if url.startswith(REDIS):
        from refold.projection.readstore.redis_reads import RedisReads

        return RedisReads(url, namespace=namespace, name=name, connections=connections)
    from refold.projection.readstore.postgres_reads import PostgresReads

    return PostgresReads(url, namespace=namespace, name=name, connections=connections)
