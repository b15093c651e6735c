"""Networks that change themselves, or that override what PyTorch calls: converted, and left as they were."""

from __future__ import annotations

import pytest
import torch
from blocks import Spelled, conv, norm
from support.agreement import error, randomised
from support.small_nets import SITES, Net, X
from torch import nn
from torch.nn import functional as F

from repfuse.benching.benchmark import bench
from repfuse.checking.comparison import reference
from repfuse.checking.inputs import input_variants
from repfuse.checking.proof import prove
from repfuse.checking.verification import verify
from repfuse.fusing import fuse
from repfuse.planning.planner import plan


class EvalGivesNone(Net):
    def eval(self):
        super().eval()


class TrainGivesNone(Net):
    def train(self, mode=True):
        super().train(mode)


class EvalFails(Net):
    def eval(self):
        raise RuntimeError("switch it yourself")


class StateIsWrapped(Net):
    def state_dict(self, *args, **kwargs):
        return {"model": super().state_dict(*args, **kwargs)}


class StateIsEmpty(Net):
    def state_dict(self, *_args, **_kwargs):
        return {}


class HasExtraState(Net):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        self.version = state["version"]


class ApplyFails(Net):
    def _apply(self, fn, recurse=True):
        raise RuntimeError("stays where it is")


class LooksUpElsewhere(Net):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.stem, name)


class PropertyFails(Net):
    @property
    def teacher(self):
        raise RuntimeError("no teacher here")


class Draws(Net):
    def forward(self, x):
        return super().forward(x) + 0 * torch.randn_like(x)


class Counts(Net):
    """Counts its calls, in a buffer and in an attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.seen = 0

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        return super().forward(x)


class Caches(nn.Module):
    """Puts its kernel together in the first call and keeps it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.kernel = conv(3), conv(1), None

    def forward(self, x):
        if self.kernel is None:
            self.kernel = self.a.weight + F.pad(self.b.weight, [1, 1, 1, 1])
        return F.relu(F.conv2d(x, self.kernel, self.a.bias + self.b.bias, padding=1))


class SwitchesInEval(nn.Module):
    """Fuses itself whenever it is told to evaluate."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3), conv(1)

    def train(self, mode=True):
        super().train(mode)
        if not mode and hasattr(self, "a"):
            self.fused = conv(3).to(self.a.weight.dtype)
            self.fused.weight.data = (self.a.weight + F.pad(self.b.weight, [1, 1, 1, 1])).data
            self.fused.bias.data = (self.a.bias + self.b.bias).data
            del self.a, self.b
        return self

    def forward(self, x):
        return F.relu(self.fused(x) if hasattr(self, "fused") else self.a(x) + self.b(x))


def in_eval(make):
    """In eval mode without being told."""
    with torch.no_grad():
        model = nn.Sequential(make(), norm()) if not issubclass(make, Net) else make()
        for parameter in model.parameters():
            parameter.data = torch.randn(
                parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
            )
        for module in model.modules():
            module.training = False
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.double() if buffer.is_floating_point() else buffer
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(2.0)
                module.running_mean.fill_(0.5)
    return model


NETS = [
    *(EvalGivesNone, TrainGivesNone, EvalFails, StateIsWrapped, StateIsEmpty, HasExtraState, ApplyFails),
    *(LooksUpElsewhere, PropertyFails, Draws, Counts, Caches, SwitchesInEval),
]


def picture(model):
    """All that a network is: the identity of everything that it holds, its tensors' versions, modes and hooks."""
    held = [
        (name, part.training, {key: id(value) for key, value in {**vars(part), **table}.items()})
        for name, part in model.named_modules()
        for table in (part._parameters, part._buffers, part._modules)
    ]
    tensors = [(id(x), x.clone(), x.requires_grad) for x in (*model.parameters(), *model.buffers())]
    return held, tensors, torch.get_rng_state(), torch.is_grad_enabled()


def same(one, other):
    return (
        one[0] == other[0]
        and all(
            a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(one[1], other[1], strict=True)
        )
        and torch.equal(one[2], other[2])
        and one[3] == other[3]
    )


@pytest.mark.parametrize("make", NETS)
def test_a_network_is_converted_and_left_as_it_was(make):
    model = in_eval(make)
    before = picture(model)
    result = fuse(model, (X,))
    assert same(before, picture(model)), "fuse"
    if issubclass(make, Net):
        assert {site.path for site in result.plan.sites} == SITES
    else:
        assert result.plan.sites
    trials = input_variants((X,))
    assert prove(model, result.plan, result.module, trials, reference(model, trials)).passed
    assert verify(model, result.module, (X,)).verdict == "same"
    assert same(before, picture(model)), "verify"
    bench(model, result.module, (X,), rounds=8, seconds=0.01)
    assert same(before, picture(model)), "bench"
    assert error(model, result.module, X) < 1e-12


PAST_OPERATORS = {
    "apply_": lambda x: x.apply_(lambda number: number + 1),
    "map_": lambda x: x.map_(x, lambda number, other: number + other),
    "map2_": lambda x: x.map2_(x, x, lambda number, other, third: number + other),
    "numpy": lambda x: x.numpy().__iadd__(1),
}


@pytest.mark.parametrize("write", PAST_OPERATORS.values(), ids=PAST_OPERATORS)
def test_what_a_forward_writes_past_all_operators_is_not_written_into_the_network(write):
    def forward(m, x):
        write(m.scale)
        return (m.a(x) + m.b(x)) * m.scale

    model = randomised(Spelled(forward, a=conv(3), b=conv(1)))
    model.register_buffer("scale", torch.ones(1, 4, 1, 1, dtype=torch.float64))
    before = picture(model)
    result = fuse(model, (X,))
    assert same(before, picture(model))
    for _ in range(2):
        assert error(model, result.module, X) < 1e-12


def test_an_attribute_of_any_name_means_nothing_to_the_copies():
    model = randomised(Net())
    model.streamed = True
    fused = fuse(model, (X,)).module
    own = {x.data_ptr() for x in model.state_dict().values()}
    assert fused.streamed and own.isdisjoint(x.data_ptr() for x in fused.state_dict().values())


def test_a_network_in_training_mode_is_measured_in_eval_mode_and_left_in_training():
    model = randomised(Net()).train()
    before = picture(model)
    bench(model, model, (X,), rounds=8, seconds=0.01)
    verify(model, model, (X,))
    plan(model, (X,))
    assert same(before, picture(model))


def test_a_stored_weight_is_proven_whatever_state_dict_says():
    model = in_eval(StateIsEmpty)
    result = fuse(model, (X,))
    with torch.no_grad():
        result.module.tail[0].weight[0, 0] *= 1.001
    trials = input_variants((X,))
    found = prove(model, result.plan, result.module, trials, reference(model, trials))
    assert found.first.path == "tail.0" and [weight.wrong for weight in found.first.weights] == [1, 0]


def test_a_delegating_network_is_no_reason_for_a_wrong_result():
    """Python would ask it for __deepcopy__, and the block that became a graph has one: nobody may ask."""

    class Delegates(Net):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("block"), name)

    model = randomised(Delegates())
    result = fuse(model, (X,))
    trials = input_variants((X,))
    assert error(model, result.module, X) < 1e-12
    assert prove(model, result.plan, result.module, trials, reference(model, trials)).passed


def test_a_call_that_a_class_overrides_counts():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3), conv(1)

        def forward(self, x):
            return self.a(x) + self.b(x)

        def __call__(self, x):
            return super().__call__(x) * 2

    model = randomised(Spelled(lambda m, x: torch.sin(m.block(x)), block=Doubles()))
    assert error(model, fuse(model, (X,)).module, X) < 1e-12
