"""What a Projection may declare, and how a refusal reads."""

import itertools
from typing import Any

import pytest
from refold.projection.definition import (
    Definition,
    InvalidDefinitionError,
    StreamRef,
    VersionDefinition,
    parse,
    read_columns,
    single_partition,
    version_of,
)

COLUMNS = [
    {"name": "status", "type": "text", "index": True},
    {"name": "items", "type": "integer"},
    {"name": "total", "type": "numeric"},
    {"name": "open", "type": "boolean"},
    {"name": "at", "type": "timestamp"},
    {"name": "lines", "type": "json"},
]
STREAM = StreamRef(
    namespace="shop", name="orders", incarnation="00ff" * 4, partitions=6, topic="shop.orders", schema="shop.orders"
)


def spec(*rules: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"streams": ["orders"], "columns": COLUMNS, "fold": list(rules), **fields}


def rule(**fields: Any) -> dict[str, Any]:
    return {"type": "OrderPlaced", **fields}


def problems(wrong: dict[str, Any]) -> list[str]:
    with pytest.raises(InvalidDefinitionError) as refused:
        parse(wrong)
    return [str(problem) for problem in refused.value.problems]


def test_the_designs_example_is_accepted_with_the_rest_of_its_spec() -> None:
    definition = parse(
        spec(
            {
                "type": "OrderPlaced",
                "set": {"status": "'placed'"},
                "add": {"items": "size(data.items)", "total": "data.total"},
            },
            {
                "type": "ItemAdded",
                "add": {"items": "data.qty", "total": "data.qty * data.price"},
                "when": "data.qty > 0",
            },
            {"type": "OrderPurged", "delete": True},
            key="subject",
            readStore={"type": "postgres"},
            projector={"replicas": 1},
        )
    )
    assert definition.fold[1].when == "data.qty > 0"
    assert single_partition(definition)


@pytest.mark.parametrize(
    ("wrong", "path", "message"),
    [
        (spec(rule(set={"status": "data.x +"})), "spec.fold[0].set.status (line 1, column 9)", "expected a value"),
        (spec(rule(set={"open": "true"}), rule(add={"total": "foo(1)"})), "spec.fold[1].add.total", "unknown function"),
        (spec(rule(set={"status": "event.typ"})), "spec.fold[0].set.status (line 1, column 7)", "has no field 'typ'"),
        (spec(rule(set={"colour": "'red'"})), "spec.fold[0].set.colour", "there are status, items, total"),
        (spec(rule(set={"colour": "'red'"}), columns=[]), "spec.fold[0].set.colour", "there are none"),
        (spec(rule()), "spec.fold[0]", "does nothing: give it set, add, min, max, append or delete"),
        (spec(rule(delete=True, set={"open": "true"})), "spec.fold[0].delete", "either deletes the row or changes it"),
        (spec(rule(set={"items": "1"}, add={"items": "1"})), "spec.fold[0].add.items", "has set for items as well"),
        (spec(rule(add={"status": "'x'"})), "spec.fold[0].add.status", "a column of type integer or numeric"),
        (spec(rule(add={"total": "null"})), "spec.fold[0].add.total", "add on numeric takes number, not null"),
        (
            spec(rule(min={"open": "true"})),
            "spec.fold[0].min.open",
            "min needs a column of type text, integer, numeric",
        ),
        (spec(rule(max={"lines": "1"})), "spec.fold[0].max.lines", "lines is json"),
        (spec(rule(max={"at": "1"})), "spec.fold[0].max.at", "max on timestamp takes string or timestamp, not number"),
        (
            spec(rule(append={"items": "1"})),
            "spec.fold[0].append.items",
            "append needs a column of type json, items is",
        ),
        (spec(rule(set={"items": "data.a ? 'x' : null"})), "spec.fold[0].set.items", "not string or null"),
        (spec(rule(set={"open": "row.status"})), "spec.fold[0].set.open", "takes bool or null, not string or null"),
        (
            spec(rule(set={"open": "row"})),
            "spec.fold[0].set.open (line 1, column 1)",
            "its columns, status, items, total",
        ),
        (
            spec(rule(set={"open": "row.x"})),
            "spec.fold[0].set.open (line 1, column 5)",
            "row has no column 'x': it has",
        ),
        (spec(rule(set={"open": "row.items + 'x' == 'x'"})), "spec.fold[0].set.open", "+ is not defined for number"),
        (spec(rule(set={"open": "true"}), key="row.status"), "spec.key (line 1, column 1)", "there is no row here"),
        (spec(rule(add={"lines": "data.x"})), "spec.fold[0].add.lines", "lines is json"),
        (spec(rule(set={"status": "1"})), "spec.fold[0].set.status", "takes string or null, not number: use string()"),
        (spec(rule(set={"items": "'1'"})), "spec.fold[0].set.items", "takes number or null, not string"),
        (spec(rule(set={"open": "size(data.x)"})), "spec.fold[0].set.open", "takes bool or null, not number"),
        (spec(rule(set={"at": "event.revision"})), "spec.fold[0].set.at", "takes string, null or timestamp"),
        (spec(rule(set={"open": "true"}, when="size(data.x)")), "spec.fold[0].when", "true or false, not number"),
        (
            spec(rule(set={"open": "true"}, when="date.x")),
            "spec.fold[0].when (line 1, column 1)",
            "unknown name 'date'",
        ),
        (
            spec(rule(set={"open": "true"}), key="event.revision"),
            "spec.key",
            "or a list of strings, not number",
        ),
        (
            spec(rule(set={"open": "true"}), key="[subject, data.other, event.revision]"),
            "spec.key (line 1, column 29)",
            "a list of strings, not number: use string()",
        ),
        (spec(rule(set={"open": "true"}), key="subj"), "spec.key (line 1, column 1)", "unknown name 'subj'"),
        (spec(rule(set={"open": "true"}), streams=["a", "a"]), "spec.streams[1]", "stands here twice"),
        (spec(rule(set={"open": "true"}), streams=[]), "spec.streams", "at least 1 item"),
        (spec(), "spec.fold", "at least 1 item"),
        (spec(rule(set={"open": "true"}), columns=[COLUMNS[3], COLUMNS[3]]), "spec.columns[1].name", "twice"),
        (spec(rule(delete=True), columns=[{"name": "key", "type": "text"}]), "spec.columns[0].name", "already"),
        (spec(rule(delete=True), columns=[{"name": "Key", "type": "text"}]), "spec.columns[0].name", "lower-case"),
        (spec(rule(delete=True), columns=[{"name": "x", "type": "float"}]), "spec.columns[0].type", "'numeric'"),
        (spec(rule(set={"items": 5})), "spec.fold[0].set.items", "in quotes"),
        (spec(rule(sett={"items": "5"})), "spec.fold[0].sett", "no such field"),
        (spec({"set": {"items": "5"}}), "spec.fold[0].type", "required"),
        ({"columns": []}, "spec.streams", "required"),
    ],
)
def test_what_cannot_work_is_refused_naming_the_field_and_the_way_out(
    wrong: dict[str, Any], path: str, message: str
) -> None:
    found = problems(wrong)
    assert found[0].startswith(f"{path}: ") or found[0].startswith(f"{path} (line"), found
    assert message in found[0]


@pytest.mark.parametrize(
    ("column", "path", "message"),
    [
        (
            {"type": "text", "default": "1"},
            "default",
            "x is text, which takes string or null, not number: use string()",
        ),
        ({"type": "text", "default": "subject"}, "default", "the same for all rows: it can't look at the event"),
        ({"type": "text", "default": "event.data.x"}, "default", "the same for all rows"),
        ({"type": "text", "default": "row.x"}, "default (line 1, column 1)", "there is no row here"),
        ({"type": "text", "default": "placed"}, "default (line 1, column 1)", "unknown name 'placed'"),
        ({"type": "integer", "default": "1 / 2"}, "default", "number 0.5 is not a whole number"),
        ({"type": "integer", "default": "1 / 0"}, "default (line 1, column 3)", "division by zero"),
        ({"type": "timestamp", "default": "'today'"}, "default", "is not a time like"),
        ({"type": "integer", "default": 5}, "default", "in quotes"),
        ({"type": "integer", "nullable": False}, "", "give it a default, or let it be null"),
        ({"type": "integer", "nullable": False, "default": "null"}, "default", "give it a default"),
        ({"type": "json", "nullable": False, "default": "[null][0]"}, "default", "give it a default"),
    ],
)
def test_a_default_that_cannot_work_is_refused(column: dict[str, Any], path: str, message: str) -> None:
    found = problems(spec(rule(delete=True), columns=[{"name": "x", **column}]))
    assert found[0].startswith(f"spec.columns[0]{'.' * bool(path)}{path}: "), found
    assert message in found[0]


def test_null_is_refused_where_a_column_cannot_be_null() -> None:
    columns = [{"name": "x", "type": "integer", "nullable": False, "default": "0"}]
    (found,) = problems(spec(rule(set={"x": "null"}), columns=columns))
    assert found == "spec.fold[0].set.x: x is integer, which takes number, not null"
    parse(spec(rule(set={"x": "row.x + 1"}), columns=columns))
    parse(spec(rule(set={"x": "data.x"}), columns=columns))  # null is a bad event


def test_which_columns_a_fold_has_to_know_before() -> None:
    def read(*rules: dict[str, Any], **column: Any) -> list[str]:
        columns = [{**each, **column} if each["name"] == "items" else each for each in COLUMNS]
        return read_columns(parse(spec(*rules, columns=columns)))

    assert read(rule(set={"items": "1"}), rule(add={"items": "1"}), rule(delete=True), rule(min={"at": "data.t"})) == []
    assert read(rule(add={"items": "1"}), default="0.0") == []
    assert read(rule(set={"items": "1"}), default="7") == []
    assert read(rule(add={"items": "1"}), default="7") == ["items"]
    assert read(rule(max={"items": "1"}), default="0") == ["items"]
    assert read(rule(max={"items": "1"}), rule(add={"items": "1"})) == ["items"]
    assert read(rule(append={"lines": "1"})) == ["lines"]
    assert read(rule(set={"at": "event.time"}, when="row.total > 1 && has(row.open)")) == ["total", "open"]
    assert read(rule(set={"lines": "data.l.map(row, row.total)"})) == []


def test_all_problems_are_told_at_once() -> None:
    found = problems(spec(rule(set={"status": "1 +", "colour": "2"}), rule(), key="nope"))
    assert [line.split(":")[0].split(" ")[0] for line in found] == [
        "spec.key",
        "spec.fold[0].set.status",
        "spec.fold[0].set.colour",
        "spec.fold[1]",
    ]


@pytest.mark.parametrize(
    "fields",
    [{"key": "data.carrier"}, {"streams": ["orders", "payments"]}, {"key": "[subject]"}, {"key": "'one row'"}],
)
def test_rows_fed_by_several_partitions_take_no_operation_that_needs_an_order(fields: dict[str, Any]) -> None:
    (deleted,) = problems(spec(rule(delete=True), **fields))
    assert deleted.startswith("spec.fold[0].delete: ")
    assert "several partitions, which have no common order" in deleted
    for one, other in itertools.permutations(["set", "add", "min", "max"], 2):
        (mixed,) = problems(spec(rule(**{one: {"items": "1"}}), rule(**{other: {"items": "1"}}), **fields))
        assert mixed.startswith(f"spec.fold[1].{other}.items: ")
        assert f"the same of set, add, min or max, and one has {one}" in mixed
    fine = parse(
        spec(
            rule(set={"status": "'a'"}, add={"items": "1"}, max={"at": "event.time"}),
            rule(set={"status": "'b'"}),
            **fields,
        )
    )
    assert not single_partition(fine)


@pytest.mark.parametrize("key", ["subject", " subject ", "event.subject", "(subject)", "event.subject // the entity"])
def test_a_key_that_is_the_subject_keeps_rows_to_one_partition_however_it_is_written(key: str) -> None:
    assert single_partition(parse(spec(rule(delete=True), key=key)))


def definition(**fields: Any) -> Definition:
    return parse(spec(rule(set={"open": "true"}), **fields))


@pytest.mark.parametrize(
    "changed",
    [
        {"key": "event.type"},
        {"columns": [*COLUMNS, {"name": "more", "type": "text"}]},
        {"columns": [{**column, "type": "json"} for column in COLUMNS]},
        {"columns": [{**column, "default": "null"} for column in COLUMNS]},
        {"columns": [*COLUMNS[:-1], {**COLUMNS[-1], "nullable": False, "default": "1"}]},
        {"columns": [*COLUMNS[:-1], {**COLUMNS[-1], "default": "1"}]},
        {"fold": [rule(set={"open": "false"})]},
        {"fold": [rule(set={"open": "true"}, when="true")]},
        {"fold": [rule(set={"open": "true"}), rule(set={"status": "'x'"})]},
    ],
)
def test_another_definition_is_another_version(changed: dict[str, Any]) -> None:
    assert version_of(definition(**changed), [STREAM]) != version_of(definition(), [STREAM])


def test_another_history_read_store_or_annotation_is_another_version() -> None:
    anew = STREAM.model_copy(update={"incarnation": "1" * 16})
    payments = STREAM.model_copy(update={"name": "payments"})
    assert version_of(definition(), [STREAM, payments]) == version_of(definition(), [payments, STREAM])
    versions = {
        version_of(definition(), [STREAM, payments]),
        version_of(definition(), [STREAM]),
        version_of(definition(), [anew]),
        version_of(definition(), [STREAM], read_store="redis"),
        version_of(definition(), [STREAM], rebuild="1"),
        version_of(definition(), [STREAM], rebuild="2"),
    }
    assert len(versions) == 6
    assert all(len(version) == 8 and int(version, 16) >= 0 for version in versions)


@pytest.mark.parametrize(
    "changed",
    [
        {"columns": [{**column, "index": True} for column in COLUMNS]},
        {"columns": COLUMNS[::-1]},
        {"columns": [{**column, "nullable": True} for column in COLUMNS]},
        {"key": "subject"},
        {"projector": {"replicas": 3}},
    ],
)
def test_indexes_the_order_of_columns_and_replicas_make_no_version(changed: dict[str, Any]) -> None:
    assert version_of(definition(**changed), [STREAM]) == version_of(definition(), [STREAM])


def test_one_moment_is_one_version_however_it_is_written() -> None:
    moments = ["2026-01-31T23:59:59Z", "2026-02-01T01:59:59.000000+02:00", "2026-01-31T23:59:58Z"]
    parsed = [parse({**definition().model_dump(mode="json", exclude_defaults=True), "asOf": each}) for each in moments]
    names = [version_of(each, [STREAM]) for each in parsed]
    assert names[0] == names[1]
    assert len({*names, version_of(definition(), [STREAM])}) == 3
    version = VersionDefinition(definition=parsed[0], streams=[STREAM], ends={STREAM.incarnation: [3, 0]})
    assert VersionDefinition.from_json(version.to_json()) == version
    assert '"asOf":"2026-01-31T23:59:59Z"' in version.to_json()


def test_versions_have_the_names_that_they_had() -> None:
    """A rename would rebuild every read model at the next upgrade of Refold."""
    assert version_of(definition(), [STREAM]) == "9f43b469"


def test_a_version_comes_back_from_its_json() -> None:
    version = VersionDefinition(definition=definition(), streams=[STREAM])
    assert '"schema":"shop.orders"' in version.to_json()
    assert VersionDefinition.from_json(version.to_json()) == version
    # what isn't used stays unsaid, so that a process of an earlier Refold understands the rest
    assert "nullable" not in version.to_json()
