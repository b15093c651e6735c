"""Merges that hold for some weights only: a layer that pads with what the layer before it is beyond its border."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from blocks import Spelled, conv
from support.agreement import error, image, randomised
from torch import nn
from torch.nn import functional as F

from repfuse.errors import RepfuseError
from repfuse.fusing import fuse
from repfuse.loading import load
from repfuse.plans import Plan
from repfuse.rewriting import rewrite
from repfuse.saving import save

X = image(2, 4, 6, 7)


def biased(constant: float) -> nn.Module:
    """A 1x1 with this bias before a 3x3 that pads with zeros."""
    model = randomised(nn.Sequential(conv(1), conv(3)))
    nn.init.constant_(model[0].bias, constant)
    return model


def filled(by_bias: bool) -> nn.Module:
    """A 1x1, padded with its bias or with another constant, before a 3x3 that does not pad."""

    def forward(m, x):
        y = F.pad(m.a(x), (1, 1, 1, 1))
        value = (m.a.bias if by_bias else m.other).view(1, -1, 1, 1)
        y[:, :, :1, :] = value
        y[:, :, -1:, :] = value
        y[:, :, :, :1] = value
        y[:, :, :, -1:] = value
        return m.b(y)

    return randomised(Spelled(forward, a=conv(1), b=conv(3, padding=0), other=nn.Parameter(torch.empty(4))))


@pytest.mark.parametrize(
    ("model", "merged"), [(biased(0.0), 1), (biased(1e-9), 0), (filled(True), 1), (filled(False), 0)]
)
def test_a_merge_that_depends_on_the_weights(model, merged):
    result = fuse(model, (X,))
    assert len(result.plan.sites) == merged
    assert error(model, result.module, X) < 1e-12
    codes = {refusal.code for refusal in result.plan.refusals}
    assert codes == (set() if merged else {"shift-before-padding"})


def test_a_tiny_shift_merged_all_the_same_would_be_seen():
    """The refusal is no caution: the border is off by the bias."""
    model, shifted = biased(0.0), biased(1.0)
    fused = fuse(model, (X,)).module
    (weight,) = (part.weight for part in fused.modules() if isinstance(part, nn.Conv2d))
    naive = F.conv2d(X, weight, shifted(X)[0, :, 3, 3] - F.conv2d(X, weight, padding=1)[0, :, 3, 3], padding=1)
    difference = (naive - shifted(X)).abs()
    assert difference[..., 1:-1, 1:-1].max() < 1e-12 < 1e-1 < difference.max()


def test_a_plan_remembers_the_borders_it_relies_on():
    model = biased(0.0)
    plan = Plan.from_dict(json.loads(fuse(model, (X,)).plan.to_json()))
    assert plan.matching_borders
    assert error(model, rewrite(model, plan), X) < 1e-12


def test_a_plan_is_refused_for_weights_that_break_it():
    plan = fuse(biased(0.0), (X,)).plan
    for each in (plan, Plan.from_dict(plan.to_dict())):
        with pytest.raises(RepfuseError, match="does not fit the weights"):
            rewrite(biased(1.0), each)


def test_no_plan_merges_what_another_models_weights_would_allow():
    plan = Plan.from_dict(fuse(biased(1.0), (X,)).plan.to_dict())
    assert rewrite(biased(0.0), plan)[0].weight.shape == (4, 4, 1, 1)


NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))
"""


def test_a_state_dict_is_built_again_from_a_network_with_other_weights(tmp_path: Path):
    (tmp_path / "net.py").write_text(NETWORK)
    torch.save(biased(0.0).float().state_dict(), tmp_path / "in.pth")
    checkpoint = load(tmp_path / "in.pth", model=f"{tmp_path / 'net.py'}:build", input="1x4x6x7")
    result = fuse(checkpoint.module, checkpoint.example_inputs)
    assert len(result.plan.sites) == 1
    saved = save(checkpoint, result.module, tmp_path / "out.safetensors", plan=result.plan)
    again = load(saved.path, trust=True)
    x = X.float()
    assert torch.equal(again.module(x), result.module(x))
