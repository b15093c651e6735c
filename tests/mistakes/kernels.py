"""What a fused layer computes, tap by tap: two of them are the same map, or differ, whatever their settings are.

Nothing of repfuse's algebra is used.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FLOOR = 1e-10
"""A difference of this part of the largest number must be caught: the proof promises 1e-12 of its outputs."""


@dataclass(frozen=True)
class Kernel:
    """``taps`` by where they read, as ``[C_out, C_in]`` matrices; ``frame`` is what else a layer computes by."""

    taps: dict[tuple[int, ...], Tensor]
    bias: Tensor
    frame: tuple[Any, ...]

    def differs(self, other: Kernel, floor: float) -> bool:
        """Whether the two are different maps; by no more than ``floor`` of the largest number, they are not."""
        if self.frame != other.frame or self.bias.shape != other.bias.shape:
            return True
        zero = torch.zeros_like(next(iter(self.taps.values())))
        pairs = [(self.taps.get(at, zero), other.taps.get(at, zero)) for at in self.taps.keys() | other.taps.keys()]
        pairs.append((self.bias, other.bias))
        scale = max(float(one.abs().max()) for one, _ in pairs)
        return not all(bool(((one - two).abs() <= floor * scale).all()) for one, two in pairs)


def layer_of(site: nn.Module) -> Any:
    """Return the convolution or linear layer of what a site became: itself, or behind its padding."""
    return _rows(site)[-1]


def kernel(site: nn.Module) -> Kernel:
    """Return the map of a layer, with the padding before it."""
    *pads, layer = _rows(site)
    weight, bias = layer.weight.detach().double(), layer.bias
    axes = weight.dim() - 2
    bias = torch.zeros(_outputs(layer), dtype=torch.float64) if bias is None else bias.detach().double()
    if axes == 0:
        return Kernel({(): weight}, bias, ("linear",))
    begin, end = _padding(layer, pads, axes)
    dense = _dense(layer, weight)
    ranges = [[i * d - b for i in range(k)] for k, d, b in zip(layer.kernel_size, layer.dilation, begin, strict=True)]
    indices = itertools.product(*map(range, layer.kernel_size))
    taps = {at: dense[(..., *i)] for at, i in zip(itertools.product(*ranges), indices, strict=True)}
    taps = {at: matrix for at, matrix in taps.items() if matrix.any()}
    growth = tuple(b + e - r[-1] + r[0] for b, e, r in zip(begin, end, ranges, strict=True))
    kind = (isinstance(layer, TRANSPOSED), layer.stride, growth, getattr(layer, "output_padding", None))
    return Kernel(taps, bias, (*kind, _filling(layer, pads) if _reads_beyond(taps, growth) else None))


def _rows(site: nn.Module) -> list[Any]:
    return [module for module in site.modules() if not list(module.children())]


def _outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _padding(layer: Any, pads: list[Any], axes: int) -> tuple[list[int], list[int]]:
    """Return what is padded before and after, per spatial axis. PyTorch keeps it from the last axis to the first."""
    own = [0] * 2 * axes if isinstance(layer, TRANSPOSED) else layer._reversed_padding_repeated_twice
    if isinstance(layer, TRANSPOSED):
        own = [size for size in reversed(layer.padding) for _ in range(2)]
    total = [sum(sizes) for sizes in zip(own, *(pad.padding[: 2 * axes] for pad in pads), strict=True)]
    return total[-2::-2], total[::-2]


def _dense(layer: Any, weight: Tensor) -> Tensor:
    """Return the weight for all pairs of channels: of two of a different group it is 0."""
    rows, columns = weight.shape[0] // layer.groups, weight.shape[1]
    dense = weight.new_zeros((weight.shape[0], columns * layer.groups, *weight.shape[2:]))
    for group in range(layer.groups):
        of = slice(group * rows, (group + 1) * rows)
        dense[of, group * columns : (group + 1) * columns] = weight[of]
    return dense


def _reads_beyond(taps: dict[tuple[int, ...], Tensor], growth: tuple[int, ...]) -> bool:
    """Whether a tap that is not 0 reads beyond the input, whose output is ``growth`` larger at stride 1."""
    return any(at < 0 or at > -size for place in taps for at, size in zip(place, growth, strict=True))


def _filling(layer: Any, pads: list[Any]) -> str:
    """Return what stands beyond the input."""
    kinds = [f"{type(pad).__name__[:-2]} {getattr(pad, 'value', '')}" for pad in pads if max(pad.padding) > 0]
    same = {"ZeroPad 0.0": "zeros", "ReflectionPad ": "reflect", "ReplicationPad ": "replicate"}
    return " ".join(same.get(kind, kind) for kind in kinds) or layer.padding_mode
