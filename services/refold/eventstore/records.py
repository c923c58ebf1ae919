"""How large an event's record in the topic can get: what the topic must let pass."""

#: Key, headers but metadata, and Kafka's own frame: subject 512 bytes (three times as many where percent-encoded in
#: ce_source, once in ce_subject, once as key), namespace and name, id and type of 255 each, trace context, numbers.
_FRAME_BYTES = 8 * 1024


def message_bytes(event_bytes: int) -> int:
    """Return the least `max.message.bytes` of a topic that every event of at most `event_bytes` fits into.

    PostgreSQL writes jsonb with a blank after each comma and colon, so `[1,1]` comes back as `[1, 1]`: half as much
    more at worst. Batches are no matter: the relay makes them smaller where a topic refuses one.
    """
    return stored_bytes(event_bytes) + _FRAME_BYTES


def stored_bytes(event_bytes: int) -> int:
    """Return how many bytes data and metadata of an event of `event_bytes` have at most as PostgreSQL writes them."""
    return event_bytes * 3 // 2
