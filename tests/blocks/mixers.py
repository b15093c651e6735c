"""Blocks with a normalisation, a scale or a skip around their sums.

Vasu et al., "MobileOne" (arXiv 2206.04040) and "FastViT" (arXiv 2303.14189); Wang et al., "RepViT" (arXiv 2307.09283);
Chu et al., "Make RepVGG Greater Again" (QARepVGG, arXiv 2212.01593); Hu et al., "Online Convolutional
Re-parameterization" (the linear sum, arXiv 2204.00826); PP-LCNetV3 of PaddleOCR; Wang et al., "YOLOR" (implicit
knowledge, arXiv 2105.04206).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize
from torch.nn import functional as F

from blocks.building import (
    EVERYWHERE,
    NOT_MERGED,
    C,
    Case,
    Spelled,
    SpelledOfTwo,
    Twin,
    conv,
    conv_norm,
    norm,
    scale,
    total,
)


def mobileone(copies: int = 3, **settings: int) -> Spelled:
    """Copies of a depthwise kernel, a 1x1 and a skip."""
    axes = settings.get("axes", 2)
    kernels = [conv_norm(3, groups=C, **settings) for _ in range(copies)]
    return total(*kernels, conv_norm(1, groups=C, **settings), norm(axes=axes))


def repmixer(before: nn.Module | None = None, mixer: nn.Module | None = None, axes: int = 2) -> Spelled:
    """x + g * (mixer(x) - norm(x)), with a layer scale g."""

    def forward(m: Spelled, x: Tensor) -> Tensor:
        return x + m.gamma * (m.mixer(m.before(x)) - m.norm(x))

    return Spelled(
        forward,
        mixer=mixer or mobileone(1, axes=axes),
        norm=norm(axes=axes),
        gamma=scale(C, *[1] * axes),
        before=before or nn.Identity(),
    )


def repvit(last: nn.Module | None = None, kernel: nn.Module | None = None) -> Spelled:
    """A normalised depthwise kernel, a plain depthwise 1x1 and the skip, normalised once more."""
    return Spelled(
        lambda m, x: m.n((m.a(x) + m.b(x)) + x),
        a=kernel or conv_norm(3, groups=C),
        b=conv(1, groups=C),
        n=last or norm(),
    )


def qarepvgg(last: nn.Module | None = None, rounding: nn.Module | None = None) -> Spelled:
    """norm(norm(3x3) + 1x1 + skip)."""
    return Spelled(
        lambda m, x: m.last(m.a(x) + m.rounding(m.b(x)) + x),
        a=conv_norm(3),
        b=conv(1, bias=False),
        last=last or norm(),
        rounding=rounding or nn.Identity(),
    )


def linear_sum(axes: int = 2, depends: bool = False) -> Spelled:
    """norm(s1 * 3x3 + s2 * 1x1 + s3 * x), the scales one per channel; from the data where it ``depends``."""
    ones = [1] * axes

    def forward(m: Spelled, x: Tensor) -> Tensor:
        last = m.s3 * x.mean() if depends else m.s3
        return m.n(m.a(x) * m.s1.view(1, -1, *ones) + m.s2 * m.b(x) + last * x)

    return Spelled(
        forward,
        a=conv(3, bias=False, axes=axes),
        b=conv(1, bias=False, axes=axes),
        s1=scale(C),
        s2=scale(1, C, *ones),
        s3=scale(1, C, *ones),
        n=norm(axes=axes),
    )


def affine_after(m: Spelled, x: Tensor) -> Tensor:
    """PP-LCNetV3: one learnable scale and shift for the whole map."""
    return m.scale * (m.a(x) + m.b(x)) + m.shift


def implicit(kernel: int) -> Spelled:
    """YOLOR: a constant per channel added before, one multiplied after."""
    return Spelled(lambda m, x: m.im * m.a(m.ia + x), a=conv(kernel), ia=scale(1, C, 1, 1), im=scale(1, C, 1, 1))


def rounded() -> FakeQuantize:
    """Rounds to fixed steps; its observer has seen enough."""
    steps = FakeQuantize(quant_min=0, quant_max=255)
    steps.disable_observer()
    steps.scale.fill_(0.5)
    steps.zero_point.fill_(128)
    return steps


CASES = [
    *(Case(f"MobileOne, {axes}-d", lambda axes=axes: mobileone(axes=axes), axes=axes) for axes in (1, 2, 3)),
    *(Case(f"RepMixer, {axes}-d", lambda axes=axes: repmixer(axes=axes), axes=axes) for axes in (1, 2, 3)),
    Case("RepMixer without a mixer's skip", lambda: repmixer(mixer=conv_norm(3, groups=C))),
    Case(
        "RepMixer, residual of a scaled sum",
        lambda: Spelled(lambda m, x: x + m.g * m.a(x), a=mobileone(2), g=scale(C, 1, 1)),
    ),
    Case("conditional position", lambda: Spelled(lambda m, x: m.a(x) + x, a=conv(7, groups=C))),
    Case("RepViT", repvit),
    Case(
        "RepViT, stride 2",
        lambda: Spelled(
            lambda m, x: m.n(m.a(x) + m.b(x)),
            a=conv_norm(3, groups=C, stride=2),
            b=conv(1, groups=C, stride=2),
            n=norm(),
        ),
    ),
    Case("QARepVGG", qarepvgg),
    *(Case(f"sum of scaled branches, {axes}-d", lambda axes=axes: linear_sum(axes), axes=axes) for axes in (1, 2, 3)),
    Case(
        "PP-LCNetV3",
        lambda: Spelled(
            affine_after, a=conv_norm(3, groups=C), b=conv_norm(1, groups=C), scale=scale(1), shift=scale(1)
        ),
    ),
    Case("implicit knowledge", lambda: implicit(1)),
    Case("layer scale", lambda: Spelled(lambda m, x: x + m.a(x).mul(m.g), a=conv(3), g=scale(1, C, 1, 1))),
    Case(
        "a constant per channel",
        lambda: Spelled(lambda m, x: m.a(x) + m.g - m.b(x), a=conv(3), b=conv(1), g=scale(C, 1, 1)),
    ),
    Case(
        "stacked and summed",
        lambda: Spelled(lambda m, x: torch.stack([m.a(x), m.b(x), x]).sum(0), a=conv(3), b=conv(1)),
        less_in=("decomposed",),
    ),
    Case("stacked mean, last axis", lambda: Spelled(lambda m, x: torch.stack((m.a(x), x), dim=-1).mean(-1), a=conv(3))),
    Case("division by a parameter", lambda: Spelled(lambda m, x: (m.a(x) + x) / m.g, a=conv(3), g=scale(C, 1, 1))),
    Case(
        "RepViT beside another source",
        lambda: SpelledOfTwo(lambda m, x, y: m.n(m.a(x) + m.b(y) + m.c(x)), a=conv(3), b=conv(3), c=conv(1), n=norm()),
        "graph",
        inputs=2,
        convolutions=2,
        sites=2,
    ),
]

TWINS = [
    Twin("RepMixer normalised before its kernel", "shift-before-padding", lambda: repmixer(before=norm()), 1, 2),
    Twin("RepViT normalised before", "shift-before-padding", lambda: nn.Sequential(norm(), repvit()), 1, 1),
    Twin(
        "RepViT normalised by the batch",
        "training-norm",
        lambda: repvit(nn.BatchNorm2d(C, track_running_stats=False)),
        1,
        1,
        wrong=EVERYWHERE,
    ),
    Twin(
        "RepViT with a replicated border",
        "padding-mode",
        lambda: repvit(kernel=nn.Sequential(conv(3, groups=C, padding_mode="replicate"), norm())),
        2,
    ),
    Twin(
        "QARepVGG normalised by the batch",
        "training-norm",
        lambda: qarepvgg(nn.BatchNorm2d(C, track_running_stats=False)),
        1,
        1,
        wrong=EVERYWHERE,
    ),
    Twin(
        "QARepVGG with a rounded branch", "fake-quantised", lambda: qarepvgg(rounding=rounded()), 2, 1, wrong=EVERYWHERE
    ),
    Twin(
        "sum of scaled branches, scaled by the data",
        "several-sources",
        lambda: linear_sum(depends=True),
        1,
        1,
        wrong=EVERYWHERE,
    ),
    Twin("implicit knowledge before a padded kernel", "shift-before-padding", lambda: implicit(3), 1),
    Twin(
        "layer scale of one row",
        "broadcast",
        lambda: Spelled(lambda m, x: m.a(x) + m.b(x) * m.g, a=conv(3), b=conv(1), g=scale(C, 1, 10)),
        side=9,
        least=9,
        wrong=NOT_MERGED,
    ),
    Twin(
        "MobileOne with an average",
        "pool-padding",
        lambda: Spelled(lambda m, x: m.a(x) + F.avg_pool2d(x, 3, 1, 1, False, False), a=mobileone(1)),
        1,
    ),
]
