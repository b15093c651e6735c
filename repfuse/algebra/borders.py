"""The law of borders: what a map that pads meets beyond the output of the map before it.

Think of x as continued by zeros without end; then a map has values beyond its output too. Padding its output with
zeros is exact only where those values are zero, and padding with a number only where they are that number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repfuse.algebra.geometry import Geometry


def common_mode(inner: Geometry, outer: Geometry) -> str | None:
    """Return the padding mode of ``outer`` after ``inner``; None where no single convolution pads like that.

    A padding that copies pixels, as all modes but zeros do, commutes with a map of single pixels, shift included.
    Padding first and then reading what is there, as ``outer`` without padding does, is the composition already.
    Nothing else is claimed: on axes that ``outer`` does not pad, and where it crops, more would be exact.
    """
    if outer.padding_mode != "zeros" and not outer.keeps_edges:
        pixelwise = inner.keeps_edges and set(inner.kernel + inner.stride) <= {1}
        return outer.padding_mode if pixelwise else None
    if inner.padding_mode != "zeros" and not inner.keeps_edges:
        return inner.padding_mode if outer.keeps_edges else None
    return "zeros"


def constant_around(inner: Geometry, outer: Geometry) -> bool:
    """Whether ``inner``, its input continued by zeros, is constant wherever ``outer`` reads beyond its output."""
    return all(
        (before <= 0 or constant_before(own, stride, outer_taps, step)) and (after <= 0 or constant_after(own, slack))
        for own, stride, slack, outer_taps, step, (before, after) in zip(
            inner.taps, inner.stride, inner.slack, outer.taps, outer.stride, outer.padding, strict=True
        )
    )


def constant_before(inner: range, stride: int, outer: range, step: int) -> bool:
    """Whether the inner map is constant at every position r < 0 that ``outer``, of stride ``step``, reads.

    Outer tap u reads r = step * q + u with q >= 0; the last such r < 0 is ``u mod step - step``. All inner taps there
    are before the input exactly where ``stride * r + last tap < 0``.
    """
    return all(stride * (u % step - step) + inner[-1] < 0 for u in outer if u < 0)


def constant_after(inner: range, slack: int) -> bool:
    """Whether the inner map, continued beyond its m output positions, is constant from position m on.

    With n inputs, m = floor((n + slack) / stride) + 1, so ``stride * m >= n + slack + 1``, with equality for one n in
    each ``stride``. All taps at m are after the input, ``stride * m + first tap >= n``, for every n exactly where
    ``slack + 1 + first tap >= 0``. Whatever the stride of an outer map that pads here, it reads m for some n.
    """
    return slack + 1 + inner[0] >= 0
