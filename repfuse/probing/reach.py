"""Where the taps of a block lie: how far its answer to an impulse reaches."""

from __future__ import annotations

import torch

from repfuse.probing.axes import Axis, Pad, Spread, Window
from repfuse.probing.box import Box, Refused
from repfuse.probing.probes import grid, impulses, numbers, without_bias
from repfuse.probing.sizes import Growth, growths, smallest

WIDEST = {0: (1, 1), 1: (65, 257, 1025), 2: (33, 65, 97), 3: (17, 33)}
"""Sizes at which the reach of a kernel is looked for, by number of axes."""

NOTHING = 2.0**-46
"""Relative to the largest answer: below it is rounding."""


def axes_of(box: Box) -> tuple[Axis, ...]:
    """Return where the taps lie, once a larger input shows no more of them than a smaller one."""
    grown = growths(box)
    margin = 2 * max((growth.stride for growth in grown), default=0)
    before = None
    for size in WIDEST[box.ndim]:
        found = [_reach(offsets) for offsets in _offsets(box, grown, max(size, smallest(box) + margin))]
        if found == before and all(reach is not None for reach in found):
            return tuple(_axis(growth, *reach) for growth, reach in zip(grown, found, strict=True) if reach)
        before = found
    raise Refused(f"its answer to an impulse reaches further than {WIDEST[box.ndim][0] // 2} places")


Offsets = dict[int, bool]
"""By offset, whether anything answers there."""


def _offsets(box: Box, grown: tuple[Growth, ...], size: int) -> list[Offsets]:
    """Return at which offsets ``p * up - q * stride`` output q answers impulses at places p in the middle."""
    generator = torch.Generator().manual_seed(0)
    positions = grid([range(size // 2, size // 2 + growth.stride) for growth in grown])
    probes = impulses(numbers(generator, 1, box.channels), (size,) * box.ndim, positions)
    answers = (without_bias(box, probes)).abs().amax(1)
    if not float(answers.max()) > 0:
        raise Refused("it does not answer an impulse")
    answered = answers > NOTHING * answers.max()
    found: list[Offsets] = [{} for _ in grown]
    for place, one in zip(positions, answered, strict=True):
        for axis, growth in enumerate(grown):
            others = [other for other in range(box.ndim) if other != axis]
            for q, there in enumerate((one.sum(others) > 0).tolist() if others else one.tolist()):
                offset = place[axis] * growth.up - q * growth.stride
                found[axis][offset] = found[axis].get(offset, False) or there
    return found


def _reach(offsets: Offsets) -> tuple[int, int] | None:
    """Return the first and last offset with an answer; None where there may be more beyond what was seen."""
    there = [offset for offset, answers in offsets.items() if answers]
    first, last = min(there, default=0), max(there, default=0)
    return (first, last) if min(offsets) < first and last < max(offsets) else None


def _axis(growth: Growth, first: int, last: int) -> Axis:
    kernel = last - first + 1
    if growth.up > 1:
        return Spread(kernel, growth.up, last, growth.slack)
    return Window(kernel, growth.stride, 1, (Pad(-first, growth.slack + kernel + first),))
