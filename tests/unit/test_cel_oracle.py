"""Random expressions, held against cel-python, against fractions, and the fast form against the exact one."""

import datetime as dt
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import celpy
import msgspec
from celpy.adapter import json_to_cel
from hypothesis import given, settings
from hypothesis import strategies as st
from refold.events import Event
from refold.projection import cel
from refold.projection.definition import InvalidDefinitionError, parse
from refold.projection.fold import compile_fold
from refold.projection.values import to_json

DATA: dict[str, Any] = {
    "i": 3,
    "j": -2,
    "zero": 0,
    "s": "Ada",
    "t": "ad",
    "yes": True,
    "no": False,
    "ints": [1, 2, 3],
    "none": [],
    "names": ["Ada", "Bo"],
    "m": {"i": 5, "s": "deep"},
}


Strings = st.SearchStrategy[str]


def combine(template: str, *parts: Strings) -> Strings:
    return st.tuples(*parts).map(lambda found: template.format(*found))


def grammar(number_literals: list[str], depth: int = 3) -> Strings:
    """Expressions in which every operator meets the kinds that it is defined for, or a field that is missing.

    cel-python defines no equality between kinds, so kinds are mixed only by fields that aren't there.
    """
    # Nor does it let `false && …` absorb an error in these macros' steps, which are kept free of errors therefore.
    literal: Strings = st.sampled_from(number_literals)
    number: Strings = st.sampled_from([*number_literals, "data.i", "data.j", "data.zero", "data.m.i", "data.gone"])
    text: Strings = st.sampled_from(["'Ada'", "'a'", "''", "data.s", "data.t", "data.m.s", "data.gone", "data['s']"])
    items: Strings = st.sampled_from(["data.ints", "data.none", "data.gone", "[1, 2]"])
    truth: Strings = st.sampled_from(["true", "false", "data.yes", "data.no", "data.gone", "has(data.gone)"])
    comparison = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    for _ in range(depth):
        number, text, items, truth = (
            st.one_of(
                number,
                combine("({} + {})", number, number),
                combine("({} - {})", number, number),
                combine("-({})", number),
                combine("({} ? {} : {})", truth, number, number),
                combine("size({})", items),
                combine("size({})", text),
                combine("{}[0]", items),
            ),
            st.one_of(
                text,
                combine("string({} + {})", text, text),  # string(), since cel-python's sum of strings has no methods
                combine("({} ? {} : {})", truth, text, text),
            ),
            st.one_of(
                items,
                combine("[{}, {}]", number, number),
                combine("{}.filter(x, x > {})", items, literal),
                combine("{}.map(x, x + {})", items, literal),
            ),
            st.one_of(
                truth,
                combine("({} {} {})", number, comparison, number),
                combine("({} {} {})", text, comparison, text),
                combine("({} == {})", items, items),
                combine("({} && {})", truth, truth),
                combine("({} || {})", truth, truth),
                combine("({} && {} && {})", truth, truth, truth),
                combine("!({})", truth),
                combine("({} in {})", number, items),
                combine("({} in data.m)", text),
                combine("{}.contains({})", text, text),
                combine("{}.startsWith({})", text, text),
                combine("{}.all(x, x > {})", items, number),
                combine("{}.exists(x, x == {} || data.gone)", items, number),
                combine("{}.exists_one(x, x > {})", items, literal),
            ),
        )
    return st.one_of(truth, number, text, items)


ERROR = "error"


def ours(source: str, data: object) -> object:
    """The value, ERROR, or None where the source is refused: then there is nothing to compare."""
    try:
        evaluate = cel.function(source)
    except cel.CelError:
        return None
    try:
        return evaluate(None, data, {})
    except cel.EvaluationError:
        return ERROR


def theirs(source: str, data: object) -> object:
    environment = celpy.Environment()
    program = environment.program(environment.compile(source))
    try:
        return plain(program.evaluate({"data": json_to_cel(data)}))  # type: ignore[dict-item]
    except celpy.CELEvalError:
        return ERROR


def plain(value: Any) -> object:
    """A cel-python value as Python's own."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, celpy.celtypes.BoolType):
        return bool(value)
    if isinstance(value, celpy.celtypes.IntType):
        return int(value)
    return str(value) if isinstance(value, str) else value


@settings(max_examples=500, deadline=None)
@given(grammar(["0", "1", "2", "-3", "7"]))
def test_an_expression_over_whole_numbers_has_the_value_that_cel_python_gives(source: str) -> None:
    found = ours(source, DATA)
    if found is not None:
        assert found == theirs(source, DATA)


def mirrored(value: object) -> object:
    """The same data with every whole number written as 3.0."""
    if isinstance(value, dict):
        return {key: mirrored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [mirrored(item) for item in value]
    return Decimal(f"{value}.0") if type(value) is int else value


@settings(max_examples=500, deadline=None)
@given(grammar(["0", "2", "2.0", "0.1", "1e18", "-2.50"]))
def test_a_number_is_the_same_however_it_is_written(source: str) -> None:
    assert ours(source, DATA) == ours(source, mirrored(DATA))


@settings(max_examples=500, deadline=None)
@given(grammar(["0", "2", "2.0", "0.1", "1e18"]))
def test_the_fast_form_gives_what_the_exact_form_gives_or_fails(source: str) -> None:
    try:
        expression = cel.check(source)
    except cel.CelError:
        return
    try:
        fast = cel.python_function(expression, expression.fast)(None, DATA, {})
    except cel.FAILURES:
        return
    assert fast == cel.python_function(expression, expression.exact)(None, DATA, {})


SOURCES = grammar(["0", "2", "2.0", "0.1"])


@settings(max_examples=300, deadline=None)
@given(
    SOURCES, SOURCES, st.sampled_from([None, "data.yes", "data.m.i == 5", "data.m.s == 'other'", "!has(data.m.gone)"])
)
def test_a_fold_that_decodes_only_what_it_needs_gives_the_values_of_its_expressions(
    one: str, other: str, when: str | None
) -> None:
    columns = [{"name": name, "type": "json"} for name in ("one", "other")]
    rules = [{"type": "E", "set": {"one": one}}, {"type": "E", "set": {"other": other}, "when": when or "true"}]
    try:
        compiled = compile_fold(parse({"streams": ["s"], "columns": columns, "fold": rules}))
    except InvalidDefinitionError:
        return
    wanted = {"one": ours(one, DATA)} | ({"other": ours(other, DATA)} if ours(when or "true", DATA) else {})
    batch = compiled.batch()
    text = msgspec.json.encode({**DATA, "more": [{"price": 1.5}]})
    batch.fold("i", [Event(0, 1, "k", 1, "1", "E", dt.datetime(2026, 1, 1, tzinfo=dt.UTC), msgspec.Raw(text))])
    if ERROR in wanted.values():
        assert batch.changes == {}
        assert len(batch.parked) == 1
    else:
        assert batch.changes["k"].set == {name: to_json(value) for name, value in wanted.items()}


numbers = st.one_of(
    st.integers(-(10**18), 10**18).map(str),
    st.decimals(-(10**6), 10**6, places=4, allow_nan=False).map(lambda number: format(number, "f")),
    st.sampled_from(["0.1", "1e18", "2", "2.0", "0"]),
).map(lambda text: f"({text})")
arithmetic = st.recursive(
    numbers,
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda found: f"({' '.join(found)})"),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(arithmetic)
def test_sums_and_products_are_exact(source: str) -> None:
    fractions = ours(source, {})
    if fractions == ERROR:
        return  # beyond the digits that are kept

    exact = eval(re.sub(r"\d+(\.\d+)?(e\d+)?", r"Fraction('\g<0>')", source), {"Fraction": Fraction})
    assert Fraction(fractions) == exact  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="datx.'\"[](){}?:&|!=<>+-*/%,0123456789 \n\\inua", max_size=60))
def test_any_text_is_an_expression_or_refused_with_a_place(source: str) -> None:
    try:
        expression = cel.check(source)
    except cel.CelError as refused:
        place = (refused.line, refused.column)
    else:
        compile(expression.fast, "fast", "eval")
        compile(expression.exact, "exact", "eval")
        place = (1, 1)
    assert place >= (1, 1)
