"""The result is the network that people know: its classes, attributes, names, buffers, ties, and all uses of it."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from blocks import Spelled, conv
from support.agreement import error, image, randomised
from support.small_nets import Block, Net, X
from torch import Tensor, fx, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from repfuse import Plan, Policy, fuse, rewrite
from repfuse.cli.app import app
from repfuse.planning.replaying import fitted


class Known(Net):
    """A network with everything that others rely on."""

    names = ("cat", "dog")
    stride = 32

    def __init__(self) -> None:
        super().__init__()
        self.anchors: Tensor
        self.register_buffer("anchors", torch.arange(4.0))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.embed, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight
        self.config = {"depth": 3, "widths": [4, 4]}
        self.embed.weight.requires_grad_(False)

    @property
    def num_features(self) -> int:
        return 4

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        return self.tail(self.features(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(self.embed(torch.sin(self.forward_features(x)).mean((2, 3)))))


class Flat(nn.Module):
    """A root that becomes a graph."""

    names = ("cat", "dog")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = nn.ReLU(), conv(3), conv(1), nn.Linear(7, 3)
        self.stride, self.config, self.scale = 32, {"depth": 3}, nn.Parameter(torch.ones(1))
        self.register_buffer("anchors", torch.arange(4.0))
        self.register_buffer("shift", torch.ones(1))
        self.register_buffer("cache", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.sin(self.a(y) + self.b(y) + y) * self.scale + self.shift + self.cache)


@pytest.fixture(scope="module")
def known():
    return randomised(Known())


@pytest.fixture(scope="module")
def fused(known):
    return fuse(known, (X,)).module


def test_class_attributes_methods_and_properties_stay(known, fused):
    assert type(fused) is Known
    assert (fused.names, fused.stride, fused.config, fused.num_features) == (("cat", "dog"), 32, known.config, 4)
    assert fused.get_classifier() is fused.head
    assert torch.allclose(fused.forward_features(X), known.forward_features(X), rtol=1e-11)
    assert [type(child) for child in fused.children()][:1] == [nn.Sequential]


def test_names_order_buffers_and_ties_stay(known, fused):
    before, after = list(known.state_dict()), list(fused.state_dict())
    assert [name for name in before if name in after] == [name for name in after if name in before]
    assert {"anchors", "embed.weight", "head.weight", "stem.0.weight", "tail.0.weight"} <= set(after)
    assert "cache" not in after and dict(fused.named_buffers())["cache"].shape == (2,)
    assert fused.head.weight is fused.embed.weight and not fused.embed.weight.requires_grad
    assert fused.stem[0].weight.requires_grad and fused.block.fused.weight.requires_grad


def test_a_root_that_becomes_a_graph_keeps_what_it_can():
    model = randomised(Flat())
    fused = fuse(model, (X,)).module
    for network in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(network).__name__.startswith(("Flat", "GraphModule"))
        assert (network.names, network.stride, network.config) == (("cat", "dog"), 32, {"depth": 3})
        assert error(model, network, X) < 1e-12
    assert list(fused.state_dict()) == [
        *("scale", "anchors", "shift", "last.weight", "last.bias", "fused.weight", "fused.bias")
    ]


def reported(folder, model, shape, *more):
    """What a command says in JSON of a network that it reads: with a place ``more``, of its conversion."""
    torch.save(model.float(), folder / "in.pt")
    command = ["convert", "--quick"] if more else ["inspect"]
    asked = ["--input", "x".join(map(str, shape)), "--trust", "--json"]
    done = CliRunner().invoke(app, [*command, str(folder / "in.pt"), *map(str, more), *asked])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize(("make", "gone"), [(Flat, True), (Known, False), (lambda: nn.Sequential(Block()), False)])
def test_the_report_says_that_the_class_is_gone(make, gone, tmp_path):
    found = reported(tmp_path, randomised(make()), X.shape, tmp_path / "out.pt")
    said = [note for note in found["notes"] if note.startswith("the outermost forward was rewritten")]
    assert found["status"] == "converted" and len(said) == gone
    assert all("torch.fx.GraphModule now, without the methods" in note for note in said)


@pytest.mark.parametrize(
    ("network", "shape", "said"),
    [
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4), True),
        (nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), (5, 4), False),
        (nn.Sequential(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6)), (5, 4, 3), False),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6)), (2, 4, 5, 5), False),
    ],
)
def test_a_norm_of_rows_in_a_linear_layer_is_for_inputs_of_two_axes(network, shape, said, tmp_path):
    found = reported(tmp_path, randomised(network), shape)
    assert found["plan"]["sites"] and any("for inputs of two axes" in note for note in found["notes"]) is said


def test_fixed_arguments_of_such_a_root_are_checked():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3), conv(1)

        def forward(self, x, plain=False):
            y = self.a(x) + self.b(x)
            return y if plain else torch.sin(y)

    model = randomised(Switched())
    fused = fuse(model, (X,)).module
    assert error(model, fused, X) < 1e-12
    with pytest.raises((AssertionError, TypeError)):
        fused(X, True)


USES = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(saved(m), weights_only=False),
    "deepcopy": copy.deepcopy,
    "script": torch.jit.script,
    "trace": lambda m: torch.jit.trace(m, X),
    "compile": lambda m: torch.compile(m, backend="eager"),
    "export": lambda m: torch.export.export(m, (X,)).module(),
    "state dict": lambda m: loaded(m, {name: tensor.clone() for name, tensor in m.state_dict().items()}),
    "twice": lambda m: fuse(m, (X,)).module,
}


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


def loaded(module, state):
    for parameter in module.parameters():
        parameter.data.zero_()
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("make", [Known, Flat])
@pytest.mark.parametrize("use", USES)
def test_people_go_on_using_it(make, use):
    model = randomised(make())
    again = USES[use](fuse(model, (X,)).module)
    with torch.no_grad():
        assert torch.allclose(again(X), model(X), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Known, Flat])
def test_it_exports_to_onnx(make):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = randomised(make(), dtype=torch.float32)
    fused, buffer = fuse(model, (X.float(),)).module, io.BytesIO()
    torch.onnx.export(fused, (X.float(),), dynamo=True).save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: X.float().numpy()})
    assert torch.allclose(torch.from_numpy(found), model(X.float()), atol=1e-4)


class Feature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.pool = Block(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(out=self.pool(self.body(x)), aux=F.relu(x))


def test_an_ordered_dict_of_a_backbone_stays_one():
    model = randomised(Feature())
    assert type(fuse(model, (X,)).module(X)) is OrderedDict


def test_a_child_that_is_replaced_afterwards_is_used():
    """The head of a converted network is exchanged for another number of classes, also where the root is a graph."""
    for make, name in ((Known, "head"), (Flat, "last")):
        fused = fuse(randomised(make()), (X,)).module
        old = fused.get_submodule(name)
        setattr(fused, name, nn.Linear(old.in_features, 9).double())
        assert fused(X).shape[-1] == 9


def test_a_block_called_with_another_size_still_runs():
    model = randomised(nn.Sequential(Block(), conv(1)))
    assert error(model, fuse(model, (X,)).module, image(3, 4, 2, 3)) < 1e-12
    assert error(model, fuse(model, (X,)).module, image(1, 4, 1, 1)) < 1e-12


def test_a_spelled_network_of_lambdas_is_converted_though_it_does_not_pickle():
    model = randomised(Spelled(lambda m, x: torch.sin(m.block(x)), block=Block()))
    assert fuse(model, (X,)).plan.sites


class TwoHeads(nn.Module):
    """Averages two heads in its own forward, which is little work beside its body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(Block() for _ in range(4)))
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.forward_features(x)
        return (self.one(y) + self.other(y)) / 2


class Direct(nn.Module):
    """Has its branches in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + self.b(x) + x)


LARGE = image(1, 4, 64, 64)


@torch.no_grad()
def test_the_outermost_class_is_lost_only_where_much_is_gained():
    model = randomised(TwoHeads())
    kept = fuse(model, (LARGE,))
    assert type(kept.module) is TwoHeads and error(model, kept.module, LARGE) < 1e-12
    assert kept.module.forward_features(LARGE).shape == (1, 4)
    refusals = [refusal for refusal in kept.plan.refusals if refusal.code == "outermost-class"]
    assert refusals and all("TwoHeads" in refusal.reason for refusal in refusals)
    assert [site.owner for site in kept.plan.sites] == [f"body.{number}" for number in range(4)]
    assert isinstance(fuse(randomised(Direct()), (LARGE,)).module, fx.GraphModule)


@pytest.mark.parametrize("make", [TwoHeads, Direct])
def test_whoever_asks_keeps_or_loses_the_class(make):
    model = randomised(make())
    kept, lost = (fuse(model, (LARGE,), keep_class=keep) for keep in (True, False))
    always = fuse(model, (LARGE,), Policy.ALWAYS)
    assert type(kept.module) is make and kept.plan.keep_class
    assert all(isinstance(each.module, fx.GraphModule) and not each.plan.keep_class for each in (lost, always))
    assert len(lost.plan.sites) == len(kept.plan.sites) + 1
    for each in (kept, lost, always):
        assert error(model, each.module, LARGE) < 1e-12
        again = Plan.from_dict(json.loads(each.plan.to_json()))
        assert type(rewrite(make().eval(), again)).__name__ == make.__name__
        assert fitted(model, again) == each.plan


def test_a_part_of_what_was_worth_the_class_is_still_written():
    """By itself the one site that is left gains too little: what the plan settled stays settled."""
    model = randomised(
        Spelled(
            lambda m, x: F.relu(m.a(x) + m.b(x)).mean((2, 3)) + m.head(torch.sin(m.one(x.mean((2, 3))))),
            a=conv(3),
            b=conv(1),
            one=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            head=nn.Linear(4, 4),
        )
    )
    whole = fuse(model, (LARGE,))
    assert isinstance(whole.module, fx.GraphModule) and len(whole.plan.sites) == 2
    for site in whole.plan.sites:
        part = replace(whole.plan, sites=(site,))
        for each in (part, Plan.from_dict(json.loads(part.to_json()))):
            assert error(model, rewrite(model, each), LARGE) < 1e-12


OF_SIZES = {
    "zeros": lambda h, w: torch.zeros(h, w) + 1,
    "ones": lambda h, w: torch.ones(h, w, dtype=torch.float64),
    "a random one": lambda h, w: torch.rand(h, w).sign(),
    "a number": lambda h, w: torch.tensor(h) * torch.as_tensor(w, dtype=torch.float64),
    "a list": lambda h, w: torch.tensor([h, 2, w]).prod(),
    "a list by name": lambda h, w: torch.tensor(dtype=torch.float64, data=[h, w]).prod(),
    "lists in a list": lambda h, w: torch.tensor([[h, 0.5], [w, 2]], dtype=torch.float64).det(),
}


class OfSizes(nn.Module):
    """Makes tensors of the size of its input."""

    def __init__(self, made):
        super().__init__()
        self.a, self.b, self.made = conv(3), conv(1), made

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x)) * OF_SIZES[self.made](*x.shape[2:])


@pytest.mark.parametrize("made", OF_SIZES)
def test_a_block_that_makes_tensors_of_sizes_can_be_read_again(made):
    model = randomised(nn.Sequential(OfSizes(made), nn.ReLU()))
    fused = fuse(model, (X,)).module
    again = pickle.loads(pickle.dumps(fused))
    assert isinstance(again[0], fx.GraphModule)
    for x in (X, image(1, 4, 5, 9)):
        assert error(model, fused, x) < 1e-12 and error(model, again, x) < 1e-12


def blanks_the_frame(m, x):
    y = m.a(x) + m.b(x)
    y[:, :, 0] = 0
    y[..., -1] = x[..., 0]
    y[:, [0, 2]] = -y[:, [0, 2]]
    y[y > 1] = 1.0
    return y


class Framed(nn.Module):
    """Writes into what it computes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3), conv(1)

    def forward(self, x):
        return blanks_the_frame(self, x)


def test_a_block_that_writes_into_a_tensor_can_be_read_again():
    model = randomised(nn.Sequential(Framed(), nn.ReLU()))
    fused = fuse(model, (X,)).module
    again = pickle.loads(pickle.dumps(fused))
    again[0].graph.eliminate_dead_code()
    again[0].recompile()
    assert isinstance(again[0], fx.GraphModule)
    for x in (X, image(1, 4, 5, 9)):
        assert error(model, fused, x) < 1e-12 and error(model, again, x) < 1e-12
    assert error(model, torch.export.export(again, (X,)).module(), X) < 1e-12
