"""Linear layers: parallel, in a row, normalised, averaged.

Hu et al., "LoRA" (arXiv 2106.09685); the two heads of RepViT (arXiv 2307.09283), each normalised, with their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.building import NOT_MERGED, C, Case, Spelled, SpelledOfTwo, Twin, scale, total

N = 16


def lora(rank: int = 2) -> Spelled:
    return Spelled(
        lambda m, x: m.w(x) + 2.0 * m.b(m.a(F.dropout(x, 0.1, m.training))),
        w=nn.Linear(N, N),
        a=nn.Linear(N, rank, bias=False),
        b=nn.Linear(rank, N, bias=False),
    )


def head(tracked: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(N, track_running_stats=tracked), nn.Linear(N, 10))


def heads(tracked: bool = True) -> Spelled:
    """The mean of two heads."""
    return Spelled(lambda m, x: (m.a(x) + m.b(x)) / 2, a=head(), b=head(tracked))


def lora_in_functions(m: Spelled, x: Tensor) -> Tensor:
    return F.linear(x, m.w, m.c) + (x @ m.a.T @ m.b.T) * 0.5


def flat(name: str, make, form: str = "chain", **settings) -> Case:
    """A case of linear layers, on rows of numbers."""
    return Case(
        name, make, form, **{"convolutions": 0, "linears": 1, "axes": 0, "channels": N, "last": True} | settings
    )


def flat_twin(name: str, code: str, make, linears: int, wrong: str, **settings) -> Twin:
    return Twin(
        name,
        code,
        make,
        convolutions=0,
        linears=linears,
        wrong=wrong,
        **{"axes": 0, "channels": N, "last": True} | settings,
    )


def of_tables(m: Spelled, x: Tensor) -> Tensor:
    """Products with tables of embeddings, in letters and in a batch."""
    return torch.einsum("bchw,kc->bkhw", m.n(x.abs()), m.w)


def in_a_batch(m: Spelled, x: Tensor) -> Tensor:
    y = torch.bmm(m.w.expand(x.size(0), -1, -1), x)
    return y + m.v @ x + m.a(x)


def rows_in_a_batch(m: Spelled, x: Tensor) -> Tensor:
    return torch.matmul(x, m.w) + torch.einsum("btc,ck->btk", x, m.v) + m.a(x)


def elsewhere(m: Spelled, x: Tensor) -> Tensor:
    return torch.einsum("bchw,kc->bhwk", m.n(x.abs()), m.w)


CASES = [
    Case(
        "a table in letters",
        lambda: Spelled(of_tables, n=nn.BatchNorm2d(C), w=scale(5, C)),
        "graph",
        less_in=("decomposed",),
    ),
    Case(
        "tables in a batch",
        lambda: Spelled(in_a_batch, w=scale(6, C), v=scale(6, C), a=nn.Conv1d(C, 6, 1)),
        "chain",
        axes=1,
    ),
    Case(
        "tables of rows",
        lambda: Spelled(rows_in_a_batch, w=scale(N, 6), v=scale(N, 6), a=nn.Linear(N, 6)),
        convolutions=0,
        linears=1,
        axes=1,
        channels=N,
        last=True,
        less_in=("decomposed",),
    ),
    flat("LoRA", lora),
    flat("LoRA of tokens", lora, axes=1, less_in=("decomposed",)),
    flat("LoRA of windows of tokens", lora, axes=2, less_in=("decomposed",)),
    flat(
        "LoRA in functions", lambda: Spelled(lora_in_functions, w=scale(N, N), c=scale(N), a=scale(2, N), b=scale(N, 2))
    ),
    flat("parallel linear layers", lambda: total(nn.Linear(N, N), nn.Linear(N, N), nn.Identity())),
    flat("two heads", heads),
    flat("a head", head, "fold"),
    flat("linear, then norm", lambda: nn.Sequential(nn.Linear(N, 8), nn.BatchNorm1d(8)), "fold"),
    flat(
        "norm without parameters, then linear",
        lambda: nn.Sequential(nn.BatchNorm1d(N, affine=False), nn.Linear(N, 4)),
        "fold",
    ),
    flat("layers in a row", lambda: nn.Sequential(nn.Linear(N, 64), nn.Linear(64, N)), "swap"),
    flat(
        "norm of two layers of two sources",
        lambda: SpelledOfTwo(
            lambda m, x, y: m.n(m.a(x) + m.b(y)), a=nn.Linear(N, N), b=nn.Linear(N, N), n=nn.BatchNorm1d(N)
        ),
        "graph",
        linears=2,
        sites=2,
        inputs=2,
    ),
    flat(
        "stacked heads",
        lambda: Spelled(lambda m, x: torch.stack([m.a(x), m.b(x)]).mean(0), a=nn.Linear(N, 10), b=nn.Linear(N, 10)),
        less_in=("decomposed",),
    ),
]

TWINS = [
    Twin(
        "a table whose answers are elsewhere",
        "channel-mismatch",
        lambda: Spelled(elsewhere, n=nn.BatchNorm2d(C), w=scale(5, C)),
        0,
        1,
        wrong=NOT_MERGED,
    ),
    flat_twin("a head normalised by the batch", "training-norm", lambda: heads(tracked=False), 2, NOT_MERGED, norms=1),
    flat_twin(
        "LoRA of the data",
        "computed-weight",
        lambda: Spelled(lambda m, x: F.linear(x, m.w * x.mean()) + m.a(x), w=scale(N, N), a=nn.Linear(N, N)),
        2,
        NOT_MERGED,
    ),
    flat_twin(
        "linear bottleneck",
        "cost",
        lambda: nn.Sequential(nn.Linear(256, 8), nn.Linear(8, 256)),
        2,
        NOT_MERGED,
        channels=256,
    ),
    flat_twin(
        "a norm of two sources",
        "several-sources",
        lambda: SpelledOfTwo(lambda m, x, y: m.n(m.a(x) + y), a=nn.Linear(N, N), n=nn.BatchNorm1d(N)),
        1,
        NOT_MERGED,
        norms=1,
        inputs=2,
    ),
]
