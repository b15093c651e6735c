"""What rounding to few bits leaves of weights: its laws, and what is said of the kernels of a network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLES, Cli
from hypothesis import given
from hypothesis import strategies as st
from support.agreement import randomised
from torch import Tensor, nn

from repfuse import fuse, plan
from repfuse.quantization import (
    SiteKernels,
    failing,
    kernel,
    kernels,
    needed,
    ranges,
    rounded,
    signal_to_noise,
    together,
)
from repfuse.samples import DigitsRepVGG, RepVGGBlock

DIGITS = SAMPLES / "repvgg_digits.pt"

weights = st.builds(
    lambda seed, shape, spread: (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * torch.logspace(0, -spread, shape[0], dtype=torch.float64).reshape(-1, *(1 for _ in shape[1:]))
    ),
    st.integers(0, 2**32),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 4),
)
few = st.integers(2, 16)
ENOUGH = 10.0  # dB of all layers: `repfuse explain int8`
axes = st.sampled_from([None, 0])


@given(weights, few, axes)
def test_rounding_is_by_half_a_step_at_most_to_so_many_numbers(weight: Tensor, bits: int, axis: int | None) -> None:
    found = rounded(weight, bits, axis)
    largest = weight.abs().flatten(1).amax(1) if axis == 0 and weight.dim() > 1 else weight.abs()
    largest = (largest if axis == 0 else weight.abs().max().expand(len(weight))).reshape(
        -1, *(1 for _ in weight.shape[1:])
    )
    step = largest / (2 ** (bits - 1) - 1)
    assert ((found - weight).abs() <= step / 2 * (1 + 1e-12)).all()
    assert len({round(number) for number in (found / step).flatten().tolist()}) <= 2**bits - 1
    assert torch.allclose(rounded(found, bits, axis), found, rtol=1e-12, atol=0)  # it is a projection


@given(weights, few, axes, st.integers(-20, 20))
def test_rounding_knows_no_scale_and_no_sign(weight: Tensor, bits: int, axis: int | None, power: int) -> None:
    assert torch.equal(rounded(-weight, bits, axis), -rounded(weight, bits, axis))
    assert torch.equal(rounded(weight * 2.0**power, bits, axis), rounded(weight, bits, axis) * 2.0**power)


@given(weights, few, st.integers(0, 2**32))
def test_per_channel_rounding_knows_no_scale_of_a_channel(weight: Tensor, bits: int, seed: int) -> None:
    powers = torch.randint(-9, 9, (len(weight),), generator=torch.Generator().manual_seed(seed))
    scale = torch.pow(2.0, powers.double()).reshape(-1, *(1 for _ in weight.shape[1:]))
    assert torch.equal(rounded(weight * scale, bits, 0), rounded(weight, bits, 0) * scale)


@given(weights, few)
def test_it_is_the_rounding_of_torch(weight: Tensor, bits: int) -> None:
    weight, top = weight.float(), 2 ** (bits - 1) - 1
    step = float(weight.abs().max()) / top
    assert torch.allclose(
        rounded(weight, bits), torch.fake_quantize_per_tensor_affine(weight, step, 0, -top, top), atol=1.01 * step
    )
    ours = signal_to_noise(weight, rounded(weight, bits))
    theirs = signal_to_noise(weight, torch.fake_quantize_per_tensor_affine(weight, step, 0, -top, top))
    assert ours == theirs or math.isclose(ours, theirs, abs_tol=0.5)  # ties apart


def test_what_is_zero_stays_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -0.3]])
    for axis in (None, 0):
        assert torch.equal(rounded(weight, 8, axis)[0], weight[0])
    assert torch.equal(rounded(torch.zeros(3), 8), torch.zeros(3))
    assert signal_to_noise(torch.zeros(3), torch.zeros(3)) == math.inf
    assert signal_to_noise(torch.zeros(3), torch.ones(3)) == -math.inf
    assert kernel(torch.zeros(2, 3)).spread == math.inf


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_signal_to_noise_is_in_decibels(size: float, noise: float) -> None:
    signal = torch.full((4,), size, dtype=torch.float64)
    found = signal_to_noise(signal, signal + noise)
    assert math.isclose(found, 20 * math.log10(size / noise), abs_tol=1e-6)


@given(st.lists(st.floats(-20, 80), min_size=1, max_size=50), st.integers(1, 500))
def test_noises_add_up(levels: list[float], layers: int) -> None:
    whole = together(levels)
    assert whole <= min(levels) + 1e-9
    assert whole >= min(levels) - 10 * math.log10(len(levels)) - 1e-9
    assert math.isclose(together([needed(layers)] * layers), ENOUGH)
    assert together([]) == together([math.inf]) == math.inf


def test_ranges_are_those_of_the_channels() -> None:
    weight = torch.tensor([[[1.0, -3.0]], [[0.5, 0.0]]])
    assert ranges(weight).tolist() == [3.0, 0.5]
    assert ranges(weight, -1).tolist() == [1.0, 3.0]
    assert kernel(torch.arange(1.0, 6.0)[:, None]).ranges == (1, 2, 3, 4, 5)
    assert kernel(torch.tensor([[2.0], [1.0]])).ranges == (1, 1, 1, 2, 2)  # of an even number, the one below


class Grouped(nn.Module):
    """A sum of transposed convolutions, of which PyTorch stores the input channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2)
        self.b = nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def _examined(network: nn.Module, *shape: int) -> tuple[tuple[SiteKernels, ...], nn.Module]:
    result = fuse(network, (torch.randn(shape),))
    return kernels(network, result.plan), result.module


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (RepVGGBlock(4, 4), (1, 4, 6, 6)),
        (Grouped(), (1, 4, 5, 5)),
        (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), (2, 3)),
    ],
)
def test_the_kernel_after_the_merge_is_the_one_that_is_written(network: nn.Module, shape: tuple[int, ...]) -> None:
    network = randomised(network, dtype=torch.float32)
    (found,), fused = _examined(network, *shape)
    stored = next(x for name, x in fused.named_parameters() if name.endswith("weight")).detach()
    if isinstance(network, Grouped):  # [4, 3, ...] in two groups: six output channels
        stored = stored.unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
    written = kernel(stored)
    assert found.after.ranges == pytest.approx(written.ranges, rel=1e-6)
    for ours, theirs in zip(found.after.rounded, written.rounded, strict=True):
        assert ours.per_channel == pytest.approx(theirs.per_channel, abs=0.05)
        assert ours.per_tensor == pytest.approx(theirs.per_tensor, abs=0.05)


def test_before_is_the_stored_weight_that_rounding_hurts_most() -> None:
    network = randomised(RepVGGBlock(4, 4), dtype=torch.float32)
    with torch.no_grad():
        network.conv1[0].weight[0] *= 1000
    (found,), _ = _examined(network, 1, 4, 6, 6)
    assert found.replaced == "conv1.0.weight"
    stored = network.conv1[0].weight.detach()
    assert found.before.at(8).per_tensor == pytest.approx(kernel(stored).at(8).per_tensor, abs=1e-3)


def test_a_channel_that_is_scaled_up_makes_its_site_the_worst_per_tensor_alone() -> None:
    network = randomised(DigitsRepVGG(), dtype=torch.float32)
    before, _ = _examined(network, 1, 1, 8, 8)
    path = before[-1].path
    block = network.get_submodule(path.removesuffix(".fused"))
    with torch.no_grad():
        for norm in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight[3] *= 1000
    after, _ = _examined(network, 1, 1, 8, 8)
    ours, own = (next(site for site in found if site.path == path).after for found in (after, before))
    assert ours.ranges[4] > 100 * own.ranges[4] and ours.spread > 100
    assert [site.path for site in failing(after, 8)] == [path] and not failing(before, 8)
    assert ours.at(8).per_tensor < ENOUGH < own.at(8).per_tensor
    assert ours.at(8).per_channel == pytest.approx(own.at(8).per_channel, abs=3)


@given(st.integers(1, 7), st.floats(-9, 9), st.sampled_from([8, 4]))
def test_each_channel_counts_alike_but_dead_ones(number: int, power: float, bits: int) -> None:
    """As long as each is rounded by itself, the size of a channel makes no difference, nor do channels next to 0."""
    weight = torch.randn((8, 4, 3, 3), generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    own = kernel(weight).at(bits)
    scaled = torch.cat([weight[:number] * 2.0 ** round(power), weight[number:]])
    assert math.isclose(kernel(scaled).at(bits).per_channel, own.per_channel, rel_tol=1e-9)
    dead = torch.cat([weight, weight[:3] * 1e-12, 0 * weight[:2]])
    assert math.isclose(kernel(dead).at(bits).per_tensor, own.per_tensor)
    assert kernel(weight * 0).at(bits).per_tensor == math.inf


def test_the_order_is_by_what_is_left_and_failing_is_what_has_too_little() -> None:
    network = torch.load(DIGITS, weights_only=False)
    found, _ = _examined(network, 1, 1, 8, 8)
    levels = [site.after.at(8).per_tensor for site in found]
    assert levels == sorted(levels)
    assert failing(found, 8) == []
    assert [site.path for site in failing(found, 4)] == [f"blocks.{index}.fused" for index in (3, 4, 1, 2)]
    assert all(site.after.at(4).per_tensor < site.before.at(4).per_tensor for site in found)
    # What is measured of the outputs with 4 bits per tensor, see `verify --bits 4`, is 3.1 dB.
    assert together([site.after.at(4).per_tensor for site in found]) == pytest.approx(0.67, abs=0.1)


def test_numbers_that_are_none_are_left_out() -> None:
    network = randomised(RepVGGBlock(4, 4), dtype=torch.float32)
    with torch.no_grad():
        network.conv3[0].weight[0, 0, 0, 0] = math.nan
    made = plan(network, (torch.randn(1, 4, 6, 6),))
    assert len(made.sites) == 1 and kernels(network, made) == ()
    assert kernels(nn.ReLU(), plan(nn.ReLU(), (torch.randn(1, 3),))) == ()


# What people see.


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits classifier with a channel that is scaled up in one block, and down again in the next."""
    path = tmp_path_factory.mktemp("bad") / "bad.pt"
    network = torch.load(DIGITS, weights_only=False)
    with torch.no_grad():
        first, second = network.blocks[3], network.blocks[4]
        for norm in (first.conv3[1], first.conv1[1], first.skip):
            norm.weight[0] *= 3000
            norm.bias[0] *= 3000
        for norm in (second.conv3[0], second.conv1[0]):
            norm.weight[:, 0] /= 3000
        second.skip.running_mean[0] *= 3000
        second.skip.running_var[0] *= 3000**2
    torch.save(network, path)
    return path


def test_inspect_says_in_a_line_what_8_bits_would_ruin(cli: Cli, bad: Path, tmp_path: Path) -> None:
    told = cli("inspect", bad, columns=80).stdout
    line = next(line for line in told.splitlines() if line.startswith("  int8"))
    assert line.startswith("  int8     8 bits per tensor leave about ")
    assert "worst: blocks.3.fused" in " ".join(told.split()) and "repfuse explain int8" in " ".join(told.split())
    assert "Kernels with few bits" not in told
    out = cli("convert", bad, tmp_path / "out.pt", "--quick", columns=80).stdout
    assert "int8" in out and "8 bits per tensor leave" in " ".join(out.split())
    assert (
        "int8" not in cli("convert", DIGITS, tmp_path / "good.pt", "--quick", columns=80).stdout
    )  # 8 bits do no harm there


def test_details_are_a_table_that_fits_and_the_report_has_it_all(cli: Cli, bad: Path, tmp_path: Path) -> None:
    told = cli("inspect", bad, "-v", columns=80).stdout
    assert max(map(len, told.splitlines())) <= 80
    rows = [line.split() for line in told.splitlines() if line.startswith("  blocks.") and len(line.split()) > 6]
    assert rows[0][0] == "blocks.3.fused" and len(rows) == 5
    data: Any = json.loads(cli("inspect", bad, "--json").stdout)
    worst = data["quantization"][0]
    assert worst["path"] == "blocks.3.fused" and len(worst["after"]["ranges"]) == 5
    assert [each["bits"] for each in worst["after"]["rounded"]] == [8, 4]
    assert worst["after"]["ranges"][4] > 100 * worst["after"]["ranges"][2]
    assert worst["after"]["rounded"][0]["per_channel"] > 20 + worst["after"]["rounded"][0]["per_tensor"]
    out = tmp_path / "out.pt"
    assert cli("convert", bad, out, "--quick", "--report", tmp_path / "out.html").returncode == 0
    assert 'id="kernels"' in (tmp_path / "out.html").read_text()
    assert json.loads(Path(f"{out}.report.json").read_text())["quantization"] == data["quantization"]
