"""Where two networks first differ."""

from __future__ import annotations

import copy

import pytest
import torch
from support.folded import example, folded, network
from torch import nn

from repfuse.checking.inputs import Trial
from repfuse.checking.locate import first_difference
from repfuse.checking.verification import verify


def find(original: nn.Module, fused: nn.Module, inputs=None):
    return first_difference(original, fused, Trial("the example", inputs or example()))


class Branches(nn.Module):
    """Two convolutions of the same input, added; fused, the first holds both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.fused = False

    def forward(self, x):
        return self.first(x) if self.fused else self.first(x) + self.second(x)


def merged(block: Branches) -> Branches:
    result = copy.deepcopy(block)
    with torch.no_grad():
        result.first.weight += block.second.weight
        result.first.bias += block.second.bias
    result.fused = True
    del result.second
    return result


def corrupt(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight[:, :, 1, 1] += 0.1


def test_networks_that_agree_differ_nowhere():
    original = network(3)
    assert find(original, original) is None
    assert find(original, folded(original)) is None


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_the_layer_that_is_wrong_is_named_and_not_the_folded_ones_before_it(layer):
    original = network(6)
    fused = folded(original)
    corrupt(fused[0][3 * layer])
    found = find(original, fused)
    assert found is not None
    assert (found.path, found.after) == (f"0.{3 * layer}", f"0.{3 * layer - 1}" if layer else "")


def test_a_branch_that_took_in_its_neighbour_is_right_where_the_block_agrees():
    original = nn.Sequential(Branches(), nn.ReLU(inplace=True), Branches(), nn.ReLU(inplace=True))
    fused = nn.Sequential(merged(original[0]), nn.ReLU(inplace=True), merged(original[2]), nn.ReLU(inplace=True))
    assert find(original, fused) is None
    corrupt(fused[2].first)
    found = find(original, fused)
    assert found is not None
    assert (found.path, found.after) == ("2.first", "1")


def test_a_module_is_followed_through_each_of_its_calls():
    class Twice(nn.Module):
        def __init__(self, second: float) -> None:
            super().__init__()
            self.conv = Branches()
            self.second = second

        def forward(self, x):
            return self.conv(self.conv(x) * self.second)

    original, wrong = Twice(1.0), Twice(1.1)
    wrong.load_state_dict(original.state_dict())
    found = find(original, wrong)
    assert found is not None
    assert (found.path, found.after) == ("conv.first", "conv")  # the second call's, after the first call's block


def test_networks_with_no_module_in_common_differ_nowhere_that_can_be_named():
    original = network(1)
    assert find(original, nn.ModuleDict({"other": original})["other"]) is None
    assert find(original, Branches()) is None


def test_a_border_is_seen_in_a_large_output():
    original = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU())
    wrong = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, padding_mode="replicate"), nn.ReLU())
    wrong.load_state_dict(original.state_dict())
    found = find(original, wrong, example(size=96))
    assert found is not None and found.path == "0"


def test_a_network_that_gives_nothing_but_zeros_is_different_and_the_layer_is_named():
    """Relative to zeros every rounding is infinite: it counts relative to the original."""
    original = network(3)
    fused = folded(original)
    nn.init.zeros_(fused[-1].weight)
    nn.init.zeros_(fused[-1].bias)
    seen = verify(original, fused, example())
    assert seen.verdict == "different"
    assert seen.first_difference is not None and seen.first_difference.path == "3"
