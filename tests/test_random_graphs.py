"""No random affine network is ever fused wrongly, and none is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st
from support.agreement import image, outputs, peak, randomised
from support.programs import PROGRAMS, Program, Step

from repfuse.fusing import fuse
from repfuse.plans import Plan
from repfuse.rewriting import rewrite

PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
QUICK = settings(deadline=None, phases=PHASES, max_examples=150, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=4000)
SIDES = ((1, 1), (2, 3), (7, 6))


def check(steps, both):
    original = randomised(Program(steps, both))
    pristine = copy.deepcopy(original)
    result = fuse(original, (image(2, 4, 7, 6),))
    event(f"sites: {min(len(result.plan.sites), 4)}")
    for seed, side in enumerate(SIDES):
        x = image(1 + seed, 4, *side, seed=seed)
        for expected, got in zip(outputs(pristine, x), outputs(result.module, x), strict=True):
            assert expected.shape == got.shape
            assert float((expected - got).abs().max()) <= 1e-12 * peak(pristine, x)
    untouched(original, pristine, result.module)
    replays(original, result)


def untouched(original, pristine, fused):
    assert str(original) == str(pristine)
    assert [m.training for m in original.modules()] == [m.training for m in pristine.modules()]
    for (name, tensor), (_, before) in zip(
        original.state_dict(keep_vars=True).items(), pristine.state_dict(keep_vars=True).items(), strict=True
    ):
        assert torch.equal(tensor, before) and type(tensor) is type(before), name
    own = {tensor.untyped_storage().data_ptr() for tensor in original.state_dict().values()}
    assert own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in fused.state_dict().values())


def replays(original, result):
    again = rewrite(original, Plan.from_dict(result.plan.to_dict()))
    assert str(again) == str(result.module)
    state = result.module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


TORN = (
    Step("conv"),
    Step("block", inner=(Step("conv"), Step("add"), Step("conv"))),
    Step("again", number=1),
    Step("norm"),
)
"""A block that is merged on its own, and whose second call would be taken apart for the normalisation after it."""


@QUICK
@given(PROGRAMS, st.booleans())
@example(TORN, False)
def test_random_networks(steps, both):
    check(steps, both)


@pytest.mark.slow
@LONG
@given(PROGRAMS, st.booleans())
def test_many_random_networks(steps, both):
    check(steps, both)
