"""Memory that is of no use any more and that the process still holds."""

from __future__ import annotations

import ctypes
import gc

from torch import nn

from repfuse.networks import named_tensors

LARGE = 32 * 2**20
"""Bytes of a network from which on it is worth the second that it can take to look for what is of no use."""


def give_back(network: nn.Module) -> None:
    """Free what only refers to itself, as traced networks do, and return to the system what is free.

    Only where ``network``, which is worked on, is large. glibc keeps freed memory, a network's worth after loading;
    elsewhere nothing is done about that.
    """
    if sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(network)) < LARGE:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
