"""A mistake in a fused network is caught, by the part of the proof that is to catch it, and named by its place."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import islice

import pytest
import torch
from blocks import TWINS
from blocks.building import BORDER
from mistakes.damage import STORED
from mistakes.subjects import BLOCKS, CHECKPOINTS, KINDS, Subject, Wrong, block, sample
from support.agreement import randomised
from support.interior import SIDES, Interior
from support.proving import compare, prove_sites
from torch import Tensor, nn

from repfuse.checking.comparison import reference
from repfuse.checking.inputs import Trial
from repfuse.checking.proof import prove
from repfuse.checking.verification import verify
from repfuse.errors import RepfuseError
from repfuse.networks import named_tensors

FEW = 3
VOID_OFTEN = {"InceptionNeXt, its norm into the 1x1"}
"""Of its mistakes a third are none: 8 of 26."""
ABSENT = {
    *("dilation", "dilated taps", "branch undilated", "branch without bias", "skip in groups"),
    *("shift, axis 2, +1", "shift, axis 2, -1"),
}
"""Mistakes that nothing in the classifier could have."""

TOO_SMALL = ("weight, largest", "weight, median", "weight, smallest")
UNSTORED = {torch.float32: ("float32",), torch.bfloat16: ("float32", *TOO_SMALL, "eps times 10", "eps 1e-3")}
"""Mistakes that may change no stored number."""

RARE = {"dilation": 1, "skip in groups": 1}
"""How many there are at all of the kinds that fit few blocks."""


@cache
def subject(name: str, dtype: torch.dtype = torch.float64) -> Subject:
    return sample(name, dtype) if name in CHECKPOINTS else block(BLOCKS[name], dtype)


def real(kind: str, dtype: torch.dtype = torch.float64, most: int = FEW) -> Iterator[tuple[Subject, Wrong]]:
    """A few mistakes of a kind, each of another block, the same ones every time; void ones are not counted."""
    names = random.Random(kind).sample(sorted(BLOCKS), len(BLOCKS))
    found = ((subject(name, dtype), wrong) for name in names for wrong in first_real(subject(name, dtype), kind))
    return islice(found, most)


def first_real(among: Subject, kind: str) -> Iterator[Wrong]:
    return islice((wrong for wrong in among.mistakes([kind]) if wrong.sites), 1)


def failing(among: Subject, network: nn.Module) -> frozenset[str]:
    """The sites whose algebra is found wrong: that a stored number is another one decides nothing here."""
    sites = prove_sites(among.original, network, among.plan)
    return frozenset(site.path for site in sites if not site.comparison.passed)


def caught(among: Subject, wrong: Wrong) -> bool:
    """Whether the sites that fail are those that compute something else."""
    return wrong.sites <= failing(among, wrong.network) <= wrong.touched


# --- sites in float64 --------------------------------------------------------------------------------------------


SEARCHED = {"dilation", "branch undilated", "shift, axis 2, -1", "skip in groups"}
"""Kinds for which many blocks are looked through, which takes up to half a minute."""


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow if k in SEARCHED or number % 3 else ()) for number, k in enumerate(KINDS)],
)
def test_a_mistake_of_each_kind_fails_its_site(kind: str) -> None:
    found = list(real(kind))
    assert len(found) >= RARE.get(kind, FEW)
    assert [(among.name, wrong.sites) for among, wrong in found if not caught(among, wrong)] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHECKPOINTS, *BLOCKS])
def test_every_mistake_fails_its_site(name: str) -> None:
    made: Counter[bool] = Counter()
    for wrong in subject(name).mistakes():
        assert caught(subject(name), wrong), wrong.kind
        made[bool(wrong.sites)] += 1
    assert made[True] > (2 if name in VOID_OFTEN else 3) * made[False]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_in_one_site_of_many_fails_that_one(kind: str) -> None:
    """Of the classifier's five sites, those pass that have no mistake."""
    digits = subject("repvgg_digits")
    found = list(islice((wrong for wrong in digits.mistakes([kind]) if wrong.sites), 3))
    if kind in ABSENT:
        assert not found
        return
    wrong = random.Random(kind).choice(found)
    assert len(wrong.touched) == 1 and caught(digits, wrong)


@pytest.mark.parametrize("name", [*CHECKPOINTS, "RepVGG stride 1 groups 2", "LoRA"])
def test_the_right_rewrite_is_no_mistake(name: str) -> None:
    among = subject(name)
    assert among.layers and not failing(among, among.fused)


# --- stored tensors ----------------------------------------------------------------------------------------------


def runs(name: str, dtype: torch.dtype) -> bool:
    """Whether the network runs in this dtype: not every operator does on a CPU."""
    try:
        subject(name, dtype)
    except RepfuseError as error:
        assert "not implemented for" in error.why
        return False
    return True


def differing(one: nn.Module, other: nn.Module) -> set[str]:
    """The names of the tensors that are not bit for bit those of the other network."""
    before, after = dict(named_tensors(one)), dict(named_tensors(other))
    return {name for name in before.keys() | after.keys() if not alike(before.get(name), after.get(name))}


def alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one.nan_to_num(9e9), other.nan_to_num(9e9))


def settings(among: Subject, network: nn.Module) -> list[str]:
    layers = (network.get_submodule(path) for paths in among.layers.values() for path in paths)
    return [*map(repr, layers), *(module.extra_repr() for module in network.modules())]


def check_stored(among: Subject, wrong: Wrong) -> bool:
    """Hold the proof's list of what is not proven against the tensors that differ; say whether any do."""
    trials = [Trial("the example", tuple(among.example))]
    proof = prove(among.original, among.plan, wrong.network, trials, reference(among.original, trials))
    weights = [weight for site in proof.sites for weight in site.weights]
    between = {weight.name for weight in weights if weight.passed and weight.spacings == 0.5}  # two numbers are right
    changed = differing(among.fused, wrong.network)
    tensors = dict(named_tensors(among.fused)).keys() | dict(named_tensors(wrong.network)).keys()
    wrong_weights = {weight.name for weight in weights if not weight.passed}
    named = tensors & (wrong_weights | set(proof.unproven))
    assert named <= changed <= named | between
    if damaged := bool(named) or settings(among, among.fused) != settings(among, wrong.network):
        assert not proof.passed
        if wrong.touched:
            assert proof.reason.startswith(among.paths(wrong.touched))
    else:
        assert proof.passed
    return damaged


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=[pytest.mark.slow] if RARE.get(kind) == 1 or (place + other) % 2 else [])
        for place, kind in enumerate(STORED)
        for other, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
)
def test_a_stored_number_that_is_not_the_proven_one_is_named(kind: str, dtype: torch.dtype) -> None:
    names = random.Random(kind).sample(sorted(BLOCKS), len(BLOCKS))
    among = (subject(name, dtype) for name in names if runs(name, dtype))
    wrongs = ((each, wrong) for each in among for wrong in each.mistakes([kind]))
    found = any(check_stored(each, wrong) for each, wrong in islice(wrongs, FEW))  # of a single weight some are void
    assert found or kind in UNSTORED[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHECKPOINTS, *BLOCKS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_stored_number_that_is_not_the_proven_one_is_named(name: str, dtype: torch.dtype) -> None:
    if not runs(name, dtype):
        pytest.skip("does not run in this dtype")
    among = subject(name, dtype)
    checked = [check_stored(among, wrong) for wrong in among.mistakes([*STORED, *KINDS[len(STORED) - 1 :]])]
    assert sum(checked) > len(checked) / 3


@pytest.mark.parametrize("name", ["head.weight", "head.bias"])
def test_one_number_of_a_layer_that_was_left_alone_is_named(name: str) -> None:
    digits = subject("repvgg_digits", torch.float32)
    wrong = copy.deepcopy(digits.fused)
    wrong.get_parameter(name).data.flatten()[-1] += 1
    trials = [Trial("the example", tuple(digits.example))]
    proof = prove(digits.original, digits.plan, wrong, trials, reference(digits.original, trials))
    assert not proof.passed and proof.unproven == (name,) and name in proof.reason


# --- whole networks ----------------------------------------------------------------------------------------------


class Naive(nn.Module):
    """A twin of a block as one convolution, as if nothing were wrong with that."""

    def __init__(self, twin, block: nn.Module) -> None:
        super().__init__()
        self.block, self.merged = block, Interior(block, twin.channels, twin.axes, SIDES[twin.axes])

    def forward(self, x: Tensor) -> Tensor:
        return self.merged(x, tuple(self.block(x.clone()).shape[2:]))


def by_name(twins):
    return pytest.mark.parametrize("twin", twins, ids=lambda twin: twin.name)


@by_name([twin for twin in TWINS if twin.wrong == BORDER])
def test_a_merge_that_is_wrong_at_the_border_alone_is_no_match(twin) -> None:
    torch.default_generator.manual_seed(0)
    original = randomised(twin.make())
    example = twin.at(max(twin.side, twin.least))
    trials = [Trial("the example", tuple(example))]
    assert not compare(original, Naive(twin, original), trials, 1e-12).passed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@by_name([twin for twin in TWINS if twin.wrong == BORDER])
def test_a_merge_that_is_wrong_at_the_border_alone_is_different(twin, dtype: torch.dtype) -> None:
    """In bfloat16 too: the error is a part of the value, however small the border is."""
    torch.default_generator.manual_seed(0)
    original = randomised(twin.make())
    naive, example = Naive(twin, original), [x.to(dtype) for x in twin.at(max(twin.side, twin.least))]
    assert verify(original.to(dtype), naive, example).verdict == "different"
