"""What the rewritten network keeps of the one that was given, and when a plan does not fit."""

from __future__ import annotations

import copy
import io
import pickle
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks import C, RepVGG, Spelled, SpelledOfTwo, TracedNorm, conv, conv_norm, norm, pair
from support.agreement import error, image, operations, randomised
from torch import nn
from torch.nn import functional as F

from repfuse.converting import convert
from repfuse.errors import RepfuseError
from repfuse.fusing import fuse
from repfuse.loading import Checkpoint
from repfuse.networks import named_tensors
from repfuse.planning.planner import plan
from repfuse.plans import Plan
from repfuse.rewriting import rewrite

X = image(2, 4, 6, 7)
Result = namedtuple("Result", "x y")


class Net(nn.Module):
    """A stem that is folded, a block that becomes a chain, one that becomes a graph, and a head."""

    names = ("cat", "dog")

    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3)
        self.chain = Summed()
        self.block = Escaping()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x, early = self.block(self.chain(torch.sin(self.stem(x))))
        return self.head((x + early).mean((2, 3)))

    def features(self, x):
        return self.chain(torch.sin(self.stem(x)))


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = conv(3), conv(1), nn.ReLU()
        self.f, self.names = -1, ["first", "second"]

    def forward(self, x):
        return self.act(self.a(x) + self.b(x))


class Escaping(Summed):
    def forward(self, x):
        y = self.a(x) + self.b(x) + x
        return self.act(y), torch.cos(y)


class Slotted(nn.Module):
    """Knows by what name its converted form is called, as timm's blocks do."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.reparam_conv = conv_norm(3), conv_norm(1), None

    def forward(self, x):
        if self.reparam_conv is not None:
            return F.relu(self.reparam_conv(x))
        return F.relu(self.a(x) + self.b(x))


class ReadsWhatADropoutReturns(Summed):
    """The dropout of a child returns the very tensor that it is given, and that is read beside the child as well."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Dropout(), nn.ELU())

    def forward(self, x):
        y = torch.sin(self.a(x) + self.b(x))
        return self.branch(y) * torch.cos(y)


class AlwaysDropping(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


@pytest.fixture
def net():
    return randomised(Net())


def test_a_block_may_read_what_a_child_passes_on():
    net = randomised(ReadsWhatADropoutReturns())
    fused = fuse(net, (X,))
    assert len(fused.plan.sites) == 1 and not fused.plan.refusals
    assert error(net, fused.module, X) < 1e-12


@pytest.fixture
def fused(net):
    return fuse(net, (X,)).module


def test_everything_around_stays(net, fused):
    assert type(fused) is Net and type(fused.stem) is nn.Sequential and type(fused.head) is nn.Linear
    assert list(dict(fused.named_children())) == list(dict(net.named_children()))
    assert error(net, fused, X) < 1e-12
    with torch.no_grad():
        assert torch.allclose(net.features(X), fused.features(X), rtol=1e-12)


def test_the_three_forms(fused):
    assert [type(child) for child in fused.stem] == [nn.Conv2d, nn.Identity]
    assert [type(child) for child in fused.chain] == [nn.Conv2d, nn.ReLU]
    assert isinstance(fused.block, torch.fx.GraphModule) and type(fused.block).__name__ == "Escaping"
    assert operations(fused, X)["convolution"] == 3


def test_plain_attributes_of_a_block_stay(fused):
    for block in (fused.chain, fused.block):
        assert (block.f, block.names) == (-1, ["first", "second"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_weights_are_rounded_once(dtype):
    net = randomised(Net(), dtype=dtype)
    with torch.no_grad():
        for norm_ in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
            norm_.running_var.add_(0.5)
    example = (X.to(dtype),)
    fused, exact = fuse(net, example).module.state_dict(), fuse(copy.deepcopy(net).double(), (X,)).module.state_dict()
    assert {tensor.dtype for tensor in fused.values()} == {dtype}
    assert all(torch.equal(tensor, exact[name].to(dtype)) for name, tensor in fused.items())


def overflowing(weight=60000.0):
    model = randomised(conv_norm(3), dtype=torch.float16)
    model[1].weight.data.fill_(weight)
    return model


def test_a_weight_that_would_overflow_is_left_alone():
    model = overflowing()
    found = plan(model, (X.half(),))
    assert not found.sites and [refusal.code for refusal in found.refusals] == ["overflow"]
    assert plan(model.bfloat16(), (X.bfloat16(),)).sites


def test_a_plan_whose_weights_overflow_later_is_an_error():
    saved = plan(overflowing(1.0), (X.half(),)).to_dict()
    with pytest.raises(RepfuseError, match="does not fit into float16") as caught:
        rewrite(overflowing(), Plan.from_dict(saved))
    assert caught.value.exit_code == 1


class CalledTwice(nn.Module):
    """What overflows is merged in another way in each call, which what fits does not depend on."""

    def __init__(self):
        super().__init__()
        self.pair = Spelled(lambda m, x: (m.b(m.a(x)), m.c(x)), a=conv(1), b=conv(1), c=conv(3))
        self.first, self.second, self.third = norm(), norm(), norm()

    def forward(self, x):
        u, v = self.pair(x)
        u, v = self.pair(F.relu(self.first(u)) + F.relu(self.second(v)))
        return F.relu(u) + F.relu(self.third(v))


def test_a_plan_in_which_something_overflowed_replays():
    net = randomised(CalledTwice(), dtype=torch.float32)
    for layer in (net.pair.a, net.pair.b):
        layer.weight.data.mul_(1e20)
    made = plan(net, (X.float() * 1e-30,))
    assert len(made.sites) == 2 and "overflow" in {refusal.code for refusal in made.refusals}
    assert str(rewrite(net, Plan.from_dict(made.to_dict()))) == str(rewrite(net, made))


def test_a_variance_of_nothing_is_refused_where_it_is():
    net = randomised(nn.Sequential(conv_norm(3), nn.ReLU(), conv_norm(3)))
    net[0][1].running_var[1], net[0][1].eps = 0, 0.0
    result = fuse(net, (X,))
    assert [site.path for site in result.plan.sites] == ["2.0"]
    assert [refusal.code for refusal in result.plan.refusals] == ["overflow"]


def test_infinite_weights_are_no_overflow():
    model = randomised(conv_norm(3))
    model[0].weight.data[0] = float("inf")
    assert fuse(model, (X,)).module[0].weight[0].isinf().all()


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_memory_format_is_kept(form):
    net = randomised(Net()).to(memory_format=form)
    for name, parameter in fuse(net, (X,)).module.named_parameters():
        assert parameter.is_contiguous(memory_format=form if parameter.dim() == 4 else torch.contiguous_format), name


def test_memory_format_of_volumes_is_kept():
    block = Spelled(lambda m, x: m.a(x) + m.b(x), a=nn.Conv3d(4, 4, 3, padding=1), b=nn.Conv3d(4, 4, 1))
    block = randomised(block).to(memory_format=torch.channels_last_3d)
    weight = fuse(block, (image(1, 4, 3, 3, 3),)).module.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()


def test_requires_grad_is_kept():
    net = randomised(Net())
    net.chain.requires_grad_(False)
    fused = fuse(net, (X,)).module
    assert not any(parameter.requires_grad for parameter in fused.chain.parameters())
    assert all(parameter.requires_grad for parameter in [*fused.stem.parameters(), *fused.block.parameters()])


def test_what_holds_the_children_of_a_block_has_its_training_flag():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.PReLU(), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.act(self.norm(self.conv(x)) + x)

    network = randomised(nn.Sequential(Inner(), Outer(Inner())))
    for modules in (network, fuse(network, (image(1, 4, 8, 8),)).module):
        assert not any(module.training for module in modules.modules())


class Outer(nn.Module):
    """A block that calls the children of its child itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.more = inner, nn.Conv2d(4, 4, 1)

    def forward(self, x):
        inner = self.inner
        return inner.act(inner.norm(inner.conv(x)) + self.more(x))


def test_training_flags_are_kept():
    class Mixed(Summed):
        def forward(self, x):
            return self.act(self.a(x) + self.b(x)), x

    net = randomised(nn.Sequential(Mixed(), nn.Flatten(0)))
    net[0].train()
    block = Spelled(lambda m, x: torch.sin(m.block(x)[0]), block=net[0]).eval()
    block.block.training = True
    fused = fuse(block, (X,)).module
    assert fused.block.training and fused.block.fused.training and not fused.training


@pytest.mark.parametrize("make", [Slotted, lambda: nn.Sequential(Slotted(), nn.ReLU())])
def test_the_convolution_takes_the_name_that_the_class_knows(make):
    model = randomised(make())
    (site,) = fuse(model, (X,)).plan.sites
    assert site.path.rpartition(".")[2] == "reparam_conv"
    assert sorted(name.rpartition(".")[2] for name, _ in fuse(model, (X,)).module.named_parameters()) == [
        "bias",
        "weight",
    ]


def test_names_that_are_taken_are_avoided():
    block = Escaping()
    block.fused = nn.Parameter(torch.ones(()))
    (site,) = plan(randomised(block), (X,)).sites
    assert site.path == "fused_1"


def test_results_survive_what_people_do_with_them(net, fused):
    with torch.no_grad():
        expected = net(X)
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        copies = {
            "pickle": pickle.loads(pickle.dumps(fused)),
            "torch.save": torch.load(buffer, weights_only=False),
            "deepcopy": copy.deepcopy(fused),
            "script": torch.jit.script(fused),
            "trace": torch.jit.trace(fused, X),
            "compile": torch.compile(fused, backend="eager"),
            "export": torch.export.export(fused, (X,)).module(),
            "fx": torch.fx.symbolic_trace(fused),
        }
        for name, again in copies.items():
            assert torch.allclose(again(X), expected, rtol=1e-10), name


def test_the_result_can_be_trained(fused):
    fused.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_fusing_again_finds_nothing(fused):
    assert fuse(fused, (X,)).plan.sites == ()


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = conv(1)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("calls", [True, False])
def test_what_a_block_reads_inside_a_script_is_read_there(calls):
    def forward(m, x):
        y = torch.sin(m.a(x) + m.b(x)) * m.held.script.inner.weight.mean()
        return m.held.script(y) if calls else y

    block = randomised(pair(forward))
    block.held = nn.Module()
    block.held.script = torch.jit.script(randomised(Scripted()))
    result = fuse(block, (X,))
    assert len(result.plan.sites) == 1 and torch.allclose(result.module(X), block(X), rtol=1e-10)


def test_unused_parameters_survive():
    block = pair(lambda m, x: torch.sin(m.a(x) + m.b(x)))
    block.spare, block.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    block.register_buffer("anchors", torch.arange(4.0))
    state = fuse(randomised(block), (X,)).module.state_dict()
    assert state.keys() == {"fused.weight", "fused.bias", "spare.weight", "spare.bias", "scale", "anchors"}


def test_counters_of_folded_norms_go_and_others_stay():
    net = randomised(nn.Sequential(conv_norm(3), nn.ReLU(), norm()))
    state = fuse(net, (X,)).module.state_dict()
    assert "2.num_batches_tracked" in state and "0.1.num_batches_tracked" not in state


def test_a_parameter_that_another_module_shares_is_not_changed_there():
    model = nn.Sequential(conv_norm(3), nn.ReLU(), conv(3), nn.ReLU())
    model[2].weight = model[0][0].weight
    model = randomised(model)
    fused = fuse(model, (X,)).module
    assert error(model, fused, X) < 1e-12
    assert torch.equal(fused[2].weight, model[2].weight) and fused[2].weight is not model[2].weight


def test_a_parameter_that_a_forward_reads_itself_is_not_changed():
    model = randomised(
        Spelled(lambda m, x: torch.sin(m.n(m.a(x))) + F.conv2d(torch.cos(x), m.a.weight, padding=1), a=conv(), n=norm())
    )
    assert error(model, fuse(model, (X,)).module, X) < 1e-12


def test_a_norm_whose_scale_is_read_stays_readable():
    model = randomised(Spelled(lambda m, x: torch.sin(m.n(m.a(x))) * m.n.weight.sum(), a=conv(), n=norm()))
    assert error(model, fuse(model, (X,)).module, X) < 1e-12


def test_reading_the_dtype_of_a_weight_prevents_no_fold():
    model = randomised(Spelled(lambda m, x: torch.sin(m.n(m.a(x.to(m.a.weight.dtype)))), a=conv(), n=norm()))
    (site,) = plan(model, (X,)).sites
    assert site.form == "fold"


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.conv2d(x, m.a.weight.to(m.b.weight.device), padding=1) + m.b(x),
        lambda m, x: m.a(x) + m.b(x).to(x.dtype).to(x.device),
    ],
)
def test_reading_a_dtype_or_device_leaves_nothing_behind(forward):
    fused = fuse(randomised(pair(forward)), (X,)).module
    assert type(fused) is nn.Conv2d


def test_a_check_of_metadata_reads_nothing():
    """Exported programs have one before every cast."""
    model = randomised(pair(lambda m, x: m.a(x) + m.b(x).to(torch.float64)))
    program = torch.export.export(model, (X,)).module()
    assert operations(fuse(program, (X,)).module, X)["convolution"] == 1


def test_what_was_one_module_stays_one():
    block = RepVGG()
    model = randomised(Spelled(lambda m, x: m.second(torch.sin(m.first(x))), first=block, second=block))
    fused = fuse(model, (X,)).module
    assert fused.first is fused.second and error(model, fused, X) < 1e-12


def test_a_traced_norm_keeps_what_follows_it():
    model = randomised(nn.Sequential(conv(), TracedNorm(4)))
    fused = fuse(model, (X,)).module
    assert (
        type(fused[0]) is nn.Conv2d and [type(m) for m in fused[1].modules() if not list(m.children())][-1] is nn.ReLU
    )
    assert operations(fused, X)["batch_norm"] == 0


def test_a_block_called_by_keyword():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = pair(lambda m, x: m.a(x) + m.b(x))

        def forward(self, x):
            return torch.sin(self.block(x=x))

    model = randomised(Caller())
    fused = fuse(model, (X,))
    assert fused.plan.sites and error(model, fused.module, X) < 1e-12


def test_defaults_of_a_forward_stay():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3), conv(1)

        def forward(self, x, skip=None, *, scale=2.0):
            y = torch.sin(self.a(x) + self.b(x)) * scale
            return y if skip is None else y + skip

    model = randomised(Optional())
    fused = fuse(model, (X,))
    assert fused.plan.sites and error(model, fused.module, X) < 1e-12


def test_uint8_images_are_still_converted():
    model = randomised(pair(lambda m, x: (lambda y: m.a(y) + m.b(y))(x * 1.0)), dtype=torch.float32)  # noqa: PLC3002
    x = torch.randint(0, 255, (1, 4, 5, 5), dtype=torch.uint8)
    fused = fuse(model, (x,))
    assert fused.plan.sites and error(model, fused.module, x) < 1e-5


def test_sites_can_be_dropped_from_a_plan(net):
    whole = plan(net, (X,))
    for site in whole.sites:
        part = replace(whole, sites=(site,), live=None)
        assert error(net, rewrite(net, part), X) < 1e-12
        assert operations(rewrite(net, part), X)["convolution"] == (5 if site.form == "fold" else 4)
    nothing = rewrite(net, replace(whole, sites=(), live=None))
    assert str(nothing) == str(net) and nothing is not net


def test_a_plan_from_json_serves_other_weights_and_dtypes(net):
    saved = plan(net, (X,)).to_dict()
    other = randomised(Net(), seed=5)
    assert error(other, rewrite(other, Plan.from_dict(saved)), X) < 1e-12
    half = copy.deepcopy(other).float()
    assert error(half, rewrite(half, Plan.from_dict(saved)), X.float()) < 1e-4


class Ordered(nn.Module):
    """Channels in an order that a buffer holds."""

    def __init__(self, *order: int):
        super().__init__()
        self.a, self.b = conv(3), conv(1)
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x):
        return torch.sin(self.a(x).index_select(1, self.order) + self.b(x))


def test_a_plan_takes_an_order_of_channels_from_the_network_at_hand():
    one, other = randomised(Ordered(3, 1, 2, 0)), randomised(Ordered(0, 2, 2, 1), seed=1)
    made = plan(one, [X])
    for given in (made, Plan.from_dict(made.to_dict())):
        assert len(given.sites) == 1
        assert error(one, rewrite(one, given), X) < 1e-12
        assert error(other, rewrite(other, given), X) < 1e-12


def test_a_plan_from_json_serves_a_model_that_holds_buffers_alone():
    bare = Spelled(lambda m, x: F.batch_norm(x, m.bn.running_mean, m.bn.running_var), bn=nn.BatchNorm2d(C))
    bare.bn.weight = bare.bn.bias = None
    bare = bare.double().eval()
    saved = plan(bare, (X,)).to_dict()
    assert error(bare, rewrite(bare, Plan.from_dict(saved)), X) == 0


@pytest.mark.parametrize("saved", [True, False])
def test_a_plan_for_another_model_is_refused(net, saved):
    made = plan(net, (X,))
    other = randomised(nn.Sequential(conv_norm(3), conv_norm(1)))
    with pytest.raises(RepfuseError, match="does not fit this model"):
        rewrite(other, Plan.from_dict(made.to_dict()) if saved else made)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.stem[1], "eps", 0.5),
        lambda m: setattr(m.chain.a, "dilation", (2, 2)) or setattr(m.chain.a, "padding", (2, 2)),
    ],
)
def test_a_plan_never_brings_the_settings_of_another_model(net, change, saved):
    made = plan(net, (X,))
    other = copy.deepcopy(net)
    change(other)
    other.stem[0] = conv(3, bias=False, padding_mode=other.stem[0].padding_mode).double()
    assert error(other, rewrite(other, Plan.from_dict(made.to_dict()) if saved else made), X) < 1e-12


@pytest.mark.parametrize("saved", [True, False])
def test_a_plan_for_a_model_with_an_operation_more_in_a_site_is_refused(net, saved):
    made = plan(net, (X,))
    other = copy.deepcopy(net)
    other.stem[0] = conv(3, bias=False, padding_mode="reflect").double()  # which pads first
    with pytest.raises(RepfuseError, match="sites that this model does not have"):
        rewrite(other, Plan.from_dict(made.to_dict()) if saved else made)


def test_an_edited_plan_is_refused(net):
    saved = plan(net, (X,)).to_dict()
    saved["sites"][0]["nodes"] = ["nothing"]
    with pytest.raises(RepfuseError, match="1 sites that this model does not have"):
        rewrite(net, Plan.from_dict(saved))


@pytest.mark.parametrize(
    "damage", [lambda d: d.pop("sites"), lambda d: d.update(schema=99), lambda d: d.update(matching_borders=1)]
)
def test_a_damaged_plan_is_refused(net, damage):
    saved = plan(net, (X,)).to_dict()
    damage(saved)
    with pytest.raises(RepfuseError):
        Plan.from_dict(saved)


def test_named_tuples_come_back_as_they_were():
    model = randomised(pair(lambda m, x: Result(torch.sin(m.a(x) + m.b(x)), x)))
    fused = fuse(model, (X,))
    assert fused.plan.sites and type(fused.module(X)).__name__ == "Result" and error(model, fused.module, X) < 1e-12


def test_a_block_inside_that_returns_a_named_tuple():
    block = pair(lambda m, x: Result(m.a(x) + m.b(x), x))
    model = randomised(Spelled(lambda m, x: torch.sin(m.block(x).x) + m.block(x).y, block=block))
    fused = fuse(model, (X,))
    assert fused.plan.sites and error(model, fused.module, X) < 1e-12


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(conv(), AlwaysDropping(), norm()),
        lambda: Spelled(lambda m, x: m.n(F.dropout(m.a(x))), a=conv(), n=norm()),
    ],
)
def test_a_dropout_that_drops_is_no_no_op(make):
    assert plan(randomised(make()), (X,)).sites == ()


def test_a_residual_in_the_parent_leaves_the_parent_alone():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = pair(lambda m, x: m.a(x) + m.b(x))

        def forward(self, x):
            y = torch.sin(x)
            return self.block(y) + x

    (site,) = plan(randomised(Parent()), (X,)).sites
    assert (site.owner, site.form) == ("block", "chain")


def test_branches_of_a_parameter_stay():
    def forward(m, x):
        position = m.position
        return m.a(position) + m.b(position) + x

    model = pair(forward)
    model.position = nn.Parameter(torch.empty(1, 4, 6, 7))
    fused = fuse(randomised(model), (X,))
    assert not fused.plan.sites and error(randomised(model), fused.module, X) == 0


def test_a_block_goes_along_when_its_no_op_is_merged_outside():
    inner = Spelled(lambda m, x: (x.clone(), m.a(x) + m.b(x)), a=conv(3), b=conv(1))

    def forward(m, x):
        same, summed = m.inner(x)
        return m.c(same) + m.d(same), summed

    net = randomised(Spelled(forward, inner=inner, c=conv(3), d=conv(1)))
    fused = fuse(net, (X,)).module
    assert error(net, fused, X) < 1e-12 and operations(fused, X)["convolution"] == 2


def test_a_no_op_in_the_block_after_stays_there():
    def forward(m, x):
        same = x.contiguous()
        return F.relu(m.a(same) + m.b(torch.sin(same)) + m.b(same))

    block = Spelled(forward, a=conv(3), b=conv(1))
    net = randomised(Spelled(lambda m, x: m.block(m.a(x) + m.b(x)), a=conv(3), b=conv(1), block=block))
    fused = fuse(net, (X,)).module
    assert error(net, fused, X) < 1e-12 and len(fuse(net, (X,)).plan.sites) == 2


def test_sums_whose_operands_are_cut_while_they_are_judged():
    def forward(m, x):
        double = x + x
        same = m.same(double + x)
        return m.a(same), torch.cat([same, double], 1)

    net = randomised(Spelled(forward, a=conv(3), same=nn.Identity()))
    assert error(net, fuse(net, (X,)).module, X) < 1e-12


def normalised(norm, x):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


class NormsOfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = norm(), norm()

    def forward(self, x, y):
        return normalised(self.a, x), normalised(self.b, y)


class NormsInARow(NormsOfTwo):
    def forward(self, x):
        return normalised(self.b, normalised(self.a, x))


class NormBesideBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = norm(), conv(3), conv(1)

    def forward(self, x, y):
        return normalised(self.a, x), self.b(y) + self.c(y)


def of_two(m, x):
    one, other = m.inner(m.a(x), m.b(torch.sin(x)))
    return F.relu(one) * other


@pytest.mark.parametrize(
    ("inner", "forward", "convolutions"),
    [
        (NormsOfTwo, of_two, 2),
        (NormsInARow, lambda m, x: m.inner(m.a(x)), 1),
        (NormBesideBranches, lambda m, x: m.inner(m.a(x), torch.sin(x)), 2),
    ],
)
def test_a_module_that_gives_up_several_things_gets_one_new_body(inner, forward, convolutions):
    net = randomised(Spelled(forward, a=conv(3), b=conv(1), inner=inner()))
    fused = fuse(net, (X,)).module
    after = operations(fused, X)
    assert error(net, fused, X) < 1e-12 and (after["convolution"], after["batch_norm"]) == (convolutions, 0)


def test_a_weight_put_together_in_forward_leaves_nothing_behind():
    def forward(m, x):
        weight = torch.zeros_like(m.p)
        for channel in range(4):
            weight[channel, channel] = m.p[channel, channel]
        return F.relu(F.conv2d(x, weight + m.q, None, 1, 1))

    shape = (4, 4, 3, 3)
    model = randomised(Spelled(forward, p=nn.Parameter(torch.empty(shape)), q=nn.Parameter(torch.empty(shape))))
    fused = fuse(model, (X,)).module
    assert error(model, fused, X) < 1e-12
    assert (
        operations(fused, X).total()
        == operations(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()).double(), X).total()
    )
    assert [name for name, _ in fused.named_parameters()] == ["fused.weight", "fused.bias"]


def test_channels_that_are_chosen_twice_count_twice():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.three, self.one = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = x[:, [0, 0, 1, 1]]
            return self.three(y) + self.one(y)

    made, x = randomised(Doubled()), image(2, 4, 6, 7)
    assert error(made, fuse(made, (x,)).module, x) < 1e-12


@pytest.mark.parametrize("after", [lambda m, x: m.n(x), lambda m, x: F.relu(x)])
def test_a_filter_made_of_numbers_in_forward(after):
    """It belongs to nobody: the dtype of the result comes from the normalisation, and alone it stays as it is."""
    model = randomised(
        Spelled(lambda m, x: after(m, F.conv2d(x, torch.ones(4, 4, 3, 3, dtype=torch.float64))), n=norm())
    )
    fused = fuse(model, (X,)).module
    assert error(model, fused, X) < 1e-12 and operations(fused, X)["batch_norm"] == 0


def test_a_filter_kept_as_whole_numbers():
    model = randomised(Spelled(lambda m, x: F.relu(F.conv2d(x, m.kernel.double()))))
    model.register_buffer("kernel", torch.arange(144).view(4, 4, 3, 3))
    assert error(model, fuse(model, (X,)).module, X) < 1e-12


@pytest.mark.parametrize("kernel", [lambda m: m.kernel, lambda m: 2 * m.kernel], ids=["as it is", "computed"])
@pytest.mark.parametrize("after", [lambda m, x: m.n(x), lambda m, x: F.relu(m.c(x))], ids=["block", "beside"])
def test_a_filter_that_is_a_plain_attribute(kernel, after):
    model = randomised(Spelled(lambda m, x: after(m, F.conv2d(x, kernel(m))), n=norm(), c=conv(1)))
    model.kernel = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    fused = fuse(model, (X,)).module
    assert error(model, fused, X) < 1e-12
    assert all(not tensor.is_meta for _, tensor in named_tensors(fused))


def test_what_differs_only_where_two_blocks_are_merged_is_left_alone():
    """Either of them alone would be right: what is certain is that both together are not."""

    def by_both(m, x):
        kept = any(type(block) is Spelled for block in (m.first, m.second))
        return torch.sin(m.second(torch.sin(m.first(x)))) * (1 if kept else 2)

    model = randomised(
        Spelled(by_both, first=pair(lambda m, x: m.a(x) + m.b(x)), second=pair(lambda m, x: m.a(x) + m.b(x)))
    )
    checkpoint = Checkpoint(model, (X,), "pt", Path(), "", None, "given", ())
    for result in (fuse(model, (X,)), convert(checkpoint)):
        assert error(model, result.module, X) < 1e-12
        assert [refusal.code for refusal in result.plan.refusals].count("differs") == 2


# --- the original and the result have nothing in common


class Held(Net):
    """A network whose branches, and what is in them, are also held where no module is registered."""

    def __init__(self):
        super().__init__()
        self.parts = [self.block.a, self.block.b, self.chain]
        self.by_name = {"norm": self.stem[1]}
        self.__dict__["aside"] = self.block.a


class Freezing(RepVGG):
    """A block that looks at its parts when it is copied."""

    def __setstate__(self, state):
        super().__setstate__(state)
        for part in self.children():
            part.requires_grad_(False)


class Spare(nn.Module):
    """A branch that would call a pad only where it is given other channels."""

    def __init__(self, kernel, pad=None):
        super().__init__()
        self.conv, self.pad = nn.Conv2d(C, C, kernel, padding=kernel // 2), pad

    def forward(self, x):
        return self.conv(x) if x.shape[1] == C else self.pad(x)


def with_a_pad_elsewhere():
    """The pad that merges into a convolution is registered in a branch that goes, too."""
    pad = nn.ZeroPad2d(1)
    inner = Spelled(lambda m, x: torch.tanh(m.conv(m.pad(torch.tanh(x)))), pad=pad, conv=nn.Conv2d(C, C, 3))
    block = Spelled(lambda m, x: m.inner(torch.relu(m.a(x) + m.b(x))), inner=inner, a=Spare(3, pad), b=Spare(1))
    return nn.Sequential(block, nn.ReLU())


def freezing():
    return nn.Sequential(Freezing(), nn.ReLU())


def tagged():
    net = nn.Sequential(conv(3), norm())
    net[1].tags = ["a"]
    return net


@pytest.mark.parametrize("make", [Net, Held, freezing, with_a_pad_elsewhere, tagged])
def test_nothing_of_the_original_is_in_the_result_and_nothing_of_it_changes(make):
    net = randomised(make())
    parts, numbers, flags = list(net.modules()), copy.deepcopy(net.state_dict()), trained(net)
    held = [dict(vars(part), modules=dict(part._modules)) for part in parts]
    found = plan(net, (image(2, C, 9, 8),))
    result = rewrite(net, found)
    assert found.sites
    assert list(net.modules()) == parts and trained(net) == flags
    assert [dict(vars(part), modules=dict(part._modules)) for part in parts] == held
    assert all(torch.equal(x, numbers[name]) for name, x in net.state_dict().items())
    assert set(parts).isdisjoint(everything_in(result))
    memory = {x.untyped_storage().data_ptr() for x in tensors_in(net)}
    assert memory.isdisjoint(x.untyped_storage().data_ptr() for x in tensors_in(result))
    lists = {id(x) for part in parts for x in vars(part).values() if type(x) in (list, dict)}
    assert lists.isdisjoint(id(x) for part in result.modules() for x in vars(part).values())
    assert error(net, copy.deepcopy(result), image(1, C, 7, 12)) < 1e-12


def test_what_a_list_holds_of_a_block_can_be_used():
    net = randomised(Held())
    result = fuse(net, (image(2, C, 9, 8),)).module
    x = image(1, C, 5, 5)
    assert torch.equal(result.parts[0](x), net.block.a(x)) and torch.equal(result.parts[1](x), net.block.b(x))


def trained(net):
    return [x.requires_grad for x in net.parameters()]


def everything_in(net):
    """The modules of a network, and those that lists, dicts and attributes of modules hold."""
    found = dict.fromkeys(net.modules())
    for part in list(found):
        for value in vars(part).values():
            values = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
            found |= {inner: None for each in values if isinstance(each, nn.Module) for inner in each.modules()}
    return list(found)


def tensors_in(net):
    return [x for part in everything_in(net) for x in (*part.parameters(), *part.buffers()) if x.numel()]


@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_an_input_may_be_sparse(sparse):
    graph = SpelledOfTwo(lambda m, x, edges: m.b(m.a(torch.sparse.mm(edges, x))), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    edges = sparse((torch.rand(7, 7) < 0.4).double())
    assert len(plan(randomised(graph), (image(7, 4), edges)).sites) == 1


class Table(dict):
    def __init__(self, owner):
        super().__init__()
        self.owner = owner


def test_a_table_of_ones_own_is_copied_as_it_copies_itself():
    net = randomised(Net())
    vars(net)["_non_persistent_buffers_set"] = Table(net)
    found = plan(net, (image(2, C, 9, 8),))
    assert found.sites and rewrite(net, found)._non_persistent_buffers_set.owner is not net


def emptied(y):
    y[:, np.arange(2)] = 0
    return y


@pytest.mark.parametrize("chosen", [lambda y: y[:, np.arange(C)], emptied])
def test_an_index_may_be_an_array_which_no_code_says(chosen):
    model = randomised(Spelled(lambda m, x: m.a(chosen(x.clone())) + m.b(x) + m.c(x), a=conv(3), b=conv(1), c=conv(3)))
    x = image(2, C, 7, 6)
    found = plan(model, (x,))
    assert {refusal.code for refusal in found.refusals} == {"structured-arguments"}
    assert error(model, rewrite(model, found), x) < 1e-12


def test_statistics_of_other_channels_are_no_map_of_these():
    """ATen's own operator does not compare their numbers, and reads what lies there."""
    normalised = torch.ops.aten._native_batch_norm_legit_no_training.default

    def forward(m, x):
        n = m.n
        return normalised(m.a(x) + m.b(x), n.weight, n.bias, n.running_mean, n.running_var, 0.1, 1e-5)[0]

    model = randomised(Spelled(forward, a=nn.Conv2d(4, 2, 3), b=nn.Conv2d(4, 2, 3), n=nn.BatchNorm2d(4)))
    result = fuse(model, (image(1, 4, 6, 7),))
    (site,) = result.plan.sites
    assert len(site.branches) == 2 and "broadcast" in {refusal.code for refusal in result.plan.refusals}
