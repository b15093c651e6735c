"""Each stored weight against the one computed in float64: it has to be that, rounded once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from repfuse.networks import dense, named_tensors
from repfuse.proof.exact import Weight
from repfuse.proof.results import WeightProof
from repfuse.verifying.rounding import half_spacing


def compared_weights(weights: Iterable[Weight], network: nn.Module) -> tuple[WeightProof, ...]:
    """Compare the stored tensors of one site of ``network`` with what they were computed to be."""
    name_of = {id(tensor): name for name, tensor in named_tensors(network)}
    return tuple(_compared(name_of[id(weight.stored)], weight.stored.detach(), weight.exact()) for weight in weights)


def _compared(name: str, stored: torch.Tensor, exact: torch.Tensor) -> WeightProof:
    dtype = str(stored.dtype).removeprefix("torch.")
    rounded = exact.to(stored.dtype)
    equal = (stored == rounded) | (stored.isnan() & rounded.isnan())
    wrong = equal.numel() - int(equal.sum())
    return WeightProof(name, dtype, tuple(stored.shape), wrong, _spacings(stored, exact, ~equal) if wrong else 0.5)


def _spacings(stored: torch.Tensor, exact: torch.Tensor, wrong: torch.Tensor) -> float:
    """Return the largest difference in units in the last place of the stored number."""
    stored, exact = stored[wrong], exact[wrong]
    return float(((stored.double() - exact).abs() / (2 * half_spacing(stored))).nan_to_num(nan=float("inf")).max())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal element by element; what is not a number equals itself."""
    one, other = dense(one), dense(other)
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
