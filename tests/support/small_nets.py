"""A small network with a stem that is folded, a block that becomes a graph and a tail that is folded; and what it is
made of, for the tests of everything around the rewrite."""

from __future__ import annotations

import torch
from blocks import conv_norm
from support.agreement import image
from torch import Tensor, nn
from torch.nn import functional as F

X = image(2, 4, 6, 7)
Y = image(2, 4, 6, 7, seed=1)


class Block(nn.Module):
    """Three branches and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3), conv_norm(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + self.b(x) + x)


class Net(nn.Module):
    """Three sites, one in each child."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.tail = conv_norm(3), Block(), conv_norm(1)

    def features(self, x: Tensor) -> Tensor:
        return self.block(torch.sin(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.tail(self.features(x)))


SITES = {"stem.0", "block.fused", "tail.0"}
