"""Weights laid out anew: in other groups, and composed. Tensors ``[C_out, C_in / groups, *kernel]`` in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from repfuse.algebra.channels import Numbers, Windows
from repfuse.algebra.geometry import Geometry
from repfuse.algebra.taps import window


def in_columns(weight: Tensor, starts: Numbers, onto: Numbers, width: int) -> Tensor:
    """Return ``weight``, whose row r begins at input channel ``starts[r]``, with rows of ``width`` from ``onto[r]``."""
    if width == weight.shape[1] and np.array_equal(starts, onto):
        return weight
    shift = torch.as_tensor(onto - starts, device=weight.device)
    columns = shift[:, None] + torch.arange(width, device=weight.device)
    outside = (columns < 0) | (columns >= weight.shape[1])
    rows = torch.arange(len(weight), device=weight.device)[:, None]
    laid = weight[rows, columns.clamp(0, weight.shape[1] - 1)]
    return laid.masked_fill_(outside.view(*outside.shape, *[1] * (weight.dim() - 2)), 0)


def regrouped(weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """Return the weight of the same map in this many groups: more where it is block-diagonal, or fewer.

    Raises ValueError where ``groups`` does not divide the channels, or a number that is not zero has no place.
    """
    if groups == geometry.groups:
        return weight
    if geometry.in_channels % groups or geometry.out_channels % groups:
        raise ValueError(f"{geometry.ends} in {groups} groups")
    onto = Windows.of(replace(geometry, groups=groups)).starts
    laid = in_columns(weight, Windows.of(geometry).starts, onto, geometry.in_channels // groups)
    if torch.count_nonzero(laid) != torch.count_nonzero(weight):
        raise ValueError(f"not block-diagonal in {groups} groups")
    return laid


def response(geometry: Geometry, weight: Tensor, constant: Tensor) -> Tensor:
    """Return what the kernel, ``[C_out]`` numbers, makes of an input that is ``constant``, ``[C_in]``, everywhere."""
    sums = weight.reshape(geometry.groups, -1, weight.shape[1], math.prod(geometry.kernel)).sum(3)
    return torch.einsum("goi,gi->go", sums, constant.view(geometry.groups, -1)).flatten()


def composed_weight(
    geometry: Geometry, inner: Geometry, inner_weight: Tensor, outer: Geometry, outer_weight: Tensor
) -> Tensor:
    """Return the weight of ``outer`` after ``inner`` on their ``geometry``.

    ``(V ⋆ (W ⋆ x))[q] = sum over u, t of V[u] W[t] x[stride (step q + u) + t]``: the product of the matrices of two
    taps u and t is added at tap ``t + stride * u``.
    """
    if not outer.depthwise:
        outer_weight = regrouped(outer_weight, outer, geometry.groups)
    times_inner = _products(geometry, inner, inner_weight, outer)
    weight = inner_weight.new_zeros(geometry.weight_shape)
    matrices = outer_weight.reshape(*outer_weight.shape[:2], -1).unbind(2)
    for offsets, matrix in zip(itertools.product(*outer.taps), matrices, strict=True):
        by = (stride * u for stride, u in zip(inner.stride, offsets, strict=True))
        moved = (range(t.start + b, t.stop + b, t.step) for t, b in zip(inner.taps, by, strict=True))
        weight[(slice(None), slice(None), *map(window, moved, geometry.taps))] += times_inner(matrix)
    return weight


def _products(geometry: Geometry, inner: Geometry, inner_weight: Tensor, outer: Geometry) -> Callable[[Tensor], Tensor]:
    """Return ``v -> v W``, for the matrix v of one outer tap, as ``[C_out, C_in / geometry.groups, *inner.kernel]``.

    A depthwise v is diagonal and scales rows; a depthwise W scales columns. Neither takes a matrix product.
    """
    ones = (1,) * inner.ndim
    if outer.depthwise:
        return lambda v: v.reshape(-1, 1, *ones) * inner_weight
    if inner.depthwise:
        columns = inner_weight.reshape(geometry.groups, 1, -1, *inner.kernel)
        return lambda v: (v.reshape(geometry.groups, -1, v.shape[1], *ones) * columns).flatten(0, 1)
    dense = regrouped(inner_weight, inner, geometry.groups)
    blocks = dense.reshape(geometry.groups, inner.out_channels // geometry.groups, -1)
    shape = (outer.out_channels, dense.shape[1], *inner.kernel)
    return lambda v: torch.bmm(v.reshape(geometry.groups, -1, v.shape[1]), blocks).view(shape)
