"""Scales, a positive number for each channel of each value, some of which have to be one number; and which to take.

Those with which rounding weights to few bits does least to the network's outputs.

The identity: with a positive number s for each channel, ``W diag(s) f(diag(1/s) V x + b/s) = W f(V x + b)`` for every f
that takes such numbers through itself (``laws``). The objective: a tensor that is rounded to b bits is off by uniform
noise of a step that is proportional to its largest number, so the outputs are off, to first order, by

    sum over layers of  max |W'|^2 sum |dy/dW'|^2,

``W'[o, i] = W[o, i] s[i] / t[o]`` and ``dy/dW' = dy/dW t[o] / s[i]``. Each term is a product of a maximum and a sum of
exponentials of linear functions of log s, so its logarithm is convex (a geometric program: Boyd and Vandenberghe,
"Convex Optimization", section 4.5), and all scales of a network are solved for at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

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

    def fix(self, *scales: Numbers) -> None:
        """Let these be 1."""
        for each in scales:
            self.tie(each, np.zeros_like(each))

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

    def form(self) -> tuple[object, ...]:
        """Return what says which places have these scales: the same for two that can be tied pair by pair."""
        return type(self), self.times.shape, self.over.shape

    def numbered(self, number: Callable[[Numbers], Numbers]) -> Self:
        """Return it with scales of other numbers."""
        return replace(self, times=number(self.times), over=number(self.over))


@dataclass(frozen=True, eq=False)
class ScaledWeight(Part):
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

    def form(self) -> tuple[object, ...]:
        """As ``Part.form``."""
        return (*super().form(), self.transposed, self.order)


NORMS = (8.0, 32.0, 128.0)
"""The maximum is a p-norm, of these in a row."""
STEPS = 60
RIDGE = 1e-4
"""Scales that make no difference stay 1."""
TINY = 1e-300


@dataclass(frozen=True)
class ObjectiveTerm:
    """A weight that is rounded: ``size`` [groups, outputs, inputs] are its largest numbers for each pair of scales, and
    ``effect`` the sums of the squares of what the outputs do for each of them.
    """

    times: Numbers
    over: Numbers
    size: Tensor
    effect: Tensor


def solve(terms: Sequence[ObjectiveTerm], count: int) -> Tensor:
    """Return log2 of scales 0 to ``count``, number 0 being 1, in float64."""
    solved = torch.zeros(count, dtype=torch.float64)
    for norm in NORMS:
        solved = solved + _step(terms, solved, norm)
    return torch.cat([solved.new_zeros(1), solved / math.log(2)])


def predicted(terms: Sequence[ObjectiveTerm], scale: Tensor) -> float:
    """Return the logarithm of the objective with these scales, given as log2."""
    found = [_with(term, scale * math.log(2)) for term in terms]
    return math.log(sum(float(size.max().square() * effect.sum()) for size, effect in found) or TINY)


def _step(terms: Sequence[ObjectiveTerm], start: Tensor, norm: float) -> Tensor:
    """Return how far the solution with one norm is from ``start``, in natural logarithms."""
    there = [_Moved(term, torch.cat([start.new_zeros(1), start]), norm) for term in terms]
    moved = torch.zeros_like(start, requires_grad=True)
    search = torch.optim.LBFGS([moved], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        scale = torch.cat([moved.new_zeros(1), moved])
        total = torch.logsumexp(torch.stack([each(scale) for each in there]), 0)
        total = total + RIDGE * (start + moved).square().mean()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    search.step(loss)  # type: ignore[no-untyped-call]
    found = moved.detach()
    return found if bool(found.isfinite().all()) else torch.zeros_like(found)


def _with(term: ObjectiveTerm, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sizes and the effects with these scales, given as natural logarithms."""
    factors = (scale[term.times][:, None, :] - scale[term.over][:, :, None]).exp()
    return term.size * factors, term.effect / factors.square()


class _Moved:
    """The logarithm of a term, for scales that are moved from where they are."""

    def __init__(self, term: ObjectiveTerm, scale: Tensor, norm: float) -> None:
        self.times, self.over, self.norm = torch.from_numpy(term.times), torch.from_numpy(term.over), norm
        size, self.effect = _with(term, scale)
        self.largest = size.max().clamp_min(TINY)
        self.size = (size / self.largest) ** norm

    def __call__(self, scale: Tensor) -> Tensor:
        times, over = scale[self.times], scale[self.over]
        largest = _summed(self.size, self.norm * times, -self.norm * over) / self.norm + self.largest.log()
        return 2 * largest + _summed(self.effect, -2 * times, 2 * over)


def _summed(matrix: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the logarithm of the sum of ``matrix[g, o, i] exp(inputs[g, i]) exp(outputs[g, o])``."""
    most = inputs.max().detach()
    rows = torch.einsum("goi,gi->go", matrix, (inputs - most).exp()).clamp_min(TINY).log()
    return torch.logsumexp((rows + outputs).flatten(), 0) + most
