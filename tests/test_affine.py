"""The laws of the algebra: what a sum and a scaling of maps must do, against torch's own convolutions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.maps import apply, same, stack
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from repfuse.algebra import affine
from repfuse.algebra.affine import AffineConv
from repfuse.algebra.evaluation import evaluate
from repfuse.algebra.expression import Expression, Identity, Scaled, Through, sum_of
from repfuse.algebra.geometry import Geometry
from repfuse.algebra.layers import Convolution, Factor
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


def source_of(shape: Geometry) -> Identity:
    return Identity(shape.in_channels, shape.ndim)


def sum_of_layers(shapes: list[Geometry], scales: list[str | None]) -> Expression:
    """The sum of convolutions w0, w1, ... of one source, each times the scale of this name, if any."""
    layers = [Through(source_of(shape), Convolution(shape, f"w{i}", None)) for i, shape in enumerate(shapes)]
    return sum_of(tuple(x if by is None else Scaled(x, Factor(by)) for x, by in zip(layers, scales, strict=True)))


def like(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype)


@SETTINGS
@given(addable(3))
def test_blocks_of_rows_give_the_same_bits(maps):
    tensors = {f"w{i}": made.weight for i, made in enumerate(maps)} | {f"s{i}": m.bias for i, m in enumerate(maps)}
    expression = sum_of_layers([made.geometry for made in maps], [None, "s1", "s2"])
    whole, _ = evaluate(expression, tensors.__getitem__, like(torch.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "_BLOCK", 1)
        blocked, _ = evaluate(expression, tensors.__getitem__, like(torch.float64))
    assert torch.equal(whole, blocked)


class Blocks(TorchDispatchMode):
    """Notes how many rows of a weight there are in float64, each time that some are."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    @classmethod
    def _should_skip_dynamo(cls):  # else PyTorch imports its compiler for this
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype is torch.float64 and result.dim() > 1:
            self.rows.append(len(result))
        return result


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (8, 2), (11, 2), (12, 3), (4000, 7)])
def test_float64_takes_no_more_memory_than_one_block(limit, most, monkeypatch):
    shape = geometry((7, 4, 1), 1, 0, 1, 1)
    monkeypatch.setattr(affine, "_BLOCK", limit)
    weight = torch.randn(shape.weight_shape)
    with Blocks() as seen:
        made, _ = evaluate(sum_of_layers([shape], [None]), {"w0": weight}.__getitem__, like(torch.float32))
    assert torch.equal(made, weight)
    assert set(seen.rows) == {most, *[7 % most] * bool(7 % most)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_is_rounded_once(dtype):
    weights = torch.randn(3, 4, 4, 3, 3).to(dtype)
    shape, scale = geometry((4, 4, 3, 3), 1, 1, 1, 1), torch.rand(4).double()
    tensors = {"w0": weights[0], "w1": weights[1], "w2": weights[2], "s": scale}
    made, _ = evaluate(sum_of_layers([shape] * 3, ["s"] * 3), tensors.__getitem__, like(dtype))
    exact = sum(weight.double() * scale.view(-1, 1, 1, 1) for weight in weights)
    assert torch.equal(made, exact.to(dtype))
    step_by_step = sum(weight * scale.to(dtype).view(-1, 1, 1, 1) for weight in weights)
    assert not torch.equal(made, step_by_step)


def test_a_scale_leaves_the_weights_it_is_given_alone():
    weight = torch.randn(4, 4, 1, 1).double()
    before = weight.clone()
    shape = geometry(weight.shape, 1, 0, 1, 1)
    tensors = {"w0": weight, "w1": weight, "s": torch.full((4,), 2.0).double()}
    for dtype in (torch.float64, torch.float32):
        evaluate(sum_of_layers([shape] * 2, ["s"] * 2), tensors.__getitem__, like(dtype))
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
