"""Every block of the zoo becomes what it should, in every spelling, and computes what it did; its twins do not."""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, TWINS
from blocks.building import BORDER, ELSEWHERE, EVERYWHERE, Inputs, Twin
from support.agreement import error, image, operations, randomised
from support.interior import SIDES, Interior
from support.spellings import exported, in_functions
from torch import nn

from repfuse.fusing import fuse
from repfuse.plans import Policy


def layers(module: nn.Module, inputs: list[torch.Tensor]) -> dict[str, int]:
    """How many convolutions, linear layers and normalisations run."""
    seen = operations(module, *inputs)
    linears = sum(seen[name] for name in ("addmm", "mm"))
    return {"convolutions": seen["convolution"], "linears": linears, "norms": seen["batch_norm"]}


def by_name(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


def made(row) -> nn.Module:
    """The block with random numbers, the same ones every time."""
    torch.default_generator.manual_seed(0)
    return randomised(row.make())


def expected(row) -> dict[str, int]:
    return {name: getattr(row, name) for name in ("convolutions", "linears", "norms")}


def check_sizes(case: Inputs, original: nn.Module, fused: nn.Module) -> None:
    for side in {case.least, case.least + 1, max(case.least, 5), max(case.least, 8)}:
        assert error(original, fused, *case.at(side, seed=1)) < 1e-12
    assert error(original, fused, *case.at(case.side, seed=2, batch=3)) < 1e-12


@by_name(CASES)
def test_block(row):
    original, example = made(row), row.at(row.side)
    result = fuse(original, example, row.policy)
    before, after = operations(original, *example), operations(result.module, *example)
    assert layers(result.module, example) == expected(row)
    assert after.total() < before.total()
    assert all(after[kind] <= before[kind] for kind in ("batch_norm", "add"))
    assert after["convolution"] <= before["convolution"] + before["bmm"]
    assert [site.form for site in result.plan.sites] == [row.form] * row.sites
    check_sizes(row, original, result.module)


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.name, marks=() if i % 12 == 0 else pytest.mark.slow) for i, r in enumerate(CASES)]
)
def test_block_in_functions(row):
    original, example = made(row), row.at(row.side)
    result = fuse(in_functions(made(row)), example, row.policy)
    assert (layers(result.module, example) == expected(row)) == ("functions" not in row.less_in)
    check_sizes(row, original, result.module)


IN_ATEN_SOON = {
    "ACNet, cropped",
    "average that counts its padding",
    "QARepVGG",
    "halves added",
    "LoRA",
    "casts and copies",
    "stacked heads",
}
"""What every run checks; the rest takes minutes."""


@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.name, marks=() if r.name in IN_ATEN_SOON else pytest.mark.slow) for r in CASES]
)
def test_block_in_aten(row, decomposed):
    original, example = made(row), row.at(row.side)
    result = fuse(exported(made(row), example, row.channel_axis, decomposed), example, row.policy)
    merged = layers(result.module, example) == expected(row)
    assert merged == (("decomposed" if decomposed else "exported") not in row.less_in)
    assert error(original, result.module, *example) < 1e-12
    for side in (row.side + 2, row.side + 3):  # not below: an exported program says which sizes it is for
        assert error(original, result.module, *row.at(side, seed=1, batch=3)) < 1e-12


@by_name(TWINS)
def test_twin_is_refused(row):
    original, example = made(row), row.at(max(row.side, row.least))
    result = fuse(original, example, row.policy)
    assert row.code in {refusal.code for refusal in result.plan.refusals}
    assert layers(result.module, example) == expected(row)
    assert error(original, result.module, *example) < 1e-12
    if row.wrong != ELSEWHERE:
        assert error(original, result.module, *row.at(max(row.least, 9), seed=1, batch=3)) < 1e-12


def difference(twin: Twin, block: nn.Module, naive: Interior, side: int, *, middle: bool = False) -> float:
    """How far the naive merge is off, relative to the largest number; in the middle of the map, or anywhere."""
    x = image(2, twin.channels, *[side] * twin.axes)
    with torch.no_grad():
        expected = block(x.clone())
        off = (naive(x, tuple(expected.shape[2:])) - expected).abs()
    for axis in range(2, 2 + twin.axes) if middle else ():
        off = off.narrow(axis, off.shape[axis] // 2, 1)
    return float(off.max() / expected.abs().max())


@by_name([twin for twin in TWINS if twin.wrong == BORDER])
def test_merged_it_would_be_wrong_at_the_border(row):
    block, side = made(row), SIDES[row.axes]
    naive = Interior(block, row.channels, row.axes, side)
    assert difference(row, block, naive, side, middle=True) < 1e-12
    assert difference(row, block, naive, side) > 1e-2


@by_name([twin for twin in TWINS if twin.wrong == EVERYWHERE])
def test_merged_it_would_be_wrong_everywhere(row):
    block, side = made(row), SIDES[row.axes]
    naive = Interior(block, row.channels, row.axes, side)
    assert difference(row, block, naive, side, middle=True) > 1e-3


@by_name([twin for twin in TWINS if twin.wrong == ELSEWHERE])
def test_merged_it_would_be_wrong_at_another_size(row):
    block = made(row)
    naive = Interior(block, row.channels, row.axes, row.side)
    assert difference(row, block, naive, row.side) < 1e-12
    try:
        assert difference(row, block, naive, row.other) > 1e-2
    except RuntimeError as failure:
        assert "size of tensor" in str(failure)


@by_name([twin for twin in TWINS if twin.code == "cost"])
def test_what_is_declined_shows_both_estimates(row):
    plan = fuse(made(row), row.at(row.side)).plan
    (refusal, *_) = [refusal for refusal in plan.refusals if refusal.code == "cost"]
    assert refusal.before is not None and refusal.after is not None
    price = plan.live.estimate.price
    assert price(refusal.after) > 0.95 * price(refusal.before)  # as `repfuse explain merges` says
    always = fuse(made(row), row.at(row.side), Policy.ALWAYS)
    assert bool(always.plan.sites) == (refusal.after.launches < refusal.before.launches)
    assert sum(layers(always.module, row.at(row.side)).values()) == 1


def test_names_are_unique():
    assert len({row.name for row in [*CASES, *TWINS]}) == len(CASES) + len(TWINS)
