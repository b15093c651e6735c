"""Transposed convolutions: beside each other, and with what stands before and after them.

The heads and decoders of segmentation networks (Ronneberger et al., "U-Net", arXiv 1505.04597) and of generators.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.building import NOT_MERGED, C, Case, Spelled, Twin, conv, norm, total

KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def spread(kernel: int = 4, stride: int = 2, padding: int = 1, axes: int = 2, **settings: Any) -> Any:
    """A transposed convolution of C channels, unless told otherwise."""
    kind, inputs, outputs = KINDS[axes - 1], settings.pop("inputs", C), settings.pop("outputs", C)
    return kind(inputs, outputs, kernel, stride, padding, **settings)


def branches(axes: int = 2, groups: int = 1) -> nn.Module:
    """Kernels of three sizes and dilations, of one stride and one growth, and a norm for two of them."""
    made = partial(spread, axes=axes)
    dilated = made(2, padding=1, dilation=3, groups=groups, bias=False)
    return total(
        made(),
        nn.Sequential(made(2, padding=0, groups=groups), norm(axes=axes)),
        nn.Sequential(dilated, norm(axes=axes)),
    )


def stretched(axes: int) -> nn.Module:
    """Output padding, and strides that differ."""
    strides = (3, 2, 2)[:axes]
    return total(
        KINDS[axes - 1](C, C, 3, strides, 1, 1, bias=False),
        KINDS[axes - 1](C, C, 1, strides, 0, 1),
        KINDS[axes - 1](C, C, 5, strides, 2, 1, groups=C),
    )


def in_functions(m: Spelled, x: Tensor) -> Tensor:
    return F.conv_transpose2d(x, m.w, m.b, 2, 1) + F.conv_transpose2d(x, m.v, stride=2)


def cropped(m: Spelled, x: Tensor) -> Tensor:
    """Cut to the size of the input times the stride, then normalised."""
    return m.n(m.a(x)[:, :, 1:-1, 1:-1])


def fitted(m: Spelled, x: Tensor) -> Tensor:
    return m.a(x) + m.b(F.pad(x, (1, 1, 1, 1)))


def larger(factor: Any, layer: nn.Module, *others: nn.Module, mode: str = "nearest") -> nn.Sequential:
    """Upsampling, then layers."""
    return nn.Sequential(nn.Upsample(scale_factor=factor, mode=mode), layer, *others)


CASES = [
    *(
        Case(
            f"upsampled, then a kernel, {axes}-d",
            lambda axes=axes: larger(2, conv(3, axes=axes)),
            "swap",
            axes=axes,
        )
        for axes in (1, 2, 3)
    ),
    Case(
        "upsampled by 3, 5x5 with groups, norm",
        lambda: larger(3, conv(5, groups=2), norm()),
        "swap",
    ),
    Case(
        "upsampled along one axis, padded, then a kernel",
        lambda: larger((4, 1), nn.ZeroPad2d((1, 0, 2, 1)), conv((4, 2), padding=0), mode="nearest-exact"),
        "swap",
    ),
    Case(
        "upsampled, branches",
        lambda: nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2), total(conv(3), conv(1))),
    ),
    *(Case(f"transposed branches, {axes}-d", lambda axes=axes: branches(axes), axes=axes) for axes in (1, 2, 3)),
    Case("transposed branches with groups", lambda: branches(groups=2)),
    *(Case(f"transposed, with output padding, {axes}-d", lambda a=axes: stretched(a), axes=axes) for axes in (1, 2, 3)),
    Case(
        "transposed, in functions",
        lambda: Spelled(
            in_functions,
            w=nn.Parameter(torch.empty(C, 6, 4, 4)),
            v=nn.Parameter(torch.empty(C, 6, 2, 2)),
            b=nn.Parameter(torch.empty(6)),
        ),
    ),
    *(
        Case(
            f"transposed, then 1x1, {axes}-d",
            lambda axes=axes: nn.Sequential(spread(axes=axes), conv(1, axes=axes)),
            "swap",
            axes=axes,
        )
        for axes in (1, 2, 3)
    ),
    *(
        Case(
            f"1x1, then transposed, {axes}-d",
            lambda axes=axes: nn.Sequential(conv(1, axes=axes, bias=False), spread(axes=axes, groups=2)),
            "swap",
            axes=axes,
        )
        for axes in (1, 2, 3)
    ),
    Case(
        "1x1, transposed, norm, 1x1",
        lambda: nn.Sequential(conv(1, bias=False), spread(2, padding=0), norm(), conv(1)),
        "swap",
    ),
    Case("transposed, cropped, then norm", lambda: Spelled(cropped, a=spread(4, padding=0), n=norm())),
    Case("transposed beside a padded one", lambda: Spelled(fitted, a=spread(), b=spread(4, padding=3))),
    Case("transposed of stride 1 beside others", lambda: total(spread(3, 1, 1), conv(3), nn.Identity())),
    Case(
        "transposed, in halves",
        lambda: Spelled(lambda m, x: torch.cat((m.a(x), m.b(x)), 1), a=spread(), b=spread(2, padding=0)),
    ),
    Case(
        "a scale before a transposed one",
        lambda: Spelled(lambda m, x: m.a(x * m.s), a=spread(), s=nn.Parameter(torch.empty(C, 1, 1))),
    ),
]

TWINS = [
    Twin(
        "1x1 with a bias, then a grouped transposed",
        "shift-before-padding",
        lambda: nn.Sequential(conv(1), spread(3, 2, 1, groups=4)),
        wrong=NOT_MERGED,
    ),
    Twin(
        "norm, then transposed", "shift-before-padding", lambda: nn.Sequential(norm(), spread()), 1, 1, wrong=NOT_MERGED
    ),
    Twin(
        "3x3, then transposed",
        "padding-between",
        lambda: nn.Sequential(conv(3, bias=False), spread(3, 2, 0)),
        wrong=NOT_MERGED,
    ),
    Twin(
        "transposed, then 3x3", "padding-between", lambda: nn.Sequential(spread(bias=False), conv(3)), wrong=NOT_MERGED
    ),
    Twin(
        "transposed, then 1x1 of stride 2",
        "transposed-convolution",
        lambda: nn.Sequential(spread(3, 2), conv(1, stride=2, padding=0)),
        wrong=NOT_MERGED,
    ),
]
