"""What a forward may take and return, and how often a module may be registered and called."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from blocks import Spelled, conv
from support.agreement import randomised
from support.small_nets import Block, Net, X, Y
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from repfuse.benching.benchmark import bench
from repfuse.checking.comparison import reference
from repfuse.checking.inputs import input_variants
from repfuse.checking.proof import prove
from repfuse.checking.runs import leaves
from repfuse.checking.verification import verify
from repfuse.fusing import fuse


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


def net(forward):
    return type("N", (Net,), {"forward": forward})()


def unpacked(m, xs):
    one, other = xs
    return m.features(one) + other


def summed(m, xs):
    total = 0
    for x in xs:
        total = total + m.features(x)
    return total


def scaled_by_all(m, named):
    total = m.features(named["x"])
    for _name, value in named.items():
        total = total + value
    return total


FORWARDS = {  # forward, its arguments
    "two tensors": (lambda m, x, y: m.features(x) + y, (X, Y)),
    "an option left out": (lambda m, x, y=None: m.features(x) if y is None else m.features(x) + y, (X,)),
    "an option given": (lambda m, x, y=None: m.features(x) if y is None else m.features(x) + y, (X, Y)),
    "an option given as None": (lambda m, x, y=None: m.features(x) if y is None else m.features(x) + y, (X, None)),
    "by keyword only": (lambda m, x, *, flag=True: m.features(x) if flag else x, (X,)),
    "a switch": (lambda m, x, flag=True: m.features(x) if flag else torch.cos(m.features(x)), (X, False)),
    "a number": (lambda m, x, by: m.features(x) * by, (X, 2.0)),
    "*args": (lambda m, *xs: m.features(xs[0]) + xs[1], (X, Y)),
    "**kwargs": (lambda m, x, **_kwargs: m.features(x), (X,)),
    "a list": (lambda m, xs: m.features(xs[0]) + xs[1], ([X, Y],)),
    "a list, in a loop": (summed, ([X, Y],)),
    "a tuple, unpacked": (unpacked, ((X, Y),)),
    "a dict": (lambda m, named: m.features(named["x"]) + named["y"], ({"x": X, "y": Y},)),
    "a dict, in a loop": (scaled_by_all, ({"x": X, "y": Y},)),
    "a named tuple": (lambda m, pair: m.features(pair.a) + pair.b, (Pair(X, Y),)),
    "a nest": (lambda m, named: m.features(named["x"][0]) + named["x"][1], ({"x": (X, Y)},)),
    "returns a nest": (lambda m, x: (m.features(x), [x, {"k": m.features(x)}]), (X,)),
    "returns a dataclass": (lambda m, x: Output(m.features(x)), (X,)),
    "returns an OrderedDict": (lambda m, x: OrderedDict(out=m.features(x), aux=x), (X,)),
    "returns a named tuple": (lambda m, x: Pair(m.features(x), x), (X,)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_is_converted_and_proven(name):
    forward, inputs = FORWARDS[name]
    model = randomised(net(forward))
    result = fuse(model, inputs)
    assert {site.path for site in result.plan.sites} >= {"stem.0", "block.fused"}
    wanted, got = model(*copy.deepcopy(inputs)), result.module(*copy.deepcopy(inputs))
    assert type(wanted) is type(got)
    found = leaves(got)
    assert all(torch.allclose(tensor, found[key], rtol=1e-11) for key, tensor in leaves(wanted).items())
    trials = input_variants(inputs)
    assert prove(model, result.plan, result.module, trials, reference(model, trials)).passed


@pytest.mark.parametrize("name", ["a switch", "a dict", "a nest", "returns a dataclass"])
def test_such_networks_are_compared_and_timed_in_float32(name):
    forward, inputs = FORWARDS[name]
    model = randomised(net(forward), dtype=torch.float32)
    example = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, inputs)
    fused = fuse(model, example).module
    assert verify(model, fused, example).verdict == "same"
    assert bench(model, fused, example, rounds=8, seconds=0.01).measurements


def test_a_wrong_network_of_a_dict_is_told():
    forward, inputs = FORWARDS["a dict"]
    model = randomised(net(forward))
    wrong = fuse(model, inputs).module
    with torch.no_grad():
        wrong.stem[0].weight *= 1.01
    assert verify(model, wrong, inputs).verdict == "different"


def on_levels(*sources):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.out = Block(), conv(1)

        def forward(self, x):
            return [self.out(self.block(source(x))) for source in sources]

    return Head()


def twice_in_a_list():
    block = Block()
    return Spelled(lambda m, x: m.parts[2](m.parts[1](m.parts[0](x))), parts=nn.ModuleList([block, nn.ReLU(), block]))


def sharing_a_weight():
    model = nn.Sequential(Block(), nn.ReLU(), Block())
    model[2].a[0].weight = model[0].a[0].weight
    return model


def with_its_parent():
    model = Net()
    model.block.parent = [model]
    return model


def aliased():
    block = Block()
    return Spelled(lambda m, x: torch.sin(m.one(x)), one=block, other=block)


LEVELS = [torch.sin, torch.cos, lambda x: F.max_pool2d(x, 2), F.relu, torch.tanh]
SHARED = {  # network, how many sites, pairs of paths that are one module afterwards
    "a head on five levels": (lambda: on_levels(*LEVELS), 1, ()),
    "twice in a ModuleList": (twice_in_a_list, 1, (("parts.0", "parts.2"),)),
    "under two names": (aliased, 1, (("one", "other"),)),
    "a weight of two sites": (sharing_a_weight, 2, ()),
    "a child that knows its parent": (with_its_parent, 3, ()),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_is_rewritten_once_and_stays_right(name):
    make, sites, one = SHARED[name]
    model = randomised(make())
    result = fuse(model, (X,))
    assert len(result.plan.sites) == sites
    wanted, got = leaves(model(X)), leaves(result.module(X))
    assert all(torch.allclose(tensor, got[key], rtol=1e-11) for key, tensor in wanted.items())
    for first, second in one:
        assert result.module.get_submodule(first) is result.module.get_submodule(second)
