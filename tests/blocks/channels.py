"""Channels that are cut, passed, mixed and put together.

Meng et al., "RMNet" (arXiv 2111.00687); Chen et al., "RepGhost" (arXiv 2211.06088); Ma et al., "ShuffleNet V2"
(arXiv 1807.11164); Chen et al., "FasterNet" (partial convolution, arXiv 2303.03667).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.building import (
    NOT_MERGED,
    C,
    Case,
    Spelled,
    SpelledOfTwo,
    Twin,
    conv,
    conv_norm,
    norm,
    pair,
    scale,
)

HALF = C // 2


def half(kernel: int, **settings: int) -> nn.Module:
    """A convolution of half of the channels."""
    return conv(kernel, inputs=HALF, outputs=HALF, **settings)


def shuffled(x: Tensor, axes: int = 2, groups: int = 2) -> Tensor:
    """The channels of the groups in turns."""
    batch, channels = x.size(0), x.size(1)
    sides = [x.size(axis) for axis in range(2, 2 + axes)]
    return x.view(batch, groups, channels // groups, *sides).transpose(1, 2).contiguous().view(batch, channels, *sides)


def passed(axes: int) -> Spelled:
    """RMNet: what passes lies beside what is convolved, and a 1x1 reads both."""

    def forward(m: Spelled, x: Tensor) -> Tensor:
        return m.last(torch.cat([x[:, :HALF], m.a(x[:, HALF:]) + m.b(x[:, HALF:])], 1))

    return Spelled(forward, a=half(3, axes=axes), b=half(1, axes=axes), last=conv(1, axes=axes))


def kept_beside(m: Spelled, x: Tensor) -> Tensor:
    kept, mixed = torch.split(x, [HALF, HALF], dim=1)
    return torch.cat((kept, m.a(mixed) + mixed), dim=1)


def partly_convolved(m: Spelled, x: Tensor) -> Tensor:
    """A sum of joined parts, one of which is not affine: the others merge into a map of the whole."""
    mixed, kept = torch.split(x, [HALF, HALF], dim=1)
    y = torch.cat((m.a(mixed), kept), 1) + torch.cat((m.b(mixed), kept), 1)
    return y + torch.cat((m.c(mixed).abs(), kept), 1)


def of_other_parts(m: Spelled, x: Tensor) -> Tensor:
    """The same, where the parts are of two tensors."""
    mixed, _ = torch.split(x, [HALF, HALF], dim=1)
    _, kept = torch.split(x.relu(), [HALF, HALF], dim=1)
    y = torch.cat((m.a(mixed), kept), 1) + torch.cat((m.b(mixed), kept), 1)
    return y + torch.cat((mixed.abs(), kept), 1)


def halves_added(m: Spelled, x: Tensor) -> Tensor:
    one, other = m.a(x).chunk(2, 1)
    return one + other


def repghost(m: Spelled, x: Tensor) -> Tensor:
    """A cheap depthwise kernel beside its own normalised input."""
    return F.relu(m.cheap(x) + m.skip(x))


class Ordered(Spelled):
    """Three channels of ``a``, in an order that a buffer holds, and ``b``."""

    def __init__(self, forward) -> None:
        super().__init__(forward, a=conv(3), b=conv(1, outputs=3))
        self.register_buffer("order", torch.tensor([2, 0, 1]))


def repeated(m: Spelled, x: Tensor) -> Tensor:
    return m.a(x).repeat_interleave(2, dim=1) + m.b(x)


def affine(m: Spelled, x: Tensor) -> Tensor:
    """A scale per channel and a shift in one, and a layer scale in one with its sum."""
    return torch.addcmul(torch.addcmul(m.shift, m.scale, m.a(x)), m.b(x), m.gamma)


def scales(**members: nn.Module) -> Spelled:
    names = {name: nn.Parameter(torch.empty(C, 1, 1)) for name in ("shift", "scale", "gamma")}
    return Spelled(affine, **members, **names)


def read_again(m: Spelled, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(x) + y + torch.sin(y)


def joined(forward):
    """A block of two inputs, with layers ``a``, ``b``, ``c``, a norm ``n`` of what they join, and one ``m`` of one."""
    return SpelledOfTwo(
        forward, a=conv(3), b=conv(1), c=conv(1, bias=False), n=norm(2 * C), m=norm(), shift=scale(2 * C, 1, 1)
    )


def read_beside(m, x):
    y = m.b(torch.tanh(x))
    return m.n(torch.cat((m.a(x), y), 1)) + torch.cat((y, y), 1).abs()


def read_joined(m, x):
    y = torch.cat((m.a(x), m.b(torch.tanh(x))), 1)
    return m.n(y) + y.abs()


CASES = [
    *(Case(f"RMNet, {axes}-d", lambda axes=axes: passed(axes), axes=axes) for axes in (1, 2, 3)),
    Case("partial convolution beside its skip", lambda: Spelled(kept_beside, a=half(3)), convolutions=1),
    Case(
        "parts joined and added, one of them not affine",
        lambda: Spelled(partly_convolved, a=half(3), b=half(1), c=half(3)),
        "graph",
        convolutions=2,
    ),
    *(
        Case(
            f"shuffle, then 1x1, {axes}-d",
            lambda axes=axes: Spelled(lambda m, x: m.a(shuffled(x, axes)), a=conv(1, axes=axes)),
            axes=axes,
        )
        for axes in (1, 2, 3)
    ),
    Case("nn.ChannelShuffle", lambda: nn.Sequential(nn.ChannelShuffle(2), conv(3), norm())),
    Case(
        "grouped, shuffled, grouped",
        lambda: Spelled(lambda m, x: m.b(shuffled(m.a(x))), a=conv(3, groups=2), b=conv(1, groups=2)),
    ),
    Case("halves added", lambda: Spelled(halves_added, a=conv(3, outputs=2 * C))),
    Case("RepGhost", lambda: Spelled(repghost, cheap=conv_norm(3, groups=C), skip=norm()), "graph"),
    Case(
        "branches side by side, then 1x1",
        lambda: Spelled(
            lambda m, x: m.c(torch.cat([m.a(x), m.b(x), x], 1)), a=conv(3), b=conv(1), c=conv(1, inputs=3 * C)
        ),
    ),
    Case("branches side by side", lambda: pair(lambda m, x: torch.cat([m.a(x), m.b(x)], dim=1))),
    Case(
        "chosen channels",
        lambda: Spelled(lambda m, x: m.a(x)[:, [2, 0, 1]] + m.b(x), a=conv(3), b=conv(1, outputs=3)),
    ),
    Case("channels in the order of a buffer", lambda: Ordered(lambda m, x: m.a(x).index_select(1, m.order) + m.b(x))),
    Case("the same by an index", lambda: Ordered(lambda m, x: m.a(x)[:, m.order] + m.b(x))),
    Case("channels repeated", lambda: Spelled(repeated, a=conv(3, outputs=2), b=conv(1)), less_in=("decomposed",)),
    Case(
        "addcmul before a kernel without padding",
        lambda: Spelled(
            lambda m, x: m.a(torch.addcmul(m.shift, m.scale, x)),
            a=conv(3, padding=0),
            shift=scale(C, 1, 1),
            scale=scale(C, 1, 1),
        ),
        least=3,
    ),
    Case("addcmul", lambda: scales(a=conv(3), b=conv(1))),
    Case(
        "a norm of joined maps of two tensors",
        lambda: joined(lambda m, x, y: m.n(torch.cat((m.a(x), m.b(y)), 1))),
        "fold",
        convolutions=2,
        sites=2,
        inputs=2,
    ),
    *(
        Case(
            f"a norm of joined maps, {axes}-d",
            lambda axes=axes: Spelled(
                lambda m, x: m.n(torch.cat((m.a(x), m.b(torch.tanh(x))), 1)),
                a=conv(3, axes=axes),
                b=conv(1, outputs=2, axes=axes, bias=False),
                n=norm(C + 2, axes),
            ),
            "fold",
            convolutions=2,
            sites=2,
            axes=axes,
        )
        for axes in (1, 2, 3)
    ),
    Case(
        "a norm and a scale of joined sums",
        lambda: joined(lambda m, x, y: 2 * m.n(torch.cat((m.a(x) + x, m.b(y) + m.c(y)), 1))),
        "graph",
        convolutions=2,
        sites=2,
        inputs=2,
    ),
    Case(
        "a shift of joined maps of one layer",
        lambda: joined(lambda m, x, y: torch.cat((m.a(x), m.a(y)), 1) + m.shift),
        "graph",
        convolutions=2,
        sites=2,
        inputs=2,
    ),
    Case("every other channel", lambda: Spelled(lambda m, x: m.a(x)[:, ::2] + m.b(x), a=conv(3), b=conv(1, outputs=2))),
]

TWINS = [
    Twin(
        "a norm of joined maps, of which one is none",
        "several-sources",
        lambda: joined(lambda m, x, y: m.n(torch.cat((m.a(x), torch.tanh(m.b(y))), 1))),
        2,
        1,
        inputs=2,
        wrong=NOT_MERGED,
    ),
    Twin(
        "a norm of joined maps, of which one is read elsewhere",
        "several-sources",
        lambda: Spelled(read_beside, a=conv(3), b=conv(1), n=norm(2 * C)),
        2,
        1,
        wrong=NOT_MERGED,
    ),
    Twin(
        "a norm of joined maps that are read elsewhere",
        "several-sources",
        lambda: Spelled(read_joined, a=conv(3), b=conv(1), n=norm(2 * C)),
        2,
        1,
        wrong=NOT_MERGED,
    ),
    Twin(
        "a norm of maps joined along another axis",
        "no-convolution",
        lambda: joined(lambda m, x, y: m.m(torch.cat((m.a(x), m.b(y)), 2))),
        2,
        1,
        inputs=2,
        wrong=NOT_MERGED,
    ),
    Twin(
        "addcmul before a padded kernel",
        "shift-before-padding",
        lambda: Spelled(
            lambda m, x: m.a(torch.addcmul(m.shift, m.scale, x)), a=conv(3), shift=scale(C, 1, 1), scale=scale(C, 1, 1)
        ),
        1,
    ),
    Twin(
        "RMNet of two sources",
        "several-sources",
        lambda: SpelledOfTwo(
            lambda m, x, y: m.last(torch.cat([y[:, :HALF], m.a(x[:, HALF:]) + m.b(x[:, HALF:])], 1)),
            a=half(3),
            b=half(1),
            last=conv(1),
        ),
        inputs=2,
        wrong=NOT_MERGED,
    ),
    Twin(
        "parts of two tensors joined and added",
        "several-sources",
        lambda: Spelled(of_other_parts, a=half(3), b=half(1)),
        wrong=NOT_MERGED,
    ),
    Twin(
        "RepGhost whose input is read again",
        "value-escapes",
        lambda: Spelled(read_again, a=conv(3), b=conv(1)),
        wrong=NOT_MERGED,
    ),
    Twin(
        "RepGhost normalised before its kernel",
        "shift-before-padding",
        lambda: nn.Sequential(norm(), conv(3, groups=C)),
        1,
        1,
    ),
    Twin(
        "halves of a padded kernel, padded again",
        "padding-between",
        lambda: Spelled(lambda m, x: m.b(m.a(x).chunk(2, 1)[0]), a=conv(3, outputs=2 * C), b=conv(3)),
    ),
]
