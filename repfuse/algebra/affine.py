"""The algebra of affine maps: tensors only, no graph.

A map is ``y = W ⋆ x + b``. Three facts carry everything (sources: linearity of the convolution; Ding et al., "RepVGG",
arXiv 2101.03697, section 3.3; Ding et al., "Diverse Branch Block", arXiv 2103.13425, section 3.2):

    (W1 ⋆ x + b1) + (W2 ⋆ x + b2) = (W1 + W2) ⋆ x + (b1 + b2)    both kernels laid on the union of their taps
    s * (W ⋆ x + b) + t           = (s W) ⋆ x + (s b + t)        s and t one number per output channel
    V ⋆ (W ⋆ x + b) + c           = (V W) ⋆ x + (V b + c)        where the law of borders allows it (``borders``)

Weights are float64 until the last step, so that only one rounding, the final cast, separates the result from exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repfuse.algebra.geometry import Geometry, NotAffine, window
from repfuse.algebra.layers import Numbers, Phases, Windows
from repfuse.algebra.transposed import TransposedGeometry

# How weights are laid out.


def swap_layout(geometry: Geometry, weight: Tensor) -> Tensor:
    """Return a weight as PyTorch stores it as one of this algebra, ``geometry.weight_shape``, or the other way around.

    They differ for transposed convolutions: in each of their groups PyTorch has the input channels first.
    """
    if not isinstance(geometry, TransposedGeometry):
        return weight
    by_group: Tensor = weight.unflatten(0, (geometry.groups, -1))  # type: ignore[no-untyped-call]
    return by_group.transpose(1, 2).flatten(0, 1)


def _like(geometry: Geometry, weight: Tensor, other: Geometry) -> tuple[Geometry, Tensor]:
    """Return a map as one of the kind that it is beside ``other``: the other kind has its kernel turned around."""
    own, _ = geometry.alike(other)
    return own, weight if own is geometry else weight.flip(tuple(range(2, weight.dim())))


# A sum of weights on their common taps and groups, in float64 and rounded once, in little memory.


_BLOCK = 1 << 18
"""Numbers of a weight that are summed at a time, 2 MB in float64: with fewer, calls of torch show; more gain none."""


@dataclass(frozen=True)
class Addend:
    """``scale * weight``, laid out as ``geometry`` says; ``weight`` in any dtype, ``scale`` float64 ``[C_out]``."""

    geometry: Geometry
    weight: Tensor
    scale: Tensor | None = None

    def like(self, geometry: Geometry) -> Addend:
        """Return this addend of a sum of this geometry as one of the same kind."""
        return Addend(*_like(self.geometry, self.weight, geometry), self.scale)

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return these rows of the scaled weight in float64, in ``out`` if given."""
        rows = self.weight[start:stop]
        exact = rows.to(torch.float64) if out is None else out.copy_(rows)
        if self.scale is None:
            return exact
        scale = self.scale[start:stop].view(-1, *[1] * (rows.dim() - 1))
        return exact * scale if out is None else exact.mul_(scale)


def sum_weights(geometry: Geometry, addends: Sequence[Addend], into: Tensor) -> None:
    """Sum the addends on their common ``geometry`` in float64, and round the sum once, into ``into`` of any dtype.

    Goes by blocks of output channels, so that float64 never takes more memory than one block.
    """
    addends = [addend.like(geometry) for addend in addends]
    # Rows of a kernel of more groups than the sum come in blocks that must not be torn apart.
    apart = [a.geometry.groups for a in addends if a.geometry.groups != geometry.groups]
    unit = math.lcm(1, *(geometry.out_channels // groups for groups in apart))
    per_row = math.prod(geometry.weight_shape[1:])
    step = max(_BLOCK // (per_row * unit), 1) * unit
    direct = into.dtype is torch.float64
    buffer = into if direct else into.new_empty((min(step, len(into)), *into.shape[1:]), dtype=torch.float64)
    whole = [addend for addend in addends if addend.geometry == geometry]
    partial = [addend for addend in addends if addend.geometry != geometry]
    for start in range(0, geometry.out_channels, step):
        stop = min(start + step, geometry.out_channels)
        block = buffer[start:stop] if direct else buffer[: stop - start]
        if whole:
            whole[0].rows(start, stop, out=block)
        else:
            block.zero_()
        for addend in whole[1:]:
            block += addend.rows(start, stop)
        for addend in partial:
            _lay(block, geometry, addend.rows(start, stop), addend.geometry, start)
        if not direct:
            into[start:stop] = block


def _lay(block: Tensor, on: Geometry, rows: Tensor, geometry: Geometry, start: int) -> None:
    """Add ``rows`` of a kernel of ``geometry`` into ``block`` of one of geometry ``on``: align taps, then groups.

    Both begin at output channel ``start``.
    """
    taps = map(window, geometry.taps, on.taps)
    place = block[(slice(None), slice(None), *taps)]
    if geometry.groups == on.groups:
        place += rows
        return
    # Group j of a kernel of g * r groups reads the input channels of part j % r of its group among the g.
    parts = geometry.groups // on.groups
    height = geometry.out_channels // geometry.groups
    grid = place.unflatten(1, (parts, -1)).unflatten(0, (-1, height))  # type: ignore[no-untyped-call]
    group = torch.arange(grid.shape[0], device=block.device)
    grid[group, :, (group + start // height) % parts] += rows.unflatten(0, (-1, height))  # type: ignore[no-untyped-call]


# Weights laid out anew: in other groups, and composed. Tensors ``[C_out, C_in / groups, *kernel]`` in float64.


def columns_of(starts: Numbers, weight: Tensor) -> Numbers:
    """Return which input channel each number of a weight, ``[rows, width, ...]``, is of: row r begins at its start."""
    return starts[:, None] + np.arange(weight.shape[1])


def lay_out(geometry: Geometry, parts: Iterable[tuple[Tensor, Numbers, Sequence[range]]]) -> Tensor:
    """Return a weight of this geometry that has the rows of all parts, one after the other: their numbers, which input
    channel each column of each row is of, none of them twice, and their taps.

    Raises ValueError where a number that is not zero has no place.
    """
    onto, width, start, whole = Windows.of(geometry).starts, geometry.weight_shape[1], 0, torch.empty(0)
    for numbers, columns, taps in parts:
        if not start:  # what a part holds outside of its group is zero, and goes to one more column
            whole = numbers.new_zeros((geometry.out_channels, width + 1, *geometry.kernel))
        rows = np.arange(start, start + len(numbers))[:, None]
        place = torch.as_tensor(columns - onto[rows])
        inside = (place >= 0) & (place < width)
        if not inside.all() and torch.count_nonzero(numbers[~inside]):
            raise ValueError(f"not block-diagonal in {geometry.groups} groups")
        at: Any = (torch.as_tensor(rows), place.where(inside, width), *map(window, taps, geometry.taps))
        whole[at] = numbers
        start += len(numbers)
    return whole[:, :width]


def regrouped(weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """Return the weight of the same map in this many groups: more where it is block-diagonal, or fewer.

    Raises ValueError where ``groups`` does not divide the channels, or a number that is not zero has no place.
    """
    if groups == geometry.groups:
        return weight
    if geometry.in_channels % groups or geometry.out_channels % groups:
        raise ValueError(f"{geometry.ends} in {groups} groups")
    own = columns_of(Windows.of(geometry).starts, weight)
    return lay_out(replace(geometry, groups=groups), [(weight, own, geometry.taps)])


def response(geometry: Geometry, weight: Tensor, constant: Tensor) -> Tensor:
    """Return what the kernel, ``[C_out]`` numbers, makes of an input that is ``constant``, ``[C_in]``, everywhere."""
    sums = weight.reshape(geometry.groups, -1, weight.shape[1], math.prod(geometry.kernel)).sum(3)
    return torch.einsum("goi,gi->go", sums, constant.view(geometry.groups, -1)).flatten()


def composed_weight(
    geometry: Geometry, inner: Geometry, inner_weight: Tensor, outer: Geometry, outer_weight: Tensor
) -> Tensor:
    """Return the weight of ``outer`` after ``inner`` on their ``geometry``.

    ``(V ⋆ (W ⋆ x))[q] = sum over u, t of V[u] W[t] x[stride (step q + u) + t]``: the product of the matrices of two
    taps u and t is added at tap ``t + stride * u``, of transposed ones at ``step * t + u``. Both are of one kind.
    """
    if not outer.depthwise:
        outer_weight = regrouped(outer_weight, outer, geometry.groups)
    times_inner = _products(geometry, inner, inner_weight, outer)
    weight = inner_weight.new_zeros(geometry.weight_shape)
    matrices = outer_weight.reshape(*outer_weight.shape[:2], -1).unbind(2)
    for offsets, matrix in zip(itertools.product(*outer.taps), matrices, strict=True):
        place = map(window, inner.behind(offsets, outer), geometry.taps)
        weight[(slice(None), slice(None), *place)] += times_inner(matrix)
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


ROUNDING = 1e-12
"""Relative difference of two numbers that are the same in exact arithmetic, computed in float64."""


@dataclass(frozen=True)
class AffineConv:
    """The map ``y = W ⋆ x + b``: ``weight`` ``[C_out, C_in / groups, *K]`` and ``bias`` ``[C_out]``, both float64."""

    geometry: Geometry
    weight: Tensor
    bias: Tensor

    @staticmethod
    def identity(channels: int, ndim: int, device: torch.device | None = None) -> AffineConv:
        """Return ``y = x`` for ``[N, channels, *ndim axes]``: a depthwise 1x1 kernel of ones."""
        return AffineConv.filter(Geometry.identity(channels, ndim), 1.0, device)

    @staticmethod
    def filter(geometry: Geometry, value: float, device: torch.device | None = None) -> AffineConv:
        """Return the map whose taps are all ``value``; depthwise, an average pool, a pad or a crop."""
        weight = torch.full(geometry.weight_shape, value, dtype=torch.float64, device=device)
        return AffineConv.convolution(geometry, weight)

    @staticmethod
    def phases(layer: Phases, device: torch.device | None = None) -> AffineConv:
        """Return the map whose output channels are the taps of each channel, one by one."""
        geometry = layer.geometry
        each = geometry.in_channels // geometry.groups * math.prod(geometry.kernel)
        one = torch.eye(each, dtype=torch.float64, device=device)
        rows = one[list(layer.order)] if layer.order else one.repeat(geometry.groups, 1)
        return AffineConv.convolution(geometry, rows.view(geometry.weight_shape))

    @staticmethod
    def convolution(geometry: Geometry, weight: Tensor, bias: Tensor | None = None) -> AffineConv:
        """Return the map of a convolution with these weights, in any floating dtype."""
        zeros = torch.zeros(geometry.out_channels, dtype=torch.float64, device=weight.device)
        return AffineConv(geometry, weight.double(), zeros if bias is None else bias.double())

    def like(self, geometry: Geometry) -> AffineConv:
        """Return the same map as one of the kind that it is beside one of this geometry."""
        return AffineConv(*_like(self.geometry, self.weight, geometry), self.bias)

    def add(self, other: AffineConv) -> AffineConv:
        """Return ``x -> self(x) + other(x)``. Raises NotAffine where no single convolution equals it."""
        geometry = self.geometry.add(other.geometry)
        weight = self.weight.new_empty(geometry.weight_shape)
        sum_weights(geometry, [Addend(self.geometry, self.weight), Addend(other.geometry, other.weight)], weight)
        return AffineConv(geometry, weight, self.bias + other.bias)

    def scale(self, scale: Tensor, shift: Tensor) -> AffineConv:
        """Return ``x -> scale * self(x) + shift`` with ``scale`` and ``shift`` of shape ``[C_out]``."""
        weight = self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1))
        return AffineConv(self.geometry, weight, scale * self.bias + shift)

    def then(self, outer: AffineConv, fill: Tensor | float = 0.0) -> AffineConv:
        """Return ``x -> outer(self(x))``, where ``outer`` pads with ``fill``: a number, or one per channel of ``self``.

        Raises NotAffine where no single convolution equals it: the codes of ``Geometry.then``, and
        "shift-before-padding" where the bias, which is what ``self`` is beyond its output, is not ``fill``.
        """
        geometry = self.geometry.then(outer.geometry)
        if self.geometry.borders_show(outer.geometry):
            check_beyond(self.bias, fill)
        inner, last = self.like(outer.geometry), outer.like(self.geometry)
        weight = composed_weight(geometry, inner.geometry, inner.weight, last.geometry, last.weight)
        bias = outer.bias + response(outer.geometry, outer.weight, self.bias)
        return AffineConv(geometry, weight, bias)

    def homogeneous(self) -> AffineConv:
        """Return the map of ``[x, 1]`` that is ``self(x)`` and has no bias, where the first tap is inside x always."""
        weight = regrouped(self.weight, self.geometry, 1)
        ones = weight.new_zeros(len(weight), 1, *self.geometry.kernel)
        ones.flatten(1)[:, 0] = self.bias
        geometry = replace(self.geometry, in_channels=self.geometry.in_channels + 1, groups=1)
        return AffineConv.convolution(geometry, torch.cat((weight, ones), 1))

    def select(self, indices: Sequence[int]) -> AffineConv:
        """Return ``x -> self(x)[:, indices]``, in as many groups as that leaves."""
        windows = Windows.of(self.geometry).select(indices)
        geometry = replace(self.geometry.select(indices), groups=windows.groups())
        rows = torch.as_tensor(indices, device=self.weight.device)
        own = columns_of(windows.starts, self.weight)
        weight = lay_out(geometry, [(self.weight[rows], own, self.geometry.taps)])
        return AffineConv(geometry, weight, self.bias[rows])

    @staticmethod
    def stack_on(geometry: Geometry, parts: Sequence[tuple[AffineConv, Sequence[int]]]) -> AffineConv:
        """Return ``x -> cat([part(x[:, channels]) for part, channels in parts], channels)`` on this geometry.

        No part is given a channel twice. Nothing between the parts and the result is ever held in fewer groups than
        these have. Raises ValueError where a number that is not zero has no place.
        """
        alike = [(part.like(geometry), np.asarray(channels)) for part, channels in parts]
        own = [channels[columns_of(Windows.of(part.geometry).starts, part.weight)] for part, channels in alike]
        laid = ((part.weight, columns, part.geometry.taps) for (part, _), columns in zip(alike, own, strict=True))
        return AffineConv(geometry, lay_out(geometry, laid), torch.cat([part.bias for part, _ in parts]))

    def regroup(self, groups: int) -> AffineConv:
        """Return the same map in more or fewer groups. Raises ValueError where its weight does not allow them."""
        weight = regrouped(self.weight, self.geometry, groups)
        return AffineConv(replace(self.geometry, groups=groups), weight, self.bias)


def check_beyond(constant: Tensor, fill: Tensor | float) -> None:
    """Raise NotAffine where a map, which is ``constant`` beyond its output, is padded with another number there."""
    padding = torch.as_tensor(fill, dtype=torch.float64, device=constant.device).expand_as(constant)
    size = torch.maximum(constant.abs().max(), padding.abs().max())
    if not ((constant - padding).abs() <= ROUNDING * size).all():
        raise NotAffine("shift-before-padding", "a layer that adds a constant, before one that pads with another")
