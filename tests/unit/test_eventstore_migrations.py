"""The store's numbered SQL files."""

import pytest
from refold.eventstore import migrations
from refold.eventstore.migrations import Migration


@pytest.mark.parametrize("kind", ["store", "stream"])
def test_migrations_are_numbered_from_one_without_gaps(kind: str) -> None:
    loaded = migrations.load(kind)
    assert [migration.number for migration in loaded] == list(range(1, len(loaded) + 1))


def test_variables_are_quoted_as_what_they_stand_for() -> None:
    text = """create table :"schema".t (n integer default :number, t text default :'word')"""
    filled = Migration(1, "t", text).render({"schema": 'a"b', "number": 3, "word": "it's"})
    assert filled == """create table "a""b".t (n integer default 3, t text default 'it''s')"""


@pytest.mark.parametrize(
    "text", ["select 1::bigint", "select a[b:c]", "select x := 1", "select 'a:b'", "select ':' || x"]
)
def test_casts_slices_and_assignments_are_left_alone(text: str) -> None:
    assert Migration(1, "t", text).render({}) == text


def test_an_unknown_variable_is_an_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        Migration(1, "t", 'select :"nothing"').render({"schema": "s"})
