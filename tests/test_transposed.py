"""The laws of transposed convolutions, against torch's own in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.expressions import Tensors, channelwise, run
from support.maps import same
from torch.nn import functional as F

from repfuse.algebra.affine import Addend
from repfuse.algebra.evaluation import constant, evaluate, scale_and_shift
from repfuse.algebra.expression import Identity, Scaled, joined, selected, sum_of, through
from repfuse.algebra.geometry import Geometry, NotAffine
from repfuse.algebra.layers import Convolution, Factor
from repfuse.algebra.transposed import TransposedGeometry, scaled_outputs

CONVOLVE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
SETTINGS = settings(deadline=None, max_examples=min(60, settings().max_examples))
LIKE = torch.empty(0, dtype=torch.float64)


@st.composite
def shapes(draw, padded: bool = True):
    """Any that torch takes: the output padding is smaller than the stride or the dilation."""
    ndim, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    axes = []
    for _ in range(ndim):
        stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        padding = draw(st.integers(0, 2)) if padded else 0
        extra = draw(st.integers(0, max(stride, dilation) - 1)) if padded else 0
        axes.append((draw(st.integers(1, 3)), stride, (padding, padding), dilation, extra))
    kernel, stride, padding, dilation, extra = zip(*axes, strict=True)
    return TransposedGeometry(4, 6, kernel, stride, padding, dilation, groups, output_padding=extra)


def spread(shape, x, weight, bias=None):
    padding = [before for before, _ in shape.padding]
    return CONVOLVE[shape.ndim](
        x, weight, bias, shape.stride, padding, shape.output_padding, shape.groups, shape.dilation
    )


@SETTINGS
@given(shapes())
def test_the_sizes_are_those_of_torch(shape):
    weight = torch.zeros(shape.weight_shape)
    least = shape.smallest_input
    for more in (0, 1, 3):
        size = tuple(n + more for n in least)
        assert spread(shape, torch.zeros(2, 4, *size), weight).shape[2:] == shape.output_size(size)
    for axis in range(shape.ndim):
        smaller = tuple(n - (place == axis) for place, n in enumerate(least))
        assert smaller[axis] == 0 or shape.output_size(smaller)[axis] < 1


@SETTINGS
@given(shapes(padded=False))
def test_the_work_is_one_multiplication_for_each_pixel_and_weight_that_meet(shape):
    source = (2, 4, *shape.smallest_input)
    everything = spread(shape, torch.ones(source), torch.ones(shape.weight_shape))
    assert shape.macs(source, tuple(everything.shape)) == everything.sum()


@SETTINGS
@given(st.data(), shapes(), st.integers(0, 10_000))
def test_what_multiplies_the_output_goes_into_the_weight(data, shape, seed):
    tensors = Tensors(seed)
    layer = Convolution(shape, tensors.new(*shape.weight_shape), data.draw(st.sampled_from([None, tensors.new(6)])))
    expression = Scaled(through(Identity(4, shape.ndim), layer), data.draw(channelwise(6, tensors)))
    x = torch.randn(2, 4, *(n + 1 for n in shape.smallest_input), dtype=torch.float64)
    assume(math.prod(shape.output_size(tuple(x.shape[2:]))) > 0)
    assert same(spread(shape, x, *evaluate(expression, tensors, LIKE)), run(expression, x, tensors))
    assert all(result.dtype == torch.float16 for result in evaluate(expression, tensors, LIKE.half()))


def test_a_scale_of_nothing_leaves_the_weight():
    shape = TransposedGeometry(4, 6, (2,), (1,), ((0, 0),), (1,), output_padding=(0,))
    weight = torch.randn(shape.weight_shape)
    assert torch.equal(scaled_outputs(Addend(shape, weight)), weight.double())
    assert scaled_outputs(Addend(shape, weight)).dtype == torch.float64


def test_the_scale_is_exact_in_a_low_precision_weight():
    shape = TransposedGeometry(4, 6, (2,), (1,), ((0, 0),), (1,), 2, output_padding=(0,))
    tensors = {"w": torch.randn(shape.weight_shape).bfloat16()}.__getitem__
    expression = Scaled(through(Identity(4, 1), Convolution(shape, "w", None)), Factor(1.1))
    assert torch.equal(evaluate(expression, tensors, LIKE)[0], tensors("w").double() * 1.1)
    assert scale_and_shift(Factor(1.1), tensors)[1] is None
    assert constant(expression, tensors, LIKE.device).tolist() == [0] * 6


def test_it_neither_adds_up_nor_composes():
    shape = TransposedGeometry(4, 4, (3,), (1,), ((1, 1),), (1,), output_padding=(0,))
    plain = Geometry(4, 4, (3,), (1,), ((1, 1),), (1,))
    source = Identity(4, 1)
    one, other = through(source, Convolution(shape, "w", None)), through(source, Convolution(plain, "v", None))
    for refused in (
        lambda: sum_of((one, other)),
        lambda: sum_of((other, one)),
        lambda: joined((one, other)),
        lambda: joined((other, one)),
        lambda: through(one, Convolution(plain, "v", None)),
        lambda: through(other, Convolution(shape, "w", None)),
        lambda: selected(one, (1, 0)),
    ):
        with pytest.raises(NotAffine) as raised:
            refused()
        assert raised.value.code == "transposed-convolution"
        assert raised.value.reason.startswith("transposed 3 ")
