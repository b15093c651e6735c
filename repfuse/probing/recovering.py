"""block -> kernel, from impulses alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from repfuse.probing.axes import Axis, Pad, Spread, Window, centre, core
from repfuse.probing.box import Box, Refused
from repfuse.probing.evidence import Evidence, check_linear, gather
from repfuse.probing.kernel import Kernel
from repfuse.probing.probes import Probes, amplitude, grid, impulses, numbers
from repfuse.probing.sizes import Growth, growths, smallest

WIDEST = {0: (1, 1), 1: (65, 257, 1025), 2: (33, 65, 97), 3: (17, 33)}
"""Sizes at which the reach of a kernel is looked for, by number of axes."""

NOTHING = 2.0**-46
"""Relative to the largest answer: below it is rounding."""

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
    axes = _axes(box)
    bias = _bias(box, tuple(_core(axis) for axis in axes))
    kernel = _read(box, axes, bias)
    return Recovered(kernel, gather(box, kernel))


def _axes(box: Box) -> tuple[Axis, ...]:
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
    answers = (_linear(box, probes)).abs().amax(1)
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
        answers = _linear(box, probes) / factor
        weight[_channels_and(seen)] = answers[_channels_and(outputs)]
    if not bool(weight.isfinite().all()):
        raise Refused("its answers to impulses are not finite")
    weight[weight.abs() <= NOTHING * weight.abs().max()] = 0
    return Kernel(weight.transpose(0, 1).contiguous(), bias, axes)


def _amplitude(box: Box, size: tuple[int, ...], bias: Tensor) -> float:
    """Return a power of two as large as makes the answers outweigh the bias: the difference then keeps its digits."""
    generator = torch.Generator().manual_seed(1)
    position = [tuple(n // 2 for n in size)]
    answer = float(_linear(box, impulses(numbers(generator, 1, box.channels), size, position)).abs().max())
    return amplitude(answer, float(bias.abs().max()))


def _linear(box: Box, probes: Probes) -> Tensor:
    """Return the answers without the bias."""
    return box(probes.inputs()) - box(box.zeros(probes.size))


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
