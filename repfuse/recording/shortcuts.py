"""Results of the right shape for expensive operations, without their arithmetic.

Tensors on the meta device would do without any, but PyTorch's way to them imports its compiler, and forward code may
ask where a tensor is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_SUMS = {torch.add, Tensor.add, Tensor.sub, Tensor.mul}
_SUMS_IN_PLACE = {Tensor.add_, Tensor.sub_, Tensor.mul_}
_POOLS = {F.avg_pool2d, F.interpolate, F.max_pool2d}
"""Functions that do the same to each channel of each image."""
_ALIKE = {
    F.elu,
    F.gelu,
    F.hardsigmoid,
    F.hardswish,
    F.leaky_relu,
    F.mish,
    F.relu,
    F.relu6,
    F.silu,
    Tensor.relu,
    Tensor.sigmoid,
    Tensor.tanh,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
}
"""Functions of one tensor whose result has its shape."""


def shortcut(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:  # noqa: PLR0911
    """Return a tensor of the shape that ``func`` would return, whatever it holds; None where that takes calling it, or
    it would fail. What works in place returns its first argument, as it is.
    """
    try:
        ndim, alike = _CONVOLUTIONS.get(func), func in _ALIKE
    except TypeError:  # a function that cannot be hashed
        return None
    if alike:
        return _alike(*args, **kwargs)
    if len(args) == 2 and not kwargs and (func in _SUMS or func in _SUMS_IN_PLACE):
        return _added(*args, inplace=func in _SUMS_IN_PLACE)
    if func in _POOLS:
        return _pooled(func, *args, **kwargs)
    if kwargs and func is not F.batch_norm:
        return None
    if ndim is not None:
        return _convolved(ndim, *args)
    if func is F.linear and len(args) in (2, 3):
        return _linear(*args)
    return _normalised(*args, **kwargs) if func is F.batch_norm else None


def _convolved(  # noqa: PLR0917 - the arguments of torch
    ndim: int,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> Tensor | None:
    if not _plain(x, weight, bias) or not ndim < x.dim() < ndim + 3 or weight.dim() != ndim + 2:
        return None
    if x.shape[-ndim - 1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    steps, spread = _per_axis(stride, ndim), _per_axis(dilation, ndim)
    kernel = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], spread, strict=True)]
    if padding == "same":
        pads = [k - 1 for k in kernel]
    elif padding == "valid":
        pads = [0] * ndim
    else:
        pads = [2 * amount for amount in _per_axis(padding, ndim)]
    room = [n + p - k for n, p, k in zip(x.shape[-ndim:], pads, kernel, strict=True)]
    if min(room) < 0 or (padding == "same" and set(steps) != {1}):
        return None
    shape = (*x.shape[: -ndim - 1], weight.shape[0], *(r // s + 1 for r, s in zip(room, steps, strict=True)))
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _linear(x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    fits = _plain(x, weight, bias) and x.dim() > 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if fits else None


def _normalised(  # noqa: PLR0917 - the arguments of torch
    x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: Any = False, **_: Any
) -> Any:
    alike = _plain(x, mean, weight) and _plain(x, var, bias) and x.dim() > 1
    fits = alike and mean.shape == var.shape == x.shape[1:2] and training is False
    return x.new_empty(x.shape) if fits else None


def _alike(x: Any, *others: Any, inplace: bool = False, **_: Any) -> Tensor | None:
    return _of_shape(x, inplace) if _is_image(x) and True not in others else None


def _added(x: Any, y: Any, *, inplace: bool) -> Tensor | None:
    number = type(y) in (int, float) and _is_image(x)
    fits = number or (_plain(x, y, None) and type(y) is Tensor and x.shape == y.shape)
    return _of_shape(x, inplace) if fits else None


def _of_shape(x: Tensor, inplace: bool) -> Tensor:
    return x if inplace else x.new_empty(x.shape)


def _pooled(func: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    if not _is_image(x) or x.dim() != 4:
        return None
    try:
        one = func(x[:1, :1], *args, **kwargs)
    except Exception:  # whatever the call for the whole raises
        return None
    return x.new_empty((*x.shape[:2], *one.shape[2:])) if isinstance(one, Tensor) else None


def _is_image(x: Any) -> bool:
    """Whether x is a contiguous tensor of numbers with a fraction, of two axes at least."""
    return type(x) is Tensor and x.is_floating_point() and x.is_contiguous() and x.numel() > 0 and x.dim() > 1


def _plain(x: Any, weight: Any, bias: Any) -> bool:
    """Whether the result is a new contiguous tensor like x."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return False
    alike = len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1
    return alike and type(x) is Tensor and x.is_contiguous() and weight.is_contiguous() and x.numel() > 0


def _per_axis(value: int | Sequence[int], ndim: int) -> Sequence[int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * ndim if len(values) == 1 else values
