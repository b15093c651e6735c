"""Normalisations of every kind, and what does nothing in eval."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blocks.building import EVERYWHERE, NOT_MERGED, C, Case, Spelled, Twin, conv, norm, pair, triple, values


class Frozen(nn.Module):
    """A normalisation as arithmetic on four buffers, as detectors write it."""

    def __init__(self, axes: int = 2) -> None:
        super().__init__()
        self.axes = axes
        for seed, name in enumerate(("weight", "bias", "running_mean")):
            self.register_buffer(name, values(C, seed=seed))
        self.register_buffer("running_var", values(C, seed=3) ** 2 + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * self.axes)
        weight, variance = self.weight.reshape(shape), self.running_var.reshape(shape)
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)


class DropPath(nn.Module):
    """Stochastic depth: whole examples are dropped in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.9)
        return x * kept / 0.9


def dropped() -> Spelled:
    """Every form of dropout around the branches of one sum."""
    forms = nn.Sequential(nn.Dropout(0.2), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Identity())
    return Spelled(
        lambda m, x: m.forms(m.a(m.path(x))) + F.dropout2d(m.b(x), 0.5, m.training) + m.path(x),
        a=conv(3),
        b=conv(1),
        forms=forms,
        path=DropPath(),
    )


def detours(m: Spelled, x: Tensor) -> Tensor:
    return m.a(x.contiguous()).clone() + m.b(x.to(x.dtype)).to(torch.float64) + x.type_as(x)


def recomputed(m: Spelled, x: Tensor) -> Tensor:
    return checkpoint(m.a, x, use_reentrant=False) + checkpoint(m.b, x, use_reentrant=False)


def transposed(groups: int, axes: int) -> nn.Sequential:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    return nn.Sequential(kind(C, 8, 3, stride=2, groups=groups), norm(8, axes))


def hooked() -> nn.Sequential:
    model = nn.Sequential(conv(), norm())
    model[1].register_forward_hook(lambda module, args, output: torch.tanh(output))
    return model


CASES = [
    *(
        Case(f"FrozenBatchNorm, {axes}-d", lambda axes=axes: nn.Sequential(conv(axes=axes), Frozen(axes)), axes=axes)
        for axes in (1, 2, 3)
    ),
    Case("FrozenBatchNorm on the skip", lambda: Spelled(lambda m, x: m.a(x) + m.n(x), a=conv(), n=Frozen())),
    Case("SyncBatchNorm", lambda: nn.Sequential(conv(), nn.SyncBatchNorm(C)), "fold"),
    Case("conv + norm without parameters", lambda: nn.Sequential(conv(), nn.BatchNorm2d(C, affine=False)), "fold"),
    *(
        Case(
            f"norm after, {axes}-d",
            lambda axes=axes: nn.Sequential(conv(axes=axes), norm(axes=axes)),
            "fold",
            axes=axes,
        )
        for axes in (1, 2, 3)
    ),
    *(
        Case(
            f"norm after the sum, {axes}-d",
            lambda axes=axes: triple(lambda m, x: m.n(m.a(x) + m.b(x)), axes),
            axes=axes,
        )
        for axes in (1, 2, 3)
    ),
    *(
        Case(
            f"norm before an unpadded kernel, {axes}-d",
            lambda axes=axes: nn.Sequential(norm(axes=axes), conv(3, padding=0, axes=axes)),
            "fold",
            axes=axes,
            least=3,
        )
        for axes in (1, 2, 3)
    ),
    *(
        Case(
            f"norm on the skip, {axes}-d",
            lambda axes=axes: triple(lambda m, x: m.a(x) + m.n(x), axes),
            "graph",
            axes=axes,
        )
        for axes in (1, 2, 3)
    ),
    *(
        Case(
            f"transposed, then norm, groups {groups}, {axes}-d",
            lambda groups=groups, axes=axes: transposed(groups, axes),
            "fold",
            axes=axes,
        )
        for groups in (1, 2)
        for axes in (1, 2, 3)
    ),
    Case("dropout and stochastic depth", dropped),
    Case("casts and copies", lambda: pair(detours)),
    Case("recomputed in training", lambda: pair(recomputed)),
]

TWINS = [
    Twin("norm before a padded kernel", "shift-before-padding", lambda: nn.Sequential(norm(), conv(3)), 1, 1),
    *(
        Twin(
            f"norm before a padded kernel, {axes}-d",
            "shift-before-padding",
            lambda axes=axes: nn.Sequential(norm(axes=axes), conv(3, axes=axes)),
            1,
            1,
            axes=axes,
        )
        for axes in (1, 3)
    ),
    Twin("FrozenBatchNorm before a padded kernel", "shift-before-padding", lambda: nn.Sequential(Frozen(), conv(3)), 1),
    Twin(
        "norm of the batch",
        "training-norm",
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(C, track_running_stats=False)),
        1,
        1,
        wrong=EVERYWHERE,
    ),
    Twin(
        "norm of the image",
        "training-norm",
        lambda: nn.Sequential(conv(), nn.InstanceNorm2d(C, affine=True)),
        1,
        1,
        wrong=EVERYWHERE,
    ),
    Twin("a norm with a hook", "hooks", hooked, 1, 1, wrong=EVERYWHERE),
    Twin(
        "a detour in place",
        "in-place",
        lambda: pair(lambda m, x: (m.a(x), x.relu_(), m.b(x))[0] + m.b(x)),
        3,
        wrong=NOT_MERGED,
    ),
]
