"""Tokens: both forms come back as they went in, and nothing else is taken for one."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refold import tokens
from refold.tokens import InvalidTokenError, Position

incarnations = st.text("0123456789abcdef", min_size=16, max_size=16)


@given(st.lists(st.builds(Position, incarnations, st.integers(0, 511), st.integers(0, 2**63 - 1)), max_size=5))
def test_a_token_names_the_latest_of_the_positions_that_it_was_made_of(positions: list[Position]) -> None:
    latest = {(one.incarnation, one.partition): one for one in sorted(positions)}
    assert tokens.decode(tokens.encode(positions)) == sorted(latest.values())


@given(incarnations, st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=512))
def test_a_token_of_all_partitions_names_each(incarnation: str, positions: list[int]) -> None:
    expected = [Position(incarnation, partition, position) for partition, position in enumerate(positions)]
    assert tokens.decode(tokens.encode_all(incarnation, positions)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "0", "now", "W1", "é", "0" * 16, "0" * 16 + ".", "0" * 16 + ".01", "0" * 16 + ".-1", "0" * 16 + ".1.",
     "0" * 16 + ".٣", "0" * 15 + ".1", "A" * 16 + ".1", "0" * 16 + "." + "9" * 20, "0" * 16 + ".1\n"],
)  # fmt: skip
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(InvalidTokenError):
        tokens.decode(text)


@given(st.text(max_size=40))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidTokenError):
        tokens.decode(text)
