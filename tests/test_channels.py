"""Windows of channels: an upper bound on what is read, that finds the groups there are."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repfuse.algebra.geometry import Geometry
from repfuse.algebra.layers import Windows

CHANNELS = 12
GROUPS = st.sampled_from([1, 2, 3, 4, 6, 12])


def layer(groups: int, inputs: int = CHANNELS, outputs: int = CHANNELS) -> Windows:
    return Windows.of(Geometry(inputs, outputs, (), (), (), (), groups))


def reads(windows: Windows) -> torch.Tensor:
    """Which output channel (row) may read which input channel (column)."""
    column = np.arange(windows.inputs)
    return torch.from_numpy((windows.starts[:, None] <= column) & (column < windows.stops[:, None]))


def hull(read: torch.Tensor) -> torch.Tensor:
    """The rows, with every channel between the first and the last that is read."""
    return (read.cumsum(1) > 0) & (read.flip(1).cumsum(1).flip(1) > 0)


@st.composite
def windows(draw, outputs: int = CHANNELS) -> Windows:
    """Any windows over CHANNELS inputs."""
    ends = [sorted(draw(st.sets(st.integers(0, CHANNELS), min_size=2, max_size=2))) for _ in range(outputs)]
    starts, stops = np.array(ends).T
    return Windows(starts, stops, CHANNELS)


@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(1, 4, 6), (2, 4, 6), (3, 3, 12), (4, 8, 4)])
def test_a_layer_reads_its_groups(groups, inputs, outputs):
    blocks = [torch.ones(outputs // groups, inputs // groups)] * groups
    assert torch.equal(reads(layer(groups, inputs, outputs)), torch.block_diag(*blocks).bool())
    assert layer(groups, inputs, outputs).groups() == groups


@given(windows(), windows())
def test_a_composition_is_the_product_of_both(inner, outer):
    product = reads(outer).double() @ reads(inner).double() > 0
    assert torch.equal(reads(inner.then(outer)), hull(product))
    assert inner.then(outer).inputs == CHANNELS


@given(windows(), windows(5), st.lists(st.integers(0, CHANNELS - 1), min_size=1))
def test_channels_are_taken_and_joined_as_torch_does(one, other, indices):
    assert torch.equal(reads(one.select(indices)), reads(one)[indices])
    assert torch.equal(reads(Windows.concat([one, other, one])), torch.cat([reads(one), reads(other), reads(one)]))


@given(windows(), windows())
def test_a_sum_reads_what_either_reads(one, other):
    assert torch.equal(reads(one.union(other)), hull(reads(one) | reads(other)))


@given(windows(8))
def test_the_groups_are_the_most_whose_blocks_hold_all(some):
    def hold(groups: int) -> bool:
        blocks = torch.block_diag(*[torch.ones(8 // groups, CHANNELS // groups)] * groups).bool()
        return not (reads(some) & ~blocks).any()

    assert some.groups() == max(groups for groups in (1, 2, 4) if hold(groups))


@given(GROUPS, GROUPS)
def test_groups_of_two_layers_are_at_least_their_gcd(one, other):
    assert layer(one).then(layer(other)).groups() == np.gcd(one, other)


def test_a_channel_shuffle_undone_leaves_the_groups():
    """Grouped, shuffled, shuffled back, grouped: the gcd rule of dense selections would say one group."""
    shuffle = [i // 4 + i % 4 * 3 for i in range(12)]
    back = [shuffle.index(i) for i in range(12)]
    assert layer(3).select(shuffle).groups() == 1
    assert layer(3).select(shuffle).select(back).then(layer(3)).groups() == 3


def test_halves_computed_apart_and_joined_are_two_groups():
    halves = [layer(12).select(range(6)).then(layer(1, 6, 6)), layer(12).select(range(6, 12)).then(layer(1, 6, 6))]
    assert Windows.concat(halves).groups() == 2
    assert Windows.concat(halves[::-1]).groups() == 1


def test_thousands_of_channels_are_never_walked_in_python():
    """4096 channels, four at a time: a loop over channels would pass over thousands of lines."""
    passed = 0

    def count(_frame, event, _argument):
        nonlocal passed
        passed += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        wide, mixed = layer(1, 4096, 4096), layer(1024, 4096, 4096)
        composed = wide.then(wide).then(mixed).union(wide).select(range(4095, -1, -1))
        assert composed.groups() == 1 and mixed.then(mixed).groups() == 1024
    finally:
        sys.settrace(before)
    assert 0 < passed < 2048


def test_groups_divide_both_ends():
    """Three blocks of four outputs and two inputs hold these windows, and leave two of the eight inputs over."""
    start = np.arange(12) // 4 * 2
    assert Windows(start, start + 2, 8).groups() == 1
    assert Windows(start, start + 2, 6).groups() == 3
    across = np.arange(8) // 2 * 3
    assert Windows(across, across + 3, 12).groups() == 4
    assert Windows(np.arange(8) // 4 * 4, np.arange(8) // 4 * 4 + 4, 12).groups() == 1
