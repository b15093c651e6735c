"""Inputs of rank one: a number per channel times a number per place of each axis.

Impulses are of this kind, and random numbers see everything at once: the difference of two maps is a polynomial in
them that is linear in each, so where it is not zero as a whole it vanishes with probability 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repfuse.probing.box import Box


@dataclass(frozen=True)
class Probes:
    """``channels`` is ``[P, C]``, and ``places`` holds ``[P, size]`` for each axis."""

    channels: Tensor
    places: tuple[Tensor, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """The spatial size of the inputs."""
        return tuple(numbers.shape[1] for numbers in self.places)

    def inputs(self) -> Tensor:
        """Return the inputs themselves, ``[P, C, *size]``."""
        x = self.channels
        for numbers in self.places:
            x = x.unsqueeze(-1) * numbers.reshape(len(numbers), *[1] * (x.dim() - 1), -1)
        return x

    def part(self, start: int, stop: int) -> Probes:
        """Return some of the probes."""
        return Probes(self.channels[start:stop], tuple(numbers[start:stop] for numbers in self.places))

    def absolute(self) -> Probes:
        """Return the probes without their signs."""
        return Probes(self.channels.abs(), tuple(numbers.abs() for numbers in self.places))

    def times(self, factor: float) -> Probes:
        """Return the probes, larger."""
        return Probes(self.channels * factor, self.places)


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Return random numbers of either sign, none near zero: of a sum none is lost."""
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -drawn, drawn)


def everywhere(generator: torch.Generator, channels: int, size: Sequence[int], count: int) -> Probes:
    """Return random inputs."""
    return Probes(numbers(generator, count, channels), tuple(numbers(generator, count, n) for n in size))


def impulses(channels: Tensor, size: Sequence[int], positions: Sequence[Sequence[int]]) -> Probes:
    """Return impulses: each row of ``channels`` at each of the positions, the positions of a row together."""
    rows = channels.repeat_interleave(len(positions), 0)
    axes = zip(size, zip(*positions, strict=True), strict=True) if size else ()
    places = [torch.eye(n, dtype=torch.float64)[list(of)] for n, of in axes]
    return Probes(rows, tuple(numbers.repeat(len(channels), 1) for numbers in places))


def without_bias(box: Box, probes: Probes) -> Tensor:
    """Return the answers of a block without its bias."""
    return box(probes.inputs()) - box(box.zeros(probes.size))


def joined(parts: Sequence[Probes]) -> Probes:
    """Return all of the probes, which are of one size."""
    places = zip(*(part.places for part in parts), strict=True)
    return Probes(torch.cat([part.channels for part in parts]), tuple(map(torch.cat, map(list, places))))


def amplitude(weight: float, bias: float) -> float:
    """Return the power of two, at least 1, that makes a weight as large as the bias: the sum then keeps its digits."""
    if not 0 < weight < bias < math.inf:
        return 1.0
    return 2.0 ** min(64, math.ceil(math.log2(bias / weight)))


def grid(axes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return every combination of the places of each axis."""
    return list(itertools.product(*axes))
