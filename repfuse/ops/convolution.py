"""How a convolution's arguments, in any spelling, become a geometry."""

from __future__ import annotations

from collections.abc import Sequence

from repfuse.algebra.geometry import Geometry, Ints, Padding


def geometry(
    weight_shape: Sequence[int],
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    *,
    padding_mode: str = "zeros",
) -> Geometry:
    """Return the geometry of ``torch.nn.functional.conv*d`` with a weight of this shape and these arguments."""
    kernel = tuple(weight_shape[2:])
    ndim = len(kernel)
    dilations = per_axis(dilation, ndim)
    pads = _padding(padding, kernel, dilations)
    return Geometry(
        in_channels=weight_shape[1] * groups,
        out_channels=weight_shape[0],
        kernel=kernel,
        stride=per_axis(stride, ndim),
        padding=pads,
        # A single tap has no spacing: one canonical value makes equal geometries compare equal.
        dilation=tuple(1 if k == 1 else d for k, d in zip(kernel, dilations, strict=True)),
        groups=groups,
        padding_mode=padding_mode if any(amount for pair in pads for amount in pair) else "zeros",
    )


def per_axis(value: int | Sequence[int], ndim: int) -> Ints:
    """Return one number per spatial axis from PyTorch's int or sequence (a sequence of one stands for all)."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * ndim if len(values) == 1 else values


def _padding(padding: int | str | Sequence[int], kernel: Ints, dilation: Ints) -> Padding:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        # PyTorch puts the odd one after the input.
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert not isinstance(padding, str)
    return tuple((amount, amount) for amount in per_axis(padding, len(kernel)))
