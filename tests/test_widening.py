"""A network in float64, widened one layer at a time, gives what the network widened as a whole gives."""

from __future__ import annotations

from functools import partial

import numpy
import pytest
import torch
from blocks import C, RepVGG, Spelled, conv
from support.agreement import image, randomised
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from repfuse.networks import named_tensors
from repfuse.verifying import Trial
from repfuse.verifying.copies import _run_as_a_whole, _run_by_layer, in_float64, run, run_float64
from repfuse.verifying.rounding import rounded_once, summed_anew

X = image(2, C, 6, 7).float()


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


BY_LAYER = {
    "a block": RepVGG,
    "layers": lambda: nn.Sequential(conv(), nn.GELU(), nn.Flatten(), nn.Linear(C * 42, 3)),
    "weight norm": lambda: parametrizations.weight_norm(conv(bias=True)),
    "attention": lambda: nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(42, 2, 16, batch_first=True)),
    "one weight, twice": lambda: Spelled(tied, **a_layer()),
    "in place": lambda: Spelled(in_place, **a_layer(scale=buffer(1, C, 1, 1))),
    "views": lambda: Spelled(made_of_views, **a_layer(square=buffer(5, 5))),
}
AS_A_WHOLE = {
    "compares dtypes": Recurrent,
    "writes": lambda: Spelled(written, **a_layer(count=buffer(1))),
    "writes through a view": lambda: Spelled(written_through_a_view, **a_layer(state=buffer(2))),
    "exchanges its weights": lambda: Spelled(exchanged, **a_layer()),
    "autocast": lambda: Spelled(under_autocast, **a_layer(square=buffer(5, 7))),
    "casts its weights": lambda: Spelled(lambda m, x: F.conv2d(x, m.a.weight.half()), **a_layer()),
}
CHANGES = {
    "exact": in_float64,
    "rounded": rounded_once(1, frozenset(["a.bias"])),
    "summed": summed_anew(2, in_float64),
}


def outcomes(run, name, change, dtype):
    network = randomised((BY_LAYER | AS_A_WHOLE)[name](), dtype=dtype)
    trials = [Trial("first", (X.to(dtype),)), Trial("second", (X[:1].to(dtype) * 3,))]
    return run(network, trials, CHANGES[change], lambda _: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", BY_LAYER)
def test_layer_by_layer_it_gives_the_same(name, change, dtype):
    found, whole = (outcomes(run, name, change, dtype) for run in (_run_by_layer, _run_as_a_whole))
    for one, other in zip(found, whole, strict=True):
        assert not other.error, other.error
        assert one.outputs["out"].dtype is torch.float64
        torch.testing.assert_close(one.outputs["out"], other.outputs["out"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", AS_A_WHOLE)
def test_where_it_would_not_it_is_widened_as_a_whole(name):
    assert outcomes(_run_by_layer, name, "exact", torch.float32) is None
    found, whole = (outcomes(run, name, "exact", torch.float32) for run in (run_float64, _run_as_a_whole))
    assert all(torch.equal(a.outputs["out"], b.outputs["out"]) for a, b in zip(found, whole, strict=True))
    assert not any(outcome.error for outcome in found)


def counted(m, x):
    m.calls[0] += 1
    m.index.view(-1).add_(1)
    return m.a(x) * m.calls


WRITING = {**{name: AS_A_WHOLE[name] for name in ("writes", "writes through a view", "exchanges its weights")}}
WRITING["counts"] = lambda: Spelled(counted, **a_layer(calls=buffer(1)))


def takes_statistics(m, x):
    return F.batch_norm(m.a(x), m.mean, m.variance, training=True)


def writes_an_array(m, x):
    m.calls.numpy()[:] += 1
    return m.a(x) * m.calls


def writes_a_shared_array(m, x):
    numpy.asarray(m.calls)[:] += 1
    return m.a(x) * m.calls


WRITING["statistics"] = lambda: Spelled(takes_statistics, **a_layer(mean=buffer(C), variance=buffer(C)))
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


def test_an_output_that_is_a_weight_is_a_copy_of_it():
    network = Spelled(lambda m, x: (x, m.a.weight), a=nn.Conv2d(C, C, 1))
    (outcome,) = run_float64(network, [Trial("", (X,))])
    assert outcome.outputs["out[1]"].data_ptr() != network.a.weight.data_ptr()


def test_the_effect_of_a_change_is_seen_and_what_is_exempt_from_it_is_not():
    exact, rounded = (outcomes(run_float64, "views", change, torch.float32) for change in ("exact", "rounded"))
    error = (exact[0].outputs["out"] - rounded[0].outputs["out"]).abs().max() / exact[0].outputs["out"].abs().max()
    assert 1e-9 < error < 1e-6
    bias = nn.Parameter(torch.rand(C))
    adding = Spelled(lambda m, x: x.flatten()[:C] + m.a.bias, a=nn.Conv2d(C, C, 1))
    adding.a.bias = bias
    (found,) = run_float64(adding, [Trial("", (X,))], CHANGES["rounded"])
    assert torch.equal(found.outputs["out"], X.flatten()[:C].double() + bias.detach().double())


def test_no_more_than_a_layer_is_in_float64_at_a_time():
    """The network's tensors stay as they are stored while it runs."""
    network, seen = randomised(RepVGG(), dtype=torch.bfloat16), []

    def watch(copy):
        copy.register_forward_hook(lambda module, *_: seen.extend(x.dtype for _, x in named_tensors(module)))

    run_float64(network, [Trial("", (X.bfloat16(),))], watch=watch)
    assert seen and torch.float64 not in seen
