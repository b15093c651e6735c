"""The shape of a convolution against PyTorch's own, and every way in which two of them are not one."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.nn import functional as F

from repfuse.algebra.geometry import Fit, Geometry, NotAffine, agreeing
from repfuse.ops.convolution import geometry

AXIS = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(1, 3))
"""Kernel, stride, padding, dilation along one axis."""


def of(axes) -> Geometry:
    kernel, stride, padding, dilation = zip(*axes, strict=True)
    return geometry((1, 1, *kernel), stride, padding, dilation, 1)


def run(shape: Geometry, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    flat = [amount for pair in reversed(shape.padding) for amount in pair]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[shape.ndim - 1]
    return convolve(F.pad(x, flat), weight, None, shape.stride, 0, shape.dilation, shape.groups)


@given(st.lists(AXIS, min_size=1, max_size=3), st.integers(1, 9))
def test_output_size_is_that_of_torch(axes, side):
    shape = of(axes)
    sizes = shape.output_size((side,) * shape.ndim)
    x, weight = torch.zeros(1, 1, *(side,) * shape.ndim), torch.zeros(shape.weight_shape)
    padding = tuple(before for before, _ in shape.padding)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[shape.ndim - 1]
    if min(sizes) < 1:
        with pytest.raises(RuntimeError, match=r"Kernel size|too small|size"):
            convolve(x, weight, None, shape.stride, padding, shape.dilation)
    else:
        assert convolve(x, weight, None, shape.stride, padding, shape.dilation).shape[2:] == sizes


def test_maps_beside_each_other_fit_where_their_outputs_are_of_one_size():
    """And where they never are, they cannot be joined; their sum is the one map only where they always are."""
    joined = 0
    for one, other in itertools.product(EVERY_AXIS, repeat=2):
        if one.stride != other.stride:
            continue
        sizes = range(max(one.smallest_input + other.smallest_input), 20)
        agree = {n for n in sizes if one.output_size((n,)) == other.output_size((n,))}
        if not agree:
            with pytest.raises(NotAffine):
                Geometry.stacked((one, other))
            continue
        made = Geometry.stacked((one, other))
        assert {n for n in sizes if made.next_fitting((n,)) == (n,)} == agree
        assert all(made.output_size((n,)) == one.output_size((n,)) for n in agree)
        if len(agree) < len(sizes):
            joined += 1
            with pytest.raises(NotAffine):
                one.add(other)
    assert joined > 10


def test_a_map_of_single_pixels_is_one_matrix_for_all():
    one = geometry((6, 4, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    assert one.is_pointwise and geometry((6, 4), (), (), (), 1).is_pointwise
    several = [replace(one, stride=(1, 2)), replace(one, kernel=(3, 1)), replace(one, padding=((0, 0), (0, 1)))]
    several += [replace(one, padding=((-1, 0), (0, 0))), replace(one, groups=2)]
    assert not any(each.is_pointwise for each in several)


@given(AXIS, st.integers(1, 9))
def test_taps_are_what_an_output_reads(axis, side):
    shape = of([axis])
    (outputs,) = shape.output_size((side,))
    assume(outputs > 0)
    for position in range(side):
        x = torch.zeros(1, 1, side)
        x[0, 0, position] = 1
        reached = run(shape, torch.ones(shape.weight_shape), x)[0, 0].nonzero().flatten().tolist()
        assert reached == [i for i in range(outputs) if position - i * shape.stride[0] in shape.taps[0]]


EVERY_AXIS = [of([axis]) for axis in itertools.product((1, 2, 3, 5), (1, 2), (0, 1, 2), (1, 2))]


@pytest.mark.parametrize("one", EVERY_AXIS, ids=lambda shape: f"{shape.describe()} padding {shape.padding[0][0]}")
def test_two_are_one_exactly_where_their_sizes_always_agree(one):
    """Then the union holds the taps of both and no tap beyond them; else the refusal says in what they differ."""
    for other in EVERY_AXIS:
        agree = all(one.output_size((n,)) == other.output_size((n,)) for n in range(-12, 12))
        try:
            both = one.add(other)
        except NotAffine as error:
            assert not agree
            assert error.code == ("stride-mismatch" if one.stride != other.stride else "size-mismatch")
            continue
        assert agree
        read = set(one.taps[0]) | set(other.taps[0])
        assert read <= set(both.taps[0]) and {both.taps[0][0], both.taps[0][-1]} <= read
        assert all(both.output_size((n,)) == one.output_size((n,)) for n in range(12))


@pytest.mark.parametrize(
    ("kernels", "dilations", "taps"),
    [((3, 1), (1, 1), (-1, 0, 1)), ((3, 3), (2, 3), range(-3, 4)), ((5, 3), (2, 4), (-4, -2, 0, 2, 4))],
)
def test_unions(kernels, dilations, taps):
    one, other = (of([(k, 1, d * (k // 2), d)]) for k, d in zip(kernels, dilations, strict=True))
    assert tuple(one.add(other).taps[0]) == tuple(taps)
    assert one.add(other) == other.add(one)


def test_an_even_kernel_of_padding_same_reaches_further_to_the_end():
    shape = geometry((1, 1, 2, 4), 1, "same", 1, 1)
    assert shape.padding == ((0, 1), (1, 2))
    x, weight = torch.randn(1, 1, 4, 5), torch.randn(1, 1, 2, 4)
    assert torch.allclose(run(shape, weight, x), F.conv2d(x, weight, padding="same"))


def test_the_strides_of_a_sum_must_agree_though_sizes_do_at_one_pixel():
    dense, sparse = of([(1, 1, 0, 1)]), of([(1, 2, 0, 1)])
    assert dense.output_size((1,)) == sparse.output_size((1,))
    assert dense.output_size((2,)) != sparse.output_size((2,))
    refused(dense, sparse, "stride-mismatch")


def test_sizes_that_agree_for_odd_inputs_only_are_refused():
    one, other = of([(3, 2, 1, 1)]), of([(2, 2, 0, 1)])
    assert one.output_size((4,)) == other.output_size((4,)) and one.output_size((5,)) != other.output_size((5,))
    refused(one, other, "size-mismatch")


def reflecting(shape):
    return replace(shape, padding_mode="reflect")


def test_a_reflecting_branch_beside_a_skip_reads_another_border():
    x, weight = torch.arange(1.0, 6.0).view(1, 1, 5), torch.ones(1, 1, 3)
    reflected = F.conv1d(F.pad(x, (1, 1), mode="reflect"), weight)
    zeros = F.conv1d(x, weight, padding=1)
    assert torch.equal(reflected[..., 1:-1], zeros[..., 1:-1]) and (reflected - zeros)[0, 0, -1] == 4
    shape = reflecting(geometry((1, 1, 3), 1, 1, 1, 1))
    refused(shape, Geometry.identity(1, 1), "padding-mode")
    refused(Geometry.identity(1, 1), shape, "padding-mode")


def test_channels_and_axes_must_agree():
    refused(Geometry.identity(2, 2), Geometry.identity(3, 2), "channel-mismatch")
    refused(Geometry.identity(2, 1), Geometry.identity(2, 2), "channel-mismatch")


@given(st.lists(AXIS, min_size=1, max_size=3))
def test_the_smallest_input_has_an_output_and_no_smaller_one(axes):
    shape = of(axes)
    least = shape.smallest_input
    assert min(least) >= 1 and min(shape.output_size(least)) >= 1
    for axis, size in enumerate(least):
        smaller = shape.output_size((*least[:axis], size - 1, *least[axis + 1 :]))
        assert size == 1 or smaller[axis] < 1


@given(st.lists(AXIS, min_size=1, max_size=3), st.sampled_from([1, 2]))
def test_the_work_is_one_multiplication_for_each_weight_and_output(axes, groups):
    """With ones for all numbers, and no padding, an output is the number of products in it."""
    kernel, stride, _, dilation = zip(*axes, strict=True)
    shape = geometry((6, 4 // groups, *kernel), stride, 0, dilation, groups)
    x = torch.ones(2, 4, *(n + 1 for n in shape.smallest_input))
    found = run(shape, torch.ones(shape.weight_shape), x)
    assert shape.macs(tuple(x.shape), tuple(found.shape)) == found.sum()


def test_why_two_maps_cannot_be_one_is_said_in_words():
    assert str(NotAffine("size-mismatch", "these two")) == "these two"


@pytest.mark.parametrize("groups", [(2, 4, 2), (6, 4, 2), (3, 4, 1), (12, 12, 12)])
def test_groups_of_a_sum(groups):
    one, other = (geometry((12, 12 // g, 1), 1, 0, 1, g) for g in groups[:2])
    assert one.add(other).groups == groups[2]


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (geometry((8, 4, 3, 3), 2, 1, 1, 2), "3x3 stride 2 groups 2"),
        (geometry((8, 1, 3, 5), (1, 2), 1, 2, 8), "3x5 stride 1x2 dilation 2 depthwise"),
        (reflecting(geometry((8, 8, 3), 1, 1, 1, 1)), "3 reflect"),
        (Geometry(4, 4, (1, 1), (1, 1), ((-1, 0), (0, 0)), (1, 1), 4), "1x1 depthwise crop"),
        (Geometry(8, 4, (), (), (), (), 2), "linear groups 2"),
        (Geometry(2, 2, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 2), "1x1 depthwise"),
        (Geometry(1, 1, (1, 3), (1, 1), ((0, 0), (0, 1)), (1, 1)), "1x3"),
    ],
)
def test_description(shape, text):
    assert shape.describe() == text


def refused(one: Geometry, other: Geometry, code: str) -> None:
    refuses(lambda: one.add(other), code)


def axis(kernel, padding, stride=1, dilation=1, mode="zeros") -> Geometry:
    """One axis, one channel; padding (before, after)."""
    return Geometry(1, 1, (kernel,), (stride,), (padding,), (dilation,), 1, mode)


@pytest.mark.parametrize(
    ("shape", "index"),
    [
        (axis(1, (-1, -1)), slice(1, -1)),
        (axis(1, (-1, 0), stride=2), slice(1, None, 2)),
        (axis(1, (0, -2)), slice(None, -2)),
        (axis(1, (0, 0), stride=3), slice(None, None, 3)),
    ],
)
def test_a_slice_is_a_crop(shape, index):
    for n in range(3, 9):
        (read,) = shape.taps
        positions = [i * shape.stride[0] + read[0] for i in range(shape.output_size((n,))[0])]
        assert positions == list(range(n))[index]
    assert not shape.pads and not axis(3, (1, 1)).keeps_edges and axis(3, (0, 1)).pads


def test_a_crop_may_be_added_to_what_it_aligns_with():
    """A 3x3 without padding beside the cropped skip: the skip is its middle tap."""
    both = axis(3, (0, 0)).add(axis(1, (-1, -1)))
    assert both == axis(3, (0, 0)) == axis(1, (-1, -1)).add(axis(3, (0, 0)))
    assert axis(1, (-1, -1)).add(axis(1, (0, -2))).taps == (range(2),)


EVERY_PAIR = [
    axis(kernel, padding, stride, dilation)
    for kernel, dilation in ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2))
    for stride in (1, 2, 3)
    for padding in itertools.product((-2, -1, 0, 1, 2, 4), repeat=2)
]


def outputs_of(shape: Geometry, n: int) -> int:
    return shape.output_size((n,))[0]


def meets_input(inner: Geometry, outer: Geometry) -> bool:
    """Whether, for some input size, outer reads beyond inner's output where inner's taps are in the input."""
    (step,), (stride,) = outer.stride, inner.stride
    (first,), (second,) = inner.taps, outer.taps  # which are found anew each time that they are asked for
    for n in range(1, 40):
        m = outputs_of(inner, n)
        if m < 1:
            continue
        read = {step * q + u for q in range(outputs_of(outer, m)) for u in second}
        if any(0 <= stride * r + t < n for r in read if r < 0 or r >= m for t in first):
            return True
    return False


def test_a_composition_is_refused_exactly_where_its_padding_meets_the_input():
    """No pair of axes is allowed that is wrong for some size, and none refused that is right for all."""
    generator = random.Random(0)
    verdicts = []
    for inner, outer in zip(generator.choices(EVERY_PAIR, k=3000), generator.choices(EVERY_PAIR, k=3000), strict=True):
        expected = meets_input(inner, outer)
        try:
            inner.then(outer)
        except NotAffine as error:
            assert expected and error.code == "padding-between", (inner, outer)
        else:
            assert not expected, (inner, outer)
        verdicts.append(expected)
    assert 500 < sum(verdicts) < 2500


@pytest.mark.parametrize(
    ("inner", "outer", "allowed"),
    [
        (axis(1, (0, 0)), axis(3, (1, 1)), True),
        (axis(1, (2, 2)), axis(3, (1, 1)), True),
        (axis(3, (2, 2)), axis(3, (1, 1)), True),
        (axis(3, (1, 1)), axis(3, (1, 1)), False),
        (axis(3, (0, 0)), axis(3, (1, 1)), False),
        (axis(1, (-1, -1)), axis(3, (1, 1)), False),
        (axis(3, (1, 1)), axis(3, (0, 0)), True),
        (axis(3, (2, 0)), axis(3, (2, 0)), True),  # causal
        (axis(3, (2, 0)), axis(3, (0, 2)), False),
        (axis(1, (0, 0), stride=2), axis(3, (1, 1)), True),
        (axis(1, (-1, 0), stride=2), axis(3, (1, 1)), True),
        (axis(2, (0, 0)), axis(2, (2, 0), stride=2, dilation=2), True),  # reads -2, never -1
    ],
)
def test_what_may_be_padded_in_between(inner, outer, allowed):
    assert meets_input(inner, outer) != allowed
    if allowed:
        inner.then(outer)
    else:
        refuses(lambda: inner.then(outer), "padding-between")


def test_sizes_of_a_composition_agree_for_every_input():
    generator = random.Random(1)
    for inner, outer in zip(generator.choices(EVERY_PAIR, k=4000), generator.choices(EVERY_PAIR, k=4000), strict=True):
        try:
            both = inner.then(outer)
        except NotAffine:
            continue
        assert all(outputs_of(both, n) == outputs_of(outer, outputs_of(inner, n)) for n in range(-20, 40))
        read = {t + inner.stride[0] * u for t in inner.taps[0] for u in outer.taps[0]}
        assert read <= set(both.taps[0]) and {both.taps[0][0], both.taps[0][-1]} <= read
        assert len(both.taps[0]) == 1 or math.gcd(*(t - min(read) for t in read)) == both.taps[0].step


@pytest.mark.parametrize(("one", "other", "groups"), [(2, 4, 2), (6, 4, 2), (3, 4, 1), (12, 12, 12), (12, 1, 1)])
def test_groups_and_channels_of_a_composition(one, other, groups):
    both = geometry((12, 12 // one, 1), 1, 0, 1, one).then(geometry((24, 12 // other, 1), 1, 0, 1, other))
    assert (both.in_channels, both.out_channels, both.groups) == (12, 24, groups)


def test_channels_and_axes_of_a_composition_must_agree():
    refuses(lambda: Geometry.identity(2, 2).then(Geometry.identity(3, 2)), "channel-mismatch")
    refuses(lambda: Geometry.identity(2, 0).then(Geometry.identity(2, 1)), "channel-mismatch")


REFLECT = axis(3, (1, 1), mode="reflect")


def test_a_copying_padding_is_kept_where_nothing_is_in_its_way():
    assert axis(1, (0, 0)).then(REFLECT) == REFLECT
    assert REFLECT.then(axis(1, (0, 0))) == REFLECT
    assert REFLECT.then(axis(2, (0, 0), 2)) == axis(4, (1, 1), 2, mode="reflect")


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (axis(2, (0, 0)), REFLECT),
        (axis(1, (0, 0), stride=2), REFLECT),
        (axis(1, (1, 1)), REFLECT),
        (axis(1, (-1, 0)), REFLECT),
        (REFLECT, REFLECT),
        (REFLECT, axis(3, (1, 1))),
        (REFLECT, axis(1, (-1, 0))),
    ],
)
def test_a_copying_padding_elsewhere_is_refused(inner, outer):
    refuses(lambda: inner.then(outer), "padding-mode")


def test_borders_show_where_zeros_are_padded():
    one = axis(1, (0, 0))
    assert one.borders_show(axis(3, (0, 1))) and one.borders_show(axis(3, (1, -1)))
    assert not any(one.borders_show(other) for other in (one, axis(1, (-1, 0)), REFLECT))


def test_selected_and_stacked_channels():
    one, other = geometry((4, 2, 3), 1, 1, 1, 2), geometry((6, 4, 5), 1, 4, 2, 1)
    assert one.select([3, 3, 0]) == geometry((3, 4, 3), 1, 1, 1, 1)
    assert Geometry.stacked([one, other, one]) == geometry((14, 4, 9), 1, 4, 1, 1)
    assert Geometry.stacked([REFLECT]) == REFLECT


@pytest.mark.parametrize(
    ("other", "code"),
    [
        (axis(3, (1, 1), stride=2), "stride-mismatch"),
        (axis(3, (0, 0)), "size-mismatch"),
        (REFLECT, "padding-mode"),
        (Geometry.identity(2, 1), "channel-mismatch"),
        (Geometry.identity(1, 2), "channel-mismatch"),
    ],
)
def test_what_cannot_be_stacked(other, code):
    refuses(lambda: Geometry.stacked([axis(3, (1, 1)), axis(1, (0, 0)), other]), code)


def test_linear_layers_are_maps_without_axes():
    one, other = Geometry(4, 6, (), (), (), (), 2), Geometry(6, 3, (), (), (), (), 3)
    assert one.weight_shape == (6, 2) and one.output_size(()) == () and not one.pads
    assert one.then(other) == Geometry(4, 3, (), (), (), (), 1)
    assert one.add(one) == one
    assert Geometry.stacked([one, one.select([1])]) == Geometry(4, 7, (), (), (), ())


def refuses(compute, code: str) -> None:
    with pytest.raises(NotAffine) as caught:
        compute()
    assert caught.value.code == code


# --- sizes that fit ----------------------------------------------------------------------------------------------

FIT = st.builds(Fit, st.integers(-4, 4), st.integers(2, 5), st.integers(1, 3))


def pointwise(stride: int, slack: int) -> Geometry:
    """One pixel at each step, of which as many more are there, or fewer, as the slack says."""
    return Geometry(1, 1, (1,), (stride,), ((0, slack + 1),), (1,))


STRIDE, SLACK, SIZES = st.integers(1, 4), st.integers(-6, 4), range(61)


@given(FIT, STRIDE, SLACK)
def test_what_fits_before_a_map_is_what_it_makes_fit(fit, stride, slack):
    for n in SIZES:
        assert fit.behind(stride, slack).takes(n) == fit.takes((n + slack) // stride + 1)


@given(STRIDE, SLACK, SLACK)
def test_sizes_fit_two_maps_where_their_outputs_are_of_one_size(stride, one, other):
    agree = [n for n in SIZES if (n + one) // stride == (n + other) // stride]
    maps = [pointwise(stride, slack) for slack in (one, other)]
    assert bool(agreeing(stride, one, other)) == bool(agree)
    if not agree:
        refuses(lambda: Geometry.stacked(maps), "size-mismatch")
        return
    fits = frozenset().union(*Geometry.stacked(maps).fits)
    assert [n for n in SIZES if all(fit.takes(n) for fit in fits)] == agree


@given(STRIDE, SLACK, st.frozensets(FIT, max_size=2))
@example(1, 0, frozenset({Fit(0, 2, 1), Fit(1, 2, 1)}))
def test_slacks_are_equal_where_no_size_that_fits_tells_them_apart(stride, slack, fits):
    period = 4 * math.lcm(stride, *(fit.modulus for fit in fits))
    sizes = [n for n in range(period) if all(fit.takes(n) for fit in fits)]
    shape = replace(pointwise(stride, slack), fits=(fits,))
    if not sizes:
        with pytest.raises(NotAffine, match="no size"):
            _ = shape.equal_slacks
        return
    equal = [a for a in range(slack - 12, slack + 13) if all((n + a) // stride == (n + slack) // stride for n in sizes)]
    assert [[*found] for found in shape.equal_slacks] == [equal]
