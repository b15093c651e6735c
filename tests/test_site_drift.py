"""The drift of a site lies within the a-priori bound of the arithmetic, and what does not is no rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import Branches, C, Spelled, conv
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import image, randomised
from support.proving import prove_sites
from torch import nn

from repfuse.checking import proof as proving
from repfuse.planning.planner import plan
from repfuse.plans import Policy
from repfuse.rewriting import rewrite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def proofs(network, example, damage=lambda fused: None):
    found = plan(network, example, Policy.ALWAYS)
    fused = rewrite(network, found)
    damage(fused)
    return list(prove_sites(network, fused, found))


def branches(channels, kernels, groups, dilation, bias, norm):
    def branch(kernel):
        settings = {"groups": groups, "bias": bias, "dilation": dilation if kernel > 1 else 1}
        made = nn.Conv2d(channels, channels, kernel, padding=kernel // 2 * settings["dilation"], **settings)
        return nn.Sequential(made, nn.BatchNorm2d(channels)) if norm else made

    return Branches(*map(branch, kernels), nn.Identity())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)
@given(
    channels=st.sampled_from([4, 32]),
    kernels=st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=3),
    groups=st.sampled_from([1, 2, 4]),
    dilation=st.integers(1, 3),
    bias=st.booleans(),
    norm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_drift_is_within_its_bound(dtype, channels, kernels, groups, dilation, bias, norm, seed):
    network = randomised(branches(channels, kernels, groups, dilation, bias, norm), seed, dtype)
    for proof in proofs(network, (image(1, channels, 9, 8, dtype=dtype),)):
        assert proof.passed, proof.reason
        drift = proof.drift
        assert drift.dtype == str(dtype).removeprefix("torch.")
        assert drift.fused.max <= drift.bound.max and drift.fused.rms <= drift.bound.rms
        assert 0 <= drift.of_bound <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_transposed_convolutions_sum_in_half(dtype, seed):
    up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, groups=2)
    network = randomised(nn.Sequential(up, nn.BatchNorm2d(4)), seed, dtype)
    (proof,) = proofs(network, (image(1, 8, 5, 6, dtype=dtype),))
    assert proof.passed and 0 < proof.drift.of_bound <= 1


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("seed", range(6))
def test_adaptive_windows_over_three_axes_sum_in_half(dtype, seed):
    layers = nn.Conv3d(4, 4, 3, groups=4), nn.AdaptiveAvgPool3d(2), nn.BatchNorm3d(4)
    network = randomised(nn.Sequential(*layers), seed, dtype)
    (proof,) = proofs(network, (image(1, 4, 24, 20, 20, dtype=dtype),))
    assert proof.passed, proof.reason


def test_where_a_sum_can_lose_everything_the_bound_says_nothing():
    up = nn.ConvTranspose2d(128, 2, 3)
    network = randomised(nn.Sequential(up, nn.BatchNorm2d(2)), dtype=torch.bfloat16)
    (proof,) = proofs(network, (image(1, 128, 5, 6, dtype=torch.bfloat16),))
    assert proof.passed and proof.drift.bound.max > 1e30


def test_the_bound_is_that_of_the_arithmetic():
    """One product: two roundings of the factors' product and of the weight, each of half a spacing."""
    network = randomised(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), dtype=torch.float32)
    (proof,) = proofs(network, (image(1, 1, 3, 3, dtype=torch.float32),))
    unit = torch.finfo(torch.float32).eps / 2
    assert unit < proof.drift.bound.max < 50 * unit


@pytest.mark.parametrize(("dtype", "coarse"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float8_e4m3fn)])
def test_weights_that_were_rounded_twice_are_no_rounding(dtype, coarse):
    network = randomised(Branches(conv(), conv(1), nn.Identity()), dtype=dtype)

    def damage(fused):
        for parameter in fused.parameters():
            parameter.data = parameter.data.to(coarse).to(dtype)

    (proof,) = proofs(network, (image(1, C, 9, 8, dtype=dtype),), damage)
    assert proof.comparison.passed and not proof.passed
    assert not any(weight.passed for weight in proof.weights) and proof.weights[0].spacings > 100
    assert proof.drift.of_bound > 1 and "of the stored numbers" in proof.reason


def test_arithmetic_that_loses_more_than_it_may_fails(monkeypatch):
    right = proving.run

    def lossy(*given):
        outcomes = right(*given)
        for outcome in outcomes:
            outcome.outputs["out"].mul_(1 + 1e-3)
        return outcomes

    monkeypatch.setattr(proving, "run", lossy)
    (proof,) = proofs(
        randomised(Branches(conv(), conv(1)), dtype=torch.float32), (image(1, C, 9, 8, dtype=torch.float32),)
    )
    assert not proof.passed and proof.drift.of_bound > 1
    assert "times what the arithmetic can explain" in proof.reason


def test_several_sources_and_factors_are_within_their_bound():
    model = Spelled(lambda m, x: m.a(x) + m.b(x) - 3 * x.relu() + m.c(x.relu()), a=conv(), b=conv(1), c=conv())
    for proof in proofs(randomised(model, dtype=torch.float32), (image(1, C, 9, 8, dtype=torch.float32),)):
        assert proof.passed and proof.drift.of_bound <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_cancels_but_for_the_last_digit_of_float64_is_no_drift(dtype):
    """0.1 b + 0.2 b - 0.3 b is 5e-17 b in float64, and not in all orders the same."""

    def forward(m, x):
        y = m.b(x)
        return torch.cat([m.a(x), y * 0.1 + y * 0.2 - y * 0.3, y * 0.7 - y * 0.1 - y * 0.6], 1)

    model = randomised(Spelled(forward, a=conv(), b=conv(1)), dtype=dtype)
    (proof,) = proofs(model, (image(1, C, 9, 8, dtype=dtype),))
    assert proof.passed and proof.drift.of_bound <= 1


def test_it_is_measured_on_the_largest_input():
    layers = nn.Linear(4, 5), nn.Linear(5, 6)
    (proof,) = proofs(randomised(nn.Sequential(*layers), dtype=torch.float32), (torch.ones(2, 4),))
    assert proof.drift.trial == "input 3x4"  # of 1, 2, 3 and 1 rows


def test_where_the_largest_input_overflows_it_is_measured_on_the_next():
    network = randomised(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), 2, torch.float16)
    network[1].weight.data.mul_(3e4 / network[1].weight.abs().max())
    (proof,) = proofs(network, (image(1, 2, 5, 5, dtype=torch.float16),))
    assert proof.passed and proof.drift.trial == "input 1x2x2x3"


def test_in_float64_there_is_no_other_drift_than_the_proof():
    network = randomised(Branches(conv(), conv(1)))
    (proof,) = proofs(copy.deepcopy(network), (image(1, C, 9, 8),))
    assert proof.passed and proof.drift is None
