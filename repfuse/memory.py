"""Memory that is of no use any more and that the process still holds."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from repfuse.networks import named_tensors

APART = 4 * 2**20
"""Bytes of a block of memory from which on glibc is to fetch it from the system by itself and give it back at once."""
M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 32 * 2**20
"""Bytes of a network from which on it is worth the second that it can take to look for what is of no use."""


def keep_little() -> None:
    """Let glibc keep no large block that was freed; elsewhere nothing is done.

    By itself it learns from what is freed to keep blocks of up to 32 MiB, which is every layer in float64.
    """
    _call("mallopt", M_MMAP_THRESHOLD, APART)


def give_back(network: nn.Module) -> None:
    """Free what only refers to itself, as recorded networks do, and return to the system what is free.

    Only where ``network``, which is worked on, is large. glibc keeps freed memory, a network's worth after loading;
    elsewhere nothing is done about that.
    """
    if sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(network)) < LARGE:
        return
    gc.collect()
    _call("malloc_trim", 0)


@contextmanager
def collecting_later() -> Iterator[None]:
    """Look for what only refers to itself no more than before: a graph of thousands of nodes makes Python look often,
    through all that torch has loaded, which takes as long as the work itself.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _call(name: str, *arguments: int) -> None:
    """Call a function of glibc, where that is the C library."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
