"""One spatial axis of a map: its taps, evenly spaced offsets, and what becomes of the taps of two maps."""

from __future__ import annotations

import math
from collections.abc import Iterable


def spread(offsets: Iterable[int]) -> range:
    """Return the smallest evenly spaced set that holds these offsets; a single one has spacing 1."""
    found = sorted(set(offsets))
    step = math.gcd(*(offset - found[0] for offset in found)) or 1
    return range(found[0], found[-1] + 1, step)


def composed(inner: range, stride: int, outer: range) -> range:
    """Return the taps of ``outer`` after ``inner``, which has this stride.

    Position r of the inner output reads ``stride * r + t``, and position q of the outer one reads r = q * step + u: it
    reads ``t + stride * u`` beyond ``stride * step * q``.
    """
    return spread(t + stride * u for t in inner for u in outer)


def window(own: range, among: range) -> slice:
    """Return where the taps ``own`` are in ``among``, which holds them all."""
    return slice(
        (own[0] - among[0]) // among.step,
        (own[-1] - among[0]) // among.step + 1,
        max(own.step // among.step, 1),
    )
