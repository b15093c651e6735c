"""Some sites of a plan: whatever is left out, the rest is rewritten exactly, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from blocks import RepVGG, Spelled, SpelledOfTwo, conv, conv_norm
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.agreement import error, image, operations, randomised
from support.programs import EXAMPLES, STEPS, program
from torch import nn

from repfuse.checking.comparison import reference
from repfuse.checking.inputs import input_variants
from repfuse.checking.proof import prove
from repfuse.converting import convert
from repfuse.errors import RepfuseError
from repfuse.loading import load
from repfuse.planning.planner import plan
from repfuse.planning.replaying import Choice, choose, fitted
from repfuse.plans import Cost, Plan, Policy, Site
from repfuse.rewriting import rewrite
from repfuse.saving import save

X = image(2, 4, 6, 7)
X = X * X.sum().sign()  # so that what decides by the sum runs all of it


def sited(*paths: str) -> Plan:
    """A plan of these sites; a site's owner is the module around it."""
    sites = [
        Site(path, ("skip",), "3x3", Cost(9), Cost(1), path.rpartition(".")[0], "chain", "x", path, (path,))
        for path in paths
    ]
    return Plan(tuple(sites), (), "cost", "f", {"tuple": []})


NAMES = ("stem.0", "stages.1.0.fused", "stages.1.10.fused", "stages.10.0.fused", "head.mlp.fused", "")


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        ((), (), NAMES),
        (("stages.1",), (), NAMES[1:3]),
        (("stages.1.*",), (), NAMES[1:3]),
        (("stages.1*",), (), NAMES[1:4]),
        (("stages.?.0",), (), NAMES[1:2]),
        (("*.fused",), (), NAMES[1:5]),
        (("*.mlp.*", "stem"), (), (NAMES[0], NAMES[4])),
        ((), ("stages",), (NAMES[0], *NAMES[4:])),
        ((), ("(root)",), NAMES[:5]),
        (("stages",), ("stages.1",), NAMES[3:4]),
        (("stem",), ("*",), ()),
        ("stages.1.0.fused", "stem", NAMES[1:2]),
        ("stages.[0-1].*", (), NAMES[1:3]),
    ],
)
def test_globs_name_modules_and_all_in_them(include, exclude, kept):
    whole = sited(*NAMES)
    chosen = whole.select(include, exclude)
    assert tuple(site.path for site in chosen.sites) == kept
    left_out = [refusal for refusal in chosen.refusals if refusal.code == "excluded"]
    assert [refusal.where for refusal in left_out] == [name or "(root)" for name in NAMES if name not in kept]
    assert all(refusal.before == Cost(9) and refusal.reason for refusal in left_out)
    assert whole == sited(*NAMES)


@pytest.mark.parametrize("kind", ["include", "exclude"])
@pytest.mark.parametrize(
    ("glob", "near"), [("stages.2", "stages.1"), ("Stem", "stem"), ("", "stem.0"), ("a.b", "stem")]
)
def test_a_glob_that_matches_nothing_names_what_is_near(kind, glob, near):
    with pytest.raises(RepfuseError, match="No site matches") as caught:
        sited(*NAMES).select(**{kind: ["head", glob]})
    assert repr(glob) in caught.value.what and near in caught.value.why


def test_a_site_goes_by_its_owner_too():
    site = replace(sited("shared.conv").sites[0], owner="neck.block")
    for glob in ("shared", "neck", "neck.block"):
        assert not replace(sited(), sites=(site,)).select(exclude=glob).sites


def test_where_there_are_no_sites_a_glob_is_an_error_too():
    with pytest.raises(RepfuseError) as caught:
        sited().select(exclude="*")
    assert "no sites" in caught.value.why


class Net(nn.Module):
    """Sites of each form, one of them within a block that is another."""

    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3)
        self.block = Spelled(lambda m, x: torch.sin(m.inner(x)) + m.a(x) + m.b(x), a=conv(3), b=conv(1), inner=RepVGG())
        self.chain = nn.Sequential(conv(1, bias=False), conv(3))
        self.again = RepVGG()

    def forward(self, x):
        x = self.chain(torch.relu(self.block(torch.relu(self.stem(x)))))
        return self.again(torch.relu(self.again(torch.tanh(x))))


@pytest.fixture
def net():
    return randomised(Net())


def saved(made: Plan) -> Plan:
    return Plan.from_dict(json.loads(made.to_json()))


def test_any_sites_of_a_network_can_be_left_out():
    """Of the plan as it was made, and of one that was read."""
    net = randomised(Net())
    whole = plan(net, (X,))
    assert len(whole.sites) >= 3
    for bits in range(0, 2 ** len(whole.sites), 3):  # a third of all
        kept = tuple(site for index, site in enumerate(whole.sites) if bits >> index & 1)
        part = replace(saved(whole) if bits & 4 else whole, sites=kept)
        chosen = choose(net, (X,), Choice(plan=part))
        assert {site.key for site in chosen.sites} == {site.key for site in kept}
        excluded = [refusal for refusal in chosen.refusals if refusal.code == "excluded"]
        assert len(excluded) == len(whole.sites) - len(kept)
        fused = rewrite(net, chosen)
        assert error(net, fused, X) < 1e-12
        for site in chosen.sites:
            assert isinstance(fused.get_submodule(site.path), nn.Conv2d), site.path
        assert fitted(net, saved(chosen)) == chosen  # what comes out can be given again


def test_what_is_left_out_computes_as_before(net):
    before = operations(net, X)
    chosen = choose(net, (X,), Choice(exclude=["stem", "chain"]))
    after = operations(rewrite(net, chosen), X)
    assert after["batch_norm"] == 1 and before["batch_norm"] > 1  # the stem's
    assert after["convolution"] == 1 + 2 + 2 + 2  # stem; block and inner; chain; again, twice


def kept_in(whole: Plan, numbers: set[int]) -> Plan:
    """The plan with the sums of these numbers: the sites of one sum stand and fall together."""
    sums = list(dict.fromkeys(site.output for site in whole.sites))
    kept = {each for index, each in enumerate(sums) if index in numbers}
    return replace(whole, sites=tuple(site for site in whole.sites if site.output in kept))


def check_without_some(steps, shapes, kept, policy):
    """A random network with some of its sites merged: exactly these, proven, and the plan can be given again. Or it is
    said that one of them takes one that is left out, see below.
    """
    examples = [image(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    original = randomised(program(steps, examples))
    whole = plan(original, examples, policy)
    part = kept_in(saved(whole), kept)
    try:
        chosen = choose(original, examples, Choice(plan=part))
    except RepfuseError as error:
        assert error.why == "Its place depends on a site that is left out."
        event("one cannot be merged alone")
        return
    event(f"{min(len(chosen.sites), 3)} of {min(len(whole.sites), 3)} sites")
    assert {site.key for site in chosen.sites} == {site.key for site in part.sites}
    assert fitted(original, saved(chosen)) == chosen
    fused = rewrite(original, chosen)
    if not chosen.sites:
        assert str(fused) == str(original)
        return
    trials = input_variants(examples)
    proof = prove(original, chosen, fused, trials, reference(original, trials))
    assert proof.passed, proof.reason


POLICIES = st.sampled_from([Policy.COST, Policy.ALWAYS])
QUICK = settings(deadline=None, max_examples=2, suppress_health_check=list(HealthCheck))


@QUICK
@given(STEPS, st.sampled_from(EXAMPLES), st.sets(st.integers(0, 6)), POLICIES)
def test_any_sites_of_random_networks_can_be_left_out(steps, shapes, kept, policy):
    check_without_some(steps, shapes, kept, policy)


@pytest.mark.slow
@settings(QUICK, max_examples=300)
@given(STEPS, st.sampled_from(EXAMPLES), st.sets(st.integers(0, 6)), POLICIES)
def test_any_sites_of_many_random_networks_can_be_left_out(steps, shapes, kept, policy):
    check_without_some(steps, shapes, kept, policy)


def two_sums():
    """One sum of two tensors, each with branches of its own: two convolutions, and one place."""
    model = SpelledOfTwo(
        lambda m, x, y: torch.sin(m.a(x) + m.b(x) + m.c(y) + m.d(y)), a=conv(3), b=conv(1), c=conv(3), d=conv(1)
    )
    return randomised(model), (X, image(2, 4, 6, 7, seed=1))


@pytest.mark.parametrize("apply", [rewrite, fitted])
def test_half_a_sum_is_an_error_and_not_silently_nothing(apply):
    model, inputs = two_sums()
    whole = plan(model, inputs)
    assert len(whole.sites) == 2 and len({site.output for site in whole.sites}) == 1
    for site in whole.sites:
        with pytest.raises(RepfuseError, match="only some of the sites that make") as caught:
            apply(model, replace(saved(whole), sites=(site,)))
        assert repr(site.source) in caught.value.why and "leave all of them out" in caught.value.hint
    apply(model, saved(whole))


def test_what_is_left_may_stand_elsewhere():
    """Of two sums in one block each has its number; the one that is left alone has none."""
    parts = {name: conv(size) for name, size in zip("abcd", (3, 1, 3, 1), strict=True)}
    model = randomised(Spelled(lambda m, x: torch.sin(m.a(x) + m.b(x)) * torch.cos(m.c(x) + m.d(x)), **parts))
    whole = plan(model, (X,))
    chosen = fitted(model, replace(saved(whole), sites=whole.sites[1:]))
    assert [site.path for site in (*whole.sites, *chosen.sites)] == ["fused", "fused_1", "fused"]
    assert isinstance(rewrite(model, chosen).get_submodule(chosen.sites[0].path), nn.Conv2d)
    assert fitted(model, saved(chosen)) == chosen
    none = choose(model, (X,), Choice(plan=replace(saved(whole), sites=whole.sites[1:]), exclude="fused_1"))
    assert [(each.where, each.reason) for each in none.refusals] == [
        ("fused", "the plan does not hold it"),
        ("fused_1", "it is left out by 'fused_1'"),
    ]
    none = choose(model, (X,), Choice(plan=saved(chosen), exclude="fused"))  # as it is called in this plan
    assert [(each.where, each.reason) for each in none.refusals] == [
        ("fused", "the plan does not hold it"),
        ("fused_1", "it is left out by 'fused'"),
    ]


def test_a_site_that_needs_another_is_an_error_alone():
    """A block with a child called graph cannot be rewritten itself, only be dissolved in one that is."""

    def inner(m, x):
        y = m.graph(m.a(x) + m.b(x))
        return y, m.c(y)

    def outer(m, x):
        y, z = m.block(x)
        return torch.sin(z + m.d(y))

    block = Spelled(inner, a=conv(3), b=conv(1), c=conv(3), graph=nn.Linear(7, 7))
    model = randomised(Spelled(outer, block=block, d=conv(1)))
    whole = plan(model, (X,))
    assert len(whole.sites) == 2
    apart = [site for site in whole.sites if len(site.branches) == 2 and site.output == "block/add"]
    with pytest.raises(RepfuseError, match="cannot be merged alone") as caught:
        fitted(model, replace(saved(whole), sites=tuple(apart)))
    assert "Leave this one out too" in caught.value.hint
    others = tuple(site for site in whole.sites if site not in apart)
    assert error(model, rewrite(model, fitted(model, replace(saved(whole), sites=others))), X) < 1e-12


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda site: site.update(kernel="5x5"), "Its kernel changed"),
        (lambda site: site.update(path="elsewhere"), "Its path changed"),
        (lambda site: site.update(branches=["skip"]), "Its branches changed"),
        (lambda site: site.update(form="swap", owner="x"), "Its owner and form changed"),
        (lambda site: site.update(nodes=["add"]), "edited by more than dropping sites"),
        (lambda site: site.update(source="nothing"), "edited by more than dropping sites"),
    ],
)
def test_a_site_can_be_dropped_and_nothing_else(net, edit, said):
    data = plan(net, (X,)).to_dict()
    edit(data["sites"][0])
    with pytest.raises(RepfuseError, match=r"stem\.0|elsewhere") as caught:
        fitted(net, Plan.from_dict(json.loads(json.dumps(data))))
    assert said in caught.value.why


@pytest.mark.parametrize("other", [RepVGG, lambda: nn.Sequential(nn.Linear(7, 7))])
def test_another_model_is_said_to_be_one(net, other):
    with pytest.raises(RepfuseError, match="does not fit this model") as caught:
        fitted(randomised(other()), saved(plan(net, (X,))))
    assert "another" in caught.value.why


def test_other_weights_and_another_dtype_are_the_same_model(net):
    made = saved(plan(net, (X,)))
    other = randomised(Net(), seed=3)
    assert fitted(other, made).sites == made.sites
    assert [site.key for site in fitted(other.half(), made).sites] == [site.key for site in made.sites]


def test_globs_narrow_a_plan_further(net):
    whole = plan(net, (X,))
    part = replace(whole, sites=tuple(site for site in whole.sites if site.path != "stem.0"))
    chosen = choose(net, (X,), Choice(plan=saved(part), exclude="chain"))
    excluded = {refusal.where: refusal.reason for refusal in chosen.refusals if refusal.code == "excluded"}
    assert len(excluded) == 2 and len(chosen.sites) == len(whole.sites) - 2
    assert excluded["stem.0"] == "the plan does not hold it" and "'chain'" in excluded[min(excluded)]
    with pytest.raises(RepfuseError, match="No site matches 'stem'"):
        choose(net, (X,), Choice(plan=part, include="stem"))


def test_a_plan_and_a_policy_contradict_each_other(samples):
    checkpoint = load(samples / "notebook_block.pt")
    made = plan(checkpoint.module, checkpoint.example_inputs)
    with pytest.raises(RepfuseError, match="contradict"):
        convert(checkpoint, Policy.COST, plan=made)
    assert convert(checkpoint, plan=made).plan == made


def test_a_fused_state_dict_with_some_sites_is_built_again(samples, tmp_path):
    checkpoint = load(samples / "repvgg_digits_state_dict.pth", model="repfuse.samples:DigitsRepVGG")
    done = convert(checkpoint, exclude=["blocks.[13]"])
    assert done.passed and len(done.plan.sites) == 3
    save(checkpoint, done.module, tmp_path / "out.pth", plan=done.plan)
    back = load(tmp_path / "out.pth").module
    assert error(done.module, back, *checkpoint.example_inputs) == 0
    assert operations(back, *checkpoint.example_inputs)["batch_norm"] == 6
