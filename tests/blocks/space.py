"""Space to depth before a layer, by an operator, by slices or by views; depth to space and larger maps after one.

YOLOv5's Focus, https://github.com/ultralytics/yolov5; Shi et al., "Real-Time Single Image and Video Super-Resolution"
(arXiv 1609.05158), for the shuffling of pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.building import BORDER, ELSEWHERE, NOT_MERGED, C, Case, Spelled, Twin, conv, norm
from repfuse.plans import Policy

EVEN = {"multiple": 2, "least": 2}


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def halves(x: Tensor) -> Tensor:
    return torch.cat((x[..., ::2], x[..., 1::2]), 1)


def viewed(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def shuffled(between) -> Spelled:
    """A layer, depth to space, a normalisation."""
    return Spelled(lambda m, x: m.n(between(m.a(x))), a=conv(3, outputs=4 * C), n=norm())


def pointwise_behind(between) -> Spelled:
    """A layer, depth to space, a layer of single pixels."""
    return Spelled(lambda m, x: m.b(between(m.a(x))), a=conv(3, outputs=4 * C), b=conv(1, outputs=3))


def twice_shuffled(m: Spelled, x: Tensor) -> Tensor:
    return m.c(F.pixel_shuffle(m.n(m.b(F.pixel_shuffle(m.a(x), 2))), 2))


def by_views(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)


def unshuffled(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2)


MOVED = [
    Case("3x3, depth to space, norm", lambda: shuffled(lambda x: F.pixel_shuffle(x, 2)), "fold"),
    Case("3x3, depth to space by views, norm", lambda: shuffled(by_views), "fold"),
    Case(
        "3x3, depth to space, 1x1",
        lambda: pointwise_behind(lambda x: F.pixel_shuffle(x, 2)),
        "swap",
        less_in=("decomposed",),  # into views, which say how many channels there are
    ),
    Case(
        "3x3 and 1x1, depth to space, norm, 1x1",
        lambda: Spelled(
            lambda m, x: m.c(m.n(F.pixel_shuffle(m.a(x) + m.b(x), 2))),
            **{"a": conv(3, outputs=4 * C), "b": conv(1, outputs=4 * C), "c": conv(1), "n": norm()},
        ),
        "graph",
        less_in=("decomposed",),
    ),
    Case(
        "depth to space twice, with layers of single pixels between and behind",
        lambda: Spelled(
            twice_shuffled,
            **{"a": conv(3, outputs=16 * C), "b": conv(1, inputs=4 * C, outputs=4 * C), "n": norm(4 * C), "c": conv(1)},
        ),
        "swap",
        less_in=("decomposed",),
    ),
    Case("3x3, upsampled, norm", lambda: Spelled(lambda m, x: m.n(upsampled(m.a(x))), a=conv(3), n=norm()), "fold"),
    Case(
        "norm, upsampled, 1x1",
        lambda: Spelled(lambda m, x: m.a(upsampled(m.n(x.sin()))), a=conv(1), n=norm()),
        "fold",
    ),
]

CASES = [
    Case("unshuffle, 3x3", lambda: Spelled(lambda m, x: m.a(unshuffled(x)), a=conv(3, inputs=4 * C)), "graph", **EVEN),
    Case(
        "unshuffle, 3x3 of a stride",
        lambda: Spelled(lambda m, x: m.a(unshuffled(x)), a=conv(3, inputs=4 * C, stride=2)),
        "graph",
        **EVEN,
    ),
    Case(
        "focus, 3x3, norm",
        lambda: Spelled(lambda m, x: m.n(m.a(focus(x))), a=conv(3, inputs=4 * C), n=norm()),
        "graph",
        **EVEN,
    ),
    Case(
        "norm, unshuffle, 1x1",
        lambda: Spelled(lambda m, x: m.a(unshuffled(m.n(x))), a=conv(1, inputs=4 * C), n=norm()),
        "graph",
        **EVEN,
    ),
    Case(
        "unshuffle, 1x1 beside a 3x3 of stride 2",
        lambda: Spelled(lambda m, x: m.a(unshuffled(x)) + m.b(x), a=conv(1, inputs=4 * C), b=conv(3, stride=2)),
        "graph",
        **EVEN,
    ),
    Case(
        "every second sample, joined, into a layer",
        lambda: Spelled(lambda m, x: m.a(halves(x)), a=conv(3, inputs=2 * C, axes=1)),
        "graph",
        axes=1,
        **EVEN,
    ),
    Case(
        "space to depth by views, 3x3",
        lambda: Spelled(lambda m, x: m.a(viewed(x)), a=conv(3, inputs=4 * C)),
        "graph",
        **EVEN,
    ),
    Case(
        "every third, joined, into a layer",
        lambda: Spelled(
            lambda m, x: m.a(torch.cat([x[..., start::3] for start in range(3)], 1)), a=conv(3, inputs=3 * C, axes=1)
        ),
        "graph",
        axes=1,
        multiple=3,
        least=3,
    ),
    *MOVED,
]

TWINS = [
    Twin(
        "3x3, depth to space, 1x1, never composed",
        "policy",
        lambda: pointwise_behind(lambda x: F.pixel_shuffle(x, 2)),
        convolutions=2,
        policy=Policy.NEVER_COMPOSE,
        wrong=NOT_MERGED,
    ),
    Twin(
        "norm, upsampled, padded 3x3",
        "shift-before-padding",
        lambda: Spelled(lambda m, x: m.a(upsampled(m.n(x))), a=conv(3), n=norm()),
        convolutions=1,
        norms=1,
        wrong=BORDER,
    ),
    Twin(
        "every second sample, added",
        "size-mismatch",
        lambda: Spelled(lambda m, x: m.a(x[..., ::2]) + m.b(x[..., 1::2]), a=conv(3, axes=1), b=conv(1, axes=1)),
        axes=1,
        wrong=ELSEWHERE,
    ),
    Twin(
        "norm, unshuffle, padded 3x3",
        "shift-before-padding",
        lambda: Spelled(lambda m, x: m.a(F.pixel_unshuffle(m.n(x), 3)), a=conv(3, inputs=9 * C), n=norm()),
        convolutions=1,
        norms=1,
        wrong=BORDER,
        multiple=3,
        least=3,
    ),
]
