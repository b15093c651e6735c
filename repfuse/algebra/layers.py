"""The maps that graph nodes stand for, as data: their geometry, and the names of the tensors that they read.

A name is that of a parameter or a buffer, ``block.conv.weight``, or that of a value computed from those alone
(``repfuse.recording.constants``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from repfuse.algebra.geometry import Fit, Geometry, Ints

# Which input channels each output channel of a map reads: what decides how many groups it really has.


Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Windows:
    """Output channel i reads input channels ``starts[i]`` to ``stops[i]`` (exclusive), at least one, out of ``inputs``.

    It need not read all of them: a window is what is known without the weights.
    """

    starts: Numbers
    stops: Numbers
    inputs: int

    @staticmethod
    def of(geometry: Geometry) -> Windows:
        """Windows of a convolution: the channels of its groups."""
        group = np.arange(geometry.out_channels) // (geometry.out_channels // geometry.groups)
        width = geometry.in_channels // geometry.groups
        return Windows(group * width, (group + 1) * width, geometry.in_channels)

    @staticmethod
    def concat(parts: Sequence[Windows]) -> Windows:
        """Windows of the output channels of all parts, one after the other; the parts have one input."""
        starts, stops = (np.concatenate(ends) for ends in zip(*((p.starts, p.stops) for p in parts), strict=True))
        return Windows(starts, stops, parts[0].inputs)

    def select(self, indices: Sequence[int]) -> Windows:
        """Windows of these output channels, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Windows(self.starts[chosen], self.stops[chosen], self.inputs)

    def union(self, other: Windows) -> Windows:
        """Windows of a sum: from the first channel that either reads to the last."""
        return Windows(np.minimum(self.starts, other.starts), np.maximum(self.stops, other.stops), self.inputs)

    def then(self, outer: Windows) -> Windows:
        """Windows of ``outer`` after this map: from the first channel that any channel of its window reads to the last.

        Output channels of one group share a window, which is looked up once.
        """
        keys = outer.starts * (outer.inputs + 1) + outer.stops
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        ends = np.stack([outer.starts[first], outer.stops[first]], axis=1).ravel()
        # reduceat takes a window to end where the next index is, and that index to exist.
        starts = np.minimum.reduceat(np.append(self.starts, 0), ends)[::2]
        stops = np.maximum.reduceat(np.append(self.stops, 0), ends)[::2]
        return Windows(starts[which], stops[which], self.inputs)

    def groups(self) -> int:
        """Return the largest number of groups, a divisor of inputs and outputs, whose blocks hold all windows."""
        outputs = len(self.starts)
        row = np.arange(outputs)
        most = math.gcd(self.inputs, outputs)
        candidates = np.arange(most, 1, -1)
        for groups in map(int, candidates[most % candidates == 0]):
            start = row // (outputs // groups) * (self.inputs // groups)
            if (start <= self.starts).all() and (self.stops <= start + self.inputs // groups).all():
                return groups
        return 1


@dataclass(frozen=True)
class Convolution:
    """A layer: a convolution, or, without spatial axes, a linear layer; ``weight`` and ``bias`` are names.

    ``order`` are the axes of the tensor ``weight`` in the order of the layer's, where its own is another; axes of size
    1 it need not have: the matrix of a product is that of a 1x1.
    """

    geometry: Geometry
    weight: str
    bias: str | None
    order: Ints = ()


@dataclass(frozen=True)
class Filter:
    """A layer: one fixed depthwise kernel whose taps are all ``value``.

    An average pool (``value`` 1 / taps), and with one tap of value 1 a pad, a crop or a step. What the layer pads with
    is ``fill``: a number, or the name of a tensor of one number per channel.
    """

    geometry: Geometry
    value: float
    fill: float | str = 0.0


@dataclass(frozen=True)
class Phases:
    """A layer: the taps of each channel, as channels of their own: space to depth.

    Of T taps, the t-th of channel c is number ``c * T + t``; the output has them in this ``order``, or in their own.
    Source: Shi et al., "Real-Time Single Image and Video Super-Resolution", arXiv 1609.05158, the inverse of its
    periodic shuffling.
    """

    geometry: Geometry
    order: Ints = ()

    @staticmethod
    def of(channels: int, blocks: Ints, order: Ints = ()) -> Phases:
        """Return the layer that takes each block of this many pixels apart."""
        outputs, none, ones = channels * prod(blocks), ((0, 0),) * len(blocks), (1,) * len(blocks)
        whole = tuple(frozenset({Fit(0, side)} if side > 1 else ()) for side in blocks)
        order = () if order == tuple(range(outputs)) else order
        groups = 1 if order else channels
        return Phases(Geometry(channels, outputs, blocks, blocks, none, ones, groups, fits=whole), order)


Layer = Convolution | Filter | Phases


def mixes(layer: Layer) -> bool:
    """Whether the layer computes: a convolution or a pool, and not only a pad, a crop or a step."""
    return isinstance(layer, Convolution) or (isinstance(layer, Filter) and prod(layer.geometry.kernel) > 1)


@dataclass(frozen=True)
class Normalisation:
    """A normalisation with frozen statistics, ``y = weight * (x - mean) / sqrt(var + eps) + bias``, by tensor names.

    Without ``mean`` and ``bias`` it is a scale alone. Source: Ioffe and Szegedy, "Batch Normalization", arXiv
    1502.03167, at inference.
    """

    mean: str | None
    var: str
    weight: str | None
    bias: str | None
    eps: float


@dataclass(frozen=True)
class Factor:
    """``y = times * by * x``; ``by`` is a number, or the name of a tensor of 1 or C numbers, and where that is
    ``inverse``, ``y = times * x / by``.
    """

    by: float | str
    inverse: bool = False
    times: float = 1.0


@dataclass(frozen=True)
class Offset:
    """``y = scale * x + factor * by``; ``by`` and ``scale`` are numbers, or names of tensors of 1 or C numbers."""

    by: float | str
    factor: float = 1.0
    scale: float | str = 1.0


Channelwise = Normalisation | Factor | Offset
"""One number per channel to multiply with, and one to add."""
