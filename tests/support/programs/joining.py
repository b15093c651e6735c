"""Steps that add values up."""

from __future__ import annotations

import functools
import operator

import torch
from support.programs.made import Made, Pick, function
from torch import Tensor

aten = torch.ops.aten


def add(pick: Pick, x: Tensor, *others: Tensor) -> Made:
    """Two values of one shape."""
    spellings = (
        lambda a, b: a + b,
        torch.add,
        lambda a, b: a.add(b, alpha=2),
        lambda a, b: torch.sub(a, b, alpha=0.5),
        lambda a, b: a - b,
        lambda a, b: a.add_(b),
        operator.iadd,
        operator.isub,
        lambda a, b: torch.rsub(a, b, alpha=2),
        lambda a, b: torch.lerp(a, b, 0.25),
        aten.add.Tensor,
        lambda a, b: aten.add_.Tensor(a, b, alpha=2),
        aten.sub.Tensor,
        aten.rsub.Tensor,
    )
    run = pick.of(spellings)
    return function(lambda a, b, *_: run(a, b))


def total(pick: Pick, x: Tensor, *others: Tensor) -> Made:
    """Three values of one shape."""
    axis = pick.of((0, 1, -1))
    spellings = (
        lambda *xs: sum(xs),
        lambda *xs: sum(list(xs)),
        lambda *xs: functools.reduce(operator.add, xs),
        lambda *xs: torch.stack(xs, axis).sum(axis),
        lambda *xs: torch.stack(list(xs), dim=axis).mean(dim=axis),
        lambda *xs: torch.mean(torch.stack(xs), 0),
        lambda *xs: torch.sum(torch.stack([xs[0], xs[1]], axis), dim=axis),
        lambda *xs: (xs[0] + xs[1]) / 2 - xs[2],
    )
    return function(pick.of(spellings))


def broadcast(pick: Pick, x: Tensor, *others: Tensor) -> Made:
    """Values that fit by repetition."""
    add, subtract = lambda a, b, *_: a + b, lambda a, b, *_: b - a
    return function(add if x is others[0] else pick.of((add, subtract)))  # what is 0 has no scale to be exact at


def gate(pick: Pick, x: Tensor, *others: Tensor) -> Made:
    """A product of two values: no affine map."""
    return function(pick.of((lambda a, b, *_: a * torch.sigmoid(b), lambda a, b, *_: a * b.mean(-1, keepdim=True))))
