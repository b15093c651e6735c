"""The proof passes for a right rewrite and names what is wrong in any other."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from blocks import Branches, C, RepVGG, Spelled, SpelledOfTwo, conv, norm, space
from support.agreement import image, randomised
from support.proving import compare, prove_sites
from torch import nn

from repfuse.algebra import evaluation
from repfuse.algebra.expression import Identity
from repfuse.algebra.geometry import Geometry
from repfuse.checking.comparison import reference, tabulate
from repfuse.checking.inputs import Trial, input_variants
from repfuse.checking.places import _explained
from repfuse.checking.proof import prove
from repfuse.checking.runs import in_float64
from repfuse.ops import convolution
from repfuse.planning.planner import plan
from repfuse.plans import Policy
from repfuse.rewriting import rewrite

EXAMPLE = (image(1, C, 9, 8),)


def network(dtype=torch.float64):
    """A fold, a graph and a chain."""
    branches = [nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, (2, 3), padding="same"), nn.Identity()]
    pair = Spelled(lambda m, x: m.a(x) + m.b(x), a=conv(5), b=conv(3, groups=2))
    layers = [nn.Sequential(conv(3), norm()), nn.Tanh(), RepVGG(), Branches(*branches), nn.Tanh(), pair]
    return randomised(nn.Sequential(*layers), dtype=dtype)


def proof_of(original, fused, found):
    trials = input_variants([x.to(torch.float32) for x in EXAMPLE])
    return prove(original, found, fused, trials, reference(original, trials))


@pytest.fixture(scope="module")
def proven():
    original = network()
    found = plan(original, EXAMPLE)
    return original, found, rewrite(original, found)


def failing(original, fused, found):
    return [site.path for site in prove_sites(original, fused, found) if not site.passed]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_right_rewrite_is_proven(dtype):
    original = network(dtype)
    found = plan(original, [x.to(dtype) for x in EXAMPLE])
    proof = proof_of(original, rewrite(original, found), found)
    assert proof.passed and proof.error < 1e-12 and len(proof.sites) == 4
    assert proof.to_dict()["passed"] is True


def test_every_site_is_proven_on_inputs_of_one_pixel_and_more(proven):
    original, found, fused = proven
    for site in prove_sites(original, fused, found):
        sizes = {trial.shapes[0][2:] for trial in site.comparison.compared}
        assert (1, 1) in sizes and len(sizes) >= 4
        assert {trial.shapes[0][0] for trial in site.comparison.compared} == {1, 2}


@pytest.mark.parametrize(
    ("sites", "size", "make"),
    [
        (1, (9, 8), lambda: nn.Sequential(nn.Conv2d(C, C, 7, padding=3, padding_mode="reflect"), norm())),
        (1, (9, 8), lambda: nn.Sequential(nn.Conv2d(C, C, 7, padding=3, padding_mode="circular"), norm())),
        (1, (5, 4, 6), lambda: Branches(nn.Conv3d(C, C, 3, padding=1), nn.AvgPool3d(3, 1, 1))),
    ],
)
def test_a_site_that_takes_no_tiny_inputs_is_proven_on_larger_ones(sites, size, make):
    original, example = randomised(make()), (image(1, C, *size),)
    found = plan(original, example)
    proofs = list(prove_sites(original, rewrite(original, found), found))
    assert len(proofs) == sites and all(proof.passed for proof in proofs)


def test_one_input_that_is_refused_leaves_the_others():
    """Reflection by three pixels needs four: of the small inputs the larger run, and they are those that count."""
    original = randomised(nn.Sequential(nn.Conv2d(C, C, 7, padding=3, padding_mode="reflect"), norm()))
    found = plan(original, EXAMPLE)
    (proof,) = prove_sites(original, rewrite(original, found), found)
    assert proof.comparison.skipped and proof.comparison.compared
    assert EXAMPLE[0].shape not in {trial.shapes[0] for trial in proof.comparison.trials}


def of_sum_zero(conv, x):
    return nn.functional.conv2d(x, conv.weight - conv.weight.mean((1, 2, 3), keepdim=True))


@pytest.mark.parametrize("kernel", [1, 3])
def test_kernels_whose_weights_sum_to_zero_are_proven(kernel):
    branches = {name: nn.Conv2d(C, C, kernel) for name in "abc"}
    summed = Spelled(lambda m, x: sum(of_sum_zero(branch, x) for branch in (m.a, m.b, m.c)), **branches)
    original = randomised(summed)
    found = plan(original, EXAMPLE)
    (proof,) = prove_sites(original, rewrite(original, found), found)
    assert proof.passed


def names(found):
    return [site.path for site in found.sites]


@pytest.mark.parametrize("site", range(4))
@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_one_wrong_number_fails_its_site(proven, site, tensor):
    original, found, fused = proven
    wrong = copy.deepcopy(fused)
    module = wrong.get_submodule(names(found)[site])
    weights = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    getattr(weights, tensor).data.flatten()[-1].mul_(1 + 1e-6)
    assert failing(original, wrong, found) == [names(found)[site]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: setattr(m, "padding", (0, 0)) or setattr(m, "kernel_size", (1, 1)),
        lambda m: setattr(m, "stride", (2, 2)),
        lambda m: setattr(m, "dilation", (2, 2)) or setattr(m, "padding", (2, 2)),
        lambda m: setattr(m, "padding_mode", "reflect") or setattr(m, "_reversed_padding_repeated_twice", [1] * 4),
    ],
)
def test_another_structure_fails(proven, damage):
    original, found, fused = proven
    wrong = copy.deepcopy(fused)
    damage(wrong[0][0])
    assert failing(original, wrong, found) == ["0.0"]
    assert proof_of(original, wrong, found).unproven == ("0.0",)


def test_a_module_too_many_fails():
    original = network(torch.float32)
    found = plan(original, [x.float() for x in EXAMPLE])
    wrong = rewrite(original, found)
    wrong[1] = nn.ReLU()
    proof = proof_of(original, wrong, found)
    assert not proof.passed and proof.unproven == ("1",) and "1" in proof.reason


def test_one_bit_of_what_is_written_fails():
    original = network(torch.float32)
    found = plan(original, [x.float() for x in EXAMPLE])
    wrong = rewrite(original, found)
    bits = wrong[0][0].weight.data.view(torch.int32)
    bits[0, 0, 0, 0] ^= 1
    proof = proof_of(original, wrong, found)
    assert not proof.passed and proof.first.path == "0.0" and "0.0.weight: 1 of" in proof.reason
    (weight, bias) = proof.first.weights
    assert (weight.wrong, bias.wrong) == (1, 0) and 0.5 <= weight.spacings <= 1.5


def test_a_plan_that_lost_a_site_proves_no_other_network(proven):
    original, found, _ = proven
    less = rewrite(original, replace(found, sites=found.sites[1:], live=None))
    assert not proof_of(original, less, found).passed


def wrong_scale(by, tensors):
    scale, shift = RIGHT_SCALE(by, tensors)
    return None if scale is None else scale * (1 + 1e-5), shift


def no_shift(by, tensors):
    return RIGHT_SCALE(by, tensors)[0], None


def wrong_union(self, other):
    made = RIGHT_ADD(self, other)
    if made.padding == ((1, 1), (1, 1)) and made.kernel == (3, 3) and made.groups == 1:
        return Geometry(C, C, (3, 3), made.stride, ((1, 1), (1, 1)), made.dilation, 1, "replicate")
    return made


@pytest.mark.parametrize("width", [6, 10])
def test_a_place_that_takes_some_sizes_alone_is_proven_at_these(width):
    """Its views hold the width that the linear layer before them fixes as numbers, which other sizes fit by chance."""
    model = Spelled(lambda m, x: m.a(space.viewed(m.l(x).sin())), l=nn.Linear(width, width), a=conv(3, inputs=4 * C))
    model = randomised(model)
    found = plan(model, (image(2, C, 4, width),))
    (proof,) = prove_sites(model, rewrite(model, found), found)
    assert proof.passed and sum(not trial.skipped for trial in proof.comparison.trials) > 3


RIGHT_SCALE, RIGHT_ADD = evaluation.scale_and_shift, Geometry.add
WRONG = {
    "scale": (evaluation, "scale_and_shift", wrong_scale),
    "border": (Geometry, "add", wrong_union),
    "skip": (Identity, "geometry", property(lambda self: Geometry(C, C, (1, 1), (1, 1), ((0, 0),) * 2, (1, 1), 2))),
    "bias": (evaluation, "scale_and_shift", no_shift),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_the_algebra_is_caught(mistake, monkeypatch):
    original = network()
    monkeypatch.setattr(*WRONG[mistake])
    try:
        found = plan(original, EXAMPLE)
        fused = rewrite(original, found)
    except (RuntimeError, AssertionError):
        return
    assert failing(original, fused, found)
    assert not proof_of(original, fused, found).passed


def test_a_mistake_in_padding_same_is_caught(monkeypatch):
    right = convolution._padding
    monkeypatch.setattr(
        convolution,
        "_padding",
        lambda *given: tuple((b, a) for a, b in right(*given)) if given[0] == "same" else right(*given),
    )
    original = network()
    found = plan(original, EXAMPLE)
    assert failing(original, rewrite(original, found), found)


def test_sites_of_several_sources_are_proven():
    model = SpelledOfTwo(
        lambda m, x, y: (m.a(x) + m.c(y)) + (m.b(x) + m.d(y)), a=conv(), b=conv(1), c=conv(), d=conv(1)
    )
    original, inputs = randomised(model), (EXAMPLE[0], image(1, C, 9, 8, seed=1))
    found = plan(original, inputs)
    fused = rewrite(original, found)
    assert failing(original, fused, found) == []
    fused.get_submodule(found.sites[1].path).weight.data[0, 0, 1, 1] += 1e-6
    assert failing(original, fused, found) == [found.sites[0].path]


@pytest.mark.parametrize("copied", [torch.clone, nn.AvgPool2d(1), lambda y: y + 0])
def test_a_source_that_is_written_into_once_it_was_copied_is_proven(copied):
    def forward(m, x):
        y = m.a(x)
        before, convolved = copied(y), m.b(y)
        doubled = y.mul_(2)
        return convolved + before + doubled

    model, x = randomised(Spelled(forward, a=conv(3), b=conv(3))), image(2, C, 7, 6)
    found = plan(model, [x], Policy.ALWAYS)
    (site,) = (each for each in found.sites if "b/conv2d" in each.nodes)
    assert site.branches == ("conv 3x3", "skip", "2 * skip")
    fused = rewrite(model, found)
    assert torch.allclose(fused(x), model(x), rtol=1e-12)
    assert all(each.passed for each in prove_sites(model, fused, found))


def test_an_input_too_small_for_any_output_proves_nothing_and_fails_nothing():
    """At 4x4 the crops leave empty maps; the convolution of a cropped input does not run at all."""

    def forward(m, x):
        return m.a(x)[:, :, 1:-1, 1:-1] + m.b(x)[:, :, 2:-2, 2:-2]

    original = randomised(Spelled(forward, a=conv(3, padding=0), b=conv(1)))
    found = plan(original, EXAMPLE, Policy.ALWAYS)
    fused = rewrite(original, found)
    assert len(found.sites) == 1
    tiny = torch.ones(1, C, 4, 4).double()
    assert original(tiny).numel() == 0
    trials = [Trial("fitting", EXAMPLE), Trial("too small", (tiny,))]
    comparison = compare(original, fused, trials, 1e-12)
    assert comparison.passed and len(comparison.compared) == 1


class Amplifying(nn.Module):
    """Hands an error of the block on many times larger, as deep networks do at some inputs."""

    def __init__(self):
        super().__init__()
        self.block = RepVGG()

    def forward(self, x):
        return torch.sin(self.block(x) * 1e5)


def test_a_network_that_amplifies_rounding_is_proven_and_a_wrong_one_is_not():
    model, x = randomised(Amplifying()), image(2, 4, 6, 7)
    found = plan(model, (x,))
    fused, trials = rewrite(model, found), input_variants((x,))
    proof = prove(model, found, fused, trials, reference(model, trials))
    assert proof.passed and 1e-12 < proof.network.error < proof.network.tolerance
    wrong_fused = rewrite(model, found)
    with torch.no_grad():
        wrong_fused.block.fused.weight *= 1 + 1e-9
    wrong = reference(wrong_fused, trials)
    table = tabulate(trials, reference(model, trials), wrong)
    assert _explained(fused, in_float64, trials, wrong, table) == 1e-12


OF_ITS_KIND = {
    "by another": lambda m, x: m.g.type_as(x),
    "on its device": lambda m, x: m.g.to(x.device),
    "of its dtype": lambda m, x: m.g.to(x.device, x.dtype),
    "made anew": lambda m, x: m.g * x.new_full((1,), 0.5),
}


@pytest.mark.parametrize("name", OF_ITS_KIND)
def test_a_site_is_proven_by_itself_where_a_constant_is_of_the_kind_of_what_is_no_source_of_it(name):
    def forward(m, x):
        return m.n(m.b(torch.relu(m.a(x))) * OF_ITS_KIND[name](m, x))

    network = Spelled(forward, a=conv(3), b=conv(3), n=norm(), g=nn.Parameter(torch.empty(C, 1, 1)))
    network = randomised(network, dtype=torch.float32)
    made = plan(network, (image(2, C, 6, 7, dtype=torch.float32),))
    (site,) = prove_sites(network, rewrite(network, made), made)
    assert site.passed and site.error < 1e-12 and site.drift.passed
