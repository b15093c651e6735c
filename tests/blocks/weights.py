"""Weights that forward computes from parameters alone.

Hu et al., "Online Convolutional Re-parameterization" (OREPA, arXiv 2204.00826); Qiao et al., "Weight Standardization"
(arXiv 1903.10520); Salimans and Kingma, "Weight Normalization" (arXiv 1602.07868); Miyato et al., "Spectral
Normalization" (arXiv 1802.05957); Cao et al., "DO-Conv" (arXiv 2006.12030).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from blocks.building import EVERYWHERE, NOT_MERGED, C, Case, Spelled, Twin, conv, norm, scale, values

FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)


class Orepa(nn.Module):
    """One kernel made of four: a plain one, an average, a frequency prior, a 1x1 -> 3x3; each scaled per channel."""

    def __init__(self, depends: bool = False) -> None:
        super().__init__()
        self.depends = depends
        self.origin, self.average, self.prior = scale(C, C, 3, 3), scale(C, C, 1, 1), scale(C, C, 1, 1)
        self.first, self.second = scale(2 * C, C, 1, 1), scale(C, 2 * C, 3, 3)
        self.vector = scale(4, C)
        self.register_buffer("mean", torch.full((3, 3), 1 / 9))
        self.register_buffer("wave", values(C, 3, 3))
        self.norm = norm()

    def weight(self) -> Tensor:
        kernels = (
            self.origin,
            torch.einsum("oi,hw->oihw", self.average.squeeze(3).squeeze(2), self.mean),
            torch.einsum("oi,ohw->oihw", self.prior[:, :, 0, 0], self.wave),
            torch.einsum("ti,othw->oihw", self.first.squeeze(3).squeeze(2), self.second),
        )
        return sum(torch.einsum("oihw,o->oihw", kernel, self.vector[row, :]) for row, kernel in enumerate(kernels))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight() * x.amax() if self.depends else self.weight()
        return self.norm(F.conv2d(x, weight, padding=1))


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised per output channel."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return self._conv_forward(x, weight, self.bias)


class StandardisedByNorm(nn.Conv2d):
    """The same with a batch norm in training mode over the weight, a channel of it as a channel."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def over_parametrised(m: Spelled, x: Tensor) -> Tensor:
    """DO-Conv: the kernel is a product of two."""
    weight = torch.einsum("ohi,his->ois", m.w, m.d + m.eye).reshape(C, C, 3, 3)
    return m.n(F.conv2d(x, weight, m.b, padding=1))


def masked(axes: int) -> Spelled:
    """A kernel with a frozen mask, beside a 1x1."""
    sides = [3] * axes
    return Spelled(
        lambda m, x: FUNCTIONS[axes - 1](x, m.w * m.mask, padding=1) + m.b(x),
        w=scale(C, C, *sides),
        mask=nn.Buffer((values(C, C, *sides) > 0).float()),
        b=conv(1, axes=axes),
    )


def old_weight_norm() -> nn.Sequential:
    """The function that puts a hook on the convolution."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(conv()), norm())


class Symmetric(nn.Module):
    """A parametrisation: left and right are the same."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


class Noisy(nn.Module):
    """A parametrisation that is random."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.rand_like(weight)


def parametrised(parametrisation: nn.Module, layer: Any = None) -> nn.Sequential:
    layer = layer or conv()
    parametrize.register_parametrization(layer, "weight", parametrisation)
    return nn.Sequential(layer, norm())


def attended(m: Spelled, x: Tensor) -> Tensor:
    """A mixture of two kernels, chosen by the image."""
    share = torch.sigmoid(x.mean())
    return F.conv2d(x, share * m.w + (1 - share) * m.v, padding=1) + m.b(x)


def counted(m: Spelled, x: Tensor) -> Tensor:
    """A buffer that the forward also writes, though with what it held."""
    m.calls.mul_(1)
    return F.conv2d(x, m.w * m.calls, padding=1) + m.b(x)


CASES = [
    Case("OREPA", Orepa),
    Case(
        "DO-Conv",
        lambda: Spelled(
            over_parametrised,
            w=scale(C, 9, C),
            d=scale(9, C, 9),
            eye=nn.Buffer(torch.eye(9).unsqueeze(1).expand(9, C, 9).clone()),
            b=scale(C),
            n=norm(),
        ),
    ),
    Case("weight standardisation", lambda: nn.Sequential(Standardised(C, C, 3, padding=1), norm())),
    Case(
        "weight standardisation by a norm",
        lambda: nn.Sequential(StandardisedByNorm(C, C, 3, padding=1), norm()),
    ),
    *(Case(f"masked kernel, {axes}-d", lambda axes=axes: masked(axes), axes=axes) for axes in (1, 2, 3)),
    Case("weight_norm, the old hook", old_weight_norm, "swap"),
    Case("weight_norm", lambda: nn.Sequential(parametrizations.weight_norm(conv()), norm()), "swap"),
    Case(
        "weight_norm, 1-d",
        lambda: nn.Sequential(parametrizations.weight_norm(conv(axes=1)), norm(axes=1)),
        "swap",
        axes=1,
    ),
    Case("spectral_norm", lambda: nn.Sequential(parametrizations.spectral_norm(conv()), norm()), "swap"),
    Case("a parametrisation", lambda: parametrised(Symmetric()), "swap"),
    Case("weight_norm alone", lambda: parametrizations.weight_norm(conv())),
]

TWINS = [
    Twin("OREPA of the data", "computed-weight", lambda: Orepa(depends=True), 1, 1, wrong=EVERYWHERE),
    Twin(
        "kernels mixed by the image",
        "computed-weight",
        lambda: Spelled(attended, w=scale(C, C, 3, 3), v=scale(C, C, 3, 3), b=conv(1)),
        wrong=EVERYWHERE,
    ),
    Twin(
        "a weight that counts calls",
        "computed-weight",
        lambda: Spelled(counted, w=scale(C, C, 3, 3), b=conv(1), calls=nn.Buffer(torch.full((1,), 3.0))),
        wrong=NOT_MERGED,
    ),
    Twin(
        "weight standardisation, padded twice",
        "padding-between",
        lambda: nn.Sequential(Standardised(C, C, 3, padding=1), conv()),
    ),
]
