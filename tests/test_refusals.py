"""Every refusal has models that get it and still compute the same, and a text that people can read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from blocks import RepVGG, Spelled, SpelledOfTwo, conv, norm, pair, pair_of_two
from support.agreement import error, image, randomised
from torch import nn
from torch.ao.quantization import FakeQuantize
from torch.nn import functional as F

from repfuse.explanations import REFUSALS
from repfuse.fusing import fuse
from repfuse.plans import Policy

INPUTS = (image(2, 4, 6, 7), image(2, 4, 6, 7, seed=1))
ROWS, INDICES = image(2, 5, 4), torch.arange(10).view(2, 5) % 9


class Variadic(RepVGG):
    def forward(self, *xs):
        return super().forward(xs[0]) + xs[1]


class Mapping(dict):
    """A result of a class of its own."""


class Mapped(RepVGG):
    def forward(self, x):
        return Mapping(x=super().forward(x))


class AlwaysTraining(nn.BatchNorm2d):
    """Stays in training mode, as some detectors' normalisations do."""

    def train(self, mode=True):
        return super().train(True)


class Scaled(RepVGG):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Reaching(nn.Module):
    """Its forward uses a parameter of another module."""

    def __init__(self, owner):
        super().__init__()
        self.a, self.b, self.owner = conv(3), conv(1), [owner]

    def forward(self, x):
        return F.relu(self.a(x) + self.b(x)) * self.owner[0].scale


def reaching():
    model = Spelled(lambda m, x: torch.sin(m.block(x)))
    model.scale = nn.Parameter(torch.ones(1))
    model.block = Reaching(model)
    return model


def pair_with_a_graph():
    model = pair(lambda m, x: torch.sin(m.graph(m.a(x) + m.b(x))))
    model.graph = nn.Linear(7, 7)
    return model


def hooked():
    model = nn.Sequential(conv(), norm())
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    return model


def hooked_block():
    model = nn.Sequential(RepVGG(), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


def shared(*calls):
    """A block that is called several times; each call says how."""
    return Spelled(lambda m, x: sum(torch.sin(call(m.block, x)) for call in calls), block=Scaled())


def cost_trap():
    """A wide grouped branch beside a wide pointwise one: a dense 5x5 would be far more work."""
    return Spelled(lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(64, 64, 5, padding=2, groups=64), b=nn.Conv2d(64, 64, 1))


def huge_factor():
    """Of tiny values: no value of the model overflows, only the product of its weights would."""
    model = Spelled(lambda m, x: m.a(torch.sigmoid(x - 400)) * m.huge * m.huge, a=conv(bias=False))
    model.register_buffer("huge", torch.tensor(1e200, dtype=torch.float64))
    return model


def of(code: str, name: str, make: Callable[[], nn.Module], *inputs: torch.Tensor):
    return pytest.param(code, make, inputs or INPUTS[:1], id=f"{code}: {name}")


def two_heads():
    """A network that averages two heads in its own forward."""
    return Spelled(
        lambda m, x: _averaged(m, m.body(x).mean((2, 3))),
        body=nn.Sequential(*[RepVGG() for _ in range(9)]),
        one=nn.Linear(4, 3),
        other=nn.Linear(4, 3),
    )


def _averaged(m, x):
    return (m.one(x) + m.other(x)) / 2


PRODUCERS = [
    of("broadcast", "a row added", lambda: pair(lambda m, x: m.a(x) + m.b(x[:, :, :1]))),
    of("broadcast", "one channel", lambda: pair_of_two(lambda m, x, y: m.a(x) + y), INPUTS[0], image(2, 1, 6, 7)),
    of("called-differently", "constants", lambda: shared(lambda b, x: b(x, 2.0), lambda b, x: b(x, 3.0))),
    of("called-differently", "same twice", lambda: shared(lambda b, x: b(x, x), lambda b, x: b(torch.sin(x), x))),
    of(
        "called-differently",
        "the same under two names",
        lambda: Spelled(
            _two_names, block=pair_of_two(lambda m, x, y: torch.sin(m.a(y) + m.b(y)) * x), same=nn.Identity()
        ),
    ),
    of("called-differently", "one result escapes", lambda: Spelled(_escaping_once, block=pair(_sum))),
    of("channel-mismatch", "no batch axis", lambda: pair(lambda m, x: m.a(x) + x), image(4, 6, 7)),
    of(
        "channel-mismatch",
        "a norm along another axis",
        lambda: nn.Sequential(nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6)),
        image(6, 6),
    ),
    of("overflow", "a huge factor", huge_factor),
    of("padding-between", "two padded convolutions", lambda: nn.Sequential(conv(3, bias=False), conv(3))),
    of("padding-between", "a cropped map", lambda: pair(lambda m, x: m.a(m.b(x)[:, :, 1:-1]))),
    of("computed-weight", "functional", lambda: pair(lambda m, x: F.conv2d(x, m.b.weight * x.mean()) + m.b(x))),
    of("computed-weight", "a dynamic kernel alone", lambda: pair(_dynamic)),
    of("computed-weight", "random", lambda: pair(_random_weight)),
    of("computed-weight", "norm", lambda: Spelled(_computed_norm, a=conv(), n=norm())),
    of("cost", "grouped and dense", cost_trap, image(1, 64, 16, 16)),
    of("differs", "its class is asked", lambda: Spelled(_by_class, block=pair(_sum))),
    of("fake-quantised", "an activation", lambda: nn.Sequential(conv(), FakeQuantize(), norm())),
    of("embedding", "a table, linear", lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), INDICES),
    *(
        of("input-statistics", f"{name}, linear", lambda kind=kind: nn.Sequential(kind(4), nn.Linear(4, 3)), ROWS)
        for name, kind in (("LayerNorm", nn.LayerNorm), ("RMSNorm", nn.RMSNorm))
    ),
    of("input-statistics", "GroupNorm, 1x1", lambda: nn.Sequential(nn.GroupNorm(2, 4), conv(1))),
    of("hooks", "on a norm", hooked),
    of("hooks", "on a block", hooked_block),
    of("in-place", "a source", lambda: pair(_written_between)),
    of("no-convolution", "skip and norm", lambda: Spelled(lambda m, x: x + m.n(x), n=norm())),
    of("outermost-class", "two heads averaged", two_heads, image(1, 4, 32, 32)),
    of("outer-reference", "to the outside", reaching),
    of("outer-reference", "from the outside", lambda: Spelled(_weight_elsewhere, block=pair(_sum))),
    of("outer-reference", "a child elsewhere", lambda: Spelled(_child_elsewhere, block=pair(_sum))),
    of(
        "padding-mode",
        "reflect + 1x1",
        lambda: Spelled(lambda m, x: m.a(x) + m.b(x), a=conv(3, padding_mode="reflect"), b=conv(1)),
    ),
    of("policy", "layers in a row", lambda: nn.Sequential(conv(), conv(1))),
    of("pool-ceil", "stride 2", lambda: pair(lambda m, x: F.avg_pool2d(m.b(x), 2, 2, ceil_mode=True))),
    of("pool-padding", "beside a convolution", lambda: pair(_uncounted)),
    of("reserved-name", "graph", pair_with_a_graph),
    of("several-sources", "norm of a sum", lambda: Spelled2(lambda m, x, y: m.n(m.a(x) + y)), *INPUTS),
    of("shift-before-padding", "norm, 3x3", lambda: nn.Sequential(norm(), conv(3))),
    of("shift-before-padding", "norm, pad, 3x3", lambda: nn.Sequential(norm(), nn.ZeroPad2d(1), conv(3, padding=0))),
    of("size-dependent-slice", "the first rows", lambda: pair(lambda m, x: m.b(x[:, :, :4]))),
    of(
        "size-mismatch",
        "equal for even inputs",
        lambda: Spelled(
            lambda m, x: m.a(x) + m.b(x), a=conv(3, stride=2), b=nn.Conv2d(4, 4, 2, stride=2, padding=(0, 0))
        ),
        image(1, 4, 6, 6),
    ),
    of(
        "stride-mismatch",
        "equal at one pixel",
        lambda: Spelled(lambda m, x: m.a(x) + m.b(x), a=conv(1), b=conv(1, stride=2)),
        image(1, 4, 1, 1),
    ),
    of("structured-arguments", "any number", lambda: Spelled(lambda m, x: torch.sin(m.block(x, x)), block=Variadic())),
    of("structured-arguments", "OrderedDict", lambda: pair(lambda m, x: OrderedDict(y=torch.sin(m.a(x) + m.b(x))))),
    of("structured-arguments", "own result", lambda: Spelled(lambda m, x: torch.sin(m.block(x)["x"]), block=Mapped())),
    of("training-norm", "training", lambda: nn.Sequential(conv(), AlwaysTraining(4))),
    of("training-norm", "no statistics", lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False))),
    of("transposed-convolution", "and a stride", lambda: pair(_transposed)),
    of("autocast", "a region", lambda: pair(_in_autocast)),
    of("changes-with-size", "another function", lambda: pair(_windowed)),
    of("decides-by-size", "a threshold", lambda: pair(_large_ones_apart)),
    of("decides-by-value", "the sign", lambda: pair(_by_sign)),
    of("unseen-operation", "an array", lambda: pair(_made_elsewhere)),
    of("writes-state", "what it computed", lambda: pair(_stored)),
    of("writes-state", "a count", lambda: pair(_counted)),
    of("value-escapes", "a branch", lambda: pair(_escaping)),
]


def _sum(m, x):
    return m.a(x) + m.b(x)


def _by_class(m, x):
    return torch.sin(m.block(x)) * (2 if type(m.block) is Spelled else 1)


def _in_autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.a(x) + m.b(x)


def _windowed(m, x):
    y = m.a(x) + m.b(x)
    return y.relu() if x.size(2) % 2 else y.sin()


def _large_ones_apart(m, x):
    y = m.a(x) + m.b(x)
    return y if x.size(2) < 5000 else y.relu()


def _by_sign(m, x):
    y = m.a(x) + m.b(x)
    return y if y.mean() > 0 else -y


def _made_elsewhere(m, x):
    return m.a(x) + m.b(x) + torch.from_numpy(np.ones((4, 1, 1)))


def _stored(m, x):
    m.features = m.a(x) + m.b(x)
    return torch.sin(m.features)


def _counted(m, x):
    m.count = getattr(m, "count", 0) + 1
    return m.a(x) + m.b(x)


def _written_between(m, x):
    first = m.a(x)
    x.relu_()
    return first + m.b(x)


def _escaping(m, x):
    y = m.a(x)
    return y + m.b(x) + torch.sin(y)


def _two_names(m, x):
    return m.block(x, m.same(x)) + m.block(torch.sin(x), torch.cos(x))


def _escaping_once(m, x):
    y = m.block(x) + m.block.b(x)
    return y + torch.sin(m.block(y))


def _transposed(m, x):
    return F.conv2d(F.conv_transpose2d(x, m.b.weight, stride=2), m.b.weight, stride=2) + m.b(x)


def _uncounted(m, x):
    return m.a(x) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _dynamic(m, x):
    batch = x.size(0)
    kernels = m.a.weight * torch.sigmoid(x.mean((2, 3))).view(batch, 1, 4, 1, 1)
    of_all = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), groups=batch)
    return torch.sin(of_all.view(batch, -1, *of_all.shape[2:]))


def _random_weight(m, x):
    return F.conv2d(x, m.b.weight + 0 * torch.rand_like(m.b.weight)) + m.b(x)


def _computed_norm(m, x):
    return F.batch_norm(m.a(x), m.n.running_mean, x.var((0, 2, 3)), m.n.weight, m.n.bias)


def _weight_elsewhere(m, x):
    return torch.sin(m.block(x.to(m.block.a.weight.dtype)))


def _child_elsewhere(m, x):
    return torch.sin(m.block(x)) + torch.sin(m.block.a(torch.sin(x)))


class Spelled2(SpelledOfTwo):
    """Of two inputs, with a convolution and a normalisation."""

    def __init__(self, forward):
        super().__init__(forward, a=conv(), n=norm())


@pytest.mark.parametrize(("code", "make", "inputs"), PRODUCERS)
def test_refused(code, make, inputs):
    model = randomised(make())
    result = fuse(model, inputs, Policy.NEVER_COMPOSE if code == "policy" else Policy.COST)
    assert code in {refusal.code for refusal in result.plan.refusals}
    assert error(model, result.module, *inputs) < 1e-12


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3)), ROWS),
        (lambda: nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4)), INDICES),
        (lambda: Spelled(lambda m, x: m.e(x) + m.f(x), e=nn.Embedding(9, 4), f=nn.Embedding(9, 4)), INDICES),
        (lambda: Spelled(lambda m, x: (x @ x.mT).softmax(-1) @ x), ROWS),
        (lambda: conv(padding_mode="reflect"), INPUTS[0]),
        (lambda: nn.Sequential(conv(2, padding="same", padding_mode="circular"), nn.ReLU()), INPUTS[0]),
    ],
)
def test_what_stands_beside_no_layer_is_no_refusal(make, x):
    plan = fuse(randomised(make()), [x]).plan
    assert not plan.sites and not plan.refusals


def test_every_code_is_tested():
    chosen = {"excluded"}  # by the user: see test_choosing.py
    equalising = {"fixed-scale", "not-homogeneous", "unwritable-weight"}  # see test_equalizing_laws.py
    assert {parameter.values[0] for parameter in PRODUCERS} == set(REFUSALS) - chosen - equalising


@pytest.mark.parametrize("code", REFUSALS)
def test_texts_are_sentences(code):
    explanation = REFUSALS[code]
    assert explanation.title and explanation.title[0].islower() and not explanation.title.endswith(".")
    for text in (explanation.meaning, explanation.hint):
        assert text[0].isupper() and text.endswith(".") and "  " not in text and "\n" not in text


@torch.no_grad()
def test_why_a_norm_before_a_padded_convolution_is_refused():
    """Folded all the same, the interior is right and the border is wrong by the size of the shift."""
    model = randomised(nn.Sequential(norm(), conv(3)))
    folded = nn.Sequential(nn.Identity(), conv(3)).double()
    scale = model[0].weight * (model[0].running_var + model[0].eps).rsqrt()
    shift = model[0].bias - model[0].running_mean * scale
    folded[1].weight.copy_(model[1].weight * scale.view(1, -1, 1, 1))
    folded[1].bias.copy_(model[1].bias + (model[1].weight.sum((2, 3)) * shift).sum(1))
    difference = (model(INPUTS[0]) - folded(INPUTS[0])).abs()
    assert difference[..., 1:-1, 1:-1].max() < 1e-12 < 1e-1 < difference.max()
