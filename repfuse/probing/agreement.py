"""What a block answers to probes, against what kernels answer: one number, relative to what they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from repfuse.probing.box import Box, Refused
from repfuse.probing.kernel import Kernel
from repfuse.probing.probes import Probes

NUMBERS = 2**22
"""Held at a time."""

QUIET = 10
"""A channel counts as no smaller than this part of the loudest: what cancels in it was rounded at their size."""


def disagreement(box: Box, kernels: Sequence[Kernel], probes: Probes) -> float:
    """Return the largest difference between the block's answers and the sum of the kernels', relative to its channel.

    That is, to the sum of the magnitudes of all products and biases in the channel. Raises Refused where the sizes
    differ.
    """
    per_probe = _numbers_per_probe(kernels, probes.size)
    step = max(1, NUMBERS // per_probe)
    parts = (probes.part(start, start + step) for start in range(0, len(probes.channels), step))
    return max(_largest(box(part.inputs()), kernels, part) for part in parts)


def _numbers_per_probe(kernels: Sequence[Kernel], size: Sequence[int]) -> int:
    taps = max(math.prod(kernel.weight.shape[2:]) for kernel in kernels)
    outputs = max(math.prod(kernel.output_size(size) or (0,)) for kernel in kernels)
    return max(1, len(kernels[0].weight) * max(taps, outputs))


def _largest(seen: Tensor, kernels: Sequence[Kernel], probes: Probes) -> float:
    expected = _answers(kernels, probes, seen)
    absolute = _answers([kernel.absolute() for kernel in kernels], probes.absolute(), seen)
    return _relative((seen - expected).abs(), absolute)


def _answers(kernels: Sequence[Kernel], probes: Probes, seen: Tensor) -> Tensor:
    total = torch.zeros_like(seen)
    for kernel in kernels:
        answer = kernel.answer(probes)
        if answer.shape != seen.shape:
            raise Refused(f"it makes {_shape(seen)} and not {_shape(answer)}")
        total += answer + kernel.bias.reshape(-1, *[1] * (seen.dim() - 2))
    return total


def _relative(off: Tensor, absolute: Tensor) -> float:
    """Return the largest of ``off``, relative to the largest of its channel in ``absolute``; nan is infinite."""
    size = absolute.flatten(2).amax(2) if absolute.dim() > 2 else absolute
    size = torch.maximum(size, size.amax(1, keepdim=True) / QUIET)
    worst = off.flatten(2).amax(2) if off.dim() > 2 else off
    relative = torch.where(worst == 0, 0.0, worst / size)
    return float(relative.nan_to_num(math.inf, math.inf).max())


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))
