"""Appends as the arguments of the database's functions; see migrations/stream for what they are.

`append_group` (0002_append.sql) takes a group and gives each append its own outcome, `append_all` (0003_append_all.sql)
appends all or none, and `append_one` (0004_append_one.sql) takes a group of one append of one event.
"""

from collections.abc import Sequence
from typing import Literal

from psycopg import sql

from refold.eventstore import arrays
from refold.eventstore.appends import Append


def query(schema: str, function: Literal["append_group", "append_all", "append_one"], types_revision: int) -> bytes:
    """Return the query that appends to the stream of `schema` with `function`.

    `types_revision` is that of the event types that the group was checked with; the database refuses it (RF006) where
    the stream has another.

    A group may be sent behind another before that has ended (`marks`): a session's setting, which is set back where a
    transaction fails, tells whether the other was applied. If it wasn't, no stream is named, which is refused (RF001).
    """
    one = function == "append_one"
    parameters = [f"${n}" for n in range(1, 9 if one else 19)]
    conditions = []
    if types_revision:  # said in the same statement, for its transaction alone
        conditions.append(f"set_config('refold.event_types', '{types_revision:d}', true) is not null")
    if function == "append_group":
        conditions.append("($19::text = '' or current_setting('refold.group', true) = $19)")
        conditions.append("set_config('refold.group', $20::text, false) is not null")
    if conditions:
        parameters[0] = f"case when {' and '.join(conditions)} then $1::integer end"
    call = sql.SQL("{}({})").format(sql.Identifier(schema, function), sql.SQL(", ").join(map(sql.SQL, parameters)))
    query = sql.SQL("select {}" if one else "select outcomes, revisions, positions from {}").format(call)
    return query.as_string().encode()


def arguments_of_one(stream: int, part: Append) -> list[bytes | None]:
    """Return the parameters of `append_one`, in the binary format, for `part`, which has one event."""
    return [
        stream.to_bytes(4, "big"),
        part.partition.to_bytes(4, "big"),
        arrays.value(part.subject_element),
        part.expected.to_bytes(8, "big", signed=True),
        arrays.value(part.ids[0]),
        arrays.value(part.types[0]),
        arrays.value(part.data[0]),
        arrays.value(part.metadata[0]),
    ]


def arguments(stream: int, parts: Sequence[Append], *, careful: bool) -> list[bytes]:
    """Return the parameters of `append_group` and `append_all`, in the binary format, for `parts` in their order."""
    after = 0
    numbers: list[int] = []
    afters: list[int] = []
    partition_after: dict[int, int] = {}
    partition_afters: list[int] = []
    subject_before: dict[bytes, int] = {}
    subject_befores: list[int] = []
    keys: dict[bytes, int] = {}
    again: list[bool] = []
    ids: dict[bytes, set[bytes]] = {}
    for number, part in enumerate(parts, 1):
        count = len(part.ids)
        after += count
        afters.append(after)
        numbers += [number] * count
        partition_after[part.partition] = partition_after.get(part.partition, 0) + count
        partition_afters.append(partition_after[part.partition])
        subject = part.subject_element
        before = subject_before.get(subject, 0)
        subject_befores.append(before)
        subject_before[subject] = before + count
        keys.setdefault(subject, number)
        known = ids.get(subject)
        if known is None:
            ids[subject] = set(part.ids)
            again.append(False)
        else:
            again.append(not known.isdisjoint(part.ids))
            known.update(part.ids)
    return [
        stream.to_bytes(4, "big"),
        arrays.int4_array(sorted(partition_after)),
        careful.to_bytes(1, "big"),
        arrays.text_array([part.subject_element for part in parts]),
        arrays.int4_array([part.partition for part in parts]),
        arrays.int8_array([part.expected for part in parts]),
        arrays.int4_array([len(part.ids) for part in parts]),
        arrays.int4_array(afters),
        arrays.int4_array(partition_afters),
        arrays.int4_array(subject_befores),
        arrays.int4_array([keys[part.subject_element] for part in parts]),
        arrays.bool_array(again),
        arrays.int4_array(numbers),
        arrays.text_array([part.subject_element for part in parts for _ in part.ids]),
        arrays.text_array([element for part in parts for element in part.ids]),
        arrays.text_array([element for part in parts for element in part.types]),
        arrays.jsonb_array([element for part in parts for element in part.data]),
        arrays.jsonb_array([element for part in parts for element in part.metadata]),
    ]


def marks(mark: bytes, *, behind: bytes) -> list[bytes]:
    """Return the further parameters of `append_group`: the group's own mark, and that of the one that it stands behind.

    The latter is empty where it stands behind none.
    """
    return [behind, mark]
