"""No random affine network is ever fused wrongly, and none is touched."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st
from support.check import check, check_in
from support.programs import EXAMPLES, STEPS, Step

from repfuse.plans import Policy

PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
QUICK = settings(deadline=None, phases=PHASES, max_examples=2, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=100)
FEW, MANY = settings(QUICK, max_examples=2), settings(QUICK, max_examples=100)
SHAPES = st.sampled_from(EXAMPLES)
ALSO = st.lists(st.integers(0, 8), max_size=2)
IMAGE = ((2, 4, 7, 6),)
TORN = (
    Step("kept"),
    Step("block", inner=(Step("kept"), Step("add"), Step("kept"))),
    Step("again", digits=(1,)),
    Step("norm"),
)
"""A block that is merged on its own, and whose second call would be taken apart for the normalisation after it."""
EMPTIED = (
    *(Step("conv") for _ in range(8)),
    Step("block", inner=(*(Step("conv") for _ in range(3)), Step("crop", digits=(0,) * 7 + (75,) + (0,) * 6))),
)
"""A crop that leaves nothing of the smallest input, of which the convolution that crops itself takes no notice."""
UNREAD = (*EMPTIED[:8], Step("block", inner=(*EMPTIED[8].inner, Step("conv", reads=(2, 0, 0)))))
"""The same crop, which nothing reads."""
BEHIND_SEVERAL = (
    *(Step("conv") for _ in range(7)),
    Step("branches", reads=(1, 0, 0), inner=(Step("number", digits=(0, 0, 69, *(0,) * 11)), Step("filled"))),
)
"""A layer that pads with the bias before it, tried behind several maps."""
TAKEN_BACK = (
    Step("branches", inner=(*[Step("kept")] * 3, Step("number", digits=(0, 0, 108, *(0,) * 11)))),
    Step("conv"),
    Step("conv", reads=(2, 0, 0)),
    *[Step("conv")] * 3,
    Step("block", inner=(Step("conv"), Step("conv"), Step("pool", digits=(0, 1, *(0,) * 12)))),
    Step("branches", inner=(Step("kept"), Step("filled"))),
)
"""The same, and what it was first tried behind has no place in the end."""
CLOSED_FIRST = (
    Step(
        "branches",
        (0, 1, 0),
        (49, 113, 83, 87, 8, 10, 61, 98, 114, 109, 81, 41, 107, 108),
        (Step("kept", (1, 0, 1), (72, 24, 3, 112, 56, 21, 68, 1, 115, 95, 73, 57, 60, 4)),),
    ),
    Step("averaged", (2, 3, 0), (108, 23, 44, 25, 100, 73, 97, 112, 48, 104, 15, 18, 14, 94)),
    Step("again", (3, 0, 5), (60, 10, 45, 117, 12, 21, 36, 24, 75, 26, 3, 65, 25, 100)),
    Step(
        "branches",
        (0, 5, 1),
        (33, 48, 112, 32, 68, 82, 106, 89, 18, 88, 4, 3, 68, 25),
        (Step("constant", (1, 0, 0), (11, 11, 33, 26, 61, 16, 9, 38, 17, 52, 11, 31, 115, 69)),),
    ),
)
"""A block that is called twice, not alike, and for which the network would lose its class: not planned after all."""
VANISHING = (
    Step("conv"),
    Step("transposed", digits=(*(0,) * 13, 2)),
    Step("broadcast", digits=(1, *(0,) * 13)),
    Step("conv"),
)
"""x - x, of terms whose rounding does not cancel, and a layer on that."""
CHOSEN_OF_NOTHING = (
    *[Step("conv")] * 2,
    Step(
        "block",
        (1, 0, 0),
        inner=(Step("nothing", digits=(0, 1, *(0,) * 12)), Step("choose"), Step("conv", digits=(*(0,) * 11, 5, 0, 0))),
    ),
)
"""A layer of some channels of what a dropout returns."""
PARTED_OF_NOTHING = (
    *CHOSEN_OF_NOTHING[:2],
    Step(
        "block",
        (1, 0, 0),
        inner=(
            CHOSEN_OF_NOTHING[2].inner[0],
            Step("choose", digits=(0, 0, 44, *(0,) * 11)),
            Step("conv", digits=(*(0,) * 11, 5, 0, 0)),
        ),
    ),
)
"""The same of what is parted into several."""
POOLED_AGAIN = (*[Step("conv")] * 7, Step("averaged"), Step("norm", digits=(0, 0, 116, *(0,) * 11)))
"""Layers with pools between them that leave the one pixel there is."""
MATCHED_BEFORE = (
    Step("branches", inner=(*[Step("kept")] * 3, Step("constant", digits=(0, 0, 0, 67, *(0,) * 10)))),
    *[Step("conv")] * 2,
    Step("conv", digits=(*(0,) * 12, 100, 0)),
    Step("block", inner=(Step("norm"), Step("filled"), *[Step("norm")] * 2)),
    Step("block", inner=(Step("constant", (0, 0, 2), (0, 0, 45, *(0,) * 11)), *[Step("conv")] * 5)),
)
"""A layer that pads with what was before it, as a reading found that was taken back before anything was measured."""
REFUSED_AT_FIRST = (
    *[Step("conv")] * 3,
    Step("conv", digits=(*(0,) * 10, 74, *(0,) * 3)),
    Step("pad"),
    Step("transposed", digits=(*(0,) * 13, 117)),
    Step("branches", inner=(*[Step("kept")] * 2, Step("constant", digits=(*(0,) * 3, 79, 3, *(0,) * 9)))),
    Step("branches", inner=(*[Step("kept")] * 4,)),
    Step("branches", inner=(Step("conv", digits=(*(0,) * 5, 64, *(0,) * 4, 3, 0, 0, 5)), *[Step("kept")] * 2)),
)
"""What the first plan came not to rely on, and the one with what was measured has no reason to doubt."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
POLICIES = pytest.mark.parametrize("policy", [Policy.COST, Policy.ALWAYS])


@POLICIES
@QUICK
@given(STEPS, SHAPES, ALSO)
@example(TORN, IMAGE, [])
@example(BEHIND_SEVERAL, IMAGE, [])
@example(TAKEN_BACK, IMAGE, [])
def test_random_networks(policy, steps, shapes, also):
    event(str(dict(check(steps, shapes, also, policy))))


@POLICIES
@QUICK
@given(STEPS, SHAPES, ALSO, st.integers(0))
@example(MATCHED_BEFORE, ((1, 4, 11, 10, 10),), [0], 0)
@example(REFUSED_AT_FIRST, IMAGE, [5], 2)
def test_random_networks_by_what_was_measured(policy, steps, shapes, also, seed):
    check(steps, shapes, also, policy, Random(seed))


@pytest.mark.slow
@POLICIES
@LONG
@given(STEPS, SHAPES, ALSO, st.integers(0))
def test_many_random_networks(policy, steps, shapes, also, seed):
    check(steps, shapes, also, policy)
    check(steps, shapes, also, policy, Random(seed))


@DTYPES
@FEW
@given(STEPS, SHAPES, st.sampled_from(Policy))
@example(EMPTIED, IMAGE, Policy.COST)
@example(UNREAD, IMAGE, Policy.COST)
@example(VANISHING, IMAGE, Policy.COST)
@example(POOLED_AGAIN, IMAGE, Policy.COST)
@example(CHOSEN_OF_NOTHING, IMAGE, Policy.COST)
@example(PARTED_OF_NOTHING, IMAGE, Policy.COST)
def test_random_conversions(dtype, steps, shapes, policy):
    check_in(dtype, steps, shapes, policy)


@pytest.mark.slow
@DTYPES
@MANY
@given(STEPS, SHAPES, st.sampled_from(Policy))
def test_many_random_conversions(dtype, steps, shapes, policy):
    check_in(dtype, steps, shapes, policy)
