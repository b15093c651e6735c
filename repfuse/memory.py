"""Memory that is of no use any more and that the process still holds."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

import torch
from torch import Tensor, fx, nn

from repfuse.networks import keep_attributes, named_tensors

APART = 4 * 2**20
"""Bytes of a block of memory from which on glibc is to fetch it from the system by itself and give it back at once."""
M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 32 * 2**20
"""Bytes of a network from which on it is worth the second that it can take to look for what is of no use."""
HUGE = 256 * 2**20
"""Bytes of the tensors of a graph from which on they are read one at a time, and never all at once."""
STREAMED = "streamed_by_repfuse"


def keep_little() -> None:
    """Let glibc keep no large block that was freed; elsewhere nothing is done.

    By itself it learns from what is freed to keep blocks of up to 32 MiB, which is every layer in float64.
    """
    glibc("mallopt", M_MMAP_THRESHOLD, APART)


def give_back(network: nn.Module, *, circles: bool = True) -> None:
    """Return to the system what is free, once what only refers to itself, as recorded networks do, is free, too.

    Only where ``network``, which is worked on, is large. To look for ``circles`` takes as long as all else. glibc keeps
    freed memory, a network's worth after loading; elsewhere nothing is done about that.
    """
    if is_large(network):
        if circles:
            gc.collect()
        glibc("malloc_trim", 0)


def is_large(network: nn.Module) -> bool:
    """Whether it is worth time to hold little of a network at once."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(network)) >= LARGE


def stream(network: fx.GraphModule) -> None:
    """Let whoever copies or rewrites ``network``, whose graph writes nowhere, hold few of its tensors at a time."""
    keep_attributes(network, {STREAMED: True})


def is_streamed(network: nn.Module) -> bool:
    """Whether few of a network's tensors are to be held at a time."""
    return getattr(network, STREAMED, False)


def put_aside(tensor: Tensor) -> Tensor:
    """Return a tensor with the same numbers in a file that goes with it: the system reads them as it needs them.

    The tensor itself where there is no room for such a file.
    """
    numbers = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
    try:
        with TemporaryFile() as file:
            file.write(numbers)
            file.flush()
            mapped = mmap.mmap(file.fileno(), len(numbers), access=mmap.ACCESS_COPY)
    except OSError:
        return tensor
    return torch.frombuffer(mapped, dtype=tensor.dtype).reshape(tensor.shape)


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


def glibc(name: str, *arguments: int) -> None:
    """Call a function of glibc, where that is the C library."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
