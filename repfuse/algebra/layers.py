"""The maps that graph nodes stand for, as data: their geometry, and the names of the tensors that they read.

A name is that of a parameter or a buffer, ``block.conv.weight``, or that of a value computed from those alone
(``repfuse.recording.constants``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from repfuse.algebra.geometry import Geometry


@dataclass(frozen=True)
class Convolution:
    """A layer: a convolution, or, without spatial axes, a linear layer; ``weight`` and ``bias`` are names."""

    geometry: Geometry
    weight: str
    bias: str | None


@dataclass(frozen=True)
class Filter:
    """A layer: one fixed depthwise kernel whose taps are all ``value``.

    An average pool (``value`` 1 / taps), and with one tap of value 1 a pad, a crop or a step. What the layer pads with
    is ``fill``: a number, or the name of a tensor of one number per channel.
    """

    geometry: Geometry
    value: float
    fill: float | str = 0.0


Layer = Convolution | Filter


def mixes(layer: Layer) -> bool:
    """Whether the layer computes: a convolution or a pool, and not only a pad, a crop or a step."""
    return isinstance(layer, Convolution) or prod(layer.geometry.kernel) > 1


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
    """``y = by * x``, or ``y = x / by`` where ``inverse``: a number, or the name of a tensor of 1 or C numbers."""

    by: float | str
    inverse: bool = False


@dataclass(frozen=True)
class Offset:
    """``y = scale * x + factor * by``, where ``by`` is a number, or the name of a tensor of 1 or C numbers."""

    by: float | str
    factor: float = 1.0
    scale: float = 1.0


Channelwise = Normalisation | Factor | Offset
"""One number per channel to multiply with, and one to add."""
