"""The algebra of affine maps: tensors only, no graph.

A map is ``y = W ⋆ x + b``. Two facts carry everything (source: linearity of the convolution; Ding et al., "RepVGG",
arXiv 2101.03697, section 3.3):

    (W1 ⋆ x + b1) + (W2 ⋆ x + b2) = (W1 + W2) ⋆ x + (b1 + b2)       after both kernels are laid on the union of their taps
    s * (W ⋆ x + b) + t           = (s W) ⋆ x + (s b + t)           with s, t one number per output channel

Weights are float64 until the last step, so that only one rounding, the final cast, separates the result from exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name everyone knows

from repfuse.geometry import Geometry

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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
        total = Accumulator(geometry, weight.device)
        total.add(geometry, weight, bias)
        return total.result()

    def add(self, other: AffineConv) -> AffineConv:
        """Return ``x -> self(x) + other(x)``. Raises NotAffine where no single convolution equals it."""
        total = Accumulator(self.geometry.add(other.geometry), self.weight.device)
        total.add(self.geometry, self.weight, self.bias)
        total.add(other.geometry, other.weight, other.bias)
        return total.result()

    def scale(self, scale: Tensor, shift: Tensor | None = None) -> AffineConv:
        """Return ``x -> scale * self(x) + shift`` with ``scale`` and ``shift`` of shape ``[C_out]``."""
        total = Accumulator(self.geometry, self.weight.device)
        total.add(self.geometry, self.weight, self.bias, scale)
        if shift is not None:
            total.bias += shift
        return total.result()

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


class Accumulator:
    """A sum of maps of one source, laid on one geometry. Holds one float64 weight, whatever the number of terms."""

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self.geometry = geometry
        self.device = device
        self.bias = torch.zeros(geometry.out_channels, dtype=torch.float64, device=device)
        self._weight: Tensor | None = None

    def add(self, geometry: Geometry, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Add ``scale * (weight ⋆ x + bias)``; ``geometry`` must be one that the sum covers."""
        rows = None if scale is None else scale.to(torch.float64).view(-1, *[1] * (weight.dim() - 1))
        if self._weight is None and geometry == self.geometry:
            # The first and largest term needs no zeros to be added to: one pass converts and scales it.
            self._weight = weight.to(torch.float64, copy=True) if rows is None else weight * rows
        else:
            term = weight if rows is None else weight * rows
            _lay(self._full(), self.geometry, term, geometry)
        if bias is not None:
            self.bias += bias.to(torch.float64) if scale is None else bias * scale

    def result(self) -> AffineConv:
        """Return the sum."""
        return AffineConv(self.geometry, self._full(), self.bias)

    def _full(self) -> Tensor:
        if self._weight is None:
            self._weight = torch.zeros(self.geometry.weight_shape, dtype=torch.float64, device=self.device)
        return self._weight


def _lay(total: Tensor, on: Geometry, weight: Tensor, geometry: Geometry) -> None:
    """Add ``weight`` of ``geometry`` into ``total`` of geometry ``on``, in place: align taps, then groups."""
    taps = tuple(
        slice((own[0] - all_[0]) // all_.step, (own[-1] - all_[0]) // all_.step + 1, max(own.step // all_.step, 1))
        for own, all_ in zip(geometry.taps, on.taps, strict=True)
    )
    window = total[(slice(None), slice(None), *taps)]
    if geometry.groups == on.groups:
        window += weight
        return
    # A kernel of g * r groups is block-diagonal among g groups: r blocks on the diagonal of an r x r grid.
    blocks = geometry.groups // on.groups
    per_block = (geometry.out_channels // geometry.groups, geometry.in_channels // geometry.groups)
    grid = window.unflatten(1, (blocks, per_block[1])).unflatten(0, (on.groups, blocks, per_block[0]))
    diagonal = grid.diagonal(dim1=1, dim2=3)
    diagonal += weight.unflatten(0, (on.groups, blocks, per_block[0])).movedim(1, -1)
