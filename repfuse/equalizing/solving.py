"""Which scales: those with which rounding weights and activations to few bits does least to the network's outputs.

The identity: with a positive number s for each channel, ``W diag(s) f(diag(1/s) V x + b/s) = W f(V x + b)`` for every f
that takes such numbers through itself (``laws``). The objective: a tensor that is rounded to b bits is off by uniform
noise of a step that is proportional to its largest number, so the outputs are off, to first order, by

    sum over layers of  max |W'|^2 sum |dy/dW'|^2  +  max |x'|^2 sum |dy/dx'|^2,

``W'[o, i] = W[o, i] s[i] / t[o]`` and ``dy/dW' = dy/dW t[o] / s[i]``. Each term is a product of a maximum and a sum of
exponentials of linear functions of log s, so its logarithm is convex (a geometric program: Boyd and Vandenberghe,
"Convex Optimization", section 4.5), and all scales of a network are solved for at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repfuse.equalizing.scales import Numbers, Weight

NORMS = (8.0, 32.0, 128.0)
"""The maximum is a p-norm, of these in a row."""
STEPS = 60
RIDGE = 1e-4
"""Scales that make no difference stay 1."""
TINY = 1e-300


@dataclass(frozen=True)
class Term:
    """A tensor that is rounded: ``size`` [groups, outputs, inputs] are its largest numbers for each pair of scales, and
    ``effect`` the sums of the squares of what the outputs do for each of them. An activation has one output.
    """

    times: Numbers
    over: Numbers
    size: Tensor
    effect: Tensor


def of_weight(weight: Weight, tensor: Tensor, slope: Tensor) -> Term:
    """Return the term of a weight; ``slope`` are the squares of the outputs' slopes, laid out as the weight is."""
    size = weight.by_channel(tensor.double().cpu()).abs().amax(3)
    return Term(weight.times, weight.over, size, weight.by_channel(slope.double().cpu()).sum(3))


def of_activation(weight: Weight, size: Tensor, effect: Tensor) -> Term:
    """Return the term of what a layer reads; both are given by channel."""
    shape = weight.times.shape[0], weight.times.shape[1], 1
    one = torch.zeros(shape[0], 1, dtype=torch.int64).numpy()
    return Term(one, weight.times, size.double().cpu().reshape(shape), effect.double().cpu().reshape(shape))


def solve(terms: Sequence[Term], count: int) -> Tensor:
    """Return log2 of scales 0 to ``count``, number 0 being 1, in float64."""
    solved = torch.zeros(count, dtype=torch.float64)
    for norm in NORMS:
        solved = solved + _step(terms, solved, norm)
    return torch.cat([solved.new_zeros(1), solved / math.log(2)])


def predicted(terms: Sequence[Term], scale: Tensor) -> float:
    """Return the logarithm of the objective with these scales, given as log2."""
    found = [_with(term, scale * math.log(2)) for term in terms]
    return math.log(sum(float(size.max().square() * effect.sum()) for size, effect in found) or TINY)


def _step(terms: Sequence[Term], start: Tensor, norm: float) -> Tensor:
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


def _with(term: Term, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sizes and the effects with these scales, given as natural logarithms."""
    factors = (scale[term.times][:, None, :] - scale[term.over][:, :, None]).exp()
    return term.size * factors, term.effect / factors.square()


class _Moved:
    """The logarithm of a term, for scales that are moved from where they are."""

    def __init__(self, term: Term, scale: Tensor, norm: float) -> None:
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
