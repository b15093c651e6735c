"""Damaged files of each format: they load, or are one message. Never another error, and never much memory or time.

`make fuzz` goes on for minutes.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile.mutating import BESIDE, FORMATS, Beside, damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repfuse.errors import RepfuseError
from repfuse.loading import load

SECONDS = 5.0
GROWN = 700 << 20  # bytes; what a file may ask for is 256 MiB, and it may do so while the last one is still held


def check(name: str, examples: int, folder: Path, *, derandomize: bool) -> None:
    make, options = FORMATS[name]
    beside, good = BESIDE.get(name, Beside()), make()
    path = folder / beside.name
    beside.prepare(folder)
    path.write_bytes(good)
    beside.by(folder / beside.loads, **options)  # the control: undamaged, it loads
    outcomes = {"loaded": 0, "refused": 0}

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(good))
    def one(data: bytes) -> None:
        path.write_bytes(data)
        outcomes[outcome(folder / beside.loads, options, beside.by)] += 1

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 < GROWN
    assert all(outcomes.values()), outcomes  # the damage is neither always fatal nor never noticed


def outcome(path: Path, options: dict[str, Any], by: Callable[..., Any] = load) -> str:
    started = time.process_time()
    try:
        by(path, **options)
    except RepfuseError as error:
        assert error.exit_code == 2
        assert error.hint
        assert "does not expect" not in str(error)
        return "refused"
    finally:
        assert time.process_time() - started < SECONDS
    return "loaded"


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_load_or_are_refused(name: str, tmp_path: Path) -> None:
    check(name, 80, tmp_path, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files_load_or_are_refused(name: str, tmp_path: Path) -> None:
    check(name, 5000, tmp_path, derandomize=False)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in BESIDE])
@given(data=st.binary(max_size=300))
@settings(suppress_health_check=list(HealthCheck), derandomize=True)
def test_a_beginning_and_then_anything(name: str, data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "in"
    path.write_bytes(FORMATS[name][0]()[:16] + data)
    assert outcome(path, FORMATS[name][1]) == "refused"
