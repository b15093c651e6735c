"""`repfuse verify` as a process, on checkpoints that were damaged after they were written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES, Cli
from mistakes.damage import DAMAGES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import repfuse

MODULE, STATE = SAMPLES / "repvgg_digits.pt", SAMPLES / "repvgg_digits.safetensors"
MODEL = "repfuse.samples:DigitsRepVGG"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both layouts, fused."""
    path = tmp_path_factory.mktemp("fused")
    for source, model in ((MODULE, None), (STATE, MODEL)):
        checkpoint = repfuse.load(source, model=model)
        made = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
        repfuse.save(checkpoint, made.module, path / f"fused{source.suffix}", plan=made.plan)
    return path


def damaged_module(folder: Path, site: str, kind: str) -> Path:
    """Return the pickled network with one mistake in a site."""
    network = torch.load(folder / "fused.pt", weights_only=False)
    parent, _, name = site.rpartition(".")
    setattr(network.get_submodule(parent), name, DAMAGES[kind](network.get_submodule(site)))
    torch.save(network, path := folder / f"{kind}.pt".replace(" ", "_"))
    return path


def edited(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """Return the safetensors file with one tensor changed."""
    with safe_open(folder / "fused.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "fused.safetensors")
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path := folder / "edited.safetensors", metadata)
    return path


def found(cli: Cli, *arguments: object) -> dict[str, object]:
    """What verify says in JSON, with its exit code."""
    done = cli("verify", *arguments, "--json")
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout) | {"exit": done.returncode}


@pytest.mark.parametrize(
    ("site", "kind"),
    [
        ("blocks.0.fused", "shift, axis 0, +1"),
        pytest.param("blocks.2.fused", "border, replicate", marks=pytest.mark.slow),
        pytest.param("blocks.3.fused", "swap outputs", marks=pytest.mark.slow),
        pytest.param("blocks.4.fused", "bias dropped", marks=pytest.mark.slow),
        pytest.param("blocks.4.fused", "skip missing", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_network_is_different_and_the_block_is_named(folder: Path, site: str, kind: str, cli: Cli) -> None:
    seen = found(cli, MODULE, damaged_module(folder, site, kind))
    assert (seen["exit"], seen["verdict"]) == (1, "different")
    assert seen["first_difference"]["path"].startswith(site.removesuffix(".fused"))


def with_nan(weight: Tensor) -> Tensor:
    weight.flatten()[7] = torch.nan
    return weight


@pytest.mark.parametrize(
    "change",
    [pytest.param(lambda x: x.flip(1), marks=pytest.mark.slow), with_nan],
    ids=["swapped inputs", "not a number"],
)
def test_an_edited_file_is_different_and_the_block_is_named(
    folder: Path, change: Callable[[Tensor], Tensor], cli: Cli
) -> None:
    seen = found(cli, STATE, edited(folder, "blocks.1.fused.weight", change), "--model", MODEL)
    assert (seen["exit"], seen["verdict"]) == (1, "different")
    if change is not with_nan:
        assert seen["first_difference"]["path"].startswith("blocks.1")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_same_file_twice_is_the_same(folder: Path, suffix: str, cli: Cli) -> None:
    seen = found(cli, folder / f"fused{suffix}", folder / f"fused{suffix}")
    assert (seen["exit"], seen["verdict"]) == (0, "same")
    assert all(trial["outputs"][0]["max_abs"] == 0 for trial in seen["trials"])
