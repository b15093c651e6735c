"""Networks of one size: what comes after the branches has as many weights as their output has numbers."""

from __future__ import annotations

import torch
from support.exported import Block
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = (1, 4, 12, 12)


class Flat(nn.Module):
    """Flattens for a linear layer."""

    def __init__(self, size: int = 12) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4 * size * size, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).flatten(1))


class Pooled(Flat):
    """Pools to a size before that: it takes every size, and ONNX writes the pooling for one."""

    def __init__(self) -> None:
        super().__init__(size=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.block(x), 6).flatten(1))


class Positions(nn.Module):
    """Adds an embedding to each position, and one more token to each sample, by a number that Python makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 5)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 145, 4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.block(x).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.repeat(len(tokens), 1, 1), tokens], 1) + self.positions)[:, 0]


class Single(Flat):
    """Takes a batch of one alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).view(1, -1))


NETWORKS = (Flat, Pooled, Positions, Single)
