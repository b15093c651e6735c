"""Ding et al., "Diverse Branch Block" (arXiv 2103.13425): a kernel, a 1x1, an average and a 1x1 -> kernel.

The last two normalise before the window, so their border is filled with what the normalisation makes of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.building import (
    ELSEWHERE,
    EVERYWHERE,
    NOT_IN_ATEN,
    POOLS,
    C,
    Case,
    Spelled,
    Twin,
    conv,
    conv_norm,
    norm,
    total,
)


class NormAndBorder(nn.Module):
    """A normalisation, then a border of its value at zero, or of zeros where ``zeros``, written by assignment."""

    def __init__(self, width: int, axes: int = 2, zeros: bool = False) -> None:
        super().__init__()
        self.norm, self.width, self.axes, self.zeros = norm(axes=axes), width, axes, zeros

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.norm(x), [self.width] * (2 * self.axes))
        if self.zeros:
            return y
        n = self.norm
        value = n.bias.detach() - n.running_mean * n.weight.detach() / torch.sqrt(n.running_var + n.eps)
        value = value.view(1, -1, *[1] * self.axes)
        for axis in range(2, 2 + self.axes):
            before = [slice(None)] * axis
            y[(*before, slice(0, self.width))] = value
            y[(*before, slice(-self.width, None))] = value
        return y


class IdentityBased(nn.Module):
    """A 1x1 convolution whose weight is a parameter added to a constant identity."""

    def __init__(self, groups: int = 1, axes: int = 2) -> None:
        super().__init__()
        self.conv = conv(1, bias=False, groups=groups, axes=axes)
        identity = torch.zeros(C, C // groups, *[1] * axes)
        for channel in range(C):
            identity[channel, channel % (C // groups)] = 1
        self.register_buffer("identity", identity)
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight + self.identity.to(self.conv.weight.device)
        function = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]
        return function(x, kernel, None, stride=1, groups=self.conv.groups)


def averaged(width: int, zeros: bool = False, stride: int = 1, **settings: int) -> nn.Sequential:
    """The 1x1 -> average branch."""
    axes = settings.get("axes", 2)
    return nn.Sequential(
        conv(1, bias=False, **settings),
        NormAndBorder(width, axes, zeros),
        POOLS[axes - 1](2 * width + 1, stride, 0),
        norm(axes=axes),
    )


def in_a_row(width: int, zeros: bool = False, stride: int = 1, based: bool = True, **settings: int) -> nn.Sequential:
    """The 1x1 -> kernel branch."""
    axes, groups = settings.get("axes", 2), settings.get("groups", 1)
    return nn.Sequential(
        IdentityBased(groups, axes) if based else conv(1, bias=False, **settings),
        NormAndBorder(width, axes, zeros),
        conv(2 * width + 1, padding=0, bias=False, stride=stride, **settings),
        norm(axes=axes),
    )


def dbb(kernel: int = 3, **settings: int) -> Spelled:
    """The whole block."""
    width, stride = kernel // 2, settings.pop("stride", 1)
    return total(
        conv_norm(kernel, stride=stride, **settings),
        conv_norm(1, stride=stride, **settings),
        averaged(width, stride=stride, **settings),
        in_a_row(width, stride=stride, **settings),
    )


def uncounted() -> nn.AvgPool2d:
    """An average that divides by the pixels of the image that it sees."""
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


CASES = [
    Case("DBB", dbb, less_in=NOT_IN_ATEN),
    Case("DBB, groups", lambda: dbb(groups=2), less_in=NOT_IN_ATEN),
    Case("DBB, depthwise", lambda: dbb(groups=C), less_in=NOT_IN_ATEN),
    Case("DBB 5x5", lambda: dbb(5), less_in=NOT_IN_ATEN),
    Case("DBB, stride 2", lambda: dbb(stride=2), less_in=NOT_IN_ATEN),
    Case("DBB, 1-d", lambda: dbb(axes=1), axes=1, less_in=NOT_IN_ATEN),
    Case("DBB, 3-d", lambda: dbb(axes=3), axes=3, less_in=NOT_IN_ATEN),
    Case("DBB with a plain first layer", lambda: total(conv_norm(3), in_a_row(1, based=False)), less_in=NOT_IN_ATEN),
    Case("identity-based 1x1", lambda: total(IdentityBased(), conv(1))),
    Case("identity-based 1x1, groups", lambda: total(IdentityBased(groups=2), conv(3, groups=2))),
    Case("the average branch alone", lambda: averaged(1), less_in=NOT_IN_ATEN),
    Case("the branch in a row alone", lambda: in_a_row(1), less_in=NOT_IN_ATEN),
    Case("average that counts its padding", lambda: total(conv(3), nn.AvgPool2d(3, 1, 1))),
    Case(
        "average, ceil_mode without effect",
        lambda: total(conv(3, padding=0), nn.AvgPool2d(3, 1, 0, ceil_mode=True)),
        least=3,
    ),
    Case(
        "average with a divisor",
        lambda: total(conv(3), nn.AvgPool2d(3, 1, 1, count_include_pad=False, divisor_override=5)),
    ),
    *(
        Case(
            f"average in functions, {axes}-d",
            lambda axes=axes: Spelled(
                lambda m, x: (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1](x, 3, 1, 1) + m.a(x),
                a=conv(3, axes=axes),
            ),
            axes=axes,
            least=axes,
        )
        for axes in (1, 2, 3)
    ),
]

TWINS = [
    Twin(
        "DBB whose average branch is padded with zeros",
        "shift-before-padding",
        lambda: total(conv_norm(3), conv_norm(1), averaged(1, zeros=True)),
        2,
        1,
    ),
    Twin(
        "DBB whose branch in a row is padded with zeros",
        "shift-before-padding",
        lambda: total(conv_norm(3), conv_norm(1), in_a_row(1, zeros=True)),
        3,
    ),
    Twin(
        "DBB whose average pads by itself",
        "shift-before-padding",
        lambda: total(conv_norm(3), nn.Sequential(conv_norm(1), nn.AvgPool2d(3, 1, 1), norm())),
        2,
        1,
    ),
    Twin("DBB whose average does not count its padding", "pool-padding", lambda: total(conv(3), uncounted()), 1),
    Twin(
        "1x1 -> average that does not count its padding",
        "pool-padding",
        lambda: total(conv_norm(3), nn.Sequential(conv(1), uncounted(), norm())),
        2,
        1,
    ),
    Twin(
        "average, ceil_mode with a stride",
        "pool-ceil",
        lambda: total(conv(3, stride=2), nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
        1,
        side=7,
        square=True,
        wrong=ELSEWHERE,
        other=8,
    ),
    Twin(
        "DBB normalised by the batch",
        "training-norm",
        lambda: total(conv_norm(3), nn.Sequential(conv(1), nn.BatchNorm2d(C, track_running_stats=False))),
        2,
        1,
        wrong=EVERYWHERE,
    ),
    Twin(
        "identity-based 1x1 of a pixel's mean",
        "computed-weight",
        lambda: Spelled(
            lambda m, x: F.conv2d(x, m.w + x.mean()) + m.a(x), w=nn.Parameter(torch.empty(C, C, 1, 1)), a=conv(3)
        ),
        wrong=EVERYWHERE,
    ),
    Twin(
        "1-d, in a row, padded with zeros",
        "shift-before-padding",
        lambda: total(conv_norm(3, axes=1), in_a_row(1, zeros=True, axes=1)),
        3,
        axes=1,
    ),
    Twin(
        "3-d, in a row, padded with zeros",
        "shift-before-padding",
        lambda: total(conv_norm(3, axes=3), in_a_row(1, zeros=True, axes=3)),
        3,
        axes=3,
    ),
]
