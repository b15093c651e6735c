"""What acts on channels, with the rows put elsewhere or averaged in between.

Graham et al., "LeViT" (arXiv 2104.01136): a linear layer on tokens and a normalisation of their rows, flattened for it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from blocks.building import C, Case, Spelled, conv, norm, scale, total

N = 16
TOKENS = {"convolutions": 0, "linears": 1, "axes": 1, "channels": N, "last": True}


def rows(forward, outputs: int = 12) -> Spelled:
    """A linear layer ``a`` and a normalisation ``n`` of rows."""
    return Spelled(forward, a=nn.Linear(N, outputs, bias=False), n=nn.BatchNorm1d(outputs))


def flattened(m: Spelled, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.n(y.flatten(0, 1)).reshape_as(y)


def parted_again(m: Spelled, x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    return m.n(m.a(x).view(batch * tokens, 12)).view(batch, tokens, 12)


def turned(m: Spelled, x: Tensor) -> Tensor:
    return m.n(m.a(x).transpose(1, 2)).transpose(1, 2)


def of_a_sum(m: Spelled, x: Tensor) -> Tensor:
    return m.n((m.a(x) + m.b(x)).flatten(0, 1))


def pooled(between) -> Spelled:
    """A normalised map, pooled, into a linear layer."""
    return Spelled(lambda m, x: m.a(between(m.n(x.abs()))), n=norm(), a=nn.Linear(C, 5))


pool = F.adaptive_avg_pool2d


def kept_mean(x: Tensor) -> Tensor:
    return x.mean((-2, -1), keepdim=True).flatten(1)


def in_a_row(*steps) -> nn.Sequential:
    """Layers with what stands between them in functions."""
    return nn.Sequential(
        *(step if isinstance(step, nn.Module) else Spelled(lambda m, x, f=step: f(x)) for step in steps)
    )


def windows(x: Tensor) -> Tensor:
    return pool(x, 2)


def onto_an_image(m: Spelled, x: Tensor) -> Tensor:
    """Tokens of a linear layer, as an image of one row, into a convolution."""
    return m.b(m.a(x).transpose(1, 2).unsqueeze(2))


IMAGE = {"convolutions": 0, "linears": 1}

CASES = [
    Case("rows, flattened", lambda: rows(flattened), **TOKENS),
    Case("rows, joined and parted by numbers", lambda: rows(parted_again), **TOKENS),
    Case("rows, turned", lambda: rows(turned), "fold", **TOKENS),
    Case("rows, turned and left so", lambda: rows(lambda m, x: m.n(m.a(x).permute(0, 2, 1))), "fold", **TOKENS),
    Case(
        "rows of a sum",
        lambda: Spelled(of_a_sum, a=nn.Linear(N, 12), b=nn.Linear(N, 12), n=nn.BatchNorm1d(12)),
        "graph",
        **TOKENS,
    ),
    Case(
        "a norm of rows before a layer",
        lambda: Spelled(
            lambda m, x: m.a(m.n(x.flatten(0, 1)).view(x.size(0), x.size(1), N)), a=nn.Linear(N, 4), n=nn.BatchNorm1d(N)
        ),
        "fold",
        **TOKENS,
    ),
    Case(
        "a scale of tokens, averaged, into a layer",
        lambda: Spelled(lambda m, x: m.a((x.sin() * m.s).mean(1)), a=nn.Linear(N, 4), s=scale(N)),
        "graph",
        **TOKENS,
    ),
    Case("norm, mean, linear", lambda: pooled(lambda x: x.mean((2, 3))), "fold", **IMAGE),
    Case("norm, mean that stays, linear", lambda: pooled(kept_mean), "fold", **IMAGE),
    Case("norm, adaptive pool, linear", lambda: pooled(lambda x: pool(x, 1).flatten(1)), "fold", **IMAGE),
    Case(
        "norm, pool, squeezed, linear", lambda: pooled(lambda x: pool(x, (1, 1)).squeeze(3).squeeze(2)), "fold", **IMAGE
    ),
    Case("norm, pool, one pixel, linear", lambda: pooled(lambda x: pool(x, 1)[:, :, 0, 0]), "fold", **IMAGE),
    Case("norm, windows, 1x1", lambda: in_a_row(norm(), windows, conv(1)), "fold", less_in=("decomposed",)),
    Case("norm, windows, 2x2", lambda: in_a_row(norm(), windows, conv(2, padding=0)), "fold", less_in=("decomposed",)),
    Case("1x1, windows, norm", lambda: in_a_row(conv(1), windows, norm()), "fold", less_in=("decomposed",)),
    Case("3x3, windows, norm", lambda: in_a_row(conv(3), windows, norm()), "fold", less_in=("decomposed",)),
    Case(
        "1x1, norm, windows, 1x1", lambda: in_a_row(conv(1), norm(), windows, conv(1)), "swap", less_in=("decomposed",)
    ),
    Case("1x1, mean, linear", lambda: in_a_row(conv(1), kept_mean, nn.Linear(C, 5)), "swap", **IMAGE),
    Case(
        "1x1 and 1x1, mean, linear",
        lambda: in_a_row(total(conv(1), conv(1)), kept_mean, nn.Linear(C, 5)),
        "chain",
        **IMAGE,
    ),
    Case(
        "linear, one token, linear",
        lambda: in_a_row(nn.Linear(N, 12), lambda x: x[:, 0], nn.Linear(12, 5)),
        "swap",
        **TOKENS,
    ),
    Case(
        "linear, as an image, 1x1",
        lambda: Spelled(onto_an_image, a=nn.Linear(N, 12), b=nn.Conv2d(12, 5, 1)),
        "swap",
        **TOKENS | {"convolutions": 1, "linears": 0},
    ),
    Case(
        "norm, pixels as tokens, linear",
        lambda: pooled(lambda x: x.flatten(2).transpose(1, 2)),
        "fold",
        **IMAGE,
        less_in=("decomposed",),
    ),
]
