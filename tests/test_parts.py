"""Networks that cannot be traced whole: what is inside of and around the untraceable is rewritten, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import RepVGG, conv, conv_norm, norm
from support.agreement import error, image, operations, randomised
from torch import nn

from repfuse.errors import RepfuseError
from repfuse.fusing import fuse
from repfuse.planning.planner import plan
from repfuse.plans import Plan
from repfuse.proof import prove
from repfuse.rewriting import rewrite
from repfuse.tracing.arguments import Arguments, describe, recreate
from repfuse.verifying import input_variants
from repfuse.verifying.comparison import reference

X = image(2, 4, 6, 7)


class Deciding(nn.Module):
    """Decides by values what to call: ``branches[0]`` where the mean is positive, the others else."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        chosen = self.branches[:1] if x.mean() > 0 else self.branches[1:]
        for branch in chosen:
            x = branch(x)
        return x


class Called(nn.Module):
    """A block whose forward does as the test says."""

    def __init__(self, forward, **children):
        super().__init__()
        self.run = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


class Summed(nn.Module):
    """conv3 + conv1, scaled by an argument, with what else may be handed in."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3), conv(1)

    def forward(self, x, scale=1.0, others=(), *, shift=None):
        y = torch.relu(self.a(x) + self.b(x)) * scale
        for other in others:
            y = y + other
        return y if shift is None else y + shift


def sign(x):
    """What no trace can follow."""
    return 1.0 if x.mean() > 0 else -1.0


def converted(model, *inputs):
    """The fused network, which must agree on the inputs, on their negatives and on other sizes."""
    fused = fuse(model, inputs).module
    for factor in (1, -1, 3):
        assert error(model, fused, *(x * factor for x in inputs)) < 1e-12
    return fused


def norms(module, x=X):
    return operations(module, x)["batch_norm"]


def test_a_root_that_decides_by_values_keeps_its_class_and_its_parts_are_rewritten():
    model = randomised(Deciding(nn.Sequential(conv_norm(3), nn.ReLU(), RepVGG()), conv_norm(1)))
    fused = converted(model, X.abs())
    assert type(fused) is Deciding and norms(model, X.abs()) == 4 and norms(fused, X.abs()) == 0
    assert norms(fused, -X.abs()) == 1  # what did not run at the example is left as it is


def test_the_search_goes_on_inside_of_a_part():
    inner = Deciding(conv_norm(3), conv_norm(1))
    model = randomised(Deciding(nn.Sequential(conv_norm(3), nn.Sigmoid(), inner, conv_norm(1)), nn.ReLU()))
    found = plan(model, (X.abs(),))
    assert [part.path for part in found.parts] == ["branches.0", "branches.0.2.branches.0"]
    untraceable = [refusal.where for refusal in found.refusals if refusal.code == "untraceable"]
    assert untraceable == ["(root)", "branches.0.2"]
    assert norms(converted(model, X.abs()), X.abs()) == 0


def test_a_part_that_is_called_on_several_sizes_is_rewritten_once():
    def levels(m, x):
        return [m.head(y) * sign(y) for y in (x, x[..., ::2, ::2], x[..., 1:, :])]

    model = randomised(Called(levels, head=nn.Sequential(conv_norm(3), nn.ReLU(), RepVGG())))
    fused = converted(model, X)
    assert norms(model) == 12 and norms(fused) == 0 and type(fused) is Called
    assert len(plan(model, (X,)).parts) == 1


@pytest.mark.parametrize(
    "use",
    {
        "calls the convolution": lambda m, x: m.block[0](x) * sign(x),
        "reads its weight": lambda m, x: x * m.block[0].weight.mean() * sign(x),
        "calls its forward": lambda m, x: m.block[0].forward(x) * sign(x),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("outside", [True, False], ids=["traced", "part"])
def test_what_an_untraceable_forward_uses_too_stays(use, outside):
    block = conv_norm(3)
    other = Called(use[1], block=block)
    whole = nn.Sequential(block, nn.ReLU(), other) if outside else Deciding(nn.Sequential(block, nn.ReLU(), other))
    model = randomised(whole)
    fused = converted(model, X.abs())
    assert norms(fused, X.abs()) == 1
    refusals = plan(model, (X.abs(),)).refusals
    assert any(refusal.code in ("called-differently", "outer-reference") for refusal in refusals)


@pytest.mark.parametrize(
    "use",
    [lambda m, x: m.block[0].weight.mean(), lambda m, x: m.block[0](x)],
    ids=["reads a weight", "calls a child"],
)
def test_what_the_outermost_forward_uses_of_a_part_stays(use):
    model = randomised(Called(lambda m, x: m.block(x) * sign(x) + use(m, x), block=conv_norm(3)))
    assert norms(converted(model, X)) == 1


def test_what_an_untraceable_module_holds_and_did_not_call_stays():
    shared = conv_norm(3)
    model = randomised(nn.Sequential(shared, nn.ReLU(), Deciding(conv_norm(1), shared[0])))
    assert norms(converted(model, X.abs()), X.abs()) == 1


def test_what_is_called_with_other_settings_each_time_is_looked_into():
    inner = Called(lambda m, x, scale: m.block(x) * scale, block=conv_norm(3))
    model = randomised(Called(lambda m, x: m.inner(m.inner(x, 2.0) * sign(x), 3.0), inner=inner))
    assert norms(converted(model, X)) == 0


def test_a_block_that_holds_an_untraceable_one_with_a_shared_child_keeps_that_child():
    shared = conv_norm(3)
    model = randomised(nn.Sequential(shared, nn.ReLU(), Deciding(shared, conv_norm(1))))
    assert norms(converted(model, X.abs()), X.abs()) == 2


@pytest.mark.parametrize(
    ("calls", "parts"),
    [
        ([{}, {}], ["block"]),
        ([{"scale": 2.0}, {"scale": 2.0}], ["block"]),
        ([{"scale": 2.0}, {}], []),
        ([{"shift": torch.ones(1).double()}, {"shift": torch.ones(1).double()}], ["block"]),
        ([{"shift": torch.ones(1).double()}, {}], []),
        ([{"others": [torch.ones(1).double()]}, {"others": []}], []),
    ],
    ids=["defaults", "alike", "another number", "a tensor", "with and without", "more and fewer"],
)
def test_what_a_trace_takes_for_fixed_has_to_be_alike_in_all_calls(calls, parts):
    def forward(m, x):
        for given in calls:
            x = m.block(x, **given) * sign(x)
        return x

    model = randomised(Called(forward, block=Summed()))
    assert [part.path for part in plan(model, (X,)).parts] == parts
    fused = converted(model, X)
    assert operations(fused, X)["convolution"] == (2 if parts else 4)


class Opaque:
    """An argument that is no data."""


def test_a_part_that_is_called_with_objects_is_looked_into():
    def inner(m, x, _thing):
        return m.block(x) * 2

    model = randomised(Called(lambda m, x: m.inner(x, Opaque()) * sign(x), inner=Called(inner, block=conv_norm(3))))
    assert [part.path for part in plan(model, (X,)).parts] == ["inner.block"]
    assert norms(converted(model, X)) == 0


@pytest.mark.parametrize(
    "example", [([X, X + 1],), ({"a": X, "b": X + 1},), ((X, X + 1),)], ids=["list", "dict", "tuple"]
)
def test_tensors_come_in_lists_dicts_and_tuples(example):
    def forward(m, inputs):
        values = list(inputs.values()) if isinstance(inputs, dict) else inputs
        return [m.block(value) for value in values]

    model = randomised(Called(forward, block=RepVGG()))
    fused = fuse(model, example).module
    assert all(torch.allclose(a, b, rtol=1e-11) for a, b in zip(model(*example), fused(*example), strict=True))
    assert "BatchNorm" in str(model) and "BatchNorm" not in str(fused)


def test_an_argument_of_tensors_and_nothing_is_looked_around():
    def forward(m, pair):
        y = m.block(pair[0])
        return y if pair[1] is None else y + pair[1]

    model = randomised(Called(forward, block=RepVGG()))
    fused = fuse(model, ((X, None),)).module
    for second in (None, X):
        assert torch.allclose(model((X, second)), fused((X, second)), rtol=1e-11)
    assert "BatchNorm" not in str(fused)


def test_the_branch_that_values_choose_is_the_one_that_runs():
    model = randomised(nn.Sequential(nn.Conv2d(4, 4, 1), Deciding(conv_norm(3), conv_norm(1))))
    with torch.no_grad():
        model[0].bias.fill_(1e4)
    assert [part.path for part in plan(model, (X,)).parts] == ["", "1.branches.0"]


def test_a_block_whose_parts_merge_as_much_keeps_its_class():
    def forward(m, x):
        _, _, *space = x.shape
        return m.b(torch.relu(m.a(x))) * len(space)

    fused = fuse(randomised(nn.Sequential(Called(forward, a=conv_norm(3), b=conv_norm(1)))), (X,)).module
    assert type(fused[0]) is Called and norms(fused) == 0


@pytest.fixture
def model():
    return randomised(Deciding(nn.Sequential(conv_norm(3), nn.ReLU(), RepVGG()), conv_norm(1)))


def test_a_plan_of_parts_replays_from_its_data(model):
    made = plan(model, (X.abs(),))
    again = Plan.from_dict(made.to_dict())
    assert again == made and {site.part for site in again.sites} == {"branches.0"}
    fused = rewrite(randomised(model, seed=1), again)
    assert error(model, fused, X.abs()) < 1e-12 and norms(fused, X.abs()) == 0


def test_sites_of_a_part_can_be_dropped(model):
    made = plan(model, (X.abs(),))
    one = replace(made, sites=made.sites[:1], live=None)
    fused = rewrite(model, one)
    assert error(model, fused, X.abs()) < 1e-12 and norms(fused, X.abs()) == 3


@pytest.mark.parametrize(
    "damage", [{"path": "nowhere"}, {"arguments": None}, {"arguments": {"shape": [1]}}, {"fingerprint": "x"}]
)
def test_a_plan_with_a_damaged_part_is_refused(model, damage):
    made = plan(model, (X.abs(),))
    part = replace(made.parts[0], **damage)
    sites = tuple(replace(site, part=part.path) for site in made.sites)
    with pytest.raises(RepfuseError, match=r"plan"):
        rewrite(model, replace(made, parts=(part,), sites=sites, live=None))


def test_sites_of_a_part_that_the_plan_does_not_have_are_refused(model):
    made = plan(model, (X.abs(),))
    with pytest.raises(RepfuseError, match="2 sites that this model does not have"):
        rewrite(model, replace(made, parts=()))


def test_parts_are_proven_where_they_stand(model):
    found = plan(model, (X.abs(),))
    fused = rewrite(model, found)
    trials = input_variants((X.abs(),))
    proof = prove(model, found, fused, trials, reference(model, trials))
    assert proof.passed and [site.path.startswith("branches.0.") for site in proof.sites] == [True] * 2
    with torch.no_grad():
        fused.branches[0][0][0].weight[0, 0, 0, 0] *= 1 + 1e-4
    assert not prove(model, found, fused, trials, reference(model, trials)).passed


def test_arguments_come_back_from_their_description():
    given = Arguments((X, [X[0], None]), {"flag": True, "pair": (X.long(), "text"), "d": {"x": 1.5}})
    args, kwargs = recreate(describe((given.args, dict(given.kwargs))), torch.empty(0, dtype=torch.float32))
    assert args[0].shape == X.shape and args[0].dtype == torch.float32 and args[1][1] is None
    assert kwargs["pair"][0].dtype == torch.int64 and kwargs["pair"][1] == "text" and kwargs["d"] == {"x": 1.5}


def test_the_model_is_as_it_was_after_a_watched_run(model):
    call, look_up = nn.Module.__call__, nn.Module.__getattr__
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan(model, (X.abs(),))
    with pytest.raises(RepfuseError, match="does not run"):
        plan(model, (image(1, 3, 6, 7),))
    assert nn.Module.__call__ is call and nn.Module.__getattr__ is look_up
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = conv(3), conv(1), norm()

    def forward(self, x, twice=False):
        y = torch.relu(self.n(self.a(x) + self.b(x)))
        return (y * 2, y) if twice else (y, torch.sin(y))


def test_a_rewritten_forward_does_not_ignore_an_argument_that_the_trace_took_for_fixed():
    model = randomised(Flagged())
    fused = fuse(model, (X,)).module
    assert error(model, fused, X) < 1e-12
    with pytest.raises((AssertionError, TypeError)):
        fused(X, True)


class Shaped(nn.Module):
    """RepVGG's sum, in a forward that only torch.export reads."""

    def __init__(self, how=lambda x: x):
        super().__init__()
        self.a, self.b, self.n, self.how = conv_norm(3), conv_norm(1), norm(), how
        self.names = ("first",)

    def forward(self, x, scale=2.0):
        b, c, *space = x.shape
        y = self.how(self.a(x) + self.b(x) + self.n(x)) * len(space) * scale
        return {"map": torch.relu(y), "mean": y.reshape(b, c, -1).mean(-1)}


def assigned(x):
    """A copy by slices: the sizes are numbers there."""
    out = torch.zeros([int(n) for n in x.shape], dtype=x.dtype)
    out[:] = x
    return out


class Holding(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.block, self.tail = conv_norm(3), block, conv_norm(1)

    def forward(self, x):
        return self.tail(self.block(torch.tanh(self.stem(x)), scale=2.0)["map"])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_block_that_only_torch_export_reads_is_rewritten_for_all_sizes(batch):
    model, x = randomised(Holding(Shaped())), image(batch, 4, 6, 7)
    result = fuse(model, (x,))
    assert operations(result.module, x)["convolution"] == 3 and norms(result.module, x) == 0
    assert "untraceable" not in {refusal.code for refusal in result.plan.refusals}
    for shape in ((1, 4, 1, 1), (2, 4, 5, 5), (3, 4, 9, 2)):
        assert error(model, result.module, image(*shape)) < 1e-12
    assert type(result.module) is Holding and result.module.block.names == ("first",)


def test_a_plan_with_an_exported_block_replays():
    model = randomised(Holding(Shaped()))
    made = Plan.from_dict(plan(model, (X,)).to_dict())
    other = randomised(model, seed=1)
    assert error(other, rewrite(other, made), X) < 1e-12 and [part.exported for part in made.parts] == [False, True]
    found, trials = plan(model, (X,)), input_variants((X,))
    assert prove(model, found, rewrite(model, found), trials, reference(model, trials)).passed


@pytest.mark.parametrize(
    "how",
    [
        assigned,
        lambda x: x if x.shape[2] % 2 else x * 2,
        lambda x: x * 2 if x.shape[3] == 1 else x,
        lambda x: x * 2 if x.shape[2] == x.shape[3] else x,
        lambda x: x * 2 if x.shape[2] > 50 else x,
        lambda x: x * 2 if x.sum() > 0 else x,
    ],
    ids=["numbers", "odd", "one pixel", "square", "large", "values"],
)
def test_what_export_reads_for_some_sizes_only_is_left_to_its_parts(how):
    model = randomised(Holding(Shaped(how)))
    fused = converted(model, X)
    assert type(fused.block) is Shaped and norms(fused) == 1  # the normalisation of the skip
    for shape in ((1, 4, 7, 7), (2, 4, 6, 1), (1, 4, 60, 4)):
        assert error(model, fused, image(*shape)) < 1e-12


def test_an_exported_block_whose_insides_others_use_is_left_to_its_parts():
    block = Shaped()
    model = randomised(Called(lambda m, x: (m.block(x), m.other(x)), block=block, other=block.a))
    fused = converted(model, X)
    assert type(fused.block) is Shaped and norms(fused) == 1


def test_a_part_that_another_forward_calls_with_other_settings_is_dropped():
    block = Summed()
    first = Called(lambda m, x: m.block(x) * sign(x), block=block)
    second = Called(lambda m, x: m.block(x, 3.0) * sign(x), block=block)
    model = randomised(nn.Sequential(first, second))
    fused = converted(model, X)
    assert operations(fused, X)["convolution"] == 4 and plan(model, (X,)).sites == ()


class Tokens(Shaped):
    """The same block, with tokens ``[B, N, C]`` beside the map: how many there are goes into the result."""

    def forward(self, x, tokens, scale=2.0):
        found = super().forward(x, scale)
        return found["map"] / tokens.shape[1] + tokens.mean()


@pytest.mark.parametrize("tokens", [9, 4])
def test_an_exported_block_takes_other_numbers_of_tokens(tokens):
    model = randomised(Tokens())
    example = (X, image(2, tokens, 5))
    fused = fuse(model, example).module
    assert operations(fused, *example)["convolution"] == 1
    for other in (1, 3, 70):
        assert error(model, fused, X, image(2, other, 5)) < 1e-12


class FewTokens(Tokens):
    def forward(self, x, tokens, scale=2.0):
        found = super().forward(x, tokens, scale)
        return found * 2 if tokens.shape[1] == 9 else found


def test_what_export_reads_for_one_number_of_tokens_is_left_to_its_parts():
    model = randomised(FewTokens())
    fused = fuse(model, (X, image(2, 9, 5))).module
    assert type(fused) is FewTokens and error(model, fused, X, image(2, 8, 5)) < 1e-12


def test_torch_export_does_not_print_what_it_could_not_read(capfd):
    plan(randomised(Holding(Shaped(lambda y: y * 2 if (y > 0).any() else y))), (X,))
    assert capfd.readouterr() == ("", "")


class Listing(nn.Module):
    """Calls its blocks through lists, tuples and dicts of its own, in which PyTorch does not look."""

    def __init__(self, decides):
        super().__init__()
        self.a, self.b, self.c, self.decides = RepVGG(), conv_norm(1), RepVGG(), decides
        self.plain, self.table = ([self.a], (self.b,)), {"c": self.c}

    def forward(self, x):
        (a,), (b,) = self.plain
        x = self.table["c"](torch.relu(b(a(x))))
        return x * sign(x) if self.decides else x


@pytest.mark.parametrize("decides", [False, True], ids=["traced", "part"])
def test_what_stands_in_plain_lists_too_is_replaced_there(decides):
    model = randomised(Listing(decides))
    fused = converted(model, X)
    assert norms(fused) == 0 and fused.plain[0][0] is fused.a and fused.table["c"] is fused.c
    assert norms(model) == 7 and model.plain[0][0] is model.a


class Reaching(nn.Module):
    """Reads inside of a block, in a branch that the example does not take."""

    def __init__(self, blocks):
        super().__init__()
        self.a, self.b, self.all = blocks[0], conv_norm(1), nn.ModuleList(blocks)


class ReachesWeight(Reaching):
    def forward(self, x):
        return self.b(self.a(x)) if x.mean() > 0 else x + self.a[0].weight.mean()


class ReachesChild(Reaching):
    def forward(self, x):
        return self.b(self.a(x)) if x.mean() > 0 else self.rarely(self.a, x)

    def rarely(self, x, y):
        first = self.a[0]
        return first(y)


class ReachesForward(Reaching):
    def forward(self, x):
        return self.b(self.a(x)) if x.mean() > 0 else next(each[0].forward(x) for _, each in enumerate(self.all))


class ReachesAll(Reaching):
    def forward(self, x):
        if x.mean() > 0:
            return self.b(self.a(x))
        for each in self.all:
            x = x + sum(tensor.mean() for tensor in each.parameters())
        return x


class ReachesOwn(Reaching):
    def forward(self, x):
        total = sum(tensor.mean() for tensor in self.parameters())
        return self.b(self.a(x)) if x.mean() > 0 else x + total


def test_a_forward_that_walks_through_its_own_parameters_keeps_them():
    model = randomised(ReachesOwn([conv_norm(3)]))
    assert norms(converted(model, X.abs()), X.abs()) == 2


class ReachesNothing(Reaching):
    """Another method does, which no forward calls."""

    def forward(self, x):
        return self.b(self.a(x)) if x.mean() > 0 else next(each(x) for each in self.all) + self.kept(x)

    def kept(self, x):
        return x.to(next(self.parameters()).dtype) * self.a.training

    def fuse(self):
        return self.a[0].weight


def test_what_only_other_methods_read_is_merged():
    model = randomised(ReachesNothing([conv_norm(3)]))
    assert norms(converted(model, X.abs()), X.abs()) == 0


@pytest.mark.parametrize("kind", [ReachesWeight, ReachesChild, ReachesForward, ReachesAll])
def test_what_a_branch_that_was_not_taken_reads_stays(kind):
    model = randomised(kind([conv_norm(3)]))
    fused = converted(model, X.abs())
    assert norms(fused, X.abs()) == 1  # of two: the other block is merged


class Two(Shaped):
    def forward(self, x, z, scale=2.0):
        return super().forward(x, scale)["map"] + self.a(z)


def test_a_tensor_that_is_given_twice_is_not_always_the_same():
    model = randomised(Called(lambda m, x: m.block(x, x) * sign(x) + m.block(x, x * 2), block=Two()))
    fused = converted(model, X)
    assert type(fused.block) is Two


def test_a_forward_that_asks_for_values_is_not_given_to_torch_export(monkeypatch):
    asked = []
    monkeypatch.setattr("repfuse.tracing.parts.export", lambda block, _arguments: asked.append(type(block).__name__))
    by_values = Called(lambda m, x: m.a(x) + m.b(x) if x.mean() > 0 else x, a=conv(3), b=conv(1))
    plan(randomised(nn.Sequential(by_values, Holding(Shaped()))), (X.abs(),))
    assert asked == ["Shaped"]
