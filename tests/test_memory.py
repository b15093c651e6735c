"""What is of no use is given back: by a process that works on a large network."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
from conftest import Run
from torch import nn

from repfuse import memory


class Cycle:
    """Refers to itself, and so stays until somebody looks for it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("large", [True, False])
def test_it_looks_for_what_refers_to_itself_where_the_network_is_large(large: bool) -> None:
    network = nn.Linear(memory.LARGE // 4 if large else 4, 1, device="meta")
    gc.disable()
    try:
        found = weakref.ref(Cycle())
        memory.give_back(network)
        assert (found() is None) == large
    finally:
        gc.enable()


@pytest.mark.parametrize("platform", ["linux", "win32", "darwin"])
def test_another_c_library_is_left_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _name: called.append(platform))
    memory.keep_little()
    memory.give_back(nn.Linear(memory.LARGE // 4, 1, device="meta"))
    assert called == (["linux"] * 2 if platform == "linux" else [])


FREEING = """
from pathlib import Path

import torch

from repfuse import memory


def resident():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


memory.keep_little()
before = resident()
held = [torch.ones(2 * memory.APART // 4) for _ in range(16)]
assert resident() - before > 100 * 2**20
del held
assert resident() - before < 30 * 2**20
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_goes_back(python: Run) -> None:
    """In a process of its own: what others freed before has holes, which are filled first."""
    done = python("-c", FREEING, bare=True)
    assert done.returncode == 0, done.stderr
