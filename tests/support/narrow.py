"""Networks that take float32 alone: within one module, at the start of their forward, or in its middle."""

from __future__ import annotations

import torch
from support.exported import Block
from torch import Tensor, nn


class DoublingKernel(nn.Module):
    """Stands for a compiled extension: PyTorch sees nothing of what it does, and it is there for float32."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * in_float32(x).detach().numpy())


def in_float32(x: Tensor) -> Tensor:
    """Return the tensor. Raises TypeError where it is of another dtype."""
    if x.dtype is not torch.float32:
        raise TypeError("expected scalar type Float")
    return x


class Kernel(nn.Module):
    """Two blocks and such a module between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kernel, self.second = Block(), DoublingKernel(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.kernel(self.first(x)))


class Asserts(nn.Module):
    """Refuses other inputs itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise TypeError("images in float32, please")
        return self.second(self.first(x))


class AssertsWithin(Asserts):
    """Refuses other values on their way."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.dtype is not torch.float32:
            raise TypeError("features in float32, please")
        return self.second(y)
