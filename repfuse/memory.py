"""Memory that is of no use any more and that the process still holds."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Free what only refers to itself, as traced networks do, and return to the system what is free.

    glibc keeps freed memory, a network's worth after loading; elsewhere nothing is done about that.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
