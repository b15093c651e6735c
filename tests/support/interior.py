"""The one convolution that a block would be, judged by the middle of a large map: what a careless merge makes of it.

By automatic differentiation, without any code of repfuse: the derivative of one inner pixel of the output is the
kernel, and what is left of the pixel's value is the bias. Where the block is an affine map that looks the same in every
place, this convolution is the block; else it differs, at the border or everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDES = {1: 21, 2: 21, 3: 9}
"""How large a map has to be, by its number of axes, that its middle does not see the border."""


class Interior(nn.Module):
    """The convolution of the middle of ``block``, with zeros around the image, as large as the output of the block."""

    def __init__(self, block: nn.Module, channels: int, axes: int, side: int) -> None:
        super().__init__()
        self.block, self.axes = block, axes
        x = torch.randn(1, channels, *[side] * axes, generator=torch.Generator().manual_seed(9)).double()
        x.requires_grad_()
        y = block(x * 1)  # a block may write into what it is given
        middle = [size // 2 for size in y.shape[2:]]

        def derivative(value: Tensor) -> Tensor:
            return torch.autograd.grad(value, x, retain_graph=True)[0][0]

        def first(axis: int, at: int) -> int:
            """The first position along ``axis`` that the output there depends on."""
            reads = derivative(y.select(2 + axis, at).sum()).abs().movedim(1 + axis, 0).flatten(1).sum(1)
            return int(reads.nonzero()[0])

        pixel = y[(0, slice(None), *middle)]
        self.kernel = torch.stack([derivative(value) for value in pixel])
        self.bias = (pixel - (self.kernel * x).flatten(1).sum(1)).detach()
        self.stride = [max(first(axis, at + 1) - first(axis, at), 1) for axis, at in enumerate(middle)]
        self.origin = [at * step for at, step in zip(middle, self.stride, strict=True)]
        for axis in range(axes):  # most of a large map's numbers are zeros, which would take a hundred times as long
            taps = self.kernel.abs().movedim(2 + axis, 0).flatten(1).sum(1).nonzero().flatten()
            begin, end = int(taps[0]), int(taps[-1]) + 1
            self.kernel = self.kernel.narrow(2 + axis, begin, end - begin)
            self.origin[axis] -= begin

    def forward(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The map of ``x``, of ``sizes`` pixels."""
        pads: list[int] = []
        for axis in reversed(range(self.axes)):
            reads = (sizes[axis] - 1) * self.stride[axis] + self.kernel.shape[2 + axis]
            pads += [self.origin[axis], reads - self.origin[axis] - x.shape[2 + axis]]
        function = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]
        return function(F.pad(x, pads), self.kernel, self.bias, self.stride)
