"""Steps that mix channels or pixels with weights: convolutions, linear layers, their weights and spellings."""

from __future__ import annotations

import math
from typing import Any

import torch
from support.programs.made import Holder, Made, Pick, Unfit, axes_of, called, function
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

aten = torch.ops.aten


def conv(pick: Pick, x: Tensor) -> Made:
    """A convolution of any geometry, written in one of many ways."""
    settings = _settings(pick, x)
    module = getattr(nn, f"Conv{axes_of(x)}d")(x.shape[1], **settings)
    spelling = pick.of((_module, _module, _module, _functional, _aten, _computed, _normed, _in_class))
    return spelling(pick, module)


def kept(pick: Pick, x: Tensor) -> Made:
    """A convolution that keeps channels and size, as branches do."""
    ndim, channels = axes_of(x), x.shape[1]
    kernel, dilation = pick.of((3, 1, 3, 5, 2)), pick.of((1, 1, 2))
    groups = pick.of([1, 1, channels, math.gcd(2, channels)])
    kind = getattr(nn, f"Conv{ndim}d")
    padding = "same" if kernel == 2 or pick.of((0, 0, 1)) else dilation * (kernel // 2)
    return called(kind(channels, channels, kernel, 1, padding, dilation, groups, bias=pick.of((True, False))))


def transposed(pick: Pick, x: Tensor) -> Made:
    """A transposed convolution with what may merge with it: others beside it, norms, points and crops around it."""
    ndim, channels = axes_of(x), x.shape[1]
    out = pick.of((channels, 2 * channels))
    strides, padding = pick.of(((2,) * ndim, (1,) * ndim, (3, 2, 1)[:ndim])), pick.of((0, 1))
    kind = getattr(nn, f"ConvTranspose{ndim}d")

    def spread(kernel: int, padding: int, dilation: int = 1) -> Any:
        groups = pick.of([1, channels, math.gcd(2, channels)])
        biased = pick.of((True, False))
        return kind(channels, out, kernel, strides, padding, 0, groups, bias=biased, dilation=dilation)

    alone = spread(pick.of((2, 3)), padding)
    wider, dilated = spread(alone.kernel_size[0] + 2, padding + 1), spread(2, padding, alone.kernel_size[0] - 1)
    point, norm = getattr(nn, f"Conv{ndim}d"), getattr(nn, f"BatchNorm{ndim}d")
    before, after = point(channels, channels, 1, bias=pick.of((False, True))), point(out, 3, pick.of((1, 2)))
    spellings = (
        lambda m, x: m["n"](m["a"](x)),
        lambda m, x: m["a"](x) + m["b"](x),
        lambda m, x: m["n"](m["a"](x) + m["b"](x) - m["c"](x)),
        lambda m, x: m["a"](m["before"](x)),
        lambda m, x: m["after"](m["n"](m["a"](x))),
        lambda m, x: torch.cat([m["a"](x), m["c"](x)], 1),
        lambda m, x: m["n"](m["a"](x)[:, :, 1:]),
        lambda m, x: m["n"](m["a"](F.pad(x, (1, 0)))),
    )
    parts = {"a": alone, "b": wider, "c": dilated, "n": norm(out), "before": before, "after": after}
    return Made(pick.of(spellings), nn.ModuleDict(parts))


def averaged(pick: Pick, x: Tensor) -> Made:
    """Layers and norms before and after what puts pixels elsewhere, or averages them, or chooses some."""
    ndim, channels = axes_of(x), x.shape[1]
    point, pool = getattr(nn, f"Conv{ndim}d"), getattr(F, f"adaptive_avg_pool{ndim}d")
    kinds = (
        lambda: point(channels, channels, 1, groups=pick.of((1, 1, channels))),
        lambda: getattr(nn, f"BatchNorm{ndim}d")(channels),
        lambda: point(channels, channels, 3, padding=pick.of((0, 1))),
        nn.Identity,
    )
    ways = (
        lambda x: pool(x, 2),
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.transpose(2, -1),
        lambda x: x.select(-1, 0).unsqueeze(-1),
        lambda x: x[..., -1].unsqueeze(2),
        lambda x: x.amax(-1, keepdim=True),
    )
    parts = nn.Sequential(*(pick.of(kinds)() for _ in range(3)))
    one, other = pick.of(ways), pick.of(ways)
    return Made(lambda m, x: m[2](other(m[1](one(m[0](x))))), parts)


def side_by_side(pick: Pick, x: Tensor) -> Made:
    """Layers of several values, joined, and what may go into each of them."""
    ndim, channels = axes_of(x), x.shape[1]
    kind, out = getattr(nn, f"Conv{ndim}d"), pick.of((1, channels))
    layers = nn.ModuleDict(
        {
            "a": kind(channels, channels, 3, padding=1, bias=pick.of((True, False))),
            "b": kind(channels, out, 1, groups=pick.of((1, math.gcd(channels, out)))),
            "n": getattr(nn, f"BatchNorm{ndim}d")(channels + out),
        }
    )
    joins = (
        lambda m, x: torch.cat([m["a"](x), m["b"](torch.tanh(x))], 1),
        lambda m, x: torch.cat((m["b"](x * 2), m["a"](x.abs()) + x), dim=1),
        lambda m, x: torch.cat([m["a"](torch.tanh(x)), m["b"](m["a"](x))], 1),
        lambda m, x: torch.cat([m["a"](x), torch.tanh(m["b"](x))], 1),
        lambda m, x: torch.cat([m["a"](x), m["b"](x)], 1),
    )
    ways = (
        lambda m, y: m["n"](y),
        lambda m, y: m["n"](y) * 2 + 1,
        lambda m, y: m["n"](y)[:, 1:],
        lambda m, y: m["n"](y) + y,
        lambda m, y: m["n"](y.mul_(2)),
        lambda m, y: m["n"](y.flip(-1).roll(1, 2)),
        lambda m, y: m["n"](y.flatten(2)[..., : y.shape[2]]) if y.dim() == 3 else m["n"](y.relu()),
    )
    join, way = pick.of(joins), pick.of(ways)
    return Made(lambda m, x: way(m, join(m, x)), layers)


def linear(pick: Pick, x: Tensor) -> Made:
    """A linear layer along the last axis."""
    if x.ndim > 3:
        raise Unfit(x.shape)
    inputs = x.shape[-1]
    module = nn.Linear(inputs, pick.of((inputs, 4, 2, 6)), bias=pick.of((True, False)))
    spellings = (
        lambda m, x: m(x),
        lambda m, x: F.linear(x, m.weight, m.bias),
        lambda m, x: aten.linear.default(x, m.weight, m.bias),
        lambda m, x: x @ m.weight.t(),
        lambda m, x: torch.matmul(x, m.weight.T),
        lambda m, x: F.linear(x, m.weight * 0.5),
        lambda m, x: torch.einsum("...i,oi->...o", x, m.weight),
        lambda m, x: torch.einsum("oi,...i->...o", m.weight * 2, x),
        lambda m, x: x @ m.weight.view(m.weight.shape[1], -1),
    )
    return Made(pick.of(spellings), module)


def product(pick: Pick, x: Tensor) -> Made:
    """A product of the channels, in axis 1, with a matrix."""
    ndim, channels = axes_of(x), x.shape[1]
    out = pick.of((channels, 4, 2, 6))
    holder, axes = Holder(buffers=pick.of((False, True)), w=(out, channels), g=(channels,)), "uvw"[:ndim]
    spellings: tuple[Any, ...] = (
        lambda m, x: torch.einsum(f"bc{axes},kc->bk{axes}", x, m.w),
        lambda m, x: torch.einsum(f"ck,zc{axes}->zk{axes}", [m.w.t(), x]),
        lambda m, x: torch.einsum("bc...,c->bc...", x, m.g),
        lambda m, x: aten.einsum.default(f"ay{axes},xy->ax{axes}", [x, m.w]),
        lambda m, x: torch.einsum(f"bc{axes},kc->b{axes}k", x, m.w),
    )
    flat: tuple[Any, ...] = (
        lambda m, x: m.w @ x,
        lambda m, x: torch.bmm(m.w.expand(x.size(0), -1, -1), x),
        lambda m, x: torch.bmm(x.transpose(1, 2), m.w.t().expand(x.size(0), -1, -1)).transpose(1, 2),
        lambda m, x: torch.matmul(m.w[None], x),
    )
    return Made(pick.of(spellings + flat * (ndim == 1)), holder)


def lora(pick: Pick, x: Tensor) -> Made:
    """``W x + s B A x`` along the last axis."""
    if x.ndim > 3:
        raise Unfit(x.shape)
    size, rank = x.shape[-1], pick.of((2, 1))
    parts = nn.ModuleDict(
        {"w": nn.Linear(size, size), "a": nn.Linear(size, rank, bias=False), "b": nn.Linear(rank, size, bias=False)}
    )
    spellings = (
        lambda m, x: m["w"](x) + 0.5 * m["b"](m["a"](x)),
        lambda m, x: m["w"](x) + m["b"](m["a"](x) * 2),
        lambda m, x: F.linear(x, m["w"].weight + m["b"].weight @ m["a"].weight, m["w"].bias),
    )
    return Made(pick.of(spellings), parts)


def fixed(pick: Pick, x: Tensor) -> Made:
    """A frozen filter in a buffer, as edge-oriented blocks have, scaled by a parameter."""
    ndim, channels = axes_of(x), x.shape[1]
    holder = Holder(buffers=True, filter=(channels, 1, *(3,) * ndim))
    holder.scale = nn.Parameter(torch.zeros(channels, 1, *(1,) * ndim))
    convolve, padding = getattr(F, f"conv{ndim}d"), pick.of((1, 0))
    spellings = (
        lambda m, x: convolve(x, m.filter * m.scale, None, 1, padding, 1, channels),
        lambda m, x: convolve(x, m.filter, groups=channels, padding=padding) * m.scale.view(-1, *(1,) * ndim),
    )
    return Made(pick.of(spellings), holder)


def _settings(pick: Pick, x: Tensor) -> dict[str, Any]:
    ndim, channels = axes_of(x), x.shape[1]
    out = pick.of((channels, channels, 4, 2, 8, 6))
    common = math.gcd(channels, out)
    groups = pick.of([1, 1, common, *(g for g in (2, 3, 4) if common % g == 0)])
    kernel = pick.of((3, 1, 1, 2, 5, "mixed"))
    kernel = pick.each((1, 3, 2), ndim) if kernel == "mixed" else (kernel,) * ndim
    stride = pick.of((1, 1, 1, 1, 2, "mixed"))
    stride = pick.each((1, 2, 3), ndim) if stride == "mixed" else (stride,) * ndim
    dilation = pick.of((1, 1, 1, 2, "mixed"))
    dilation = pick.each((1, 2), ndim) if dilation == "mixed" else (dilation,) * ndim
    half = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    paddings = [half, half, half, 0, 0, pick.each((0, 1, 2), ndim), "same" if set(stride) == {1} else 0]
    return {
        "out_channels": out,
        "kernel_size": kernel,
        "stride": stride,
        "padding": pick.of(paddings),
        "dilation": dilation,
        "groups": groups,
        "bias": pick.of((True, False)),
        "padding_mode": pick.of((*("zeros",) * 8, "reflect", "replicate", "circular")),
    }


def _module(_pick: Pick, module: Any) -> Made:
    return called(module)


def _arguments(m: Any) -> tuple[Any, ...]:
    return m.stride, m.padding, m.dilation, m.groups


def _functional(_pick: Pick, module: Any) -> Made:
    convolve = getattr(F, f"conv{module.weight.ndim - 2}d")
    return Made(lambda m, x: convolve(x, m.weight, m.bias, *_arguments(module)), module)


def _aten(pick: Pick, module: Any) -> Made:
    stride, padding, dilation, groups = _arguments(module)
    if isinstance(padding, str):
        raise Unfit(padding)
    ndim = module.weight.ndim - 2
    plain = getattr(aten, f"conv{ndim}d").default
    spellings = (
        lambda m, x: plain(x, m.weight, m.bias, stride, padding, dilation, groups),
        lambda m, x: aten.convolution.default(
            x, m.weight, m.bias, stride, padding, dilation, False, [0] * ndim, groups
        ),
    )
    return Made(pick.of(spellings), module)


def _computed(pick: Pick, module: Any) -> Made:
    """A weight computed in forward from parameters alone."""
    convolve = getattr(F, f"conv{module.weight.ndim - 2}d")
    module.gain = nn.Parameter(torch.zeros(module.out_channels, *(1,) * (module.weight.ndim - 1)))

    def standardised(m: Any) -> Tensor:
        mean = m.weight.flatten(1).mean(1).view_as(m.gain)
        spread = m.weight.flatten(1).var(1, unbiased=False).view_as(m.gain)
        return m.gain * (m.weight - mean) / (spread + 0.1).sqrt()

    weights = (
        lambda m: m.weight * m.gain,
        standardised,
        lambda m: torch.tanh(m.weight) + m.gain,
        lambda m: torch.einsum("o...,o->o...", m.weight, m.gain.flatten()),
        lambda m: F.batch_norm(
            m.weight.transpose(0, 1), m.gain.flatten(), m.gain.flatten().abs() + 0.5, None, None, False, 0, 0.1
        ).transpose(0, 1),
        lambda m: m.weight.flip(0),
    )
    weight = pick.of(weights)
    return Made(lambda m, x: convolve(x, weight(m), m.bias, *_arguments(module)), module)


def _normed(pick: Pick, module: Any) -> Made:
    old = pick.of((False, True))
    return called(nn.utils.weight_norm(module) if old else parametrizations.weight_norm(module))


def _in_class(_pick: Pick, module: Any) -> Made:
    """A subclass that torch.fx traces through."""
    convolve = getattr(F, f"conv{module.weight.ndim - 2}d")

    class FunctionalConv(type(module)):
        def forward(self, x: Tensor) -> Tensor:
            return convolve(x, self.weight, self.bias, *_arguments(self))

    module.__class__ = FunctionalConv
    return called(module)


def pool(pick: Pick, x: Tensor) -> Made:
    """An average pool with any of its flags."""
    ndim = axes_of(x)
    kernel = pick.of((3, 2, 1))
    stride, padding = pick.of((1, None, 2)), pick.of((kernel // 2, 0))
    flags = {"ceil_mode": pick.of((False, False, True)), "count_include_pad": pick.of((True, True, False))}
    if ndim > 1 and pick.of((False, False, True)):
        flags["divisor_override"] = 3
    run, kind = getattr(F, f"avg_pool{ndim}d"), getattr(nn, f"AvgPool{ndim}d")
    return pick.of(
        (
            called(kind(kernel, stride, padding, **flags)),
            function(lambda x: run(x, kernel, stride, padding, **flags)),
            function(
                lambda x: getattr(aten, f"avg_pool{ndim}d").default(
                    x, [kernel] * ndim, [stride or kernel] * ndim, [padding] * ndim, *flags.values()
                )
            ),
        )
    )
