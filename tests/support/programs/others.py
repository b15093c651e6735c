"""Steps that change nothing, and steps that no convolution can be."""

from __future__ import annotations

import torch
from support.programs.made import Made, Pick, called, function
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

aten = torch.ops.aten


def nothing(pick: Pick, x: Tensor) -> Made:
    """A no-op in eval."""
    return pick.of(
        (
            called(nn.Identity()),
            called(nn.Dropout()),
            called(nn.Dropout2d(inplace=True)),
            function(lambda x: F.dropout(x, 0.5, False)),
            function(lambda x: x.clone()),
            function(lambda x: x.contiguous()),
            function(lambda x: x.detach()),
            function(lambda x: x.to(x.dtype)),
            function(aten.clone.default),
            function(lambda x: aten.dropout.default(x, 0.5, False)),
            function(lambda x: +x),
        )
    )


def relu(pick: Pick, x: Tensor) -> Made:
    """An activation or another operation that is not linear, some of them in place."""
    return pick.of(
        (
            called(nn.ReLU()),
            called(nn.ReLU(inplace=True)),
            function(F.relu),
            function(lambda x: x.relu_()),
            function(torch.tanh),
            function(lambda x: x.abs()),
            function(lambda x: x.clamp_(min=0)),
            function(lambda x: F.layer_norm(x, x.shape[-1:])),
        )
    )


def written(pick: Pick, x: Tensor) -> Made:
    """A value that is written into by slice assignment or by a view of it."""

    def assigned(x: Tensor) -> Tensor:
        x[..., 0:1] = 0.5
        return x

    def copied(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0:1] = y[:, -1:]
        return y

    def viewed(x: Tensor) -> Tensor:
        x[:, 0:1].mul_(2)
        return x

    def chunked(x: Tensor) -> Tensor:
        one, _ = x.chunk(2, 1)
        one.add_(1)
        return x

    return function(pick.of((assigned, copied, viewed, chunked)))


def checkpointed(pick: Pick, x: Tensor) -> Made:
    """A checkpointed module."""
    module = nn.BatchNorm2d(x.shape[1])
    return Made(lambda m, x: checkpoint.checkpoint(m, x, use_reentrant=False), module)
