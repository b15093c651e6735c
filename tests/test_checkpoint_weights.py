"""State dicts go into networks strictly, in their own dtypes, and with the network's ties."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repfuse.checkpoint.weights import load_weights, match_dtype
from repfuse.errors import RepfuseError

PATH = Path("x.pt")


class Tied(nn.Module):
    """Two names for one weight, and a buffer that is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3, bias=False)
        self.two = nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.two(self.one(x))) * self.scale


def filled(state: dict[str, Tensor]) -> tuple[Tied, tuple[str, ...]]:
    network = Tied().eval()
    match_dtype(network, state)
    return network, load_weights(network, OrderedDict(state), PATH, "Tied")


def fresh(dtype: torch.dtype = torch.float32) -> Tied:
    return Tied().to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nothing_is_cast(dtype: torch.dtype) -> None:
    original = fresh(dtype)
    network, notes = filled(original.state_dict())
    x = torch.randn(2, 3, dtype=dtype)
    assert network(x).dtype == dtype  # so the non-persistent buffer has it too
    assert torch.equal(network(x), original(x))
    assert {name: t.dtype for name, t in network.state_dict().items()} == {
        name: t.dtype for name, t in original.state_dict().items()
    }
    assert not notes


def test_mixed_dtypes_stay_mixed() -> None:
    state = fresh().state_dict()
    state["norm.weight"] = state["norm.weight"].double()
    network, _ = filled(state)
    assert network.norm.weight.dtype == torch.float64
    assert network.norm.bias.dtype == torch.float32


def test_requires_grad_and_strides_stay() -> None:
    built, state = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last).state_dict()
    built.bias.requires_grad_(False)
    load_weights(built, state, PATH, "conv")
    assert built.weight.requires_grad
    assert not built.bias.requires_grad
    assert built.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_tie_stays_a_tie() -> None:
    network, notes = filled(fresh().state_dict())
    assert network.one.weight is network.two.weight
    assert not notes


@pytest.mark.parametrize("absent", ["one.weight", "two.weight"])
def test_a_tied_weight_may_be_in_the_file_once(absent: str) -> None:
    state = fresh().state_dict()
    expected = state.pop(absent)
    network, notes = filled(state)
    assert network.one.weight is network.two.weight
    assert torch.equal(network.one.weight, expected)
    assert absent in notes[0]


def test_ties_that_differ_in_the_file_are_kept_apart_and_said() -> None:
    state = fresh().state_dict()
    state["two.weight"] = state["two.weight"] + 1
    network, notes = filled(state)
    assert torch.equal(network.two.weight, state["two.weight"])
    assert torch.equal(network.one.weight, state["one.weight"])
    assert "one.weight and two.weight" in notes[0]


def mismatch(state: dict[str, Tensor]) -> RepfuseError:
    with pytest.raises(RepfuseError, match="do not fit") as error:
        filled(state)
    assert error.value.exit_code == 2
    return error.value


def test_a_mismatch_lists_missing_unexpected_and_wrong_shaped_names() -> None:
    state = fresh().state_dict()
    del state["norm.bias"]
    state["extra"] = torch.ones(1)
    state["norm.weight"] = torch.ones(5)
    why = mismatch(state).why
    assert "1 missing from the file: norm.bias" in why
    assert "1 unexpected in the file: extra" in why
    assert "norm.weight (5 in the file, 3 in the network)" in why


def test_long_lists_are_cut() -> None:
    why = mismatch({f"layer{i}.weight": torch.ones(1) for i in range(500)}).why
    assert "500 unexpected" in why
    assert "and 494 more" in why
    assert len(why) < 1000


def test_a_few_wrong_shapes_point_at_the_arguments() -> None:
    state = fresh().state_dict()
    state["norm.weight"] = torch.ones(5)
    assert "num_classes" in mismatch(state).hint
