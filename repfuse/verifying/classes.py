"""Which classes a network gives each sample, best first, and how sure it is of the first.

Classes rank by their output, the highest first; among equal ones the lower number comes first, so that two networks
with equal outputs always rank alike. A sample with an output that is not a number has no class: NONE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

TOP = 5
NONE = -1


@dataclass(frozen=True)
class Ranking:
    """``best`` [samples, min(TOP, classes)] are the classes, best first; NONE in the whole row where there are none.

    ``margins`` [samples], in float64: the highest output less the second, relative to the row's largest magnitude.
    """

    best: torch.Tensor
    margins: torch.Tensor
    classes: int

    @property
    def first(self) -> torch.Tensor:
        """The class of each sample."""
        return self.best[:, 0]

    @property
    def has_top(self) -> bool:
        """Whether the best five say more than all: for TOP classes or fewer they are always the same."""
        return self.classes > TOP

    def agrees(self, other: Ranking) -> torch.Tensor:
        """Return for each sample whether both give it the same class."""
        return (self.first == other.first) & (self.first != NONE)

    def agrees_on_top(self, other: Ranking) -> torch.Tensor:
        """Return for each sample whether the best five are the same set of classes, in whatever order."""
        same = self.best.sort(dim=1).values == other.best.sort(dim=1).values
        return same.all(dim=1) & (self.first != NONE)

    def hits(self, labels: torch.Tensor) -> torch.Tensor:
        """Return for each sample whether its class is the label."""
        return self.first == labels

    def hits_on_top(self, labels: torch.Tensor) -> torch.Tensor:
        """Return for each sample whether the label is among the best five."""
        return (self.best == labels[:, None]).any(dim=1)


def ranking(scores: torch.Tensor) -> Ranking | None:
    """Return the ranking of ``scores`` [samples, classes]; None where they are no table of two classes or more."""
    if scores.dim() != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        return None
    scores = scores.double()
    order = scores.argsort(dim=1, descending=True, stable=True)
    best = order[:, :TOP].masked_fill(scores.isnan().any(dim=1, keepdim=True), NONE)
    first, second = scores.gather(1, order[:, :2]).unbind(dim=1)
    scale = scores.abs().amax(dim=1).clamp(min=torch.finfo(scores.dtype).tiny)
    margins = ((first - second) / scale).nan_to_num(nan=math.inf, posinf=math.inf)
    return Ranking(best, margins, scores.shape[1])


def joined(rankings: Sequence[Ranking | None]) -> Ranking | None:
    """Return the rankings of all samples as one; None where some have none, or another number of classes."""
    known = [one for one in rankings if one is not None]
    if not known or len(known) < len(rankings) or len({one.classes for one in known}) > 1:
        return None
    best, margins = torch.cat([one.best for one in known]), torch.cat([one.margins for one in known])
    return Ranking(best, margins, known[0].classes)
