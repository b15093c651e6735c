"""Steps that scale and shift channels: normalisations, numbers, parameters and buffers."""

from __future__ import annotations

import operator

import torch
from support.programs.made import Holder, Made, Pick, Unfit, axes_of, called, per_channel
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten


def norm(pick: Pick, x: Tensor) -> Made:
    """A normalisation with frozen statistics, as a module, a call or arithmetic."""
    if x.ndim < 2:
        raise Unfit(x.shape)
    ndim, channels = max(x.ndim - 2, 1), x.shape[1]
    affine = pick.of((True, True, False))
    module = getattr(nn, f"BatchNorm{ndim}d")(channels, affine=affine)
    shape = per_channel(x)

    def scale(m: nn.BatchNorm2d) -> Tensor:
        return (m.running_var + m.eps).rsqrt() * (m.weight if affine else 1)

    def folded(m: nn.BatchNorm2d, x: Tensor) -> Tensor:
        shift = (m.bias if affine else 0) - m.running_mean * scale(m)
        return x * scale(m).reshape(shape) + shift.reshape(1, *shape)

    def stepwise(m: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return (x - m.running_mean.view(shape)) / torch.sqrt(m.running_var + m.eps).view(shape)

    spellings = (
        lambda m, x: m(x),
        lambda m, x: m(x),
        lambda m, x: F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.1, m.eps),
        lambda m, x: aten.batch_norm.default(
            x, m.weight, m.bias, m.running_mean, m.running_var, False, 0.1, m.eps, False
        ),
        lambda m, x: aten._native_batch_norm_legit_no_training.default(
            x, m.weight, m.bias, m.running_mean, m.running_var, 0.1, m.eps
        )[0],
        folded,
        stepwise,
    )
    return Made(pick.of(spellings), module)


def instance_norm(pick: Pick, x: Tensor) -> Made:
    """An instance normalisation: affine with running statistics alone."""
    kind = getattr(nn, f"InstanceNorm{axes_of(x)}d")
    return called(kind(x.shape[1], affine=True, track_running_stats=pick.of((True, True, False))))


def constant(pick: Pick, x: Tensor) -> Made:
    """A parameter or buffer per channel, or one for all, times, plus, minus or over."""
    last = x.ndim == 2 or (x.ndim == 3 and pick.of((False, True)))
    shape = (x.shape[-1],) if last else per_channel(x)
    shape = pick.of((shape, shape, shape, (1, *shape), (), (1,), (1,) * x.ndim))
    holder = Holder(buffers=pick.of((False, True)), value=shape)
    spellings = (
        lambda m, x: x * m.value,
        lambda m, x: m.value * x,
        lambda m, x: x + m.value,
        lambda m, x: x - m.value,
        lambda m, x: m.value - x,
        lambda m, x: x / (m.value.abs() + 0.5),
        lambda m, x: torch.add(x, m.value, alpha=2),
        lambda m, x: x.mul_(m.value),
        lambda m, x: x.add_(m.value),
        lambda m, x: operator.itruediv(x, m.value.exp()),
        lambda m, x: operator.isub(x, m.value),
        lambda m, x: aten.mul.Tensor(x, m.value),
        lambda m, x: aten.add.Tensor(x, m.value),
        lambda m, x: aten.div_.Tensor(x, m.value.exp()),
        lambda m, x: x.mul(m.value.detach() * 2).add(m.value),
        lambda m, x: torch.sub(m.value, x, alpha=0.5),
        lambda m, x: torch.addcmul(m.value, x, m.value * 2),
        lambda m, x: x.addcmul_(x * 2, m.value),
    )
    return Made(pick.of(spellings), holder)


def toward(pick: Pick, x: Tensor) -> Made:
    """A value moved toward another by a constant, and what reads of a tensor of what kind it is."""
    shape = pick.of(((x.shape[1], *(1 for _ in x.shape[2:])), (1,)))
    spellings = (
        lambda m, x: torch.addcmul(x, x + 1, m.value.to(x), value=-0.5),
        lambda m, x: torch.lerp(x, -x, m.value.type_as(x)),
        lambda m, x: x.lerp(x * 2, x.new_full((1,), 0.25)),
        lambda m, x: x - x.new_tensor([0.5]) * m.value.to(x.device, x.dtype),
    )
    return Made(pick.of(spellings), Holder(buffers=pick.of((False, True)), value=shape))


def number(pick: Pick, x: Tensor) -> Made:
    """The same with numbers."""
    amount = pick.of((2, 0.5, -1, 1, 3))
    spellings = (
        lambda x: x * amount,
        lambda x: amount * x,
        lambda x: -x,
        lambda x: x / amount,
        lambda x: x + 0,
        lambda x: x + amount,
        lambda x: x - amount,
        lambda x: amount - x,
        lambda x: x.mul_(amount),
        lambda x: x.add_(amount),
        lambda x: operator.isub(x, amount),
        lambda x: operator.itruediv(x, amount),
        lambda x: torch.rsub(x, amount, alpha=2),
        lambda x: x.neg_(),
        lambda x: aten.mul.Scalar(x, amount),
        lambda x: aten.add.Scalar(x, amount, 2),
        lambda x: aten.rsub.Scalar(x, amount),
        lambda x: aten.div.Scalar(x, amount),
        aten.neg.default,
        lambda x: x.sub(amount).div(amount),
    )
    run = pick.of(spellings)
    return Made(lambda _m, x: run(x))
