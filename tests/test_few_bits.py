"""`verify --bits`: what rounded weights do to both networks. It is told, and decides nothing."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLES, Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.agreement import randomised
from torch import Tensor, nn

from repfuse import RepfuseError, fuse, verify
from repfuse.checking.few_bits import few_bits, weights
from repfuse.checking.inputs import Trial
from repfuse.quantization import rounded, signal_to_noise
from repfuse.samples import DigitsRepVGG

DIGITS, HELD_OUT = SAMPLES / "repvgg_digits.pt", SAMPLES / "digits_heldout.safetensors"


def _by_hand(network: nn.Module, x: Tensor, bits: int, axis: int | None, only: str | None = None) -> float:
    """Round the weights of convolutions and linear layers in a copy of a network, and run both."""
    exact = copy.deepcopy(network).double().eval()
    changed = copy.deepcopy(exact)
    for name, module in changed.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and only in (None, name):
            weight = rounded(module.weight.detach(), bits, axis).float()  # as it is stored
            module.weight = nn.Parameter(weight.double())
    with torch.no_grad():
        return signal_to_noise(exact(x.double()), changed(x.double()))


@settings(max_examples=4)
@given(st.integers(0, 2**32), st.integers(2, 16))
def test_it_is_what_one_gets_by_hand(seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    original = randomised(DigitsRepVGG(width=4), dtype=torch.float32)
    x = torch.rand(5, 1, 8, 8)
    fused = fuse(original, (x,)).module
    found = few_bits(original, fused, Trial("x", (x,)), bits)
    assert found is not None and found.weights == (11, 6)
    for way, axis in zip(found.ways, (None, 0), strict=True):
        assert way.original == pytest.approx(_by_hand(original, x, bits, axis), abs=1e-3)
        assert way.fused == pytest.approx(_by_hand(fused, x, bits, axis), abs=1e-3)
    levels = [each.level for each in found.layers]
    assert levels == sorted(levels) and len(levels) == 6
    worst = found.layers[0]
    assert worst.level == pytest.approx(_by_hand(fused, x, bits, None, worst.path), abs=1e-3)


def test_more_bits_are_better_and_all_of_them_are_enough() -> None:
    network = torch.load(DIGITS, weights_only=False)
    x = load_file(HELD_OUT)["inputs"][:8]
    fused = fuse(network, (x,)).module
    levels = []
    for bits in (4, 8, 12, 16):
        found = few_bits(network, fused, Trial("x", (x,)), bits)
        assert found is not None
        levels.append([way.fused for way in found.ways])
    assert levels == sorted(levels) and min(levels[-1]) > 60
    assert all(channel > tensor for tensor, channel in levels)


def test_networks_are_not_changed_and_one_that_does_not_run_has_no_answer() -> None:
    network = torch.load(DIGITS, weights_only=False)
    before = copy.deepcopy(network.state_dict())
    assert few_bits(network, network, Trial("x", (torch.rand(1, 1, 8, 8),)), 4) is not None
    assert all(torch.equal(x, network.state_dict()[name]) for name, x in before.items())
    assert few_bits(network, network, Trial("x", (torch.rand(1, 2, 8, 8),)), 4) is None


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 1)
        self.linear = nn.Linear(3, 1)
        self.transposed = nn.ConvTranspose2d(2, 3, 2)
        self.depthwise = nn.Conv2d(3, 3, 1, groups=3)
        self.norm = nn.BatchNorm2d(3)
        self.layer_norm = nn.LayerNorm([3, 4])
        self.table = nn.Embedding(5, 3)
        self.position = nn.Parameter(torch.randn(1, 5, 3))
        self.scale = nn.Parameter(torch.randn(3, 1, 1))
        self.kernel = nn.Parameter(torch.randn(3, 2, 1))
        self.register_buffer("laplacian", torch.randn(3, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_weights_are_those_of_layers_not_of_norms_and_tables() -> None:
    axes = {"conv": 0, "linear": 0, "transposed": 1, "depthwise": 0}
    assert dict(weights(Many())) == {"kernel": 0} | {f"{name}.weight": axis for name, axis in axes.items()}


def test_weights_of_an_exported_program_are_found() -> None:
    network = DigitsRepVGG().eval()
    program = torch.export.export(network, (torch.rand(1, 1, 8, 8),)).module()
    assert len(dict(weights(program))) == len(dict(weights(network))) == 11


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 64])
def test_other_bits_are_refused_before_anything_runs(bits: int, cli: Cli) -> None:
    with pytest.raises(RepfuseError, match="cannot be rounded"):
        verify(nn.ReLU(), nn.ReLU(), ("no input",), bits=bits)
    done = cli("verify", DIGITS, DIGITS, "--bits", str(bits))
    assert done.returncode == 2 and "--bits" in done.stderr and not done.stdout


def test_the_command_says_it_and_keeps_its_verdict(cli: Cli, digits_fused: Path, tmp_path: Path) -> None:
    data, wrong = ("--data", HELD_OUT, "--quick"), tmp_path / "wrong.pt"
    told = cli("verify", DIGITS, digits_fused, "--bits", "4", *data, columns=80)
    assert told.returncode == 0 and max(map(len, told.stdout.splitlines())) <= 80
    said = " ".join(told.stdout.split())
    assert "With weights of 4 bits" in said and "accuracy 95.0 % → 71.9 %" in said and "98.9 % → 91.7 %" in said
    assert "costs most blocks.4.fused" in said
    assert "bits" not in cli("verify", DIGITS, digits_fused, *data).stdout
    network = torch.load(digits_fused, weights_only=False)
    with torch.no_grad():
        network.blocks[2].fused.weight[0] += 0.1
    torch.save(network, wrong)
    done = cli("verify", DIGITS, wrong, "--bits", "8", "--json", *data)
    document: Any = json.loads(done.stdout)
    assert done.returncode == 1 and document["verdict"] == "different" and document["few_bits"]["bits"] == 8
    assert document["few_bits"]["ways"][0]["accuracy_original"] == pytest.approx(0.997, abs=1e-3)


def test_a_page_tells_it(cli: Cli, digits_fused: Path, tmp_path: Path) -> None:
    said, page = tmp_path / "verify.json", tmp_path / "page.html"
    said.write_text(cli("verify", DIGITS, digits_fused, "--bits", "4", "--quick", "--json").stdout)
    assert cli("report", f"{digits_fused}.report.json", said, "--html", page).returncode == 0
    assert "4 bits, per channel" in page.read_text()


def test_what_cannot_be_rounded_is_as_it_is() -> None:
    found = few_bits(nn.ReLU(), nn.ReLU(), Trial("x", (torch.rand(3),)), 4)
    assert found is not None and found.weights == (0, 0) and found.ways[0].fused == math.inf
