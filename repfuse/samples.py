"""The networks of `sample_checkpoints/`, in the package because the safe loader builds only known classes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn


class NotebookBlock(nn.Module):
    """``conv3(x) + conv1(x) + x``: ``[N, channels, H, W]`` to the same shape, as notebooks write it."""

    input_shape: ClassVar[tuple[int, ...]] = (1, 16, 32, 32)

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(channels, channels, 3, padding="same")
        self.conv1 = nn.Conv2d(channels, channels, 1, padding="same")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both convolutions and the input."""
        return self.conv3(x) + self.conv1(x) + x  # type: ignore[no-any-return]


class RepVGGBlock(nn.Module):
    """ReLU of a sum of branches: 3x3, 1x1 and, where the shapes allow, the input, each with its BatchNorm.

    ``[N, inputs, H, W]`` to ``[N, outputs, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3 = _conv_norm(inputs, outputs, 3, stride)
        self.conv1 = _conv_norm(inputs, outputs, 1, stride)
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation of the sum of the branches."""
        total = self.conv3(x) + self.conv1(x)
        if self.skip is not None:
            total = total + self.skip(x)
        return self.activation(total)  # type: ignore[no-any-return]


class DigitsRepVGG(nn.Module):
    """A RepVGG for scikit-learn's 8x8 digits: grey images ``[N, 1, 8, 8]`` in 0..1 to logits ``[N, 10]``."""

    input_shape: ClassVar[tuple[int, ...]] = (1, 1, 8, 8)

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            RepVGGBlock(1, width),
            RepVGGBlock(width, width),
            RepVGGBlock(width, 2 * width, stride=2),
            RepVGGBlock(2 * width, 2 * width),
            RepVGGBlock(2 * width, 2 * width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.head(self.pool(self.blocks(x)).flatten(1))  # type: ignore[no-any-return]


class MobileOneLayer(nn.Module):
    """ReLU of a sum of two equal convolutions, a 1x1 beside larger ones and, where the shapes allow, the input, each
    with its BatchNorm: depthwise where there are as many groups as channels.

    ``[N, inputs, H, W]`` to ``[N, outputs, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(_conv_norm(inputs, outputs, kernel, stride, groups) for _ in range(2))
        self.scale = _conv_norm(inputs, outputs, 1, stride, groups) if kernel > 1 else None
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation of the sum of the branches."""
        branches = (*self.convolutions, *(each for each in (self.scale, self.skip) if each is not None))
        return self.activation(sum(branch(x) for branch in branches))  # type: ignore[no-any-return]


class DigitsMobileOne(nn.Module):
    """A MobileOne for the digits of ``DigitsRepVGG``: layers of depthwise 3x3 and of 1x1 in turn."""

    input_shape: ClassVar[tuple[int, ...]] = (1, 1, 8, 8)

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = MobileOneLayer(1, width, 3)
        self.blocks = nn.Sequential(
            *_separable(width, width),
            *_separable(width, 2 * width, stride=2),
            *_separable(2 * width, 2 * width),
            *_separable(2 * width, 2 * width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))  # type: ignore[no-any-return]


def _separable(inputs: int, outputs: int, stride: int = 1) -> tuple[MobileOneLayer, MobileOneLayer]:
    return MobileOneLayer(inputs, inputs, 3, stride, groups=inputs), MobileOneLayer(inputs, outputs, 1)


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
