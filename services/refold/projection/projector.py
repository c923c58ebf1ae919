"""The projector's loop: what is assigned is brought from its position in the read store to the head, and kept there.

The rule for each record of the topic: its position at or below the applied one → skip; the next one → fold; beyond it →
the event store is read first. All else follows from it: where reading begins in the topic is a hint only, and
retention, recreated topics and wrong hints lose nothing.

A partition is in one of these states:

    new        just assigned, or something went wrong: read its position from the read store, ask Kafka what the topic
               holds; the stored offset serves where it is of this topic and within it: tail; else backfill
    backfill   the topic is paused. Pages of the event store until the head as it was after the topic's end was noted;
               then tail from that end on, since whatever comes after it can't be older than that head
    tail       records come from the topic. A gap, or a head that stays beyond what the topic delivers: backfill
    stopped    too much is parked, or the event store lacks events: the reason stands in the read store; tried again
               every `_STOPPED_SECONDS`
    done       of a version as of a moment, whose partitions have ends: all before its end is applied, from the event
               store alone; the topic is never read

What can't be known for sure (a connection lost in the middle of a transaction, another projector that has written) is
never guessed: the partition becomes new again.

A batch that the read store refuses is halved until the guilty event stands alone; that event is parked. Between batches
the loop looks whether somebody asks for parked events to be folded again, or discarded (`unparking`).
"""

import random
import threading
import time
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, cast

import msgspec
import structlog
from confluent_kafka import Message

from refold import names
from refold.events import Event, from_record
from refold.projection import metrics, parking
from refold.projection.backfill import Heads, History, HistoryUnavailableError, Page, wait_a_little
from refold.projection.consumer import KafkaUnavailableError, Offsets, Place, TopicConsumer
from refold.projection.definition import StreamRef, VersionDefinition
from refold.projection.fold import Batch, Fold, Parked, ParkedEvent
from refold.projection.handler import FIELD, HandlerBatch, HandlerError, HandlerFold, folding
from refold.projection.readstore import Advance, MovedError, NotFoundError, RefusedError, Seen, UnavailableError, stores
from refold.projection.settings import Settings
from refold.projection.throttle import LOOK_SECONDS, Throttle
from refold.projection.unparking import Asked, ParkedRow, Settled, fold_again

log = structlog.get_logger(__name__)

#: Seconds that the loop waits for a record when there is nothing else to do.
_IDLE_SECONDS = 0.2
#: Seconds that a head may be beyond what the topic delivers before the event store is read.
_STALL_SECONDS = 3.0
_STOPPED_SECONDS = 10.0
#: Seconds after a question that Kafka didn't answer in which it isn't asked another: each may take as long.
_KAFKA_PAUSE_SECONDS = 5.0
_COMMIT_SECONDS = 1.0
#: Seconds between two looks at what is asked of parked events, where there are any.
_ASKED_SECONDS = 0.5
#: Parked events of a row that are folded again in one transaction.
_AGAIN_EVENTS = 100
#: Seconds after which a look at the heads is stored even where nothing changed: a sign that somebody looks. Readers
#: count a partition as unseen after three times that (`refold.query.freshness`).
_SEEN_SECONDS = 10.0
#: Seconds without a sign of life after which the loop counts as stuck; above any statement's timeout.
_STUCK_SECONDS = 180.0


class State(Enum):
    """See the module's docstring."""

    NEW = "new"
    BACKFILL = "backfill"
    TAIL = "tail"
    STOPPED = "stopped"
    DONE = "done"


class Partition:
    """An assigned partition and how far it is."""

    def __init__(self, stream: StreamRef, number: int, end: int | None = None) -> None:
        self.stream = stream
        self.number = number
        #: The last position to apply; None where the version follows its streams.
        self.end = end
        self.key = (stream.incarnation, number)
        self.place: Place = (stream.topic, number)
        self.label = f"{stream.namespace}/{stream.name}"
        self.state = State.NEW
        #: What the read store holds: the position, and how often events left those that are parked.
        self.applied = 0
        self.unparked = 0
        #: Not to be tried before (monotonic seconds).
        self.not_before = 0.0
        self.failures = 0
        #: In backfill: up to which position, and at which offset the topic goes on after it (None: Kafka didn't say).
        self.target = 0
        self.resume_at: int | None = None
        #: The topic's id, None where unknown; and the offset after the last record that was applied or needs nothing.
        self.topic_id: str | None = None
        self.offset: int | None = None
        self.committed: int | None = None
        #: When a record came, or the head was first seen beyond the applied position, whichever is later.
        self.moved_at = 0.0
        self.lagging = False
        #: What the read store knows of head and lag.
        self.seen: tuple[int, float] | None = None
        self.seen_at = 0.0

    def put_off(self) -> None:
        """Become new, after a pause that grows with the failures in a row."""
        self.failures += 1
        self.state = State.NEW
        self.not_before = wait_a_little(self.failures)


class Slice(msgspec.Struct):
    """Events of one partition that follow each other; `offset` is the topic's after them, None where unknown."""

    partition: Partition
    events: list[Event]
    offset: int | None
    source: str


class Projector:
    """One process of one version. `run` is the loop; `stop` ends it from another thread or a signal handler."""

    def __init__(self, settings: Settings) -> None:
        """Prepare; nothing is connected yet."""
        self._settings = settings
        self._brokers = settings.brokers()
        self._stopping = threading.Event()
        self._beat = time.monotonic()
        self._not_ready: str | None = "starting"
        self._rows = stores.rows(
            settings.readstore_dsn.get_secret_value(),
            namespace=settings.namespace,
            name=settings.name,
            version=settings.version,
        )
        self._history = History(settings.store_dsn.get_secret_value())
        self._partitions: dict[Place, Partition] = {}
        self._parked = Parked()
        self._parked_counts: dict[tuple[str, int], int] = {}
        self._committed_at = 0.0
        self._asked_at = 0.0
        self._kafka_not_before = 0.0
        self._throttle = Throttle()
        self._looked_at_live = 0.0
        self._rests_until = 0.0
        self._turn = 0

    def stop(self) -> None:
        """Let the loop finish its batch, leave the group and return."""
        self._stopping.set()

    def healthy(self) -> str | None:
        """Return what a restart would help against: a loop that hangs."""
        silent = time.monotonic() - self._beat
        return None if silent < _STUCK_SECONDS else f"the loop hasn't come round for {silent:.0f} s"

    def ready(self) -> str | None:
        """Return what is missing for the work; None where nothing is."""
        trouble = None if self._partitions else self._brokers.trouble()
        return self._not_ready or (trouble and trouble.message)

    def run(self) -> None:
        """Fold until stopped. Outages of PostgreSQL and Kafka are waited out."""
        definition = self._open()
        if definition is None:
            return
        fold = self._load(definition)
        if fold is None:
            return
        self._fold = fold
        self._streams = {stream.topic: stream for stream in definition.streams}
        self._ends = definition.ends
        self._heads = Heads(self._settings.store_dsn.get_secret_value(), definition.streams)
        self._heads.start()
        self._consumer = TopicConsumer(
            brokers=self._brokers,
            group=names.consumer_group(self._settings.namespace, self._settings.name, self._settings.version),
            topics=self._streams,
            session_seconds=self._settings.session_seconds,
            on_assigned=self._assigned,
            on_revoked=self._revoked,
        )
        try:
            while not self._stopping.is_set():
                self._beat = time.monotonic()
                self._step()
        finally:
            self._heads.stop()
            self._commit(wait=True)
            self._consumer.close()
            self._heads.join(timeout=5)
            self._rows.close()
            self._history.close()

    def _open(self) -> VersionDefinition | None:
        """Wait for the read store and return the definition; None where the process was stopped meanwhile."""
        failures = 0
        while not self._stopping.is_set():
            self._beat = time.monotonic()
            try:
                definition = self._rows.open()
            except (UnavailableError, NotFoundError) as error:
                failures += 1
                self._not_ready = str(error)
                log.warning("The read store isn't ready", error=str(error))
                self._stopping.wait(wait_a_little(failures) - time.monotonic())
                continue
            self._not_ready = None
            return definition
        return None

    def _load(self, definition: VersionDefinition) -> Fold | HandlerFold | None:
        """Return what folds; None where it can't run here, which was told, and the process was stopped."""
        names_ = {stream.incarnation: stream.name for stream in definition.streams}
        try:
            return folding(definition.definition, names_, installed=self._settings.installed or None)
        except HandlerError as error:
            reason = str(error)
        log.error("The handler can't run", reason=reason)
        # Another image is another process. Until then this one isn't ready, so that one that can run goes on.
        self._not_ready = reason
        failures, told = 0, False
        while not self._stopping.is_set():
            self._beat = time.monotonic()
            try:
                if not told:
                    for stream in definition.streams:
                        for number in range(stream.partitions):
                            self._rows.stop(stream.incarnation, number, reason)
                    told = True
            except UnavailableError as unavailable:
                failures += 1
                log.warning("The read store isn't ready", error=str(unavailable))
                self._stopping.wait(wait_a_little(failures) - time.monotonic())
                continue
            self._stopping.wait(_STOPPED_SECONDS)
        self._rows.close()
        return None

    def _step(self) -> None:
        now = time.monotonic()
        due = {one.state for one in self._partitions.values() if one.not_before <= now}
        wait = _IDLE_SECONDS
        if State.NEW in due:
            wait = 0.0
        elif State.BACKFILL in due:
            wait = min(wait, max(0.0, self._rests_until - now))
        messages = self._consumer.poll(self._settings.batch_events, wait)
        try:
            self._write(self._slices(messages))
            self._begin()
            self._look_at_asked()
            self._backfill()
            self._look_at_heads()
            self._not_ready = None
        except UnavailableError as error:
            metrics.FAILURES.labels("readstore").inc()
            self._not_ready = str(error)
            log.warning("The read store doesn't answer; reading all positions again", error=str(error))
            self._again(self._partitions.values())
        self._commit()

    # -- assignment -------------------------------------------------------------------------------------------------

    def _assigned(self, places: list[Place]) -> None:
        for topic, number in places:
            stream = self._streams[topic]
            if number >= stream.partitions:
                log.warning(
                    "The topic has a partition that its stream hasn't; it is left alone", topic=topic, partition=number
                )
                continue
            end = self._ends[stream.incarnation][number] if self._ends else None
            self._partitions[topic, number] = Partition(stream, number, end)
        log.info("Partitions assigned", partitions=[f"{topic}/{number}" for topic, number in places])
        self._watch()

    def _revoked(self, places: list[Place]) -> None:
        self._commit(only=places)
        for place in places:
            gone = self._partitions.pop(place, None)
            if gone is not None:
                self._forget(gone)
                for gauge in (metrics.LAG, metrics.LAG_SECONDS, metrics.STOPPED):
                    if gone.seen is not None or gauge is metrics.STOPPED:
                        _remove(gauge, gone)
        log.info("Partitions given up", partitions=[f"{topic}/{number}" for topic, number in places])
        self._watch()

    def _watch(self) -> None:
        self._heads.watch({one.key: one.applied for one in self._partitions.values() if one.state is not State.NEW})

    def _forget(self, partition: Partition) -> None:
        """Drop what is known of a partition's parked rows."""
        self._parked_counts.pop(partition.key, None)
        for known in (self._parked.rows, self._parked.subjects):
            known.difference_update([one for one in known if one[:2] == partition.key])

    def _again(self, partitions: Iterable[Partition]) -> None:
        """Make partitions new: nothing that is in memory of them counts any more."""
        gone = list(partitions)
        self._consumer.pause(one.place for one in gone)
        for one in gone:
            one.put_off()

    # -- new --------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Read the positions of the new partitions, and decide whether topic or event store comes first."""
        now = time.monotonic()
        fresh = [
            one
            for one in self._partitions.values()
            if one.state in (State.NEW, State.STOPPED) and one.not_before <= now
        ]
        if not fresh:
            return
        found = self._rows.positions(one.key for one in fresh)
        parked, counts = self._rows.parked(one.key for one in fresh)
        offsets = {} if self._ends else self._ask_kafka(fresh)
        for one in fresh:
            position = found.get(one.key)
            if position is None:
                log.error("The version doesn't know this partition", stream=one.label, partition=one.number)
                one.put_off()
                continue
            if position.stopped is not None and position.stopped.startswith(FIELD):
                self._rows.stop(*one.key, None)  # the handler couldn't run, and does now
            self._forget(one)
            one.applied, one.unparked = position.position, position.unparked
            one.seen = None
            one.target = 0
            one.moved_at, one.lagging = now, False
            one.resume_at = one.topic_id = one.offset = None
            if one.end is not None:
                one.target, one.state = one.end, State.BACKFILL
                continue
            held = offsets.get(one.place)
            if held is not None:
                one.topic_id = held.topic_id
                one.resume_at = held.high
            if (
                held is not None
                and position.topic_id == held.topic_id
                and position.kafka_offset is not None
                and held.low <= position.kafka_offset <= held.high
            ):
                if self._consumer.start(one.place, position.kafka_offset):
                    one.offset = position.kafka_offset
                    one.state = State.TAIL
                else:
                    one.state, one.not_before = State.NEW, now + 0.05
                continue
            one.state = State.BACKFILL
        self._parked.rows |= parked.rows
        self._parked.subjects |= parked.subjects
        self._parked_counts.update(counts)
        self._watch()

    def _ask_kafka(self, partitions: Sequence[Partition]) -> dict[Place, Offsets]:
        if time.monotonic() < self._kafka_not_before:
            return {}
        try:
            return self._consumer.offsets([one.place for one in partitions])
        except KafkaUnavailableError as error:
            self._kafka_not_before = time.monotonic() + _KAFKA_PAUSE_SECONDS
            metrics.FAILURES.labels("kafka").inc()
            log.warning("Kafka doesn't answer; the event store is read meanwhile", error=str(error))
            return {}

    # -- tail -------------------------------------------------------------------------------------------------------

    def _slices(self, messages: Iterable[Message]) -> list[Slice]:
        """Return the events that come next in their partitions, by the rule for records."""
        slices: dict[Place, Slice] = {}
        now = time.monotonic()
        for message in messages:
            place = cast("Place", (message.topic(), message.partition()))
            one = self._partitions.get(place)
            if one is None or one.state is not State.TAIL:
                continue
            offset = cast("int", message.offset())
            if message.error() is not None:  # the end of the partition: past transaction markers
                self._reached(one, slices.get(place), offset)
                continue
            one.moved_at = now
            headers = cast("list[tuple[str, bytes]]", message.headers() or [])
            event = from_record(one.number, message.value() or b"", headers, incarnation=one.stream.incarnation)
            taken = slices.get(place)
            next_position = (taken.events[-1].position if taken else one.applied) + 1
            if event is None:
                metrics.IGNORED.labels(one.label).inc()
            elif event.position < next_position:
                metrics.SKIPPED.labels(one.label).inc()
            elif event.position > next_position:
                metrics.GAPS.labels(one.label, "gap").inc()
                log.info(
                    "The topic lacks events; reading the event store",
                    stream=one.label, partition=one.number, first=next_position, last=event.position - 1,
                )  # fmt: skip
                self._consumer.pause([one.place])
                one.state, one.target, one.resume_at = State.BACKFILL, event.position - 1, offset
                continue
            else:
                if taken is None:
                    taken = slices[place] = Slice(one, [], None, "topic")
                taken.events.append(event)
            self._reached(one, taken, offset + 1)
        return list(slices.values())

    @staticmethod
    def _reached(one: Partition, taken: Slice | None, offset: int) -> None:
        """Note that nothing before `offset` is needed, once the events before it are applied."""
        if taken is None:
            one.offset = offset
        else:
            taken.offset = offset

    # -- backfill ---------------------------------------------------------------------------------------------------

    def _backfill(self) -> None:
        """Read and write a page for one of the partitions in backfill; they take turns, and all rest after a turn."""
        now = time.monotonic()
        due = [one for one in self._partitions.values() if one.state is State.BACKFILL and one.not_before <= now]
        if not due or now < self._rests_until:
            if self._throttle.share < 1 and all(one.state is State.TAIL for one in self._partitions.values()):
                self._throttle.look(None)
                metrics.BACKFILL_SHARE.set(1)
            return
        if now - self._looked_at_live >= LOOK_SECONDS:
            self._looked_at_live = now
            self._throttle.look(self._rows.live())
            metrics.BACKFILL_SHARE.set(self._throttle.share)
        self._fill(due)
        self._rests_until = time.monotonic() + self._throttle.rest(time.monotonic() - now)

    def _fill(self, due: Sequence[Partition]) -> None:
        """Read and write a page for one of `due`."""
        self._turn += 1
        one, following = due[self._turn % len(due)], due[(self._turn + 1) % len(due)]
        limit = self._throttle.page(self._settings.batch_events)
        try:
            if one.target <= one.applied and not self._aim(one):
                return
            page = self._history.page(_page(one, one.applied, limit))
        except HistoryUnavailableError as error:
            metrics.FAILURES.labels("eventstore").inc()
            log.warning("The event store doesn't answer", error=str(error))
            one.failures += 1
            one.not_before = wait_a_little(one.failures)
            return
        if not page or page[0].position != one.applied + 1:
            self._stand(
                one,
                f"the event store lacks position {one.applied + 1} up to {one.target} of partition {one.number} of "
                f"{one.label}; was it restored from a backup?",
            )
            return
        after = page[-1].position if following is one else following.applied
        if after < following.target:
            self._history.ask(_page(following, after, limit))  # while this one is written
        one.failures = 0
        one.offset = None
        self._write([Slice(one, page, None, "store")])

    def _aim(self, one: Partition) -> bool:
        """Set the next target of a backfill and return True, or where the head is reached, go on with the topic.

        Raises:
            HistoryUnavailableError: the heads can't be read.
        """
        if one.end is not None:
            one.state = State.DONE
            return False
        # What comes in the topic after an end that was noted can't be older than a head that is read after it.
        # A little that was appended meanwhile comes from the topic; for much, a new end is noted and read up to.
        head = self._history.heads([one.stream.incarnation]).get(one.key, 0)
        first = one.target == 0
        if one.resume_at is None or (not first and head - one.applied >= self._settings.batch_events):
            held = self._ask_kafka([one]).get(one.place)
            one.topic_id, one.resume_at = (None, None) if held is None else (held.topic_id, held.high)
            head = self._history.heads([one.stream.incarnation]).get(one.key, 0)
            first = True
        if head > one.applied and (first or one.resume_at is None):
            one.target = head
            return True
        if one.resume_at is None:
            one.put_off()
            return False
        return self._tail(one)

    def _tail(self, one: Partition) -> bool:
        """Go on with the topic where the backfill left off; return False: there is nothing to read in the store."""
        assert one.resume_at is not None
        if self._consumer.start(one.place, one.resume_at):
            one.state, one.offset = State.TAIL, one.resume_at
            one.failures = 0
            one.moved_at, one.lagging = time.monotonic(), False
        else:
            one.not_before = time.monotonic() + 0.05
        return False

    # -- writing ----------------------------------------------------------------------------------------------------

    def _write(self, slices: Sequence[Slice]) -> None:
        """Fold and write slices in one transaction; in several where an event is refused, or for the store's bound.

        Raises:
            UnavailableError: the read store failed; nothing is known of the batch.
        """
        # a slice may have lost its place: its partition stopped or moved on while an earlier half was written
        slices = [
            one
            for one in slices
            if one.partition.state in (State.TAIL, State.BACKFILL)
            and one.events
            and one.events[0].position == one.partition.applied + 1
        ]
        if not slices:
            return
        began = time.monotonic()
        self._beat = began
        batch, slices, rest = self._folded(slices)
        if _too_large(batch, slices, self._rows.most_rows):
            for part in (*_halves(slices), rest):
                self._write(part)
            return
        over = parking.stops(batch.parked, self._parked_counts, self._settings.parked_limit)
        if over:
            self._write(_before(slices, over))
            for one in slices:
                if one.partition.key in over:
                    self._too_many(one.partition, over[one.partition.key])
            self._write(rest)
            return
        try:
            self._apply(slices, batch.changes.values(), batch.parked)
        except RefusedError as error:
            if sum(len(one.events) for one in slices) == 1:
                self._park(slices[0], list(batch.changes), batch.parked, str(error))
            else:
                for part in _halves(slices):
                    self._write(part)
        else:
            metrics.BATCH_SECONDS.observe(time.monotonic() - began)
        self._write(rest)

    def _folded(self, slices: Sequence[Slice]) -> tuple[Batch | HandlerBatch, Sequence[Slice], Sequence[Slice]]:
        """Return a batch of the first events, as many as the store writes at once, their slices, and the rest."""
        reads, most = self._fold.reads, self._rows.most_rows
        rest: Sequence[Slice] = []
        if most is not None:  # so many events can't change more rows, but where one has several keys
            slices, rest = _parted(slices, most)
        before = self._rows.read({event.subject for one in slices for event in one.events}, reads) if reads else None
        batch: Batch | HandlerBatch = self._fold.batch(self._parked, before)
        for one in slices:
            batch.fold(one.partition.stream.incarnation, one.events)
        while rest and most is not None and not reads and (room := most - len(batch.changes)) > most // 10:
            more, rest = _parted(rest, room)
            for one in more:
                batch.fold(one.partition.stream.incarnation, one.events)
            slices = _joined([*slices, *more])
        return batch, slices, rest

    def _apply(self, slices: Sequence[Slice], changes: Iterable[Any], parked: Sequence[ParkedEvent]) -> None:
        advances = [
            Advance(
                incarnation=one.partition.stream.incarnation,
                partition=one.partition.number,
                before=one.partition.applied,
                after=one.events[-1].position,
                recorded_at=one.events[-1].time,
                topic_id=None if one.offset is None else one.partition.topic_id,
                kafka_offset=one.offset,
                unparked=one.partition.unparked,
            )
            for one in slices
        ]
        try:
            self._rows.apply(changes, parked, advances)
        except MovedError as error:
            metrics.MOVED.inc()
            log.warning("Another projector has moved a partition on; the batch is dropped", error=str(error))
            self._again([one.partition for one in slices])
            return
        for one in slices:
            partition = one.partition
            partition.applied = one.events[-1].position
            partition.offset = one.offset
            partition.failures = 0
            partition.lagging = False
            metrics.FOLDED.labels(partition.label, one.source).inc(len(one.events))
        metrics.BATCH_EVENTS.observe(sum(len(one.events) for one in slices))
        for event in parked:
            self._note_parked(event)
        self._watch()

    # -- parking ----------------------------------------------------------------------------------------------------

    def _park(self, only: Slice, keys: Sequence[str], parked_before: Sequence[ParkedEvent], error: str) -> None:
        """Park the single event that the read store refused, in all its rows."""
        event = only.events[0]
        incarnation = only.partition.stream.incarnation
        wanted: Sequence[str | None] = keys or [None]
        parked = [*parked_before, *(ParkedEvent(incarnation, event, key, error) for key in wanted)]
        over = parking.stops(parked, self._parked_counts, self._settings.parked_limit)
        if over:
            self._too_many(only.partition, parked[0])
            return
        self._apply([only], [], parked)

    def _look_at_asked(self) -> None:
        """Do what is asked of parked events.

        Raises:
            UnavailableError: the read store failed; nothing is known of what was under way.
        """
        now = time.monotonic()
        mine = {
            one.key: one
            for one in self._partitions.values()
            if one.state is not State.NEW and self._parked_counts.get(one.key)
        }
        if not mine or now - self._asked_at < _ASKED_SECONDS:
            return
        self._asked_at = now
        live, rows = self._rows.asked(mine)
        for row in rows:
            one = mine[row.incarnation, row.partition]
            if one.state is State.NEW:  # another row of it has shown that it was moved on
                continue
            self._beat = time.monotonic()
            stale = [entry for entry in row.entries if entry.asked is not None and entry.asked.live and not live]
            if stale:
                self._rows.refuse(stale, None)
                continue
            try:
                self._unpark(one, row)
            except MovedError as error:
                metrics.MOVED.inc()
                log.warning("Parked events aren't as they were; reading them again", error=str(error))
                self._again([one])
            except HistoryUnavailableError as error:
                metrics.FAILURES.labels("eventstore").inc()
                log.warning("Parked events can't be read in the event store", error=str(error))

    def _unpark(self, partition: Partition, row: ParkedRow) -> None:
        """Discard what is to be discarded, and fold the row's other events again, up to the first that fails.

        Raises:
            MovedError: another projector has written in the meantime; nothing is known of the partition any more.
            HistoryUnavailableError: the events can't be read. What is done by then stands.
        """
        asked = {entry.id: entry.asked for entry in row.entries if entry.asked is not None}
        live = any(one.live for one in asked.values())
        discarded = {id_: one.by for id_, one in asked.items() if one.verb == "discard"}
        left = [entry for entry in row.entries if entry.id not in discarded]
        most, error = _AGAIN_EVENTS, None
        while error is None and (left or discarded):
            some = left[:most]
            events = self._history.events(partition.stream, partition.number, [entry.position for entry in some])
            reads = self._fold.reads
            before = self._rows.read({event.subject for event in events}, reads) if reads else {}
            again = fold_again(self._fold, row, some, events, self._parked, before)
            settled = Settled(*partition.key, [entry.id for entry in again.folded], discarded, live)
            try:
                self._settle(partition, row, again.changes, again.parked, settled, asked)
            except RefusedError as refused:
                if len(some) > 1:
                    most = len(some) // 2
                    continue
                error = str(refused)
                self._settle(partition, row, [], [], Settled(*partition.key, [], discarded, live), asked)
            else:
                error = again.error
                left = left[len(again.folded) :]
            discarded = {}
        if left:
            self._rows.refuse(left, error)
        self._forget(partition)
        parked, counts = self._rows.parked([partition.key])
        self._parked.rows |= parked.rows
        self._parked.subjects |= parked.subjects
        self._parked_counts.update(counts)
        if partition.state is State.STOPPED:
            partition.not_before = 0.0  # there is room now

    def _settle(
        self,
        partition: Partition,
        row: ParkedRow,
        changes: Sequence[Any],
        parked: Sequence[ParkedEvent],
        settled: Settled,
        asked: dict[int, Asked],
    ) -> None:
        """Let parked events leave, with what they do to rows; nothing where none does."""
        if not settled.folded and not settled.discarded:
            return
        at = partition.applied
        advance = Advance(
            *partition.key, at, at, None, None if partition.offset is None else partition.topic_id, partition.offset,
            partition.unparked,
        )  # fmt: skip
        self._rows.apply(changes, parked, [advance], settled)
        partition.unparked += 1
        positions = {entry.id: entry.position for entry in row.entries}
        for outcome, ids in (("folded", settled.folded), ("discarded", settled.discarded)):
            metrics.UNPARKED.labels(partition.label, outcome).inc(len(ids))
            for id_ in ids:
                by = asked.get(id_)
                log.warning(
                    "A parked event is folded" if outcome == "folded" else "A parked event is discarded",
                    stream=partition.label, partition=partition.number, position=positions[id_], id=id_, key=row.key,
                    subject=row.subject, by=by and by.by,
                )  # fmt: skip
        for one in parked:
            self._note_parked(one)

    def _note_parked(self, one: ParkedEvent) -> None:
        self._asked_at = 0.0  # it may be one that was discarded in another version
        key = (one.incarnation, one.event.partition)
        self._parked_counts[key] = self._parked_counts.get(key, 0) + 1
        if one.key is None:
            self._parked.subjects.add((*key, one.event.subject))
        else:
            self._parked.rows.add((*key, one.key))
        stream = next(stream for stream in self._streams.values() if stream.incarnation == one.incarnation)
        metrics.PARKED.labels(f"{stream.namespace}/{stream.name}").inc()
        log.warning(
            "An event is parked",
            stream=f"{stream.namespace}/{stream.name}", partition=one.event.partition, position=one.event.position,
            key=one.key, subject=one.event.subject, error=one.error,
        )  # fmt: skip

    def _too_many(self, partition: Partition, one: ParkedEvent) -> None:
        self._stand(
            partition,
            f"more than {self._settings.parked_limit} events of partition {partition.number} of {partition.label} are "
            f"parked; it stands before position {one.event.position}: {one.error}",
        )

    def _stand(self, partition: Partition, reason: str) -> None:
        """Stop a partition, visibly, and try again later."""
        log.error("A partition stands still", stream=partition.label, partition=partition.number, reason=reason)
        self._consumer.pause([partition.place])
        partition.state = State.STOPPED
        partition.not_before = time.monotonic() + _STOPPED_SECONDS * random.uniform(0.8, 1.2)  # noqa: S311 (jitter)
        metrics.STOPPED.labels(partition.label, partition.number).set(1)
        self._rows.stop(*partition.key, reason)

    # -- heads and offsets ------------------------------------------------------------------------------------------

    def _look_at_heads(self) -> None:
        """Store heads and lags, changed ones at once; where the topic doesn't deliver, turn to the event store."""
        latest = self._heads.take()
        if latest is None:
            return
        now = time.monotonic()
        changed: list[Seen] = []
        for one in self._partitions.values():
            seen = latest.get(one.key)
            if seen is None or one.state is State.NEW:
                continue
            head = seen.head if one.end is None else min(seen.head, one.end)
            lag = seen.lag_seconds if head > one.applied else 0.0
            metrics.LAG.labels(one.label, one.number).set(max(0, head - one.applied))
            metrics.LAG_SECONDS.labels(one.label, one.number).set(lag)
            if one.state is not State.STOPPED:
                metrics.STOPPED.labels(one.label, one.number).set(0)
            if one.seen != (head, lag) or now - one.seen_at > _SEEN_SECONDS:
                one.seen, one.seen_at = (head, lag), now
                changed.append(Seen(*one.key, head, lag))
            if head <= one.applied:
                one.lagging = False
            elif not one.lagging:
                one.lagging = True
                one.moved_at = now
            elif one.state is State.TAIL and now - one.moved_at > _STALL_SECONDS:
                self._stalled(one, head)
        if changed:
            self._rows.see(changed)

    def _stalled(self, one: Partition, head: int) -> None:
        metrics.GAPS.labels(one.label, "silence").inc()
        log.info(
            "The topic doesn't deliver what the event store has; reading the event store",
            stream=one.label, partition=one.number, applied=one.applied, head=head,
        )  # fmt: skip
        held = self._ask_kafka([one]).get(one.place)
        self._consumer.pause([one.place])
        one.topic_id, one.resume_at = (None, None) if held is None else (held.topic_id, held.high)
        one.state, one.target = State.BACKFILL, head

    def _commit(self, *, only: Iterable[Place] | None = None, wait: bool = False) -> None:
        now = time.monotonic()
        if only is None and not wait and now - self._committed_at < _COMMIT_SECONDS:
            return
        self._committed_at = now
        due: dict[Place, int] = {}
        for place in self._partitions if only is None else only:
            one = self._partitions.get(place)
            if one is not None and one.offset is not None and one.offset != one.committed:
                due[place] = one.committed = one.offset
        self._consumer.commit(due, wait=wait)


def _page(one: Partition, after: int, limit: int) -> Page:
    """Return the page after a position, which ends at the partition's end if it has one."""
    if one.end is not None:
        limit = min(limit, one.end - after)
    return Page(one.stream, one.number, after, limit)


def _remove(gauge: Any, partition: Partition) -> None:
    try:
        gauge.remove(partition.label, str(partition.number))
    except KeyError:
        return


def _too_large(batch: Batch | HandlerBatch, slices: Sequence[Slice], most_rows: int | None) -> bool:
    """Return whether a batch has more rows than the store writes at once, and more events than one."""
    return most_rows is not None and len(batch.changes) > most_rows and sum(len(one.events) for one in slices) > 1


def _joined(slices: Sequence[Slice]) -> list[Slice]:
    """Return slices with what follows each other in a partition made one."""
    found: dict[Place, Slice] = {}
    for one in slices:
        known = found.get(one.partition.place)
        if known is None:
            found[one.partition.place] = one
        else:
            found[one.partition.place] = Slice(one.partition, known.events + one.events, one.offset, one.source)
    return list(found.values())


def _halves(slices: Sequence[Slice]) -> tuple[list[Slice], list[Slice]]:
    """Return slices of two or more events as two parts of about the same number of events, in order."""
    return _parted(slices, sum(len(one.events) for one in slices) // 2)


def _parted(slices: Sequence[Slice], left: int) -> tuple[list[Slice], list[Slice]]:
    """Return slices as two parts, in order, the first of which has `left` events (or all, where there are no more)."""
    first: list[Slice] = []
    second: list[Slice] = []
    for one in slices:
        if left >= len(one.events):
            first.append(one)
        elif left > 0:
            first.append(Slice(one.partition, one.events[:left], None, one.source))
            second.append(Slice(one.partition, one.events[left:], one.offset, one.source))
        else:
            second.append(one)
        left = max(0, left - len(one.events))
    return first, second


def _before(slices: Sequence[Slice], over: dict[tuple[str, int], ParkedEvent]) -> list[Slice]:
    """Return slices that end before the event that is one too many in their partition."""
    result = []
    for one in slices:
        if one.partition.key in over:
            end = over[one.partition.key].event.position
            events = [event for event in one.events if event.position < end]
            result.append(Slice(one.partition, events, None, one.source))
        else:
            result.append(one)
    return result
