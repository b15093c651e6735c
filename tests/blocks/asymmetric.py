"""Kernels of different sizes and shapes in one sum.

Ding et al., "ACNet: Strengthening the Kernel Skeletons" (arXiv 1908.03930): a square, a vertical and a horizontal
kernel, whose inputs are cropped where the square one pads too little.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from blocks.building import ELSEWHERE, NOT_MERGED, Case, Spelled, Twin, conv, conv_norm, norm, pair, total


class Cropped(nn.Module):
    """Cuts ``margin`` off both ends of the chosen spatial axes."""

    def __init__(self, *margins: int) -> None:
        super().__init__()
        self.margins = margins

    def forward(self, x: Tensor) -> Tensor:
        return x[(slice(None), slice(None), *(slice(m, -m) if m else slice(None) for m in self.margins))]


def acnet(padding: int, kernel: int = 3, **settings: int) -> Spelled:
    """ACNet's block. A skeleton kernel sees the middle rows; with little padding its input has to be cropped first."""
    half = kernel // 2
    pads, crop = max(0, padding - half), max(0, half - padding)
    rest = {"bias": False} | settings
    square = conv_norm(kernel, padding=padding, **settings)
    tall = nn.Sequential(
        Cropped(0, crop) if crop else nn.Identity(), conv((kernel, 1), padding=(padding, pads), **rest), norm()
    )
    flat = nn.Sequential(
        Cropped(crop, 0) if crop else nn.Identity(), conv((1, kernel), padding=(pads, padding), **rest), norm()
    )
    return total(square, tall, flat)


def cropped(axes: int) -> Spelled:
    """A kernel without padding beside a 1x1 of the map's inside."""
    return total(conv(3, padding=0, axes=axes), nn.Sequential(Cropped(*[1] * axes), conv(1, axes=axes)))


def bottom_padded(m: Spelled, x: Tensor) -> Tensor:
    return m.a(F.pad(x, (2, 0, 1, 1))) + m.b(x)


CASES = [
    Case("ACNet, its sum alone", lambda: acnet(1)),
    Case("ACNet, groups", lambda: acnet(1, groups=2)),
    Case("ACNet, stride 2", lambda: acnet(1, stride=2)),
    Case("ACNet, cropped", lambda: acnet(0), least=3),
    Case("ACNet 5x5, cropped by one", lambda: acnet(1, kernel=5), least=3),
    *(Case(f"cropped, {axes}-d", lambda axes=axes: cropped(axes), axes=axes, least=3) for axes in (1, 2, 3)),
    Case("cropped with narrow", lambda: pair(lambda m, x: F.conv2d(x, m.a.weight) + m.b(x[..., 1:-1, 1:-1])), least=3),
    Case("1xk and kx1", lambda: total(conv((1, 5)), conv((3, 1)), conv(1))),
    Case("even kernels", lambda: total(conv(2, padding=1), conv(4, padding=2), conv((2, 4), padding=(1, 2)))),
    Case("even kernels, same, alone", lambda: total(conv(2, padding="same"), conv(4, padding="same"), conv(1))),
    Case("dilations", lambda: total(conv(3, dilation=3), conv(3, dilation=2), conv(3))),
    Case(
        "causal",
        lambda: Spelled(lambda m, x: m.a(F.pad(x, (2, 0))) + m.b(x), a=conv(3, padding=0, axes=1), b=conv(1, axes=1)),
        axes=1,
    ),
    Case("padded before, unevenly", lambda: Spelled(bottom_padded, a=conv(3, padding=0), b=conv(1))),
    Case("ZeroPad2d", lambda: total(nn.Sequential(nn.ZeroPad2d(1), conv(3, padding=0)), conv(1))),
    Case("three kinds of groups", lambda: total(conv(3, groups=4), conv(1, groups=2), conv(3))),
    Case("mixed groups, 3-d", lambda: total(conv(3, groups=4, axes=3), conv(1, groups=2, axes=3)), axes=3),
    Case("asymmetric, 3-d", lambda: total(conv((3, 1, 1), axes=3), conv((1, 3, 3), axes=3), conv(1, axes=3)), axes=3),
    Case("RepVGG block of speech", lambda: total(conv_norm(3, axes=1), conv_norm(1, axes=1), norm(axes=1)), axes=1),
    Case("dilated speech", lambda: total(conv_norm(5, dilation=2, axes=1), conv_norm(3, dilation=4, axes=1)), axes=1),
]

TWINS = [
    Twin(
        "ACNet with a reflected branch",
        "padding-mode",
        lambda: total(conv(3), conv((1, 3), padding=(0, 1), padding_mode="reflect"), conv((3, 1))),
        least=2,
    ),
    Twin(
        "ACNet, cropped by count",
        "size-dependent-slice",
        lambda: Spelled(lambda m, x: m.a(x) + m.h(x[:, :, 1:5]), a=conv(3, padding=0), h=conv((1, 3), padding=0)),
        wrong=ELSEWHERE,
        least=6,
    ),
    Twin("ACNet after a normalisation", "shift-before-padding", lambda: nn.Sequential(norm(), acnet(1)), 1, 1),
    Twin(
        "a crop of a convolution, padded again",
        "padding-between",
        lambda: Spelled(lambda m, x: m.b(m.a(x)[:, :, 1:-1, 1:-1]), a=conv(5), b=conv(3)),
    ),
    Twin(
        "strides that agree on one size",
        "size-mismatch",
        lambda: total(conv(3, stride=2), conv(2, stride=2, padding=0)),
        wrong=ELSEWHERE,
        square=True,
    ),
    Twin(
        "a pool instead of the smaller kernel",
        "size-mismatch",
        lambda: total(conv(3, stride=2), nn.Sequential(nn.AvgPool2d(2, 2), conv(1))),
        wrong=ELSEWHERE,
        square=True,
    ),
    Twin("a branch of a row only", "broadcast", lambda: pair(lambda m, x: m.a(x) + m.b(x[:, :, :1])), wrong=NOT_MERGED),
    Twin(
        "causal, padded after the norm",
        "shift-before-padding",
        lambda: Spelled(
            lambda m, x: m.a(F.pad(m.n(x), (2, 0))) + m.b(x),
            a=conv(3, padding=0, axes=1),
            b=conv(1, axes=1),
            n=norm(axes=1),
        ),
        2,
        1,
        axes=1,
    ),
]
