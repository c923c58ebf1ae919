"""Where a shard stands with each of its streams, and what follows from it. No I/O."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from refold.relay.checkpoint import Checkpoint, Checkpoints
from refold.relay.source import Heads, Stream, Want
from refold.relay.topics import Topic

#: Events of one transaction while catching up.
FULL_BATCH = 20_000
_GROWTH = 8


@dataclass(frozen=True)
class Refusal:
    """Why a stream is held back: a word for metrics and conditions, and a sentence for people."""

    reason: str
    message: str


@dataclass
class Progress:
    """What is known of one stream.

    Attributes:
        stream: its catalog entry.
        heads: as last read.
        topic: the topic that `positions` stand in; None until it was looked up.
        positions: what stands in the topic, committed, by partition.
        offsets: by partition, a Kafka offset below which, or at which, a record is known to stand in `topic`.
        batch: how many events its next transaction may hold. Below FULL_BATCH the stream is relayed alone: it was part
            of an aborted transaction. It grows with each success and falls to 1 with a failure; a failure at 1 is the
            stream's own.
        refusal: why it is held back.
        failures: refusals in a row.
        retry_at: when it is tried again, on the monotonic clock.
    """

    stream: Stream
    heads: Heads
    topic: Topic | None = None
    positions: list[int] = field(default_factory=list)
    offsets: dict[int, int] = field(default_factory=dict)
    batch: int = FULL_BATCH
    refusal: Refusal | None = None
    failures: int = 0
    retry_at: float = 0.0

    @property
    def waiting(self) -> int:
        """Events in the store that are not in the topic."""
        if self.topic is None:
            return sum(self.heads)
        return sum(max(0, head - position) for head, position in zip(self.heads, self.positions, strict=True))

    @property
    def behind(self) -> list[int]:
        """Partitions whose head is below what stands in the topic."""
        if self.topic is None:
            return []
        pairs = zip(self.heads, self.positions, strict=True)
        return [partition for partition, (head, position) in enumerate(pairs) if head < position]

    @property
    def alone(self) -> bool:
        """Whether the stream is kept apart from the others' transactions."""
        return self.refusal is not None or self.batch < FULL_BATCH

    def dropped(self) -> "Progress":
        """Return what may be kept when the shard is lost: how the stream is treated, nothing of where it stands."""
        return replace(self, topic=None, positions=[], offsets={})

    def placed(self, topic: Topic, positions: list[int]) -> None:
        """Note that `positions` stand in `topic`: so many records of a partition use up as many offsets."""
        self.topic, self.positions = topic, positions
        self.offsets = {partition: position - 1 for partition, position in enumerate(positions) if position}

    def doubt(self) -> None:
        """Note that records were written, and aborted, which may stand in a topic that was created again."""
        self.offsets = {}

    def proven(self, partition: int, offset: int | None) -> bool:
        """Tell whether a record that was delivered at `offset` stands in `topic`, without asking.

        A topic that was created again begins at offset 0, and nobody but this owner of the shard writes to it: so a
        record that comes after a known one, or after as many as there were events before, stands where those stand.
        """
        known = self.offsets.get(partition)
        return known is not None and offset is not None and offset > known

    def due(self, now: float) -> bool:
        """Whether its topic is to be looked up before it goes on."""
        return now >= self.retry_at if self.refusal else self.topic is None

    def ready(self, now: float) -> bool:
        """Whether it may be relayed, be it as a trial."""
        return self.topic is not None and (self.refusal is None or now >= self.retry_at)

    def grow(self) -> None:
        """Note a committed transaction."""
        self.batch = min(FULL_BATCH, self.batch * _GROWTH)

    def refuse(self, refusal: Refusal, *, retry_at: float) -> None:
        """Hold the stream back; it begins again with one event."""
        self.refusal, self.retry_at, self.batch = refusal, retry_at, 1
        self.failures += 1

    def accept(self) -> None:
        """Let the stream go on."""
        self.refusal, self.failures = None, 0

    def committed(self, position: int) -> Checkpoint:
        """Return the checkpoint of a position in the present topic."""
        assert self.topic is not None
        return Checkpoint(position, self.topic.id)


def place(stream: Stream, topic: Topic, checkpoints: Checkpoints) -> list[int] | Refusal:
    """Return what stands in `topic` of each partition of `stream`, or why the stream can't be relayed to it.

    A checkpoint of another topic id speaks of a topic that is gone: the new one is filled from position 1. Partitions
    that were added to the topic are left empty.
    """
    if not topic.writable:
        return Refusal("TopicForbidden", f"topic {stream.topic}: Kafka doesn't let the relay write to it")
    if topic.partitions < stream.partitions:
        return Refusal(
            "TooFewPartitions",
            f"topic {stream.topic} has {topic.partitions} partitions, the stream {stream.partitions}: add partitions "
            "to the topic, or delete it and let it be created and filled again",
        )
    positions = []
    for partition in range(stream.partitions):
        checkpoint = checkpoints.get((stream.incarnation, partition))
        if checkpoint is None or checkpoint.topic_id != topic.id:
            positions.append(0)
        elif checkpoint.behind:
            return behind(stream, partition, checkpoint.position)
        else:
            positions.append(checkpoint.position)
    return positions


def behind(stream: Stream, partition: int, position: int) -> Refusal:
    """Return the refusal of a stream whose store has lost events that stand in the topic."""
    return Refusal(
        "StoreBehindTopic",
        f"partition {partition} of stream {stream.label} once ended in the store before position {position}, which "
        f"stands in topic {stream.topic}: the store was restored to an earlier state. Positions aren't used twice: "
        "delete the topic, so that it is created and filled again from the store, and rebuild what was made from it",
    )


def wants(
    members: Iterable[Progress], limit: int, *, partitions: int, reached: Checkpoints | None = None
) -> list[Want]:
    """Return what to read next: at most `limit` events of at most `partitions` partitions, shared evenly.

    `reached` are positions that will count once a transaction under way is committed.
    """
    waiting = []
    for member in members:
        for partition, (head, position) in enumerate(zip(member.heads, member.positions, strict=True)):
            sent = reached.get((member.stream.incarnation, partition)) if reached else None
            after = position if sent is None else sent.position
            if head > after:
                waiting.append((member.stream, partition, after, head - after))
    del waiting[min(partitions, limit) :]
    return [
        Want(stream, partition, after, min(limit // len(waiting), count)) for stream, partition, after, count in waiting
    ]
