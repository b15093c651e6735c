"""`--keep-affine`: the branches merge, and a BatchNorm stays behind the convolution. The network is the same."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from blocks import CASES
from conftest import SAMPLES, Cli
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from support.agreement import error, image, randomised
from support.check import check, check_in
from support.onnx_models import kinds
from support.programs import STEPS, Step
from support.proving import prove_sites
from test_blocks import check_sizes, made
from test_random_graphs import ALSO, DTYPES, FEW, IMAGE, LONG, MANY, POLICIES, QUICK, SHAPES
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from repfuse import Plan, RepfuseError, convert, fuse, load, plan, rewrite, save, verify
from repfuse.planning.replaying import Choice
from repfuse.plans import Policy
from repfuse.quantization import kernels, ranges
from repfuse.samples import DigitsMobileOne, DigitsRepVGG, RepVGGBlock

DIGITS, HELD_OUT = SAMPLES / "repvgg_digits.pt", SAMPLES / "digits_heldout.safetensors"


def norms_of(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


# The law: whatever merges, merges with a norm behind it, and is the same map.


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.name, marks=() if i % 12 == 0 else pytest.mark.slow) for i, r in enumerate(CASES)]
)
def test_each_block_computes_the_same(row: Any) -> None:
    original, example = made(row), row.at(row.side)
    result = fuse(original, example, row.policy, keep_affine=True)
    check_sizes(row, original, result.module)
    for proof in prove_sites(original, result.module, result.plan):
        assert proof.passed, proof.reason


OF_TWO_SOURCES = (
    Step("conv"),
    Step("conv"),
    Step("branches", digits=(1, *(0,) * 13), inner=(Step("kept"), Step("filled", digits=(0, 0, 0, 1, 3, *(0,) * 9)))),
    Step("conv", reads=(1, 0, 0)),
)
"""A sum of two tensors' convolutions, one of which has no more than two operations."""


@POLICIES
@QUICK
@given(STEPS, SHAPES, ALSO)
@example(OF_TWO_SOURCES, IMAGE, [])
def test_random_networks(policy: Policy, steps: Any, shapes: Any, also: Any) -> None:
    event(str(dict(check(steps, shapes, also, policy, keep_affine=True))))


@pytest.mark.slow
@POLICIES
@LONG
@given(STEPS, SHAPES, ALSO)
def test_many_random_networks(policy: Policy, steps: Any, shapes: Any, also: Any) -> None:
    check(steps, shapes, also, policy, keep_affine=True)


@DTYPES
@FEW
@given(STEPS, SHAPES, st.sampled_from(Policy))
def test_random_conversions(dtype: torch.dtype, steps: Any, shapes: Any, policy: Policy) -> None:
    check_in(dtype, steps, shapes, policy, keep_affine=True)


@pytest.mark.slow
@DTYPES
@MANY
@given(STEPS, SHAPES, st.sampled_from(Policy))
def test_many_random_conversions(dtype: torch.dtype, steps: Any, shapes: Any, policy: Policy) -> None:
    check_in(dtype, steps, shapes, policy, keep_affine=True)


class Sum(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.branches
        return first(x) + second(x) + third(x)


KINDS: list[tuple[str, nn.Module, tuple[int, ...], type[nn.Module]]] = [
    ("1d", Sum(*(nn.Conv1d(4, 6, 3, padding=1) for _ in range(3))), (2, 4, 9), nn.BatchNorm1d),
    ("2d", Sum(*(nn.Conv2d(4, 6, 3, padding=1, groups=2) for _ in range(3))), (2, 4, 6, 5), nn.BatchNorm2d),
    ("3d", Sum(*(nn.Conv3d(2, 3, 3, padding=1) for _ in range(3))), (2, 2, 5, 4, 6), nn.BatchNorm3d),
    ("linear", Sum(*(nn.Linear(4, 6) for _ in range(3))), (5, 4), nn.BatchNorm1d),
    ("transposed", Sum(*(nn.ConvTranspose2d(4, 6, 2, groups=2) for _ in range(3))), (2, 4, 5, 5), nn.BatchNorm2d),
    ("odd", Sum(*(nn.Conv2d(4, 6, 2, padding="same") for _ in range(3))), (2, 4, 6, 5), nn.BatchNorm2d),
]


@pytest.mark.parametrize(("network", "shape", "kind"), [row[1:] for row in KINDS], ids=[row[0] for row in KINDS])
def test_the_norm_is_of_the_right_kind_and_has_the_scale_of_each_channel(
    network: nn.Module, shape: tuple[int, ...], kind: type[nn.Module]
) -> None:
    network = randomised(network)
    fused = fuse(network, (image(*shape),), keep_affine=True).module
    (norm,) = norms_of(fused)
    (layer,) = (module for module in fused.modules() if isinstance(module, _ConvNd | nn.Linear))
    assert type(norm) is kind and layer.bias is None and not fused.training
    assert error(network, fused, image(*shape, seed=1)) < 1e-12
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(ranges(weight), torch.ones(len(weight), dtype=torch.float64))
    own = fuse(network, (image(*shape),)).module
    plain = next(module for module in own.modules() if isinstance(module, _ConvNd | nn.Linear)).weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        plain = plain.unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(norm.weight / (1 + norm.eps) ** 0.5, ranges(plain))  # type: ignore[operator]
    assert not norm.running_mean.any() and (norm.running_var == 1).all()  # type: ignore[union-attr]


def test_where_no_batch_norm_can_follow_the_merge_is_plain() -> None:
    network = randomised(Sum(*(nn.Linear(4, 6) for _ in range(3))))
    for shape in ((2, 7, 4), (2, 3, 7, 4), (4,)):  # of tokens, which have their channels on the last axis
        result = fuse(network, (image(*shape),), keep_affine=True)
        assert len(result.plan.sites) == 1 and not norms_of(result.module)
        assert error(network, result.module, image(*shape, seed=1)) < 1e-12


class Tokens(nn.Module):
    """LeViT's layer: a norm over the rows of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


def test_a_norm_that_no_other_could_stand_for_stays() -> None:
    network, x = randomised(Tokens()), image(2, 7, 4)
    assert len(fuse(network, (x,)).plan.sites) == 1
    kept = fuse(network, (x,), keep_affine=True)
    assert not kept.plan.sites and torch.equal(kept.module.bn.running_var, network.bn.running_var)


class TwoSources(nn.Module):
    """A sum of a convolution with its norm, and of branches of another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = RepVGGBlock(4, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.first(x), torch.relu(self.second(x))
        return torch.relu(self.bn(self.conv(y)) + self.a(z) + self.b(z))


def test_a_sum_of_several_tensors_keeps_a_norm_for_each() -> None:
    network, x = randomised(TwoSources()), image(1, 4, 8, 8)
    result = fuse(network, (x,), keep_affine=True, keep_class=False)
    assert len(result.plan.sites) == 2 and len(norms_of(result.module)) == 3  # one of them is its own
    assert error(network, result.module, image(2, 4, 9, 7, seed=1)) < 1e-12
    assert all(proof.passed for proof in prove_sites(network, result.module, result.plan))


def test_a_convolution_with_its_own_norm_stays_as_it_is() -> None:
    own = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), RepVGGBlock(4, 4))
    network = randomised(own)
    result = fuse(network, (image(1, 4, 8, 8),), keep_affine=True)
    assert [site.owner for site in result.plan.sites] == ["3"]
    assert torch.equal(result.module[0].weight, network[0].weight)
    assert torch.equal(result.module[1].running_var, network[1].running_var)
    alone = fuse(network[:2], (image(1, 4, 8, 8),), keep_affine=True)
    assert not alone.plan.sites and not alone.plan.refusals


def test_a_computed_weight_becomes_a_plain_one_and_its_norm_stays() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    for network, norms in ((layer, 0), (nn.Sequential(layer, nn.BatchNorm2d(6)), 1)):
        given = randomised(network)
        result = fuse(given, (image(1, 4, 8, 8),), keep_affine=True)
        assert len(norms_of(result.module)) == norms and len(result.plan.sites) == 1
        assert not any("parametrizations" in name for name, _ in result.module.named_modules())
        assert error(given, result.module, image(2, 4, 9, 7, seed=1)) < 1e-12


class Rows(nn.Module):
    """A pad and a convolution, and a norm, of which the names stay."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d(1)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(6, eps=1e-3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(self.pad(x))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.conv, self.bn = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(self.before(x))))


@pytest.mark.parametrize("network", [Rows(), Twice()], ids=["swap", "fold"])
def test_a_norm_that_ends_a_row_of_modules_stays_in_its_place(network: nn.Module) -> None:
    network = randomised(network)
    result = fuse(network, (image(1, 4, 8, 8),), keep_affine=True)
    fused = result.module
    assert type(fused) is type(network) and type(fused.bn) is nn.BatchNorm2d and fused.bn.eps == 1e-3
    assert norms_of(fused) == [fused.bn] and len(result.plan.sites) == 1
    assert error(network, fused, image(2, 4, 9, 7, seed=1)) < 1e-12
    assert all(proof.passed for proof in prove_sites(network, fused, result.plan))
    again = rewrite(network, Plan.from_dict(result.plan.to_dict()))
    assert error(again, fused, image(1, 4, 8, 8)) == 0
    if isinstance(network, Twice):  # weights alone changed: they load in the same class
        same = Twice()
        same.load_state_dict({k: v.float() for k, v in fused.state_dict().items() if "before" not in k}, strict=False)


# Statistics.


@settings(max_examples=3)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_the_norms_have_the_statistics_of_data_and_nothing_else_changes(seed: int, batches: int) -> None:
    network = randomised(DigitsRepVGG(width=4), seed=seed % 1000, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn((5 + number, 1, 8, 8), generator=generator) for number in range(batches)]
    checkpoint = _checkpoint(network)
    made = convert(checkpoint, keep_affine=True, data=data)
    assert made.passed
    whole = torch.cat(data)
    reference = copy.deepcopy(made.module).double()
    for block in reference.blocks:
        block.fused.conv.register_forward_hook(lambda _m, _i, output: setattr(_m, "seen", output))
    with torch.no_grad():
        reference(whole.double())
    for block in reference.blocks:
        norm, x = block.fused.norm, block.fused.conv.seen
        assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-4 * float(x.std()))
        assert torch.allclose(norm.running_var, x.var((0, 2, 3)), rtol=1e-4, atol=0)


def _checkpoint(network: nn.Module) -> Any:
    return replace(load(DIGITS), module=network)


def test_with_the_statistics_of_a_batch_training_begins_where_inference_is() -> None:
    x = load(DIGITS).module, torch.rand(64, 1, 8, 8)
    kept = convert(_checkpoint(x[0]), keep_affine=True, data=x[1]).module
    neutral = convert(_checkpoint(x[0]), keep_affine=True).module
    with torch.no_grad():
        expected = x[0].eval()(x[1])
        trained, changed = (network.train()(x[1]) for network in (kept, neutral))
    scale = float(expected.abs().max())
    assert float((trained - expected).abs().max()) < 1e-2 * scale  # the variance is unbiased in one, and not the other
    assert float((changed - expected).abs().max()) > 0.1 * scale


def test_data_that_does_not_fit_or_is_of_no_use_is_refused() -> None:
    checkpoint = load(DIGITS)
    with pytest.raises(RepfuseError, match="cannot run on the data"):
        convert(checkpoint, keep_affine=True, data=torch.rand(2, 3, 8, 8))
    with pytest.raises(RepfuseError, match="no norm that needs its statistics"):
        convert(checkpoint, data=torch.rand(2, 1, 8, 8))


# What would be wrong is seen.


@cache
def _whole() -> tuple[nn.Module, nn.Module, Plan]:
    network = load(DIGITS).module
    result = fuse(network, (torch.rand(1, 1, 8, 8),), keep_affine=True)
    return network, result.module, result.plan


def _damaged(kind: str) -> tuple[nn.Module, nn.Module, Plan]:
    network, fused, made = copy.deepcopy(_whole())
    block = fused.blocks[2].fused
    with torch.no_grad():
        if kind == "eps":
            block.norm.eps = 1e-3
        elif kind == "conv":
            block.conv.weight.mul_(1 + 1e-5)
        elif kind:
            getattr(block.norm, kind).view(-1)[3:4].mul_(1 + 1e-5).add_(1e-5)
    return network, fused, made


@pytest.mark.parametrize("kind", ["weight", "bias", "running_mean", "running_var", "eps", "conv"])
def test_a_number_that_is_off_by_a_hundred_thousandth_is_found(kind: str) -> None:
    network, fused, made = _damaged(kind)
    found = verify(network, fused, (torch.rand(1, 1, 8, 8),), plan=made, effort="quick")
    assert found.verdict == "different" and found.proof is not None
    wrong = [site.path for site in found.proof.sites if not site.passed]
    assert wrong == ["blocks.2.fused"] or "blocks.2.fused.norm" in found.proof.unproven


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    network, fused, made = _damaged("")
    found = verify(network, fused, (torch.rand(1, 1, 8, 8),), plan=made)
    assert found.verdict == "same" and found.proof is not None
    assert 0 < max(site.drift.of_bound for site in found.proof.sites if site.drift) < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_drift_of_a_site_stays_within_its_bound_in_every_dtype(dtype: torch.dtype) -> None:
    network = load(SAMPLES / "mobileone_digits.pt").module.to(dtype)
    result = fuse(network, (torch.rand(1, 1, 8, 8, dtype=dtype),), keep_affine=True)
    for proof in prove_sites(network, result.module, result.plan):
        assert proof.passed, proof.reason


# Plans, files, the command.


def test_a_plan_says_it_and_settles_it() -> None:
    network = DigitsMobileOne().eval()
    x = (torch.rand(1, 1, 8, 8),)
    made, plain = plan(network, x, keep_affine=True), plan(network, x)
    assert made.keep_affine and not plain.keep_affine
    assert all(site.after.launches == 2 for site in made.sites)
    assert Plan.from_dict(made.to_dict()) == made
    old = {key: value for key, value in plain.to_dict().items() if key != "keep_affine"}
    assert Plan.from_dict(old) == plain
    with pytest.raises(RepfuseError, match="says already"):
        Choice(plan=plain, keep_affine=True)
    found = kernels(network, made)
    assert all(site.after.ranges == pytest.approx([1] * 5) for site in found)
    assert all(each.per_tensor == pytest.approx(each.per_channel) for site in found for each in site.after.rounded)


@pytest.mark.parametrize("suffix", ["pt", pytest.param("pt2", marks=pytest.mark.slow), "safetensors"])
def test_files_hold_it_and_verify_knows_the_plan(suffix: str, cli: Cli, tmp_path: Path) -> None:
    source: tuple[Any, ...] = (DIGITS,)
    if suffix == "safetensors":
        source = (SAMPLES / "repvgg_digits.safetensors", "--model", "repfuse.samples:DigitsRepVGG")
    out = tmp_path / f"out.{suffix}"
    done = cli("convert", source[0], out, *source[1:], "--keep-affine", "--data", HELD_OUT, "--limit", "100")
    assert done.returncode == 0 and "31 → 10 operators" in done.stdout, done.stdout + done.stderr
    assert "--data" not in done.stdout
    found = json.loads(cli("verify", *source[:1], out, *source[1:], "--quick", "--json").stdout)
    assert found["verdict"] == "same"
    assert bool(found["proof"]) == (suffix != "pt2")
    if suffix != "pt2":
        assert len(norms_of(load(out).module)) == 5


def test_graphs_of_onnx_keep_a_norm_and_no_exporter_does(cli: Cli, tmp_path: Path) -> None:
    graph, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    network = load(DIGITS).module
    torch.onnx.export(
        network,
        (torch.rand(1, 1, 8, 8),),
        str(graph),
        dynamo=False,
        do_constant_folding=False,
        input_names=["x"],
        training=torch.onnx.TrainingMode.PRESERVE,
    )
    done = cli("convert", graph, out, "--keep-affine")
    assert done.returncode == 0, done.stderr
    left = kinds(out)
    assert left["Conv"] == left["BatchNormalization"] == 5 and not left["Add"]
    onnx.checker.check_model(onnx.load(out))
    refused = cli("convert", DIGITS, tmp_path / "no.onnx", "--keep-affine")
    assert refused.returncode == 2 and "exporter folds them" in refused.stderr and not (tmp_path / "no.onnx").exists()
    checkpoint = load(DIGITS)
    result = fuse(checkpoint.module, checkpoint.example_inputs, keep_affine=True)
    with pytest.raises(RepfuseError, match="cannot be written to an ONNX file"):
        save(checkpoint, result.module, tmp_path / "no.onnx", plan=result.plan)


def test_the_command_says_what_it_takes(cli: Cli, tmp_path: Path) -> None:
    out, saved = tmp_path / "out.pt", tmp_path / "plan.json"
    done = cli("convert", DIGITS, out, "--keep-affine", "--quick")
    assert done.returncode == 0 and "give --data before you train" in " ".join(done.stdout.split())
    assert cli("inspect", DIGITS, "--keep-affine", "--plan", saved).returncode == 0
    planned = cli("convert", DIGITS, out, "--force", "--plan", saved, "--data", HELD_OUT, "--quick")
    assert planned.returncode == 0 and len(norms_of(load(out).module)) == 5
    for wrong, said in (
        (("--data", HELD_OUT), "no norm that needs its statistics"),
        (("--keep-affine", "--data", tmp_path / "none"), "There is no data"),
        (("--keep-affine", "--limit", "3"), "are about real data"),
        (("--keep-affine", "--plan", saved), "says already"),
    ):
        done = cli("convert", DIGITS, tmp_path / "no.pt", *wrong)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert not (tmp_path / "no.pt").exists()


def test_what_is_kept_merges_later() -> None:
    network = load(DIGITS).module
    x = (torch.rand(1, 1, 8, 8),)
    kept = fuse(network, x, keep_affine=True).module
    later, at_once = fuse(kept, x).module, fuse(network, x).module
    assert not norms_of(later)
    with torch.no_grad():
        one, other = (each(x[0]) for each in (later, at_once))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
