"""Results of the right shape for expensive operations, without their arithmetic; cheap ones are done, past whoever
watches operators.

Tensors on the meta device would do without any, but PyTorch's way to them imports its compiler, and forward code may
ask where a tensor is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from repfuse.networks import tensors_of


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
    if not _of_channels(weight.shape[:1], bias):
        return None
    steps, spread = per_axis(stride, ndim), per_axis(dilation, ndim)
    kernel = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], spread, strict=True)]
    if padding == "same":
        pads = [k - 1 for k in kernel]
    elif padding == "valid":
        pads = [0] * ndim
    else:
        pads = [2 * amount for amount in per_axis(padding, ndim)]
    room = [n + p - k for n, p, k in zip(x.shape[-ndim:], pads, kernel, strict=True)]
    if min(room) < 0 or (padding == "same" and set(steps) != {1}):
        return None
    shape = (*x.shape[: -ndim - 1], weight.shape[0], *(r // s + 1 for r, s in zip(room, steps, strict=True)))
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _linear(x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    fits = _plain(x, weight, bias) and x.dim() > 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    fits = fits and _of_channels(weight.shape[:1], bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if fits else None


def _normalised(  # noqa: PLR0917 - the arguments of torch
    x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: Any = False, **_: Any
) -> Any:
    alike = _plain(x, mean, weight) and _plain(x, var, bias) and x.dim() > 1
    fits = alike and training is False and mean.shape == var.shape and _of_channels(x.shape[1:2], mean, weight, bias)
    return x.new_empty(x.shape) if fits else None


def _normalised_at_the_end(
    x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor | None:
    fits = _is_image(x) and tuple(shape) == x.shape[-len(shape) :] and eps >= 0
    fits = fits and all(each is None or (_plain(x, each, None) and each.shape == shape) for each in (weight, bias))
    return x.new_empty(x.shape) if fits else None


def _alike(x: Any, *others: Any, inplace: bool = False, out: Any = None, **_: Any) -> Tensor | None:
    return _of_shape(x, inplace) if _is_map(x) and True not in others and out is None else None


def _passed_on(x: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> Tensor | None:
    """Dropout that is off."""
    off = training is False and inplace is False and 0 <= p <= 1
    return x if off and type(x) is Tensor else None


def _added(x: Any, y: Any, *, inplace: bool = False) -> Tensor | None:
    fits = _is_map(x) and (type(y) in (int, float) or (_is_alike(x, y) and _is_spread_over(y, x)))
    return _of_shape(x, inplace) if fits else None


def _is_spread_over(y: Tensor, x: Tensor) -> bool:
    """Whether broadcasting leaves x the shape that it has, and the order of its axes is that of the result."""
    pairs = zip(reversed(y.shape), reversed(x.shape), strict=False)
    fits = y.dim() <= x.dim() and all(mine in (1, its) for mine, its in pairs)
    if x.is_contiguous() and y.is_contiguous():
        return fits
    steps = [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]
    return fits and 0 not in steps and len(set(steps)) == len(steps)


def _multiplied(x: Any, y: Any) -> Tensor | None:
    """Matrices of the same batches."""
    if not (type(x) is type(y) is Tensor and x.dtype is y.dtype and x.device == y.device and x.is_floating_point()):
        return None
    fits = 2 < x.dim() == y.dim() and x.shape[:-2] == y.shape[:-2] and x.shape[-1] == y.shape[-2] and x.numel()
    return x.new_empty((*x.shape[:-1], y.shape[-1])) if fits else None


def _of_channels(shape: torch.Size, *numbers: Tensor | None) -> bool:
    return all(each is None or each.shape == shape for each in numbers)


def _of_shape(x: Tensor, inplace: bool) -> Tensor | None:
    """Return a new tensor whose axes lie in the order of those of x; or x, where it can be written into."""
    if inplace:
        return x if x.is_contiguous() else None
    return torch.empty_like(x)


def _pooled(func: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    if not _is_image(x) or x.dim() != 4:
        return None
    try:
        one = func(x[:1, :1], *args, **kwargs)
    except Exception:  # whatever the call for the whole raises
        return None
    return x.new_empty((*x.shape[:2], *one.shape[2:])) if isinstance(one, Tensor) else None


def _padded(x: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Tensor | None:
    if not _is_map(x) or not _gives_rows(x) or mode != "constant" or type(value) not in (int, float, type(None)):
        return None
    if any(type(each) is not int or each < 0 for each in pad) or len(pad) > 2 * x.dim() or len(pad) % 2:
        return None
    if not any(pad):  # a copy as it is
        return None
    both = (0,) * (2 * x.dim() - len(pad)) + tuple(reversed(pad))
    shape = [n + after + before for n, after, before in zip(x.shape, both[::2], both[1::2], strict=True)]
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _concatenated(tensors: Any, dim: Any = 0) -> Tensor | None:
    first = tensors[0] if type(tensors) in (list, tuple) and tensors else None
    if not _is_map(first) or type(dim) is not int or not -first.dim() <= dim < first.dim():
        return None
    if not all(_is_map(x) and _is_alike(first, x) and x.dim() == first.dim() for x in tensors):
        return None
    axis, shape = dim % first.dim(), list(first.shape)
    beside = {(*x.shape[:axis], *x.shape[axis + 1 :]) for x in tensors}
    shape[axis] = sum(x.shape[axis] for x in tensors)
    return first.new_empty(shape) if len(beside) == 1 and any(map(_gives_rows, tensors)) else None


def _gives_rows(x: Tensor) -> bool:
    """Whether what PyTorch makes in the memory format of x is contiguous (``suggest_memory_format``)."""
    return x.dim() not in (4, 5) or x.stride(-1) < x.stride(1) * x.shape[1]


def _as_it_is(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """What is cheap, and no concern of who watches the operators."""
    given = tensors_of(x)
    if not given or any(type(each) is not Tensor for each in given) or tensors_of((args, kwargs)):
        return None
    try:
        return func(x, *args, **kwargs)
    except Exception:  # whatever the call that is watched raises
        return None


def _is_map(x: Any) -> TypeGuard[Tensor]:
    """Whether x is a tensor of numbers with a fraction, of two axes at least."""
    dense = type(x) is Tensor and x.layout is torch.strided
    return dense and x.is_floating_point() and x.numel() > 0 and x.dim() > 1


def _is_image(x: Any) -> TypeGuard[Tensor]:
    """Whether x is such a tensor, and contiguous."""
    return _is_map(x) and x.is_contiguous()


def _plain(x: Any, weight: Any, bias: Any) -> bool:
    """Whether the result is a new contiguous tensor like x."""
    if type(x) is not Tensor or not _is_alike(x, weight) or not (bias is None or _is_alike(x, bias)):
        return False
    return x.is_contiguous() and weight.is_contiguous() and x.numel() > 0


def _is_alike(x: Tensor, y: Any) -> bool:
    return isinstance(y, Tensor) and y.layout is torch.strided and y.dtype is x.dtype and y.device == x.device


def per_axis(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return one number per spatial axis from PyTorch's int or sequence (a sequence of one stands for all)."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * ndim if len(values) == 1 else values


def _both(*names: str) -> tuple[Any, ...]:
    """Return the functions of these names, and the methods."""
    return tuple(getattr(owner, name) for owner in (torch, Tensor) for name in names)


_ALIKE_OF_ONE = (
    *(F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.leaky_relu, F.mish, F.relu, F.relu6, F.silu),
    *_both("relu", "sigmoid", "tanh"),
)
"""Functions of one tensor whose result has its shape."""

CHEAP = (
    *(Tensor.__getitem__, Tensor.view),
    *_both("chunk", "flatten", "permute", "reshape", "split", "transpose", "unsqueeze"),
)
"""Functions that write into no tensor and draw no numbers, and the shapes of whose results depend on the numbers of no
tensor but a second one.
"""

UNCHANGED = frozenset({F.dropout, *_both("flatten")})
"""What may return what it is given, and writes nothing into it."""

SHORTCUTS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_ALIKE_OF_ONE, _alike),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.sub, Tensor.mul, Tensor.div), _added),
    **dict.fromkeys((Tensor.add_, Tensor.sub_, Tensor.mul_), partial(_added, inplace=True)),
    **{func: partial(_pooled, func) for func in (F.adaptive_avg_pool2d, F.avg_pool2d, F.interpolate, F.max_pool2d)},
    **{func: partial(_convolved, ndim) for ndim, func in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1)},
    F.linear: _linear,
    F.batch_norm: _normalised,
    F.layer_norm: _normalised_at_the_end,
    F.dropout: _passed_on,
    F.pad: _padded,
    torch.cat: _concatenated,
    **dict.fromkeys((*_both("matmul"), Tensor.__matmul__), _multiplied),
    **{func: partial(_as_it_is, func) for func in CHEAP},
}
"""For a function what returns, of the same arguments, a tensor of the shape that it would return, whatever it holds;
None where that takes calling it, or it would fail. What works in place returns its first argument, as it is; so may
what leaves it ``UNCHANGED``.
"""
