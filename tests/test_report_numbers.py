"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repfuse.report import tables

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@given(st.integers(0, 10**17))
def test_a_count_says_the_number_to_half_a_percent(number: int) -> None:
    digits, _, prefix = tables.count(number).partition(" ")
    assert math.isclose(float(digits) * PREFIXES[prefix], number, rel_tol=0.006)


@given(st.integers(0, 2**49))
def test_a_size_says_the_bytes_to_half_a_percent(number: int) -> None:
    digits, _, prefix = tables.size(number).partition(" ")
    assert math.isclose(float(digits) * BINARY[prefix], number, rel_tol=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.3e-6, "12.3 µs"), (4.56e-3, "4.56 ms"), (7.891, "7.89 s"), (200, "3 min 20 s"), (math.inf, "inf s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


def test_a_hundred_percent_is_said_only_where_nothing_is_missing() -> None:
    assert tables.percent(1.0) == "100 %"
    assert tables.percent(1 - 1e-5) == "99.9990 %"
    assert tables.percent(0.9972) == "99.7 %"
    assert tables.percent(0.0) == "0.0 %"


@given(st.floats(0, 1, exclude_max=True))
def test_less_than_all_never_reads_as_100_percent(fraction: float) -> None:
    assert not tables.percent(fraction).startswith("100")


@pytest.mark.parametrize("render", [tables.count, tables.size, tables.error, tables.percent])
def test_nothing_known_is_a_dash(render) -> None:
    assert render(None) == "-"


def test_an_error_of_exactly_zero_is_told_from_a_small_one() -> None:
    assert tables.error(0.0) == "0"
    assert tables.error(4.2e-300) == "4.2e-300"
    assert tables.error(math.inf) == "inf"


def test_small_words() -> None:
    assert tables.shape((1, 3, 224, 224)) == "1x3x224x224"
    assert tables.shape(()) == "scalar"
    assert tables.plural(1, "site") == "1 site"
    assert tables.plural(0, "site") == "0 sites"
    assert tables.change("5", "1") == "5 → 1"
    assert tables.change("5", "5") == "5"
