"""The second opinion agrees with every right rewrite of the zoo, and no wrong one passes it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from blocks import CASES, C, Spelled, SpelledOfTwo, conv, norm
from support.agreement import image, randomised
from torch import nn

import repfuse
from repfuse.algebra import evaluation
from repfuse.planning.cost import Policy
from repfuse.planning.planner import plan
from repfuse.probing import comparing
from repfuse.proof.exact import convolution_at
from repfuse.proof.second_opinion import second_opinion
from repfuse.report.probe_view import of_probe, probe_notes
from repfuse.rewriting import rewrite

EXAMPLE = (image(1, C, 9, 8),)


def rewritten(model, example=EXAMPLE, policy=Policy.COST):
    found = plan(model, example, policy)
    return model, found, rewrite(model, found)


def of(row, dtype=torch.float64):
    torch.manual_seed(0)
    return rewritten(randomised(row.make(), dtype=dtype), [x.to(dtype) for x in row.at(row.side)], row.policy)


def rows(step):
    """Every block, of which one in ``step`` is checked in each run."""
    marks = [() if number % step == 0 else pytest.mark.slow for number in range(len(CASES))]
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=row.name, marks=mark) for row, mark in zip(CASES, marks, strict=True)]
    )


def one_weight(layer):
    largest = layer.weight.abs() == layer.weight.abs().max()
    layer.weight.data[largest] *= 1 + 1e-6


def shifted(layer):
    assert layer.weight.dim() > 2
    layer.weight.data = layer.weight.data.roll(1, -1)


def swapped(layer):
    layer.weight.data = layer.weight.data.flip(1 if layer.weight.shape[1] > 1 else 0)


def no_bias(layer):
    layer.bias.data.zero_()


def other_border(layer):
    assert any(layer.padding) and layer.padding_mode == "zeros"
    layer.padding_mode = "replicate"


def more_padding(layer):
    layer.padding = tuple(p + 1 for p in layer.padding)


def dilated(layer):
    """As large an output, from taps further apart."""
    assert max(layer.kernel_size) > 1
    layer.dilation = tuple(d + 1 for d in layer.dilation)
    layer.padding = tuple(p + (k - 1) // 2 for p, k in zip(layer.padding, layer.kernel_size, strict=True))


def outputs_exchanged(layer):
    layer.weight.data = layer.weight.data.roll(1, 0)
    layer.bias.data = layer.bias.data.roll(1, 0)


DAMAGES = (one_weight, shifted, swapped, no_bias, other_border, more_padding, dilated, outputs_exchanged)


def damaged(fused, path, damage):
    """Return a copy with the damage, or None where it does not apply or changes nothing."""
    wrong = copy.deepcopy(fused)
    layer = convolution_at(wrong, path)
    before = copy.deepcopy(layer)
    try:
        damage(layer)
    except (AssertionError, AttributeError, TypeError):
        return None
    settings = layer.extra_repr() != before.extra_repr()
    same = torch.equal(layer.weight, before.weight) and torch.equal(layer.bias, before.bias)
    return wrong if settings or not same else None


@rows(16)
def test_every_site_of_the_zoo_is_confirmed(row):
    original, found, fused = of(row)
    opinion = second_opinion(original, found, fused)
    assert opinion.passed, opinion.reason
    assert opinion.error < 2e-14
    assert {site.path for site in opinion.sites} <= {site.path for site in found.sites}
    assert all(site.exhaustive for site in opinion.sites)


@rows(30)
def test_in_float32_too(row):
    original, found, fused = of(row, torch.float32)
    opinion = second_opinion(original, found, fused)
    assert opinion.passed, opinion.reason


@rows(40)
def test_no_damage_passes_at_any_site(row):
    original, found, fused = of(row)
    applied = 0
    for site in found.sites:
        for damage in DAMAGES:
            wrong = damaged(fused, site.path, damage)
            if wrong is not None:
                applied += 1
                assert not second_opinion(original, found, wrong).passed, (site.path, damage.__name__)
    assert applied >= 2 * len(found.sites)


def network(dtype=torch.float64):
    branches = Spelled(lambda m, x: m.a(x) + m.b(x) + x, a=conv(3), b=nn.Sequential(conv(1), norm()))
    return randomised(nn.Sequential(branches, nn.ReLU(), conv(3, stride=2, groups=2), norm()), dtype=dtype)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_damaged_site_is_named(damage):
    original, found, fused = rewritten(network())
    for site in found.sites:
        wrong = damaged(fused, site.path, damage)
        assert wrong is not None
        opinion = second_opinion(original, found, wrong)
        assert [one.path for one in opinion.sites if not one.passed] == [site.path]
        assert site.path in opinion.reason
        assert json.loads(json.dumps(opinion.to_dict()))["passed"] is False


def test_one_bit_of_a_stored_weight_is_seen():
    original, found, fused = rewritten(network(torch.float32), (EXAMPLE[0].float(),))
    fused.get_submodule(found.sites[0].path).weight.data.view(torch.int32)[0, 0, 0, 0] ^= 1
    opinion = second_opinion(original, found, fused)
    assert not opinion.passed and "units in the last place" in opinion.reason


def test_where_the_budget_is_small_a_wrong_weight_shows_in_a_mixture(monkeypatch):
    monkeypatch.setattr(comparing, "BUDGET", 5000)
    wide = randomised(Spelled(lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(64, 8, 3, padding=1), b=nn.Conv2d(64, 8, 1)))
    original, found, fused = rewritten(wide, (image(1, 64, 6, 5),))
    (site,) = second_opinion(original, found, fused).sites
    assert site.passed and not site.exhaustive and "4 of 64 channels" in site.method
    for channel in range(0, 64, 7):
        wrong = copy.deepcopy(fused)
        wrong.get_submodule(site.path).weight.data[3, channel, 1, 2] *= 1 + 1e-6
        assert not second_opinion(original, found, wrong).passed


def test_each_of_several_sources_is_probed_alone():
    def forward(m, x, y):
        return (m.a(x) + m.c(y)) + (m.b(x) + m.d(y))

    model = randomised(SpelledOfTwo(forward, a=conv(), b=conv(1), c=conv(), d=conv(1)))
    original, found, fused = rewritten(model, (EXAMPLE[0], image(1, C, 9, 8, seed=1)))
    assert second_opinion(original, found, fused).passed
    for site in found.sites:
        wrong = copy.deepcopy(fused)
        wrong.get_submodule(site.path).bias.data[0] += 1e-6
        assert not second_opinion(original, found, wrong).passed


def two_linears():
    return Spelled(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(C, 5), b=nn.Linear(C, 5))


LAYOUTS = {
    "a vector": (two_linears, (C,)),
    "vectors": (two_linears, (2, C)),
    "vectors in rows": (two_linears, (2, 3, 7, C)),
    "written into its input": (
        lambda: nn.Sequential(nn.ReLU(), Spelled(lambda m, x: x.add_(m.a(x)), a=conv(3)), nn.ReLU()),
        (1, C, 5, 6),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(C, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm2d(6)),
        (1, C, 5, 6),
    ),
    "padded aside": (
        lambda: Spelled(
            lambda m, x: m.a(x) + m.b(x), a=nn.Sequential(nn.ZeroPad2d((2, 0, 0, 2)), conv(3, padding=0)), b=conv(1)
        ),
        (1, C, 6, 5),
    ),
    **{
        mode: (lambda mode=mode: nn.Sequential(conv(5, padding_mode=mode), norm()), (1, C, 9, 8))
        for mode in ("reflect", "replicate", "circular")
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_whatever_the_layout_of_a_place_a_wrong_number_is_seen(name):
    make, shape = LAYOUTS[name]
    original, found, fused = rewritten(randomised(make()), (image(*shape),))
    (site,) = second_opinion(original, found, fused).sites
    assert site.passed, site.reason
    for tensor in ("weight", "bias"):
        for index in (0, -1):
            wrong = copy.deepcopy(fused)
            getattr(convolution_at(wrong, site.path), tensor).data.flatten()[index] += 1e-6
            assert not second_opinion(original, found, wrong).passed


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1e-6


def test_a_place_that_cannot_be_read_does_not_pass():
    original, found, fused = rewritten(network())
    path = found.sites[0].path
    convolution_at(fused, path).__class__ = Own
    (site,) = [site for site in second_opinion(original, found, fused).sites if site.path == path]
    assert not site.passed and site.error is None
    assert "could not be probed" in site.reason and "Own" in site.reason


def wrong_scale(by, tensors):
    scale, shift = RIGHT(by, tensors)
    return None if scale is None else scale * (1 + 1e-5), shift


RIGHT = evaluation.scale_and_shift


def test_a_mistake_in_the_algebra_fails_the_conversion(monkeypatch, samples):
    monkeypatch.setattr(evaluation, "scale_and_shift", wrong_scale)
    conversion = repfuse.convert(repfuse.load(samples / "repvgg_digits.pt"), probe=True)
    assert not conversion.passed and not conversion.probe.passed


def test_a_probe_that_fails_alone_fails_the_conversion(monkeypatch, samples):
    monkeypatch.setattr(comparing, "disagreement", lambda *_: 1e-9)
    conversion = repfuse.convert(repfuse.load(samples / "notebook_block.pt"), probe=True)
    assert conversion.proof.passed and not conversion.probe.passed and not conversion.passed
    assert repfuse.convert(repfuse.load(samples / "notebook_block.pt")).passed


def test_what_failed_is_a_line_of_the_table_and_a_sentence():
    original, found, fused = rewritten(network())
    one_weight(convolution_at(fused, found.sites[0].path))
    opinion = second_opinion(original, found, fused)
    (line,) = of_probe(opinion)
    assert not line.passed and line.worst == found.sites[0].path and "2 sites" in line.what
    (note,) = probe_notes(opinion)
    assert found.sites[0].path in note and "not that of the original" in note


def test_the_command_says_it_and_the_report_holds_it(cli, samples, tmp_path):
    done = cli("convert", samples / "repvgg_digits.pt", tmp_path / "out.pt", "--probe", columns=200)
    assert done.returncode == 0, done.stderr
    assert "5 sites by impulses, each channel alone" in done.stdout
    probe = json.loads((tmp_path / "out.report.json").read_text())["probe"]
    assert probe["passed"] is True and probe["error"] < 1e-12 and len(probe["sites"]) == 5
