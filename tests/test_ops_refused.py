"""What looks like an affine map and is not: refused, with numbers that show what the merge would have changed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.meanings import Network, meaning, read
from torch import nn
from torch.ao import quantization
from torch.nn import functional as F

import repfuse
from repfuse.algebra.expression import Joined, Scaled, Sum
from repfuse.ops.meaning import Unfusible
from repfuse.ops.table import meaning_of
from repfuse.recording.arguments import Arguments
from repfuse.recording.recording import record

SHAPE = (2, 4, 6, 7)


def code(function, shape=SHAPE, **children):
    said = meaning(function, shape, **children)
    assert isinstance(said, Unfusible), said
    return said.code


POOL_AT_BORDER = lambda m, x, y: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # noqa: E731
POOL_ROUNDED_UP = lambda m, x, y: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)  # noqa: E731
NO_TRAINING = torch.ops.aten._native_batch_norm_legit_no_training.default

REFUSED = [
    ("computed-weight", lambda m, x, y: F.conv2d(x, m.kernel2 * y.mean())),
    ("computed-weight", lambda m, x, y: F.conv2d(x, m.kernel2, y.mean((0, 2, 3))[[0, 1, 2, 3, 0, 1]])),
    ("computed-weight", lambda m, x, y: F.conv2d(x, m.kernel2, stride=y.size(0) - 1)),
    ("computed-weight", lambda m, x, y: F.conv2d(x, m.kernel2, stride=1 + x.size(2) // 64)),
    ("computed-weight", lambda m, x, y: F.conv_transpose2d(x, m.spread2, padding=y.size(0) - 1)),
    ("computed-weight", lambda m, x, y: F.linear(x.flatten(1)[:, :4], y.flatten(1)[:, :4])),
    ("computed-weight", lambda m, x, y: F.batch_norm(x, y.mean((0, 2, 3)), m.var)),
    ("training-norm", lambda m, x, y: F.batch_norm(x, m.mean, m.var, training=True)),
    ("training-norm", lambda m, x, y: F.batch_norm(x, None, None, training=True)),
    ("training-norm", lambda m, x, y: F.instance_norm(x, m.mean, m.var, use_input_stats=True)),
    ("training-norm", lambda m, x, y: F.instance_norm(x)),
    ("broadcast", lambda m, x, y: x + y.mean((2, 3), keepdim=True)),
    ("broadcast", lambda m, x, y: torch.lerp(x, y[:, :1], m.image)),
    ("broadcast", lambda m, x, y: NO_TRAINING(x[:, :2].contiguous(), m.mean, m.mean, m.mean, m.var, 0.1, 1e-5)[0]),
    ("pool-padding", POOL_AT_BORDER),
    ("pool-ceil", POOL_ROUNDED_UP),
    ("pool-ceil", lambda m, x, y: F.avg_pool2d(x, 2, ceil_mode=True)),
    ("pool-ceil", lambda m, x, y: F.avg_pool2d(x, (1, 2), ceil_mode=True)),
    ("size-dependent-slice", lambda m, x, y: x[:, :, :3]),
    ("size-dependent-slice", lambda m, x, y: x[:, :, -3:]),
    ("size-dependent-slice", lambda m, x, y: x[..., 1:5]),
    ("size-dependent-slice", lambda m, x, y: x[:, :, :0]),
    ("size-dependent-slice", lambda m, x, y: x.unbind(0)[0][..., :3]),
    ("size-dependent-slice", lambda m, x, y: x.narrow(2, 0, 3)),
    ("size-dependent-slice", lambda m, x, y: torch.ops.aten.slice.Tensor(x, 3, 0, 5)),
    ("fake-quantised", lambda m, x, y: torch.fake_quantize_per_tensor_affine(x, 0.5, 0, -128, 127)),
    (
        "fake-quantised",
        lambda m, x, y: F.conv2d(x, torch.fake_quantize_per_tensor_affine(m.kernel2, 0.5, 0, -128, 127)),
    ),
]


@pytest.mark.parametrize(("expected", "function"), REFUSED)
def test_refused_functions(expected, function):
    assert code(function) == expected


def test_an_input_without_a_batch_axis_is_refused():
    assert code(lambda m, x, y: F.conv2d(x, m.kernel2), (4, 6, 7)) == "channel-mismatch"


def test_a_bias_that_is_broadcast_is_no_bias_of_a_linear_layer():
    assert code(lambda m, x, y: F.linear(x, m.matrix, m.single), (2, 4)) == "broadcast"
    assert code(lambda m, x, y: torch.addmm(m.single, x, m.matrix.t()), (2, 4)) == "broadcast"


@pytest.mark.parametrize(
    ("constant", "shape"),
    [
        ((6, 7), (2, 4, 6, 7)),
        ((4, 6, 7), (2, 4, 6, 7)),
        ((6, 1), (2, 4, 6, 7)),
        ((2, 1, 1, 1), (2, 4, 6, 7)),
        ((1, 2, 4, 6, 7), (2, 4, 6, 7)),
        ((1, 1, 1, 1, 1), (2, 4, 6, 7)),  # one number, and an axis more
        ((3, 1, 1), (2, 1, 6, 7)),  # three channels out of one
        ((3,), (2, 4, 1)),
        ((4, 1), (4, 6)),
        ((6, 1), (2, 3, 6, 4)),
    ],
)
@pytest.mark.parametrize("function", [lambda c, x: c * x, lambda c, x: x + c, lambda c, x: x - c, lambda c, x: x / c])
def test_constants_that_are_not_one_number_per_channel(function, constant, shape):
    child = nn.Module()
    child.tensor = nn.Parameter(torch.rand(constant, dtype=torch.float64) + 1)
    assert code(lambda m, x, y: function(m.child.tensor, x), shape, child=child) == "broadcast"


def test_a_constant_of_one_number_along_every_axis_is_one_number():
    child = nn.Module()
    child.tensor = nn.Parameter(torch.rand((1, 1, 1), dtype=torch.float64))
    assert meaning(lambda m, x, y: x * m.child.tensor, (2, 1, 6, 7), child=child).axis is None


def in_training():
    norm = nn.BatchNorm2d(4)
    norm.eval = lambda: norm
    return norm


def forgotten_statistics():
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    norm.track_running_stats = False
    return norm


@pytest.mark.parametrize(
    ("expected", "module"),
    [
        ("training-norm", in_training()),
        ("training-norm", nn.BatchNorm2d(4, track_running_stats=False)),
        ("training-norm", nn.InstanceNorm2d(4)),
        ("training-norm", forgotten_statistics()),
        ("input-statistics", nn.GroupNorm(2, 4)),
        ("input-statistics", nn.LayerNorm(7)),
        ("input-statistics", nn.RMSNorm(7)),
        ("pool-padding", nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        ("pool-ceil", nn.AvgPool2d(2, ceil_mode=True)),
    ],
)
def test_refused_modules(expected, module):
    assert code(lambda m, x, y: m.child(x), child=module) == expected


@pytest.mark.parametrize("observes", [False, True])
def test_fake_quantising_modules_are_refused_as_values_and_as_weights(observes):
    def rounds():
        observer = quantization.MovingAverageMinMaxObserver
        module = quantization.FakeQuantize(observer, -128, 127, dtype=torch.qint8)
        module(torch.randn(9))
        module.apply(quantization.enable_observer if observes else quantization.disable_observer)
        return module

    assert code(lambda m, x, y: m.child(x), child=rounds()) == "fake-quantised"
    assert code(lambda m, x, y: F.conv2d(x, m.child(m.kernel2) * 2), child=rounds()) == "fake-quantised"


# --- opaque: nothing that repfuse merges, and nothing to tell the user either


OPAQUE = [
    lambda m, x, y: x * y,
    lambda m, x, y: torch.addcmul(x, x, y),
    lambda m, x, y: torch.addcmul(m.image, y, m.image, value=2),
    lambda m, x, y: torch.addcmul(x, y, m.image, value=math.inf),
    lambda m, x, y: torch.addcmul(x, m.image, m.column),
    lambda m, x, y: x.index_select(1, (x.mean((0, 2, 3)) > 9).long()),
    lambda m, x, y: x[:, (x.mean((0, 2, 3)) > 9).long()],
    lambda m, x, y: x.repeat_interleave(2, 2),
    lambda m, x, y: x.repeat_interleave(2),
    lambda m, x, y: x.repeat_interleave(torch.tensor([1, 0, 2, 1]), 1),
    lambda m, x, y: y / x,
    lambda m, x, y: 1 / x,
    lambda m, x, y: x / 0,
    lambda m, x, y: x + True,
    lambda m, x, y: x + float("inf"),
    lambda m, x, y: x * float("nan"),
    lambda m, x, y: torch.div(x, 2, rounding_mode="floor"),
    lambda m, x, y: x + x.size(2),
    lambda m, x, y: x * (1 + x.size(2) // 64),
    lambda m, x, y: x * (1 + x.size(2) % 64 // 63),
    lambda m, x, y: torch.add(x, y, alpha=x.size(2)),
    lambda m, x, y: torch.lerp(x, m.image, m.scalar),
    lambda m, x, y: torch.lerp(x, y, y),
    lambda m, x, y: torch.cat([x, y], 0),
    lambda m, x, y: torch.cat([x, y], 2),
    lambda m, x, y: torch.cat([x, m.image.expand(2, 4, 6, 7)], 1),
    lambda m, x, y: x.chunk(2, 0)[0],
    lambda m, x, y: x.chunk(2, 2)[0],
    lambda m, x, y: x.roll(1),
    lambda m, x, y: torch.ops.aten.roll.default(x, [1]),
    lambda m, x, y: x.roll(x.size(2), 1),
    lambda m, x, y: x[:, 0, :2],
    lambda m, x, y: x[1:],
    lambda m, x, y: x[:, None],
    lambda m, x, y: x[:, [True, False, True, False]],
    lambda m, x, y: x[:, :, [0, 1]],
    lambda m, x, y: x[:, :2, 1:-1],
    lambda m, x, y: x[[0, 1], [1, 2]],
    lambda m, x, y: x.narrow(0, 0, 1),
    lambda m, x, y: x.narrow(1, 0, 0),
    lambda m, x, y: x.narrow(1, 0, 2 + x.size(3) // 64),
    lambda m, x, y: x[:, : 2 + x.size(3) // 64],
    lambda m, x, y: F.pad(x, (0, 0, 0, 0, 1, 1)),
    lambda m, x, y: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1)),
    lambda m, x, y: F.pad(x, (0, x.size(2) % 2, 0, 0)),
    lambda m, x, y: F.pad(x, (0, x.size(2) // 64, 0, 0)),
    lambda m, x, y: F.pad(x, (1, 1), value=float("-inf")),
    lambda m, x, y: F.dropout(x, 0.0, True),
    lambda m, x, y: F.dropout(x, 0.0),
    lambda m, x, y: F.adaptive_max_pool2d(x, 1),
    lambda m, x, y: F.max_pool2d(x, 2),
    lambda m, x, y: F.avg_pool2d(x[0], 3, 1),
    lambda m, x, y: F.conv_transpose2d(x, m.kernel2[:4], stride=9, output_padding=x.size(0)),
    lambda m, x, y: torch.cat([x, y]),
    lambda m, x, y: x.chunk(2)[0],
    lambda m, x, y: x.chunk(y.size(0), 1)[0],
    lambda m, x, y: torch.add(x, y, alpha=y.size(0)),
    lambda m, x, y: torch.sub(x, y, alpha=y.size(0)),
    lambda m, x, y: torch.rsub(x, y, alpha=y.size(0)),
    lambda m, x, y: F.relu(x),
    lambda m, x, y: x @ y.transpose(2, 3),
    lambda m, x, y: m.image * 2 + m.column,
    lambda m, x, y: F.conv2d(m.image, m.kernel2[..., :1, :1]),
    lambda m, x, y: torch.add(x, y, out=torch.empty(2, 4, 6, 7, dtype=torch.float64)),
]


@pytest.mark.parametrize("function", OPAQUE)
def test_opaque(function):
    assert meaning(function, SHAPE) is None


def test_a_constant_that_is_written_in_place_is_not_a_shift():
    assert meaning(lambda m, x, y: m.image.clone().addcmul_(x, m.single), (1, 4, 1, 1)) is None


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Flatten()])
def test_opaque_modules(module):
    assert meaning(lambda m, x, y: m.child(x), SHAPE, child=module) is None


def test_a_product_with_a_rounded_matrix_is_refused():
    def rounded(m):
        return torch.fake_quantize_per_tensor_affine(m.matrix, 0.5, 0, -128, 127).t()

    assert code(lambda m, x, y: x @ rounded(m), (2, 4)) == "fake-quantised"
    assert code(lambda m, x, y: torch.addmm(m.matrix_bias, x, rounded(m)), (2, 4)) == "fake-quantised"


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: torch.addmm(m.matrix_bias, x, m.matrix.t(), beta=2),
        lambda m, x, y: torch.addmm(m.matrix_bias, x, m.matrix.t(), alpha=2),
        lambda m, x, y: torch.addmm(m.matrix_bias * y.mean(), x, m.matrix.t()),
    ],
)
def test_a_scaled_product_is_opaque(function):
    assert meaning(function, (2, 4)) is None


def test_instance_normalisation_without_a_batch_axis_is_opaque():
    norm = nn.InstanceNorm1d(4, track_running_stats=True)
    assert not isinstance(meaning(lambda m, x, y: m.child(x), (4, 5), child=norm), Scaled)


def test_an_operator_of_another_library_is_opaque_whatever_its_name():
    library = torch.library.Library("repfuse_tests", "DEF")
    library.define("neg(Tensor x) -> Tensor")
    library.impl("neg", lambda x: x * 3, "CompositeExplicitAutograd")
    found = read(Network(lambda m, x, y: torch.ops.repfuse_tests.neg.default(x)), torch.ones(SHAPE).double())
    assert found.meaning is None


def test_rounding_channel_by_channel_is_refused():
    def rounded(m, x, y):
        scale, zero = torch.ones(4), torch.zeros(4, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(x.float(), scale, zero, 1, -128, 127)

    said = read(Network(rounded), torch.ones(SHAPE).double()).meaning
    assert isinstance(said, Unfusible) and said.code == "fake-quantised"


def test_a_part_without_channels_means_nothing():
    found = read(Network(lambda m, x, y: x.split([4, 0], 1)[1]), torch.ones(SHAPE).double())
    assert found.meaning is None


def test_a_pad_of_four_axes_is_opaque():
    assert meaning(lambda m, x, y: F.pad(x, (1, 1)), (2, 4, 2, 3, 2, 3)) is None


def test_a_constant_that_is_changed_in_place_means_nothing():
    assert meaning(lambda m, x, y: (m.image * 1).mul_(x), (1, 4, 1, 1)) is None
    assert meaning(lambda m, x, y: (m.image * 1).add_(x), (1, 4, 1, 1)) is None


def test_a_transposed_convolution_whose_wanted_size_varies_is_opaque():
    layer = nn.ConvTranspose2d(4, 4, 1, stride=2)
    even = lambda n: n * 2 - n % 2  # noqa: E731
    assert meaning(lambda m, x, y: m.child(x, [even(y.size(2)), even(y.size(3))]), SHAPE, child=layer) is None


def test_a_list_of_tensors_is_no_tensor():
    class Takes(nn.Module):
        def forward(self, x):
            return x[0] + x[1]

    found = record(Takes(), Arguments(([torch.ones(SHAPE), torch.ones(SHAPE)],)))
    parts = [meaning_of(node, found) for node in found.nodes]
    assert parts[:3] == [None, None, None]
    assert isinstance(parts[3], Sum)


def test_a_convolution_whose_class_does_more_means_nothing_itself():
    class Squared(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) ** 2

    assert meaning(lambda m, x, y: m.child(x), SHAPE, child=Squared(4, 4, 1)) is None


def test_a_value_of_parameters_alone_means_nothing_itself():
    def function(m, x, y):
        return x * torch.fake_quantize_per_tensor_affine(m.image, 0.5, 0, -128, 127)

    assert read(Network(function), torch.ones(SHAPE).double()).of("fake_quantize_per_tensor_affine") is None


@pytest.mark.parametrize(
    ("dim", "axis"), [(0, None), (1, 1), (2, None), (3, 3), (-1, 3), (-2, None), (-3, 1), (-4, None)]
)
def test_channels_are_on_axis_1_or_on_the_last(dim, axis):
    """Counted from either end, of a network that takes this size alone."""
    found = meaning(lambda m, x, y: torch.cat((x.reshape(2, 4, 5, 4), y), dim), (2, 4, 5, 4))
    assert (found.axis if isinstance(found, Joined) else None) == axis


def test_the_only_axis_of_a_vector_holds_no_channels():
    assert meaning(lambda m, x, y: torch.cat((x.reshape(4), y), 0), (4,)) is None


# --- what the refused meanings would have changed


def difference(function, shape, wrong):
    """Return how far the function is from another that its refused meaning would be."""
    torch.default_generator.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    network = Network(function)
    one, other = network(x, x), wrong(network, x)
    return None if one.shape != other.shape else (one - other).abs().max().item()


def test_a_pool_that_does_not_count_its_padding_is_wrong_at_the_border_as_a_filter():
    def wrong(m, x):
        return F.avg_pool2d(x, 3, 1, 1)

    assert difference(POOL_AT_BORDER, SHAPE, wrong) > 0.1


def test_a_pool_rounded_up_has_another_size_or_another_divisor():
    def wrong(m, x):
        return F.avg_pool2d(x, 3, 2, 1)

    assert difference(POOL_ROUNDED_UP, (1, 4, 7, 7), wrong) < 1e-12  # nothing shows at this size
    assert difference(POOL_ROUNDED_UP, (1, 4, 8, 8), wrong) is None


@pytest.mark.parametrize(("kernel", "stride"), itertools.product(range(1, 6), range(1, 5)))
def test_ceil_mode_is_refused_exactly_where_it_matters_for_some_size(kernel, stride):
    for padding in range(kernel // 2 + 1):
        matters = False
        for size in range(max(kernel - 2 * padding, 1), 40):
            x = torch.rand(1, 1, size, dtype=torch.float64)
            floor, ceil = (F.avg_pool1d(x, kernel, stride, padding, ceil_mode=up) for up in (False, True))
            matters |= floor.shape != ceil.shape or not torch.allclose(floor, ceil, rtol=1e-12)
        found = meaning(lambda m, x, y, p=padding: F.avg_pool1d(x, kernel, stride, p, True), (2, 4, 13))
        assert (isinstance(found, Unfusible) and found.code == "pool-ceil") is matters


def test_a_slice_up_to_a_position_is_a_crop_at_the_example_only():
    def wrong(m, x):
        return x[:, :, :-3]  # what [:, :, :3] is at size 6

    assert difference(lambda m, x, y: x[:, :, :3], (2, 4, 6, 7), wrong) == 0
    assert difference(lambda m, x, y: x[:, :, :3], (2, 4, 7, 7), wrong) is None


def test_a_shift_of_a_rounded_weight_is_visible():
    def wrong(m, x):
        return F.conv2d(x, m.kernel2)

    def rounds(m, x, y):
        return F.conv2d(x, torch.fake_quantize_per_tensor_affine(m.kernel2, 0.5, 0, -128, 127))

    assert difference(rounds, SHAPE, wrong) > 0.1


# --- what holds at the sizes of the recordings only


class Scales(nn.Module):
    """A sum of a convolution and a multiple of its input, by a number that depends on the height."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x) + x * self.factor(x.shape[2])


@torch.no_grad()
def same_after_fusing(model, example, *others):
    fused = repfuse.fuse(model.double().eval(), (example,)).module
    for x in (example, *others):
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "factor",
    [
        lambda h: 1 + h // 64,
        lambda h: 1 + (h >> 6),
        lambda h: 1 + int(h / 64),
        lambda h: 1 + float(h) // 64,
        lambda h: math.ceil(h / 64),
        lambda h: 1 + round(h / 100),
        lambda h: 1 + h**2 // 4096,
        lambda h: 1 + min(h, 64) // 64,
    ],
)
def test_a_number_that_is_computed_from_a_size_is_not_taken_for_the_same_at_all_sizes(factor):
    same_after_fusing(Scales(factor), *(torch.randn(2, 4, n, n, dtype=torch.float64) for n in (8, 70)))


class Windows(nn.Module):
    """Takes multiples of 7 only, and mixes all pixels of an image."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        y = (self.one(x) + self.other(x)).flatten(2).transpose(1, 2)
        y = y.reshape(-1, h * w, 8).softmax(1)
        return y.view(n, h // 7, 7, w // 7, 7, 8).sum((2, 4))


def test_a_number_of_pixels_is_not_fixed_where_recordings_happen_to_have_equally_many():
    sizes = (14, 14), (28, 7), (28, 28), (7, 7)
    same_after_fusing(Windows(), *(torch.randn(2, 4, *size, dtype=torch.float64) for size in sizes))


class Decides(nn.Module):
    """Looks at numbers that it computes from parameters."""

    def __init__(self, positive):
        super().__init__()
        self.positive = positive
        self.a, self.b = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(8, 4))
        self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.conv(x) + self.other(x)
        return y * 2 if self.positive(self.a.detach(), self.b.detach()) else y


@pytest.mark.parametrize(
    "positive",
    [
        lambda a, b: F.linear(a, b).mean() > 0.5,
        lambda a, b: (a + b).mean() > 0.5,
        lambda a, b: torch.relu(a).sum() > 1,
    ],
)
def test_numbers_computed_from_parameters_are_really_computed_before_a_decision(positive):
    for _ in range(3):
        same_after_fusing(Decides(positive), torch.randn(2, 4, 6, 7, dtype=torch.float64))


class LooksUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.table = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Embedding(10, 3)

    def forward(self, x):
        return self.table((torch.sigmoid(self.norm(self.conv(x))) * 9).long())


def test_a_table_in_which_results_are_looked_up_does_not_stop_a_recording():
    for _ in range(3):
        same_after_fusing(LooksUp(), torch.randn(2, 4, 6, 7, dtype=torch.float64))


class Signal(nn.Module):
    """A small network of signals, N x C x L."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv1d(6, 8, 3, padding=1), nn.Conv1d(6, 8, 1)

    def forward(self, x):
        return (self.one(x) + self.other(x)).reshape(-1, 8, x.size(2)).softmax(-1)


@pytest.mark.parametrize("shape", [(2, 6, 20), (1, 6, 64)])
def test_the_length_of_a_signal_is_tried_in_a_small_network_too(shape):
    same_after_fusing(Signal(), *(torch.randn(each, dtype=torch.float64) for each in (shape, (2, 6, 40), (3, 6, 33))))
