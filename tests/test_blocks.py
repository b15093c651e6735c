"""Every block of the zoo becomes what it should, and computes what it did."""

from __future__ import annotations

import pytest
from blocks import CASES, Case
from support.agreement import error, image, operations, randomised

from repfuse.fusing import fuse


def inputs_of(case: Case, side: int, seed: int = 0):
    sides = [side + axis % 2 for axis in range(case.axes)]
    return [image(2, 4, *sides, seed=seed + number) for number in range(case.inputs)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block(case):
    original, example = randomised(case.make()), inputs_of(case, 6)
    result = fuse(original, example)
    before, after = operations(original, *example), operations(result.module, *example)
    assert (after["convolution"], after["batch_norm"]) == (case.convolutions, case.norms)
    assert after.total() < before.total()
    assert all(after[kind] <= before[kind] for kind in ("convolution", "batch_norm", "add"))
    assert [site.form for site in result.plan.sites] == [case.form] * case.sites
    for side in {case.least, case.least + 1, 5, 8}:
        assert error(original, result.module, *inputs_of(case, side, seed=1)) < 1e-12
