"""State dicts go into networks strictly, in their own dtypes, and with the network's ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repfuse import RepfuseError, load


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


def frozen_bias() -> nn.Module:
    network = nn.Conv2d(4, 4, 3)
    network.bias.requires_grad_(False)
    return network


def filled(state: dict[str, Tensor], folder: Path, model: str = "Tied") -> tuple[Any, tuple[str, ...]]:
    torch.save(state, folder / "x.pt")
    checkpoint = load(folder / "x.pt", model=f"{__name__}:{model}", input="1x3")
    return checkpoint.module, checkpoint.notes


def fresh(dtype: torch.dtype = torch.float32) -> Tied:
    return Tied().to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nothing_is_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    original = fresh(dtype)
    network, notes = filled(original.state_dict(), tmp_path)
    x = torch.randn(2, 3, dtype=dtype)
    assert network(x).dtype == dtype  # so the non-persistent buffer has it too
    assert torch.equal(network(x), original(x))
    assert {name: t.dtype for name, t in network.state_dict().items()} == {
        name: t.dtype for name, t in original.state_dict().items()
    }
    assert not notes


def test_mixed_dtypes_stay_mixed(tmp_path: Path) -> None:
    state = fresh().state_dict()
    state["norm.weight"] = state["norm.weight"].double()
    network, _ = filled(state, tmp_path)
    assert network.norm.weight.dtype == torch.float64
    assert network.norm.bias.dtype == network.scale.dtype == torch.float32


def test_requires_grad_and_strides_stay(tmp_path: Path) -> None:
    state = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last).state_dict()
    built, _ = filled(state, tmp_path, "frozen_bias")
    assert built.weight.requires_grad
    assert not built.bias.requires_grad
    assert built.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_tie_stays_a_tie(tmp_path: Path) -> None:
    network, notes = filled(fresh().state_dict(), tmp_path)
    assert network.one.weight is network.two.weight
    assert not notes


@pytest.mark.parametrize("absent", ["one.weight", "two.weight"])
def test_a_tied_weight_may_be_in_the_file_once(absent: str, tmp_path: Path) -> None:
    state = fresh().state_dict()
    expected = state.pop(absent)
    network, notes = filled(state, tmp_path)
    assert network.one.weight is network.two.weight
    assert torch.equal(network.one.weight, expected)
    assert absent in notes[0]


def test_ties_that_differ_in_the_file_are_kept_apart_and_said(tmp_path: Path) -> None:
    state = fresh().state_dict()
    state["two.weight"] = state["two.weight"] + 1
    network, notes = filled(state, tmp_path)
    assert torch.equal(network.two.weight, state["two.weight"])
    assert torch.equal(network.one.weight, state["one.weight"])
    assert "one.weight and two.weight" in notes[0]


def mismatch(state: dict[str, Tensor], folder: Path) -> RepfuseError:
    with pytest.raises(RepfuseError, match="do not fit") as error:
        filled(state, folder)
    assert error.value.exit_code == 2
    return error.value


def test_a_mismatch_lists_missing_unexpected_and_wrong_shaped_names(tmp_path: Path) -> None:
    state = fresh().state_dict()
    del state["norm.bias"]
    state["extra"] = torch.ones(1)
    state["norm.weight"] = torch.ones(5)
    why = mismatch(state, tmp_path).why
    assert "1 missing from the file: norm.bias" in why
    assert "1 unexpected in the file: extra" in why
    assert "norm.weight (5 in the file, 3 in the network)" in why


def test_long_lists_are_cut(tmp_path: Path) -> None:
    why = mismatch({f"layer{i}.weight": torch.ones(1) for i in range(500)}, tmp_path).why
    assert "500 unexpected" in why
    assert "and 494 more" in why
    assert len(why) < 1000


def test_a_few_wrong_shapes_point_at_the_arguments(tmp_path: Path) -> None:
    state = fresh().state_dict()
    state["norm.weight"] = torch.ones(5)
    assert "num_classes" in mismatch(state, tmp_path).hint
