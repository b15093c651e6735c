"""The laws of composing, choosing, joining and regrouping maps, in float64; and that no refusal is needless."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from support.maps import apply, chains, inputs, of, pad_explicitly, same, sizes, stack
from torch import Tensor, nn
from torch.nn import functional as F

from repfuse.algebra import affine
from repfuse.algebra import geometry as geometry_module
from repfuse.algebra.affine import AffineConv
from repfuse.algebra.geometry import Geometry, NotAffine
from repfuse.algebra.layers import Phases

SETTINGS = settings(
    deadline=None, max_examples=min(80, settings().max_examples), suppress_health_check=[HealthCheck.filter_too_much]
)
COPYING = ("reflect", "replicate", "circular")


def attempt(compute):
    """The result; where it is refused, another example."""
    try:
        return compute()
    except NotAffine as error:
        event(error.code)
        assume(False)


def channels_last(value: Tensor, ndim: int) -> Tensor:
    """One number per channel, or an index of channels, for the axis that has them."""
    return value.view(-1, *[1] * ndim)


def random_map(shape: Geometry, seed: int = 0, biased: bool = True) -> AffineConv:
    return of(shape, torch.Generator().manual_seed(seed), biased)


def conv(
    kernel: int, padding, inputs: int = 4, outputs: int = 4, *, stride: int = 1, dilation: int = 1, groups: int = 1
):
    return Geometry(inputs, outputs, (kernel,), (stride,), (padding,), (dilation,), groups)


# What a composition computes


@SETTINGS
@given(chains(2))
def test_a_composition_computes_one_after_the_other(maps):
    a, b = maps
    both = attempt(lambda: a.then(b))
    for x in inputs(maps):
        assert same(apply(both, x), apply(b, apply(a, x)))


@SETTINGS
@given(chains(3))
def test_composition_associates(maps):
    a, b, c = maps
    left, right = attempt(lambda: a.then(b).then(c)), attempt(lambda: a.then(b.then(c)))
    assert left.geometry == right.geometry
    assert same(left.weight, right.weight) and torch.allclose(left.bias, right.bias, rtol=1e-11, atol=1e-11)
    for x in inputs(maps):
        assert same(apply(left, x), apply(c, apply(b, apply(a, x))))


@SETTINGS
@given(chains(1), st.sampled_from(("zeros", *COPYING)))
def test_the_identity_is_neutral(maps, mode):
    (a,) = maps
    if any(amount > 0 for pair in a.geometry.padding for amount in pair):
        a = dataclasses.replace(a, geometry=dataclasses.replace(a.geometry, padding_mode=mode))
    ndim = a.geometry.ndim
    before, after = (AffineConv.identity(c, ndim) for c in (a.geometry.in_channels, a.geometry.out_channels))
    for neutral in (before.then(a), a.then(after)):
        assert neutral.geometry == a.geometry
        assert torch.equal(neutral.weight, a.weight) and torch.equal(neutral.bias, a.bias)


@SETTINGS
@given(chains(2), st.integers(0, 100))
def test_scaling_is_a_composition_and_associates_with_it(maps, seed):
    a, b = maps
    scale, shift = torch.randn((2, b.geometry.out_channels), generator=torch.Generator().manual_seed(seed)).double()
    point = Geometry.identity(b.geometry.out_channels, b.geometry.ndim)
    diagonal = AffineConv(point, scale.view(point.weight_shape), shift)
    scaled, composed = b.scale(scale, shift), b.then(diagonal)
    assert scaled.geometry == composed.geometry and same(composed.weight, scaled.weight)
    assert same(composed.bias, scaled.bias)
    one, other = attempt(lambda: a.then(b)).scale(scale, shift), a.then(scaled)
    assert same(one.weight, other.weight) and torch.allclose(one.bias, other.bias, rtol=1e-11, atol=1e-11)


@SETTINGS
@given(chains(2), st.integers(0, 100))
def test_composition_distributes_over_sums(maps, seed):
    """c ∘ (a + b) = c ∘ a + C ∘ b, with C the linear part of c, and (c + d) ∘ a = c ∘ a + d ∘ a."""
    a, c = maps
    linear = dataclasses.replace(c, bias=torch.zeros_like(c.bias))
    b = random_map(wider(a.geometry), seed, biased=bool(a.bias.any()))
    summed = attempt(lambda: a.add(b).then(c))
    parts = attempt(lambda: a.then(c).add(b.then(linear)))
    d = random_map(wider(c.geometry), seed)
    outer = attempt(lambda: a.then(c.add(d)))
    outer_parts = attempt(lambda: a.then(c).add(a.then(d)))
    for x in inputs(maps):
        assert same(apply(summed, x), apply(c, apply(a, x) + apply(b, x)))
        assert same(apply(parts, x), apply(summed, x))
        assert same(apply(outer, x), apply(c, apply(a, x)) + apply(d, apply(a, x)))
        assert same(apply(outer_parts, x), apply(outer, x))


def wider(shape: Geometry) -> Geometry:
    """Another geometry that can be added: dense, with a tap more at the beginning of each axis."""
    dilation = tuple(1 if k == 1 else d for k, d in zip(shape.kernel, shape.dilation, strict=True))
    padding = tuple((b + d, a) for (b, a), d in zip(shape.padding, dilation, strict=True))
    kernel = tuple(k + 1 for k in shape.kernel)
    return dataclasses.replace(shape, kernel=kernel, padding=padding, dilation=dilation, groups=1)


@pytest.mark.parametrize("ndim", [0, 1, 2, 3])
@pytest.mark.parametrize("inner", [1, 2, 8])
@pytest.mark.parametrize("outer", [1, 4, 8])
def test_diagonal_kernels_on_either_side(ndim, inner, outer):
    """The products that need no matrix: a depthwise kernel of several taps, before and after any groups."""
    first = Geometry(8, 8, (2,) * ndim, (1,) * ndim, ((0, 0),) * ndim, (2,) * ndim, inner)
    second = Geometry(8, 8, (3,) * ndim, (2,) * ndim, ((0, 0),) * ndim, (1,) * ndim, outer)
    a, b = random_map(first, 1), random_map(second, 2)
    both = a.then(b)
    assert both.geometry.groups == min(inner, outer)
    for x in inputs([a, b]):
        assert same(apply(both, x), apply(b, apply(a, x)))


def test_weights_in_another_memory_format():
    shape = Geometry(4, 4, (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    depthwise = dataclasses.replace(shape, groups=4)
    for first, second in ((shape, shape), (shape, depthwise), (depthwise, shape), (depthwise, depthwise)):
        a, b = random_map(first, 1), random_map(second, 2)
        strided = [
            AffineConv(m.geometry, m.weight.contiguous(memory_format=torch.channels_last), m.bias) for m in (a, b)
        ]
        assert torch.equal(strided[0].then(strided[1]).weight, a.then(b).weight)


# Padding between


def padded_with(outer: AffineConv, y: Tensor, fill: Tensor) -> Tensor:
    """What ``outer`` makes of ``y`` if it pads with ``fill`` instead of zeros."""
    wide = channels_last(fill, outer.geometry.ndim)
    unpadded = dataclasses.replace(outer.geometry, padding=((0, 0),) * outer.geometry.ndim)
    return apply(AffineConv(unpadded, outer.weight, outer.bias), pad_explicitly(y - wide, outer.geometry) + wide)


@SETTINGS
@given(chains(2, ndims=(1, 2)))
def test_a_padding_filled_with_the_bias_is_exact(maps):
    a, b = maps
    both = attempt(lambda: a.then(b, fill=a.bias))
    for x in inputs(maps):
        assert same(apply(both, x), padded_with(b, apply(a, x), a.bias))


def test_the_fill_is_compared_channel_by_channel():
    a, b = random_map(conv(1, (0, 0))), random_map(conv(3, (1, 1)))
    for fill in (a.bias.flip(0), a.bias * (1 + 1e-9), 0.0, torch.zeros(4), a.bias.mean()):
        refuses(lambda fill=fill: a.then(b, fill), "shift-before-padding")
    assert torch.equal(a.then(b, a.bias * (1 + 1e-15)).weight, a.then(b, a.bias).weight)
    level = AffineConv(a.geometry, a.weight, torch.full((4,), 0.3).double())
    assert torch.equal(level.then(b, float(level.bias[0])).bias, level.then(b, level.bias).bias)
    refuses(lambda: AffineConv(a.geometry, a.weight, a.bias * float("nan")).then(b), "shift-before-padding")
    tiny = AffineConv(a.geometry, a.weight, torch.full((4,), 1e-300, dtype=torch.float64))
    refuses(lambda: tiny.then(b), "shift-before-padding")


def test_a_shift_passes_where_nothing_is_padded():
    a = random_map(conv(3, (1, 1)))
    for other in (conv(3, (0, 0)), conv(3, (-1, 0)), dataclasses.replace(conv(1, (0, 0)), stride=(2,))):
        b = random_map(other)
        for x in inputs([a, b]):
            assert same(apply(a.then(b), x), apply(b, apply(a, x)))


@SETTINGS
@given(chains(2, ndims=(1, 2), biased=False))
def test_what_is_refused_for_its_padding_would_be_wrong(maps):
    """For every pair of geometries: the law refuses no padding that is right for all weights and sizes."""
    a, b = (positive(made) for made in maps)
    assume(refused(a, b) == "padding-between")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry_module, "constant_around", lambda inner, outer: True)
        wrong = a.then(b)
    assert max(difference(wrong, a, b, x) for x in inputs_of_many_sizes(maps)) > 1e-3


@SETTINGS
@given(chains(2, ndims=(1, 2)))
def test_what_is_refused_for_its_shift_would_be_wrong(maps):
    a, b = (positive(made) for made in maps)
    b = dataclasses.replace(b, bias=torch.zeros_like(b.bias))
    assume(refused(a, b) == "shift-before-padding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "check_beyond", lambda constant, fill: None)
        wrong = a.then(b)
    assert max(difference(wrong, a, b, x) for x in inputs_of_many_sizes(maps)) > 1e-3


def refused(a: AffineConv, b: AffineConv) -> str | None:
    try:
        a.then(b)
    except NotAffine as error:
        return error.code
    return None


def positive(made: AffineConv) -> AffineConv:
    """The map with positive numbers, whose terms do not cancel; the shift as large as a sum over many taps."""
    return AffineConv(made.geometry, made.weight.abs() + 0.1, 1000 * made.bias.abs())


def difference(merged: AffineConv, a: AffineConv, b: AffineConv, x: Tensor) -> float:
    """Relative to the largest number; a map that reads padding alone gives zeros."""
    true, wrong = apply(b, apply(a, x)), apply(merged, x)
    largest = torch.maximum(true.abs().max(), wrong.abs().max())
    return float((wrong - true).abs().max() / largest) if largest else 0.0


def inputs_of_many_sizes(maps):
    """Positive inputs: each residue of the strides, and more."""
    for size in sizes(maps, count=16):
        yield torch.rand(1, maps[0].geometry.in_channels, *size, dtype=torch.float64) + 0.1


# Padding that copies pixels


@pytest.mark.parametrize("mode", COPYING)
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_that_copies_pixels(mode, stride):
    """A biased 1x1 before it, and any map without padding after it, keep the mode."""
    point = random_map(Geometry(4, 4, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 2), 1)
    copying = random_map(Geometry(4, 6, (3, 3), (1, stride), ((1, 2), (2, 1)), (1, 1), 2, mode), 2)
    unpadded = random_map(Geometry(6, 4, (3, 1), (1, 2), ((0, 0), (0, 0)), (1, 1), 2), 3)
    before, after = point.then(copying), copying.then(unpadded)
    assert before.geometry.padding_mode == after.geometry.padding_mode == mode
    assert before.geometry.padding == after.geometry.padding == copying.geometry.padding
    for size in ((4, 5), (7, 6), (8, 8)):
        x = torch.randn(2, 4, *size).double()
        assert same(apply(before, x), apply(copying, apply(point, x)))
        assert same(apply(after, x), apply(unpadded, apply(copying, x)))


def test_padding_that_copies_pixels_is_that_of_torch():
    layer = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular").double()
    shape = Geometry(2, 3, (3, 3), (1, 1), ((1, 1), (2, 2)), (1, 1), 1, "circular")
    x = torch.randn(1, 2, 5, 6).double()
    assert same(apply(AffineConv.convolution(shape, layer.weight, layer.bias), x), layer(x))


# Constructors, in the spellings of torch


def test_a_filter_is_an_average_pool_a_pad_and_a_crop():
    x = torch.randn(2, 3, 7, 8).double()
    pool = Geometry(3, 3, (3, 2), (2, 2), ((1, 1), (1, 1)), (1, 1), 3)
    assert same(apply(AffineConv.filter(pool, 1 / 6), x), F.avg_pool2d(x, (3, 2), 2, 1))
    for padding, expected in (
        (((-1, -1), (0, -2)), x[:, :, 1:-1, :-2]),
        (((-1, 0), (2, 1)), F.pad(x[:, :, 1:], (2, 1))),
    ):
        assert torch.equal(apply(AffineConv.filter(Geometry(3, 3, (1, 1), (1, 1), padding, (1, 1), 3), 1), x), expected)


def test_a_crop_beside_a_pad_of_less_pixels_than_it_takes():
    """Padding 3 after and cropping 2 before, of one pixel: torch.nn.functional.pad would refuse it in one call."""
    shape = Geometry(1, 1, (1,), (1,), ((-2, 3),), (1,), 1)
    assert apply(AffineConv.filter(shape, 1), torch.ones(1, 1, 1).double()).tolist() == [[[0, 0]]]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_linear_layer_has_its_channels_last(groups):
    shape = Geometry(4, 8, (), (), (), (), groups)
    made = random_map(shape)
    blocks = torch.block_diag(*made.weight.view(groups, -1, 4 // groups))
    for x in (torch.randn(4), torch.randn(3, 4), torch.randn(2, 3, 5, 4)):
        assert same(apply(made, x.double()), F.linear(x.double(), blocks, made.bias))


def test_low_rank_branches_of_a_linear_layer_are_one():
    full, down, up = (nn.Linear(i, o).double() for i, o in ((8, 6), (8, 2), (2, 6)))
    of_layer = {
        layer: AffineConv.convolution(
            Geometry(layer.in_features, layer.out_features, (), (), (), ()), layer.weight, layer.bias
        )
        for layer in (full, down, up)
    }
    made = of_layer[full].add(
        of_layer[down].then(of_layer[up]).scale(*torch.tensor([[0.5], [0.0]]).expand(2, 6).double())
    )
    x = torch.randn(3, 8).double()
    assert same(apply(made, x), full(x) + 0.5 * up(down(x)))


# Channels: choosing, joining, regrouping


@SETTINGS
@given(chains(1), st.data())
def test_selecting_is_indexing(maps, data):
    (a,) = maps
    indices = data.draw(st.lists(st.integers(0, a.geometry.out_channels - 1), min_size=1))
    chosen = a.select(indices)
    axis = 1 if a.geometry.ndim else -1
    for x in inputs(maps):
        assert same(apply(chosen, x), apply(a, x).index_select(axis, torch.tensor(indices)))


@SETTINGS
@given(chains(1), st.integers(0, 100))
def test_stacking_is_cat_and_selecting_undoes_it(maps, seed):
    (a,) = maps
    b = random_map(dataclasses.replace(wider(a.geometry), out_channels=6), seed)
    both = stack([a, b, a])
    outputs = a.geometry.out_channels
    for x in inputs(maps):
        expected = torch.cat([apply(a, x), apply(b, x), apply(a, x)], 1 if a.geometry.ndim else -1)
        assert same(apply(both, x), expected)
        assert same(apply(both.select(range(outputs)), x), apply(a, x))
    alone = stack([a]).select(range(outputs)).regroup(a.geometry.groups)
    assert alone.geometry == a.geometry and torch.equal(alone.weight, a.weight) and torch.equal(alone.bias, a.bias)


def test_the_groups_of_chosen_and_joined_maps():
    depthwise = random_map(conv(3, (1, 1), 4, 4, groups=4))
    assert stack([depthwise]).geometry.groups == 4
    assert stack([depthwise, depthwise]).geometry.groups == 1
    assert depthwise.select([1, 0, 3, 2]).geometry.groups == 2
    halves = stack([depthwise.select([0, 1]), depthwise.select([2, 3])])
    # Half of a depthwise map reads half of its input, which are no groups of it; all of them are there again after.
    assert halves.geometry.groups == 1 and torch.equal(halves.regroup(4).weight, depthwise.weight)


@pytest.mark.parametrize("ndim", [0, 1, 3])
@pytest.mark.parametrize("groups", [1, 2, 3, 6, 12])
def test_regrouping_is_the_same_map(groups, ndim):
    a = random_map(Geometry(12, 24, (2,) * ndim, (1,) * ndim, ((0, 1),) * ndim, (1,) * ndim, groups))
    for fewer in (groups for groups in (1, 2, 3, 6, 12) if a.geometry.groups % groups == 0):
        dense = a.regroup(fewer)
        assert dense.geometry.groups == fewer and dense.weight.shape == dense.geometry.weight_shape
        for x in inputs([a]):
            assert same(apply(dense, x), apply(a, x))
        assert torch.equal(dense.regroup(groups).weight, a.weight)
    if groups == 6:
        thirds = a.regroup(2).regroup(3)
        assert torch.equal(thirds.regroup(6).weight, a.weight)


def test_regrouping_drops_no_number():
    dense = random_map(conv(1, (0, 0)))
    for groups in (2, 4):
        with pytest.raises(ValueError, match="not block-diagonal"):
            dense.regroup(groups)
    with pytest.raises(ValueError, match="3 groups"):
        dense.regroup(3)
    nearly = random_map(conv(1, (0, 0), groups=4)).regroup(1)
    nearly.weight[0, 3] = 1e-300
    with pytest.raises(ValueError, match="not block-diagonal"):
        nearly.regroup(2)


def refuses(compute, code: str) -> None:
    with pytest.raises(NotAffine) as caught:
        compute()
    assert caught.value.code == code


# Space to depth


AXIS = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(1, 2))
"""Kernel, stride, padding, dilation along one axis."""


@SETTINGS
@given(st.integers(1, 3), st.lists(AXIS, min_size=2, max_size=2), st.integers(2, 4), st.integers(1, 4))
def test_a_layer_after_space_to_depth_is_one_of_its_input(channels, axes, factor, side):
    """At every size that fits, with the plainest padding; a constant before it stays one where nothing is padded."""
    kernel, stride, padding, dilation = zip(*axes, strict=True)
    blocks = AffineConv.phases(Phases.of(channels, (factor, factor)))
    both_sides = tuple((amount, amount) for amount in padding)
    outer = random_map(Geometry(blocks.geometry.out_channels, 2, kernel, stride, both_sides, dilation))
    both = attempt(lambda: blocks.then(outer))
    assert all(not fit.takes(side * factor + 1) for fits in both.geometry.fits for fit in fits)
    x = torch.randn(2, channels, side * factor, (side + 1) * factor, dtype=torch.float64)
    assume(min(outer.geometry.output_size((side, side + 1))) > 0)
    plainest = dataclasses.replace(both, geometry=both.geometry.plainest)
    expected = apply(outer, F.pixel_unshuffle(x, factor))
    assert same(apply(plainest, x), expected) and same(apply(both, x), expected)


@SETTINGS
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.integers(1, 5), st.data())
def test_joined_slices_are_one_map_at_the_sizes_at_which_they_can_be_joined(channels, count, step, side, data):
    """One tap of stride ``step`` each, from ``start`` on: ``x[..., start::step]``."""
    starts = data.draw(st.lists(st.integers(0, step - 1), min_size=count, max_size=count))
    ones = (1,)
    maps = [
        AffineConv.filter(Geometry(channels, channels, ones, (step,), ((-start, 0),), ones, channels), 1.0)
        for start in starts
    ]
    both = attempt(lambda: stack(maps))
    for n in range(max(starts) + 1, side * step + step):
        x = torch.randn(1, channels, n, dtype=torch.float64)
        parts = [x[..., start::step] for start in starts]
        fits = all(fit.takes(n) for fits in both.geometry.fits for fit in fits)
        assert fits == (len({part.shape for part in parts}) == 1)
        if fits:
            assert same(apply(both, x), torch.cat(parts, 1))
