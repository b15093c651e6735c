"""What the search leaves of a small region is no more work than the best way to cut it, as far as that can be told."""

from __future__ import annotations

from collections import Counter
from itertools import chain, combinations

import pytest
import torch
from blocks import CASES, TWINS
from blocks.building import C, Case, Spelled, conv, norm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agreement import error, image, operations, randomised
from support.programs import EXAMPLES, STEPS, program
from torch import fx, nn
from torch.nn import functional as F

from repfuse.fusing import fuse
from repfuse.planning.planner import plan
from repfuse.planning.search import Search

MOST_NODES = 9
"""Of regions with no more nodes every set of cuts is tried: 256 of them."""
MOST_PLACES = 4
"""Of so many places, as a block of three layers in a row with a skip has, the search has to find the best cuts."""
TOLD_APART = 0.05
"""By which share two ways have to differ for the estimate to tell them apart, as ``repfuse explain merges`` says."""


def searched(
    module: nn.Module, inputs: list[torch.Tensor], *, everywhere: bool
) -> list[tuple[Search, tuple[fx.Node, ...], float, float]]:
    """Each region that may be taken apart, with the price of what the search leaves of it, and of the best there is.

    Cut between layers alone, or ``everywhere``.
    """
    planner = plan(module, inputs).live
    planner._read()
    search = planner.search()
    search.find()
    planner._read()  # what is no operation on terms has lost its meaning
    before = planner.search()
    found = []
    for part in before.largest:
        places = list(before.places(part))
        if 1 < len(part) <= MOST_NODES and len(places) <= MOST_PLACES:
            left = price(before, part, search.cuts.intersection(part[:-1]))
            best = min(price(before, part, cuts) for cuts in subsets(part[:-1] if everywhere else places))
            found.append((before, part, left, best))
    return found


def price(search: Search, part: tuple[fx.Node, ...], cuts) -> float:
    return search.estimate.price(search.divided(part, frozenset(cuts)).cost)


def subsets(nodes):
    return chain.from_iterable(combinations(nodes, size) for size in range(len(nodes) + 1))


def check(module: nn.Module, inputs: list[torch.Tensor], *, everywhere: bool = True) -> None:
    for _, part, left, best in searched(module, inputs, everywhere=everywhere):
        assert left <= (1 + TOLD_APART) * best, part


def widths(*channels: int, kernels: tuple[int, ...], groups: tuple[int, ...] = (), normed: bool = False) -> nn.Module:
    """Layers in a row that pad nothing."""
    steps: list[nn.Module] = []
    for number, kernel in enumerate(kernels):
        inputs, outputs = channels[number : number + 2]
        by = groups[number] if groups else 1
        steps += [conv(kernel, inputs=inputs, outputs=outputs, padding=0, groups=by), *[norm(outputs)] * normed]
    return nn.Sequential(*steps)


def beside(wide: int) -> nn.Module:
    """Parts that are convolved for themselves, joined, normalised, mixed."""

    def forward(m: Spelled, x: torch.Tensor) -> torch.Tensor:
        one, other = x.chunk(2, 1)
        return m.up(m.norm(torch.cat([m.a(one), m.b(other)], 1)))

    half = wide // 2
    a, b = (conv(kernel, inputs=half, outputs=half, groups=half) for kernel in (3, 5))
    return Spelled(forward, a=a, b=b, norm=norm(wide), up=conv(1, inputs=wide, outputs=2 * wide))


ROWS = [
    ("bottleneck", widths(64, 8, 8, 64, kernels=(1, 3, 1)), 64),
    ("inverted bottleneck", widths(8, 64, 64, 8, kernels=(1, 3, 1)), 8),
    ("separable", widths(32, 32, 32, 32, 32, kernels=(3, 1, 3, 1), groups=(32, 1, 32, 1)), 32),
    ("narrow, wide, narrow", widths(4, 32, 4, 32, 4, kernels=(1, 3, 3, 1)), 4),
    ("normed", widths(16, 16, 16, 16, kernels=(3, 1, 3), groups=(16, 1, 16), normed=True), 16),
    ("parts, narrow", beside(8), 8),
    ("parts, wide", beside(96), 96),
]


@pytest.mark.parametrize(("module", "channels"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
@pytest.mark.parametrize("side", [8, 28])
def test_no_way_to_cut_a_row_is_better(module, channels, side):
    check(randomised(module), [image(1, channels, side, side)])


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=pytest.mark.slow if number % 6 else ())
        for number, row in enumerate((*CASES, *TWINS))
    ],
)
def test_no_way_to_cut_a_block_is_better(row: Case):
    check(randomised(row.make()), row.at(max(row.side, row.least)))


@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(STEPS, st.sampled_from(EXAMPLES))
def test_no_way_to_cut_a_random_network_is_better(steps, shapes):
    examples = [image(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    check(randomised(program(steps, examples)), examples, everywhere=False)


def test_the_first_choice_is_not_always_the_best():
    """Without the search some of these were more work: merged as a whole, or not at all."""
    gained = 0
    for _, module, channels in ROWS:
        for search, part, left, _ in searched(randomised(module), [image(1, channels, 28, 28)], everywhere=True):
            whole = price(search, part, ())
            every = price(search, part, part[:-1])
            gained += left < min(whole, every)
    assert gained >= 3


def test_a_long_row_takes_as_many_tries_as_it_has_layers(monkeypatch):
    divided, tries = Search.divided, Counter[int]()

    def count(search, part, cuts):
        tries[layers] += 1
        return divided(search, part, cuts)

    monkeypatch.setattr(Search, "divided", count)
    for layers in (24, 48):
        row = widths(*[8] * (layers + 1), kernels=(3,) * layers)
        plan(randomised(row), [image(1, 8, 120, 120)])
    assert 0 < tries[48] <= 2.5 * tries[24]


PARTS = {
    "chunk": lambda x: x.chunk(5, 1),
    "slices": lambda x: [x[:, 16 * n : 16 * n + 16] for n in range(5)],
}


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_kernel_for_some_channels_stays_one(groups, parts):
    """To choose channels is a view. As part of the kernel it would be zeros, so many that the norm stayed instead."""
    made = [nn.Sequential(conv(5, inputs=16, outputs=16, groups=groups), norm(16)) for _ in range(5)]
    network = Spelled(
        lambda m, x: torch.cat([head(part).relu() for head, part in zip(m.heads, parts(x), strict=True)], 1),
        heads=nn.ModuleList(made),
    )
    network, x = randomised(network), image(2, 80, 14, 14)
    result = fuse(network, [x])
    left = [module for module in result.module.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    assert [(module.in_channels, module.groups) for module in left] == [(16, groups)] * 5
    assert max(error(network, result.module, each) for each in (x, image(1, 80, 3, 4))) < 1e-12


def test_a_choice_that_copies_goes_into_the_kernel():
    network, x = randomised(Spelled(lambda m, x: m.a(x.flip(1)), a=conv(3, inputs=16))), image(2, 16, 14, 14)
    result = fuse(network, [x], keep_class=False)
    assert "flip" not in operations(result.module, x)
    assert error(network, result.module, x) < 1e-12


AGAIN = {
    "a function": lambda m, x: (F.relu(x), F.relu(x)),
    "a module": lambda m, x: (m.act(x), m.act(x)),
    "two modules": lambda m, x: (m.act(x), m.same(x)),
    "of sizes": lambda m, x: (F.adaptive_max_pool2d(x, x.shape[2:]), F.adaptive_max_pool2d(x, x.shape[2:])),
    "in two steps": lambda m, x: (m.act(x.tanh()), m.act(x.tanh())),
}
NOT_AGAIN = {
    "other settings": lambda m, x: (F.leaky_relu(x, 0.1), F.leaky_relu(x, 0.2)),
    "another input": lambda m, x: (x.tanh(), x.neg().tanh()),
    "overwritten between": lambda m, x: (m.act(x), m.act(x.mul_(0.5))),
    "written into": lambda m, x: (m.act(x), m.act(x).mul_(x)),
    "the first is written into": lambda m, x: (m.act(x).mul_(x), m.act(x)),
    "drawn": lambda m, x: (F.dropout(x, 0.5, True), F.dropout(x, 0.5, True)),
}


@pytest.mark.parametrize("name", AGAIN)
def test_what_is_computed_again_is_one_source(name):
    def forward(m, x):
        first, second = AGAIN[name](m, x)
        return m.a(first) + m.b(second)

    network = randomised(Spelled(forward, a=conv(3), b=conv(1), act=nn.GELU(), same=nn.GELU()))
    fused = fuse(network, (image(2, C, 6, 7),), keep_class=False).module
    assert operations(fused, image(2, C, 6, 7))["convolution"] == 1
    for shape in ((2, C, 6, 7), (1, C, 9, 4)):
        assert error(network, fused, image(*shape)) < 1e-12


@pytest.mark.parametrize("name", NOT_AGAIN)
def test_what_may_be_another_value_is_computed_again(name):
    def forward(m, x):
        first, second = NOT_AGAIN[name](m, x.clone())
        return m.a(first) + m.b(second)

    network = randomised(Spelled(forward, a=conv(3), b=conv(1), act=nn.GELU()))
    fused = fuse(network, (image(2, C, 6, 7),), keep_class=False).module
    assert operations(fused, image(2, C, 6, 7))["convolution"] == 2
    for shape in ((2, C, 6, 7), (1, C, 9, 4)):
        torch.manual_seed(0)
        expected = network(image(*shape))
        torch.manual_seed(0)
        assert (fused(image(*shape)) - expected).abs().max() < 1e-12 * expected.abs().max()


ELSEWHERE = {
    "turned and back": lambda y: y.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "resized": lambda y: F.interpolate(y, size=y.shape[-2:]),
    "a mean": lambda y: y.mean(2, keepdim=True).expand(-1, -1, y.shape[2], -1),
    "an adaptive pool": lambda y: F.adaptive_avg_pool2d(y, y.shape[-2:]),
}


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("name", ELSEWHERE)
def test_where_one_operand_cannot_be_read_the_others_still_merge(name, place):
    def forward(m, x):
        operands = [m.a(x), x]
        operands.insert(place, ELSEWHERE[name](m.b(x)))
        return sum(operands)

    network = randomised(Spelled(forward, a=conv(3), b=conv(1)))
    result = fuse(network, (image(2, C, 6, 7),), keep_class=False)
    assert operations(result.module, image(2, C, 6, 7))["add"] == 1
    for shape in ((2, C, 6, 7), (1, C, 9, 4)):
        assert error(network, result.module, image(*shape)) < 1e-12
