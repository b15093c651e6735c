"""Tracing what authors write: slice assignments, checkpoints, hooks, exported programs, questions in forward."""

from __future__ import annotations

import operator
from collections import OrderedDict

import pytest
import torch
from blocks import Spelled, conv
from support.agreement import image, randomised
from support.tracing import buffered, parameter, run, traced
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils import checkpoint as cp
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from repfuse.tracing.aliases import Aliases
from repfuse.tracing.assignment import assigned, lower
from repfuse.tracing.leaves import hooks_of, is_leaf, is_stock
from repfuse.tracing.skeleton import copy_with, meta_copy
from repfuse.tracing.tracer import CallTracer

X = image(2, 4, 5, 6)


def assert_same(model, x=X):
    """The graph computes what the model does, and does to its input what the model does to it."""
    tracer, graph = traced(model)
    one, other = x.clone(), x.clone()
    with torch.no_grad():
        expected, found = model(one), fx.Interpreter(model, graph=graph).run(other)
    assert torch.equal(expected, found) and torch.equal(one, other)
    return tracer, graph


# --- slice assignment -----------------------------------------------------------------------------------------------


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
def test_slice_assignments_are_traced(name):
    model = randomised(Spelled(ASSIGNMENTS[name], a=conv(1), b=conv(3, padding=0), inner=INNER))
    _, graph = assert_same(model)
    assert any(node.target is assigned for node in graph.nodes)


def test_a_buffer_written_by_slices_is_read_after_the_write():
    model = buffered(Spelled(written_buffer), k=image(4, 4, 3, 3))
    _, graph = traced(model)
    assert torch.equal(run(model, graph, X), model(X))


def lowered(graph):
    """Write the graph out without any name of ours."""
    result, copies = fx.Graph(), {}
    for node in graph.nodes:
        if node.target is assigned:
            copies[node] = lower(result, fx.node.map_arg(node.args, copies.__getitem__))
        else:
            copies[node] = result.node_copy(node, copies.__getitem__)
    return result


@pytest.mark.parametrize("name", ASSIGNMENTS)
@pytest.mark.parametrize("cleaned", [False, True])
def test_a_lowered_assignment_runs_without_repfuse(name, cleaned):
    model = randomised(Spelled(ASSIGNMENTS[name], a=conv(1), b=conv(3, padding=0), inner=INNER))
    _, graph = traced(model)
    module = fx.GraphModule(model, lowered(graph))
    if cleaned:
        module.graph.eliminate_dead_code()
        module.recompile()
    assert "repfuse" not in module.code
    with torch.no_grad():
        assert torch.equal(module(X.clone()), model(X.clone()))


def memory(forward, **attributes):
    """The memory of every node, by the node's name."""
    model = Spelled(forward, **attributes)
    _, graph = traced(model)
    aliases = Aliases()
    for node in graph.nodes:
        aliases.add(node)
    return {node.name: aliases[node] for node in graph.nodes}


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.__setitem__(0, 1.0),
        lambda y: y[0].__setitem__(1, 1.0),
        lambda y: y.data.__setitem__(..., 1.0),
        lambda y: y.T.__setitem__(0, 1.0),
        lambda y: y[:, :1].__setitem__(slice(None), 0),
        lambda y: torch.sin(y, out=y),
        lambda y: torch.broadcast_tensors(y, y)[0].__setitem__(0, 1.0),
        lambda y: torch.einsum("abcd->dcba", y).zero_(),
        lambda y: torch.ops.aten.slice.Tensor(y, 1, 0, 1).fill_(0),
        lambda y: torch.ops.aten.split.Tensor(y, 2)[0].fill_(0),
        torch.ops.aten.relu_.default,
        lambda y: torch.ops.aten.mul.out(y, y, out=y),
        lambda y: torch.stack([y, y], out=y),
    ],
)
def test_writes_through_any_alias_are_seen(write):
    found = memory(lambda m, x: (y := torch.sin(x), write(y), y + 1)[2])
    assert len(found["sin"].writers) == 1 and found["x"] is not found["sin"]


def test_what_an_assignment_reads_is_not_written():
    found = memory(lambda m, x: (x.__setitem__(0, torch.cos(x)[0]), x)[1])
    assert found["x"].writers and found["x"] is found["assigned"] and not found["cos"].writers


@pytest.mark.parametrize("read", [lambda y: y.clone(), lambda y: y * 1, torch.ops.aten.sin.default])
def test_a_copy_is_not_the_same_memory(read):
    found = memory(lambda m, x: (y := torch.sin(x), read(y).relu_(), y)[2])
    assert not found["sin"].writers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spelled", [F.batch_norm, torch.ops.aten.batch_norm.default, F.instance_norm])
def test_only_a_normalisation_in_training_writes_its_statistics(spelled, training):
    def forward(m, x):
        if spelled is torch.ops.aten.batch_norm.default:
            return spelled(x, None, None, m.mean, m.var, training, 0.1, 1e-5, False)
        return spelled(x, m.mean, m.var, None, None, training)

    found = memory(forward, mean=nn.Parameter(torch.zeros(4)), var=nn.Parameter(torch.ones(4)))
    assert bool(found["mean"].writers) == bool(found["var"].writers) == training
    assert not found["x"].writers


# --- questions that forward asks ------------------------------------------------------------------------------------


def asks_of_the_input(m, x):
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize("ask", [asks_of_the_input, lambda m, x: len(x), lambda m, x: int(x.mean()), lambda m, x: [*x]])
def test_questions_about_the_input_have_no_answer(ask):
    with pytest.raises((fx.proxy.TraceError, RuntimeError, TypeError)):
        traced(Spelled(ask))


def test_no_value_requires_a_gradient():
    def forward(m, x):
        return m.a(x) if x.requires_grad or m.a.weight.requires_grad or m.a(x).requires_grad else -x

    assert_same(Spelled(lambda m, x: forward(m, x.detach()), a=conv(1).double().requires_grad_(False)))


def test_an_answer_that_a_later_write_changes_is_no_answer():
    def forward(m, x):
        y = x if m.count == 0 else -x
        m.count += 1
        return y

    model = nn.Sequential(nn.ReLU(), buffered(Spelled(forward), count=torch.zeros(())))
    tracer = CallTracer(frozenset(), model)
    with pytest.raises(fx.proxy.TraceError, match="overwrites it later"):
        tracer.trace(meta_copy(model))
    assert tracer.failed == "1"
    tracer, _ = traced(model, leaves=("1",))
    assert tracer.failed is None


def test_the_module_that_asks_in_vain_is_named():
    def forward(m, x):
        m.count += 1
        return x if m.count == 1 else -x

    model = nn.Sequential(nn.ReLU(), buffered(Spelled(forward), count=torch.zeros(())))
    tracer = CallTracer(frozenset(), model)
    with pytest.raises(fx.proxy.TraceError):
        tracer.trace(meta_copy(model))
    assert tracer.failed == "1"


def test_dtype_and_device_stay_questions():
    model = Spelled(lambda m, x: x + torch.ones(1, dtype=m.w.dtype) * m.w[0], w=parameter(4))
    _, graph = traced(model)
    half = model.to(torch.bfloat16)
    assert run(half, graph, X.bfloat16()).dtype is torch.bfloat16


def test_randomness_is_not_frozen():
    model = Spelled(lambda m, x: x + torch.rand(1, dtype=x.dtype))
    _, graph = traced(model)
    assert not torch.equal(run(model, graph, X), run(model, graph, X))


def test_a_tensor_that_belongs_to_no_module_cannot_be_traced():
    owned_by_nobody = torch.ones(4, 1, 1)
    with pytest.raises(fx.proxy.TraceError, match="belongs to"):
        traced(Spelled(lambda m, x: x * owned_by_nobody))


def test_forward_leaves_the_modules_as_they_were():
    def forward(m, x):
        m.seen, m.plain, m.extra = x, x * 2, nn.ReLU()
        return m.extra(x) * m.plain

    model = Spelled(forward, plain=torch.ones(3))
    skeleton = meta_copy(model)
    before = dict(vars(skeleton))
    with pytest.raises(NameError):  # the module that forward makes is not part of the model
        CallTracer(frozenset(), model).trace(skeleton)
    assert vars(skeleton) == before and "extra" not in skeleton._modules


# --- hooks and parametrisations -------------------------------------------------------------------------------------


def test_what_is_a_leaf():
    plain, normed = conv(3), parametrizations.weight_norm(conv(3))
    old = torch.nn.utils.weight_norm(conv(3))
    assert all(map(is_stock, (plain, normed, old)))
    assert is_leaf(plain) and not is_leaf(normed) and not is_leaf(old)
    for module in (plain, normed, old):
        assert not hooks_of(module)
        module.register_forward_hook(lambda *_: None)
        assert is_leaf(module) and hooks_of(module)
    hooked = torch.nn.utils.spectral_norm(conv(3))
    hooked.register_forward_pre_hook(lambda *_: None)
    assert is_leaf(hooked) and hooks_of(hooked)


def test_the_hook_of_another_still_runs():
    model = nn.Sequential(conv(3), nn.ReLU()).double()
    model[0].register_forward_hook(lambda _module, _given, y: y * 3)
    assert_same(model)


def test_a_root_computes_its_weight_before_its_forward():
    """What old weight_norm has left behind as ``weight`` is stale after loading."""
    model = torch.nn.utils.weight_norm(conv(3).double())
    with torch.no_grad():
        model.weight_g.mul_(3)
    assert_same(model)


def test_a_parametrisation_that_cannot_be_traced_is_named():
    class Branching(nn.Module):
        def forward(self, w):
            return w if torch.rand(1) > 2 else 2 * w

    model = nn.Sequential(conv(3).double())
    parametrize.register_parametrization(model[0], "weight", Branching(), unsafe=True)
    tracer = CallTracer(frozenset(), model)
    with pytest.raises(fx.proxy.TraceError):
        tracer.trace(meta_copy(model))
    assert tracer.failed == "0.parametrizations.weight.0"
    _, graph = traced(model, leaves=(tracer.failed,))
    assert torch.equal(run(model, graph, X), model(X))


# --- copies ---------------------------------------------------------------------------------------------------------


def test_tensors_with_a_history_are_no_obstacle_to_a_copy():
    model = nn.Sequential(torch.nn.utils.weight_norm(conv(3)))
    model.more = (model[0].weight_v * 2)[:1]
    assert not model[0].weight.is_leaf and not model.more.is_leaf
    model[0].bias.requires_grad_(False)
    copied, meta = copy_with(model, {}), meta_copy(model)
    assert meta[0].weight_v.requires_grad and not meta[0].bias.requires_grad
    for name in ("weight", "weight_g", "weight_v"):
        assert torch.equal(getattr(copied[0], name), getattr(model[0], name))
        assert getattr(meta[0], name).is_meta and getattr(meta[0], name).shape == getattr(model[0], name).shape
    assert torch.equal(copied.more, model.more) and meta.more.is_meta
    assert copied.more.data_ptr() != model.more.data_ptr()
    assert torch.equal(copied(X.float()), model(X.float()))


def test_a_copy_takes_the_replacements_that_it_is_given():
    model = torch.nn.utils.weight_norm(conv(3))
    copied = copy_with(model, {id(model.weight): 1, id(model.bias): model.bias})
    assert copied.weight == 1 and copied.bias is model.bias and copied.weight_v is not model.weight_v


# --- wrappers that compute nothing ----------------------------------------------------------------------------------

REENTRANT = [True, False]


def two(m, x):
    return OrderedDict(y=m.a(x)), m.b(x)


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
def test_checkpoints_are_seen_through(forward, reentrant):
    block = nn.Sequential(conv(1), nn.Sequential(nn.ReLU(), conv(1)))
    model = Spelled(lambda m, x: forward(m, x, use_reentrant=reentrant), a=conv(3), b=conv(1), block=block).double()
    _, graph = assert_same(model)
    called = {type(model.get_submodule(node.target)) for node in graph.nodes if node.op == "call_module"}
    assert called <= {nn.Conv2d, nn.ReLU} and called


def test_keywords_reach_what_is_checkpointed():
    def forward(m, x):
        return checkpoint(lambda x, *, scale: m.a(x) * scale, x, scale=3.0, use_reentrant=False)

    assert_same(Spelled(forward, a=conv(3)).double())


def test_checkpoint_wrappers_are_seen_through():
    _, graph = assert_same(nn.Sequential(checkpoint_wrapper(nn.Sequential(conv(3), nn.ReLU())), conv(1)).double())
    assert next(node.target for node in graph.nodes if node.op == "call_module") == "0._checkpoint_wrapped_module.0"


@pytest.mark.filterwarnings("error")
def test_tracing_a_checkpoint_warns_of_nothing():
    traced(Spelled(lambda m, x: cp.checkpoint(m.a, x), a=conv(3)))


def test_stochastic_depth_is_one_call_that_returns_its_input():
    model = nn.Sequential(conv(1), StochasticDepth(0.5, "row")).double().eval()
    _, graph = assert_same(model)
    assert any(getattr(node.target, "__name__", "") == "stochastic_depth" for node in graph.nodes)
    found = memory(lambda m, x: (y := torch.sin(x), m.drop(y).relu_(), y)[2], drop=model[1])
    assert [writer.name for writer in found["sin"].writers] == ["relu_"]


# --- exported programs ----------------------------------------------------------------------------------------------


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
def test_exported_programs_are_traced(dynamic):
    model = randomised(Exported())
    shapes = ({0: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},) if dynamic else None
    exported = torch.export.export(model, (X,), dynamic_shapes=shapes).module()
    tracer, graph = traced(exported)
    with torch.no_grad():
        found, expected = fx.Interpreter(exported, graph=graph).run(X.clone()), model(X.clone())
    assert torch.equal(found["y"], expected["y"]) and torch.equal(found["more"][0], expected["more"][0])
    kernels = [node.args[1] for node in graph.nodes if node.target is torch.ops.aten.conv2d.default]
    first, second = map(tracer.constants.name_of, kernels)
    assert first == "conv.weight" and set(tracer.constants.leaves(second)) == {"conv.weight", "scale"}
    assert not any(node.op == "call_module" for node in graph.nodes)
    assert not any(isinstance(node.target, str) and node.target.startswith("_tensor_constant") for node in graph.nodes)


def test_what_is_made_of_numbers_is_a_node():
    _, graph = traced(Spelled(lambda m, x: x + torch.full((4, 1, 1), 2.0) + torch.ops.aten.ones.default([4, 1, 1])))
    made = [node for node in graph.nodes if node.op == "call_function" and not node.all_input_nodes]
    assert [node.target for node in made] == [torch.full, torch.ops.aten.ones.default]
    assert operator.add in {node.target for node in graph.nodes}
