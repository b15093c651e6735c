"""JSON of strangers: what Python reads as one thing and another reader as another is refused, and so is too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repfuse.checkpoint.files import parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(VALUES)
def test_what_python_writes_is_read_as_it_was(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=True).encode()) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 1}', "'a' stands twice"),
        ('[{"b": {"c": 1, "d": 2, "c": 3}}]', "'c' stands twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1,}', "line 1"),
        ("", "line 1"),
    ],
)
def test_what_is_no_json_says_why(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_bytes_that_are_no_text_are_no_json() -> None:
    with pytest.raises(ValueError, match="it is no text"):
        parse_json(b'{"a": "\xff"}')


def test_a_file_is_read_up_to_its_limit_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]" + " " * (2**20 - 3))
    assert read_json(path, 2**20) == [1]
    path.write_text("[1]" + " " * (2**20 - 2))
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        read_json(path, 2**20)
