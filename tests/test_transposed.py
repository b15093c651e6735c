"""The laws of transposed convolutions, against torch's own in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.agreement import error, operations, randomised
from support.expressions import Tensors, channelwise, run
from support.maps import apply, of, same, shapes_of
from torch import nn
from torch.nn import functional as F

import repfuse
from repfuse.algebra.affine import AffineConv
from repfuse.algebra.evaluation import constant, evaluate
from repfuse.algebra.expression import (
    Expression,
    Identity,
    Scaled,
    Sum,
    Through,
    homogeneous,
    joined,
    selected,
    sum_of,
    through,
)
from repfuse.algebra.geometry import Geometry, NotAffine
from repfuse.algebra.layers import Convolution, Factor, Filter, Offset
from repfuse.algebra.transposed import TransposedGeometry

CONVOLVE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SETTINGS = settings(deadline=None, max_examples=min(60, settings().max_examples))
LIKE = torch.empty(0, dtype=torch.float64)


@st.composite
def shapes(draw, padded: bool = True, ends: tuple[int, int] = (4, 6), ndim: int | None = None, strides=(1, 2, 3)):
    """Any that torch takes: the output padding is smaller than the stride or the dilation."""
    ndim = ndim or draw(st.integers(1, 3))
    axes = []
    for _ in range(ndim):
        stride, dilation = draw(st.sampled_from(strides)), draw(st.integers(1, 3))
        padding = draw(st.integers(0, 2)) if padded else 0
        extra = draw(st.integers(0, max(stride, dilation) - 1)) if padded else 0
        axes.append((draw(st.integers(1, 3)), stride, (padding, padding), dilation, extra))
    kernel, stride, padding, dilation, extra = zip(*axes, strict=True)
    groups = draw(st.sampled_from([n for n in (1, 2, 4) if math.gcd(*ends) % n == 0]))
    return TransposedGeometry(*ends, kernel, stride, padding, dilation, groups, output_padding=extra)


@st.composite
def layers(draw, ends: tuple[int, int], ndim: int, kinds=("transposed", "transposed", "plain")) -> Geometry:
    """A transposed convolution, or a convolution of stride 1 that pads or crops."""
    if draw(st.sampled_from(kinds)) == "transposed":
        return draw(shapes(ends=ends, ndim=ndim))
    shape = draw(shapes_of(*ends, ndim))
    return Geometry(*ends, shape.kernel, (1,) * ndim, shape.padding, shape.dilation, shape.groups)


def stored(shape: Geometry) -> tuple[int, ...]:
    """The shape of the weight as torch has it."""
    if isinstance(shape, TransposedGeometry):
        return (shape.in_channels, shape.out_channels // shape.groups, *shape.kernel)
    return (shape.out_channels, shape.in_channels // shape.groups, *shape.kernel)


def spread(shape, x, weight, bias=None):
    padding = [before for before, _ in shape.padding]
    return CONVOLVE[shape.ndim](
        x, weight, bias, shape.stride, padding, shape.output_padding, shape.groups, shape.dilation
    )


def applied(shape, x, weight, bias=None):
    """What the one layer of this geometry computes, as a module of torch would."""
    if isinstance(shape, TransposedGeometry):
        return spread(shape, x, weight, bias)
    amounts = [amount for pair in reversed(shape.padding) for amount in pair]
    x = F.pad(F.pad(x, [max(n, 0) for n in amounts]), [min(n, 0) for n in amounts])  # one side may lose all there was
    return PLAIN[shape.ndim](x, weight, bias, shape.stride, 0, shape.dilation, shape.groups)


def layer(shape: Geometry, tensors: Tensors, biased: bool) -> Convolution:
    return Convolution(shape, tensors.new(*stored(shape)), tensors.new(shape.out_channels) if biased else None)


def check(expression: Expression, tensors: Tensors, least: int = 1, plain: bool = False) -> None:
    """Compare the one layer with the layers of the expression, at every small size at which those run."""
    shape = expression.geometry
    assert plain or isinstance(shape, TransposedGeometry)
    weight, bias = evaluate(expression, tensors, LIKE)
    assert weight.shape == stored(shape) and weight.is_contiguous()
    compared = 0
    for n in range(least, 14):
        size = tuple(n + place for place in range(shape.ndim)) if shape.ndim < 3 else (n, 14 - n, n)
        x = torch.randn(2, shape.in_channels, *size, dtype=torch.float64)
        try:
            wanted = run(expression, x, tensors)
        except RuntimeError:  # there is no such input
            continue
        if wanted.numel():
            assert same(applied(shape, x, weight, bias), wanted), size
            compared += 1
    if not compared:
        assume(False)


@SETTINGS
@given(shapes())
def test_the_sizes_are_those_of_torch(shape):
    weight = torch.zeros(stored(shape))
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
    everything = spread(shape, torch.ones(source), torch.ones(stored(shape)))
    assert shape.macs(source, tuple(everything.shape)) == everything.sum()


@SETTINGS
@given(shapes(ends=(1, 1), ndim=1), st.integers(1, 7))
def test_the_taps_are_where_each_position_is_written(shape, n):
    """``y[o] = sum of W[u] x[i] over stride * i + u = o``, one position after the other."""
    assume(shape.output_size((n,))[0] > 0)
    weight, x = torch.randn(stored(shape), dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    wanted = torch.zeros(*shape.output_size((n,)), dtype=torch.float64)
    for i, (number, tap) in itertools.product(range(n), enumerate(shape.taps[0])):
        place = shape.stride[0] * i + tap
        if 0 <= place < len(wanted):
            wanted[place] += weight[0, 0, number] * x[i]
    assert torch.allclose(spread(shape, x[None, None], weight)[0, 0], wanted, rtol=0, atol=1e-12)


@SETTINGS
@given(st.data(), shapes(), st.integers(0, 10_000))
def test_what_multiplies_the_output_goes_into_the_weight(data, shape, seed):
    tensors = Tensors(seed)
    expression = through(Identity(4, shape.ndim), layer(shape, tensors, data.draw(st.booleans())))
    expression = Scaled(expression, data.draw(channelwise(6, tensors)))
    check(expression, tensors)
    assert all(result.dtype == torch.float16 for result in evaluate(expression, tensors, LIKE.half()))


@SETTINGS
@given(st.data(), st.integers(1, 3), st.integers(0, 10_000))
def test_sums_have_the_union_of_the_taps(data, ndim, seed):
    """Any two of one stride and one growth add up: here the second gets the growth of the first by its paddings."""
    tensors, shape = Tensors(seed), data.draw(shapes(ndim=ndim))
    others = data.draw(st.lists(shapes(ndim=ndim), min_size=1, max_size=2))
    fitted = [_of_growth(replace(other, stride=shape.stride), shape.slack) for other in others]
    assume(None not in fitted)
    source = Identity(4, ndim)
    terms = [through(source, layer(one, tensors, data.draw(st.booleans()))) for one in (shape, *fitted)]
    whole = sum_of(tuple(terms))
    assert whole.geometry.slack == shape.slack
    assert all(set(taps) >= set(own) for taps, own in zip(whole.geometry.taps, shape.taps, strict=True))
    check(Scaled(whole, data.draw(channelwise(6, tensors))), tensors)


def _of_growth(shape: TransposedGeometry, wanted: tuple[int, ...]) -> TransposedGeometry | None:
    """The shape with another padding of each axis, so that it grows as wanted; None where torch has none."""
    axes = []
    for d, k, s, growth in zip(shape.dilation, shape.kernel, shape.stride, wanted, strict=True):
        found = [
            (padding, extra)
            for padding in range(8)
            for extra in range(max(s, d))
            if d * (k - 1) + 1 + extra - 2 * padding == growth
        ]
        if not found:
            return None
        axes.append(found[0])
    padding, extra = zip(*axes, strict=True)
    return replace(shape, padding=tuple((p, p) for p in padding), output_padding=extra)


@SETTINGS
@given(st.data(), st.integers(1, 3), st.integers(0, 10_000))
def test_layers_in_a_row_are_one_where_the_law_of_borders_says_so(data, ndim, seed):
    tensors = Tensors(seed)
    inner, outer = data.draw(layers((4, 6), ndim)), data.draw(layers((6, 2), ndim))
    first = through(Identity(4, ndim), layer(inner, tensors, biased=False))
    try:
        expression = through(first, layer(outer, tensors, data.draw(st.booleans())))
    except NotAffine:
        assume(False)
    plain = not isinstance(expression.geometry, TransposedGeometry)
    assert not plain or {s for shape in (inner, outer) for s in shape.stride} == {1}
    check(Scaled(expression, data.draw(channelwise(2, tensors))), tensors, plain=plain)


def _matrix(inner: Geometry, outer: Geometry, n: int, seed: int) -> torch.Tensor | None:
    """The matrix ``[outputs, n]`` of two layers in a row, from torch; None where they have no output."""
    tensors = Tensors(seed)
    layers = [layer(shape, tensors, biased=False) for shape in (inner, outer)]
    chain = Through(Through(Identity(1, 1), layers[0]), layers[1])
    try:
        return run(chain, torch.eye(n, dtype=torch.float64)[:, None], tensors)[:, 0].T
    except RuntimeError:
        return None


@SETTINGS
@given(layers((1, 1), 1), layers((1, 1), 1), st.integers(0, 10_000))
def test_the_law_of_borders_holds_exactly_where_it_should(inner, outer, seed):
    """Brute force: two layers are one transposed convolution where the response to pixel i is that to pixel 0, moved.

    For generic weights the law is not only enough: what it refuses is none, at some size.
    """
    assume(any(isinstance(shape, TransposedGeometry) and shape.stride != (1,) for shape in (inner, outer)))
    stride = inner.stride[0] * outer.stride[0]
    try:
        whole = inner.then(outer)
    except NotAffine as error:
        assert error.code == "padding-between"
        whole = None
    agree = True
    for n in range(1, 24):
        found = _matrix(inner, outer, n, seed)
        if found is None or not found.numel():
            continue
        outputs, pixels = map(torch.arange, found.shape)
        _, taps = (outputs[:, None] - stride * pixels).flatten().unique(return_inverse=True)
        least, most = (
            found.new_zeros(len(taps)).scatter_reduce(0, taps, found.flatten(), way, include_self=False)
            for way in ("amin", "amax")
        )
        agree &= bool((most - least).max() < 1e-12)
        if whole is not None:
            assert whole.output_size((n,)) == (len(found),)
    assert agree == (whole is not None)


@SETTINGS
@given(shapes(ends=(4, 6)), st.integers(0, 10_000))
def test_of_stride_1_it_is_a_convolution_beside_others(shape, seed):
    """Stride 1: ``y[o] = sum of W[u] x[o - u]``, the convolution of the taps -u."""
    tensors = Tensors(seed)
    extra = tuple(min(extra, d - 1) for extra, d in zip(shape.output_padding, shape.dilation, strict=True))
    shape = replace(shape, stride=(1,) * shape.ndim, output_padding=extra)
    # A point that gives as many outputs: n + slack + 1 = n - 1 + growth.
    around = tuple((0, growth - 1) for growth in shape.slack)
    ones = (1,) * shape.ndim
    point = Geometry(4, 6, ones, ones, around, ones)
    for kinds in ((shape, point), (point, shape), (point, shape, shape), (shape, shape, point)):
        terms = tuple(through(Identity(4, shape.ndim), layer(one, tensors, biased=True)) for one in kinds)
        assert type(sum_of(terms).geometry) is type(joined(terms).geometry) is Geometry
        check(sum_of(terms), tensors, plain=True)
        check(joined(terms), tensors, plain=True)


@SETTINGS
@given(st.data(), shapes(), st.integers(0, 10_000))
def test_channels_are_chosen_and_joined(data, shape, seed):
    tensors = Tensors(seed)
    source = Identity(4, shape.ndim)
    one, other = (through(source, layer(shape, tensors, biased)) for biased in (True, False))
    both = joined((one, other))
    check(both, tensors)
    check(selected(both, tuple(data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=8)))), tensors)
    order = data.draw(st.permutations(range(4)))
    plain = set(shape.stride) == {1}
    check(through(selected(source, tuple(order)), layer(shape, tensors, biased=True)), tensors, plain=plain)


@SETTINGS
@given(shapes(), st.integers(0, 10_000))
def test_maps_apply_as_torch_does(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    made = of(shape, generator)
    x = torch.randn(2, 4, *(n + 1 for n in shape.smallest_input), dtype=torch.float64, generator=generator)
    weight = made.weight.unflatten(0, (shape.groups, -1)).transpose(1, 2).flatten(0, 1)
    assert same(apply(made, x), spread(shape, x, weight, made.bias))


@SETTINGS
@given(st.data(), st.integers(1, 3), st.integers(0, 10_000))
def test_nearest_upsampling_is_a_kernel_of_ones(data, ndim, seed):
    factors = tuple(data.draw(st.lists(st.integers(1, 5), min_size=ndim, max_size=ndim)))
    pads, ones = ((0, 0),) * ndim, (1,) * ndim
    shape = TransposedGeometry(3, 3, factors, factors, pads, ones, 3, output_padding=(0,) * ndim)
    generator = torch.Generator().manual_seed(seed)
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=ndim, max_size=ndim))
    x = torch.randn(2, 3, *sizes, dtype=torch.float64, generator=generator)
    made = AffineConv.filter(shape, 1.0)
    for mode in ("nearest", "nearest-exact"):
        wanted = F.interpolate(x, scale_factor=tuple(map(float, factors)), mode=mode)
        assert torch.equal(apply(made, x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_pytorch_repeats_pixels_for_each_factor_that_is_read_so(mode, dtype):
    """It multiplies by the reciprocal, which is rounded: at 41 it is the pixel before for some, in float32."""
    x = torch.arange(300, dtype=dtype).view(1, 1, -1)
    for factor in range(1, 41):
        assert torch.equal(F.interpolate(x, scale_factor=factor, mode=mode), x.repeat_interleave(factor, 2))


@pytest.mark.parametrize(
    ("upsampling", "layer"),
    [
        (nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Upsample(scale_factor=2.5), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Upsample(size=12), nn.Conv2d(4, 4, 3, padding=1)),  # twice the example's size, and no multiple of others
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)),  # slow in other runtimes
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, stride=2)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    ],
)
def test_other_upsampling_stays(upsampling, layer):
    assert not repfuse.plan(nn.Sequential(upsampling, layer).eval(), (torch.zeros(1, 4, 6, 6),)).sites


def test_a_pad_before_it_and_a_crop_behind_it_are_taps():
    ones = ((2,) * 2, (2,) * 2, ((0, 0),) * 2, (1, 1))
    shape = TransposedGeometry(4, 6, *ones, output_padding=(0, 0))
    tensors = Tensors()
    pad = Filter(Geometry(4, 4, (1, 1), (1, 1), ((1, 2), (0, 1)), (1, 1), 4), 1.0)
    crop = Filter(Geometry(6, 6, (1, 1), (1, 1), ((-1, 0), (-1, -2)), (1, 1), 6), 1.0)
    padded = through(through(Identity(4, 2), pad), layer(shape, tensors, biased=True))
    check(padded, tensors)
    check(through(padded, crop), tensors)
    assert padded.geometry.output_size((3, 3)) == (12, 8)


def test_the_scale_is_exact_in_a_low_precision_weight():
    shape = TransposedGeometry(4, 6, (2,), (1,), ((0, 0),), (1,), 2, output_padding=(0,))
    tensors = {"w": torch.randn(stored(shape)).bfloat16()}.__getitem__
    expression = Scaled(through(Identity(4, 1), Convolution(shape, "w", None)), Factor(1.1))
    assert torch.equal(evaluate(expression, tensors, LIKE)[0], tensors("w").double() * 1.1)
    assert constant(expression, tensors, LIKE.device).tolist() == [0] * 6


def of_stride(stride: int, kernel: int = 2, padding: int = 0, extra: int = 0) -> TransposedGeometry:
    """One axis of 4 channels."""
    return TransposedGeometry(4, 4, (kernel,), (stride,), ((padding, padding),), (1,), output_padding=(extra,))


POINT = Geometry(4, 4, (1,), (1,), ((0, 0),), (1,))
HALVED = Geometry(4, 4, (1,), (2,), ((0, 0),), (1,))
CUT = of_stride(2, kernel=3, padding=1)
COPYING = Geometry(4, 4, (3,), (1,), ((1, 1),), (1,), padding_mode="reflect")


def expression_of(shape: Geometry, bias: str | None = None) -> Expression:
    return through(Identity(4, 1), Convolution(shape, "w", bias))


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("stride-mismatch", lambda: sum_of((expression_of(of_stride(2)), expression_of(of_stride(3))))),
        ("stride-mismatch", lambda: sum_of((expression_of(of_stride(2)), Identity(4, 1)))),
        ("stride-mismatch", lambda: joined((Identity(4, 1), expression_of(of_stride(2))))),
        ("size-mismatch", lambda: sum_of((expression_of(of_stride(2)), expression_of(of_stride(2, extra=1))))),
        ("size-mismatch", lambda: sum_of((expression_of(of_stride(1)), Identity(4, 1)))),
        ("padding-mode", lambda: sum_of((expression_of(of_stride(1, 3, 1)), expression_of(COPYING)))),
        ("padding-mode", lambda: through(expression_of(of_stride(2)), Convolution(COPYING, "v", None))),
        ("padding-mode", lambda: through(expression_of(COPYING), Convolution(of_stride(2), "v", None))),
        ("transposed-convolution", lambda: through(expression_of(of_stride(2)), Convolution(HALVED, "v", None))),
        ("transposed-convolution", lambda: through(expression_of(HALVED), Convolution(of_stride(2), "v", None))),
        ("transposed-convolution", lambda: sum_of((expression_of(of_stride(2)), expression_of(HALVED)))),
        ("padding-between", lambda: through(expression_of(CUT), Convolution(of_stride(1, 3, 1), "v", None))),
        ("channel-mismatch", lambda: sum_of((expression_of(of_stride(2)), Identity(3, 1)))),
    ],
)  # fmt: skip
def test_what_is_no_transposed_convolution(code, refused):
    with pytest.raises(NotAffine) as raised:
        refused()
    assert raised.value.code == code, raised.value.reason


@pytest.mark.parametrize("outer", [of_stride(2), of_stride(2, 4, 1), of_stride(3, 3)])
def test_between_the_pixels_there_is_no_constant(outer):
    """``T(c) = W c`` at some pixels and more or less at others: a shift before it is no shift behind it."""
    tensors = Tensors()
    for name in ("w", "v"):
        tensors.put(name, *stored(outer if name == "v" else POINT))
    tensors.put("b", 4)
    for inner in (expression_of(POINT, "b"), Scaled(Identity(4, 1), Offset("b"))):
        with pytest.raises(NotAffine) as raised:
            evaluate(through(inner, Convolution(outer, "v", None)), tensors, LIKE)
        assert raised.value.code == "shift-before-padding"
    tensors["b"] = torch.zeros(4, dtype=torch.float64)
    check(through(expression_of(POINT, "b"), Convolution(outer, "v", None)), tensors)
    tensors.put("b", 4)
    point = of_stride(1, 1)
    tensors["v"] = torch.randn(stored(point), dtype=torch.float64)
    check(through(expression_of(POINT, "b"), Convolution(point, "v", None)), tensors, plain=True)


# A constant that the borders of the layer behind it cut


@SETTINGS
@given(st.data(), st.integers(1, 3), st.integers(0, 10_000))
def test_a_constant_is_the_weight_of_a_channel_of_ones(data, ndim, seed):
    """``V ⋆ pad(W ⋆ x + b) = V ⋆ pad([W, b] ⋆ [x, 1])``, whatever V is: transposed or padded, alone or in a sum."""
    tensors, point = Tensors(seed), (1,) * ndim
    kernel = tuple(data.draw(st.lists(st.integers(1, 2), min_size=ndim, max_size=ndim)))
    inner = Geometry(4, 6, kernel, point, ((0, 0),) * ndim, point, data.draw(st.sampled_from([1, 2])))
    source: Expression = Identity(4, ndim)
    if data.draw(st.booleans()):
        source = selected(source, tuple(data.draw(st.permutations(range(4)))))
    first = through(source, layer(inner, tensors, data.draw(st.booleans())))
    first = Scaled(first, data.draw(channelwise(6, tensors)))
    last = layer(data.draw(layers((6, 2), ndim)), tensors, data.draw(st.booleans()))
    try:
        terms = [through(homogeneous(first), last)]
    except NotAffine:  # a kernel that the padding reaches into
        assume(False)
    apart: list[Expression] = [Through(first, last)]
    if data.draw(st.booleans()):
        other = replace(terms[0].geometry, in_channels=4, groups=2)
        apart.append(through(Identity(4, ndim), layer(other, tensors, biased=True)))
        terms.append(apart[-1])
    whole = sum_of(tuple(terms))
    weight, bias = evaluate(whole, tensors, LIKE)
    assert whole.has_ones and weight.shape == stored(whole.geometry)
    compared = 0
    for n in range(1, 7):
        x = torch.randn(2, 4, *range(n, n + ndim), dtype=torch.float64)
        try:
            wanted = run(Sum(tuple(apart)), x, tensors)
        except RuntimeError:  # there is no such input
            continue
        if wanted.numel():
            compared += 1
            assert same(applied(whole.geometry, torch.cat((x, torch.ones_like(x[:, :1])), 1), weight, bias), wanted)
    assume(compared)


@pytest.mark.parametrize("shape", [replace(POINT, padding=((1, 1),)), replace(POINT, padding=((-1, 0),)), of_stride(2)])
def test_a_map_that_reads_beyond_its_input_takes_no_ones(shape):
    for made in (lambda: expression_of(shape, "b"), lambda: homogeneous(expression_of(POINT, "b"))):
        with pytest.raises(NotAffine) as raised:
            homogeneous(made())
        assert raised.value.code == "shift-before-padding"


def row(*layers: nn.Module) -> nn.Module:
    return randomised(nn.Sequential(*layers))


@pytest.mark.parametrize(
    ("axes", "network"),
    [
        (1, lambda: row(nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 4, 2, 1))),
        (2, lambda: row(nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(6, 3, 4, 2, 1))),
        (2, lambda: row(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2, 2))),
        (2, lambda: row(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, bias=False), nn.BatchNorm2d(4))),
        (3, lambda: row(nn.Conv3d(4, 4, 1), nn.ConvTranspose3d(4, 4, 3, 2, 1))),
        (2, lambda: row(nn.Conv2d(16, 128, 1), nn.Conv2d(128, 16, 3, padding=1))),
    ],
)
def test_a_channel_of_ones_takes_the_place_of_a_layer(axes, network):
    original = network()
    channels, sizes = original[0].in_channels, range(8, 8 + axes)
    x = torch.randn(2, channels, *sizes, dtype=torch.float64)
    result = repfuse.fuse(original, (x,))
    (site,) = result.plan.sites
    left = operations(result.module, x)
    assert (left["convolution"], left["constant_pad_nd"], left["batch_norm"]) == (1, 1, 0)
    assert site.after.launches == 2
    assert " + ones → conv" in site.branches[0]
    for least in (1, 2, 9):
        x = torch.randn(3, channels, *range(least, least + axes), dtype=torch.float64)
        assert error(original, result.module, x) < 1e-12
    assert repfuse.rewrite(original, repfuse.Plan.from_dict(result.plan.to_dict())) is not None


@pytest.mark.parametrize(
    "network",
    [
        lambda: row(nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 4, 2, 1)),  # a copy for a norm
        lambda: row(nn.Conv2d(8, 2, 1), nn.ConvTranspose2d(2, 8, 4, 2, 1)),  # four times the arithmetic
        lambda: row(nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8)),
        lambda: row(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)),  # measured: no faster
    ],
)
def test_a_channel_of_ones_that_gains_nothing_is_none(network):
    plan = repfuse.plan(network(), (torch.randn(2, 8, 8, 8, dtype=torch.float64),))
    assert not plan.sites
    assert "shift-before-padding" in {refusal.code for refusal in plan.refusals}


def test_output_padding_within_the_stride_takes_no_more_taps():
    """As torch takes it: less than the stride or the dilation. A tap of zeros in its place is work for nothing."""
    shape = replace(of_stride(2, kernel=3, padding=1), output_padding=(1,))
    assert POINT.then(shape) == shape.then(POINT) == shape
