"""The compiled fold: what a batch does to a row, which values are bad events, and what is parked."""

import datetime as dt
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from refold.events import Event
from refold.projection.definition import parse
from refold.projection.fold import Batch, Fold, Parked, RowChange, Stamp, compile_fold

INCARNATION = "00ff" * 4
TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
COLUMNS = [
    {"name": name, "type": name.rstrip("_2")}
    for name in ("text", "text_2", "integer", "numeric", "boolean", "timestamp", "json")
]


def fold(*rules: dict[str, Any], **fields: Any) -> Fold:
    return compile_fold(parse({"streams": ["orders"], "columns": COLUMNS, "fold": list(rules), **fields}))


def event(
    type_: str, data: str = "{}", *, subject: str = "a", position: int = 1, metadata: str | None = None, **fields: Any
) -> Event:
    return Event(
        **{
            "partition": 0,
            "position": position,
            "subject": subject,
            "revision": position,
            "id": str(position),
            "type": type_,
            "time": TIME + dt.timedelta(seconds=position),
            "data": msgspec.Raw(data.encode()),
            "metadata": None if metadata is None else msgspec.Raw(metadata.encode()),
            **fields,
        }
    )


def folded(
    compiled: Fold, *events: Event, parked: Parked | None = None, before: dict[str, dict[str, Any]] | None = None
) -> Batch:
    batch = compiled.batch(parked, before)
    batch.fold(INCARNATION, events)
    return batch


def errors(batch: Batch) -> list[tuple[int, str | None, str]]:
    return [(one.event.position, one.key, one.error) for one in batch.parked]


OPERATIONS = fold(
    {"type": "Set", "set": {"integer": "data.n"}},
    {"type": "Add", "add": {"integer": "data.n"}},
    {"type": "Min", "min": {"numeric": "data.n"}},
    {"type": "Max", "max": {"text_2": "string(data.n)"}},
    {"type": "SetNumeric", "set": {"numeric": "data.n"}},
    {"type": "Delete", "delete": True},
    {"type": "Touch", "set": {"text": "'x'"}},
    {"type": "Nothing", "set": {"text": "'x'"}, "when": "false"},
)


@pytest.mark.parametrize(
    ("sequence", "change"),
    [
        ("Set 1", RowChange("a", set={"integer": 1})),
        ("Add 1", RowChange("a", merge={"integer": 1})),
        ("Add 1, Add 2", RowChange("a", merge={"integer": 3})),
        ("Add 1, Set 5", RowChange("a", set={"integer": 5})),
        ("Set 5, Add 1", RowChange("a", set={"integer": 6})),
        ("Set null, Add 1", RowChange("a", set={"integer": 1})),
        ("Set 5, Set null", RowChange("a", set={"integer": None})),
        ("Add 1, Touch", RowChange("a", set={"text": "x"}, merge={"integer": 1})),
        ("Delete", RowChange("a", deleted_first=True, exists_after=False)),
        ("Add 1, Set 2, Delete", RowChange("a", deleted_first=True, exists_after=False)),
        ("Delete, Add 1", RowChange("a", deleted_first=True, set={"integer": 1})),
        ("Add 9, Delete, Add 1, Add 2", RowChange("a", deleted_first=True, set={"integer": 3})),
        ("Add 1, Set 7, Delete, Add 4", RowChange("a", deleted_first=True, set={"integer": 4})),
        ("Delete, Touch, Delete", RowChange("a", deleted_first=True, exists_after=False)),
        ("Delete, Set 3, Delete, Touch", RowChange("a", deleted_first=True, set={"text": "x"})),
        ("Min 3", RowChange("a", merge={"numeric": 3})),
        ("Min 3, Min 2, Min 4", RowChange("a", merge={"numeric": 2})),
        ("Min 3, SetNumeric 5", RowChange("a", set={"numeric": 5})),
        ("SetNumeric 5, Min 3, Min 4", RowChange("a", set={"numeric": 3})),
        ("SetNumeric null, Min 3", RowChange("a", set={"numeric": 3})),
        ("Max 3, Max 20, Max 5", RowChange("a", merge={"text_2": "5"})),
        ("Min 1, Max 1, Add 1", RowChange("a", merge={"numeric": 1, "text_2": "1", "integer": 1})),
        ("Min 1, Delete, Min 3, Min 2", RowChange("a", deleted_first=True, set={"numeric": 2})),
        ("Add 0", RowChange("a", merge={"integer": 0})),
    ],
)
def test_a_batch_becomes_one_change_of_its_row(sequence: str, change: RowChange) -> None:
    events = []
    for position, step in enumerate(sequence.split(", "), 1):
        type_, _, number = step.partition(" ")
        events.append(event(type_, f'{{"n": {number or 0}}}', position=position))
    batch = folded(OPERATIONS, *events)
    assert batch.changes == {"a": change}
    assert batch.parked == []


def test_events_without_rule_and_rules_whose_condition_is_false_make_no_row() -> None:
    batch = folded(OPERATIONS, event("Unknown"), event("Nothing", position=2))
    assert batch.changes == {}
    assert batch.parked == []


def test_several_rules_of_a_type_apply_in_order() -> None:
    compiled = fold(
        {"type": "E", "set": {"integer": "1", "text": "'first'"}},
        {"type": "E", "add": {"integer": "10"}},
        {"type": "E", "delete": True, "when": "data.gone"},
        {"type": "E", "set": {"text": "'last'"}},
    )
    kept = folded(compiled, event("E", '{"gone": false}')).changes["a"]
    assert (kept.deleted_first, kept.set) == (False, {"integer": 11, "text": "last"})
    anew = folded(compiled, event("E", '{"gone": true}')).changes["a"]
    assert (anew.deleted_first, anew.set) == (True, {"text": "last"})


def test_conditions_absorb_errors_as_cel_says_and_the_event_still_applies() -> None:
    compiled = fold({"type": "E", "add": {"integer": "data.n"}, "when": "data.kind == 'a' || data.n > 1"})
    batch = folded(compiled, event("E", '{"n": 2}'), event("E", '{"n": 3}', position=2))
    assert batch.changes["a"].merge == {"integer": 5}
    assert batch.parked == []


@pytest.mark.parametrize(
    ("column", "expression", "value"),
    [
        ("text", "data.s", "ü"),
        ("text", "null", None),
        ("text", "string(data.n)", "2.5"),
        ("integer", "data.i", 9223372036854775807),
        ("integer", "-data.i - 1", -9223372036854775808),
        ("integer", "3.0", 3),
        ("numeric", "data.n", Decimal("2.50")),
        ("numeric", "data.i * data.i", 9223372036854775807**2),
        ("numeric", "1 / 3", Decimal("0." + "3" * 34)),
        ("boolean", "data.n > 2", True),
        ("timestamp", "data.t", dt.datetime(2026, 1, 31, 22, 59, 59, 123456, tzinfo=dt.UTC)),
        ("timestamp", "event.time", TIME + dt.timedelta(seconds=1)),
        ("timestamp", "timestamp(0)", dt.datetime(1970, 1, 1, tzinfo=dt.UTC)),
        ("json", "data.l", '[1,2.50,{"a":null}]'),
        ("json", "[event.time, duration('90s'), data.n]", '["2026-01-01T00:00:01Z","90s",2.50]'),
        ("json", "'text'", '"text"'),
        ("json", r"'back\\u0000slash'", r'"back\\u0000slash"'),
        ("json", "null", None),
        ("json", "event.metadata.user", '"ada"'),
    ],
)
def test_a_value_arrives_in_its_columns_type(column: str, expression: str, value: object) -> None:
    data = (
        '{"s": "ü", "n": 2.50, "i": 9223372036854775807, "t": "2026-01-31T23:59:59.1234567+01:00",'
        ' "l": [1, 2.50, {"a": null}]}'
    )
    batch = folded(fold({"type": "E", "set": {column: expression}}), event("E", data, metadata='{"user": "ada"}'))
    assert batch.parked == []
    found = batch.changes["a"].set[column]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("operation", "column", "expression", "message"),
    [
        ("set", "text", "data.n", "fold[0].set.text: a text column takes a string, not number 2.5: use string()"),
        ("set", "text", "data.nul", "NUL"),
        ("set", "integer", "data.n", "number 2.5 is not a whole number"),
        ("set", "integer", "data.big", "beyond an integer column's 64 bits"),
        ("set", "integer", "data.huge", "is not a whole number"),
        ("set", "integer", "data.s", "an integer column takes a number, not string 'x'"),
        ("set", "integer", "data.b", "takes a number, not bool"),
        ("set", "numeric", "data.huge", "more digits than a numeric column keeps"),
        ("set", "numeric", "data.tiny", "more digits than a numeric column keeps"),
        ("set", "numeric", "data.b", "takes a number, not bool"),
        ("set", "boolean", "data.n", "takes true or false, not number"),
        ("set", "timestamp", "data.s", "is not a time like"),
        ("set", "timestamp", "data.n", "takes a timestamp or its text, not number"),
        ("set", "json", "[data.nul]", "NUL"),
        ("set", "text", "data.absent", "fold[0].set.text: data has no field 'absent' (line 1, column 6)"),
        ("add", "integer", "data.nothing", "null can't be added"),
        ("add", "numeric", "data.nothing", "null can't be added"),
        ("add", "numeric", "data.s", "takes a number, not string"),
        ("add", "integer", "data.n", "is not a whole number"),
        ("min", "integer", "data.nothing", "fold[0].min.integer: null is neither less nor greater: guard it"),
        ("max", "text", "data.nothing", "null is neither less nor greater"),
        ("max", "timestamp", "data.nothing", "null is neither less nor greater"),
        ("max", "timestamp", "data.s", "is not a time like"),
        ("min", "numeric", "data.huge", "more digits than a numeric column keeps"),
    ],
)
def test_a_value_that_its_column_cannot_take_is_a_bad_event(
    operation: str, column: str, expression: str, message: str
) -> None:
    data = r'{"n": 2.5, "s": "x", "b": true, "nul": "a\u0000b", "huge": 1e400, "tiny": 1e-400, "nothing": null,'
    data += '"big": 9223372036854775808}'
    batch = folded(fold({"type": "E", operation: {column: expression}}), event("E", data))
    assert batch.changes == {}
    ((position, key, error),) = errors(batch)
    assert (position, key) == (1, "a")
    assert message in error


def test_sums_are_exact() -> None:
    compiled = fold({"type": "E", "add": {"numeric": "data.n"}})
    numbers = ["0.1", "0.2", "1e-150", "12345678901234567890123456789012345678901234567890", "0.3", "1"]
    batch = folded(compiled, *(event("E", f'{{"n": {n}}}', position=i) for i, n in enumerate(numbers, 1)))
    assert batch.changes["a"].merge["numeric"] == Decimal(
        "12345678901234567890123456789012345678901234567891.6" + "0" * 148 + "1"
    )


def test_of_equal_numbers_the_least_has_one_form_whichever_came_first() -> None:
    compiled = fold({"type": "E", "min": {"numeric": "data.n"}}, key="'row'")
    for first, second in [("2", "2.0"), ("2.0", "2"), ("2.00", "2.0")]:
        batch = folded(compiled, event("E", f'{{"n": {first}}}'), event("E", f'{{"n": {second}}}', position=2))
        assert str(batch.changes["row"].merge["numeric"]) == "2"


def test_a_bad_event_has_no_effect_at_all_and_parks_its_row_in_its_partition() -> None:
    compiled = fold({"type": "E", "set": {"text": "data.t"}, "add": {"integer": "data.n"}})
    batch = folded(
        compiled,
        event("E", '{"t": "1", "n": 1}', position=1),
        event("E", '{"t": "2"}', position=2),
        event("E", '{"t": "3", "n": 3}', position=3),
        event("E", '{"t": "4", "n": 4}', position=4, subject="b"),
        event("E", '{"n": 5}', position=5),
        event("Unknown", position=6),
        event("E", '{"t": "7", "n": 7}', position=7, partition=1),
    )
    assert batch.changes["b"].set == {"text": "4"}
    assert (batch.changes["a"].set, batch.changes["a"].merge) == ({"text": "7"}, {"integer": 8})
    assert errors(batch) == [
        (2, "a", "fold[0].add.integer: data has no field 'n' (line 1, column 6)"),
        (3, "a", "follows an event of its row that is parked"),
        (5, "a", "fold[0].set.text: data has no field 't' (line 1, column 6)"),
    ]


def test_what_was_parked_before_is_respected_and_left_unchanged() -> None:
    compiled = fold({"type": "E", "add": {"integer": "data.n"}}, {"type": "No", "delete": True, "when": "false"})
    parked = Parked(rows={(INCARNATION, 0, "a"), ("another", 0, "b")})
    batch = folded(
        compiled,
        event("E", '{"n": 1}', position=1),
        event("No", position=2),
        event("E", '{"n": 3}', position=3, subject="b"),
        event("E", '{"n": "bad"}', position=4, subject="c"),
        parked=parked,
    )
    assert [position for position, _, _ in errors(batch)] == [1, 4]
    assert set(batch.changes) == {"b"}
    assert parked == Parked(rows={(INCARNATION, 0, "a"), ("another", 0, "b")})


def test_where_the_key_fails_the_subject_is_parked() -> None:
    compiled = fold({"type": "E", "add": {"integer": "1"}}, key="data.k")
    batch = folded(
        compiled,
        event("E", '{"k": "x"}', position=1),
        event("E", "{}", position=2),
        event("E", '{"k": "x"}', position=3),
        event("E", '{"k": "x"}', position=4, subject="other"),
        event("E", '{"k": 5}', position=5, subject="third"),
    )
    assert batch.changes["x"].merge == {"integer": 2}
    assert errors(batch) == [
        (2, None, "key: data has no field 'k' (line 1, column 6)"),
        (3, None, "follows an event of its subject that is parked"),
        (5, None, "key: a key is a string, not number 5: use string()"),
    ]
    again = folded(compiled, event("E", '{"k": "x"}', position=6), parked=Parked(subjects={(INCARNATION, 0, "a")}))
    assert errors(again) == [(6, None, "follows an event of its subject that is parked")]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ('""', "can't be empty"),
        (f'"{"ü" * 257}"', "at most 512 bytes, this one has 514"),
        (r'"a\u0000"', "NUL"),
        ("null", "a key is a string, not null"),
        ('["a", 1]', "a key is a string, not number 1"),
    ],
)
def test_a_key_is_a_text_of_1_to_512_bytes(key: str, message: str) -> None:
    compiled = fold({"type": "E", "add": {"integer": "1"}}, key="data.k")
    ((_, row, error),) = errors(folded(compiled, event("E", f'{{"k": {key}}}')))
    assert row is None
    assert message in error
    assert folded(compiled, event("E", f'{{"k": "{"ü" * 256}"}}')).parked == []


def test_one_event_goes_to_each_row_of_a_list_once() -> None:
    compiled = fold({"type": "E", "add": {"integer": "data.n"}}, key="data.rows")
    good = event("E", '{"rows": ["x", "y", "x"], "n": 1}', position=1)
    batch = folded(compiled, good, event("E", '{"rows": [], "n": 1}', position=2))
    assert {key: change.merge for key, change in batch.changes.items()} == {"x": {"integer": 1}, "y": {"integer": 1}}

    batch = folded(compiled, good, parked=Parked(rows={(INCARNATION, 0, "x")}))
    assert set(batch.changes) == {"y"}
    assert errors(batch) == [(1, "x", "follows an event of its row that is parked")]

    batch = folded(compiled, event("E", '{"rows": ["x", "y"]}', position=1))
    assert [key for _, key, _ in errors(batch)] == ["x", "y"]


@pytest.mark.parametrize("data", ["{", "", "1e99999999999999999999999", "[" * 3000 + "]" * 3000, "9" * 5000])
def test_data_that_cannot_be_read_is_a_bad_event(data: str) -> None:
    batch = folded(fold({"type": "E", "set": {"text": "data.x"}}), event("E", data))
    ((position, key, error),) = errors(batch)
    assert (position, key) == (1, "a")
    assert "can't be read" in error


def test_data_is_not_read_where_no_expression_needs_it() -> None:
    batch = folded(fold({"type": "E", "set": {"text": "subject"}}), event("E", "{broken"))
    assert batch.changes["a"].set == {"text": "a"}


def test_a_failing_condition_parks_and_says_which() -> None:
    compiled = fold({"type": "E", "set": {"text": "'x'"}, "when": "data.flag"})
    batch = folded(compiled, event("E", '{"flag": 1}'), event("E", "{}", subject="b", position=2))
    assert errors(batch) == [
        (1, "a", "fold[0].when: expected true or false, not number"),
        (2, "b", "fold[0].when: data has no field 'flag' (line 1, column 6)"),
    ]


def test_in_rows_fed_by_several_partitions_the_later_stamp_wins_within_a_batch() -> None:
    compiled = fold(
        {"type": "E", "set": {"text": "data.t"}, "add": {"integer": "1"}},
        {"type": "F", "set": {"text_2": "'f'"}},
        key="'row'",
    )
    assert not compiled.single_partition
    late, early = TIME + dt.timedelta(hours=2), TIME + dt.timedelta(hours=1)
    batch = compiled.batch()
    batch.fold("bb", [event("E", '{"t": "late"}', position=7, partition=3, time=late)])
    batch.fold("aa", [event("E", '{"t": "early"}', position=9, partition=4, time=early)])
    batch.fold("aa", [event("E", '{"t": "same time, lower incarnation"}', position=8, partition=4, time=late)])
    batch.fold("aa", [event("F", position=10, partition=4, time=early)])
    assert batch.changes["row"] == RowChange(
        "row",
        set={"text": "late", "text_2": "f"},
        merge={"integer": 3},
        stamps={"text": Stamp(late, "bb", 3, 7), "text_2": Stamp(early, "aa", 4, 10)},
    )


def test_of_two_rules_for_one_event_the_later_sets_the_stamped_column() -> None:
    compiled = fold({"type": "E", "set": {"text": "'1'"}}, {"type": "E", "set": {"text": "'2'"}}, key="'row'")
    assert folded(compiled, event("E")).changes["row"].set == {"text": "2"}


def test_row_is_what_stands_there_before_the_event() -> None:
    compiled = fold(
        {"type": "E", "set": {"integer": "has(row.integer) ? row.integer * 2 : 1", "text": "'first'"}},
        {"type": "E", "set": {"text_2": "row.text"}, "when": "has(row.text) || row.integer == 4"},
        {"type": "D", "delete": True},
    )
    assert compiled.reads == ["text", "integer"]
    found = folded(compiled, event("E"), before={"a": {"integer": 2, "text": None}}).changes["a"]
    assert found == RowChange("a", set={"integer": 4, "text": "first"})
    twice = folded(compiled, event("E"), event("E", position=2), before={"a": {"integer": 2, "text": "old"}}).changes
    assert twice["a"].set == {"integer": 8, "text": "first", "text_2": "first"}
    assert folded(compiled, event("E"), event("E", position=2)).changes["a"].set["integer"] == 2
    anew = folded(compiled, event("D"), event("E", position=2), before={"a": {"integer": 2, "text": "old"}}).changes
    assert anew["a"] == RowChange("a", deleted_first=True, set={"integer": 1, "text": "first"})


def test_maps_of_the_row_are_in_the_order_of_their_keys_whoever_wrote_them() -> None:
    compiled = fold(
        {"type": "E", "set": {"json": "{'b': 1, 'a': 2.50}"}},
        {"type": "F", "set": {"text": "row.json.map(k, k)[0]", "numeric": "row.json.a + row.json.b"}},
    )
    same = {"text": "a", "numeric": Decimal("3.50")}
    assert same.items() <= folded(compiled, event("E"), event("F", position=2)).changes["a"].set.items()
    assert folded(compiled, event("F"), before={"a": {"json": '{"b": 1, "a": 2.50}'}}).changes["a"].set == same


def test_an_expression_of_the_row_that_fails_is_a_bad_event() -> None:
    compiled = fold({"type": "E", "set": {"integer": "row.integer + 1"}, "when": "row.text != 'x'"})
    batch = folded(
        compiled, event("E"), event("E", position=2), event("E", subject="b", position=3), before={"b": {"integer": 1}}
    )
    assert errors(batch) == [
        (1, "a", "fold[0].set.integer: + is not defined for null and number (line 1, column 13)"),
        (2, "a", "fold[0].set.integer: + is not defined for null and number (line 1, column 13)"),
    ]
    assert batch.changes == {"b": RowChange("b", set={"integer": 2})}


def test_append_puts_an_item_at_the_end_of_an_array() -> None:
    compiled = fold(
        {"type": "E", "append": {"json": "data.x"}},
        {"type": "S", "set": {"json": "data.x"}},
        {"type": "D", "delete": True},
    )
    items = [event("E", f'{{"x": {x}}}', position=i) for i, x in enumerate(["1", "null", "[2.50]", '"ü"'], 1)]
    assert folded(compiled, *items).changes["a"].set == {"json": '[1,null,[2.50],"ü"]'}
    assert folded(compiled, items[0], before={"a": {"json": "[]"}}).changes["a"].set == {"json": "[1]"}
    assert folded(compiled, items[1], before={"a": {"json": "[0, 1]"}}).changes["a"].set == {"json": "[0, 1,null]"}
    assert folded(compiled, event("D"), items[1], before={"a": {"json": "[0]"}}).changes["a"].set == {"json": "[null]"}
    batch = folded(compiled, event("S", '{"x": {"a": 1}}'), items[1])
    assert batch.changes["a"].set == {"json": '{"a":1}'}
    assert "something else than an array" in errors(batch)[0][2]


def test_what_an_event_appends_after_it_deleted_the_row_begins_anew() -> None:
    compiled = fold({"type": "E", "delete": True}, {"type": "E", "append": {"json": "1"}})
    change = folded(compiled, event("E"), before={"a": {"json": "[0]"}}).changes["a"]
    assert change == RowChange("a", deleted_first=True, set={"json": "[1]"})


def test_beyond_the_bounds_of_an_array_an_event_is_bad_and_changes_nothing_else() -> None:
    compiled = fold(
        {"type": "E", "set": {"text": "'t'"}, "append": {"json": "data.x"}}, {"type": "E", "add": {"integer": "1"}}
    )
    full = "[" + ", ".join(["1"] * 999) + "]"
    one = '{"x": 1}'
    batch = folded(compiled, event("E", one), event("E", one, position=2), before={"a": {"json": full}})
    assert batch.changes["a"].merge == {"integer": 1}
    assert errors(batch) == [(2, "a", "fold[0].append.json: the array holds 1000 items, and at most 1000 are kept")]
    assert folded(compiled, event("E", f'{{"x": "{"x" * 4094}"}}')).parked == []
    batch = folded(compiled, event("E", f'{{"x": "{"ü" * 2048}"}}'))
    assert batch.changes == {}
    assert "at most 4096 bytes of JSON, not 4098" in errors(batch)[0][2]


def test_a_sum_of_which_the_value_before_is_known_is_held_against_its_bounds_at_once() -> None:
    compiled = fold({"type": "E", "add": {"integer": "data.n"}}, {"type": "M", "max": {"integer": "data.n"}})
    events = [event("E", f'{{"n": {2**63 - 2}}}'), event("M", '{"n": 9}'), event("E", '{"n": 1}')]
    batch = folded(compiled, *events, before={"a": {"integer": 1}})
    assert batch.changes["a"].set == {"integer": 2**63 - 1}
    assert "fold[0].add.integer: " in errors(batch)[0][2]
    assert "beyond an integer column's 64 bits" in errors(batch)[0][2]


def test_a_default_stands_in_a_row_before_its_first_event() -> None:
    columns = [
        {"name": "n", "type": "integer", "default": "10", "nullable": False},
        {"name": "t", "type": "text", "default": "'new'"},
    ]
    compiled = fold(
        {"type": "A", "add": {"n": "1"}},
        {"type": "T", "set": {"t": "row.t + '!'"}},
        {"type": "S", "set": {"n": "data.n"}},
        {"type": "D", "delete": True},
        columns=columns,
    )
    assert folded(compiled, event("A")).changes["a"].set == {"n": 11}
    assert folded(compiled, event("A"), before={"a": {"n": 5, "t": None}}).changes["a"].set == {"n": 6}
    assert folded(compiled, event("T"), event("T", position=2)).changes["a"].set == {"t": "new!!"}
    gone = folded(compiled, event("D"), event("A", position=2), before={"a": {"n": 5, "t": "x"}}).changes["a"]
    assert (gone.deleted_first, gone.set) == (True, {"n": 11})
    ((_, _, error),) = errors(folded(compiled, event("S", '{"n": null}')))
    assert error.startswith("fold[2].set.n: the column takes no null")


def test_batches_share_nothing() -> None:
    compiled = fold({"type": "E", "add": {"integer": "data.n"}})
    first = folded(compiled, event("E", '{"n": 1}'), event("E", "{}", position=2))
    second = folded(compiled, event("E", '{"n": 2}'))
    assert first.changes["a"].merge == {"integer": 1}
    assert second.changes["a"].merge == {"integer": 2}
    assert second.parked == []
