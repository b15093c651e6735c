"""One meaning per operator, whatever its spelling; each is compared with its node in numbers, at several sizes."""

from __future__ import annotations

import inspect
import operator
from functools import partial

import pytest
import torch
from support.meanings import SIZES, Network, check, meaning, meaning_at, named, read
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from repfuse.algebra.expression import Joined, Scaled, Selected, Sum, Through
from repfuse.algebra.geometry import Geometry
from repfuse.algebra.layers import Convolution, Factor, Filter, Normalisation, Offset
from repfuse.algebra.transposed import TransposedGeometry
from repfuse.ops.meaning import Passage, Rearranged, Same, Unfusible, combination
from repfuse.ops.spelling import OWN_SIGNATURES, RENAMED, RESIZING, SIGNATURES, SPREADING
from repfuse.ops.table import ROWS

aten = torch.ops.aten


def images(ndim: int = 2) -> list[tuple[int, ...]]:
    return [(2, 4, *size) for size in SIZES[ndim]]


def depthwise(kernel, stride=None, padding=None, mode="zeros") -> Geometry:
    ones = (1,) * len(kernel)
    return Geometry(4, 4, kernel, stride or ones, padding or ((0, 0),) * len(kernel), ones, 4, mode)


CONV2 = Through("x", Convolution(Geometry(4, 6, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)), "kernel2", "bias"))
CONV1 = Through("x", Convolution(Geometry(4, 6, (3,), (1,), ((1, 1),), (1,)), "kernel1", None))
CONV3 = Through("x", Convolution(Geometry(4, 6, (3,) * 3, (1,) * 3, ((0, 0),) * 3, (1,) * 3), "kernel3", "bias"))
GROUPED = Through(
    "x", Convolution(Geometry(4, 6, (3, 1), (1, 1), ((2, 2), (0, 0)), (2, 1), groups=2), "grouped2", None)
)
SAME = Through("x", Convolution(Geometry(4, 6, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), "kernel2", None))

CONVOLUTIONS = [
    (1, lambda m, x, y: F.conv1d(x, m.kernel1, padding=1), CONV1),
    (1, lambda m, x, y: torch.conv1d(x, m.kernel1, None, 1, "same"), CONV1),
    (1, lambda m, x, y: aten.conv1d.default(x, m.kernel1, None, [1], [1]), CONV1),
    (2, lambda m, x, y: F.conv2d(x, m.kernel2, m.bias, 2, 1), CONV2),
    (2, lambda m, x, y: F.conv2d(x, weight=m.kernel2, bias=m.bias, stride=(2, 2), padding=(1,)), CONV2),
    (2, lambda m, x, y: F.conv2d(input=x, weight=m.kernel2, bias=m.bias, stride=2, padding=1), CONV2),
    (2, lambda m, x, y: aten.conv2d.default(x, m.kernel2, m.bias, [2, 2], [1, 1]), CONV2),
    (
        2,
        lambda m, x, y: aten.convolution.default(x, m.kernel2, m.bias, [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
        CONV2,
    ),
    (2, lambda m, x, y: F.conv2d(x, m.kernel2, padding="same"), SAME),
    (2, lambda m, x, y: aten.conv2d.padding(x, m.kernel2, None, [1, 1], "same"), SAME),
    (2, lambda m, x, y: F.conv2d(x, m.grouped2, None, 1, (2, 0), (2, 1), 2), GROUPED),
    (2, lambda m, x, y: F.conv2d(x, m.grouped2, None, 1, (2, 0), (2, 3), 2), GROUPED),
    (3, lambda m, x, y: F.conv3d(x, m.kernel3, m.bias), CONV3),
    (3, lambda m, x, y: F.conv3d(x, m.kernel3, m.bias, padding="valid"), CONV3),
    (3, lambda m, x, y: aten.conv3d.default(x, m.kernel3, m.bias), CONV3),
]


def spread(kernel, stride=1, padding=0, output_padding=0, groups=1, dilation=1, out=6) -> TransposedGeometry:
    """What a transposed convolution of 4 channels with the same numbers on all axes means."""
    ndim = len(kernel)
    axes = ((number,) * ndim for number in (stride, dilation, output_padding))
    stride, dilation, output_padding = axes
    return TransposedGeometry(
        4, out, kernel, stride, ((padding,) * 2,) * ndim, dilation, groups, output_padding=output_padding
    )


def transposes(name, bias, shape) -> Through:
    return Through("x", Convolution(shape, name, bias))


SPREAD1, SPREAD2, SPREAD3 = (spread((3,) * ndim, stride=2, padding=1, output_padding=1) for ndim in (1, 2, 3))
SPREAD_GROUPS = spread((3, 1), stride=2, groups=2, dilation=3, out=4)

TRANSPOSED = [
    (1, lambda m, x, y: F.conv_transpose1d(x, m.spread1, m.bias, 2, 1, 1), transposes("spread1", "bias", SPREAD1)),
    (2, lambda m, x, y: F.conv_transpose2d(x, m.spread2, m.bias, 2, 1, 1), transposes("spread2", "bias", SPREAD2)),
    (3, lambda m, x, y: F.conv_transpose3d(x, m.spread3, m.bias, 2, 1, 1), transposes("spread3", "bias", SPREAD3)),
    (2, lambda m, x, y: F.conv_transpose2d(x, m.spread2), transposes("spread2", None, spread((3, 3)))),
    (
        2,
        lambda m, x, y: F.conv_transpose2d(x, m.spread_groups, None, 2, 0, 0, 2, 3),
        transposes("spread_groups", None, SPREAD_GROUPS),
    ),
    (
        2,
        lambda m, x, y: aten.convolution.default(x, m.spread2, m.bias, [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
        transposes("spread2", "bias", SPREAD2),
    ),
]


@pytest.mark.parametrize(("ndim", "function", "said"), TRANSPOSED)
def test_transposed_convolutions(ndim, function, said):
    found = meaning_at(function, images(ndim))
    assert found == said
    assert all(isinstance(size, int) for size in found.layer.geometry.weight_shape)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolution_modules(kind):
    ndim = int(kind.__name__[-2])
    layer = kind(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2)
    shape = spread((3,) * ndim, 2, 1, 1, 2, 2)
    assert meaning_at(lambda m, x, y: m.child(x), images(ndim), child=layer) == transposes(
        "child.weight", "child.bias", shape
    )


def test_a_transposed_convolution_of_one_wanted_size():
    layer = nn.ConvTranspose2d(4, 4, 3, stride=2)
    shape = TransposedGeometry(4, 4, (3, 3), (2, 2), ((0, 0), (0, 0)), (1, 1), 1, output_padding=(1, 0))
    said = meaning(lambda m, x, y: m.child(x, [14, 15]), (2, 4, 6, 7), child=layer)
    assert said == transposes("child.weight", "child.bias", shape)


@pytest.mark.parametrize(("ndim", "function", "expected"), CONVOLUTIONS)
def test_convolutions(ndim, function, expected):
    assert meaning_at(function, images(ndim)) == expected


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_a_convolution_module_of_another_padding_mode_is_a_pad_and_a_convolution(mode):
    conv = nn.Conv2d(4, 6, 3, 1, (1, 0), padding_mode=mode, bias=False)
    unpadded = Geometry(4, 6, (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    found = read(Network(lambda m, x, y: m.conv(x), conv=conv), torch.randn(images()[0], dtype=torch.float64))
    for shape in images():
        check(found, *torch.randn(2, *shape, dtype=torch.float64))
    assert found.of("pad") == Through("x", Filter(depthwise((1, 1), None, ((1, 1), (0, 0)), mode), 1.0))
    assert found.meaning == Through("pad", Convolution(unpadded, "conv.weight", None))


def test_a_convolution_module_pads_with_zeros_itself():
    conv = nn.Conv2d(4, 6, 3, 1, (1, 0), bias=False)
    geometry = Geometry(4, 6, (3, 3), (1, 1), ((1, 1), (0, 0)), (1, 1), 1)
    said = meaning_at(lambda m, x, y: m.conv(x), images(), conv=conv)
    assert said == Through("x", Convolution(geometry, "conv.weight", None))


LINEAR = Through("x", Convolution(Geometry(4, 5, (), (), (), ()), "matrix", "matrix_bias"))
PRODUCT = Through("x", Convolution(Geometry(4, 5, (), (), (), ()), "matrix", None))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x, y: F.linear(x, m.matrix, m.matrix_bias), LINEAR),
        (lambda m, x, y: aten.linear.default(x, m.matrix, m.matrix_bias), LINEAR),
        (lambda m, x, y: x @ m.matrix.t(), PRODUCT),
        (lambda m, x, y: torch.matmul(x, m.matrix.T), PRODUCT),
        (lambda m, x, y: x.matmul(m.matrix.transpose(0, 1)), PRODUCT),
        (lambda m, x, y: x.matmul(m.matrix.transpose(1, 0)), PRODUCT),
        (lambda m, x, y: x.matmul(m.matrix.transpose(-1, -2)), PRODUCT),
        (lambda m, x, y: x.matmul(m.matrix.swapaxes(-2, -1)), PRODUCT),
        (lambda m, x, y: x @ m.matrix.permute(1, 0), PRODUCT),
        (lambda m, x, y: x @ m.matrix.mT, PRODUCT),
        (lambda m, x, y: aten.matmul.default(x, aten.t.default(m.matrix)), PRODUCT),
        (lambda m, x, y: aten.matmul.default(x, aten.numpy_T.default(m.matrix)), PRODUCT),
    ],
)
def test_linear_layers(function, expected, shape):
    assert meaning(function, shape) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: torch.addmm(m.matrix_bias, x, m.matrix.t()),
        lambda m, x, y: aten.addmm.default(m.matrix_bias, x, aten.permute.default(m.matrix, [1, 0])),
    ],
)
def test_a_product_with_a_bias(function):
    assert meaning(function, (2, 4)) == LINEAR


@pytest.mark.parametrize("spelling", [torch.mm, aten.mm.default])
def test_a_product_of_matrices(spelling):
    assert meaning(lambda m, x, y: spelling(x, m.matrix.t()), (2, 4)) == PRODUCT


def test_a_linear_module():
    geometry = Geometry(4, 3, (), (), (), ())
    assert meaning(lambda m, x, y: m.head(x), (2, 4), head=nn.Linear(4, 3)) == Through(
        "x", Convolution(geometry, "head.weight", "head.bias")
    )


FULL_NORM = Scaled("x", Normalisation("mean", "var", "gamma", "beta", 1e-3), 1)
BARE_NORM = Scaled("x", Normalisation("mean", "var", None, None, 1e-5), 1)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 5, 3), (2, 4, 3, 3, 3)])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x, y: F.batch_norm(x, m.mean, m.var, m.gamma, m.beta, False, 0.1, 1e-3), FULL_NORM),
        (lambda m, x, y: F.batch_norm(x, m.mean, m.var), BARE_NORM),
        (lambda m, x, y: torch.batch_norm(x, m.gamma, m.beta, m.mean, m.var, False, 0.1, 1e-3, False), FULL_NORM),
        (
            lambda m, x, y: aten.batch_norm.default(x, m.gamma, m.beta, m.mean, m.var, False, 0.1, 1e-3, False),
            FULL_NORM,
        ),
        (
            lambda m, x, y: aten._native_batch_norm_legit_no_training.default(
                x, m.gamma, m.beta, m.mean, m.var, 0.1, 1e-3
            )[0],
            FULL_NORM,
        ),
        (
            lambda m, x, y: aten.native_batch_norm.default(x, None, None, m.mean, m.var, False, 0.1, 1e-5)[0],
            BARE_NORM,
        ),
    ],
)
def test_normalisations(function, expected, shape):
    said = meaning(function, shape)
    assert said == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x, y: F.instance_norm(x, m.mean, m.var, m.gamma, m.beta, False, 0.1, 1e-3), FULL_NORM),
        (lambda m, x, y: F.instance_norm(x, m.mean, m.var, use_input_stats=False), BARE_NORM),
        (
            lambda m, x, y: aten.instance_norm.default(x, m.gamma, m.beta, m.mean, m.var, False, 0.1, 1e-3, False),
            FULL_NORM,
        ),
    ],
)
def test_instance_normalisations_with_frozen_statistics(function, expected):
    assert meaning(function, (2, 4, 5, 3)) == expected


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (3, 4)),
        (nn.BatchNorm1d(4), (3, 4, 5)),
        (nn.BatchNorm2d(4, eps=0.1), (2, 4, 3, 5)),
        (nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
        (nn.SyncBatchNorm(4), (2, 4, 3, 5)),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (2, 4, 5)),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (2, 4, 3, 5)),
    ],
)
def test_normalisation_modules(norm, shape):
    names = Normalisation("norm.running_mean", "norm.running_var", "norm.weight", "norm.bias", norm.eps)
    assert meaning(lambda m, x, y: m.norm(x), shape, norm=norm) == Scaled("x", names, 1)


def test_a_normalisation_module_without_parameters():
    names = Normalisation("norm.running_mean", "norm.running_var", None, None, 1e-5)
    assert meaning(lambda m, x, y: m.norm(x), (2, 4, 3), norm=nn.BatchNorm1d(4, affine=False)) == Scaled("x", names, 1)


def both(a: float, b: float) -> Sum:
    return combination(("x", a), ("y", b))


SUMS = [
    (lambda m, x, y: x + y, both(1, 1)),
    (lambda m, x, y: operator.iadd(x, y), both(1, 1)),
    (lambda m, x, y: torch.add(x, y, alpha=2), both(1, 2)),
    (lambda m, x, y: torch.add(input=x, other=y), both(1, 1)),
    (lambda m, x, y: x.add(y, alpha=2), both(1, 2)),
    (lambda m, x, y: x.add_(y, alpha=2), both(1, 2)),
    (lambda m, x, y: aten.add.Tensor(x, y, alpha=2), both(1, 2)),
    (lambda m, x, y: aten.add_.Tensor(x, y), both(1, 1)),
    (lambda m, x, y: x - y, both(1, -1)),
    (lambda m, x, y: operator.isub(x, y), both(1, -1)),
    (lambda m, x, y: torch.sub(x, y, alpha=3), both(1, -3)),
    (lambda m, x, y: torch.subtract(x, y), both(1, -1)),
    (lambda m, x, y: x.subtract_(y, alpha=2), both(1, -2)),
    (lambda m, x, y: torch.rsub(x, y), both(-1, 1)),
    (lambda m, x, y: torch.rsub(x, y, alpha=2), both(-2, 1)),
    (lambda m, x, y: torch.lerp(x, y, 0.25), both(0.75, 0.25)),
    (lambda m, x, y: x.lerp_(y, 0.25), both(0.75, 0.25)),
    (lambda m, x, y: aten.lerp.Scalar(x, y, 0.25), both(0.75, 0.25)),
    (lambda m, x, y: torch.stack([x, y]).sum(0), both(1, 1)),
    (lambda m, x, y: torch.sum(torch.stack((x, y), dim=0), dim=0), both(1, 1)),
    (lambda m, x, y: torch.stack([x, y], -1).sum(dim=-1), both(1, 1)),
    (lambda m, x, y: torch.stack([x, y], -1).sum((4,)), both(1, 1)),
    (lambda m, x, y: torch.stack([x, y], 1).mean(1), both(0.5, 0.5)),
    (lambda m, x, y: torch.mean(torch.stack([x, y], 2), 2, False), both(0.5, 0.5)),
    (lambda m, x, y: x + x, combination(("x", 1), ("x", 1))),
    (lambda m, x, y: -x, combination(("x", -1))),
    (lambda m, x, y: x.neg(), combination(("x", -1))),
    (lambda m, x, y: x.neg_(), combination(("x", -1))),
    (lambda m, x, y: torch.negative(x), combination(("x", -1))),
    (lambda m, x, y: aten.neg.default(x), combination(("x", -1))),
    (lambda m, x, y: x * 2, combination(("x", 2))),
    (lambda m, x, y: 2 * x, combination(("x", 2))),
    (lambda m, x, y: torch.mul(x, 2), combination(("x", 2))),
    (lambda m, x, y: x.multiply(2), combination(("x", 2))),
    (lambda m, x, y: x.mul_(2), combination(("x", 2))),
    (lambda m, x, y: aten.mul.Tensor(x, 2), combination(("x", 2))),
    (lambda m, x, y: aten.mul_.Scalar(x, 2), combination(("x", 2))),
    (lambda m, x, y: x / 4, combination(("x", 0.25))),
    (lambda m, x, y: torch.true_divide(x, 4), combination(("x", 0.25))),
    (lambda m, x, y: x.div_(4), combination(("x", 0.25))),
    (lambda m, x, y: torch.div(x, 4, rounding_mode=None), combination(("x", 0.25))),
    (lambda m, x, y: aten.div.Tensor(x, 4), combination(("x", 0.25))),
    (lambda m, x, y: x + 0, Same("x")),
    (lambda m, x, y: sum([x]), Same("x")),
    (lambda m, x, y: 0 - x, combination(("x", -1))),
    (lambda m, x, y: x * 1, Same("x")),
]


@pytest.mark.parametrize(("function", "expected"), SUMS)
def test_sums_and_multiples(function, expected):
    assert meaning_at(function, images()) == expected


def shift(by, factor=1.0, scale=1.0, axis=None) -> Scaled:
    return Scaled("x", Offset(by, factor, scale), axis)


def times(by, inverse=False, axis=1) -> Scaled:
    return Scaled("x", Factor(by, inverse), axis)


def toward(by, axis=None) -> Sum:
    """``x - by * x + by * y``."""
    return Sum(("x", Scaled("x", Factor(by, times=-1.0), axis), Scaled("y", Factor(by), axis)))


CONSTANTS = [
    (lambda m, x, y: x + 2, shift(2.0)),
    (lambda m, x, y: x - 2, shift(-2.0)),
    (lambda m, x, y: 2 - x, shift(2.0, scale=-1.0)),
    (lambda m, x, y: x.add_(2, alpha=3), shift(6.0)),
    (lambda m, x, y: aten.rsub.Scalar(x, 2, 3), shift(2.0, scale=-3.0)),
    (lambda m, x, y: aten.add.Scalar(x, 2), shift(2.0)),
    (lambda m, x, y: x * m.image, times("image")),
    (lambda m, x, y: m.image * x, times("image")),
    (lambda m, x, y: torch.mul(m.column, x), times("column")),
    (lambda m, x, y: x.mul_(m.column), times("column")),
    (lambda m, x, y: operator.imul(x, m.image), times("image")),
    (lambda m, x, y: aten.mul.Tensor(x, m.image), times("image")),
    (lambda m, x, y: x * m.scalar, times("scalar", axis=None)),
    (lambda m, x, y: x * m.single, times("single", axis=None)),
    (lambda m, x, y: x / m.image, times("image", inverse=True)),
    (lambda m, x, y: x.div_(m.image), times("image", inverse=True)),
    (lambda m, x, y: x + m.image, shift("image", axis=1)),
    (lambda m, x, y: m.column + x, shift("column", axis=1)),
    (lambda m, x, y: x - m.image, shift("image", -1.0, axis=1)),
    (lambda m, x, y: m.image - x, shift("image", 1.0, -1.0, axis=1)),
    (lambda m, x, y: torch.sub(m.image, x, alpha=2), shift("image", 1.0, -2.0, axis=1)),
    (lambda m, x, y: torch.add(x, m.scalar, alpha=2), shift("scalar", 2.0)),
    (lambda m, x, y: x.add_(m.image), shift("image", axis=1)),
    (lambda m, x, y: aten.sub_.Tensor(x, m.image), shift("image", -1.0, axis=1)),
    (lambda m, x, y: x * m.gamma.reshape(1, -1, 1, 1), times("%reshape")),
    (lambda m, x, y: x * (m.gamma * (m.var + 1e-5).rsqrt()).view(1, 4, 1, 1), times("%view")),
    (lambda m, x, y: torch.lerp(x, m.image, 0.25), shift("image", 0.25, 0.75, axis=1)),
    (lambda m, x, y: torch.addcmul(m.image, x, m.column), shift("image", 1.0, "column", axis=1)),
    (lambda m, x, y: torch.addcmul(m.scalar, m.column, x), shift("scalar", 1.0, "column", axis=1)),
    (lambda m, x, y: m.image.addcmul(x, m.single, value=1), shift("image", 1.0, "single", axis=1)),
    (lambda m, x, y: aten.addcmul.default(m.scalar, m.single, x), shift("scalar", 1.0, "single")),
    (lambda m, x, y: torch.addcmul(x, y, m.image), Sum(("x", Scaled("y", Factor("image"), 1)))),
    (lambda m, x, y: x.addcmul(m.scalar, y), Sum(("x", Scaled("y", Factor("scalar"))))),
    (lambda m, x, y: x.addcmul_(y, m.column), Sum(("x", Scaled("y", Factor("column"), 1)))),
    (lambda m, x, y: torch.addcmul(x, y, m.image, value=2), Sum(("x", Scaled("y", Factor("image", times=2.0), 1)))),
    (lambda m, x, y: torch.lerp(x, y, m.scalar), toward("scalar")),
    (lambda m, x, y: x.lerp_(y, m.image), toward("image", axis=1)),
    (lambda m, x, y: aten.lerp.Tensor(x, y, m.column), toward("column", axis=1)),
]


@pytest.mark.parametrize(("function", "expected"), CONSTANTS)
def test_constants(function, expected):
    assert meaning_at(function, images()) == expected


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4), (2, 3, 5, 4)])
def test_constants_along_the_last_axis(shape):
    last = len(shape) - 1
    assert meaning(lambda m, x, y: x * m.gamma, shape) == times("gamma", axis=last)
    assert meaning(lambda m, x, y: x + m.gamma, shape) == shift("gamma", axis=last)


def padded(padding, fill=0.0, mode="zeros") -> Through:
    return Through("x", Filter(depthwise((1,) * len(padding), padding=padding, mode=mode), 1.0, fill))


ASYMMETRIC = ((1, 2), (0, 1))
PADS = [
    (2, lambda m, x, y: F.pad(x, (0, 1, 1, 2)), padded(ASYMMETRIC)),
    (2, lambda m, x, y: F.pad(x, (0, 1, 1, 2, 0, 0)), padded(ASYMMETRIC)),
    (2, lambda m, x, y: F.pad(x, [0, 1, 1, 2], "constant", 3), padded(ASYMMETRIC, 3.0)),
    (2, lambda m, x, y: aten.pad.default(x, [0, 1, 1, 2]), padded(ASYMMETRIC)),
    (2, lambda m, x, y: aten.constant_pad_nd.default(x, [0, 1, 1, 2], 3.0), padded(ASYMMETRIC, 3.0)),
    (2, lambda m, x, y: F.pad(x, (0, 1)), padded(((0, 0), (0, 1)))),
    (2, lambda m, x, y: F.pad(x, (-1, 2, 1, -1), value=3), padded(((1, -1), (-1, 2)), 3.0)),
    (2, lambda m, x, y: F.pad(x, (0, 0, 0, 0)), Same("x")),
    (1, lambda m, x, y: F.pad(x, (1, 2)), padded(((1, 2),))),
    (3, lambda m, x, y: F.pad(x, (1, 2, 0, 1, 2, 0)), padded(((2, 0), (0, 1), (1, 2)))),
    (2, lambda m, x, y: F.pad(x, (0, 1, 1, 2), mode="reflect"), padded(ASYMMETRIC, mode="reflect")),
    (2, lambda m, x, y: aten.reflection_pad2d.default(x, [0, 1, 1, 2]), padded(ASYMMETRIC, mode="reflect")),
    (1, lambda m, x, y: aten.replication_pad1d.default(x, [0, 1]), padded(((0, 1),), mode="replicate")),
    (2, lambda m, x, y: aten.pad.default(x, [0, 1, 1, 2], "circular"), padded(ASYMMETRIC, mode="circular")),
]


@pytest.mark.parametrize(("ndim", "function", "expected"), PADS)
def test_pads(ndim, function, expected):
    assert meaning_at(function, images(ndim)) == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ZeroPad2d((0, 1, 1, 2)), padded(ASYMMETRIC)),
        (nn.ConstantPad2d((0, 1, 1, 2), 3.5), padded(ASYMMETRIC, 3.5)),
        (nn.ReflectionPad2d((0, 1, 1, 2)), padded(ASYMMETRIC, mode="reflect")),
        (nn.ReplicationPad2d((0, 1, 1, 2)), padded(ASYMMETRIC, mode="replicate")),
        (nn.CircularPad2d((0, 1, 1, 2)), padded(ASYMMETRIC, mode="circular")),
    ],
)
def test_pad_modules(module, expected):
    assert meaning_at(lambda m, x, y: m.pad(x), images(), pad=module) == expected


def cropped(padding, stride=None) -> Through:
    return Through("x", Filter(depthwise((1,) * len(padding), stride, padding), 1.0))


CROPS = [
    (2, lambda m, x, y: x[:, :, 1:-1, 2:], cropped(((-1, -1), (-2, 0)))),
    (2, lambda m, x, y: x[..., 1:-1, 2:], cropped(((-1, -1), (-2, 0)))),
    (2, lambda m, x, y: x[:, :, ::2, 1::2], cropped(((0, 0), (-1, 0)), (2, 2))),
    (2, lambda m, x, y: x[:, :, 1:-1:3], cropped(((-1, -1), (0, 0)), (3, 1))),
    (1, lambda m, x, y: x[..., :-2], cropped(((0, -2),))),
    (3, lambda m, x, y: x[:, :, 1:, :-1, ::2], cropped(((-1, 0), (0, -1), (0, 0)), (1, 1, 2))),
    (2, lambda m, x, y: aten.slice.Tensor(x, 2, 1, -1), cropped(((-1, -1), (0, 0)))),
    (2, lambda m, x, y: aten.slice.Tensor(x, -1, 1, 2**63 - 1, 2), cropped(((0, 0), (-1, 0)), (1, 2))),
    (2, lambda m, x, y: x[:], Same("x")),
    (2, lambda m, x, y: x[:, :, 0:, ...], Same("x")),
]


@pytest.mark.parametrize(("ndim", "function", "expected"), CROPS)
def test_crops(ndim, function, expected):
    assert meaning_at(function, images(ndim)) == expected


POOL = Through("x", Filter(depthwise((3, 2), (2, 1), ((1, 1), (0, 0))), 1 / 6))
ROUNDED_UP = Through("x", Filter(depthwise((3, 3), padding=((1, 1), (1, 1))), 1 / 9))
POOLS = [
    (2, lambda m, x, y: F.avg_pool2d(x, (3, 2), (2, 1), (1, 0)), POOL),
    (2, lambda m, x, y: aten.avg_pool2d.default(x, [3, 2], [2, 1], [1, 0]), POOL),
    (2, lambda m, x, y: m.pool(x), POOL),
    (2, lambda m, x, y: F.avg_pool2d(x, 2), Through("x", Filter(depthwise((2, 2), (2, 2)), 1 / 4))),
    (2, lambda m, x, y: F.avg_pool2d(x, 3, 1, 1, ceil_mode=True), ROUNDED_UP),
    (
        2,
        lambda m, x, y: F.avg_pool2d(x, 3, 2, count_include_pad=False),
        Through("x", Filter(depthwise((3, 3), (2, 2)), 1 / 9)),
    ),
    (
        2,
        lambda m, x, y: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False, divisor_override=5),
        Through("x", Filter(depthwise((3, 3), padding=((1, 1), (1, 1))), 1 / 5)),
    ),
    (2, lambda m, x, y: F.avg_pool2d(x, 1), Same("x")),
    (2, lambda m, x, y: F.avg_pool2d(x, 1, 2, ceil_mode=True), Through("x", Filter(depthwise((1, 1), (2, 2)), 1.0))),
    (
        2,
        lambda m, x, y: F.avg_pool2d(x, 2, 2, 1, ceil_mode=True),
        Through("x", Filter(depthwise((2, 2), (2, 2), ((1, 1), (1, 1))), 1 / 4)),
    ),
    (1, lambda m, x, y: F.avg_pool1d(x, 3, 1, 1), Through("x", Filter(depthwise((3,), padding=((1, 1),)), 1 / 3))),
    (1, lambda m, x, y: aten.avg_pool1d.default(x, [2]), Through("x", Filter(depthwise((2,), (2,)), 1 / 2))),
    (3, lambda m, x, y: F.avg_pool3d(x, 2, 1), Through("x", Filter(depthwise((2, 2, 2)), 1 / 8))),
]


@pytest.mark.parametrize(("ndim", "function", "expected"), POOLS)
def test_average_pools(ndim, function, expected):
    assert meaning_at(function, images(ndim), pool=nn.AvgPool2d((3, 2), (2, 1), (1, 0))) == expected


@pytest.mark.parametrize("kind", [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d])
def test_average_pool_modules(kind):
    ndim = int(kind.__name__[-2])
    expected = Through("x", Filter(depthwise((3,) * ndim, (2,) * ndim, ((1, 1),) * ndim), 1 / 3**ndim))
    assert meaning_at(lambda m, x, y: m.pool(x), images(ndim), pool=kind(3, 2, 1)) == expected


def enlarging(*factors: int) -> Through:
    pads, ones, none = ((0, 0),) * len(factors), (1,) * len(factors), (0,) * len(factors)
    return Through("x", Filter(TransposedGeometry(4, 4, factors, factors, pads, ones, 4, output_padding=none), 1.0))


ENLARGED = [
    (1, lambda m, x, y: F.conv1d(F.interpolate(x, scale_factor=2), m.kernel1), enlarging(2)),
    (1, lambda m, x, y: F.conv1d(F.interpolate(x, scale_factor=40), m.kernel1), enlarging(40)),
    (2, lambda m, x, y: F.conv2d(F.interpolate(x, None, 3, "nearest-exact"), m.kernel2), enlarging(3, 3)),
    (2, lambda m, x, y: F.conv2d(F.interpolate(x, scale_factor=(1, 2.0)), m.grouped2, groups=2), enlarging(1, 2)),
    (2, lambda m, x, y: F.conv2d(F.pad(m.up(x), (1, 2)), m.kernel2), enlarging(2, 2)),
    (2, lambda m, x, y: m.wide(m.up(x)), enlarging(2, 2)),
    (3, lambda m, x, y: F.conv3d(F.interpolate(x, scale_factor=[1, 2, 3]), m.kernel3), enlarging(1, 2, 3)),
    (1, lambda m, x, y: F.conv1d(aten.upsample_nearest1d.vec(x, None, [2.0]), m.kernel1), enlarging(2)),
    (2, lambda m, x, y: F.conv2d(aten.upsample_nearest2d.vec(x, None, [2.0, 3.0]), m.kernel2), enlarging(2, 3)),
    (3, lambda m, x, y: F.conv3d(aten.upsample_nearest3d.vec(x, None, [2.0] * 3), m.kernel3), enlarging(2, 2, 2)),
]


@pytest.mark.parametrize(("ndim", "function", "expected"), ENLARGED)
def test_nearest_upsampling_before_a_kernel_is_a_transposed_kernel_of_ones(ndim, function, expected):
    """What is said is compared with what each node computes; the kernel is said of the one that reads ``x``."""
    children = {"up": nn.UpsamplingNearest2d(scale_factor=2), "wide": nn.Conv2d(4, 2, (2, 1), groups=2)}
    shapes = images(ndim)
    found = read(Network(function, **children), *torch.randn(2, *shapes[0], dtype=torch.float64))
    for shape in shapes:
        check(found, *torch.randn(2, *shape, dtype=torch.float64))
    assert expected in [named(meaning) for meaning in found.meanings.values()]


RESIZED = [
    *(
        lambda m, x, y, mode=mode: F.conv2d(F.interpolate(x, scale_factor=2, mode=mode), m.kernel2)
        for mode in ("bilinear", "bicubic", "area")
    ),
    lambda m, x, y: F.conv2d(aten.upsample_bilinear2d.vec(x, None, False, [2.0, 2.0]), m.kernel2),
    lambda m, x, y: F.conv2d(aten.upsample_bicubic2d.vec(x, None, False, [2.0, 2.0]), m.kernel2),
    lambda m, x, y: F.conv2d(aten.upsample_nearest2d.default(x, [12, 21], 2.0, 3.0), m.kernel2),
    lambda m, x, y: F.conv2d(F.interpolate(x, scale_factor=1.5), m.kernel2),
    lambda m, x, y: F.conv2d(F.interpolate(x, scale_factor=(2, 41)), m.kernel2),
    lambda m, x, y: F.conv2d(F.interpolate(x, size=(12, 14)), m.kernel2),
    lambda m, x, y: F.conv2d(F.interpolate(x, scale_factor=(2, x.size(2) // 4)), m.kernel2),
    lambda m, x, y: F.interpolate(x, scale_factor=2),
    lambda m, x, y: F.conv2d(F.interpolate(x, scale_factor=2), m.kernel2[..., :1, :1]),
    lambda m, x, y: m.apart(F.interpolate(x, scale_factor=2)),
]


@pytest.mark.parametrize("function", RESIZED)
def test_other_resizing_only_moves_pixels(function):
    found = read(
        Network(function, apart=nn.Conv2d(4, 4, 3, groups=4)), *torch.randn(2, *images()[0], dtype=torch.float64)
    )
    check(found, *torch.randn(2, *images()[0], dtype=torch.float64))
    assert any(isinstance(meaning, Rearranged) for meaning in found.meanings.values())


def test_an_upsampling_of_any_number_of_channels_is_no_kernel():
    class Averaged(nn.Module):
        def forward(self, x, y):
            return F.conv1d(F.interpolate(x, scale_factor=2), y.mean((0, 2)).expand(1, -1)[..., None].expand(-1, -1, 2))

    found = read(Averaged(), torch.randn(2, 4, 5))
    assert not any(isinstance(meaning, Through | Rearranged) for meaning in found.meanings.values())


def chosen(*indices: int, axis: int = 1) -> Selected:
    return Selected("x", indices, axis)


CHANNELS = [
    (lambda m, x, y: torch.cat([x, y], 1), Joined(("x", "y"), 1)),
    (lambda m, x, y: torch.cat((x, y, x), dim=-3), Joined(("x", "y", "x"), 1)),
    (lambda m, x, y: torch.concat([x, y], axis=1), Joined(("x", "y"), 1)),
    (lambda m, x, y: torch.hstack([x, y]), Joined(("x", "y"), 1)),
    (lambda m, x, y: torch.cat([x], 1), Same("x")),
    (lambda m, x, y: x.chunk(2, 1)[1], chosen(2, 3)),
    (lambda m, x, y: x.chunk(3, dim=1)[1], chosen(2, 3)),
    (lambda m, x, y: torch.chunk(x, 2, -3)[-2], chosen(0, 1)),
    (lambda m, x, y: torch.chunk(dim=1, chunks=2, input=x)[1], chosen(2, 3)),
    (lambda m, x, y: torch.split(dim=1, split_size_or_sections=2, tensor=x)[1], chosen(2, 3)),
    (lambda m, x, y: x.split(3, 1)[1], chosen(3)),
    (lambda m, x, y: torch.split(x, [1, 3], dim=1)[1], chosen(1, 2, 3)),
    (lambda m, x, y: x.split(split_size=3, dim=1)[0], chosen(0, 1, 2)),
    (lambda m, x, y: x.split_with_sizes([1, 3], 1)[0], chosen(0)),
    (lambda m, x, y: x.tensor_split(3, 1)[0], chosen(0, 1)),
    (lambda m, x, y: torch.tensor_split(x, (1, 2), 1)[2], chosen(2, 3)),
    (lambda m, x, y: aten.split.Tensor(x, 3, 1)[1], chosen(3)),
    (lambda m, x, y: aten.split_with_sizes.default(x, [1, 3], 1)[1], chosen(1, 2, 3)),
    (lambda m, x, y: aten.chunk.default(x, 2, 1)[0], chosen(0, 1)),
    (lambda m, x, y: x[:, :3], chosen(0, 1, 2)),
    (lambda m, x, y: x[:, -1:], chosen(3)),
    (lambda m, x, y: x[:, ::2], chosen(0, 2)),
    (lambda m, x, y: x[:, [2, 0, -1]], chosen(2, 0, 3)),
    (lambda m, x, y: x[:, 1:2, ...], chosen(1)),
    (lambda m, x, y: x.narrow(1, 1, 2), chosen(1, 2)),
    (lambda m, x, y: torch.narrow(x, 1, -2, 2), chosen(2, 3)),
    (lambda m, x, y: aten.slice.Tensor(x, 1, 2, 2**63 - 1), chosen(2, 3)),
    (lambda m, x, y: aten.narrow.default(x, 1, 1, 2), chosen(1, 2)),
    (lambda m, x, y: x[:, : x.size(1)], Same("x")),
    (lambda m, x, y: x[:, : x.size(1) // 2], chosen(0, 1)),
    (lambda m, x, y: x.narrow(1, 0, x.size(1)), Same("x")),
    (lambda m, x, y: x.narrow(1, x.shape[1] - 1, 1), chosen(3)),
    (lambda m, x, y: x.flip(1), chosen(3, 2, 1, 0)),
    (lambda m, x, y: torch.flip(x, [-3]), chosen(3, 2, 1, 0)),
    (lambda m, x, y: aten.flip.default(x, [1]), chosen(3, 2, 1, 0)),
    (lambda m, x, y: x.roll(1, 1), chosen(3, 0, 1, 2)),
    (lambda m, x, y: torch.roll(x, shifts=(-1,), dims=(-3,)), chosen(1, 2, 3, 0)),
    (lambda m, x, y: aten.roll.default(x, [6], [1]), chosen(2, 3, 0, 1)),
    (lambda m, x, y: F.channel_shuffle(x, 2), chosen(0, 2, 1, 3)),
    (lambda m, x, y: aten.channel_shuffle.default(x, 2), chosen(0, 2, 1, 3)),
    (lambda m, x, y: m.shuffle(x), chosen(0, 2, 1, 3)),
]


@pytest.mark.parametrize(("function", "expected"), CHANNELS)
def test_channels(function, expected):
    assert meaning_at(function, images(), shuffle=nn.ChannelShuffle(2)) == expected


@pytest.mark.parametrize(
    ("function", "moves"),
    [
        (lambda m, x, y: x.flip(2), ((1, 1), (3, 3))),
        (lambda m, x, y: x.flip(-1), ((1, 1),)),
        (lambda m, x, y: x.flip(2, 3), ((1, 1),)),
        (lambda m, x, y: x.flip(1, 2), ((3, 3),)),
        (lambda m, x, y: x.roll(1, 2), ((1, 1), (3, 3))),
        (lambda m, x, y: torch.roll(x, (1, -2), (0, 3)), ((1, 1),)),
    ],
)
def test_pixels_in_another_order(function, moves):
    assert meaning_at(function, images()) == Rearranged("x", moves)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x, y: torch.cat([x, y], -1), Joined(("x", "y"), 2)),
        (lambda m, x, y: x.chunk(2, -1)[1], chosen(2, 3, axis=2)),
        (lambda m, x, y: m.head(x)[..., :2], Selected("linear", (0, 1), 2)),
        (lambda m, x, y: (m.head(x) + 1)[..., 2:], Selected("add", (2, 3), 2)),
        (lambda m, x, y: (m.head(x).chunk(2, -1)[0])[..., 1:], Selected("getitem", (1,), 2)),
    ],
)
def test_channels_of_linear_layers(function, expected):
    assert meaning_at(function, [(2, 5, 4), (2, 3, 4)], head=nn.Linear(4, 4)) == expected


def test_a_slice_that_a_linear_layer_reads_chooses_channels():
    found = read(Network(lambda m, x, y: m.head(x[..., 2:]), head=nn.Linear(2, 3)), torch.randn(2, 5, 4).double())
    assert found.of("getitem") == chosen(2, 3, axis=2)


NOTHING = [
    lambda m, x, y: F.dropout(x, 0.5, False),
    lambda m, x, y: F.dropout2d(x, training=False),
    lambda m, x, y: F.alpha_dropout(x, 0.5, False, inplace=True),
    lambda m, x, y: torch.dropout(x, 0.5, train=False),
    lambda m, x, y: torch.feature_dropout(x, 0.5, False),
    lambda m, x, y: aten.dropout.default(x, 0.5, False),
    lambda m, x, y: m.drop(x),
    lambda m, x, y: x.contiguous(),
    lambda m, x, y: x.contiguous(memory_format=torch.channels_last),
    lambda m, x, y: x.clone(),
    lambda m, x, y: torch.clone(x),
    lambda m, x, y: x.detach(),
    lambda m, x, y: x.data,
    lambda m, x, y: +x,
    lambda m, x, y: x.to(torch.float64),
    lambda m, x, y: x.to("cpu", torch.float64),
    lambda m, x, y: x.to(dtype=torch.float64),
    lambda m, x, y: x.to(y),
    lambda m, x, y: x.type(torch.float64),
    lambda m, x, y: x.type_as(y),
    lambda m, x, y: x.double(),
    lambda m, x, y: x.cpu(),
    lambda m, x, y: aten.clone.default(x),
    lambda m, x, y: aten.alias.default(x),
    lambda m, x, y: aten.lift_fresh_copy.default(x),
    lambda m, x, y: aten._to_copy.default(x, dtype=torch.float64),
    lambda m, x, y: aten.to.dtype(x, torch.float64),
    lambda m, x, y: aten.detach.default(x),
]


@pytest.mark.parametrize("function", NOTHING)
def test_operators_that_do_nothing_in_inference(function):
    assert meaning_at(function, images(), drop=nn.Dropout2d(0.5)) == Same("x")


@pytest.mark.parametrize(
    "function", [lambda m, x, y: m.identity(x), lambda m, x, y: m.depth(x), lambda m, x, y: m.chain(x)]
)
def test_what_returns_its_input_itself_leaves_no_node(function):
    depth = pytest.importorskip("torchvision").ops.StochasticDepth(0.5, "row")
    chain = nn.Sequential(nn.Identity(), nn.Sequential())
    found = read(Network(function, identity=nn.Identity(), depth=depth, chain=chain), torch.ones(2, 4, 5, 6).double())
    assert found.result.name == "x" and found.meaning is None


# --- other names of the same operators, and of their arguments

FOLDED = (2, 4, 6, 7)


def folded(x, turn, last=lambda t, *sizes: t.reshape(sizes)):
    batch, height, width = x.size(0), x.size(2), x.size(3)
    return last(turn(x.view(batch, 2, 2, height, width)), batch, 4, height, width)


SPELLINGS = [
    (
        FOLDED,
        lambda m, x, y: F.avg_pool2d(x, 3, 2, 1, False, False, 5),
        lambda m, x, y: F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False, divisor_override=5),
    ),
    (FOLDED, lambda m, x, y: x[:, [0, 1, 2, 3]], lambda m, x, y: x.detach()),
    (FOLDED, lambda m, x, y: x.divide(4), lambda m, x, y: x / 4),
    (FOLDED, lambda m, x, y: F.pad(x, (0, 0, 0, 0), mode="reflect"), lambda m, x, y: x.detach()),
    (FOLDED, lambda m, x, y: F.pad(x, (1, 2), "constant", 5.0), lambda m, x, y: F.pad(x, pad=(1, 2), value=5.0)),
    (FOLDED, lambda m, x, y: torch.constant_pad_nd(x, (1, 2), 5.0), lambda m, x, y: F.pad(x, pad=(1, 2), value=5.0)),
    (
        FOLDED,
        lambda m, x, y: torch.convolution(x, m.grouped2, None, [2, 1], [1, 0], [1, 1], False, [0, 0], 2),
        lambda m, x, y: F.conv2d(x, m.grouped2, stride=(2, 1), padding=(1, 0), groups=2),
    ),
    (
        FOLDED,
        lambda m, x, y: torch.native_batch_norm(x, m.gamma, m.beta, m.mean, m.var, False, 0.1, 1e-3)[0],
        lambda m, x, y: F.batch_norm(x, m.mean, m.var, m.gamma, m.beta, eps=1e-3),
    ),
    (
        FOLDED,
        lambda m, x, y: torch._native_batch_norm_legit_no_training(x, m.gamma, m.beta, m.mean, m.var, 0.1, 1e-3)[0],
        lambda m, x, y: F.batch_norm(x, m.mean, m.var, m.gamma, m.beta, eps=1e-3),
    ),
    (
        FOLDED,
        lambda m, x, y: torch.instance_norm(x, m.gamma, m.beta, m.mean, m.var, False, 0.1, 1e-3, False),
        lambda m, x, y: F.batch_norm(x, m.mean, m.var, m.gamma, m.beta, eps=1e-3),
    ),
    (FOLDED, lambda m, x, y: torch.concatenate([x, y], 1), lambda m, x, y: torch.cat([x, y], 1)),
    (FOLDED, lambda m, x, y: torch.concat([x, y], axis=1), lambda m, x, y: torch.cat([x, y], 1)),
    (
        FOLDED,
        lambda m, x, y: aten.native_channel_shuffle.default(x, 2),
        lambda m, x, y: F.channel_shuffle(x, 2),
    ),
    (FOLDED, lambda m, x, y: folded(x, lambda t: t.swapdims(1, 2)), lambda m, x, y: F.channel_shuffle(x, 2)),
    (
        FOLDED,
        lambda m, x, y: folded(x, lambda t: torch.swapaxes(t, axis0=1, axis1=2)),
        lambda m, x, y: F.channel_shuffle(x, 2),
    ),
    (
        FOLDED,
        lambda m, x, y: folded(x, lambda t: t.transpose(1, 2), lambda t, *sizes: torch.reshape(t, shape=sizes)),
        lambda m, x, y: F.channel_shuffle(x, 2),
    ),
    (FOLDED, lambda m, x, y: torch.split(tensor=x, split_size_or_sections=2, dim=1)[1], lambda m, x, y: x[:, 2:]),
    (FOLDED, lambda m, x, y: torch.tensor_split(x, sections=2, dim=1)[1], lambda m, x, y: x[:, 2:]),
    (FOLDED, lambda m, x, y: aten.tensor_split.sections(x, 2, 1)[1], lambda m, x, y: x[:, 2:]),
    (FOLDED, lambda m, x, y: aten.tensor_split.indices(x, [3], 1)[1], lambda m, x, y: x[:, 3:]),
    (FOLDED, lambda m, x, y: F.dropout3d(x, 0.5, False), lambda m, x, y: x.detach()),
    (FOLDED, lambda m, x, y: torch.feature_alpha_dropout(x, 0.5, False), lambda m, x, y: x.detach()),
    (FOLDED, lambda m, x, y: torch.dropout_(x, 0.5, False), lambda m, x, y: x.detach()),
    (FOLDED, lambda m, x, y: torch.feature_dropout_(x, 0.5, False), lambda m, x, y: x.detach()),
    (FOLDED, lambda m, x, y: torch.alpha_dropout_(x, 0.5, False), lambda m, x, y: x.detach()),
    ((2, 4, 6), lambda m, x, y: F.dropout1d(x, 0.5, False), lambda m, x, y: x.detach()),
    ((2, 4), lambda m, x, y: torch.mm(x, m.matrix.t()), lambda m, x, y: x @ m.matrix.t()),
    (
        FOLDED,
        lambda m, x, y: aten._native_batch_norm_legit.default(x, m.gamma, m.beta, m.mean, m.var, False, 0.1, 1e-3)[0],
        lambda m, x, y: F.batch_norm(x, m.mean, m.var, m.gamma, m.beta, False, 0.1, 1e-3),
    ),
]
for kind, mode in (("reflection", "reflect"), ("replication", "replicate")):
    for ndim in (1, 2, 3):
        named_so = getattr(aten, f"{kind}_pad{ndim}d").default
        amounts = [1, 2, 2, 0, 1, 0][: 2 * ndim]
        SPELLINGS.append(
            (
                (2, 4, 5, 6, 4)[: ndim + 2],
                lambda m, x, y, of=named_so, by=amounts: of(x, by),
                lambda m, x, y, by=amounts, mode=mode: F.pad(x, by, mode=mode),
            )
        )


@pytest.mark.parametrize(("shape", "function", "usual"), SPELLINGS)
def test_another_spelling_means_the_same(shape, function, usual):
    expected = meaning(usual, shape)
    assert expected is not None and meaning(function, shape) == expected


@pytest.mark.parametrize("cast", ["float", "half", "bfloat16", "double"])
def test_a_cast_returns_its_input(cast):
    found = read(Network(lambda m, x, y: getattr(x, cast)()), torch.ones(FOLDED).double())
    assert found.meaning == Same("x")


def test_a_module_may_be_called_by_keyword():
    layer = nn.Conv2d(4, 6, 3)
    one, other = (
        meaning(f, FOLDED, child=layer) for f in (lambda m, x, y: m.child(input=x), lambda m, x, y: m.child(x))
    )
    assert one == other and isinstance(one, Through)


def test_a_batch_norm_that_stopped_tracking_still_uses_what_it_tracked():
    norm = nn.BatchNorm2d(4)
    norm.track_running_stats = False
    assert isinstance(meaning(lambda m, x, y: m.norm(x), FOLDED, norm=norm), Scaled)


def test_a_weight_may_be_a_plain_attribute():
    layer = nn.Conv2d(4, 6, 3)
    weight = layer.weight.detach().double()
    del layer.weight
    layer.weight = weight
    assert meaning(lambda m, x, y: m.child(x), FOLDED, child=layer).layer.weight == "child.weight"


def test_what_a_hook_does_is_seen():
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda module, args, output: output * 2)
    assert meaning(lambda m, x, y: m.child(x), FOLDED, child=norm) == combination(("batch_norm", 2))


def test_the_divisor_of_a_pool_module():
    said = meaning(lambda m, x, y: m.pool(x), FOLDED, pool=nn.AvgPool2d(2, divisor_override=3))
    assert said.layer.value == 1 / 3


@pytest.mark.parametrize(
    "step",
    [
        lambda m, h: h + m.matrix_bias,
        lambda m, h: h - h,
        lambda m, h: torch.rsub(h, 2),
        lambda m, h: h * 2,
        lambda m, h: h / 2,
        lambda m, h: -h,
        lambda m, h: torch.cat([h, h], -1),
        lambda m, h: h[..., 1:],
        lambda m, h: h.chunk(2, -1)[0],
        lambda m, h: h.split([3, 2], -1)[0],
        lambda m, h: h.tensor_split([3], -1)[0],
        lambda m, h: h.narrow(-1, 0, 3),
        lambda m, h: F.dropout(h, 0.5, False),
    ],
)
def test_a_slice_behind_a_linear_layer_chooses_channels(step):
    assert meaning(lambda m, x, y: step(m, F.linear(x, m.matrix))[..., :2], (2, 3, 4)).axis == 2
    assert not isinstance(meaning(lambda m, x, y: step(m, F.linear(x, m.matrix).relu())[..., :2], (2, 3, 4)), Selected)


# --- signatures, as torch has them


def arguments_of(overload, signature):
    """What an ATen operator calls its arguments, by the names in the signature where these differ."""
    names = [argument.name for argument in overload._schema.arguments]
    return [name if name in signature else RENAMED.get(name, name) for name in names]


OTHERS = {"cpu", "cuda", *RESIZING}  # ATen has those for scripts, and these under the names of one function
ATEN = [name for name in SIGNATURES if hasattr(torch.ops.aten, name) and name not in OTHERS]


def test_arguments_stand_in_the_order_of_some_overload():
    for name in ATEN:
        signature = [each.rstrip("*") for each in SIGNATURES[name].split()]
        packet = getattr(torch.ops.aten, name)
        orders = [arguments_of(getattr(packet, each), signature) for each in packet.overloads()]
        told = [[each for each in order if each in signature] for order in orders]
        alike = [order for order in told if order == [each for each in signature if each in order]]
        assert signature[0] in [first for first, *_ in filter(None, alike)], name


def test_each_operator_that_is_known_means_something():
    assert set(SIGNATURES) == {*ROWS, *SPREADING}


@pytest.mark.parametrize("function", OWN_SIGNATURES)
def test_functions_of_their_own_order_have_it(function):
    names = list(inspect.signature(function).parameters)
    assert OWN_SIGNATURES[function].split() == names[: len(OWN_SIGNATURES[function].split())]


ADAPTIVE = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
BY_NAME = [
    ((2, 4, 6), torch.split, {"tensor": "x", "split_size_or_sections": 3, "dim": 1}),
    ((2, 4, 6), torch.tensor_split, {"input": "x", "sections": 3, "dim": 1}),
    ((2, 4, 6), torch.tensor_split, {"input": "x", "indices": (1, 2), "dim": 1}),
    ((2, 3, 4), torch.matmul, {"input": "x", "other": "matrix"}),
    ((3, 4), torch.mm, {"input": "x", "mat2": "matrix"}),
    ((2, 4, 6), torch.cat, {"tensors": ("x", "y"), "dim": 1}),
    ((2, 4, 6), torch.sum, {"input": "stack", "axis": 1}),
    ((2, 4, 6), torch.swapaxes, {"input": "x", "axis0": 2, "axis1": 1}),
    ((2, 4, 6), F.pad, {"input": "x", "pad": (1, 0), "mode": "reflect"}),
    ((2, 4, 6, 5), torch.moveaxis, {"input": "x", "source": 1, "destination": 3}),
    *(((2, 4, *(6, 5, 4)[:n]), pool, {"input": "x", "output_size": 2}) for n, pool in enumerate(ADAPTIVE, 1)),
]


@pytest.mark.parametrize(("shape", "function", "given"), BY_NAME)
def test_arguments_by_name_have_one_name(shape, function, given):
    def called(m, x, y, by_name):
        tensors = {"x": x, "y": y, "matrix": m.matrix.T, "stack": torch.stack((x, y), 1)}
        values = tree_map(lambda value: tensors.get(value, value), given)
        made = function(**values) if by_name else function(*values.values())
        return made[1] if isinstance(made, tuple) else made

    by_name, by_place = (meaning(partial(called, by_name=each), shape) for each in (True, False))
    assert by_name == by_place and not isinstance(by_name, Passage | Unfusible | None)
