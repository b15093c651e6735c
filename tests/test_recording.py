"""What a network does, from runs of it: the graph, who made what, its constants, memory, sizes, and what is marked."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import hypothesis
import pytest
import torch
from blocks import Spelled, conv
from hypothesis import strategies as st
from support.agreement import error, image, operations, randomised
from support.recordings import buffered, function, named, parameter, recorded, run
from torch import Tensor, fx, nn
from torch.ao.quantization import FakeQuantize
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as cp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from repfuse.errors import RepfuseError
from repfuse.fusing import fuse
from repfuse.planning.planner import plan
from repfuse.plans import Policy
from repfuse.recording.arguments import Arguments
from repfuse.recording.recording import record
from repfuse.recording.shortcuts import SHORTCUTS, UNCHANGED
from repfuse.rewriting import rewrite

X = image(2, 4, 5, 6)


def assert_same(model, x=X):
    """The graph computes what the model does, and does to its input what the model does to it."""
    found = recorded(model, x.clone())
    one, other = x.clone(), x.clone()
    with torch.no_grad():
        expected, computed = model(one), fx.Interpreter(model, graph=found.graph).run(other)
    assert torch.equal(expected, computed) and torch.equal(one, other)
    return found


def codes(found):
    """The code of each call that has a mark, by the path of its module."""
    return {call.path: code for call, (code, _) in found.marks.items()}


# --- the graph, and who made what -----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = conv(3), conv(1), nn.ReLU()

    def forward(self, x):
        return self.act(self.a(x) + self.b(x) + 1)


class Twice(nn.Module):
    """One block that is called twice, the second time by another argument."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(self.block(x)) * 2


def test_modules_dissolve_into_functions():
    found = assert_same(randomised(Twice()))
    assert {node.op for node in found.nodes} <= {"placeholder", "get_attr", "call_function", "call_method"}
    assert list(map(function, found.nodes)).count("conv2d") == 4
    assert [node for node in found.graph.nodes if node.op != "output"] == found.nodes
    assert [found.order[node] for node in found.nodes] == list(range(len(found.nodes)))


def test_each_node_knows_the_call_that_made_it():
    found = recorded(randomised(Twice()), X)
    block, again = found.calls["block"]
    first, _, third, _ = named(found, "conv2d")
    assert [(found.call_of[node].path, found.call_of[node].number) for node in (first, third)] == [
        ("block.a", 0),
        ("block.a", 1),
    ]
    assert list(found.call_of[third].chain()) == [found.calls["block.a"][1], again, found.root]
    assert again.args == (block.output,) and block.args == (found.nodes[0],) and found.root.caller is None
    assert first in found.nodes[block.start : block.stop] and third not in found.nodes[block.start : block.stop]
    assert [item.path for item in block.own if not isinstance(item, fx.Node)] == ["block.a", "block.b", "block.act"]
    assert [function(item) for item in block.own if isinstance(item, fx.Node)] == ["add", "add"]


def test_names_say_the_call_and_the_operation():
    names = list(recorded(randomised(Twice()), X).names.values())
    assert names[0] == "/input" and len(set(names)) == len(names)
    assert {"block.a/conv2d", "block/add", "block/add_2", "block.act/relu", "block@1/add_2", "/mul"} <= set(names)
    assert {"block.a/weight", "block.a@1/weight"} <= set(names)


class SavesAll(nn.Conv2d):
    def __getstate__(self):
        return dict(vars(self))


@pytest.mark.parametrize("kind", [nn.Conv2d, SavesAll])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), nn.Module._replicate_for_data_parallel]
)
def test_a_copy_that_a_forward_makes_of_a_part_is_not_that_part(copied, kind):
    """Nor is it told that calls of it are calls of the other: it may hold other numbers."""

    def forward(m, x):
        other = copied(m.a)
        other._parameters = {name: 2 * value for name, value in m.a._parameters.items() if value is not None}
        return m.a(x) + other(x) + m.b(x)

    model = randomised(Spelled(forward, a=kind(4, 4, 3, padding=1), b=conv(1)))
    before = set(vars(model.a))
    assert len(recorded(model, X).calls["a"]) == 1 and set(vars(model.a)) == before
    assert torch.allclose(fuse(model, (X,)).module(X), 3 * model.a(X) + model.b(X), rtol=1e-12)


class CallsThrice(nn.Conv2d):
    def _call_impl(self, x):
        return 3 * super()._call_impl(x)


def test_a_class_that_calls_itself_its_own_way_does_so():
    model = randomised(Spelled(lambda m, x: m.a(x) + m.b(x), a=CallsThrice(4, 4, 3, padding=1), b=conv(1)))
    (site,) = plan(model, (X,), Policy.ALWAYS).sites
    assert "3 * conv 3x3" in site.branches


def test_what_a_copy_holds_is_its_own_while_it_is_made():
    """Also where an object looks at the module that holds it, of which a part is copied already."""

    class Holder:
        def __init__(self, owner):
            self.owner, self.conv = owner, owner.a

        def __deepcopy__(self, memo):
            memo[id(self)] = new = object.__new__(Holder)
            new.owner = copy.deepcopy(self.owner, memo)
            new.conv = new.owner.a
            return new

    model = Spelled(lambda m, x: m.a(x), a=conv(3))
    model.held = Holder(model)
    copied = fuse(model, (X.float(),)).module
    assert copied.held.owner is copied and copied.held.conv is copied.a is not model.a
    assert list(vars(copied)) == list(vars(model))


def test_names_are_the_same_in_each_run():
    model = randomised(Twice())
    one, other = recorded(model, X), recorded(copy.deepcopy(model).float(), image(3, 4, 9, 7, dtype=torch.float32))
    assert list(one.names.values()) == list(other.names.values())


def test_what_is_shared_has_one_path_in_calls_and_all_in_paths():
    block = Block()
    found = recorded(randomised(nn.Sequential(OrderedDict(a=block, b=block))), X)
    assert found.paths["a.act"] == found.paths["b.act"] == ["a.act", "b.act"]
    assert [call.number for call in found.calls["a"]] == [0, 1] and not found.calls.get("b")


def test_shapes_and_dtypes_are_as_they_were():
    found = recorded(randomised(Spelled(lambda m, x: (m.a(x).float()[:, :2] > 0).sum(), a=conv(3))), X)
    picked, above, total = (named(found, name)[0] for name in ("getitem", "gt", "sum"))
    assert [found.shape_of[node] for node in (picked, above, total)] == [(2, 2, 5, 6)] * 2 + [()]
    assert [found.dtype_of[node] for node in (picked, above, total)] == [torch.float32, torch.bool, torch.int64]
    assert set(found.shapes(picked)) > {(2, 2, 5, 6)}


class Nested(nn.Module):
    def forward(self, pair, *, scale, flag=True):
        x, y = pair
        return {"sum": x * scale["by"] + y, "rest": [y.chunk(2, 1), flag]}


def test_arguments_and_results_may_hold_tensors_in_any_nesting():
    def forward(m, x):
        return m.inner((x, torch.cos(x)), scale={"by": x[:1]}, flag=None)

    found = recorded(Spelled(forward, inner=Nested()), X)
    (call,), cos, add = found.calls["inner"], named(found, "cos")[0], named(found, "add")[0]
    assert call.args == ((found.nodes[0], cos),) and call.kwargs["flag"] is None
    assert call.output["sum"] is add and [node.args[1] for node in call.output["rest"][0]] == [0, 1]
    assert found.root.output == call.output


def test_operators_are_written_as_torch_fx_writes_them():
    found = assert_same(Spelled(lambda m, x: -(2 - x) / (x**2) + (3 / x) - x.T.T.real[0]), X[:, 0, 0])
    written = {operator.sub, operator.getitem, getattr}
    assert written <= {node.target for node in found.nodes if node.op == "call_function"}
    assert all(not str(node.target).startswith("__") for node in found.nodes)


# --- the module that is handed in -----------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x):
        self.calls[0:1].add_(1)
        return x


def through_numpy(m, x):
    m.k.numpy()[0] = 3.0
    return x * m.k


def rebound(m, x):
    m.k = m.k + 1
    m.seen, m.extra, m.counts["calls"] = x, nn.ReLU(), m.counts["calls"] + 1
    return m.extra(x) * m.k


CHANGING = {
    "slice of a buffer": Counting,
    "observer": FakeQuantize,
    "statistics": lambda: nn.BatchNorm2d(4).train(),
    "statistics, functional": lambda: buffered(
        Spelled(lambda m, x: F.batch_norm(x, m.k, m.v, training=True)), k=torch.zeros(4), v=torch.ones(4)
    ),
    "parameter": lambda: Spelled(lambda m, x: x * m.w.data.mul_(2), w=parameter(6)),
    "data": lambda: Spelled(lambda m, x: (setattr(m.w, "data", m.w.data * 2), x * m.w)[1], w=parameter(6)),
    "numpy": lambda: buffered(Spelled(through_numpy), k=torch.ones(6)),
    "foreach": lambda: buffered(Spelled(lambda m, x: (torch._foreach_mul_([m.k], 2), x * m.k)[1]), k=torch.ones(6)),
    "attributes": lambda: buffered(Spelled(rebound, counts={"calls": 0}), k=torch.ones(6)),
    "max_norm": lambda: Spelled(lambda m, x: x * F.embedding(torch.arange(2), m.w, max_norm=0.1)[0], w=parameter(3, 6)),
    "spectral_norm": lambda: nn.utils.spectral_norm(conv(3)).train(),
    "random numbers": lambda: Spelled(lambda m, x: F.dropout(x, 0.5) + torch.rand(6) + torch.randn_like(x)),
}


def contents(module):
    """What can be told of each module without changing it; tensors as they are, and by their versions."""
    tensors = {**module.state_dict(), **dict(module.named_parameters())}
    attributes = {path: sorted(vars(each)) + sorted(each._modules) for path, each in module.named_modules()}
    return {name: x.detach().clone() for name, x in tensors.items()}, attributes, getattr(module, "counts", {}).copy()


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.filterwarnings("ignore")
def test_the_module_and_the_input_are_left_as_they_were(name):
    model, x = nn.Sequential(conv(1), CHANGING[name]()), X.float()
    tensors, attributes, _ = contents(model)
    counts, held = dict(getattr(model[1], "counts", {})), {name: id(x) for name, x in model.named_parameters()}
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    recorded(model, x)
    assert torch.equal(torch.get_rng_state(), drawn) and torch.equal(x, X.float())
    again, others, _ = contents(model)
    assert attributes == others and counts == getattr(model[1], "counts", {})
    assert {name: id(x) for name, x in model.named_parameters()} == held
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items()) and again.keys() == tensors.keys()


@pytest.mark.parametrize("entry", [plan, fuse, record])
def test_an_example_that_the_network_writes_into_stays(entry):
    model, x = nn.Sequential(Spelled(lambda m, x: x.mul_(2)), conv(3)).double(), X.clone()
    entry(model, Arguments((x,)) if entry is record else (x,))
    assert torch.equal(x, X)


def test_gradients_and_training_mode_stay():
    model = randomised(Twice()).train()
    model.block.b.requires_grad_(False)
    model(X).sum().backward()
    before = model.block.a.weight.grad.clone()
    recorded(model, X.clone().requires_grad_())
    assert torch.equal(model.block.a.weight.grad, before) and model.block.b.weight.grad is None
    assert model.training and torch.is_grad_enabled() and not model.block.b.weight.requires_grad


def test_what_does_not_run_is_said_with_the_shape():
    with pytest.raises(RepfuseError, match="2x3x5x6"):
        recorded(nn.Sequential(conv(3)).double(), image(2, 3, 5, 6))


# --- fingerprints ---------------------------------------------------------------------------------------------------


def computed(scale=2.0, name="scale"):
    def forward(m, x):
        kernel = torch.zeros_like(m.w)
        kernel[:2] = m.w[:2] * float(getattr(m, name))
        return m.a(x) + F.conv2d(x, kernel, padding=1)

    model = Spelled(forward, a=parametrizations.weight_norm(conv(3)), w=nn.Parameter(torch.ones(4, 4, 3, 3)))
    model.register_buffer(name, torch.tensor(scale))
    return model.double().eval()


def test_the_fingerprint_is_that_of_the_architecture():
    model = computed()
    first = recorded(model, X).fingerprint()
    assert recorded(model, X).fingerprint() == recorded(model, image(3, 4, 8, 9)).fingerprint() == first
    assert recorded(randomised(model), X).fingerprint() == first
    assert recorded(copy.deepcopy(model).float(), X.float()).fingerprint() == first
    assert recorded(computed(scale=3.0), X).fingerprint() == first, "a number that forward asks for"
    assert recorded(computed(name="other"), X).fingerprint() != first


def test_what_forwards_do_is_not_in_the_fingerprint():
    one, other = (Spelled(forward, a=conv(3)).double() for forward in (lambda m, x: m.a(x), lambda m, x: -m.a(x)))
    assert recorded(one, X).fingerprint() == recorded(other, X).fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        nn.Sequential(conv(3), conv(1), nn.ReLU()),
        nn.Sequential(conv(3), nn.ReLU(), conv(1, outputs=5)),
        nn.Sequential(conv(3), nn.GELU(), conv(1)),
        nn.Sequential(conv(3), nn.ReLU(), conv(1, bias=False)),
        nn.Sequential(conv(5), nn.ReLU(), conv(1)),
        nn.Sequential(OrderedDict(a=conv(3), b=nn.ReLU(), c=conv(1))),
    ],
)
def test_another_architecture_has_another_fingerprint(other):
    one = nn.Sequential(conv(3), nn.ReLU(), conv(1))
    assert recorded(one, X.float()).fingerprint() != recorded(other, X.float()).fingerprint()


# --- constants ------------------------------------------------------------------------------------------------------


def test_constants_have_names_and_the_shapes_of_the_real_tensors():
    model = computed()
    found = recorded(model, X)
    names = [found.constants.name_of(node.args[1]) for node in named(found, "conv2d")]
    assert [found.constants.shape(name) for name in names] == [(4, 4, 3, 3)] * 2 and found.constants.module is model
    assert not found.marks and found.depends_on_weights


# --- memory ---------------------------------------------------------------------------------------------------------


def framed(m, x):
    y = F.pad(m.a(x), (1, 1, 1, 1))
    frame = m.a.bias.view(1, -1, 1, 1)
    y[:, :, 0:1, :] = frame
    y[:, :, -1:, :] = frame
    y[:, :, :, 0:1] = frame
    y[:, :, :, -1:] = frame
    return m.b(y)


def stepwise(m, x):
    """The second write reads what the first has left."""
    y = m.a(x)
    y[:, 0] = 1.0
    y[:, 1] = y[:, 0] + y[:, 1]
    return y


def masked(m, x):
    y = m.a(x)
    y[y > 0] = 0
    y[..., None, 0] = 5
    return y


def through_a_view(m, x):
    y = m.a(x)
    y[0][1] = 3.0
    row = y[:, :1]
    row[...] = 0
    y.data[:, 2] = 7.0
    return y


def of_an_argument(m, x):
    x[:, 0] = 0
    return m.a(x)


def inside(m, x):
    y = m.a(x)
    m.inner(y)
    return y


def written_buffer(m, x):
    m.k[0, 0] = 2.0
    return F.conv2d(x, m.k * 1)


INNER = Spelled(lambda m, y: y.__setitem__((0, 0), 1.0))
ASSIGNMENTS = {
    "framed": framed,
    "stepwise": stepwise,
    "masked": masked,
    "through a view": through_a_view,
    "of an argument": of_an_argument,
    "inside": inside,
}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_slice_assignments_are_nodes(name):
    found = assert_same(randomised(Spelled(ASSIGNMENTS[name], a=conv(1), b=conv(3, padding=0), inner=INNER)))
    assert named(found, "assigned")


def test_a_buffer_written_by_slices_is_read_after_the_write():
    model = buffered(Spelled(written_buffer), k=image(4, 4, 3, 3))
    found = recorded(model, X)
    assert torch.equal(run(found, X), model(X))


def before_branches(name):
    """A network that assigns, and has branches behind that, which alone are merged."""

    def forward(m, x):
        y = ASSIGNMENTS[name](m, x)
        return torch.sin(m.c(y) + m.d(y))

    model = randomised(Spelled(forward, a=conv(1), b=conv(3, padding=0), c=conv(3), d=conv(1), inner=INNER))
    made = plan(model, (X.clone(),), Policy.ALWAYS, keep_class=False)
    return model, replace(made, sites=tuple(site for site in made.sites if "c/conv2d" in site.nodes), live=None)


@pytest.mark.parametrize("name", [name for name in ASSIGNMENTS if name != "inside"])
@pytest.mark.parametrize("cleaned", [False, True])
def test_a_lowered_assignment_runs_without_repfuse(name, cleaned):
    model, made = before_branches(name)
    module = rewrite(model, made)
    assert len(made.sites) == 1 and "__setitem__" in module.code
    if cleaned:
        module.graph.eliminate_dead_code()
        module.recompile()
    assert "__setitem__" in module.code and "repfuse" not in module.code
    with torch.no_grad():
        for x in (X, image(3, 4, 9, 7)):
            torch.testing.assert_close(module(x.clone()), model(x.clone()), rtol=1e-12, atol=1e-12)


def test_an_assignment_inside_of_a_child_stays_there():
    _, made = before_branches("inside")
    assert not made.sites and [refusal.code for refusal in made.refusals] == ["outer-reference"]


def writers(forward, name, **members):
    """Who writes where the first value of this name lies, by the names of the functions."""
    found = recorded(Spelled(forward, **members), X.clone())
    node = next(node for node in found.nodes if name in (function(node), node.target))
    return list(map(function, found.memory.writers(node)))


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.__setitem__(0, 1.0),
        lambda y: y[0].__setitem__(1, 1.0),
        lambda y: y.data.__setitem__(..., 1.0),
        lambda y: y.mT.__setitem__(0, 1.0),
        lambda y: y[:, :1].__setitem__(slice(None), 0),
        lambda y: y.detach().zero_(),
        lambda y: operator.iadd(y, 1),
        lambda y: F.relu(y, inplace=True),
        lambda y: F.dropout(y, 0.5, True, True),
        lambda y: torch.sin(y, out=y),
        lambda y: torch.broadcast_tensors(y, y)[0].__setitem__(0, 1.0),
        lambda y: torch.einsum("abcd->dcba", y).zero_(),
        lambda y: y.chunk(2)[1].relu_(),
        lambda y: next(iter(y)).relu_(),
        lambda y: torch.ops.aten.slice.Tensor(y, 1, 0, 1).fill_(0),
        lambda y: torch.ops.aten.split.Tensor(y, 2)[0].fill_(0),
        torch.ops.aten.relu_.default,
        lambda y: torch.ops.aten.mul.out(y, y, out=y),
        lambda y: torch._foreach_mul_([y], 2),
        lambda y: setattr(y, "data", y * 2),
    ],
)
def test_writes_through_any_alias_are_seen(write):
    def forward(m, x):
        y = torch.sin(x)
        write(y)
        return y + 1

    assert len(writers(forward, "sin")) == 1 and not writers(forward, "x")


def test_what_an_assignment_reads_is_not_written():
    def forward(m, x):
        x[0] = torch.cos(x)[0]
        return x

    assert writers(forward, "x") == ["assigned"] and not writers(forward, "cos")


@pytest.mark.parametrize("read", [lambda y: y.clone(), lambda y: y * 1, torch.ops.aten.sin.default])
def test_a_copy_is_not_the_same_memory(read):
    assert not writers(lambda m, x: (y := torch.sin(x), read(y).relu_(), y)[2], "sin")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spelled", [F.batch_norm, torch.ops.aten.batch_norm.default, F.instance_norm])
def test_only_a_normalisation_in_training_writes_its_statistics(spelled, training):
    def forward(m, x):
        if spelled is torch.ops.aten.batch_norm.default:
            return spelled(x, None, None, m.mean, m.var, training, 0.1, 1e-5, False)
        return spelled(x, m.mean, m.var, None, None, training)

    def seen(name):
        kept = buffered(Spelled(forward), mean=torch.zeros(4).double(), var=torch.ones(4).double())
        return writers(lambda m, x: m.kept(x), name, kept=kept)

    assert bool(seen("kept.mean")) == bool(seen("kept.var")) == training and not seen("x")


def test_memory_that_is_given_away_and_taken_again_is_not_the_same():
    def forward(m, x):
        for _ in range(20):
            x = (x * 2).relu_()
        return x

    found = recorded(Spelled(forward), X)
    assert all(len(found.memory.writers(node)) == 1 for node in named(found, "mul"))


def test_two_names_of_a_parameter_are_one_memory():
    model = Spelled(lambda m, x: x * m.w.sum() + m.other.data.mul_(2).sum(), w=parameter(4))
    model.other = model.w
    found = recorded(model, X)
    read = next(node for node in found.nodes if node.op == "get_attr")
    assert found.memory.is_rewritten(read) and found.constants.name_of(read) is None


WRITES = {
    "slice": lambda s: s.__setitem__(0, 1.0),
    "slice of a view": lambda s: s[0].__setitem__(1, 1.0),
    "slice of a kept view": lambda s: s[:, :1].__setitem__(slice(None), 0),
    "data": lambda s: s.data.__setitem__(..., 1.0),
    "out=": lambda s: torch.sin(s, out=s),
    "aten": lambda s: torch.ops.aten.slice.Tensor(s, 1, 0, 1).fill_(0),
}
RENAMED = ("slice", "out=")
"""Whose result is what the name stands for from then on."""


@pytest.mark.parametrize("name", WRITES)
def test_it_is_known_what_is_written_in_between_and_seen_later(name):
    def forward(m, x):
        source = torch.sin(x)
        first = m.a(source)
        WRITES[name](source)
        return first + torch.cos(source)

    found = recorded(Spelled(forward, a=conv(1)).double(), X)
    sin, first, last = (named(found, name)[0] for name in ("sin", "conv2d", "cos"))
    (writer,) = found.memory.writers(sin)
    assert found.memory.written_between(sin, first, last) and not found.memory.written_between(sin, sin, first)
    assert found.memory.seen_later(writer) == (name not in RENAMED)
    assert found.memory.of(sin) == found.memory.of(writer.args[0]) != found.memory.of(first)


def test_what_belongs_to_the_caller_is_seen_later():
    found = recorded(Spelled(lambda m, x: x.add_(torch.sin(x))), X.clone())
    assert found.memory.seen_later(named(found, "add_")[0])


# --- values that somebody else may read -----------------------------------------------------------------------------

KEPT: list = []


def _by_a_closure():
    held = []
    return lambda m, y: held.append(y)


KEEPING = {
    "attribute": lambda m, y: setattr(m, "seen", y),
    "buffer": lambda m, y: setattr(m, "k", y),
    "list": lambda m, y: m.items.append(y),
    "dict": lambda m, y: m.table.update(y=y),
    "dict in a list": lambda m, y: m.items.append({"y": y}),
    "set": lambda m, y: m.bag.add(y),
    "object": lambda m, y: setattr(m.thing, "y", y),
    "global": lambda m, y: KEPT.append(y),
    "closure": _by_a_closure(),
    "attribute of the class": lambda m, y: setattr(type(m), "seen", y),
}


class Thing:
    pass


@pytest.mark.parametrize("name", KEEPING)
def test_values_that_forward_keeps_are_known(name):
    class Keeping(Spelled):
        pass

    def forward(m, x):
        y = torch.sin(x)
        KEEPING[name](m, y)
        return torch.cos(y)

    inner = Keeping(forward, items=[], table={}, bag=set(), thing=Thing())
    inner.register_buffer("k", torch.zeros(2))
    found = recorded(nn.Sequential(inner, nn.ReLU()), X)
    KEPT.clear()
    (call,) = found.calls["0"]
    assert named(found, "sin")[0] in (*found.escaping, *call.stored), "somebody may read it later"
    assert not inner.items and not inner.table and not inner.bag and not vars(inner.thing)
    assert not {*named(found, "cos"), *named(found, "relu")} & {*found.escaping, *call.stored}


def test_what_is_dropped_does_not_escape():
    found = recorded(randomised(Twice()), X)
    assert not found.escaping and not found.marks and not any(c.stored for each in found.calls.values() for c in each)


def test_a_forward_that_changes_what_its_module_holds_is_marked():
    def counting(m, x):
        m.count += 1
        return x

    def replacing(m, x):
        m.k = torch.from_numpy(m.k.numpy() * 2)
        return x * m.k

    model = nn.Sequential(Spelled(counting, count=0), buffered(Spelled(replacing), k=torch.ones(6).double()), Block())
    found = recorded(model.double(), X)
    assert codes(found).keys() == {"0", "1"} and codes(found)["0"] == "writes-state"


# --- what forwards ask for ------------------------------------------------------------------------------------------

ASKING = {
    "branch": lambda m, x: x if x.sum() > 0 else -x,
    "item": lambda m, x: x * m.a(x).mean().item(),
    "int": lambda m, x: x[: max(1, int(x.abs().mean()))],
    "list": lambda m, x: x * x.flatten().tolist()[0],
    "numpy": lambda m, x: x * float(m.a(x).detach().numpy().mean()),
    "text": lambda m, x: x if "nan" in str(m.a(x)) else -x,
    "comparison": lambda m, x: x if torch.equal(x, m.a(x)) else -x,
    "contains": lambda m, x: x if 3.0 in m.a(x) else -x,
    "index": lambda m, x: x * [2, 3, 5, 7][m.a(x).mean((0, 2, 3)).argmax()],
    "how many": lambda m, x: x if len(m.a(x).relu().nonzero()) > 7 else -x,
    "how many of a mask": lambda m, x: x if (y := m.a(x))[y > 0].numel() > 7 else -x,
    "how many others": lambda m, x: x if m.a(x).unique().shape[0] > 7 else -x,
}
COUNTING = ("how many", "how many of a mask", "how many others")
"""What is known of these first is that it is a size."""


@pytest.mark.parametrize("name", ASKING)
def test_a_forward_that_asks_for_values_is_marked_and_nothing_around_it(name):
    model = randomised(nn.Sequential(conv(1), Spelled(ASKING[name], a=conv(1)), nn.Sequential(conv(1), Block())))
    found = recorded(model, X)
    assert codes(found).keys() == {"1"} and found.depends_on_weights
    assert codes(found)["1"] in ("decides-by-value", *["decides-by-size"] * (name in COUNTING))
    convolved = named(found, "conv2d")[0]
    assert found.mark_of(convolved) is None and found.mark_of(named(found, "relu")[-1]) is None


def test_what_is_asked_is_answered_with_the_numbers_of_a_run_in_full():
    """A run without arithmetic would have come out on the other side."""
    model = randomised(Spelled(lambda m, x: torch.sin(x) if m.a(x).abs().sum() > 0 else torch.cos(x), a=conv(1)))
    assert named(assert_same(model), "sin")


CONSTANT = {
    "convolved": lambda m: F.conv2d(m.k * 1, m.w * 1),
    "multiplied": lambda m: F.linear(m.k[0, 0] * 1, m.w[:1, :, 0, 0].expand(2, 4)[:, :3] * 1),
    "normalised": lambda m: F.batch_norm(m.k * 1, torch.zeros(4).double(), torch.ones(4).double()),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_number_of_a_constant_is_that_of_a_run_in_full(name):
    """No convolution of weights is left out of a run without arithmetic."""

    def forward(m, x):
        amount = CONSTANT[name](m)
        return x * float(amount.sum()) if amount.abs().sum() > 0 else -x

    assert_same(buffered(Spelled(forward, w=parameter(4, 4, 1, 1)), k=image(4, 4, 3, 3)))


def test_a_question_about_a_constant_is_no_obstacle():
    found = assert_same(Spelled(lambda m, x: x * m.g.sum().item() if m.g[0] < 100 else x, g=parameter(4)))
    assert not found.marks and found.depends_on_weights


def test_an_answer_that_a_write_changes_is_no_constant():
    def forward(m, x):
        y = x if m.count == 0 else -x
        m.count += 1
        return y

    model = nn.Sequential(nn.ReLU(), buffered(Spelled(forward), count=torch.zeros(())), Block().double())
    assert codes(recorded(model, X)).keys() == {"1"}


def test_no_value_requires_a_gradient():
    def forward(m, x):
        return m.a(x) if x.requires_grad or m.a(x).requires_grad else -x

    assert named(recorded(Spelled(forward, a=conv(1)).double().requires_grad_(), X), "neg")


def test_dtype_and_device_stay_questions():
    model = Spelled(lambda m, x: x + torch.ones(1, dtype=m.w.dtype, device=m.w.device) * m.w[0], w=parameter(4))
    found = recorded(model, X)
    model.to(torch.bfloat16)
    assert run(found, X.bfloat16()).dtype is torch.bfloat16


def test_randomness_is_not_frozen():
    found = recorded(Spelled(lambda m, x: x + torch.rand(1, dtype=x.dtype)), X)
    assert not torch.equal(run(found, X), run(found, X)) and found.constants.name_of(named(found, "rand")[0]) is None


def test_mixed_precision_is_marked_where_it_is():
    def forward(m, x):
        y = m.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = m.b(x)
        return y + z.float()

    found = recorded(nn.Sequential(Spelled(forward, a=conv(3), b=conv(1)), Block()), X.float())
    first, second, third, _ = named(found, "conv2d")
    (call,) = found.calls["0"]
    assert call.enters_autocast and found.dtype_of[second] is torch.bfloat16 and not found.marks
    assert found.between(first, named(found, "add")[0]) is None and found.mark_of(third) is None
    assert found.between(second, named(found, "float")[0])[0] == "autocast"


# --- tensors that come from nowhere ---------------------------------------------------------------------------------

OUTER = torch.ones(4, 1, 1, dtype=torch.float64)

FROM_NOWHERE = {
    "numpy": lambda m, x: x * torch.from_numpy(m.w.detach().numpy() * 2),
    "global": lambda m, x: x * OUTER,
    "list": lambda m, x: x * m.held[0],
}


@pytest.mark.parametrize("name", FROM_NOWHERE)
def test_a_tensor_from_nowhere_is_no_constant(name):
    model = Spelled(FROM_NOWHERE[name], w=parameter(4, 1, 1), held=[OUTER * 3])
    found = recorded(nn.Sequential(conv(1), model, Block()).double(), X)
    (mul,) = named(found, "mul")
    assert named(found, "unknown") and found.constants.name_of(mul.args[1]) is None
    assert set(codes(found)) <= {"1"}


class Scripted(nn.Module):
    def forward(self, x, y):
        return (x * y).relu()


def test_what_a_scripted_child_does_inside_is_not_seen_and_it_may_read_all_that_it_is_given():
    inner = Spelled(lambda m, x: m.script(torch.sin(x), m.a(x)), a=conv(1), script=torch.jit.script(Scripted()))
    found = recorded(nn.Sequential(inner, conv(3)).double(), X)
    (call,), sin, a = found.calls["0.script"], named(found, "sin")[0], named(found, "conv2d")[0]
    (made,) = (node for node in found.nodes if found.call_of[node] is call)
    assert call.args == (sin, a) and call.output is made and function(made) == "unknown" and not found.marks
    assert found.escaping == {sin, a} and found.shape_of[made] == (2, 4, 5, 6)


class Writing(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def test_what_a_scripted_child_writes_is_seen():
    def forward(m, x):
        y = torch.sin(x)
        m.script(y)
        return y + 1

    (writer,) = writers(forward, "sin", script=torch.jit.script(Writing()))
    assert writer == "unknown"


@pytest.mark.parametrize(
    ("forward", "sites"),
    [
        (lambda m, x: F.relu(m.a(x) + m.b(x)) + m.script(x, x), 1),
        (lambda m, x: F.relu(m.b(m.c(x))) + m.script(x, m.c(x)), 1),
        (lambda m, x: m.script(y := m.a(x), y) + (y + m.b(x)), 0),
        (lambda m, x: m.b(m.script(m.c(x), x)), 0),
    ],
)
def test_what_is_around_a_scripted_child_merges_and_what_it_reads_stays(forward, sites):
    script = torch.jit.script(Scripted())
    model = randomised(Spelled(forward, a=conv(1), b=conv(3), c=conv(1, bias=False), script=script))
    result = fuse(model, (X,), Policy.ALWAYS)
    assert len(result.plan.sites) == sites
    assert max(error(model, result.module, x) for x in (X, image(1, 4, 9, 7))) < 1e-12


class DecidesByValue(nn.Module):
    def forward(self, x):
        if bool(x.sum() > 0):
            return x + x
        return x * 3


class DecidesBySize(nn.Module):
    def forward(self, x):
        if x.size(2) > 100:
            return x * 3
        return x + x


@pytest.mark.parametrize("kind", [DecidesByValue, DecidesBySize])
def test_what_a_scripted_child_decides_is_not_taken_for_all(kind):
    def forward(m, x):
        return F.relu(m.a(m.script(x)) + m.b(x))

    model = randomised(Spelled(forward, a=conv(3), b=conv(1), script=torch.jit.script(kind())))
    fused = fuse(model, (X,)).module
    assert max(error(model, fused, x) for x in (X, -X, image(1, 4, 120, 5))) < 1e-12


def test_a_tensor_that_forward_makes_unseen_marks_it():
    found = recorded(Spelled(lambda m, x: x + torch.from_numpy(x.new_ones(6).numpy() * 2)), X)
    assert codes(found).keys() == {""}


# --- sizes ----------------------------------------------------------------------------------------------------------


def by_sizes(m, x):
    n, c, h, w = x.shape
    return x.reshape(n, c, h * w).view(n, c, h, -1) + x.new_zeros(x.size(0), 1, x.shape[-2], w // 1)


def test_sizes_of_free_axes_are_nodes_and_those_that_the_weights_fix_are_numbers():
    found = assert_same(randomised(nn.Sequential(conv(3), Spelled(by_sizes))))
    reshape, view = named(found, "reshape")[0], named(found, "view")[0]
    n, c, tokens = reshape.args[1:]
    assert c == view.args[2] == 4 and type(c) is int
    assert (n.target, n.args[1]) == ("size", 0) and tokens.target is operator.mul and not found.uneven
    for size in [(1, 4, 9, 3), (3, 4, 2, 8)]:
        with torch.no_grad():
            assert torch.equal(run(found, image(*size)), found.module(image(*size)))


def test_a_number_in_the_place_of_a_size_is_uneven():
    found = recorded(randomised(nn.Sequential(conv(3), Spelled(lambda m, x: x[:, :, : int(x.shape[2] / 2)]))), X)
    (cut,) = named(found, "getitem")
    assert cut in found.uneven and found.mark_of(cut)[0] == "changes-with-size"
    assert codes(found) == {"1": "decides-by-size"}


DECIDING = {
    "comparison": lambda m, x: m.a(x) if x.shape[2] < 5000 else x,
    "rounded up": lambda m, x: m.a(x) if -(-x.shape[2] // 5000) < 2 else x,
    "truth": lambda m, x: m.a(x) if x.size(0) else x,
    "key": lambda m, x: m.a(x) if x.shape[3] not in {1000} else x,
    "text": lambda m, x: m.a(x) if "1000" not in str(tuple(x.shape)) else x,
    "format": lambda m, x: m.a(x) if f"{x.shape[2]}" != "1000" else x,
    "number of elements": lambda m, x: m.a(x) if x.numel() < 10**9 else x,
    "comparison with a fraction": lambda m, x: m.a(x) if x.shape[2] < 4999.5 else x,
    "difference": lambda m, x: m.a(x) if abs(x.shape[2] - x.shape[3]) < 5000 else x,
}


@pytest.mark.parametrize("name", DECIDING)
def test_a_forward_that_decides_by_a_free_size_is_marked(name):
    inner = Spelled(DECIDING[name], a=nn.Sequential(conv(3), Block()))
    found = recorded(randomised(nn.Sequential(inner, Block())), X)
    assert codes(found) == {"0": "decides-by-size"} and found.calls["0"][0].decisions


LEAVING = {
    "length": lambda x: len(x) < 20,
    "whole": lambda x: int(x.shape[0]) < 20,
    "scaled": lambda x: x.shape[0] * 0.5 < 10,
    "ratio": lambda x: x.shape[0] / x.shape[1] < 5,
}
"""Decisions by plain numbers: nobody is told of these, only that a number was made."""


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, small: F.relu(m.a(x) + m.b(x)) if small else x,
        lambda m, x, small: m.b(m.c(x) if small else F.relu(m.c(x))),
        lambda m, x, small: m.n(m.a(x) if small else m.b(x)),
    ],
)
def test_a_forward_that_decides_by_a_number_that_it_makes_of_a_size_stays_exact(forward, name):
    decides = LEAVING[name]
    members = {"a": conv(1), "b": conv(3), "c": conv(1, bias=False), "n": nn.BatchNorm2d(4)}
    model = randomised(Spelled(lambda m, x: forward(m, x, decides(x)), **members))
    fused = fuse(model, (X,), Policy.ALWAYS).module
    assert max(error(model, fused, x) for x in (X, image(21, 4, 5, 6))) < 1e-12


@pytest.mark.parametrize("name", LEAVING)
def test_what_computes_with_numbers_that_are_made_of_sizes_is_left_alone(name):
    found = recorded(randomised(Spelled(lambda m, x: m.a(x) * 2 if LEAVING[name](x) else x, a=conv(3))), X)
    (mul,) = named(found, "mul")
    assert found.calls[""][0].decisions and found.mark_of(mul)[0] == "decides-by-size"


def _checked(x):
    assert x.dim() == 4 and x.ndim == len(x.shape)
    return x


FIXED = {
    "channels": lambda m, x: m.a(x) if x.shape[1] == 4 else x,
    "axes": lambda m, x: m.a(_checked(x)),
    "weights": lambda m, x: m.a(x) if m.a.weight.shape[0] > 2 else x,
    "computed from channels": lambda m, x: m.a(x) if x.shape[1] // 2 % 2 == 0 else x,
}


@pytest.mark.parametrize("name", FIXED)
def test_a_decision_by_a_size_that_never_differs_is_no_obstacle(name):
    model = nn.Sequential(conv(1), nn.BatchNorm2d(4), Spelled(FIXED[name], a=conv(3)))
    assert not recorded(randomised(model), X).marks


def test_an_input_without_a_batch_decides_too():
    """What is the number of channels of a batch is the height of one image."""
    model = randomised(nn.Sequential(conv(1), Spelled(FIXED["channels"], a=conv(3))))
    assert codes(recorded(model, X)).keys() == {"1"}
    fused = fuse(model, (X,), Policy.ALWAYS).module
    assert max(error(model, fused, x) for x in (X, X[0], image(4, 4, 6))) < 1e-12


def test_a_forward_that_does_other_things_at_other_sizes_is_marked_and_not_what_it_calls():
    def forward(m, x):
        for _ in range(x.shape[2]):
            x = m.block(x) * 2
        return x

    found = recorded(randomised(Spelled(forward, block=Block())), X)
    assert codes(found) == {"": "changes-with-size"} and len(found.calls["block"]) == 5


@pytest.mark.parametrize("fails", [lambda y: y.view(-1)[2000], lambda y: torch.linalg.cholesky(y[0, 0, :4, :4])])
def test_an_error_that_forward_catches_is_a_decision(fails):
    def forward(m, x):
        try:
            fails(m.a(x))
        except Exception:
            return m.a(x) + m.b(x)
        return m.a(x) - m.b(x)

    model = randomised(Spelled(lambda m, x: F.relu(forward(m, x)), a=conv(3, groups=4, bias=False), b=conv(1)))
    with torch.no_grad():
        model.a.weight.zero_()[:, :, 1, 1] = 1.0
        others = [X, image(5, 4, 20, 20), torch.eye(6).double().expand(2, 4, 6, 6)]
    assert codes(recorded(model, X)).keys() == {""}
    fused = fuse(model, (X,)).module
    assert max(error(model, fused, x) for x in others) < 1e-12


PICKED = {
    "tensor": lambda m, x: F.conv2d(x, (m.a.weight, m.c.weight)[x.shape[2] % 2], padding=1) + m.b(x),
    "module": lambda m, x: (m.a, m.c)[x.shape[2] % 2](x) + m.b(x),
    "operand": lambda m, x: m.a(((s := torch.sin(x)), torch.cos(x))[x.shape[2] % 2]) + m.b(s),
    "number": lambda m, x: m.a(x) * (2, 3)[x.shape[2] % 2] + m.b(x),
}


@pytest.mark.parametrize("height", [5, 6])
@pytest.mark.parametrize("name", PICKED)
def test_what_is_another_at_other_sizes_is_no_answer(name, height):
    forward = PICKED[name]
    model = randomised(Spelled(lambda m, x: F.relu(forward(m, x)), a=conv(3), b=conv(1), c=conv(3)))
    fused = fuse(model, (image(2, 4, height, 6),)).module
    assert max(error(model, fused, image(2, 4, n, 6)) for n in (4, 5, 6, 7)) < 1e-12


@contextmanager
def _set(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    yield
    if name in ("forward", "_conv_forward"):
        delattr(module, name)
    else:
        setattr(module, name, before)


@contextmanager
def _other_numbers(parameter, change, back):
    change(parameter.data)
    yield
    back(parameter.data)


@contextmanager
def _data_of(parameter, other):
    before, parameter.data = parameter.data, other.data
    yield
    parameter.data = before


@contextmanager
def _hung(hang, hook):
    handle = hang(hook)
    yield
    handle.remove()


def _twice(m):
    return lambda x, *_: F.conv2d(x, m.a.weight, m.a.bias, padding=1) * 2


CHANGED = {
    "setting": lambda m: _set(m.a, "dilation", (2, 2)),
    "padding mode": lambda m: _set(m.a, "padding_mode", "circular"),
    "number": lambda m: _set(m.n, "eps", 0.1),
    "parameter": lambda m: _set(m.a, "weight", m.b.weight),
    "no parameter": lambda m: _set(m.a, "bias", None),
    "numbers": lambda m: _other_numbers(m.a.weight, lambda x: x.mul_(2), lambda x: x.div_(2)),
    "data": lambda m: _data_of(m.a.weight, m.b.weight),
    "hook": lambda m: _hung(m.a.register_forward_hook, lambda m, x, y: y * 2),
    "hook before": lambda m: _hung(m.a.register_forward_pre_hook, lambda m, x: x[0] * 2),
    "forward": lambda m: _set(m.a, "forward", _twice(m)),
    "part of a forward": lambda m: _set(m.a, "_conv_forward", _twice(m)),
}


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("name", CHANGED)
def test_a_layer_that_is_another_one_at_some_sizes_while_it_is_called_is_not_merged(name, large):
    def forward(m, x):
        with CHANGED[name](m) if (x.shape[2] > 6) is large else nullcontext():
            return m.n(m.a(x))

    model = randomised(Spelled(forward, a=conv(3), b=conv(3), n=nn.BatchNorm2d(4)))
    assert not plan(model, (X,)).sites
    assert max(error(model, fuse(model, (X,)).module, x) for x in (X, image(3, 4, 20, 9), image(1, 4, 3, 3))) < 1e-12


@pytest.mark.parametrize("large", [True, False])
def test_a_layer_whose_weight_another_forward_changes_at_some_sizes_is_not_merged(large):
    def forward(m, x):
        weight, there = m.block[2].weight, (x.shape[2] > 6) is large
        change = _other_numbers(weight, lambda _: weight.mul_(2), lambda _: weight.div_(2))
        with change if there else nullcontext():
            return m.block(x)

    block = nn.Sequential(conv(3), nn.ReLU(), conv(3), nn.BatchNorm2d(4))
    model = randomised(Spelled(forward, block=block))
    assert not plan(model, (X,)).sites
    found = recorded(model, X)
    _, changed = named(found, "conv2d")
    assert changed in found.foreign or found.mark_of(changed)


def test_what_a_block_reads_that_is_called_at_other_sizes_alone_is_read_elsewhere():
    def forward(m, x):
        return m.block(x) if x.shape[2] > 6 else m.pair(x)

    a = conv(3)
    model = Spelled(forward, pair=nn.Sequential(a, nn.BatchNorm2d(4)), block=nn.Sequential(nn.ReLU(), a))
    found = recorded(randomised(model), X)
    assert found.elsewhere == {"pair.0.weight", "pair.0.bias"}
    assert not plan(model, (X,)).sites


def test_what_is_kept_at_other_sizes_alone_is_no_obstacle_to_what_is_called_before():
    """A number, of which nobody reads more at the example's size."""

    def forward(m, x):
        y = m.block(x)
        if x.shape[2] > 6:
            m.block[0].seen = 7
        return y

    model = randomised(Spelled(forward, block=nn.Sequential(conv(3), nn.BatchNorm2d(4))))
    assert not recorded(model, X).marks and len(plan(model, (X,)).sites) == 1


def test_a_set_that_a_module_holds_is_the_same_in_any_order():
    def forward(m, x):
        m.factor = float("1.5")
        return m.block(x)

    model = randomised(Spelled(forward, block=nn.Sequential(conv(3), nn.BatchNorm2d(4))))
    model.names, model.factor = {f"stage{number}" for number in range(7)}, float("1.5")
    assert not recorded(model, X).marks


class _OtherNumber(nn.BatchNorm2d):
    at_large = False

    @property
    def eps(self):
        return 0.5 if _OtherNumber.at_large else 1e-5

    @eps.setter
    def eps(self, value):
        pass


class _Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class _Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        return result * 2 if func is torch.conv2d else result


def _global_hook():
    return _hung(register_module_forward_hook, lambda m, x, y: y * 2 if isinstance(m, nn.Conv2d) else None)


@contextmanager
def _of_class(module, kind):
    before, module.__class__ = type(module), kind
    yield
    module.__class__ = before


AROUND = {
    "class that adds what is read": lambda m: _set(_OtherNumber, "at_large", True),
    "class": lambda m: _of_class(m.block[0], _Twice),
    "class of PyTorch's own": lambda m: _of_class(m.block[2], nn.Tanh),
    "mode": lambda m: _Doubling(),
    "hook on all modules": lambda m: _global_hook(),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_is_another_around_a_block_at_other_sizes_alone_is_seen(name):
    def forward(m, x):
        with AROUND[name](m) if x.shape[2] > 6 else nullcontext():
            return m.block(x)

    model = Spelled(forward, block=nn.Sequential(conv(3), _OtherNumber(4), nn.ReLU()))
    found = recorded(randomised(model), X)
    assert len(found.inputs) > 1 and (found.marks or found.uneven)


def test_a_layer_of_pytorchs_own_takes_no_other_number_of_axes_than_it_does():
    x = image(2, 4, 4, 6)  # of which one image has as many rows as channels
    found = recorded(randomised(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), x)
    assert not any(map(found.shapes_at_other_ranks, found.nodes))
    alone = recorded(randomised(nn.Sequential(nn.Conv2d(4, 4, 1))), x)
    assert any(map(alone.shapes_at_other_ranks, alone.nodes))


def test_what_is_hung_on_all_modules_is_seen_at_all_sizes():
    def doubled(module, _, y):
        return y * 2 if isinstance(module, nn.Conv2d) and y.shape[2] > 6 else None

    model = randomised(nn.Sequential(conv(3), nn.BatchNorm2d(4)))
    handle = register_module_forward_hook(doubled)
    try:
        assert not plan(model, (X,)).sites
    finally:
        handle.remove()
    assert len(plan(model, (X,)).sites) == 1


ORDERED = {
    "calls": lambda m, x, large: (m.a(x), m.a(m.b(x))) if large else (m.a(m.b(x)), m.a(x))[::-1],
    "operand": lambda m, x, large: (m.a(x), m.b(x if large else m.c(x))),
    "number of calls": lambda m, x, large: (m.a(x), m.a(m.a(x)) if large else m.a(x)),
    "other module": lambda m, x, large: (m.a(x), m.b(x) if large else m.c(x)),
}


@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize("name", ORDERED)
def test_layers_that_are_called_otherwise_at_some_sizes_stay_exact(name, larger):
    def forward(m, x):
        return sum(map(m.n, ORDERED[name](m, x, (x.shape[2] > 6) is larger)))

    model = randomised(Spelled(forward, a=conv(3), b=conv(3), c=conv(3), n=nn.BatchNorm2d(4)))
    fused = fuse(model, (X,), Policy.ALWAYS).module
    assert max(error(model, fused, x) for x in (X, image(3, 4, 20, 9), image(1, 4, 3, 3))) < 1e-12


# --- which sizes are tried ------------------------------------------------------------------------------------------


class Spy(Spelled):
    """Notes the shapes that it is called with, in a list that its copies share."""

    def __init__(self, forward=lambda m, x: x, **members):
        super().__init__(forward, **members)
        self.seen = _Shared()

    def forward(self, *inputs):
        self.seen.append(tuple(tuple(x.shape) for x in inputs))
        return super().forward(*inputs) if len(inputs) == 1 else sum(x.sum() for x in inputs)


class _Shared(list):
    def __deepcopy__(self, memo):
        return self


def sizes_taken(model, *inputs):
    """Return, per axis of each input, the sizes that the network was run at with as many axes."""
    recorded(model, *inputs)
    (spy,) = (module for module in model.modules() if isinstance(module, Spy))
    alike = [seen for seen in spy.seen if all(len(x) == given.dim() for x, given in zip(seen, inputs, strict=True))]
    return [[set(sizes) for sizes in zip(*shapes, strict=True)] for shapes in zip(*alike, strict=True)]


def is_around(sizes, n):
    return n in sizes and min(sizes) < n < max(sizes)


@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (2, 4, 33, 20), (3, 4, 7, 9)])
def test_each_free_axis_is_tried_larger_and_smaller(shape):
    model = nn.Sequential(conv(3, inputs=shape[1]), nn.MaxPool2d(2), Spy())
    before = nn.Sequential(Spy(), model[:2])
    ((batch, channels, height, width),) = sizes_taken(before, torch.randn(shape))
    assert is_around(batch, shape[0]) and channels >= {shape[1]}
    assert is_around(height, shape[2]) and is_around(width, shape[3])


def test_a_network_that_asks_for_no_size_is_run_at_one_other():
    """Which is larger along some axes, and smaller along others; but for those of another rank."""
    found = recorded(nn.Sequential(conv(3), nn.ReLU()), torch.randn(2, 4, 32, 32))
    shapes = [arguments.args[0].shape for arguments in found.inputs]
    one, other = (shape for shape in shapes if len(shape) == 4)
    changes = [b - a for a, b in zip(one, other, strict=True)]
    assert changes[1] == 0 and all(changes[:1] + changes[2:]) and min(changes) < 0 < max(changes)


@pytest.mark.parametrize(("shape", "far"), [((1, 4, 16, 16), True), ((2, 4, 32, 32), False)])
def test_small_examples_are_tried_far(shape, far):
    found = recorded(nn.Sequential(conv(3), Spelled(by_sizes)), torch.randn(shape))
    assert any(max(arguments.args[0].shape) > 1000 for arguments in found.inputs) == far


LAYERS = (
    *(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
    *(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LocalResponseNorm(2)),
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.PReLU(4), nn.Softmax(1), nn.Dropout(), nn.Threshold(0.1, 2), nn.Identity()),
    *(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.LPPool2d(2, 2), nn.PixelUnshuffle(1)),
    *(nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.Upsample(scale_factor=2), nn.Unfold(2), nn.Flatten(2)),
    *(nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 1)), nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(4))),
)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_networks_of_pytorchs_own_layers_are_run_at_other_sizes(layer):
    model = randomised(nn.Sequential(conv(3), layer))
    found = recorded(model, image(2, 4, 8, 10))
    assert len(found.inputs) > 1 and not found.marks and not found.uneven
    for arguments in found.inputs[1:]:
        shape = model(*arguments.args).shape
        assert shape in found.shapes(found.calls[""][0].output)


def test_the_axes_are_other_sizes_than_each_other():
    spy = nn.Sequential(Spy(), conv(3))
    recorded(spy, torch.randn(2, 4, 32, 32))
    sizes = [seen[0][2:] for seen in spy[0].seen if len(seen[0]) == 4]
    assert any(h != w for h, w in sizes) and any(h % 2 for h, _ in sizes)


def test_a_network_that_takes_one_size_only_is_a_network_of_that_size():
    model = randomised(nn.Sequential(conv(3), nn.Flatten(0), nn.Linear(240, 3)))
    found = recorded(model, X)
    assert not found.marks and found.shapes(named(found, "conv2d")[0]) == [(2, 4, 5, 6)]


@pytest.mark.parametrize("parity", [0, 1])
def test_where_every_second_size_is_taken_these_are_tried(parity):
    """Of one parity, and near the example: an odd number of windows, say."""

    def forward(m, x):
        h = x.shape[2]
        torch._assert(h % 2 == parity and 4 < h < 11, "not this one")
        return m.a(x)

    found = recorded(randomised(Spelled(forward, a=conv(3))), image(1, 4, 8 - parity, 9))
    (convolution,) = named(found, "conv2d")
    assert not found.is_fixed(convolution, 2)


def test_where_only_the_batch_is_free_that_is_tried():
    spy = nn.Sequential(Spy(), conv(3), nn.Flatten(), nn.Linear(4 * 35, 3))
    found = recorded(spy, torch.randn(2, 4, 5, 7))
    (convolution,) = named(found, "conv2d")
    assert {shape[1:] for shape in found.shapes(convolution)} == {(4, 5, 7)}
    assert not found.is_fixed(convolution, 0) and found.is_fixed(convolution, 2) and found.is_fixed(convolution, -1)


def test_an_example_of_no_images_is_one():
    found = recorded(conv(3), torch.randn(0, 4, 5, 7))
    (convolution,) = named(found, "conv2d")
    assert not found.is_fixed(convolution, 0) and not found.is_fixed(convolution, 2)


@pytest.mark.parametrize("step", [4, 14, 32])
def test_networks_that_take_multiples_get_multiples(step):
    def forward(m, x):
        n, c, h, w = x.shape
        return x.view(n, c, h // step, step, w // step, step).mean((3, 5))

    model = nn.Sequential(conv(3), Spelled(forward), conv(1))
    found = recorded(model, torch.randn(1, 4, 4 * step, 4 * step))
    last = named(found, "conv2d")[-1]
    assert not found.is_fixed(last, 2) and not found.is_fixed(last, 3)


def test_tokens_are_tried_and_features_are_not_taken_for_them():
    spy = nn.Sequential(Spy(), nn.Linear(12, 5))
    ((batch, tokens, features),) = sizes_taken(spy, torch.randn(2, 9, 12))
    assert is_around(batch, 2) and is_around(tokens, 9) and 12 in features


def test_axes_of_several_inputs_that_have_the_same_size_go_together_and_then_alone():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.spy = Spy()

        def forward(self, x, y):
            self.spy(x, y)
            return x + y

    spy = Two()
    recorded(spy, torch.randn(2, 4, 8, 6), torch.randn(2, 4, 8, 6))
    batches = {seen for seen in spy.spy.seen if len(seen[0]) == 4}
    assert len({x for x, y in batches if x == y}) > 2
    alone = [(x, y) for x, y in batches if x != y]
    assert alone and all(sum(a != b for a, b in zip(x, y, strict=True)) == 1 for x, y in alone)


# --- sketches -------------------------------------------------------------------------------------------------------


def in_full(model, x, monkeypatch):
    """The recording without any run that leaves arithmetic out."""
    monkeypatch.setattr("repfuse.recording.recorder.SHORTCUTS", {})
    return recorded(model, x)


def listing(found):
    return [
        (
            found.names[n],
            n.op,
            str(n.target),
            str(n.args),
            found.shape_of.get(n),
            found.dtype_of.get(n),
            found.memory.of(n),
            found.run.writes.get(n),
        )
        for n in found.nodes
    ]


SIZES = st.integers(0, 4)
CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


def tensor(draw, shape):
    """Of this shape or of one with the first and the last axis exchanged; in any order, with gaps, or the same numbers
    again and again.
    """
    x = torch.rand([*shape, 2]).to(draw(st.sampled_from([*[torch.float32] * 4, torch.float64, torch.int64])))[..., 0]
    x = x if draw(st.booleans()) else x.contiguous()
    x = x[:1].expand(shape) if shape and draw(st.integers(0, 7)) == 7 else x
    return x.transpose(0, -1) if shape and draw(st.booleans()) else x


def strides(x):
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@st.composite
def calls(draw):  # noqa: C901 - a paragraph for each kind of function
    """A function that has a shortcut, with arguments that it takes, or nearly."""
    func = draw(st.sampled_from([func for func in SHORTCUTS if func not in ARGUMENTS]))
    shape = draw(st.lists(SIZES, max_size=5))
    x, rest, kwargs = tensor(draw, shape), [], {}
    if func in CONVOLUTIONS:
        groups, per_axis = draw(st.integers(1, 2)), st.integers(1, 2)
        ndim = draw(st.sampled_from([CONVOLUTIONS[func]] * 5 + [1]))
        kernel = draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
        weight = tensor(draw, [2 * draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, *shape[1:2]])), *kernel])
        padding = draw(st.sampled_from(["same", "valid", 0, 1, (1,) * ndim]))
        bias = draw(st.sampled_from([None, torch.ones(len(weight)), torch.ones(3)]))
        rest = [weight, bias, draw(per_axis), padding, draw(per_axis), groups]
    elif func is F.linear:
        rest = [
            tensor(draw, [3, shape[-1] if shape else 2]),
            draw(st.sampled_from([None, *map(torch.ones, (1, 2, 3))])),
        ]
    elif func is F.batch_norm:
        numbers = [torch.ones(draw(st.sampled_from([2, *shape[1:2]]))) for _ in range(4)]
        rest = [*numbers, draw(st.booleans())]
    elif func is F.layer_norm:
        sizes = [1, *x.shape][-draw(st.integers(1, 2)) :]
        rest = [sizes, *(draw(st.sampled_from([None, torch.ones(sizes), torch.ones(2)])) for _ in range(2))]
    elif func is F.pad:
        rest = [draw(st.lists(st.integers(0, 2), max_size=6)), draw(st.sampled_from(["constant", "reflect"]))]
    elif func is torch.cat:
        other, axis = list(x.shape), draw(st.integers(-3, 3))
        if -len(other) <= axis < len(other):
            other[axis] = draw(SIZES)
        return func, ([x, tensor(draw, other)][draw(st.integers(0, 1)) :], axis), {}
    elif func is F.dropout:
        kwargs = {"p": draw(st.sampled_from([0.0, 0.5, 1.5])), "training": draw(st.booleans())}
    elif func in (F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d):
        rest = [draw(st.integers(1, 3))]
    elif func is F.interpolate:
        kwargs = {"scale_factor": draw(st.integers(1, 3))}
    elif SHORTCUTS[func] is SHORTCUTS[torch.matmul]:
        rest = [tensor(draw, [*shape[:-2], *shape[-1:], draw(SIZES)])]
    elif SHORTCUTS[func] is not SHORTCUTS[F.relu]:
        other = [draw(st.sampled_from([1, size])) for size in shape[draw(st.integers(0, 5)) :]]
        rest = [draw(st.sampled_from([2, 0.5])) if draw(st.booleans()) else tensor(draw, other)]
    elif func is torch.sigmoid and draw(st.booleans()):
        kwargs = {"out": torch.empty(0, dtype=x.dtype)}
    return func, (x, *rest), kwargs


@hypothesis.given(calls())
@hypothesis.settings(max_examples=300)
def test_a_shortcut_returns_what_the_function_does_but_for_its_numbers(call):
    func, args, kwargs = call
    sketched = SHORTCUTS[func](*args, **kwargs)
    before = args[0].clone() if isinstance(args[0], Tensor) else None
    try:
        done = func(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        assert sketched is None
        return
    if sketched is not None:
        assert (sketched.shape, sketched.dtype) == (done.shape, done.dtype)
        assert not done.numel() or strides(sketched) == strides(done)
        assert (sketched is args[0]) == (done is args[0])
        assert func not in UNCHANGED or torch.equal(done, before)


T = torch.arange(24.0).reshape(2, 3, 4)
ARGUMENTS = {
    Tensor.__getitem__: (T, (slice(1), ..., None, 2)),
    Tensor.flatten: (T, 1),
    Tensor.split: (T, [1, 2], 1),
    Tensor.unsqueeze: (T, -1),
    **dict.fromkeys((Tensor.chunk, torch.chunk), (T, 2, -1)),
    **dict.fromkeys((Tensor.permute, torch.permute), (T, (2, 0, 1))),
    **dict.fromkeys((Tensor.reshape, Tensor.view, torch.reshape), (T, (4, -1))),
    **dict.fromkeys((Tensor.transpose, torch.transpose), (T, 0, 2)),
    torch.flatten: (T, 1),
    torch.split: (T, 2, -1),
    torch.unsqueeze: (T, 0),
}


class Noticed(TorchDispatchMode):
    """Notes, of the operators that run, what a guard of the network's memory has to know of."""

    def __init__(self):
        super().__init__()
        self.concerns: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        writes = any(each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments)
        draws_or_counts = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape}.intersection(func.tags)
        self.concerns += [str(func)] * (writes or bool(draws_or_counts))
        return func(*args, **(kwargs or {}))


def start(x):
    """Where the memory begins that a tensor is a part of."""
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("func", ARGUMENTS, ids=lambda func: func.__name__)
def test_what_is_done_past_the_guard_is_no_concern_of_it(func):
    with Noticed() as noticed:
        done = func(*ARGUMENTS[func])
    assert not noticed.concerns
    again = SHORTCUTS[func](*ARGUMENTS[func])
    for one, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (done, again)), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
        assert (start(one) == start(T)) == (start(other) == start(T))


def test_what_may_be_a_concern_of_the_guard_is_not_done_past_it():
    mask = T > 3
    assert SHORTCUTS[Tensor.__getitem__](T, mask) is SHORTCUTS[Tensor.__getitem__](T, (..., mask[0, 0])) is None
    assert SHORTCUTS[torch.split](T, mask) is None and SHORTCUTS[torch.reshape](T, (5, 5)) is None
    assert SHORTCUTS[torch.flatten](T.as_subclass(Marked)) is None


class Marked(Tensor):
    pass


def test_what_returns_its_argument_writes_nothing_into_it():
    model = Spelled(lambda m, x: m.l(x) + m.f(x) + m.k(x), f=nn.Flatten(), l=nn.Linear(4, 4), k=nn.Linear(4, 4))
    (site,) = plan(randomised(model), (image(5, 4),), Policy.ALWAYS).sites
    assert sorted(site.branches) == ["linear", "linear", "skip"]


SKETCHED = {
    "blocks": Twice,
    "strides": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, (1, 3), 1, (0, 2))
    ),
    "same": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 4, padding="same", dilation=2), nn.Conv2d(4, 8, 2, padding="valid", groups=4)
    ),
    "linear": lambda: nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2, bias=False)),
    "in training": lambda: nn.Sequential(conv(3), nn.BatchNorm2d(4).train()),
    "in place": lambda: Spelled(lambda m, x: m.b((0 + x).add_(m.a(x)).mul_(2).sub_(x)), a=conv(3), b=nn.ReLU(True)),
    "pools": lambda: nn.Sequential(conv(3), nn.MaxPool2d(3, 2, 1), nn.Upsample(scale_factor=3), nn.AvgPool2d((2, 3))),
    "computed": computed,
}


@pytest.mark.parametrize("name", SKETCHED)
def test_a_run_without_arithmetic_gives_the_same_recording(name, monkeypatch):
    model = randomised(SKETCHED[name]())
    sketched = recorded(model, X)
    assert listing(sketched) == listing(in_full(model, X, monkeypatch))
    assert listing(recorded(model, X.to(memory_format=torch.channels_last))) == listing(sketched)


@pytest.mark.parametrize(
    "pick", [lambda m, y: m.table[(y.sigmoid() * 7).long()], lambda m, y: m.rows((y.relu() > 0).long())]
)
def test_what_is_looked_up_by_values_is_no_obstacle(pick):
    """Without arithmetic, the values are no indices."""
    model = Spelled(lambda m, x: pick(m, m.a(x)).sum() * m.block(x), a=conv(3), block=Block(), rows=nn.Embedding(2, 3))
    model = randomised(buffered(model, table=torch.ones(8)))
    result = fuse(model, (X,))
    assert len(result.plan.sites) == 1 and error(model, result.module, X) < 1e-12


def test_the_dtype_in_mixed_precision_is_that_of_a_run_in_full():
    def forward(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = m.a(x)
        return m.block(x) * (2.0 if y.dtype is torch.bfloat16 else 3.0)

    found = recorded(Spelled(forward, a=conv(3), block=Block()), X.float())
    assert found.dtype_of[named(found, "conv2d")[0]] is torch.bfloat16 and named(found, "mul")[0].args[1] == 2.0


def test_no_arithmetic_is_done_where_nobody_asks_for_numbers():
    kinds = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))  # which raises, where the network does not take a size
            kinds.add(func.overloadpacket.__name__)
            return result

    model = Spelled(lambda m, x: m.relu(m.twice(x)).add_(1), twice=Twice(), relu=nn.ReLU(inplace=True))
    with Seen():
        recorded(randomised(nn.Sequential(model, nn.BatchNorm2d(4), nn.Linear(6, 2))), X)
    assert not kinds & {"convolution", "addmm", "native_batch_norm", "cudnn_batch_norm", "mm", "relu_", "add_"}


def test_what_works_in_place_leaves_the_network_alone_without_arithmetic_too():
    model = Spelled(lambda m, x: m.a(x) + m.kept.add_(x[:1, :1, :2, :2].contiguous()).sum(), a=conv(3))
    model = buffered(model, kept=torch.zeros(1, 1, 2, 2))
    found = recorded(model, X.float())
    assert not model.kept.any() and found.memory.is_rewritten(named(found, "add_")[0])


# --- hooks, parametrisations, copies --------------------------------------------------------------------------------


WRAPPED = (nn.Identity, parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm)
"""What PyTorch hangs on a layer to compute its weight; the first hangs nothing."""


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.filterwarnings("ignore")
def test_what_people_hung_on_a_layer_is_told_from_what_pytorch_did(wrap):
    layer = conv(3) if wrap is nn.Identity else wrap(conv(3))
    model = randomised(nn.Sequential(layer, nn.BatchNorm2d(4)))
    (site,) = plan(model, (X,)).sites
    assert site.path == "0"
    layer.register_forward_pre_hook(lambda *_: None)
    refused = plan(model, (X,))
    assert not refused.sites and {refusal.code for refusal in refused.refusals} == {"hooks"}


def test_hooks_run_as_part_of_their_module():
    model = nn.Sequential(conv(3), nn.ReLU()).double()
    model[0].register_forward_hook(lambda _module, _given, y: y * 3)
    model[1].register_forward_pre_hook(lambda _module, given: given[0] - 1)
    found = assert_same(model)
    assert [found.call_of[named(found, name)[0]].path for name in ("mul", "sub")] == ["0", "1"]


def test_a_root_computes_its_weight_before_its_forward():
    """What old weight_norm has left behind as ``weight`` is stale after loading."""
    model = torch.nn.utils.weight_norm(conv(3).double())
    with torch.no_grad():
        model.weight_g.mul_(3)
    assert_same(model)


def test_a_parametrisation_that_draws_is_no_constant():
    class Branching(nn.Module):
        def forward(self, w):
            return w if torch.rand(1) > 2 else 2 * w

    model = nn.Sequential(conv(3).double(), Block().double())
    parametrize.register_parametrization(model[0], "weight", Branching(), unsafe=True)
    found = assert_same(model)
    assert codes(found) == {"0.parametrizations.weight.0": "decides-by-value"}
    first, second, _ = named(found, "conv2d")
    assert found.constants.name_of(first.args[1]) is None and found.constants.name_of(second.args[1]) == "1.a.weight"


def test_tensors_with_a_history_are_no_obstacle_to_a_copy():
    model = nn.Sequential(torch.nn.utils.weight_norm(conv(3)))
    model.more = (model[0].weight_v * 2)[:1]
    assert not model[0].weight.is_leaf and not model.more.is_leaf
    copied = rewrite(model, replace(plan(model, (X.float(),)), sites=(), live=None))
    for name in ("weight", "weight_g", "weight_v"):
        assert torch.equal(getattr(copied[0], name), getattr(model[0], name))
    assert torch.equal(copied.more, model.more) and copied.more.data_ptr() != model.more.data_ptr()
    assert torch.equal(copied(X.float()), model(X.float()))
    assert_same(model, X.float())


def of_graphs() -> nn.Module:
    """A graph that calls a module, one that asks for its tensors, one with a hook, and one in what copies itself."""

    class Careful(nn.Sequential):
        def __deepcopy__(self, memo):
            return Careful(*(copy.deepcopy(child, memo) for child in self))

    hooked = fx.symbolic_trace(nn.Sequential(conv(3)))
    hooked.register_forward_hook(lambda module, args, result: result + 1)
    summed = fx.symbolic_trace(Spelled(lambda m, x: m.a(x) + m.w * x, a=conv(1), w=nn.Parameter(torch.ones(1))))
    return nn.Sequential(summed, hooked, Careful(fx.symbolic_trace(nn.Sequential(conv(1), nn.ReLU()))))


def test_a_run_has_the_code_in_common_with_the_network_and_nothing_else():
    """What a forward does to its tensors is done to those of a copy; to copy the code would take longer than that."""
    seen = _Shared()

    def forward(m, x):
        seen.append((m.parts[0].graph, type(m.parts[0]), [m.parts[1].graph, m.parts[2][0].graph]))
        y = m.parts(x)
        computed.append(y if y.sum() > 0 else -y)  # which takes the numbers
        for tensor in m.parts.state_dict().values():
            tensor.fill_(torch.nan)
        return m.parts(x)

    computed, parts = _Shared(), of_graphs()
    graphs = [parts[0], parts[1], parts[2][0]]
    before, owners = copy.deepcopy(parts.state_dict()), [m.graph.owning_module for m in graphs]
    x = X.float()
    recorded(Spelled(forward, parts=parts), x)
    parts[1]._forward_hooks.clear()  # torch.fx does not copy them
    graph, kind, others = seen[0]
    assert graph is parts[0].graph and kind is type(parts[0])
    assert all(one is not other.graph for one, other in zip(others, graphs[1:], strict=True))
    assert any(torch.equal(each, parts(x)) for each in computed)
    assert all(torch.equal(y, before[name]) for name, y in parts.state_dict().items())
    assert [m.graph.owning_module for m in graphs] == owners


def test_a_fused_graph_has_its_own_code():
    model = fx.symbolic_trace(Spelled(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv(3), b=conv(1)))
    wanted, fused = model(X.float()), fuse(model, (X.float(),)).module
    for node in fused.graph.find_nodes(op="call_function", target=F.relu):
        node.target = F.leaky_relu
    fused.recompile()
    assert torch.equal(model(X.float()), wanted) and not torch.allclose(fused(X.float()), wanted)


# --- what authors write ---------------------------------------------------------------------------------------------

REENTRANT = [True, False]


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, **how: checkpoint(m.a, x, **how),
        lambda m, x, **how: cp.checkpoint(m.block, x, preserve_rng_state=False, **how),
        lambda m, x, **how: cp.checkpoint(lambda x: m.a(x) + m.b(x), x, **how) + m.a.bias[0],
        lambda m, x, **how: cp.checkpoint(lambda x: checkpoint(m.a, x, **how) * 2, x, **how),
        lambda m, x, **how: sum(cp.checkpoint(lambda x, *_: (m.a(x), m.b(x)), x, None, 3, **how)),
        lambda m, x, **how: cp.checkpoint_sequential(m.block, 2, x, **how),
        lambda m, x, **how: checkpoint(m.a, x, **how) if x.requires_grad else m.a(x),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_are_seen_through(forward, reentrant):
    block = nn.Sequential(conv(1), nn.Sequential(nn.ReLU(), conv(1)))
    model = Spelled(lambda m, x: forward(m, x, use_reentrant=reentrant), a=conv(3), b=conv(1), block=block).double()
    found = assert_same(model)
    assert {function(node) for node in found.nodes} <= {
        "x",
        "conv2d",
        "relu",
        "add",
        "mul",
        "getitem",
        *_tensors(model),
    }
    assert named(found, "conv2d") and not found.marks


def _tensors(model):
    return {name.partition(".")[0] for name, _ in model.named_parameters()}


def test_keywords_reach_what_is_checkpointed():
    def forward(m, x):
        return checkpoint(lambda x, *, scale: m.a(x) * scale, x, scale=3.0, use_reentrant=False)

    assert_same(Spelled(forward, a=conv(3)).double())


def test_checkpoint_wrappers_are_seen_through():
    found = assert_same(nn.Sequential(checkpoint_wrapper(nn.Sequential(conv(3), nn.ReLU())), conv(1)).double())
    assert found.call_of[named(found, "conv2d")[0]].path == "0._checkpoint_wrapped_module.0"


def test_stochastic_depth_returns_its_input():
    model = nn.Sequential(conv(1), StochasticDepth(0.5, "row")).double().eval()
    found = assert_same(model)
    assert found.calls["1"][0].output is named(found, "conv2d")[0]
    assert writers(lambda m, x: (y := torch.sin(x), m.drop(y).relu_(), y)[2], "sin", drop=model[1]) == ["relu_"]


class Exported(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(3), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        y = self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight * self.scale, padding=1) + torch.ones(4, 1, 1)
        y[:, :, 0:1, :] = 0
        return {"y": y, "more": [y.clone()]}


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_programs_are_recorded_line_by_line(dynamic):
    model = randomised(Exported())
    shapes = ({0: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},) if dynamic else None
    exported = torch.export.export(model, (X,), dynamic_shapes=shapes).module()
    found = recorded(exported, X)
    computed, expected = run(found, X), model(X.clone())
    assert torch.equal(computed["y"], expected["y"]) and torch.equal(computed["more"][0], expected["more"][0])
    first, second = (found.constants.name_of(node.args[1]) for node in named(found, "conv2d"))
    assert first == "conv.weight" and set(found.constants.leaves(second)) == {"conv.weight", "scale"}
    lines = list(exported.graph.nodes)
    told = {lines[number].name: node for number, node in found.root.lines.items()}
    assert all(told[line.name].target is line.target for line in lines if line.name.startswith("conv2d"))
    assert found.is_fixed(named(found, "conv2d")[0], 3) != dynamic


def test_what_is_made_of_numbers_is_a_node():
    found = recorded(Spelled(lambda m, x: x + torch.full((4, 1, 1), 2.0) + torch.ops.aten.ones.default([4, 1, 1])), X)
    made = [node for node in found.nodes if node.op.startswith("call") and not node.all_input_nodes]
    assert [node.target for node in made] == [torch.full, torch.ops.aten.ones.default]


class Pieces(nn.Module):
    """A convolution for each piece of the channels, in a loop."""

    def __init__(self, take):
        super().__init__()
        self.take = take
        self.convs = nn.ModuleList(conv(3, inputs=2, outputs=2) for _ in range(2))

    def forward(self, x):
        return torch.cat([part(piece) for piece, part in zip(self.take(x), self.convs, strict=False)], 1)


LOOPS = [
    lambda x: x.chunk(2, 1),
    lambda x: torch.chunk(x, chunks=2, dim=1),
    lambda x: x.split([2, 2], 1),
    lambda x: torch.split(x, (2, 2), dim=1),
    lambda x: x.tensor_split(2, dim=1),
    lambda x: torch.split_with_sizes(x, [2, 2], 1),
]


@pytest.mark.parametrize("take", LOOPS)
def test_a_loop_over_pieces_is_followed(take):
    model = randomised(Pieces(take))
    result = fuse(model, (X,), Policy.ALWAYS)
    assert operations(result.module, X)["convolution"] == 1
    assert error(model, result.module, X) < 1e-12


OTHERS = [  # a loop, and the channels of its pieces: of 5 channels, chunk(4) makes 3 pieces
    (lambda x: x.chunk(4, 1), (2, 2, 1)),
    (lambda x: x.split(3, 1), (3, 2)),
    (lambda x: x.chunk(2, 3), (5, 5)),
]


@pytest.mark.parametrize(("take", "sizes"), OTHERS)
def test_a_loop_over_pieces_of_other_sizes_is_followed_too(take, sizes):
    inner = Pieces(take)
    inner.convs = nn.ModuleList(nn.Conv2d(size, 2, 1) for size in sizes)
    model = randomised(nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), inner))
    result = fuse(model, (X,))
    assert result.plan.sites and error(model, result.module, X) < 1e-12
