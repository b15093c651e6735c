"""What is exact and still not worth it, by the law of cost, and what a policy makes of it.

Howard et al., "MobileNets" (arXiv 1704.04861); He et al., "Deep Residual Learning" (bottlenecks, arXiv 1512.03385);
Huang et al., "DenseNet" (arXiv 1608.06993).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from blocks.basic import RepVGG
from blocks.building import NOT_MERGED, Case, Spelled, Twin, conv, conv_norm, norm, total
from blocks.edges import sesr, span
from repfuse.plans import Policy

WIDE = 64


def wide(kernel: int, inputs: int = WIDE, outputs: int = WIDE, **settings: int | bool) -> nn.Module:
    return conv(kernel, inputs=inputs, outputs=outputs, **settings)


def separable() -> nn.Sequential:
    """MobileNet's chain without the activations, as some search spaces have it."""
    return nn.Sequential(wide(3, groups=WIDE), wide(1))


def separable_normed() -> nn.Sequential:
    return nn.Sequential(wide(3, groups=WIDE, bias=False), norm(WIDE), wide(1, bias=False), norm(WIDE))


def bottleneck() -> nn.Sequential:
    return nn.Sequential(wide(1, outputs=16), wide(3, inputs=16, outputs=16, padding=0), wide(1, inputs=16))


def grouped_and_dense() -> Spelled:
    return total(wide(5, groups=WIDE), wide(1))


def dense_net() -> Spelled:
    """Each layer reads everything before it; all of it goes on."""

    def forward(m: Spelled, x: Tensor) -> Tensor:
        one = torch.cat([x, m.a(x)], 1)
        return torch.cat([one, m.b(one)], 1)

    return Spelled(forward, a=wide(3, outputs=16), b=wide(1, inputs=WIDE + 16, outputs=16))


def inception() -> Spelled:
    """InceptionNeXt: parts convolved depthwise, joined, normalised; with the 1x1 as one kernel they would be dense."""

    def forward(m: Spelled, x: Tensor) -> Tensor:
        rest, a, b, c = torch.split(x, [WIDE - 24, 8, 8, 8], 1)
        return m.up(m.norm(torch.cat((rest, m.a(a), m.b(b), m.c(c)), 1)))

    parts = {
        name: nn.Conv2d(8, 8, kernel, padding=(kernel[0] // 2, kernel[1] // 2), groups=8)
        for name, kernel in (("a", (3, 3)), ("b", (1, 11)), ("c", (11, 1)))
    }
    return Spelled(forward, **parts, norm=norm(WIDE), up=wide(1, outputs=4 * WIDE))


def narrowed(between: int) -> nn.Sequential:
    """Two 1x1 in a row, of fewer channels between: the fewer, the more arithmetic it takes to merge them."""
    return nn.Sequential(wide(1, outputs=between), wide(1, inputs=between, outputs=96))


def padded(*after: nn.Module) -> nn.Sequential:
    """A pad that no convolution can do: it stays an operator of its own, as TensorFlow's strided layers have it."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(3, padding=0, stride=2), *after)


DECLINED = [
    ("separable", separable, 2),
    ("bottleneck", bottleneck, 3),
    ("grouped and dense", grouped_and_dense, 2),
    ("DenseNet", dense_net, 2),
]
"""Blocks that the law of cost leaves alone, and their convolutions."""

_at = partial(Case, channels=WIDE, side=14, policy=Policy.ALWAYS)

CASES = [
    _at("separable, always", separable, "swap", axes=2),
    _at("bottleneck, always", bottleneck, "swap", least=3),
    _at("grouped and dense, always", grouped_and_dense),
    _at("RepVGG, always", lambda: total(conv_norm(3), conv_norm(1), norm()), channels=4),
    Case("narrowed, enough gained", partial(narrowed, 32), "swap", channels=WIDE, side=28),
    Case("padded, its norm folded", lambda: padded(norm()), "fold", least=2),
    Case("separable, its norms folded", separable_normed, "fold", convolutions=2, sites=2, channels=WIDE, side=14),
    Case("InceptionNeXt, its norm into the 1x1", inception, "fold", convolutions=4, channels=WIDE, side=24),
    Case("RepVGG, never composed", RepVGG, "graph", policy=Policy.NEVER_COMPOSE),
    Case("SPAN, always", span, policy=Policy.ALWAYS),
    Case("SESR, always", sesr, policy=Policy.ALWAYS),
]

TWINS = [
    *(
        Twin(name, "cost", make, convolutions, channels=WIDE, side=14, least=3, wrong=NOT_MERGED)
        for name, make, convolutions in DECLINED
    ),
    Twin("narrowed, too little gained", "cost", partial(narrowed, 23), 2, channels=WIDE, side=28, wrong=NOT_MERGED),
    Twin("padded, nothing gained", "cost", padded, 1, least=2, wrong=NOT_MERGED),
    Twin("SESR, never composed", "policy", sesr, 2, policy=Policy.NEVER_COMPOSE, wrong=NOT_MERGED),
    Twin("SPAN, never composed", "policy", span, 4, policy=Policy.NEVER_COMPOSE, wrong=NOT_MERGED),
    Twin(
        "separable, never composed",
        "policy",
        separable,
        2,
        channels=WIDE,
        policy=Policy.NEVER_COMPOSE,
        wrong=NOT_MERGED,
    ),
]
