"""Weights that look wrong are reported, and neither fail a right rewrite nor let a wrong one pass."""

from __future__ import annotations

import json
import math
from dataclasses import astuple

import pytest
import torch
from blocks import conv, norm
from support.agreement import randomised
from support.proving import prove_sites
from support.small_nets import SITES, Net, X
from test_report_views import report, squeezed_words, text
from torch import nn

from repfuse import fuse, verify
from repfuse.health import examine

NAN, INF = math.nan, math.inf
EXAMPLE = (X.float(),)
AILING = {  # where, index, value -> what is found
    "nan weight": ("block.a.0.weight", (1, 0, 0, 0), NAN, ("nan", 1, 144)),
    "nan channel": ("block.a.0.weight", 1, NAN, ("nan", 36, 144)),
    "nan bias": ("block.b.1.bias", 2, NAN, ("nan", 1, 4)),
    "nan mean": ("tail.1.running_mean", 0, NAN, ("nan", 1, 4)),
    "infinite weight": ("block.a.0.weight", (0, 0, 1, 1), INF, ("infinite", 1, 144)),
    "negative infinity": ("tail.0.weight", (0, 0, 0, 0), -INF, ("infinite", 1, 16)),
    "negative variance": ("block.a.1.running_var", 1, -1.0, ("negative-variance", 1, 4)),
    "small variance": ("stem.1.running_var", slice(0, 2), 1e-30, ("small-variance", 2, 4)),
    "no variance": ("stem.1.running_var", 3, 0.0, ("small-variance", 1, 4)),
    "zero convolution": ("block.b.0.weight", ..., 0.0, ("all-zero", 16, 16)),
    "zero normalisation": ("block.b.1.weight", ..., 0.0, ("all-zero", 4, 4)),
}


def spoilt(name):
    where, index, value, _ = AILING[name]
    model = randomised(Net(), dtype=torch.float32)
    owner, _, leaf = where.rpartition(".")
    with torch.no_grad():
        getattr(model.get_submodule(owner), leaf)[index] = value
    return model


def found(network):
    """What looks wrong: name, what, how many numbers of how many."""
    return [astuple(each) for each in examine(network)]


def test_healthy_weights_are_not_mentioned():
    assert found(randomised(Net())) == []
    assert found(nn.Sequential(conv(), norm(), nn.Linear(2, 2), nn.BatchNorm2d(4, affine=False))) == []


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_weights_are_looked_at_too(layout):
    network = nn.Module()
    network.register_buffer("graph", torch.eye(3).to_sparse(layout=layout))
    assert found(network) == []
    network.graph.values()[1] = NAN
    assert found(network) == [("graph", "nan", 1, 9)]


@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_numbers_of_every_kind_are_looked_at(dtype):
    network = nn.Module()
    network.register_buffer("scales", torch.tensor([-1.0, 0.0, 2.0]).to(dtype))
    network.register_buffer("none", torch.zeros(0).to(dtype))
    assert found(network) == []
    network.scales[1], network.scales[2] = INF, NAN
    assert found(network) == [("scales", "nan", 1, 3), ("scales", "infinite", 1, 3)]


@pytest.mark.parametrize("name", AILING)
def test_what_is_wrong_is_found_and_named(name):
    where, _, _, wrong = AILING[name]
    assert found(spoilt(name)) == [(where, *wrong)]


def test_a_shared_tensor_is_named_once_and_integers_are_fine():
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = NAN
    other = nn.Linear(2, 2)
    other.weight = layer.weight
    model = nn.Sequential(layer, other, nn.Embedding(3, 2))
    model.register_buffer("index", torch.zeros(3, dtype=torch.int64))
    assert [name for name, *_ in found(model)] == ["0.weight"]


@pytest.mark.parametrize("name", AILING)
def test_a_right_rewrite_of_ailing_weights_passes_site_by_site(name):
    """What is not a number in the original is none in the fused network, in the same places."""
    model = spoilt(name).double()
    result = fuse(model, (X,))
    assert {site.path for site in result.plan.sites} == SITES
    for site in prove_sites(model, result.module, result.plan):
        assert site.passed, (site.path, site.comparison.reason)


@pytest.mark.parametrize("name", AILING)
def test_a_right_rewrite_of_ailing_weights_is_not_called_different(name):
    """A kernel of float32 may multiply a corner that is no number by what pads, where the original's does not."""
    model = spoilt(name)
    result = fuse(model, EXAMPLE)
    found = verify(model, result.module, EXAMPLE, plan=result.plan)
    assert found.verdict != "different" and found.proof.passed, found.reason


@pytest.mark.parametrize("name", AILING)
def test_a_wrong_rewrite_of_ailing_weights_does_not_pass(name):
    """Each site is compared alone, on finite inputs: NaN in one channel hides no mistake in another."""
    model = spoilt(name)
    result = fuse(model, EXAMPLE)
    with torch.no_grad():
        result.module.block.fused.weight[3] += 0.25
    found = verify(model, result.module, EXAMPLE, plan=result.plan)
    assert found.verdict == "different" and not found.proof.passed
    assert found.reason.startswith("block.fused.weight: 36 of the stored numbers are not those that were computed")


def test_every_kind_is_shown_with_its_places():
    kinds = {what for *_, (what, _, _) in AILING.values()}
    health = [
        {"name": f"layer{number}.weight", "what": kind, "count": 1, "of": 4} for kind in kinds for number in range(6)
    ]
    shown = squeezed_words(text(report(health=health)))
    assert len(kinds) == 5 and all(kind in shown for kind in kinds)
    assert shown.count("layer3.weight (1 of 4) and 2 more") == 5
    assert "Weights that look wrong" in shown and "Weights that look wrong" not in text(report())


@pytest.mark.slow
def test_the_command_line_says_it_in_words_and_in_json(cli, tmp_path):
    model = nn.Sequential(conv(), norm(), nn.ReLU(), conv(1)).eval()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = NAN
        model[1].running_var[1] = 0
        model[3].weight.zero_()
    torch.save(model, tmp_path / "in.pt")
    shown = cli("inspect", tmp_path / "in.pt", "--input", "1x4x8x8")
    assert shown.returncode == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert "Weights that look wrong" in words and "0.weight (1 of 144)" in words and "3.weight (16 of 16)" in words
    said = json.loads(cli("inspect", tmp_path / "in.pt", "--input", "1x4x8x8", "--json").stdout)
    assert [(entry["name"], entry["what"]) for entry in said["health"]] == [
        ("0.weight", "nan"),
        ("1.running_var", "small-variance"),
        ("3.weight", "all-zero"),
    ]
