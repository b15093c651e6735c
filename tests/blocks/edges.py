"""Super-resolution blocks: chains that widen, run a kernel and narrow again, and frozen edge filters.

Bhardwaj et al., "SESR: Collapsible Linear Blocks" (arXiv 2103.09404); Zhang et al., "Edge-oriented Convolution Block"
(ECBSR, ACM MM 2021); Du et al., "Fast and Memory-Efficient Network" (RRRB, arXiv 2204.08397); Wan et al., "Swift
Parameter-free Attention Network" (SPAN, arXiv 2311.12770).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.building import NOT_IN_ATEN, C, Case, Spelled, Twin, conv, scale, total
from repfuse.plans import Policy

SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
FILTERS = (SOBEL, SOBEL.T, LAPLACIAN)


def sesr(wide: int = 64, first: int = 5, second: int = 1, **settings: bool) -> Spelled:
    """A wide kernel, a 1x1 back, and the skip: no activation in between."""
    widen, narrow = conv(first, outputs=wide, **settings), conv(second, inputs=wide, **settings)
    return Spelled(lambda m, x: m.narrow(m.widen(x)) + x, widen=widen, narrow=narrow)


def framed(y: Tensor, value: Tensor) -> Tensor:
    """A frame of one pixel around a map, with one value per channel."""
    y = F.pad(y, (1, 1, 1, 1), "constant", 0)
    value = value.view(1, -1, 1, 1)
    y[:, :, 0:1, :] = value
    y[:, :, -1:, :] = value
    y[:, :, :, 0:1] = value
    y[:, :, :, -1:] = value
    return y


class Edge(nn.Module):
    """A 1x1, framed by its bias, then a frozen filter per channel with a learned factor and bias.

    ``excess`` is added to the value of the frame.
    """

    def __init__(self, mask: Tensor, excess: float = 0.0) -> None:
        super().__init__()
        self.point, self.excess = conv(1), excess
        self.factor, self.bias = scale(C, 1, 1, 1), scale(C)
        self.register_buffer("mask", mask.expand(C, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.point.weight, self.point.bias)
        y = framed(y, self.point.bias + self.excess)
        return F.conv2d(y, self.factor * self.mask, self.bias, groups=C)


def wide_row(wide: int = 8, excess: float = 0.0) -> Spelled:
    """ECBSR's 1x1 -> 3x3, framed by the bias."""

    def forward(m: Spelled, x: Tensor) -> Tensor:
        return m.b(framed(F.conv2d(x, m.a.weight, m.a.bias), m.a.bias + excess))

    return Spelled(forward, a=conv(1, outputs=wide), b=conv(3, inputs=wide, padding=0))


def ecbsr() -> nn.Sequential:
    """The whole block, with its activation."""
    return nn.Sequential(total(conv(3), wide_row(), *map(Edge, FILTERS), nn.Identity()), nn.PReLU(C))


def zero_framed(m: Spelled, x: Tensor) -> Tensor:
    return m.b(F.pad(m.a(x), (1, 1, 1, 1))) + m.c(x)


def half_framed(m: Spelled, x: Tensor) -> Tensor:
    """Filled above and below, with zeros left and right."""
    y = F.pad(m.a(x), (1, 1, 1, 1))
    y[:, :, 0:1, :] = m.a.bias.view(1, -1, 1, 1)
    y[:, :, -1:, :] = m.a.bias.view(1, -1, 1, 1)
    return m.b(y) + m.c(x)


def rrrb(excess: float = 0.0) -> Spelled:
    """Widen, a 3x3 of the framed map plus that map, narrow, plus the skip."""

    def forward(m: Spelled, x: Tensor) -> Tensor:
        y = m.widen(x)
        return m.narrow(m.kernel(framed(y, m.widen.bias + excess)) + y) + x

    wide = 2 * C
    widen, narrow = conv(1, outputs=wide), conv(1, inputs=wide)
    return Spelled(forward, widen=widen, kernel=conv(3, inputs=wide, outputs=wide, padding=0), narrow=narrow)


def span(padded_first: bool = True) -> Spelled:
    """Three layers in a row beside a 1x1; the padding is put before the first, or inside the second."""

    def forward(m: Spelled, x: Tensor) -> Tensor:
        return m.row(F.pad(x, (1, 1, 1, 1)) if padded_first else x) + m.skip(x)

    kernel = conv(3, inputs=2 * C, outputs=2 * C, padding=0 if padded_first else 1)
    return Spelled(forward, row=nn.Sequential(conv(1, outputs=2 * C), kernel, conv(1, inputs=2 * C)), skip=conv(1))


def blur(axes: int, padded: bool) -> Spelled:
    """A frozen depthwise blur, and a kernel that pads its result where ``padded``."""
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    mask = taps
    for _ in range(axes - 1):
        mask = mask.unsqueeze(-1) * taps
    function = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return Spelled(
        lambda m, x: m.a(function(x, m.mask, groups=C)),
        mask=nn.Buffer(mask.expand(C, 1, *mask.shape).clone()),
        a=conv(3, axes=axes, padding=int(padded)),
    )


CASES = [
    Case("SESR", sesr),
    Case("SESR without bias", lambda: sesr(bias=False)),
    Case("SESR of 1x1 and 3x3", lambda: sesr(first=1, second=3, bias=False)),
    Case("SESR's chain alone", lambda: nn.Sequential(conv(5, outputs=64), conv(1, inputs=64)), "swap"),
    *(
        Case(
            f"1x1, 3x3, 1x1, unpadded, {axes}-d",
            lambda axes=axes: nn.Sequential(
                conv(1, outputs=16, axes=axes),
                conv(3, inputs=16, outputs=16, padding=0, axes=axes),
                conv(1, inputs=16, axes=axes),
            ),
            "swap",
            axes=axes,
            least=3,
        )
        for axes in (1, 2, 3)
    ),
    *(
        Case(
            f"3x3 -> 3x3, unpadded, {axes}-d",
            lambda axes=axes: nn.Sequential(conv(3, outputs=64, axes=axes), conv(3, inputs=64, padding=0, axes=axes)),
            "swap",
            axes=axes,
            least=3,
        )
        for axes in (1, 2)
    ),
    Case("SESR of a biased 1x1 and 3x3, with a channel of ones", lambda: sesr(first=1, second=3)),
    Case("ECBSR", ecbsr, less_in=NOT_IN_ATEN),
    *(
        Case(f"edge filter {number}", lambda mask=mask: total(conv(3), Edge(mask)), less_in=NOT_IN_ATEN)
        for number, mask in enumerate(FILTERS)
    ),
    Case("ECBSR's row beside a kernel", lambda: total(conv(3), wide_row()), less_in=NOT_IN_ATEN),
    Case("RRRB", rrrb, less_in=NOT_IN_ATEN),
    Case("RRRB after a 3x3", lambda: nn.Sequential(conv(3), rrrb()), convolutions=2, less_in=NOT_IN_ATEN),
    Case("SPAN", span),
    *(
        Case(
            f"blur then kernel, {axes}-d",
            lambda axes=axes: blur(axes, padded=False),
            axes=axes,
            least=5,
            side=12,
            policy=Policy.ALWAYS,
        )
        for axes in (1, 2, 3)
    ),
]

TWINS = [
    Twin("SESR of two padded kernels", "padding-between", lambda: sesr(second=3)),
    Twin("SESR of a biased 1x1 and 3x3", "shift-before-padding", lambda: sesr(wide=4, first=1, second=3)),
    Twin("an edge filter with another frame", "shift-before-padding", lambda: total(conv(3), Edge(SOBEL, 1.0)), 3),
    Twin("ECBSR's row with another frame", "shift-before-padding", lambda: total(conv(3), wide_row(excess=1.0)), 3),
    Twin(
        "ECBSR's row framed by zeros",
        "shift-before-padding",
        lambda: Spelled(zero_framed, a=conv(1), b=conv(3, padding=0), c=conv(1)),
        3,
    ),
    Twin(
        "ECBSR's row framed on two sides",
        "shift-before-padding",
        lambda: Spelled(half_framed, a=conv(1), b=conv(3, padding=0), c=conv(1)),
        3,
    ),
    Twin("RRRB with another frame", "shift-before-padding", lambda: rrrb(1.0), 3),
    Twin("RRRB with another frame, after a 3x3", "shift-before-padding", lambda: nn.Sequential(conv(3), rrrb(1.0)), 4),
    Twin("SPAN padded inside", "shift-before-padding", lambda: span(padded_first=False), 3),
    *(
        Twin(
            f"blur, then padded, {axes}-d",
            "padding-between",
            lambda axes=axes: blur(axes, padded=True),
            axes=axes,
            least=3,
        )
        for axes in (1, 2, 3)
    ),
]
