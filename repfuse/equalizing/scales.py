"""Scales: a positive number for each channel of each value, and which of them have to be one number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repfuse.algebra.geometry import Ints

Numbers = NDArray[np.int64]
"""Scales by their numbers."""


class Scales:
    """Scales, of which number 0 is 1 for ever. What is tied is one scale (union-find, Tarjan 1975)."""

    def __init__(self) -> None:
        self._parents = [0]

    def new(self, count: int) -> Numbers:
        """Return so many new scales."""
        first = len(self._parents)
        self._parents += range(first, first + count)
        return np.arange(first, first + count)

    def tie(self, one: Numbers, other: Numbers) -> None:
        """Let these be equal, pair by pair."""
        for pair in zip(*map(np.ravel, np.broadcast_arrays(one, other)), strict=True):
            low, high = sorted(map(self._root, pair))
            self._parents[high] = low

    def fix(self, scales: Numbers) -> None:
        """Let these be 1."""
        self.tie(scales, np.zeros_like(scales))

    def of(self, scales: Numbers) -> Numbers:
        """Return each as the first of those that are one with it: 0 where it is 1."""
        roots = {each: self._root(each) for each in set(scales.ravel().tolist())}
        return np.vectorize(roots.__getitem__, otypes=[np.int64])(scales) if scales.size else scales

    def _root(self, scale: int) -> int:
        parents = self._parents
        while parents[scale] != scale:
            parents[scale] = parents[parents[scale]]
            scale = parents[scale]
        return int(scale)


@dataclass(frozen=True, eq=False)
class Along:
    """The scales of a value: one for each place of ``axis``."""

    axis: int
    scales: Numbers


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor of the network at ``name`` that becomes ``t * s[times] / s[over]``."""

    name: str
    times: Numbers
    over: Numbers

    def factors(self, scale: Tensor, shape: Iterable[int]) -> Tensor:
        """Return what a tensor of this shape is multiplied by; ``scale`` are the scales by number."""
        return (scale[self.times] / scale[self.over]).reshape(*shape)

    def fits(self, other: Part) -> bool:
        """Whether both say of the same places which scales they have."""
        alike = self.times.shape == other.times.shape and self.over.shape == other.over.shape
        return alike and type(self) is type(other)


@dataclass(frozen=True, eq=False)
class Weight(Part):
    """The weight of a layer: ``times`` [groups, inputs of each] of what it reads, ``over`` [groups, outputs of each].

    ``order`` are its axes in the order of a layer's, where its own is another.
    """

    transposed: bool = False
    order: Ints = ()

    def by_channel(self, tensor: Tensor) -> Tensor:
        """Return the weight as [groups, outputs, inputs, taps]."""
        (groups, outputs), inputs = self.over.shape, self.times.shape[1]
        laid = tensor.permute(self.order) if self.order else tensor
        if self.transposed:
            return laid.reshape(groups, inputs, outputs, -1).transpose(1, 2)
        return laid.reshape(groups, outputs, inputs, -1)

    def factors(self, scale: Tensor, shape: Iterable[int]) -> Tensor:
        """As ``Part.factors``; alike for all taps."""
        size = torch.Size(shape)
        found = scale[self.times][:, None, :] / scale[self.over][:, :, None]
        found = found.transpose(1, 2) if self.transposed else found
        if self.order:
            back = [int(place) for place in np.argsort(self.order)]
            return found.reshape([size[axis] for axis in self.order]).permute(back)
        return found.reshape(*size[:2], *(1 for _ in size[2:]))

    def fits(self, other: Part) -> bool:
        """As ``Part.fits``."""
        return (
            super().fits(other)
            and isinstance(other, Weight)
            and (self.transposed, self.order) == (other.transposed, other.order)
        )
