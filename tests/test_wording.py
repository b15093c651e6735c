"""Pieces of messages: nothing is left out without being said, and nothing runs on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repfuse.wording import LINE, described, first_line, listed

NAMES = st.lists(st.text("abc.", min_size=1), max_size=20)


@given(NAMES, st.integers(1, 20))
def test_the_names_that_are_not_listed_are_counted(names: list[str], most: int) -> None:
    shown, _, more = listed(names, most).partition(", and ")
    assert shown == ", ".join(names[:most])
    assert more == (f"{len(names) - most} more" if len(names) > most else "")


@given(st.text())
def test_an_error_is_one_line_that_is_never_empty(text: str) -> None:
    line = first_line(ValueError(text))
    assert line
    assert "\n" not in line
    assert len(line) <= LINE


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("\n it is negative \nand more"), "ValueError: it is negative "),
        (ValueError(), "ValueError"),
        (KeyError("a"), "KeyError: 'a'"),
    ],
)
def test_an_error_is_described_by_its_class_and_first_line(error: Exception, said: str) -> None:
    assert described(error) == said
