"""Each stored weight against the one computed in float64: it has to be that, rounded once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from repfuse.networks import dense, named_tensors
from repfuse.proof.exact import Weight
from repfuse.proof.results import WeightProof
from repfuse.verifying.rounding import half_spacing

NEAR_HALF = 0.5 + 2.0**-16
"""Spacings between a number and its rounding. Another machine sums in another order, which moves a number in float64 by
1e-15 of itself: 1e-7 spacings of float32. On its way to bfloat16 it is rounded to float32 first: 2^-17 spacings."""
NOISE = 1e-12
"""Of the largest weight: by so much may two computations in float64 differ, where that is what is stored."""


def compared_weights(weights: Iterable[Weight], network: nn.Module) -> tuple[WeightProof, ...]:
    """Compare the stored tensors of one site of ``network`` with what they were computed to be."""
    name_of = {id(tensor): name for name, tensor in named_tensors(network)}
    return tuple(_compared(name_of[id(weight.stored)], weight.stored.detach(), weight.exact()) for weight in weights)


def _compared(name: str, stored: torch.Tensor, exact: torch.Tensor) -> WeightProof:
    dtype, shape = str(stored.dtype).removeprefix("torch."), tuple(stored.shape)
    if stored.shape != exact.shape:
        return WeightProof(name, dtype, shape, stored.numel(), float("inf"))
    rounded = exact.to(stored.dtype)
    unequal = ~((stored == rounded) | (stored.isnan() & rounded.isnan()))
    wrong, spacings = _wrong(stored[unequal], exact[unequal], float(exact.abs().max()) if exact.numel() else 0.0)
    return WeightProof(name, dtype, shape, wrong, max(0.5, spacings))


def _wrong(stored: torch.Tensor, exact: torch.Tensor, largest: float) -> tuple[int, float]:
    """Return how many numbers are no rounding of the exact ones, and the largest difference in spacings."""
    if not stored.numel():
        return 0, 0.0
    difference = (stored.double() - exact).abs()
    spacing = 2 * half_spacing(stored)
    allowed = spacing * NEAR_HALF if stored.dtype is not torch.float64 else torch.full_like(spacing, NOISE * largest)
    wrong = int((~(difference <= allowed)).sum())
    return wrong, float((difference / spacing).nan_to_num(nan=float("inf")).max())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal element by element; what is not a number equals itself."""
    one, other = dense(one), dense(other)
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
