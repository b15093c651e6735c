"""How far a fused convolution in its stored dtype may be from itself in exact arithmetic: an a-priori bound.

A sum of n products in arithmetic of unit roundoff u, in whatever order, is computed with an error of at most
``g(n) sum |w_i| |x_i|``, with ``g(n) = n u / (1 - n u)`` (Higham, Accuracy and Stability of Numerical Algorithms,
2nd ed., sections 3.1 and 4.2). A stored weight is off by at most half a spacing e of its dtype. The result is rounded
before its bias is added, at worst, and then m times, for m convolutions that add up. So, element by element,

    |y' - y| <= (e + k (|W| + e)) * |x|,    k = (1 + g(n)) (1 + u)^(1 + m) - 1.

This is a convolution itself: of |x|, with the weights ``e + k (|W| + e)``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from repfuse.networks import named_tensors
from repfuse.proof.exact import convolution_at
from repfuse.proof.places import Place
from repfuse.verifying.copies import run_float64
from repfuse.verifying.inputs import Trial
from repfuse.verifying.rounding import half_spacing

TF32 = 2.0**-11
"""Unit roundoff of the factors of a product, where the device rounds float32 to TF32 for it."""


def bounds(place: Place, fused: nn.Module, trials: Iterable[Trial], dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Return, per trial, the largest error of each output element; None for a trial that does not run."""
    growth = _growth(place, fused, dtype)

    def bounding(_name: str, tensor: torch.Tensor) -> torch.Tensor:
        half = half_spacing(tensor)
        return tensor.double().abs().add_(half).mul_(growth).add_(half)

    bounded = place.after(fused, lambda factor: growth * abs(factor))
    magnitudes = [Trial(trial.label, tuple(x.abs() for x in trial.inputs)) for trial in trials]
    outcomes = run_float64(bounded, magnitudes, bounding)
    return [None if outcome.error else outcome.outputs["out"] + _least(dtype) for outcome in outcomes]


def _growth(place: Place, fused: nn.Module, dtype: torch.dtype) -> float:
    """Return k. PyTorch sums products of half precision in float32, those of a transposed convolution in half.

    Of a sum with n u >= 1 nothing is known beforehand: then k is as large as the format's numbers.
    """
    unit = torch.finfo(dtype).eps / 2
    convolutions = [convolution_at(fused, path) for path in place.path_of.values()]
    in_half = any(isinstance(convolution, _ConvTransposeNd) for convolution in convolutions)
    summing = unit if in_half else min(unit, torch.finfo(torch.float32).eps / 2)
    lost = summing * (sum(map(_terms, convolutions)) + 2 * len(place.region.groups))
    if lost >= 1:
        return torch.finfo(dtype).max
    rounded = (1 + unit) ** (1 + len(place.region.groups))  # before the bias, and with each convolution that is added
    grown = (1 + lost / (1 - lost)) * rounded
    return grown * (1 + _of_factors(place.module, dtype)) ** 2 - 1


def _terms(convolution: nn.Module) -> int:
    """Return how many products a sum has at most, the bias counted."""
    weight = convolution.weight
    assert isinstance(weight, torch.Tensor)
    linear = isinstance(convolution, nn.Linear)
    outputs: int = getattr(convolution, "out_features" if linear else "out_channels")
    return weight.numel() // max(1, outputs) + 1


def _of_factors(module: nn.Module, dtype: torch.dtype) -> float:
    on_cuda = any(tensor.is_cuda for _, tensor in named_tensors(module))
    allowed = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return TF32 if on_cuda and dtype is torch.float32 and allowed else 0.0


def _least(dtype: torch.dtype) -> float:
    """Return half the spacing of the smallest numbers, which no relative bound covers."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
