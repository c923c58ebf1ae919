"""Which partition a subject belongs to: the answer of Kafka's default partitioner (murmur2 over the key's bytes)."""

_MASK = 0xFFFFFFFF
_M = 0x5BD1E995


def murmur2(key: bytes) -> int:
    """Return Kafka's 32-bit murmur2 of `key` as an unsigned number.

    Source: org.apache.kafka.common.utils.Utils.murmur2 (seed 0x9747b28c).
    """
    length = len(key)
    h = 0x9747B28C ^ length
    whole = length & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(key[i : i + 4], "little") * _M & _MASK
        k ^= k >> 24
        h = (h * _M & _MASK) ^ (k * _M & _MASK)
    tail = key[whole:]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * _M & _MASK
    h ^= h >> 13
    h = h * _M & _MASK
    return h ^ (h >> 15)


def partition_of(subject: str, partitions: int) -> int:
    """Return the 0-based partition of `subject` in a stream of `partitions` partitions."""
    return (murmur2(subject.encode()) & 0x7FFFFFFF) % partitions
