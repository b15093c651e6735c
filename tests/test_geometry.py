"""The shape of a convolution against PyTorch's own, and every way in which two of them are not one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

from repfuse.algebra.geometry import Geometry, NotAffine
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


def test_a_reflecting_branch_beside_a_skip_reads_another_border():
    x, weight = torch.arange(1.0, 6.0).view(1, 1, 5), torch.ones(1, 1, 3)
    reflected = F.conv1d(F.pad(x, (1, 1), mode="reflect"), weight)
    zeros = F.conv1d(x, weight, padding=1)
    assert torch.equal(reflected[..., 1:-1], zeros[..., 1:-1]) and (reflected - zeros)[0, 0, -1] == 4
    shape = geometry((1, 1, 3), 1, 1, 1, 1, padding_mode="reflect")
    refused(shape, Geometry.identity(1, 1), "padding-mode")
    refused(Geometry.identity(1, 1), shape, "padding-mode")


def test_channels_and_axes_must_agree():
    refused(Geometry.identity(2, 2), Geometry.identity(3, 2), "channel-mismatch")
    refused(Geometry.identity(2, 1), Geometry.identity(2, 2), "channel-mismatch")


def test_a_padding_mode_without_padding_is_zeros():
    assert geometry((1, 1, 1, 1), 1, 0, 1, 1, padding_mode="reflect") == Geometry.identity(1, 2)


@pytest.mark.parametrize("groups", [(2, 4, 2), (6, 4, 2), (3, 4, 1), (12, 12, 12)])
def test_groups_of_a_sum(groups):
    one, other = (geometry((12, 12 // g, 1), 1, 0, 1, g) for g in groups[:2])
    assert one.add(other).groups == groups[2]


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (geometry((8, 4, 3, 3), 2, 1, 1, 2), "3x3 stride 2 groups 2"),
        (geometry((8, 1, 3, 5), (1, 2), 1, 2, 8), "3x5 stride 1x2 dilation 2 depthwise"),
        (geometry((8, 8, 3), 1, 1, 1, 1, padding_mode="reflect"), "3 reflect"),
    ],
)
def test_description(shape, text):
    assert shape.describe() == text


def refused(one: Geometry, other: Geometry, code: str) -> None:
    with pytest.raises(NotAffine) as caught:
        one.add(other)
    assert caught.value.code == code
