"""What cannot be converted, compared or timed at all gets one clear message, and what cannot be copied is named."""

from __future__ import annotations

import tempfile
import threading

import pytest
import torch
from blocks import conv, norm
from support.agreement import error, randomised
from support.small_nets import SITES, Net, X
from torch import nn

from repfuse.benching.benchmark import bench
from repfuse.checking.verification import verify
from repfuse.errors import RepfuseError
from repfuse.fusing import fuse
from repfuse.planning.planner import plan


def with_attribute(value, path=""):
    model = randomised(Net())
    model.get_submodule(path).odd = value
    return model


def on_meta():
    return Net().to("meta").eval()


def one_buffer_on_meta():
    model = randomised(Net())
    model.register_buffer("late", torch.zeros(3, device="meta"))
    return model


def cyclic():
    model = randomised(Net())
    model.block.parent = model
    return model


def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), norm())


UNUSABLE = {
    "meta": (on_meta, "'stem.0.weight' is on the meta device", "load_state_dict"),
    "one meta buffer": (one_buffer_on_meta, "'late' is on the meta device", "load_state_dict"),
    "a cycle": (cyclic, "hold each other without end", r"\[parent\]"),
    "lazy": (lazy, "'0.weight' has no shape yet", "Call the network once"),
    "no network": (lambda: {"weight": X}, "This is a dict, no network", "torch.nn.Module"),
}
COMPILED = {
    "scripted": (lambda: torch.jit.script(randomised(Net())), "TorchScript", "script the result"),
    "compiled": (lambda: torch.compile(randomised(Net()), backend="eager"), "compiled network", "_orig_mod"),
}
UNCOPYABLE = {
    "a file": (lambda: with_attribute(tempfile.TemporaryFile(), "block"), "because of block.odd", "open files"),  # noqa: SIM115
    "a generator": (
        lambda: with_attribute(i for i in "ab"),
        "because of odd",
        "generators",
    ),
}


@pytest.mark.parametrize("name", [*UNUSABLE, *COMPILED, *UNCOPYABLE])
def test_a_plan_is_refused_with_the_reason(name):
    make, what, hint = (UNUSABLE | COMPILED | UNCOPYABLE)[name]
    with pytest.raises(RepfuseError, match=what) as caught:
        fuse(make(), (X,))
    assert caught.value.exit_code == 2
    with pytest.raises(RepfuseError, match=hint):
        raise caught.value


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("use", [verify, bench])
def test_so_are_a_comparison_and_a_measurement(name, use):
    make, what, _ = UNUSABLE[name]
    for pair in ((make(), randomised(Net())), (randomised(Net()), make())):
        with pytest.raises(RepfuseError, match=what):
            use(*pair, (X,))


@pytest.mark.parametrize("value", [threading.Lock(), threading.RLock(), torch, lambda x: x, torch.Generator()])
@pytest.mark.parametrize("path", ["", "block"])
def test_what_a_copy_may_share_is_no_obstacle(value, path):
    model = with_attribute(value, path)
    result = fuse(model, (X,))
    assert {site.path for site in result.plan.sites} == SITES and error(model, result.module, X) < 1e-12


def test_shared_modules_are_no_cycle():
    block = conv()
    model = randomised(nn.Sequential(block, nn.Sequential(block, nn.ModuleList([block]) and nn.Identity()), norm()))
    assert fuse(model, (X,)).module is not model


@pytest.mark.parametrize("make", [norm, nn.ReLU, lambda: conv(3), lambda: nn.BatchNorm2d(4)])
def test_a_root_that_is_one_layer_has_nothing_to_fuse(make):
    assert plan(randomised(make()), (X,)).sites == ()
