"""The algebra of affine maps: tensors only, no graph.

A map is ``y = W ⋆ x + b``. Two facts carry everything (source: linearity of the convolution; Ding et al., "RepVGG",
arXiv 2101.03697, section 3.3):

    (W1 ⋆ x + b1) + (W2 ⋆ x + b2) = (W1 + W2) ⋆ x + (b1 + b2)       after both kernels are laid on the union of their
    taps s * (W ⋆ x + b) + t           = (s W) ⋆ x + (s b + t)           with s, t one number per output channel

Weights are float64 until the last step, so that only one rounding, the final cast, separates the result from exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from repfuse.algebra.geometry import Geometry

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

_BLOCK = 1 << 19
"""Numbers of a weight that are summed at a time: 4 MB in float64, in the cache of most processors."""


@dataclass(frozen=True)
class AffineConv:
    """The map ``y = W ⋆ x + b``: ``weight`` ``[C_out, C_in / groups, *K]`` and ``bias`` ``[C_out]``, both float64."""

    geometry: Geometry
    weight: Tensor
    bias: Tensor

    @staticmethod
    def identity(channels: int, ndim: int) -> AffineConv:
        """Return ``y = x`` for ``[N, channels, *ndim axes]``: a depthwise 1x1 kernel of ones."""
        geometry = Geometry.identity(channels, ndim)
        weight = torch.ones(geometry.weight_shape, dtype=torch.float64)
        return AffineConv(geometry, weight, torch.zeros(channels, dtype=torch.float64))

    @staticmethod
    def convolution(geometry: Geometry, weight: Tensor, bias: Tensor | None = None) -> AffineConv:
        """Return the map of a convolution with these weights, in any floating dtype."""
        zeros = torch.zeros(geometry.out_channels, dtype=torch.float64, device=weight.device)
        return AffineConv(geometry, weight.double(), zeros if bias is None else bias.double())

    def add(self, other: AffineConv) -> AffineConv:
        """Return ``x -> self(x) + other(x)``. Raises NotAffine where no single convolution equals it."""
        geometry = self.geometry.add(other.geometry)
        weight = self.weight.new_empty(geometry.weight_shape)
        sum_weights(geometry, [Addend(self.geometry, self.weight), Addend(other.geometry, other.weight)], weight)
        return AffineConv(geometry, weight, self.bias + other.bias)

    def scale(self, scale: Tensor, shift: Tensor) -> AffineConv:
        """Return ``x -> scale * self(x) + shift`` with ``scale`` and ``shift`` of shape ``[C_out]``."""
        weight = torch.empty_like(self.weight)
        sum_weights(self.geometry, [Addend(self.geometry, self.weight, scale)], weight)
        return AffineConv(self.geometry, weight, scale * self.bias + shift)

    def apply(self, x: Tensor) -> Tensor:
        """Apply the map to ``x`` of shape ``[N, C_in, *axes]``, in the dtype of ``x``."""
        geometry = self.geometry
        padded = pad_explicitly(x, geometry)
        return _CONVOLUTIONS[geometry.ndim](
            padded,
            self.weight.to(x.dtype),
            self.bias.to(x.dtype),
            geometry.stride,
            0,
            geometry.dilation,
            geometry.groups,
        )


def pad_explicitly(x: Tensor, geometry: Geometry) -> Tensor:
    """Pad ``x`` as ``geometry`` says, so that a convolution without padding follows."""
    if not geometry.pads:
        return x
    flat = [amount for pair in reversed(geometry.padding) for amount in pair]
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, flat, mode=mode)


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
    taps = tuple(
        slice((own[0] - all_[0]) // all_.step, (own[-1] - all_[0]) // all_.step + 1, max(own.step // all_.step, 1))
        for own, all_ in zip(geometry.taps, on.taps, strict=True)
    )
    window = block[(slice(None), slice(None), *taps)]
    if geometry.groups == on.groups:
        window += rows
        return
    # Group j of a kernel of g * r groups reads the input channels of part j % r of its group among the g.
    parts = geometry.groups // on.groups
    height = geometry.out_channels // geometry.groups
    grid = window.unflatten(1, (parts, -1)).unflatten(0, (-1, height))  # type: ignore[no-untyped-call]
    group = torch.arange(grid.shape[0], device=block.device)
    grid[group, :, (group + start // height) % parts] += rows.unflatten(0, (-1, height))  # type: ignore[no-untyped-call]
