"""Code in place of a definition: what a function may do to rows, and what makes an event a bad one."""

import datetime as dt
import json
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import refold
from hypothesis import given
from hypothesis import strategies as st
from refold import events
from refold.projection.definition import (
    Definition,
    InvalidDefinitionError,
    StreamRef,
    VersionDefinition,
    merges,
    parse,
    read_columns,
    single_partition,
    stamped,
    version_of,
)
from refold.projection.fold import Parked, RowChange, Stamp
from refold.projection.handler import (
    Event,
    HandlerBatch,
    HandlerError,
    HandlerFold,
    Table,
    TableError,
    check_compatible,
    folding,
    load,
)
from refold.projection.unparking import Entry, ParkedRow, fold_again
from refold.testing import BadEventError, NotDeterministicError, event, fold, fold_and_park

DIGEST = "sha256:" + "0a" * 32
IMAGE = f"registry/acme@{DIGEST}"
COLUMNS = [
    {"name": "status", "type": "text"},
    {"name": "items", "type": "integer"},
    {"name": "total", "type": "numeric"},
    {"name": "open", "type": "boolean", "nullable": False, "default": "true"},
    {"name": "at", "type": "timestamp"},
    {"name": "lines", "type": "json"},
]
INCARNATION = "00ff" * 4
STREAM = StreamRef(
    namespace="shop", name="orders", incarnation=INCARNATION, partitions=6, topic="shop.orders", schema="shop.orders"
)
EMPTY = {"status": None, "items": None, "total": None, "open": True, "at": None, "lines": None}
Code = Callable[[Event, Table], object]


def spec(*, columns: Any = COLUMNS, streams: Any = ("orders",), key: str = "subject", **handler: Any) -> dict[str, Any]:
    given = {"image": IMAGE, "function": "acme.orders:project", **handler}
    return {"streams": list(streams), "key": key, "columns": columns, "handler": given}


def several(**fields: Any) -> dict[str, Any]:
    return spec(**{"keys": "any", "adds": ["items", "total"], **fields})


def problems(wrong: dict[str, Any]) -> list[str]:
    with pytest.raises(InvalidDefinitionError) as refused:
        parse(wrong)
    return [str(problem) for problem in refused.value.problems]


def stored(
    subject: str, type_: str = "E", data: object = None, *, position: int = 1, partition: int = 0, seconds: int = 0
) -> events.Event:
    time = dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=seconds)
    text = msgspec.Raw(json.dumps(data).encode())
    return events.Event(partition, position, subject, position, f"e{position}", type_, time, text)


def batch_of(
    code: Code, what: dict[str, Any], *happened: events.Event, parked: Parked | None = None, before: Any = None
) -> HandlerBatch:
    batch = HandlerFold(parse(what), code, {INCARNATION: "orders"}).batch(parked, before)
    batch.fold(INCARNATION, happened)
    return batch


class TestDefinitions:
    @pytest.mark.parametrize(
        ("wrong", "field", "message"),
        [
            (spec(image="registry/acme:1"), "spec.handler.image", "or say in spec.handler.version which code it is"),
            (spec(image="registry/acme"), "spec.handler.image", "by its digest"),
            (spec(image=f"registry/acme@{DIGEST[:-1]}"), "spec.handler.image", "by its digest"),
            (spec(image="a b"), "spec.handler.image", "match"),
            (spec(function="acme.orders"), "spec.handler.function", "match"),
            (spec(function="acme/orders.py:project"), "spec.handler.function", "match"),
            (spec(key="data.customer"), "spec.key", "say in spec.handler.keys"),
            (spec(columns=[]), "spec.columns", "declare at least one"),
            (spec(adds=["items"]), "spec.handler.adds", "every column may be set and added to"),
            (several(adds=["status"]), "spec.handler.adds[0]", "integer or numeric, status is text"),
            (several(adds=["colour"]), "spec.handler.adds[0]", "declare it there"),
            (several(adds=["items", "items"]), "spec.handler.adds[1]", "twice"),
            (spec(keys="all"), "spec.handler.keys", "'subject' or 'any'"),
            (spec(code="x"), "spec.handler.code", "no such field"),
            ({**spec(), "fold": [{"type": "E", "set": {"items": "1"}}]}, "spec.handler", "remove either"),
            ({"streams": ["orders"], "columns": COLUMNS}, "spec.fold", "or code in spec.handler"),
        ],
    )
    def test_what_cannot_work_is_refused_with_field_reason_and_way_out(
        self, wrong: dict[str, Any], field: str, message: str
    ) -> None:
        (problem,) = problems(wrong)
        assert problem.startswith(f"{field}: ")
        assert message in problem

    def test_a_tag_is_taken_with_a_version(self) -> None:
        assert parse(spec(image="registry:5000/acme:1", version="1")).handler is not None

    def test_rows_are_fed_by_one_partition_where_one_streams_subjects_are_the_keys(self) -> None:
        names = [column["name"] for column in COLUMNS]
        one = parse(spec())
        assert (single_partition(one), read_columns(one), merges(one), stamped(one)) == (True, names, {}, [])
        for other in (several(), several(streams=["orders", "payments"], keys="subject")):
            found = parse(other)
            assert not single_partition(found)
            assert read_columns(found) == []
            assert merges(found) == {"items": "add", "total": "add"}
            assert stamped(found) == ["status", "open", "at", "lines"]

    def test_digest_version_and_function_make_a_version_and_where_the_image_stands_does_not(self) -> None:
        def version(**handler: Any) -> str:
            return version_of(parse(spec(**handler)), [STREAM])

        tagged = {"image": "registry/acme:1", "version": "1"}
        versions = {
            version(),
            version(image=f"registry/acme@sha256:{'0b' * 32}"),
            version(version="1"),
            version(function="acme.orders:other"),
            version(keys="any"),
            version(keys="any", adds=["items"]),
            version(**tagged),
            version(**{**tagged, "version": "2"}),
            version_of(parse({**spec(), "handler": None, "fold": [{"type": "E", "set": {"items": "1"}}]}), [STREAM]),
        }
        assert len(versions) == 9
        assert version(image=f"mirror:5000/copy:tag@{DIGEST}") == version()
        assert version(**{**tagged, "image": "mirror/acme:1.0.1"}) == version(**tagged)
        assert version(keys="any", adds=["items", "total"]) == version(keys="any", adds=["total", "items"])

    def test_a_definition_of_expressions_has_the_version_that_it_had_before_there_were_handlers(self) -> None:
        written = {"streams": ["orders"], "columns": COLUMNS[:1], "fold": [{"type": "E", "set": {"status": "'x'"}}]}
        assert version_of(parse(written), [STREAM]) == "a4a5b28e"

    def test_a_stored_definition_comes_back(self) -> None:
        version = VersionDefinition(definition=parse(several(version="1")), streams=[STREAM])
        assert VersionDefinition.from_json(version.to_json()) == version


class TestRowsOfOnePartition:
    def test_a_row_is_made_changed_deleted_and_made_again(self) -> None:
        def code(event: Event, table: Table) -> None:
            if event.type == "Gone":
                table.delete(event.subject)
                assert table.get(event.subject) is None
            else:
                table.upsert(event.subject, status=event.type)
                table.add(event.subject, items=1)

        one = [stored("a", "New", position=1), stored("a", "Old", position=2)]
        assert batch_of(code, spec(), *one).changes == {"a": RowChange("a", set={"status": "Old", "items": 2})}
        gone = [*one, stored("a", "Gone", position=3)]
        assert batch_of(code, spec(), *gone).changes == {"a": RowChange("a", deleted_first=True, exists_after=False)}
        again = batch_of(code, spec(), *gone, stored("a", "New", position=4), before={"a": {**EMPTY, "items": 70}})
        assert again.changes == {"a": RowChange("a", deleted_first=True, set={"status": "New", "items": 1})}

    def test_get_shows_the_row_with_the_events_own_calls_and_none_where_there_is_no_row(self) -> None:
        seen: list[Any] = []

        def code(event: Event, table: Table) -> None:
            seen.append(table.get("a"))
            table.add("a", items=1)
            seen.append(table.get("a"))

        batch_of(code, spec(), stored("a"))
        assert seen == [None, {**EMPTY, "items": 1}]
        seen.clear()
        batch_of(code, spec(), stored("a"), stored("a", position=2), before={"a": {**EMPTY, "items": 5, "open": False}})
        assert [(row["items"], row["open"]) for row in seen] == [(5, False), (6, False), (6, False), (7, False)]

    def test_what_is_done_to_a_row_that_get_gave_has_no_effect(self) -> None:
        def code(event: Event, table: Table) -> None:
            table.upsert("a", lines=[1])
            row = table.get("a")
            assert row is not None
            row["lines"].append(2)
            row["items"] = 9
            again = table.get("a")
            assert again is not None
            assert (again["lines"], again["items"]) == ([1], None)

        batch = batch_of(code, spec(), stored("a"))
        assert (batch.parked, batch.changes["a"].set) == ([], {"lines": "[1]"})

    @pytest.mark.parametrize(
        ("column", "stored_value", "given_value"),
        [
            ("total", Decimal("2.50"), Decimal("2.5")),
            ("total", Decimal("100.0"), 100),
            ("total", Decimal("0.00"), Decimal("-0")),
            ("total", Decimal(1000), Decimal("1E+3")),
            ("lines", '{"b": 2.50, "a": 100}', {"a": Decimal("1E+2"), "b": Decimal("2.5")}),
            ("at", dt.datetime.fromisoformat("2026-01-01T01:00:00+01:00"), "2026-01-01T00:00:00Z"),
        ],
    )
    def test_a_value_looks_alike_whether_it_was_just_set_or_comes_from_a_store(
        self, column: str, stored_value: Any, given_value: Any
    ) -> None:
        seen: list[str] = []

        def code(event: Event, table: Table) -> None:
            if event.type == "Set":
                table.upsert("a", **{column: given_value})
            seen.append(repr(table.get("a")))

        batch_of(code, spec(), stored("a", "Set"))
        batch_of(code, spec(), stored("a"), before={"a": {**EMPTY, column: stored_value}})
        assert seen[0] == seen[1]

    def test_the_row_of_another_key_is_refused_with_the_way_out(self) -> None:
        batch = batch_of(lambda event, table: table.upsert("b", items=1), spec(), stored("a"))
        (parked,) = batch.parked
        assert parked.key == "a"
        assert "spec.handler.keys: any" in parked.error

    def test_a_sum_beyond_the_column_is_a_bad_event(self) -> None:
        batch = batch_of(
            lambda event, table: table.add("a", items=event.data), spec(),
            stored("a", data=1), stored("b", data=1), before={"a": {**EMPTY, "items": 2**63 - 1}},
        )  # fmt: skip
        assert [(one.key, "64 bits" in one.error) for one in batch.parked[:1]] == [("a", True)]


class TestRowsOfSeveralPartitions:
    def test_what_is_set_has_the_events_stamp_and_the_greatest_one_wins(self) -> None:
        def code(event: Event, table: Table) -> None:
            table.upsert("k", status=event.subject)
            table.add("k", items=1, total=Decimal("0.5"))

        late, early = stored("late", seconds=2), stored("early", partition=1, seconds=1)
        (change,) = batch_of(code, several(), late, early).changes.values()
        assert change.set == {"status": "late"}
        assert change.stamps == {"status": Stamp(late.time, INCARNATION, 0, 1)}
        assert change.merge == {"items": 2, "total": Decimal("1.0")}

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (lambda event, table: table.get("k"), "get: spec.handler.keys is any, so a row's events come from several"),
            (lambda event, table: table.delete("k"), "set a column such as `deleted` instead"),
            (lambda event, table: table.upsert("k", items=1), "items stands in spec.handler.adds"),
            (lambda event, table: table.add("k", total=None), "null can't be added"),
        ],
    )
    def test_what_depends_on_an_order_is_refused_and_says_why(self, code: Code, message: str) -> None:
        (parked,) = batch_of(code, several(), stored("a")).parked
        assert message in parked.error

    def test_a_column_that_is_not_declared_for_it_is_not_added_to(self) -> None:
        batch = batch_of(lambda event, table: table.add("k", items=1), several(adds=["total"]), stored("a"))
        assert "name items in spec.handler.adds" in batch.parked[0].error

    def test_several_streams_say_so_and_have_their_names(self) -> None:
        what = several(streams=["orders", "payments"], keys="subject")
        assert "several streams feed a row" in batch_of(lambda e, t: t.get("a"), what, stored("a")).parked[0].error
        batch = batch_of(lambda event, table: table.upsert("a", status=event.stream), what, stored("a"))
        assert batch.changes["a"].set == {"status": "orders"}

    def test_a_row_that_is_parked_gets_nothing_and_the_events_other_rows_do(self) -> None:
        def code(event: Event, table: Table) -> None:
            for key in ("k", "l"):
                table.add(key, items=1)

        parked = Parked(rows={(INCARNATION, 0, "k")})
        batch = batch_of(code, several(), stored("a"), stored("a", partition=1), parked=parked)
        assert [(one.event.partition, one.key) for one in batch.parked] == [(0, "k")]
        assert {key: change.merge for key, change in batch.changes.items()} == {"k": {"items": 1}, "l": {"items": 2}}

    def test_an_event_changes_at_most_a_thousand_rows(self) -> None:
        def code(event: Event, table: Table) -> None:
            for number in range(event.data):
                table.upsert(f"k{number}")

        assert len(batch_of(code, several(), stored("a", data=1000)).changes) == 1000
        assert "at most 1000 rows" in batch_of(code, several(), stored("a", data=1001)).parked[0].error


NO_VALUES = [
    ({"status": 1}, "use string()"),
    ({"status": "a\0"}, "NUL"),
    ({"status": "\ud800"}, "surrogates"),
    ({"items": "1"}, "takes a number"),
    ({"items": True}, "takes a number"),
    ({"items": 2**63}, "64 bits"),
    ({"items": Decimal("0.5")}, "not a whole number"),
    ({"items": Decimal("NaN")}, "NaN is no number"),
    ({"total": 0.5}, "the float 0.5 isn't exact: use Decimal"),
    ({"total": Decimal("Infinity")}, "Infinity is no number"),
    ({"total": 10**100}, "more digits"),
    ({"open": None}, "nullable: false"),
    ({"open": 1}, "true or false"),
    ({"at": dt.datetime(2026, 1, 1)}, "no time zone"),
    ({"at": "yesterday"}, "RFC 3339"),
    ({"lines": {"a": [0.5]}}, "use Decimal"),
    ({"lines": {1, 2}}, "not set"),
    ({"lines": {1: 2}}, "str keys"),
    ({"lines": [Decimal("NaN")]}, "not Decimal"),
    ({"lines": "\ud800"}, "surrogates"),
    ({"lines": object()}, "not object"),
    ({"colour": "red"}, "colour is not in spec.columns (status, items"),
]


class TestBadEvents:
    @pytest.mark.parametrize("what", [spec(), several(adds=[])], ids=["one", "several"])
    @pytest.mark.parametrize(("values", "message"), NO_VALUES, ids=[message for _, message in NO_VALUES])
    def test_a_value_that_a_column_does_not_take_parks_the_event(
        self, what: dict[str, Any], values: dict[str, Any], message: str
    ) -> None:
        def code(event: Event, table: Table) -> None:
            if event.subject == "a":
                table.upsert("a", items=1)
                table.upsert("a", **values)
            else:
                table.upsert(event.subject, items=1)

        batch = batch_of(code, what, stored("a"), stored("b", position=2))
        (parked,) = batch.parked
        assert message in parked.error
        assert parked.error.startswith("acme.orders:project: upsert: ")
        assert list(batch.changes) == ["b"], "an event takes effect as a whole, or not at all"

    @pytest.mark.parametrize("what", [spec(), several()], ids=["one", "several"])
    def test_an_exception_parks_the_event_and_tells_what_and_where(self, what: dict[str, Any]) -> None:
        def code(event: Event, table: Table) -> None:
            table.upsert("a", status="x")
            event.data["missing"]

        (parked,) = batch_of(code, what, stored("a", data={})).parked
        assert parked.error.startswith("acme.orders:project: KeyError: 'missing' (test_handler.py, line ")
        assert parked.key == ("a" if what["handler"].get("keys") is None else None)

    def test_a_refusal_counts_whatever_the_function_does_about_it(self) -> None:
        def code(event: Event, table: Table) -> None:
            with pytest.raises(TableError):
                table.upsert("a", items="many")

        assert len(batch_of(code, spec(), stored("a")).parked) == 1

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (lambda event, table: sys.exit(3), "SystemExit: 3"),
            (lambda event, table: (lambda again: again(again))(lambda again: again(again)), "RecursionError"),
            (lambda event, table: "done", "it returned str: change rows by calls of the table"),
            (lambda event, table: table.get(""), "can't be empty"),
            (lambda event, table: table.get("\ud800"), "surrogates"),
            (lambda event, table: table.get(7), "a key is a string"),
        ],
    )
    def test_whatever_a_function_does_concerns_its_row_alone(self, code: Code, message: str) -> None:
        (parked,) = batch_of(code, spec(), stored("a")).parked
        assert message in parked.error

    def test_an_async_callable_is_told_and_leaves_no_warning(self) -> None:
        class Later:
            async def __call__(self, event: Event, table: Table) -> None: ...

        assert "it returned coroutine" in batch_of(Later(), spec(), stored("a")).parked[0].error

    def test_a_long_error_is_cut(self) -> None:
        def code(event: Event, table: Table) -> None:
            raise ValueError("x" * 1_000_000)

        (parked,) = batch_of(code, spec(), stored("a")).parked
        assert len(parked.error) <= 1_000
        assert "test_handler.py" in parked.error

    def test_a_table_that_was_kept_is_of_no_use(self) -> None:
        kept: list[Table] = []
        batch_of(lambda event, table: kept.append(table), spec(), stored("a"))
        with pytest.raises(TableError, match="don't keep it"):
            kept[0].upsert("a", items=1)

    @pytest.mark.parametrize("what", [spec(), several()], ids=["one", "several"])
    def test_later_events_of_what_is_parked_follow_and_those_without_effect_do_not(self, what: dict[str, Any]) -> None:
        def code(event: Event, table: Table) -> None:
            if event.type == "Bad":
                raise ValueError
            if event.type == "Good":
                table.upsert("a", status="x")

        types = ["Bad", "Other", "Good"]
        batch = batch_of(code, what, *(stored("a", type_, position=n) for n, type_ in enumerate(types, 1)))
        assert [one.event.type for one in batch.parked] == ["Bad", "Good"]
        assert "follows an event of its" in batch.parked[1].error
        assert batch.changes == {}

    def test_data_that_cannot_be_read_parks_the_event(self) -> None:
        broken = msgspec.structs.replace(stored("a"), data=msgspec.Raw(b'{"a": '))
        assert "can't be read" in batch_of(lambda event, table: None, spec(), broken).parked[0].error

    @pytest.mark.parametrize("what", [spec(), several()], ids=["one", "several"])
    def test_parked_events_are_folded_again_once_the_function_takes_them(self, what: dict[str, Any]) -> None:
        def bad(event: Event, table: Table) -> None:
            raise ValueError

        happened = [stored("a", position=n) for n in (1, 2)]
        fixed = HandlerFold(parse(what), lambda event, table: table.add("a", items=1), {INCARNATION: "orders"})
        parked = batch_of(bad, what, *happened).parked
        key = parked[0].key
        entries = [Entry(n, n, "", None) for n in (1, 2)]
        row = ParkedRow(INCARNATION, 0, key, None if key else "a", entries)
        known = Parked(rows={(INCARNATION, 0, "a")}) if key else Parked(subjects={(INCARNATION, 0, "a")})
        again = fold_again(fixed, row, entries, happened, known, {})
        assert ([entry.id for entry in again.folded], again.error) == ([1, 2], None)
        (change,) = again.changes
        assert {**change.set, **change.merge} == {"items": 2}


class TestLoading:
    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        (tmp_path / "tried_out.py").write_text(
            "class Inner:\n    @staticmethod\n    def project(event, table): pass\n"
            "async def later(event, table): pass\ndef yields(event, table):\n    yield\n"
            "def one(event): pass\nnumber = 7\n"
        )
        (tmp_path / "tried_out_broken.py").write_text("import sys\nsys.exit('no')\n")
        monkeypatch.syspath_prepend(tmp_path)
        return "tried_out"

    def test_a_function_is_found_by_module_and_name(self, module: str) -> None:
        assert load(f"{module}:Inner.project")(None, None) is None  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("tried_out:missing", "has no attribute 'missing'"),
            ("tried_out_missing:project", "No module named 'tried_out_missing'"),
            ("tried_out_broken:project", "SystemExit: no (tried_out_broken.py, line 2)"),
            ("tried_out:later", "async or a generator"),
            ("tried_out:yields", "async or a generator"),
            ("tried_out:one", "can't be called as one(event, table)"),
            ("tried_out:number", "no function, but int"),
        ],
    )
    def test_what_cannot_be_called_is_refused_with_the_reason(self, module: str, function: str, message: str) -> None:
        with pytest.raises(HandlerError) as refused:
            load(function)
        assert str(refused.value).startswith(f"spec.handler.function: {function} ")
        assert message in str(refused.value)

    def test_an_image_goes_together_with_installations_of_its_minor_release(self) -> None:
        major, minor, _ = refold.__version__.split(".")
        check_compatible(f"{major}.{minor}.99", IMAGE)
        for other in (f"{major}.{int(minor) + 1}.0", f"{int(major) + 1}.{minor}.0", f"{major}.{minor}0.0", "nightly"):
            with pytest.raises(HandlerError, match=r"spec\.handler\.image: .*build it from the installation's image"):
                check_compatible(other, IMAGE)

    def test_the_image_is_looked_at_before_its_code_and_only_for_a_handler(self) -> None:
        handled, folded = (
            parse(spec(function="nowhere:project")),
            Definition.model_validate(
                {"streams": ["s"], "columns": COLUMNS, "fold": [{"type": "E", "set": {"items": "1"}}]}
            ),
        )
        with pytest.raises(HandlerError, match="image"):
            folding(handled, {}, installed="99.0.0")
        with pytest.raises(HandlerError, match="function"):
            folding(handled, {}, installed=None)
        assert folding(folded, {}, installed="99.0.0").reads == []


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["Placed", "Added", "Reset", "Purged", "Other"]),
        st.sampled_from("abc"),
        st.one_of(st.integers(-5, 5), st.decimals(-5, 5, places=2), st.just("bad"), st.none(), st.just(2**62)),
    ),
    max_size=25,
)
RULES = [
    {"type": "Placed", "set": {"status": "'placed'"}, "add": {"total": "data.n"}},
    {"type": "Added", "add": {"items": "data.n", "total": "data.n"}},
    {"type": "Purged", "delete": True},
    {"type": "Reset", "set": {"status": "null", "items": "data.n"}},
]
CUSTOMER_RULES = [
    {"type": "Placed", "set": {"status": "subject"}, "add": {"total": "data.n"}},
    {"type": "Added", "add": {"items": "data.n", "total": "data.n"}},
]


def as_rules(event: Event, table: Table) -> None:
    """RULES as code."""
    if event.type == "Placed":
        table.upsert(event.subject, status="placed")
        table.add(event.subject, total=event.data["n"])
    elif event.type == "Added":
        table.add(event.subject, items=event.data["n"], total=event.data["n"])
    elif event.type == "Purged":
        table.delete(event.subject)
    elif event.type == "Reset":
        table.upsert(event.subject, status=None, items=event.data["n"])


def as_customer_rules(event: Event, table: Table) -> None:
    """CUSTOMER_RULES as code."""
    if event.type == "Placed":
        table.upsert(event.data["k"], status=event.subject)
        table.add(event.data["k"], total=event.data["n"])
    elif event.type == "Added":
        table.add(event.data["k"], items=event.data["n"], total=event.data["n"])


class TestEqualToTheFold:
    @given(EVENTS)
    def test_rows_of_one_partition(self, history: list[Any]) -> None:
        """Also one by one and in one batch, which `refold.testing` compares."""
        happened = [event(subject, type_, {"n": n}) for type_, subject, n in history]
        expected = fold_and_park({"spec": {"streams": ["s"], "columns": COLUMNS, "fold": RULES}}, happened)
        found = fold_and_park({"spec": spec(streams=["s"])}, happened, function=as_rules)
        assert found.rows == expected.rows
        assert [one[:2] for one in found.parked] == [one[:2] for one in expected.parked]

    @given(EVENTS)
    def test_rows_of_several_partitions(self, history: list[Any]) -> None:
        """Without bad events: where a function fails, nobody knows to which row its event would have gone."""
        numbers = [(type_, subject, n) for type_, subject, n in history if type(n) is int and n < 9]
        happened = [event(subject, type_, {"n": n, "k": f"k{n % 2}"}) for type_, subject, n in numbers]
        rules = {"streams": ["s"], "key": "data.k", "columns": COLUMNS, "fold": CUSTOMER_RULES}
        assert fold({"spec": several(streams=["s"])}, happened, function=as_customer_rules) == fold(
            {"spec": rules}, happened
        )


class TestTryingOut:
    def test_a_bad_event_fails_the_test_and_says_which_and_why(self) -> None:
        with pytest.raises(BadEventError, match=r"event 1 is bad: .*takes a number") as bad:
            fold(
                {"spec": spec()}, [event("a", "E", 1), event("b", "E", "x"), event("b", "E", 2)],
                function=lambda event, table: table.upsert(event.subject, items=event.data),
            )  # fmt: skip
        assert [(one.number, one.key) for one in bad.value.parked] == [(1, "b"), (2, "b")]

    def test_what_depends_on_the_batch_is_told(self) -> None:
        calls: list[str] = []

        def code(event: Event, table: Table) -> None:
            calls.append(event.id)
            table.upsert(event.subject, items=len(calls))

        with pytest.raises(NotDeterministicError, match="the clock, chance, or what it has seen before"):
            fold({"spec": spec()}, [event("a", "E")], function=code)

    def test_a_sum_that_no_store_keeps_parks_its_row(self) -> None:
        def code(event: Event, table: Table) -> None:
            table.add("k", items=event.data)

        happened = [event("a", "E", 2**63 - 1), event("a", "E", 1), event("b", "E", -1)]
        outcome = fold_and_park({"spec": several()}, happened, function=code)
        assert outcome.rows["k"]["items"] in (2**63 - 1, 2**63 - 2)
        assert [(one.number, one.key) for one in outcome.parked] == [(1, "k")]

    def test_events_have_numbers_times_and_streams_as_in_a_store(self) -> None:
        seen: list[Event] = []
        later = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
        fold(
            {"spec": several(streams=["s", "t"])},
            [event("a", "E"), event("a", "E", 0.1, stream="t", time=later), event("a", "E", metadata={"m": 1})],
            function=lambda event, table: seen.append(event),
        )
        assert [(one.stream, one.revision, one.metadata) for one in seen[:3]] == [
            ("s", 1, {}), ("t", 1, {}), ("s", 2, {"m": 1}),
        ]  # fmt: skip
        assert seen[1].data == Decimal("0.1")
        assert seen[0].time < seen[1].time == later
        with pytest.raises(ValueError, match=r"spec\.streams"):
            fold({"spec": several()}, [event("a", "E", stream="other")], function=lambda event, table: None)

    def test_a_fold_of_expressions_is_tried_out_as_well(self) -> None:
        rules = {"streams": ["orders"], "columns": COLUMNS[1:3], "fold": RULES[1:2]}
        happened = [event("a", "Added", {"n": 1}), event("a", "Added", {"n": 2})]
        assert fold({"spec": rules}, happened) == {"a": {"items": 3, "total": 3}}
        with pytest.raises(BadEventError, match=r"event 2 is bad: fold\[0\]\.add\.items"):
            fold({"spec": rules}, [*happened, event("a", "Added", {"n": "x"})])
