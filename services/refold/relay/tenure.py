"""What a shard's owner knows and does between taking over and losing the shard.

Positions change only after a commit. An exception leaves this module for what concerns the whole shard (Kafka or
PostgreSQL out of reach, fenced, lock lost); what concerns one stream becomes its refusal.

While the events of a transaction are sent and committed those of the next one are read, on a thread of the tenure's
own. They count only if the positions are then what was expected.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

import psycopg
import structlog
from confluent_kafka import KafkaError

from refold.events import Headers
from refold.relay import backoff, checkpoint, metrics, progress, source
from refold.relay.checkpoint import Checkpoint, Checkpoints
from refold.relay.producer import AbortedError, LostError, Offsets, TransactionalProducer, reason
from refold.relay.progress import FULL_BATCH, Progress, Refusal
from refold.relay.source import MAX_PARTITIONS_PER_QUERY, Heads, Row, Stream, Want
from refold.relay.topics import Topic, Topics
from refold.relay.wake import View

_MAX_BATCH_BYTES = 16 << 20
#: How often all topics are looked up, so that a recreated one is filled even while nothing is appended.
_LOOKUP_SECONDS = 10.0
_IDLE_SECONDS = 1.0
#: Fewer waiting events aren't worth a thread's wake.
_AHEAD_EVENTS = 2_000

#: A stream, what was wanted of one of its partitions, and the events, at least one.
_Batch = tuple[Progress, Want, list[Row]]
_Reading = Future[tuple[list[list[Row]], bool]]


class Tenure:
    """The work of one shard's owner; begins with the checkpoints that were read when the shard was taken over.

    Args:
        shard: its number.
        producer: initialised.
        connection: to the store, of this thread alone.
        checkpoints: all of the shard's.
        checkpoint_topic: where they are written, into the partition `shard`.
        topics: asks Kafka for topics.
        former: what the tenure before this one knew, of which only the refusals and batches count.
    """

    def __init__(
        self,
        shard: int,
        *,
        producer: TransactionalProducer,
        connection: psycopg.Connection,
        checkpoints: Checkpoints,
        checkpoint_topic: str,
        topics: Topics,
        former: Iterable[Progress] = (),
    ) -> None:
        self._shard, self._producer, self._connection, self._topics = shard, producer, connection, topics
        self._checkpoints, self._checkpoint_topic = checkpoints, checkpoint_topic
        self._streams = {known.stream.number: known.dropped() for known in former}
        for known in self._streams.values():
            if known.refusal is not None:
                metrics.REFUSED.labels(known.stream.label, known.refusal.reason).set(1)
        self._next_lookup = 0.0
        self._turn = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix=f"shard-{shard}-reader")
        self._ahead: tuple[list[Want], _Reading] | None = None
        self._log = structlog.get_logger(__name__).bind(shard=shard)

    def adopt(self, view: View) -> None:
        """Take over the streams and heads of a poll."""
        for number in self._streams.keys() - view.keys():
            self._forget(self._streams.pop(number))
        for number, (stream, heads) in view.items():
            known = self._streams.get(number)
            if known is None or known.stream != stream:
                if known is not None:
                    self._forget(known)
                self._streams[number] = Progress(stream, heads)
            else:
                known.heads = heads
        self._prove(self._streams)
        for known in self._streams.values():
            metrics.LAG.labels(known.stream.label).set(known.waiting)

    def note(self, heads: Mapping[int, Heads]) -> None:
        """Note heads that were read since the last view, by the streams' numbers."""
        noted = heads.keys() & self._streams.keys()
        for number in noted:
            self._streams[number].heads = heads[number]
        self._prove(noted)

    def _prove(self, numbers: Iterable[int]) -> None:
        """Stop those of these streams whose store is behind the topic.

        Heads that were given may be older than what was relayed since; only those that are read now prove it.
        """
        asked = [number for number in numbers if self._streams[number].behind]
        if not asked:
            return
        for number, heads in source.heads(self._connection, asked).items():
            known = self._streams[number]
            known.heads = heads
            if known.refusal is None and known.behind:
                self._stop_behind(known)

    def work(self) -> float:
        """Relay what is waiting, one transaction for all sound streams and one for each that is kept alone.

        Returns:
            The seconds after which to work again if nothing wakes the shard.
        """
        now = time.monotonic()
        self._look_up(now)
        ready = [known for known in self._streams.values() if known.waiting and known.ready(now)]
        together = [known for known in ready if not known.alone]
        if together:
            self._turn = (self._turn + 1) % len(together)
            self._relay(together[self._turn :] + together[: self._turn], FULL_BATCH)
        for known in ready:
            if known.alone:
                self._relay([known], known.batch)
        self._producer.poll()
        now = time.monotonic()
        if any(known.due(now) or (known.waiting and known.ready(now)) for known in self._streams.values()):
            return 0.0
        return _IDLE_SECONDS

    def rest(self) -> None:
        """Wait the moment, if any, after which Kafka takes the next transaction at once."""
        self._producer.rest()

    def close(self) -> None:
        """Stop reading and take the shard's streams out of the metrics."""
        self._reader.shutdown(cancel_futures=True)
        for known in self._streams.values():
            self._forget(known)

    @property
    def streams(self) -> list[Progress]:
        """What is known of the streams, for the next tenure."""
        return list(self._streams.values())

    def _look_up(self, now: float) -> None:
        """Learn the topics of new streams and of those that are due to be tried again; now and then of all."""
        everything = now >= self._next_lookup
        if everything:
            self._next_lookup = now + _LOOKUP_SECONDS
        asked = [known for known in self._streams.values() if known.due(now) or (everything and known.refusal is None)]
        found = self._topics.describe((known.stream.topic for known in asked), rights=True)
        for known in asked:
            topic = found[known.stream.topic]
            if isinstance(topic, KafkaError):
                self._refuse(known, Refusal(reason(topic), f"topic {known.stream.topic}: {topic.str()}"), placed=False)
            elif topic != known.topic:
                self._place(known, topic)
            if known.topic is not None and known.refusal is not None and not known.waiting:
                self._accept(known)

    def _place(self, known: Progress, topic: Topic) -> None:
        stream = known.stream
        result = progress.place(stream, topic, self._checkpoints)
        if isinstance(result, Refusal):
            self._refuse(known, result, placed=False)
            return
        former = {
            found.topic_id
            for partition in range(stream.partitions)
            if (found := self._checkpoints.get((stream.incarnation, partition)))
        } - {topic.id}
        if former:
            self._log.warning(
                "The topic is another one than before: it is filled again from history",
                stream=stream.label, topic=stream.topic, topic_id=topic.id, former_ids=sorted(former),
            )  # fmt: skip
        known.placed(topic, result)
        self._prove([stream.number])

    def _relay(self, members: Sequence[Progress], limit: int) -> None:
        """Carry at most `limit` waiting events of `members` in one transaction."""
        batches = self._take_ahead(members) if limit == FULL_BATCH else None
        if batches is None:
            batches = self._read(progress.wants(members, limit, partitions=MAX_PARTITIONS_PER_QUERY))
        if not batches:
            return
        reached = {
            (known.stream.incarnation, want.partition): known.committed(want.after + len(events))
            for known, want, events in batches
        }
        if limit == FULL_BATCH:
            self._read_ahead(members, reached)
        with metrics.TRANSACTION.time():
            self._producer.begin()
            try:
                for known, want, events in batches:
                    self._send(known.stream, want.partition, events)
                self._send_checkpoints(reached)
                offsets = self._commit(batches)
            except AbortedError as error:
                self._aborted(batches, error)
                return
            except LostError as error:
                if error.aborted is not None:
                    self._aborted(batches, error.aborted)
                raise
        self._checkpoints.update(reached)
        for known, want, events in batches:
            known.positions[want.partition] = want.after + len(events)
            if (offset := offsets.get((known.stream.topic, want.partition))) is not None:
                known.offsets[want.partition] = offset
            metrics.RELAYED.labels(known.stream.label).inc(len(events))
        for known in _members(batches):
            metrics.LAG.labels(known.stream.label).set(known.waiting)
            known.grow()
            if known.refusal is not None:
                self._accept(known)

    def _read_ahead(self, members: Sequence[Progress], reached: Checkpoints) -> None:
        """Begin to read what follows on a transaction, where it is worth it."""
        wanted = progress.wants(members, FULL_BATCH, partitions=MAX_PARTITIONS_PER_QUERY, reached=reached)
        if sum(want.limit for want in wanted) >= _AHEAD_EVENTS:
            reading = self._reader.submit(source.events, self._connection, wanted, max_bytes=_MAX_BATCH_BYTES)
            self._ahead = wanted, reading

    def _take_ahead(self, members: Sequence[Progress]) -> list[_Batch] | None:
        """Return what was read ahead, or None where nothing was or it doesn't follow on what stands in the topics."""
        if self._ahead is None:
            return None
        (wanted, reading), self._ahead = self._ahead, None
        known = {member.stream: member for member in members}
        if all(want.stream in known and known[want.stream].positions[want.partition] == want.after for want in wanted):
            return self._read(wanted, reading)
        wait([reading])
        return None

    def _read(self, wanted: Sequence[Want], reading: _Reading | None = None) -> list[_Batch]:
        """Read what is wanted, or what was read of it; a stream whose history can't be read is refused and left out."""
        if not wanted:
            return []
        numbers = dict.fromkeys(want.stream.number for want in wanted)
        try:
            if reading is not None:
                found, complete = reading.result()
            else:
                found, complete = source.events(self._connection, wanted, max_bytes=_MAX_BATCH_BYTES)
        except psycopg.Error as error:
            if self._connection.closed:
                raise
            if len(numbers) > 1:  # one stream's schema must not hold up the others
                return [
                    batch
                    for number in numbers
                    for batch in self._read([w for w in wanted if w.stream.number == number])
                ]
            message = f"reading {wanted[0].stream.schema}.events: PostgreSQL answered: {str(error).strip()}"
            self._refuse(self._streams[wanted[0].stream.number], Refusal("HistoryUnreadable", message))
            return []
        batches = []
        for want, events in zip(wanted, found, strict=True):
            known = self._streams[want.stream.number]
            # ascending and unique, so the ends tell whether one is missing
            if events and (events[0][1], events[-1][1]) == (want.after + 1, want.after + len(events)):
                batches.append((known, want, events))
            elif events or complete:
                message = (
                    f"partition {want.partition} of {want.stream.schema}.events lacks positions after {want.after}, "
                    f"though its head is {known.heads[want.partition]}: history was damaged from outside"
                )
                self._refuse(known, Refusal("HistoryGap", message))
        return [batch for batch in batches if batch[0].ready(time.monotonic())]

    def _send(self, stream: Stream, partition: int, events: Sequence[Row]) -> None:
        send, topic = self._producer.send, stream.topic
        headers = Headers(namespace=stream.namespace, name=stream.name, incarnation=stream.incarnation).of
        first = True
        for _, position, subject, revision, id_, type_, since_2000, data, metadata in events:
            time = since_2000 + source.EPOCH
            told = None if metadata is None else metadata[1:]
            made = headers(position, subject, revision, id_, type_, time, told)
            send(topic, partition, subject, data[1:], made, time // 1000, watched=first)
            first = False

    def _send_checkpoints(self, reached: Checkpoints) -> None:
        for (incarnation, partition), found in reached.items():
            self._producer.send(self._checkpoint_topic, self._shard, *checkpoint.encode(incarnation, partition, found))

    def _commit(self, batches: Sequence[_Batch]) -> Offsets:
        """Commit the transaction of `batches`; return the offsets at which records stand in the topics."""
        delivered: Offsets = {}

        def changed(offsets: Offsets) -> list[str]:
            delivered.update(offsets)
            return self._changed(batches, offsets)

        self._producer.commit(changed)
        return delivered

    def _changed(self, batches: Sequence[_Batch], offsets: Offsets) -> list[str]:
        """Return the topics that are gone, or others than the positions tell of; ask where the offsets don't tell."""
        doubtful = _members([
            (known, want, events)
            for known, want, events in batches
            if not known.proven(want.partition, offsets.get((known.stream.topic, want.partition)))
        ])  # fmt: skip
        found = self._topics.describe(known.stream.topic for known in doubtful)
        changed = []
        for known in doubtful:
            topic = found[known.stream.topic]
            if not isinstance(topic, Topic) or known.topic is None or topic.id != known.topic.id:
                changed.append(known.stream.topic)
        return changed

    def _aborted(self, batches: Sequence[_Batch], error: AbortedError) -> None:
        """Draw the conclusion from an aborted transaction: whose fault it was, or how to find out."""
        metrics.ABORTED.labels(self._shard).inc()
        members = _members(batches)
        for known in members:
            known.doubt()
        self._log.info("A transaction was aborted", error=str(error), streams=len(members))
        changed = [known for known in members if known.stream.topic in error.changed]
        if changed:
            for known in changed:
                known.topic = None  # looked up anew before it is relayed again
            return
        guilty = [known for known in members if known.stream.topic in error.guilty] or members
        for known in guilty:
            if known.batch > 1 or len(batches) > 1:
                known.batch = 1  # alone and one event at a time: then it is known
                continue
            answer = error.guilty.get(known.stream.topic, error.answer)
            _, want, events = batches[0]
            message = (
                f"topic {known.stream.topic} refuses the event at position {want.after + 1} of partition "
                f"{want.partition} (subject {events[0][2].decode()!r}): Kafka answered: "
                f"{answer.str() if answer else error}"
            )
            self._refuse(known, Refusal(reason(answer) if answer else "TopicRefused", message))

    def _stop_behind(self, known: Progress) -> None:
        """Stop a stream whose store has lost events; noted in Kafka, so that it stays stopped when heads grow again."""
        stream = known.stream
        gone = {
            (stream.incarnation, partition): Checkpoint(known.positions[partition], known.topic.id, behind=True)
            for partition in known.behind
            if known.topic is not None
        }
        try:
            self._producer.begin()
            self._send_checkpoints(gone)
            self._producer.commit(lambda _: ())
        except AbortedError as error:
            raise LostError(f"noting that {stream.label} is behind its topic: {error}") from error
        self._checkpoints.update(gone)
        (_, partition), found = next(iter(gone.items()))
        self._refuse(known, progress.behind(stream, partition, found.position), placed=False)

    def _refuse(self, known: Progress, refusal: Refusal, *, placed: bool = True) -> None:
        """Hold a stream back for a while; not `placed`: its topic is looked up anew before it is tried again."""
        label, former = known.stream.label, known.refusal
        known.refuse(refusal, retry_at=time.monotonic() + backoff.seconds(known.failures + 1, first=1, longest=30))
        if not placed:
            known.topic = None
        if former != refusal:
            self._unmark(known.stream, former)
            metrics.REFUSED.labels(label, refusal.reason).set(1)
            self._log.error("A stream is held back", stream=label, reason=refusal.reason, message=refusal.message)

    def _accept(self, known: Progress) -> None:
        self._log.info("A stream goes on", stream=known.stream.label)
        self._unmark(known.stream, known.refusal)
        known.accept()

    def _unmark(self, stream: Stream, refusal: Refusal | None) -> None:
        if refusal is not None:
            metrics.REFUSED.remove(stream.label, refusal.reason)

    def _forget(self, known: Progress) -> None:
        self._unmark(known.stream, known.refusal)
        with suppress(KeyError):
            metrics.LAG.remove(known.stream.label)


def _members(batches: Sequence[_Batch]) -> list[Progress]:
    """Return the streams of `batches`, each once."""
    return list({known.stream.number: known for known, _, _ in batches}.values())
