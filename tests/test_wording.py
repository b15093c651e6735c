"""Pieces of messages: nothing is left out without being said, and nothing runs on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repfuse.checking.results import Level
from repfuse.wording import described, listed

NAMES = st.lists(st.text("abc.", min_size=1), max_size=20)


@given(NAMES, st.integers(1, 20))
def test_the_names_that_are_not_listed_are_counted(names: list[str], most: int) -> None:
    shown, _, more = listed(names, most).partition(", and ")
    assert shown == ", ".join(names[:most])
    assert more == (f"{len(names) - most} more" if len(names) > most else "")


@given(st.text())
def test_an_error_is_one_line_that_is_never_empty(text: str) -> None:
    said = described(ValueError(text))
    assert "\n" not in said
    assert said == "ValueError" or 0 < len(said.removeprefix("ValueError: ")) <= 200


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("\n it is negative \nand more"), "ValueError: it is negative "),
        (ValueError(), "ValueError"),
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError("x" * 300), f"ValueError: {'x' * 200}"),
    ],
)
def test_an_error_is_described_by_its_class_and_first_line(error: Exception, said: str) -> None:
    assert described(error) == said


def read(error: float, limit: float) -> tuple[str, str]:
    return Level(error, error).against(Level(limit, limit))


@pytest.mark.parametrize(
    ("error", "limit", "told"),
    [
        (2.1e-7, 1.3e-6, ("2.1e-07", "1.3e-06")),
        (1.04e-12, 1e-12, ("1.04e-12", "1.00e-12")),
        (1e-12, 1.04e-12, ("1.0e-12", "1.0e-12")),
        (0.0, 0.0, ("0", "0")),
        (float("inf"), 1.0, ("inf", "1.0e+00")),
    ],
)
def test_an_error_above_its_limit_never_reads_like_it(error: float, limit: float, told: tuple[str, str]) -> None:
    assert read(error, limit) == told


@given(st.floats(min_value=0, allow_infinity=False), st.floats(min_value=0, allow_infinity=False))
def test_what_is_read_never_contradicts_what_is(error: float, limit: float) -> None:
    told = read(error, limit)
    assert (float(told[0]) > float(told[1])) == (error > limit) or error <= limit


def test_of_two_norms_the_one_that_decides_is_shown() -> None:
    """In one norm within its limit, in the other above it: no sentence says the first."""
    assert Level(2e-3, 3e-3).against(Level(1e-4, 5e-3)) == ("2.0e-03", "1.0e-04")
    assert Level(1e-4, 6e-3).against(Level(2e-4, 5e-3)) == ("6.0e-03", "5.0e-03")
