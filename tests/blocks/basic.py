"""The first blocks: RepVGG and its relatives, sums in every spelling, convolutions with normalisations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.building import (
    NOT_MERGED,
    Branches,
    C,
    Case,
    Spelled,
    SpelledOfTwo,
    Twin,
    conv,
    conv_norm,
    norm,
    pair,
    pair_of_two,
    triple,
)


class RepVGG(nn.Module):
    """3x3 + 1x1 + skip, each with its normalisation (Ding et al. 2021). Stride 2 has no skip."""

    def __init__(self, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_norm(3, stride=stride, groups=groups)
        self.pointwise = conv_norm(1, stride=stride, groups=groups)
        self.skip = norm() if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.skip is None else self.skip(x)
        return F.relu(self.dense(x) + self.pointwise(x) + skip)


class TracedNorm(nn.BatchNorm2d):
    """A normalisation that torch.fx traces through, with children and assertions, as timm's BatchNormAct2d."""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training:
            raise NotImplementedError
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, self.momentum, self.eps)
        return self.act(self.drop(x))


class ActivatedNorm(nn.BatchNorm2d):
    """A normalisation that calls its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


def of_levels(branch: Callable[[Any, int, Tensor], Tensor], **members: Any) -> Spelled:
    """A detection head: what it makes of the levels of a pyramid."""

    def forward(m: Spelled, x: Tensor) -> Tensor:
        levels = (x, F.max_pool2d(x, 2), F.max_pool2d(x, 4))
        return sum(F.relu(branch(m, number, level)).mean((2, 3)) for number, level in enumerate(levels))

    return Spelled(forward, **members)


def head_of_branches() -> Spelled:
    """RTMDet's: each level has a branch with a norm of its own, and all have the first one's convolution."""
    branches = nn.ModuleList(conv_norm() for _ in range(3))
    for branch in branches:
        branch[0] = branches[0][0]
    return of_levels(lambda m, number, x: m.branches[number](x), branches=branches)


def head_of_norms(*norms: nn.Module) -> Spelled:
    """EfficientDet's: one convolution, and a norm per level."""
    return of_levels(lambda m, number, x: m.norms[number](m.conv(x)), conv=conv(), norms=nn.ModuleList(norms))


def reached_for() -> Spelled:
    """A block whose convolution another forward takes out of it."""
    return Spelled(lambda m, x: F.relu(m.block(x)) + F.relu(m.block[0](x.sin())), block=conv_norm())


def half_of_two() -> Spelled:
    """Half of the other source would take an operator of its own."""
    return pair_of_two(lambda m, x, y: (m.a(x) + torch.sin(y)) / 2)


def functional(forward: Callable[..., Any]) -> Spelled:
    """A block with a 3x3 ``w``, a 1x1 ``v``, a bias ``b`` and a module ``n``, to be written with functions."""
    parameters = {"w": torch.empty(C, C, 3, 3), "v": torch.empty(C, C, 1, 1), "b": torch.empty(C)}
    return Spelled(forward, **{name: nn.Parameter(tensor) for name, tensor in parameters.items()}, n=norm())


def _normed(m: Spelled, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias, eps=1e-3)


def _added_to_itself(m: Spelled, x: Tensor) -> Tensor:
    y = m.a(x)
    return y + y + m.b(x)


def _gathered(m: Spelled, x: Tensor) -> Tensor:
    total = x.new_zeros(x.shape)
    total += m.a(x)
    total += m.b(x)
    return total


def _added_in_place(m: Spelled, x: Tensor) -> Tensor:
    y = m.a(x)
    y += m.b(x)
    return y.add_(x)


def notebook(padding: Any, bias: bool, kernel: Any = 3) -> Spelled:
    """The notebook's block: 3x3 + 1x1 + skip."""
    return Spelled(
        lambda m, x: m.a(x) + m.b(x) + x, a=conv(kernel, padding=padding, bias=bias), b=conv(1, padding=0, bias=bias)
    )


CASES = [
    *(
        Case(f"notebook padding={padding} bias={bias}", lambda p=padding, b=bias: notebook(p, b))
        for padding in ("same", 1, (1, 1))
        for bias in (True, False)
    ),
    Case("notebook, pair of paddings", lambda: notebook((1, 2), True, (3, 5))),
    Case(
        "valid padding",
        lambda: Spelled(lambda m, x: m.a(x) + m.b(x), a=conv(3, padding="valid"), b=conv(3, padding=0)),
        least=3,
    ),
    Case("smaller kernel inside", lambda: Branches(conv(5, padding=1), conv(3, padding=0)), "graph", least=3),
    *(
        Case(f"RepVGG stride {stride} groups {groups}", lambda s=stride, g=groups: RepVGG(s, g), "graph")
        for stride, groups in ((1, 1), (2, 1), (1, 2), (2, 2), (1, C))
    ),
    *(
        Case(
            f"MobileOne {n}",
            lambda n=n: Branches(*(conv_norm(3, groups=C) for _ in range(n)), conv_norm(1), norm()),
            "graph",
        )
        for n in (1, 4)
    ),
    Case("ACNet", lambda: Branches(conv_norm(3), conv_norm((3, 1)), conv_norm((1, 3))), "graph"),
    Case("dilated union", lambda: Branches(conv(5), conv(3, dilation=2), conv(3), norm()), "graph"),
    Case("taps far apart", lambda: Branches(conv(3, dilation=3), conv(3, dilation=2)), "graph"),
    Case("mixed groups", lambda: Branches(conv(3, groups=2), conv(1, groups=4), conv(3)), "graph"),
    Case("two kinds of groups", lambda: Branches(conv(3, groups=4), conv(1, groups=2)), "graph"),
    Case(
        "even kernels, same",
        lambda: Branches(conv(2, padding="same"), conv(4, padding="same"), conv(1), norm()),
        "graph",
    ),
    Case("conv + norm", conv_norm, "fold"),
    Case("conv + norm in attributes", lambda: triple(lambda m, x: F.relu(m.n(m.a(x)))), "fold"),
    Case("conv + dropout + norm", lambda: nn.Sequential(conv(), nn.Dropout2d(), norm(), nn.ReLU()), "fold"),
    Case("conv + two norms", lambda: nn.Sequential(conv(), norm(), nn.Identity(), norm()), "fold"),
    Case("norm in another submodule", lambda: nn.Sequential(nn.Sequential(conv()), nn.Sequential(norm())), "fold"),
    Case("reflected conv + norm", lambda: nn.Sequential(conv(3, padding_mode="reflect"), norm()), "fold", least=2),
    Case(
        "reflected even conv, scaled",
        lambda: Spelled(lambda m, x: 2 * m.r(x), r=conv(2, padding="same", padding_mode="reflect")),
        least=2,
    ),
    Case(
        "strided conv + norm", lambda: nn.Sequential(conv(4, padding=1, stride=3, outputs=6), norm(6)), "fold", least=2
    ),
    Case("conv + traced norm", lambda: nn.Sequential(conv(), TracedNorm(C)), "fold"),
    Case("conv + norm that calls its base", lambda: nn.Sequential(conv(), ActivatedNorm(C)), "fold"),
    Case("input by keyword", lambda: pair(lambda m, x: m.a(input=x) + m.b(input=x))),
    Case("traced norm without act", lambda: nn.Sequential(conv(bias=False), TracedNorm(C, act=False)), "fold"),
    Case(
        "RepVGG of traced norms",
        lambda: Branches(
            nn.Sequential(conv(), TracedNorm(C, act=False)),
            nn.Sequential(conv(1), TracedNorm(C, False)),
            TracedNorm(C, False),
        ),
        "graph",
    ),
    Case("norm after the sum", lambda: triple(lambda m, x: m.n(m.a(x) + m.b(x) + x))),
    Case(
        "norm inside and after",
        lambda: Spelled(lambda m, x: m.n(m.i(m.a(x)) + m.b(x) + x), a=conv(), b=conv(1), i=norm(), n=norm()),
    ),
    Case("F.conv2d", lambda: functional(lambda m, x: F.conv2d(x, m.w, m.b, padding=1) + F.conv2d(x, m.v) + x), "graph"),
    Case(
        "F.conv2d, same",
        lambda: functional(lambda m, x: F.conv2d(x, m.w, None, 1, "same") + F.conv2d(x, m.v, m.b)),
        "graph",
    ),
    Case(
        "F.batch_norm",
        lambda: functional(lambda m, x: _normed(m, F.conv2d(x, m.w, padding=1)) + F.conv2d(x, m.v, m.b)),
    ),
    Case("torch.add alpha", lambda: pair(lambda m, x: torch.add(m.a(x), m.b(x), alpha=-3))),
    Case("x.add alpha", lambda: pair(lambda m, x: m.a(x).add(x, alpha=0.5) + m.b(x))),
    Case("subtraction", lambda: pair(lambda m, x: m.a(x) - m.b(x) - x)),
    Case("torch.sub alpha", lambda: pair(lambda m, x: torch.sub(m.a(x) + m.b(x), x, alpha=2))),
    Case("torch.rsub", lambda: pair(lambda m, x: torch.rsub(m.a(x), m.b(x), alpha=2))),
    Case("negation", lambda: pair(lambda m, x: -m.a(x) + m.b(x).neg())),
    Case("sum of a list", lambda: pair(lambda m, x: sum([m.a(x), m.b(x), x]))),
    Case("zero added", lambda: pair(lambda m, x: (m.a(x + 0) + 0) + (0 + m.b(x)))),
    *(
        Case(f"neutral after a norm, {name}", lambda forward=forward: Spelled(forward, a=conv_norm(3)))
        for name, forward in (
            ("0 + y + 0", lambda m, x: 0 + m.a(x) + 0),
            ("y - 0", lambda m, x: m.a(x) - 0),
            ("y * 1", lambda m, x: m.a(x) * 1.0),
            ("x / 1 before", lambda m, x: m.a(x / 1)),
            ("zeros_like", lambda m, x: torch.zeros_like(x) + m.a(x)),
        )
    ),
    Case("zeros that branches are added to in place", lambda: pair(_gathered)),
    Case("scales", lambda: pair(lambda m, x: 0.5 * m.a(x) + m.b(x) * 3 + x / 4)),
    Case("scaled sum", lambda: pair(lambda m, x: (m.a(x) + x) * 0.1 + m.b(x))),
    Case("a value twice", lambda: pair(_added_to_itself)),
    Case("in place", lambda: pair(_added_in_place)),
    Case("detours", lambda: pair(lambda m, x: m.a(x.contiguous()).clone() + F.dropout(m.b(x), 0.5, False))),
    Case(
        "conv1d",
        lambda: Branches(nn.Conv1d(C, C, 3, padding=1), nn.Conv1d(C, C, 1), nn.BatchNorm1d(C)),
        "graph",
        axes=1,
    ),
    Case(
        "conv3d",
        lambda: Branches(nn.Conv3d(C, C, 3, padding=1), nn.Conv3d(C, C, (1, 3, 1), padding="same"), nn.BatchNorm3d(C)),
        "graph",
        axes=3,
    ),
    Case("residual around", lambda: pair_of_two(lambda m, x, y: m.a(x) + y + m.b(x)), "graph", inputs=2),
    Case("residual first", lambda: pair_of_two(lambda m, x, y: y + (m.a(x) + (m.b(x) + x))), "graph", inputs=2),
    Case(
        "two sources",
        lambda: SpelledOfTwo(
            lambda m, x, y: (m.a(x) + m.c(y)) + (m.b(x) + m.d(y)), a=conv(), b=conv(1), c=conv(), d=conv(1)
        ),
        "graph",
        convolutions=2,
        sites=2,
        inputs=2,
    ),
    Case("gate after", lambda: nn.Sequential(RepVGG(), Gate()), "graph", convolutions=3),
    Case("tuple", lambda: pair(lambda m, x: (m.a(x) + m.b(x), [x, {"relu": F.relu(x)}])), "graph"),
    Case(
        "nested", lambda: Branches(nn.Sequential(RepVGG(), RepVGG()), nn.Identity()), "graph", convolutions=2, sites=2
    ),
    Case(
        "nested sums",
        lambda: Branches(
            triple(lambda m, x: m.a(x) + m.b(x)),
            Spelled(lambda m, x: m.n(m.a(x) + x), a=conv(), n=norm()),
            nn.Identity(),
        ),
        "graph",
    ),
    Case(
        "shared block",
        lambda: Spelled(lambda m, x: m.last(m.block(F.relu(m.block(x)))), block=RepVGG(), last=nn.ReLU()),
        "graph",
        convolutions=2,
    ),
    Case(
        "one conv, two norms",
        lambda: SpelledOfTwo(lambda m, x, y: F.relu(m.n(m.a(x))) + F.relu(m.o(m.a(y))), a=conv(), n=norm(), o=norm()),
        "graph",
        convolutions=2,
        sites=2,
        inputs=2,
    ),
    Case(
        "mean of two sources", lambda: pair_of_two(lambda m, x, y: (m.a(x) + m.b(y)) / 2), "graph", 2, sites=2, inputs=2
    ),
    Case("one conv in branches, a norm each", head_of_branches, "chain", convolutions=3, sites=3, least=4, side=12),
    Case(
        "one conv, a norm per level",
        lambda: head_of_norms(norm(), norm(), norm()),
        "graph",
        3,
        sites=3,
        least=4,
        side=12,
    ),
    Case(
        "one conv, a level without a norm",
        lambda: head_of_norms(norm(), norm(), nn.Identity()),
        "graph",
        3,
        sites=2,
        least=4,
        side=12,
    ),
    Case("one conv and norm, per level", lambda: head_of_norms(*[norm()] * 3), "fold", 3, sites=3, least=4, side=12),
]

TWINS = [
    Twin("one conv, reached for", "outer-reference", reached_for, norms=1, wrong=NOT_MERGED),
    Twin("mean of a layer and another source", "cost", half_of_two, 1, inputs=2, wrong=NOT_MERGED),
]
