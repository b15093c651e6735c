"""The law of each operator: with whatever scales it leaves free, a network computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import Spelled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agreement import error, image, randomised
from support.programs import EXAMPLES, STEPS, program
from support.recordings import recorded
from torch import nn
from torch.nn import functional as F

from repfuse.equalizing.laws import Freedom, Reading
from repfuse.explanations import REFUSALS
from repfuse.networks import named_tensors

X = image(2, 3, 8, 8)
LARGER = image(3, 3, 12, 10)


@torch.no_grad()
def rescaled(model: nn.Module, found: Freedom, seed: int = 0) -> nn.Module:
    """A copy whose tensors have random scales, up to 100 times as large."""
    made = copy.deepcopy(model)
    scales = torch.empty(found.count + 1, dtype=torch.float64).uniform_(-3, 3, generator=torch.manual_seed(seed)).exp()
    scales[0] = 1
    tensors = dict(named_tensors(made))
    for part in found.parts:
        tensors[part.name] *= part.factors(scales, tensors[part.name].shape)
    return made


def exact(model: nn.Module, *inputs: torch.Tensor, others: tuple[torch.Tensor, ...] = ()) -> Freedom:
    """What is free in a network, which has been tried."""
    found = Reading(recorded(model, *inputs)).run()
    for seed in range(2):
        made = rescaled(model, found, seed)
        assert error(model, made, *inputs) < 1e-12
        assert not others or error(model, made, *others) < 1e-12
    return found


def between(function, last=None, first=None) -> nn.Module:
    """A function of what a convolution gives, before another layer; it has more layers to choose from."""
    return randomised(
        Spelled(
            lambda m, x: m.b(function(m, m.a(x))),
            a=first or nn.Conv2d(3, 8, 3, padding=1),
            b=last or nn.Conv2d(8, 5, 3),
            again=nn.Conv2d(8, 8, 3, padding=1),
            depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8),
            grouped=nn.Conv2d(8, 12, 1, groups=4),
            transposed=nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
            linear=nn.Linear(8, 8),
            norm=nn.BatchNorm2d(8),
            plain_norm=nn.BatchNorm2d(8, affine=False),
            prelu=nn.PReLU(8),
            shift=nn.ParameterList([torch.empty(8, 1, 1)]),
        )
    )


def linear(inputs: int) -> nn.Linear:
    return nn.Linear(inputs, 5)


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def parted(x):
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


LAWS = {
    "relu": (8, between(lambda m, y: F.relu(y))),
    "relu in place": (8, between(lambda m, y: F.relu(y, inplace=True))),
    "relu of a part in place": (8, between(lambda m, y: (F.relu_(y[:, :3]), y)[1])),
    "leaky_relu": (8, between(lambda m, y: F.leaky_relu(y, 0.3))),
    "prelu": (8, between(lambda m, y: m.prelu(y))),
    "abs": (8, between(lambda m, y: y.abs())),
    "clamp": (8, between(lambda m, y: y.clamp(min=0))),
    "clamp_min": (8, between(lambda m, y: torch.clamp_min(y, 0))),
    "dropout": (8, between(lambda m, y: F.dropout(y, 0.5, m.training))),
    "max_pool": (8, between(lambda m, y: F.max_pool2d(y, 3, 2, 1))),
    "adaptive_max_pool": (8, between(lambda m, y: F.adaptive_max_pool2d(y, 4))),
    "avg_pool": (8, between(lambda m, y: F.avg_pool2d(y, 2))),
    "avg_pool, not counting its padding": (8, between(lambda m, y: F.avg_pool2d(y, 3, 1, 1, count_include_pad=False))),
    "adaptive_avg_pool": (8, between(lambda m, y: F.adaptive_avg_pool2d(y, 4))),
    "pad": (8, between(lambda m, y: F.pad(y, (1, 2, 0, 1)))),
    "reflect": (8, between(lambda m, y: F.pad(y, (1, 1, 1, 1), "reflect"))),
    "nearest": (8, between(lambda m, y: F.interpolate(y, scale_factor=2))),
    "bilinear": (8, between(lambda m, y: F.interpolate(y, size=(9, 9), mode="bilinear"))),
    "crop": (8, between(lambda m, y: y[:, :, 1:, 1:-1])),
    "slice": (8, between(lambda m, y: y[:, 1:7], nn.Conv2d(6, 5, 3))),
    "chunk and cat": (8, between(lambda m, y: torch.cat(y.chunk(2, 1)[::-1], 1))),
    "shuffle by views": (8, between(lambda m, y: shuffled(y))),
    "pixel_shuffle": (2, between(lambda m, y: F.pixel_shuffle(y, 2), nn.Conv2d(2, 5, 3))),
    "pixel_unshuffle": (8, between(lambda m, y: F.pixel_unshuffle(y, 2), nn.Conv2d(32, 5, 3))),
    "space to depth by views": (8, between(lambda m, y: parted(y), nn.Conv2d(32, 5, 3))),
    "flatten": (8, between(lambda m, y: y.flatten(1), linear(8 * 64))),
    "view": (8, between(lambda m, y: y.view(y.size(0), -1), linear(8 * 64))),
    "mean": (8, between(lambda m, y: y.mean((2, 3)), linear(8))),
    "amax": (8, between(lambda m, y: y.amax((2, 3)), linear(8))),
    "tokens": (8, between(lambda m, y: y.flatten(2).transpose(1, 2), linear(8))),
    "channels last": (8, between(lambda m, y: F.relu(y.permute(0, 2, 3, 1)), linear(8))),
    "a norm": (16, between(lambda m, y: m.norm(F.relu(y)))),
    "a norm without a weight": (8, between(lambda m, y: m.plain_norm(F.relu(y)))),
    "a shift": (8, between(lambda m, y: F.relu(y + m.shift[0]))),
    "a scale": (8, between(lambda m, y: F.relu(y * m.shift[0]))),
    "a depthwise layer": (16, between(lambda m, y: F.relu(m.depthwise(F.relu(y))))),
    "a grouped layer": (20, between(lambda m, y: m.grouped(F.relu(y)), nn.Conv2d(12, 5, 3))),
    "a transposed layer": (14, between(lambda m, y: F.relu(m.transposed(y)), nn.Conv2d(6, 5, 3))),
    "a residual": (8, between(lambda m, y: F.relu(y + m.again(y)))),
    "a residual with factors": (8, between(lambda m, y: 0.5 * y - m.again(F.relu(y)) * 2)),
    "the transpose of a weight": (16, between(lambda m, y: F.relu(y.mean((2, 3)) @ m.linear.weight.t()), linear(8))),
    "a matrix": (16, between(lambda m, y: F.relu(y.mean((2, 3)) @ m.linear.weight), linear(8))),
    "the same layer twice": (8, between(lambda m, y: m.again(F.relu(m.again(F.relu(y)))))),
    "what takes a size": (8, between(lambda m, y: y * m.shift[0].expand_as(y))),
    "what reads sizes": (8, between(lambda m, y: F.relu(y).view_as(y) + torch.zeros_like(y))),
}


@pytest.mark.parametrize("name", LAWS)
def test_law(name):
    count, model = LAWS[name]
    found = exact(model, X)
    assert (found.count, found.refusals) == (count, ())
    assert {"a.weight", "a.bias", "b.weight"} <= {part.name for part in found.parts}


@pytest.mark.parametrize("name", [name for name in LAWS if name not in ("flatten", "view")])
def test_law_at_another_size(name):
    exact(LAWS[name][1], X, others=(LARGER,))


def test_what_has_scales_and_what_has_none():
    """Joined, each channel has its own; multiplied, the scales of the one that has some."""
    join = Spelled(lambda m, x: m.b(torch.cat([x, F.relu(m.a(x))], 1)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(11, 5, 1))
    assert exact(randomised(join), X).count == 8
    gate = between(lambda m, y: y * torch.sigmoid(m.linear(y.mean((2, 3))))[:, :, None, None])
    found = exact(gate, X)
    assert found.count == 8 and {refusal.code for refusal in found.refusals} == {"not-homogeneous"}


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(1, 3), st.integers(0, 99))
def test_layers_of_any_groups_and_axes(groups, inputs, outputs, transposes, axes, seed):
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    plain, kind = kinds[0][axes - 1], kinds[transposes][axes - 1]
    wide = groups * inputs
    layer = kind(wide, groups * outputs, 3, 2, 1, groups=groups, bias=bool(seed % 2))
    model = nn.Sequential(plain(2, wide, 1), nn.LeakyReLU(), layer, nn.ReLU(), plain(groups * outputs, 2, 1))
    assert exact(randomised(model, seed), image(2, 2, *[5] * axes)).count == wide + groups * outputs


@settings(max_examples=settings().max_examples // 3, suppress_health_check=list(HealthCheck))
@given(STEPS, st.sampled_from(EXAMPLES), st.lists(st.integers(0, 8), max_size=2))
def test_random_networks(steps, shapes, also):
    inputs = [image(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    exact(randomised(program(steps, inputs, also)), *inputs)


# What has no law


REFUSED = [
    *(("not-homogeneous", f) for f in (F.relu6, torch.sigmoid, F.silu, F.gelu, F.elu, F.hardswish, torch.exp)),
    *(("not-homogeneous", f) for f in (lambda y: y.softmax(1), lambda y: F.group_norm(y, 2), lambda y: y + 1)),
    *(
        ("not-homogeneous", f)
        for f in (lambda y: y * y, lambda y: y.clamp(-1, 1), lambda y: F.pad(y, (1, 1), value=1.0))
    ),
    *(("not-homogeneous", f) for f in (lambda y: y.flip(1).cumsum(1), lambda y: y.amax(1, True) + y)),
    ("not-homogeneous", lambda y: y / y.mean((2, 3), keepdim=True)),
    ("not-homogeneous", lambda y: F.prelu(y, y.mean((0, 2, 3)))),
    ("decides-by-value", lambda y: y if y.mean() > 0 else -y),
]


@pytest.mark.parametrize(("code", "function"), REFUSED)
def test_refused(code, function):
    found = exact(between(lambda m, y: function(y)), X)
    assert found.count == 0 and {refusal.code for refusal in found.refusals} == {code}


class Asking(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else -x


class Listing(nn.Module):
    def forward(self, x):
        return x if max(x[0].flatten().tolist()) > 1 else -x


class Keeping(nn.Module):
    def forward(self, x):
        self.kept = x
        return x


def chain(*between):
    return randomised(nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)))


@pytest.mark.parametrize(
    ("code", "module"), [("decides-by-value", Asking()), ("decides-by-value", Listing()), ("fixed-scale", Keeping())]
)
def test_what_is_seen_of_a_value_fixes_it_alone(code, module):
    found = exact(chain(nn.ReLU(), module), X)
    assert found.count == 8 and {refusal.code for refusal in found.refusals} == {code}


def test_a_pool_over_channels():
    """Without a batch, an image is one of three axes, of which a pool of two takes the last two."""
    layers = nn.Conv1d(3, 8, 3), nn.MaxPool2d(2), nn.Conv1d(4, 2, 1)
    assert exact(randomised(nn.Sequential(*layers)), image(2, 3, 9)).count == 0


def test_what_is_added_to_the_input_is_fixed():
    model = Spelled(lambda m, x: m.b(x + m.a(x)), a=nn.Conv2d(3, 3, 3, padding=1), b=nn.Conv2d(3, 5, 1))
    found = exact(randomised(model), X)
    assert found.count == 0 and {refusal.code for refusal in found.refusals} == {"fixed-scale"}


def computed(m, x):
    return m.b(F.relu(F.conv2d(x, m.a.weight * 2, m.a.bias)))


def read_twice(m, x):
    return m.b(F.relu(m.a(x))) * m.a.weight.mean()


def of_other_axes(m, x):
    return m.b(F.relu(m.a(x))) + F.conv2d(F.relu(m.a(x)), m.a.weight.transpose(0, 1)).mean()


def asked_for(m, x):
    return m.b(F.relu(m.a(x))) * m.a.weight.abs().max().item()


@pytest.mark.parametrize("forward", [computed, read_twice, of_other_axes, asked_for])
def test_weights_that_cannot_be_written(forward):
    found = exact(randomised(Spelled(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 5, 3))), X)
    assert found.count == 0 and "unwritable-weight" in {refusal.code for refusal in found.refusals}


def test_a_view_of_a_weight_is_not_written():
    model = chain(nn.ReLU())
    model[2].weight = nn.Parameter(model[0].weight.new_empty(0))
    model[2].weight.data = torch.randn(12, 8, 3, 3).double()[:8]
    model.view = model[2].weight.data.view(-1)
    found = exact(model, X)
    assert found.count == 0 and {refusal.code for refusal in found.refusals} == {"unwritable-weight"}


def written_into_another(m, x):
    y, z = m.a(x), m.c(x)
    torch.add(y, y, out=z)
    return m.b(z)


def multiplied_by_name(m, x):
    y = F.relu(m.a(x))
    return m.b(torch.mul(y, other=m.a(x)))


@pytest.mark.parametrize("forward", [written_into_another, multiplied_by_name])
def test_unusual_spellings(forward):
    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 5, 3), "c": nn.Conv2d(3, 8, 3)}
    exact(randomised(Spelled(forward, **layers)), X)


def both_ways(m, x):
    y = F.relu(m.a(x))
    return m.b(F.conv2d(y, m.c.weight)), m.b(F.conv_transpose2d(F.leaky_relu(m.a(x)), m.c.weight))


def test_a_weight_whose_axes_have_other_meanings_elsewhere():
    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 5, 3), "c": nn.Conv2d(8, 8, 3)}
    exact(randomised(Spelled(both_ways, **layers)), X)


def test_what_the_network_returns_is_fixed():
    model = Spelled(
        lambda m, x: (m.b(F.relu(m.a(x))), m.c(x)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 5, 3), c=nn.Conv2d(3, 2, 1)
    )
    assert exact(randomised(model), X).refusals == ()
    features = Spelled(lambda m, x: (y := F.relu(m.a(x)), m.b(y)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 5, 3))
    found = exact(randomised(features), X)
    assert found.count == 0 and {refusal.code for refusal in found.refusals} == {"fixed-scale"}


def test_a_head_that_several_levels_share_ties_them():
    """As detectors have it: what the levels give it has the same scales, and so has what it gives."""

    def forward(m, x):
        return sum(m.out(F.relu(m.head(F.relu(level(x))))).mean() for level in (m.one, m.other))

    layers = {name: nn.Conv2d(3, 8, 3) for name in ("one", "other")}
    model = Spelled(forward, **layers, head=nn.Conv2d(8, 6, 1), out=nn.Conv2d(6, 2, 1))
    assert exact(randomised(model), X).count == 8 + 6


@pytest.mark.parametrize("code", ["not-homogeneous", "fixed-scale", "unwritable-weight"])
def test_refusals_are_explained(code):
    assert code in REFUSALS
