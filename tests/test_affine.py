"""The laws of the algebra: what a sum and a scaling of maps must do, against torch's own convolutions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.maps import apply, same, stack
from torch.nn import functional as F

from repfuse.algebra import affine
from repfuse.algebra.affine import Addend, AffineConv, sum_weights
from repfuse.algebra.geometry import Geometry
from repfuse.ops.convolution import geometry

CHANNELS = 12
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SETTINGS = settings(deadline=None, max_examples=min(60, settings().max_examples))


@st.composite
def addable(draw, count: int = 3):
    """Maps of one source that can be added: per axis the same stride and slack, with paddings to match."""
    ndim, seed = draw(st.integers(1, 3)), draw(st.integers(0, 10_000))
    outputs = draw(st.sampled_from([CHANNELS, 2 * CHANNELS]))
    stride = tuple(draw(st.integers(1, 2)) for _ in range(ndim))
    slack = tuple(draw(st.integers(-3, 2)) for _ in range(ndim))
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for _ in range(count):
        kernel, dilation, padding = zip(*(draw(_axis(amount)) for amount in slack), strict=True)
        groups = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
        shape = Geometry(CHANNELS, outputs, kernel, stride, padding, dilation, groups)
        weight = torch.randn(shape.weight_shape, generator=generator, dtype=torch.float64)
        maps.append(AffineConv(shape, weight, torch.randn(outputs, generator=generator, dtype=torch.float64)))
    return maps


@st.composite
def _axis(draw, slack: int):
    """Kernel, dilation and padding (before, after) of this slack."""
    kernels = [(k, d) for k in (1, 2, 3, 4) for d in (1, 2, 3) if slack + 1 + d * (k - 1) >= 0 and (k > 1 or d == 1)]
    kernel, dilation = draw(st.sampled_from(kernels))
    total = slack + 1 + dilation * (kernel - 1)
    before = draw(st.integers(0, total))
    return kernel, dilation, (before, total - before)


def sizes(shape: Geometry):
    """Input sizes from the smallest with an output."""
    least = [max(1, -slack) for slack in shape.slack]
    return [tuple(low + step + axis for axis, low in enumerate(least)) for step in (0, 1, 4)]


def inputs(shape: Geometry):
    generator = torch.Generator().manual_seed(1)
    for size in sizes(shape):
        yield torch.randn((2, shape.in_channels, *size), generator=generator, dtype=torch.float64)


@SETTINGS
@given(addable(2))
def test_a_sum_computes_the_sum(maps):
    a, b = maps
    assert all(same(apply(a.add(b), x), apply(a, x) + apply(b, x)) for x in inputs(a.geometry))


@SETTINGS
@given(addable(3))
def test_sums_commute_and_associate(maps):
    a, b, c = maps
    assert a.add(b).geometry == b.add(a).geometry and same(a.add(b).weight, b.add(a).weight)
    left, right = a.add(b).add(c), a.add(b.add(c))
    assert all(same(apply(left, x), apply(right, x)) for x in inputs(a.geometry))


@SETTINGS
@given(addable(2), st.integers(0, 100))
def test_scaling_distributes(maps, seed):
    a, b = maps
    scale, shift = torch.randn((2, a.geometry.out_channels), generator=torch.Generator().manual_seed(seed)).double()
    scaled = a.add(b).scale(scale, shift)
    wide = (1, -1, *[1] * a.geometry.ndim)
    for x in inputs(a.geometry):
        assert same(apply(scaled, x), scale.view(wide) * (apply(a, x) + apply(b, x)) + shift.view(wide))
    apart = a.scale(scale, shift).add(b.scale(scale, torch.zeros_like(shift)))
    assert same(scaled.weight, apart.weight) and same(scaled.bias, apart.bias)


@SETTINGS
@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(0, 2), st.integers(1, 2))
def test_a_convolution_is_that_of_torch(ndim, groups, kernel, padding, stride):
    weight = torch.randn(8, 8 // groups, *[kernel] * ndim).double()
    bias = torch.randn(8).double()
    made = AffineConv.convolution(geometry(weight.shape, stride, padding, 2, groups), weight, bias)
    x = torch.randn(2, 8, *range(7, 7 + ndim)).double()
    assert same(apply(made, x), CONVOLVE[ndim](x, weight, bias, stride, padding, 2, groups))
    without = AffineConv.convolution(made.geometry, weight)
    assert same(apply(without, x), CONVOLVE[ndim](x, weight, None, stride, padding, 2, groups))


@pytest.mark.parametrize("ndim", [0, 2])
def test_a_map_is_applied_in_the_dtype_of_its_input(ndim):
    made = AffineConv.identity(4, ndim)
    x = torch.ones((2, 4) if ndim == 0 else (2, 4, 3, 3))
    assert apply(made, x).dtype == torch.float32


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_the_identity_is_the_skip(ndim, groups):
    identity = AffineConv.identity(CHANNELS, ndim)
    weight = torch.randn(CHANNELS, CHANNELS // groups, *[3] * ndim).double()
    conv = AffineConv.convolution(geometry(weight.shape, 1, 1, 1, groups), weight)
    for x in inputs(conv.geometry):
        assert torch.equal(apply(identity, x), x)
        assert same(apply(identity.add(conv), x), apply(conv, x) + x)


def test_a_grouped_identity_is_no_diagonal():
    """Row i of a kernel of 2 groups of 4 channels has its one in column i mod 2."""
    grouped = AffineConv.convolution(geometry((4, 2, 1, 1), 1, 0, 1, 2), torch.zeros(4, 2, 1, 1))
    made = grouped.add(AffineConv.identity(4, 2)).weight[:, :, 0, 0]
    assert made.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert not torch.equal(made, torch.zeros(4, 2).fill_diagonal_(1).double())


@SETTINGS
@given(addable(3))
def test_blocks_of_rows_give_the_same_bits(maps):
    shape = maps[0].geometry.add(maps[1].geometry).add(maps[2].geometry)
    addends = [Addend(m.geometry, m.weight, m.bias if i else None) for i, m in enumerate(maps)]
    whole, blocked = (torch.empty(shape.weight_shape, dtype=torch.float64) for _ in range(2))
    sum_weights(shape, addends, whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "_BLOCK", 1)
        sum_weights(shape, addends, blocked)
    assert torch.equal(whole, blocked)


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (8, 2), (11, 2), (12, 3), (4000, 7)])
def test_float64_takes_no_more_memory_than_one_block(limit, most, monkeypatch):
    shape = geometry((7, 4, 1), 1, 0, 1, 1)
    asked, rows = [], Addend.rows

    def watched(self, start, stop, out=None):
        asked.append((start, stop))
        return rows(self, start, stop, out)

    monkeypatch.setattr(affine, "_BLOCK", limit)
    monkeypatch.setattr(Addend, "rows", watched)
    weight, into = torch.randn(shape.weight_shape), torch.empty(shape.weight_shape)
    sum_weights(shape, [Addend(shape, weight)], into)
    assert torch.equal(into, weight)
    assert asked == [(start, min(start + most, 7)) for start in range(0, 7, most)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_is_rounded_once(dtype):
    weights = torch.randn(3, 4, 4, 3, 3).to(dtype)
    shape, scale = geometry((4, 4, 3, 3), 1, 1, 1, 1), torch.rand(4).double()
    into = torch.empty(4, 4, 3, 3, dtype=dtype)
    sum_weights(shape, [Addend(shape, weight, scale) for weight in weights], into)
    exact = sum(weight.double() * scale.view(-1, 1, 1, 1) for weight in weights)
    assert torch.equal(into, exact.to(dtype))
    step_by_step = sum(weight * scale.to(dtype).view(-1, 1, 1, 1) for weight in weights)
    assert not torch.equal(into, step_by_step)


def test_a_scale_leaves_the_weights_it_is_given_alone():
    weight = torch.randn(4, 4, 1, 1).double()
    before = weight.clone()
    shape = geometry(weight.shape, 1, 0, 1, 1)
    sum_weights(shape, [Addend(shape, weight, torch.full((4,), 2.0).double())] * 2, torch.empty(4, 4, 1, 1))
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("ends", "groups"), [((4, 6), 4), ((6, 4), 4), ((4, 6), 3)])
def test_groups_that_do_not_divide_the_channels_are_refused(ends, groups):
    inputs, outputs = ends
    made = AffineConv.filter(Geometry(inputs, outputs, (1,), (1,), ((0, 0),), (1,), 2), 0.0)
    with pytest.raises(ValueError, match=f"in {groups} groups"):
        made.regroup(groups)


def test_maps_stay_on_the_device_of_their_weights():
    shape = geometry((4, 2, 3), 1, 0, 1, 2)
    weight = torch.empty(shape.weight_shape, device="meta")
    conv = AffineConv.convolution(shape, weight)
    skip = AffineConv.identity(4, 1, torch.device("meta"))
    for made in (conv, skip, conv.select([3, 0]), skip.then(conv), conv.then(skip), stack([conv, conv])):
        assert made.weight.is_meta and made.bias.is_meta
