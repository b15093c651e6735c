"""When a constant that is broadcast over a tensor is one number per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

from repfuse.ops.call import is_channel_axis
from repfuse.ops.meaning import Unfusible

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """The constant varies along ``axis`` alone; along none where it is one number."""

    axis: int | None


def channels_of(constant: Shape, x: Shape) -> Channels | Unfusible:
    """Return the axis of ``x`` along which a constant of this shape varies.

    Shapes are aligned at their last axes. The constant must not make the result larger than ``x``, for any size of
    ``x``: it has no more axes than ``x`` and varies along axis 1 or the last axis alone, with as many numbers as ``x``
    has there.
    """
    if len(constant) > len(x):
        return Unfusible("broadcast", f"a constant of shape {constant} enlarges a tensor of {len(x)} axes")
    if math.prod(constant) == 1:
        return Channels(None)
    aligned = (1,) * (len(x) - len(constant)) + constant
    varying = [axis for axis, size in enumerate(aligned) if size != 1]
    if len(varying) != 1 or not is_channel_axis(varying[0], len(x)) or aligned[varying[0]] != x[varying[0]]:
        return Unfusible("broadcast", f"a constant of shape {constant} is not one number per channel of {x}")
    return Channels(varying[0])
