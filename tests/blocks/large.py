"""Large depthwise kernels beside small ones.

Ding et al., "Scaling Up Your Kernels to 31x31" (RepLKNet, arXiv 2203.06717); Ding et al., "UniRepLKNet"
(arXiv 2311.15599): dilated kernels beside the large one, and a normalisation after the sum; Liu et al., "SLaK"
(arXiv 2207.03620): stripes.
"""

from __future__ import annotations

from torch import nn

from blocks.building import EVERYWHERE, NOT_MERGED, C, Case, Spelled, Twin, conv, conv_norm, norm, total


def replk(axes: int = 2, kernel: int = 13, small: int = 5) -> Spelled:
    """A large and a small depthwise kernel, each normalised."""
    return total(conv_norm(kernel, groups=C, axes=axes), conv_norm(small, groups=C, axes=axes))


def dilated_reparam(last: nn.Module | None = None) -> Spelled:
    """The 13x13 kernel of UniRepLKNet with its five dilated ones. ``last`` follows the sum."""
    pairs = ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
    block = total(conv_norm(13, groups=C), *(conv_norm(k, dilation=d, groups=C) for k, d in pairs))
    return Spelled(lambda m, x: m.last(m.block(x)), block=block, last=last or norm())


CASES = [
    Case("RepLKNet", replk),
    Case("RepLKNet, 1-d", lambda: replk(1), axes=1),
    Case("RepLKNet, 3-d", lambda: replk(3, 7, 3), axes=3),
    Case("RepLKNet, stride 2", lambda: total(conv_norm(13, groups=C, stride=2), conv_norm(5, groups=C, stride=2))),
    Case("RepLKNet with a skip", lambda: total(replk(), nn.Identity())),
    Case("UniRepLKNet", dilated_reparam),
    Case("UniRepLKNet without the norm after", lambda: dilated_reparam(nn.Identity())),
    Case(
        "SLaK",
        lambda: total(
            conv_norm((11, 5), groups=C, padding=(5, 2)),
            conv_norm((5, 11), groups=C, padding=(2, 5)),
            conv_norm(5, groups=C),
        ),
    ),
]

TWINS = [
    Twin(
        "UniRepLKNet normalised before",
        "shift-before-padding",
        lambda: nn.Sequential(norm(), dilated_reparam()),
        1,
        1,
        side=20,
    ),
    Twin(
        "UniRepLKNet normalised by the batch after",
        "training-norm",
        lambda: dilated_reparam(nn.BatchNorm2d(C, track_running_stats=False)),
        1,
        1,
        wrong=EVERYWHERE,
        side=20,
    ),
    Twin(
        "RepLKNet with a circular small kernel",
        "padding-mode",
        lambda: total(conv(7, groups=C), conv(5, groups=C, padding_mode="circular")),
        least=6,
    ),
    Twin("RepLKNet, kernels in a row", "padding-between", lambda: nn.Sequential(conv(5, groups=C), conv(3, groups=C))),
    Twin(
        "RepLKNet, 3-d, kernels in a row",
        "padding-between",
        lambda: nn.Sequential(conv(5, groups=C, axes=3), conv(3, groups=C, axes=3)),
        axes=3,
    ),
    Twin(
        "RepLKNet with a dense 1x1",
        "cost",
        lambda: total(conv(13, groups=64, inputs=64, outputs=64), conv(1, inputs=64, outputs=64)),
        channels=64,
        side=16,
        wrong=NOT_MERGED,
    ),
]
