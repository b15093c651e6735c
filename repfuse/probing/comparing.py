"""A block against kernels that are said to be it: the second opinion on one region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from repfuse.probing.agreement import disagreement
from repfuse.probing.axes import centre, core, shows_all
from repfuse.probing.box import Box
from repfuse.probing.kernel import Kernel
from repfuse.probing.probes import Probes, amplitude, everywhere, grid, impulses, joined, numbers

BUDGET = 2**31
"""Multiply-accumulates that the probes of one kind may take at one size."""

LEAST = 4
DRAWS = 4
FACTORS = (1.0, -3.0, 2.0**20)
Size = tuple[int, ...]


@dataclass(frozen=True)
class Opinion:
    """``error`` is the largest, relative; ``channels`` of ``of`` input channels were probed each by itself."""

    error: float
    channels: int
    of: int
    sizes: tuple[Size, ...]

    @property
    def exhaustive(self) -> bool:
        """Whether every channel was probed by itself."""
        return self.channels == self.of


def compare(box: Box, kernels: Sequence[Kernel], sizes: Sequence[Size]) -> Opinion:
    """Hold the block's answers against the sum of the kernels, at these sizes. The first of them shows every tap.

    Impulses in every channel by itself, where the budget allows it, in the middle of the first size: the answers are
    the kernel. Impulses at the borders, and inputs that are everywhere at once, in random mixtures of the channels: in
    these a wrong weight shows with probability 1. Raises Refused where the block gives something of another shape.
    """
    generator = torch.Generator().manual_seed(3)
    factor = _amplitude(kernels)
    chosen = _channels(box, kernels, sizes[0], generator)
    alone = torch.eye(box.channels, dtype=torch.float64)[chosen]
    probes = [impulses(alone, sizes[0], _middle(kernels, sizes[0]))]
    probes += [_mixtures(box, kernels, size, generator) for size in sizes]
    error = max(disagreement(box, kernels, each.times(factor)) for each in probes)
    return Opinion(error, len(chosen), box.channels, tuple(sizes))


def _mixtures(box: Box, kernels: Sequence[Kernel], size: Size, generator: torch.Generator) -> Probes:
    """Return inputs of one size that mix the channels at random: everywhere at once, and impulses at the borders too.

    As many as the budget allows.
    """
    room = max(LEAST, BUDGET // _cost(kernels, size))
    whole = everywhere(generator, box.channels, size, min(DRAWS, room))
    factors = FACTORS[: max(1, room // LEAST)]
    places = _some(grid([sorted({0, n - 1, *_near(kernels, axis, n)}) for axis, n in enumerate(size)]), room)
    draws = numbers(generator, max(1, min(DRAWS, room // len(places))), box.channels)
    return joined([*(whole.times(factor) for factor in factors), impulses(draws, size, places)])


def sizes_for(kernels: Sequence[Kernel]) -> list[Size]:
    """Return sizes to try: the smallest that shows every tap in its middle, others, not square, and smaller ones."""
    first = [max(core(kernel.axes[axis]) or 0 for kernel in kernels) for axis in range(len(kernels[0].axes))]
    ways = [[0, 0], [1, 0], [2, 3]]
    sizes = [tuple(n + way[axis % 2] for axis, n in enumerate(first)) for way in ways]
    return list(dict.fromkeys([*sizes, *((n,) * len(first) for n in (1, 2))]))


def shows(kernels: Sequence[Kernel], size: Size) -> bool:
    """Whether impulses in the middle of this size show every tap."""
    return all(shows_all(axis, n) for kernel in kernels for axis, n in zip(kernel.axes, size, strict=True))


def _amplitude(kernels: Sequence[Kernel]) -> float:
    weight = max(float(kernel.weight.abs().max()) for kernel in kernels)
    return amplitude(weight, max(float(kernel.bias.abs().max()) for kernel in kernels))


def _channels(box: Box, kernels: Sequence[Kernel], size: Size, generator: torch.Generator) -> list[int]:
    """Return the channels to probe by themselves: all, or as many as the budget allows, at random."""
    room = BUDGET // (_cost(kernels, size) * len(_middle(kernels, size)))
    if room >= box.channels:
        return list(range(box.channels))
    chosen: list[int] = torch.randperm(box.channels, generator=generator)[: max(LEAST, room)].tolist()
    return sorted(chosen)


def _cost(kernels: Sequence[Kernel], size: Size) -> int:
    """Return the multiply-accumulates of one input."""
    outputs = [kernel.output_size(size) for kernel in kernels]
    return sum(k.weight.numel() * math.prod(m or ()) for k, m in zip(kernels, outputs, strict=True))


def _middle(kernels: Sequence[Kernel], size: Size) -> list[Size]:
    return grid([_near(kernels, axis, n) for axis, n in enumerate(size)])


def _near(kernels: Sequence[Kernel], axis: int, size: int) -> list[int]:
    return sorted({place for kernel in kernels for place in centre(kernel.axes[axis], size)})


def _some(places: list[Size], most: int) -> list[Size]:
    """Return so many of the places, the first and the last among them."""
    if len(places) <= most:
        return places
    return [places[round(index * (len(places) - 1) / (most - 1))] for index in range(most)]
