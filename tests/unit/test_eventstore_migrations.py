"""The store's numbered SQL files."""

import hashlib

import pytest
from refold.eventstore import migrations
from refold.eventstore.migrations import Migration


@pytest.mark.parametrize("kind", ["store", "stream"])
def test_migrations_are_numbered_from_one_without_gaps(kind: str) -> None:
    loaded = migrations.load(kind)
    assert [migration.number for migration in loaded] == list(range(1, len(loaded) + 1))


@pytest.mark.parametrize(
    ("kind", "number", "digest"),
    [
        ("store", 1, "ef633a020b62ecddd74fed47f1536317a00a5b823cb1f751e4b65427e1ce1fe8"),
        ("stream", 1, "d1665084af755b6431991135899ddf312e61bdd51238b64a91fd70b8bd8961a2"),
        ("stream", 2, "1a3396ad398e38d7646ba343260a59222dd0409b04848e97927d6904e9f1183b"),
    ],
)
def test_a_migration_that_was_released_is_never_changed(kind: str, number: int, digest: str) -> None:
    text = migrations.load(kind)[number - 1].text
    assert hashlib.sha256(text.encode()).hexdigest() == digest


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
