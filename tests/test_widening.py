"""A network is run in float64 all the way, and left as it is: with all its tensors, or with each while it is used."""

from __future__ import annotations

import copy
import gc
from functools import partial

import numpy
import pytest
import torch
from blocks import C, RepVGG, Spelled, conv
from support.agreement import image, randomised
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from repfuse.checking.inputs import Trial
from repfuse.checking.rounding import rounded_once
from repfuse.checking.runs import in_float64, run, run_float64
from repfuse.networks import named_tensors

X = image(2, C, 6, 7).float()


@pytest.fixture(params=[False, True], ids=["whole", "in part"], autouse=True)
def reads_in_part(request, monkeypatch):
    """Whether parameters are made as they are read, as those of large networks are."""
    if request.param:
        monkeypatch.setattr("repfuse.memory.LARGE", 0)
        monkeypatch.setattr("repfuse.checking.runs.MUCH", 0)
    return request.param


class Recurrent(nn.Module):
    """Compares the dtypes of its input and of its weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(C, 5, batch_first=True)

    def forward(self, x):
        return self.layer(x.flatten(2).transpose(1, 2))[0]


def tied(m, x):
    return F.conv2d(F.conv2d(x, m.a.weight, padding=1), m.a.weight.transpose(0, 1), m.a.bias, padding=1)


def in_place(m, x):
    return m.a(x).mul_(m.scale).add_(m.scale.data, alpha=2).relu_()


def made_of_views(m, x):
    kernel = torch.cat([m.a.weight[:1], m.a.weight.view(C, C, 9)[1:].view(C - 1, C, 3, 3)])
    return F.linear(F.conv2d(x, kernel), m.square)


def written(m, x):
    m.count += x.mean()
    return x * m.count + m.a(x)


def written_through_a_view(m, x):
    m.state[0].copy_(x.mean())
    return m.a(x) * m.state[0] + m.state[1]


def exchanged(m, x):
    m.a.weight.data = m.a.weight.data * 2
    return m.a(x)


def under_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(m.a(x), m.square)


def a_layer(**more):
    return {"a": nn.Conv2d(C, C, 3, padding=1), **more}


def buffer(*shape):
    return nn.Parameter(torch.rand(*shape), requires_grad=False)


NETWORKS = {
    "a block": RepVGG,
    "layers": lambda: nn.Sequential(conv(), nn.GELU(), nn.Flatten(), nn.Linear(C * 42, 3)),
    "weight norm": lambda: parametrizations.weight_norm(conv(bias=True)),
    "attention": lambda: nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(42, 2, 16, batch_first=True)),
    "one weight, twice": lambda: Spelled(tied, **a_layer()),
    "in place": lambda: Spelled(in_place, **a_layer(scale=buffer(1, C, 1, 1))),
    "views": lambda: Spelled(made_of_views, **a_layer(square=buffer(5, 5))),
    "compares dtypes": Recurrent,
    "writes": lambda: Spelled(written, **a_layer(count=buffer(1))),
    "writes through a view": lambda: Spelled(written_through_a_view, **a_layer(state=buffer(2))),
    "exchanges its weights": lambda: Spelled(exchanged, **a_layer()),
    "a script": lambda: nn.Sequential(torch.jit.script(conv()), conv(bias=True)),
    "autocast": lambda: Spelled(under_autocast, **a_layer(square=buffer(5, 7))),
}
CHANGES = {
    "exact": in_float64,
    "rounded": rounded_once(1, frozenset(["a.bias"])),
}


def outcomes(name, change, dtype):
    network = randomised(NETWORKS[name](), dtype=dtype)
    trials = [Trial("first", (X.to(dtype),)), Trial("second", (X[:1].to(dtype) * 3,))]
    return network, trials, run_float64(network, trials, CHANGES[change])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_gives_what_the_network_does_whose_tensors_were_made_double(name, dtype):
    network, trials, found = outcomes(name, "exact", dtype)
    double = copy.deepcopy(network).double()
    for trial, outcome in zip(trials, found, strict=True):
        assert not outcome.error, outcome.error
        expected = double(trial.inputs[0].double())  # attention has another kernel where nothing looks on
        torch.testing.assert_close(outcome.outputs["out"], expected, rtol=1e-13, atol=1e-13)


CASTS = {
    "a method": lambda m, x: m.a(x.float().half().to(torch.float32)),
    "a type": lambda m, x: m.a(x.type(torch.float32).type("torch.HalfTensor").to(m.a.weight)),
    "by another": lambda m, x: m.a(x.to(torch.zeros(1, dtype=torch.float16)).type_as(m.a.weight)),
    "an argument": lambda m, x: m.a(x.softmax(1, dtype=torch.float32)),
    "of ATen": lambda m, x: m.a(torch.ops.aten._to_copy.default(x, dtype=torch.float32)),
    "into what numbers made": lambda m, x: m.a(_filled(torch.zeros(x.shape, dtype=torch.float32), x)),
}


def _filled(y, x):
    y[:] = x
    return y


@torch.no_grad()
@pytest.mark.parametrize("name", CASTS)
def test_casts_of_what_is_computed_from_the_inputs_are_left_out(name):
    network = randomised(Spelled(CASTS[name], **a_layer()), dtype=torch.float32)
    (outcome,) = run_float64(network, [Trial("", (X,))])
    x = X.double()
    expected = network.a.double()(x.softmax(1) if name == "an argument" else x)
    assert torch.equal(outcome.outputs["out"], expected), outcome.error


@torch.no_grad()
def test_a_cast_of_weights_alone_stays():
    network = randomised(
        Spelled(lambda m, x: F.conv2d(x, m.a.weight.half(), m.a.bias), **a_layer()), dtype=torch.float32
    )
    (outcome,) = run_float64(network, [Trial("", (X,))])
    expected = F.conv2d(X.double(), network.a.weight.half().double(), network.a.bias.double())
    assert torch.equal(outcome.outputs["out"], expected), outcome.error


def counted(m, x):
    m.calls[0] += 1
    m.index.view(-1).add_(1)
    return m.a(x) * m.calls


WRITING = {**{name: NETWORKS[name] for name in ("writes", "writes through a view", "exchanges its weights")}}
WRITING["counts"] = lambda: Spelled(counted, **a_layer(calls=buffer(1)))


def takes_statistics(m, x):
    return F.batch_norm(m.a(x), m.mean, m.variance, training=True)


def reads_statistics(m, x):
    return takes_statistics(m, x) * m.mean.view(-1, 1, 1)


def writes_an_array(m, x):
    m.calls.numpy()[:] += 1
    return m.a(x) * m.calls


def writes_a_shared_array(m, x):
    numpy.asarray(m.calls)[:] += 1
    return m.a(x) * m.calls


def clamps_its_weight(m, x):
    m.a.weight.data.clamp_(-0.5, 0.5)
    return m.a(x)


def clamped_channels_last(m, x):
    assert m.a.weight.is_contiguous(memory_format=torch.channels_last)
    return clamps_its_weight(m, x)


def scales_a_view(m, x):
    m.a.weight.view(-1)[:7].mul_(2)
    return m.a(x)


def writes_a_weight_as_an_array(m, x):
    numpy.asarray(m.a.weight)[:] *= 2
    return m.a(x)


def scales_all(m, x):
    for each in m.parameters():
        each.mul_(2)
    return m.a(x)


def applies(m, x):
    m.a.bias.detach().apply_(lambda number: number + 1)
    return m.a(x)


def maps(m, x):
    m.a.bias.detach().map_(m.a.bias.detach(), lambda number, other: number + other)
    return m.a(x)


def scales_by_all_numbers(m, x):
    return m.a(x) * sum(abs(number) for each in m.parameters() for number in each.flatten().tolist())


def makes_its_weights_anew(m, x):
    """What stood in their places is gone, and something else may come to lie there."""
    for layer in (m.a, m.b, m.c):
        weight = layer.weight * 2
        del layer.weight
        layer.weight = nn.Parameter(weight)
    return m.c(m.b(m.a(x)))


WRITING |= {
    f.__name__: partial(Spelled, f, **a_layer())
    for f in (clamps_its_weight, scales_a_view, writes_a_weight_as_an_array, scales_all, applies, maps)
}
WRITING["scales_by_all_numbers"] = partial(Spelled, scales_by_all_numbers, **a_layer())
WRITING["makes_its_weights_anew"] = lambda: Spelled(
    makes_its_weights_anew, **{name: nn.Conv2d(C, C, 1) for name in "abc"}
)
WRITING["channels last"] = lambda: Spelled(clamped_channels_last, **a_layer()).to(memory_format=torch.channels_last)
for f in (takes_statistics, reads_statistics):
    WRITING[f.__name__] = partial(Spelled, f, **a_layer(mean=buffer(C), variance=buffer(C)))
PAST_OPERATORS = (writes_an_array, writes_a_shared_array)
WRITING |= {f.__name__: partial(Spelled, f, **a_layer(calls=buffer(1))) for f in PAST_OPERATORS}


@pytest.mark.parametrize("runs", [run_float64, partial(run, cast={})], ids=["in float64", "as stored"])
@pytest.mark.parametrize("name", WRITING)
def test_the_network_itself_is_never_written_into(name, runs):
    network = randomised(WRITING[name](), dtype=torch.float32)
    network.register_buffer("index", torch.arange(3))
    before = {key: (tensor, tensor.clone()) for key, tensor in named_tensors(network)}
    trials = [Trial("first", (X,)), Trial("second", (X,))]
    assert not any(outcome.error for outcome in runs(network, trials))
    for key, tensor in named_tensors(network):
        assert tensor is before[key][0] and torch.equal(tensor, before[key][1]), key


@torch.no_grad()
@pytest.mark.parametrize("name", WRITING)
def test_what_a_call_writes_is_there_in_the_next(name):
    network = randomised(WRITING[name](), dtype=torch.float32)
    network.register_buffer("index", torch.arange(3))
    found = run_float64(network, [Trial("first", (X,)), Trial("second", (X,))])
    double = copy.deepcopy(network).double().eval()
    for outcome in found:
        torch.testing.assert_close(outcome.outputs["out"], double(X.double()), rtol=1e-13, atol=1e-13)


@torch.no_grad()
def test_parameters_live_no_longer_than_they_are_used(reads_in_part):
    """One at a time; a second one is made beside it while the first is in use."""
    counts = []

    def forward(m, x):
        wide = [each for each in gc.get_objects() if type(each) is nn.Parameter and each.dtype is torch.float64]
        counts.append(sum(each.shape == m.first.shape for each in wide))
        both = torch.stack([m.first @ m.second, m.second @ m.first])
        return x[0, 0] @ (both.sum(0) + m.first.T @ m.first)

    network = Spelled(forward, **{name: nn.Parameter(torch.rand(7, 7)) for name in ("first", "second")})
    (outcome,) = run_float64(network, [Trial("", (X,))])
    a, b = network.first.double(), network.second.double()
    torch.testing.assert_close(outcome.outputs["out"], X[0, 0].double() @ (a @ b + b @ a + a.T @ a))
    assert counts == [0 if reads_in_part else 2]


def test_an_output_that_is_a_weight_is_a_copy_of_it():
    network = Spelled(lambda m, x: (x, m.a.weight), a=nn.Conv2d(C, C, 1))
    (outcome,) = run_float64(network, [Trial("", (X,))])
    assert outcome.outputs["out[1]"].data_ptr() != network.a.weight.data_ptr()


def test_the_effect_of_a_change_is_seen_and_what_is_exempt_from_it_is_not():
    exact, rounded = (outcomes("views", change, torch.float32)[2] for change in ("exact", "rounded"))
    error = (exact[0].outputs["out"] - rounded[0].outputs["out"]).abs().max() / exact[0].outputs["out"].abs().max()
    assert 1e-9 < error < 1e-6
    bias = nn.Parameter(torch.rand(C))
    adding = Spelled(lambda m, x: x.flatten()[:C] + m.a.bias, a=nn.Conv2d(C, C, 1))
    adding.a.bias = bias
    (found,) = run_float64(adding, [Trial("", (X,))], CHANGES["rounded"])
    assert torch.equal(found.outputs["out"], X.flatten()[:C].double() + bias.detach().double())


class Guarded(nn.Module):
    """Refuses inputs before it computes anything, and fixes a dtype later."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(C, C, 3)

    def forward(self, x):
        if x.shape[1] != C:
            raise ValueError("other channels")
        return self.layer(x.float())


def test_an_input_that_is_refused_first_says_nothing_of_the_next():
    network = randomised(Guarded(), dtype=torch.float32)
    refused, *taken = run_float64(network, [Trial("", (X[:, :1],)), Trial("", (X,)), Trial("", (X,))])
    (alone,) = run_float64(network, [Trial("", (X,))])
    assert refused.error and not alone.error
    assert all(torch.equal(each.outputs["out"], alone.outputs["out"]) for each in taken)
