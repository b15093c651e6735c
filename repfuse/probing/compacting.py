"""A kernel with as few numbers as hold it: its dilation and its groups, where those in between are zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compact:
    """``weight`` is ``[out, in / groups, *taps]``; the taps are ``dilation`` places apart."""

    weight: Tensor
    dilation: tuple[int, ...]
    groups: int


def compact(weight: Tensor) -> Compact:
    """Return the kernel ``[out, in, *taps]``, whose first and last taps on each axis are used, without its zeros."""
    dilation = tuple(_step(weight, axis) for axis in range(2, weight.dim()))
    weight = weight[(slice(None), slice(None), *(slice(None, None, step) for step in dilation))]
    groups = _groups(weight)
    out, into = (size // groups for size in weight.shape[:2])
    blocks = [weight[g * out : (g + 1) * out, g * into : (g + 1) * into] for g in range(groups)]
    return Compact(torch.cat(blocks), dilation, groups)


def _step(weight: Tensor, axis: int) -> int:
    """Return how far apart the taps are that are not zero."""
    used = weight.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()
    return math.gcd(*used) or 1


def _groups(weight: Tensor) -> int:
    """Return the largest number of groups such that no output reads an input of another group."""
    out, into = weight.shape[:2]
    reads = weight.flatten(2).any(2)
    for groups in range(math.gcd(out, into), 1, -1):
        if out % groups == 0 and into % groups == 0:
            blocks = reads.reshape(groups, out // groups, groups, into // groups).any(3).any(1)
            if not blocks.fill_diagonal_(False).any():
                return groups
    return 1
