"""Random affine maps that follow one another, and inputs on which all of them have an output."""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from repfuse.algebra.affine import AffineConv
from repfuse.algebra.geometry import Geometry
from repfuse.algebra.layers import Windows
from repfuse.algebra.transposed import TransposedGeometry

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def apply(made: AffineConv, x: Tensor) -> Tensor:
    """The map of ``x`` of shape ``[N, C_in, *axes]``, by torch; without spatial axes, of shape ``[..., C_in]``."""
    geometry, weight, bias = made.geometry, made.weight.to(x.dtype), made.bias.to(x.dtype)
    if geometry.ndim == 0:
        inputs = x.reshape(*x.shape[:-1], geometry.groups, weight.shape[1])
        blocks = weight.reshape(geometry.groups, -1, weight.shape[1])
        return torch.einsum("...gi,goi->...go", inputs, blocks).flatten(-2) + bias
    if isinstance(geometry, TransposedGeometry):
        padding = [before for before, _ in geometry.padding]
        # PyTorch has the input channels first, in each of the groups.
        stored = torch.cat([group.transpose(0, 1) for group in weight.chunk(geometry.groups)])
        spread = TRANSPOSED[geometry.ndim]
        extra, groups = geometry.output_padding, geometry.groups
        return spread(x, stored, bias, geometry.stride, padding, extra, groups, geometry.dilation)
    convolve, padded = CONVOLUTIONS[geometry.ndim], pad_explicitly(x, geometry)
    return convolve(padded, weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups)


def pad_explicitly(x: Tensor, geometry: Geometry) -> Tensor:
    """``x`` padded and cropped as the geometry says, so that a convolution without padding follows."""
    padding, crop = geometry.pad_then_crop
    if any(padding):
        x = F.pad(x, padding, mode="constant" if geometry.padding_mode == "zeros" else geometry.padding_mode)
    return F.pad(x, crop) if any(crop) else x


def stack(parts: list[AffineConv]) -> AffineConv:
    """The channels of all parts, one after the other, in as many groups as that leaves."""
    windows = Windows.concat([Windows.of(part.geometry) for part in parts])
    geometry = dataclasses.replace(Geometry.stacked([part.geometry for part in parts]), groups=windows.groups())
    return AffineConv.stack_on(geometry, [(part, range(geometry.in_channels)) for part in parts])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to rounding in float64."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-12 * other.abs().max())


@st.composite
def chains(draw, count: int = 2, ndims: tuple[int, ...] = (0, 1, 2, 3), biased: bool = True) -> list[AffineConv]:
    """Maps each of which reads the output of the one before; two in three have a bias, if any."""
    ndim = draw(st.sampled_from(ndims))
    channels = [draw(st.sampled_from([4, 6, 12])) for _ in range(count + 1)]
    shapes = [draw(shapes_of(*ends, ndim)) for ends in itertools.pairwise(channels)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    return [of(shape, generator, biased and draw(st.integers(0, 2)) > 0) for shape in shapes]


def of(shape: Geometry, generator: torch.Generator, biased: bool = True) -> AffineConv:
    """A map of this geometry with random numbers."""
    weight = torch.randn(shape.weight_shape, generator=generator, dtype=torch.float64)
    bias = torch.randn(shape.out_channels, generator=generator, dtype=torch.float64)
    return AffineConv(shape, weight, bias if biased else torch.zeros_like(bias))


@st.composite
def shapes_of(draw, inputs: int, outputs: int, ndim: int) -> Geometry:
    """A geometry of any padding, crop, stride and dilation."""
    axes = [draw(_axis(most=2 if ndim == 3 else 3)) for _ in range(ndim)]
    kernel, stride, padding, dilation = zip(*axes, strict=True) if axes else ((),) * 4
    common = math.gcd(inputs, outputs)
    groups = draw(st.sampled_from([groups for groups in (1, 2, 3, 4, 6, 12) if common % groups == 0]))
    return Geometry(inputs, outputs, kernel, stride, padding, dilation, groups)


@st.composite
def _axis(draw, most: int):
    kernel = draw(st.sampled_from([1, 1, 2, most]))
    dilation = draw(st.integers(1, most)) if kernel > 1 else 1
    reach = dilation * (kernel - 1)
    one = st.integers(-2, 3)
    # No padding, all that a kernel can use, or any: with the last alone, most pairs would be refused.
    padding = draw(st.one_of(st.just((0, 0)), st.just((reach, reach)), st.tuples(one, one)))
    return kernel, draw(st.sampled_from([1, 1, most])), padding, dilation


def sizes(maps: list[AffineConv], count: int = 4) -> list[tuple[int, ...]]:
    """The first input sizes on which every map of the chain has an output, each axis beginning with another."""
    axes = []
    for axis in range(maps[0].geometry.ndim):
        fitting = [n for n in range(1, 200) if _fits(maps, axis, n)]
        axes.append([fitting[(axis + i) % count] for i in range(count)])
    return list(zip(*axes, strict=True)) if axes else [()]


def _fits(maps: list[AffineConv], axis: int, size: int) -> bool:
    for made in maps:
        size = (size + made.geometry.slack[axis]) // made.geometry.stride[axis] + 1
        if size < 1:
            return False
    return True


def inputs(maps: list[AffineConv]):
    """Batches of two for the first of the maps; with leading axes alone where there are no spatial ones."""
    generator = torch.Generator().manual_seed(1)
    channels = maps[0].geometry.in_channels
    for size in sizes(maps):
        shape = (2, channels, *size) if size else (2, 3, channels)
        yield torch.randn(shape, generator=generator, dtype=torch.float64)
