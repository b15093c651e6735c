"""A transposed convolution: affine and linear in its weight, but no shift-equivariant map of its input.

It spreads each input pixel over the output, so neither sums nor compositions with convolutions are one convolution
again. What multiplies its output channels does go into its weight:

    s * (W ⋆ᵀ x + b) + t = (s W) ⋆ᵀ x + (s b + t)       with s, t one number per output channel
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from repfuse.algebra.affine import Addend
from repfuse.algebra.geometry import Geometry, Ints, NotAffine


@dataclass(frozen=True)
class TransposedGeometry(Geometry):
    """Geometry of ``F.conv_transpose*d`` with W of shape ``[in_channels, out_channels / groups, *kernel]``.

    ``output_padding`` is what is added to the output size after it.
    """

    output_padding: Ints = ()

    @property
    def weight_shape(self) -> Ints:
        """Shape of the weight, ``[in_channels, out_channels / groups, *kernel]``."""
        return (self.in_channels, self.out_channels // self.groups, *self.kernel)

    @property
    def _growth(self) -> Ints:
        """What is added to ``(n - 1) * stride`` for the output size, per axis."""
        axes = zip(self.padding, self.dilation, self.kernel, self.output_padding, strict=True)
        return tuple(d * (k - 1) + extra + 1 - before - after for (before, after), d, k, extra in axes)

    @property
    def smallest_input(self) -> Ints:
        """The smallest input size that has an output."""
        return tuple(1 + max(0, math.ceil((1 - a) / s)) for a, s in zip(self._growth, self.stride, strict=True))

    def output_size(self, size: Ints) -> Ints:
        """Spatial size of the output for an input of spatial size ``size``."""
        return tuple((n - 1) * s + a for n, s, a in zip(size, self.stride, self._growth, strict=True))

    def macs(self, source: Ints, output: Ints) -> int:  # noqa: ARG002
        """Multiply-accumulates from shape ``source`` on: every input pixel meets the whole kernel."""
        return math.prod(source) * math.prod(self.weight_shape[1:])

    def check_equivariant(self) -> None:
        """Raise NotAffine: this map does not add up or compose with convolutions."""
        raise NotAffine("transposed-convolution", f"{self.describe()} in a sum, or beside another layer in a row")

    def describe(self) -> str:
        """Return a short name for people."""
        return f"transposed {super().describe()}"


def scaled_outputs(addend: Addend) -> Tensor:
    """Return the weight of ``scale * map`` in float64; the output channels are axis 1, by groups along axis 0."""
    weight = addend.weight.to(torch.float64)
    if addend.scale is None:
        return weight
    groups = addend.geometry.groups
    by_group = weight.unflatten(0, (groups, -1))  # type: ignore[no-untyped-call]
    scale = addend.scale.view(groups, 1, -1, *[1] * addend.geometry.ndim)
    return torch.flatten(by_group * scale, 0, 1)
