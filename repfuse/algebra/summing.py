"""A sum of weights on their common taps and groups, in float64 and rounded once, in little memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repfuse.algebra.geometry import Geometry, window

_BLOCK = 1 << 19
"""Numbers of a weight that are summed at a time: 4 MB in float64, in the cache of most processors."""


@dataclass(frozen=True)
class Addend:
    """``scale * weight``, laid out as ``geometry`` says; ``weight`` in any dtype, ``scale`` float64 ``[C_out]``."""

    geometry: Geometry
    weight: Tensor
    scale: Tensor | None = None

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return these rows of the scaled weight in float64, in ``out`` if given."""
        rows = self.weight[start:stop]
        exact = rows.to(torch.float64) if out is None else out.copy_(rows)
        if self.scale is None:
            return exact
        scale = self.scale[start:stop].view(-1, *[1] * (rows.dim() - 1))
        return exact * scale if out is None else exact.mul_(scale)


def sum_weights(geometry: Geometry, addends: Sequence[Addend], into: Tensor) -> None:
    """Sum the addends on their common ``geometry`` in float64, and round the sum once, into ``into`` of any dtype.

    Goes by blocks of output channels, so that float64 never takes more memory than one block.
    """
    # Rows of a kernel of more groups than the sum come in blocks that must not be torn apart.
    apart = [a.geometry.groups for a in addends if a.geometry.groups != geometry.groups]
    unit = math.lcm(1, *(geometry.out_channels // groups for groups in apart))
    per_row = math.prod(geometry.weight_shape[1:])
    step = max(_BLOCK // (per_row * unit), 1) * unit
    buffer = torch.empty((min(step, geometry.out_channels), *into.shape[1:]), dtype=torch.float64, device=into.device)
    whole = [addend for addend in addends if addend.geometry == geometry]
    partial = [addend for addend in addends if addend.geometry != geometry]
    for start in range(0, geometry.out_channels, step):
        stop = min(start + step, geometry.out_channels)
        block = buffer[: stop - start]
        if whole:
            whole[0].rows(start, stop, out=block)
        else:
            block.zero_()
        for addend in whole[1:]:
            block += addend.rows(start, stop)
        for addend in partial:
            _lay(block, geometry, addend.rows(start, stop), addend.geometry, start)
        into[start:stop] = block


def _lay(block: Tensor, on: Geometry, rows: Tensor, geometry: Geometry, start: int) -> None:
    """Add ``rows`` of a kernel of ``geometry`` into ``block`` of one of geometry ``on``: align taps, then groups.

    Both begin at output channel ``start``.
    """
    taps = map(window, geometry.taps, on.taps)
    place = block[(slice(None), slice(None), *taps)]
    if geometry.groups == on.groups:
        place += rows
        return
    # Group j of a kernel of g * r groups reads the input channels of part j % r of its group among the g.
    parts = geometry.groups // on.groups
    height = geometry.out_channels // geometry.groups
    grid = place.unflatten(1, (parts, -1)).unflatten(0, (-1, height))  # type: ignore[no-untyped-call]
    group = torch.arange(grid.shape[0], device=block.device)
    grid[group, :, (group + start // height) % parts] += rows.unflatten(0, (-1, height))  # type: ignore[no-untyped-call]
