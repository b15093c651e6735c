"""Random affine maps that follow one another, and inputs on which all of them have an output."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import strategies as st

from repfuse.algebra.affine import AffineConv
from repfuse.algebra.geometry import Geometry


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
