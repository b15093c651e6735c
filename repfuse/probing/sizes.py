"""How the size of the output follows that of the input: the stride, or by how much a map spreads its input.

A convolution has ``m = (n + slack) // stride + 1`` outputs, a transposed one ``m = (n - 1) * up + growth``. So m grows
by 1 every ``stride`` sizes, or by ``up`` at each.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from repfuse.probing.box import Box, Refused

STARTS: tuple[int, ...] = (*range(1, 9), *range(10, 33, 2), *range(40, 129, 8))
MOST_STEPS = 64


@dataclass(frozen=True)
class Growth:
    """Of one axis: ``stride`` and ``slack`` of a convolution where ``up`` is 1, else ``up`` and ``growth``."""

    stride: int
    up: int
    slack: int

    @property
    def phases(self) -> int:
        """How many places in a row show all the taps between them."""
        return self.stride


def smallest(box: Box) -> int:
    """Return the smallest size at which the block gives something."""
    for size in STARTS:
        if box.runs((size,) * box.ndim):
            return size
    raise Refused(f"it gives nothing at any size up to {STARTS[-1]}")


def growths(box: Box) -> tuple[Growth, ...]:
    """Return how each axis grows. Raises Refused where it does not do so as the axis of a convolution does."""
    if not box.ndim:
        return ()
    first = smallest(box)
    counted = [_outputs(box, first)]
    while len(counted) <= 2 * MOST_STEPS:
        counted.append(_outputs(box, first + len(counted)))
        found = [_growth(first, [m[axis] for m in counted]) for axis in range(box.ndim)]
        known = tuple(growth for growth in found if growth is not None)
        if len(known) == box.ndim:
            return known
    raise Refused("its output does not grow with its input as that of a convolution does")


def _outputs(box: Box, size: int) -> tuple[int, ...]:
    return tuple(box(box.zeros((size,) * box.ndim)).shape[2:])


def _growth(first: int, counted: list[int]) -> Growth | None:
    """Return what these outputs, at sizes from ``first`` on, say; None where they do not say it yet."""
    steps = [later - earlier for earlier, later in itertools.pairwise(counted)]
    grown = [index for index, step in enumerate(steps) if step]
    if len(steps) < 3 or len(grown) < 2:
        return None
    if len(set(steps)) == 1 and steps[0] > 1:
        return Growth(1, steps[0], counted[0] - (first - 1) * steps[0])
    stride = grown[1] - grown[0]
    even = all(steps[index] == 1 for index in grown) and {b - a for a, b in itertools.pairwise(grown)}
    if even != {stride}:
        raise Refused("its output does not grow with its input as that of a convolution does")
    index = grown[0] + 1
    return Growth(stride, 1, stride * (counted[index] - 1) - (first + index))
