"""block -> kernel, from impulses alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from repfuse.probing.axes import Axis, Spread, Window, centre, core
from repfuse.probing.box import Box, Refused
from repfuse.probing.evidence import Evidence, check_linear, gather
from repfuse.probing.kernel import Kernel
from repfuse.probing.probes import amplitude, grid, impulses, numbers, without_bias
from repfuse.probing.reach import NOTHING, axes_of
from repfuse.probing.sizes import smallest

LARGEST = 2**26
"""Numbers in a kernel."""


@dataclass(frozen=True)
class Recovered:
    """What a block computes: ``kernel`` with every tap in between (dilation 1), and why it is believed."""

    kernel: Kernel
    evidence: Evidence

    @property
    def weight(self) -> Tensor:
        """``[out, in, *taps]``, in float64."""
        return self.kernel.weight

    @property
    def bias(self) -> Tensor:
        """``[out]``, in float64."""
        return self.kernel.bias

    @property
    def transposed(self) -> bool:
        """Whether it spreads its input, as a transposed convolution does."""
        return any(isinstance(axis, Spread) for axis in self.kernel.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        """The steps of a convolution; of a transposed one, those of its output."""
        return tuple(axis.up if isinstance(axis, Spread) else axis.stride for axis in self.kernel.axes)

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Zeros before and after each axis of a convolution, negative where it crops."""
        pads = (pad for axis in self.kernel.axes if isinstance(axis, Window) for pad in axis.pads)
        return tuple((pad.before, pad.after) for pad in pads)


def recover(f: Callable[[Tensor], Tensor], in_channels: int, ndim: int, batch: int | None = None) -> Recovered:
    """Return the kernel and bias of ``f``, a function of ``[N, in_channels, *size]`` in float64 with ``ndim`` axes.

    ``batch`` is for one that takes batches of one size only. Every channel and phase of the stride is probed, so the
    kernel is read off whole. Raises Refused, with a reason, where it is no affine shift-equivariant map of zeros beyond
    the border, or the evidence does not show that it is. What finite probing cannot see stands in
    ``repfuse.probing.evidence``.
    """
    box = Box(f, in_channels, ndim, batch)
    check_linear(box, (smallest(box) if ndim else 1,) * ndim)
    axes = axes_of(box)
    bias = _bias(box, tuple(_core(axis) for axis in axes))
    kernel = _read(box, axes, bias)
    return Recovered(kernel, gather(box, kernel))


def _core(axis: Axis) -> int:
    size = core(axis)
    if size is None:
        raise Refused("no input shows every tap of its kernel")
    return size


def _bias(box: Box, size: tuple[int, ...]) -> Tensor:
    """Return the answer to zeros. Raises Refused where it is not the same everywhere."""
    answer = box(box.zeros(size)).flatten(2)[0] if size else box(box.zeros(size))[0, :, None]
    if not bool(answer.isfinite().all()):
        raise Refused("its answer to zeros is not finite")
    if not bool((answer - answer[:, :1]).abs().max() <= NOTHING * answer.abs().max()):
        raise Refused("its answer to zeros differs from place to place")
    return answer[:, 0]


def _read(box: Box, axes: tuple[Axis, ...], bias: Tensor) -> Kernel:
    """Return the kernel: of every input channel, the answers to an impulse at each phase of the stride."""
    taps = tuple(axis.kernel for axis in axes)
    if len(bias) * box.channels * prod(taps) > LARGEST:
        raise Refused("its kernel is too large to be read whole")
    size = tuple(_core(axis) for axis in axes)
    weight = torch.full((box.channels, len(bias), *taps), inf, dtype=torch.float64)
    factor = _amplitude(box, size, bias)
    for position in grid([centre(axis, n) for axis, n in zip(axes, size, strict=True)]):
        probes = impulses(torch.eye(box.channels, dtype=torch.float64) * factor, size, [position])
        outputs, seen = _seen(axes, size, position)
        answers = without_bias(box, probes) / factor
        weight[_channels_and(seen)] = answers[_channels_and(outputs)]
    if not bool(weight.isfinite().all()):
        raise Refused("its answers to impulses are not finite")
    weight[weight.abs() <= NOTHING * weight.abs().max()] = 0
    return Kernel(weight.transpose(0, 1).contiguous(), bias, axes)


def _amplitude(box: Box, size: tuple[int, ...], bias: Tensor) -> float:
    """Return a power of two as large as makes the answers outweigh the bias: the difference then keeps its digits."""
    generator = torch.Generator().manual_seed(1)
    position = [tuple(n // 2 for n in size)]
    answer = float(without_bias(box, impulses(numbers(generator, 1, box.channels), size, position)).abs().max())
    return amplitude(answer, float(bias.abs().max()))


Indices = tuple[Tensor, ...]


def _channels_and(places: Indices) -> tuple[Any, ...]:
    return slice(None), slice(None), *places


def _seen(axes: Sequence[Axis], size: Sequence[int], position: Sequence[int]) -> tuple[Indices, Indices]:
    """Return which outputs answer an impulse at ``position``, and through which taps."""
    if not axes:
        return (), ()
    pairs = [(_table(axis, n) == p).nonzero(as_tuple=True) for axis, n, p in zip(axes, size, position, strict=True)]
    outputs, taps = (tuple(torch.meshgrid(*of, indexing="ij")) for of in zip(*pairs, strict=True))
    return outputs, taps


def _table(axis: Axis, size: int) -> Tensor:
    table = axis.reads(size)
    assert table is not None
    return table
