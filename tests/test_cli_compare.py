"""`repfuse verify` and `repfuse bench` as processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES, Cli

from repfuse.samples import DigitsRepVGG

MODULE = SAMPLES / "repvgg_digits.pt"
STATE = SAMPLES / "repvgg_digits_state_dict.pth"
HELD_OUT = SAMPLES / "digits_heldout.safetensors"
MODEL = ("--model", "repfuse.samples:DigitsRepVGG")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits classifier with one number of the third block changed."""
    path = tmp_path_factory.mktemp("damaged") / "damaged.pt"
    model = torch.load(MODULE, weights_only=False)
    with torch.no_grad():
        model.blocks[2].conv3[0].weight[0, 0, 1, 1] += 0.05
    torch.save(model, path)
    return path


def test_a_damaged_checkpoint_is_different_and_the_place_is_named(damaged: Path, cli: Cli) -> None:
    done = cli("verify", MODULE, damaged, "--data", HELD_OUT)
    assert done.returncode == 1, done.stderr
    assert "Different." in done.stdout
    assert "at blocks.2.conv3.0" in " ".join(done.stdout.split())


def test_shapes_and_seeds_are_those_asked_for(cli: Cli) -> None:
    done = cli("verify", STATE, MODULE, *MODEL, "--input", "1x1x8x8", "--input", "3x1x11x7", "--seed", "5", "--json")
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [(trial["label"], trial["shapes"]) for trial in trials] == [
        ("1x1x8x8, seed 5", [[1, 1, 8, 8]]),
        ("3x1x11x7, seed 5", [[3, 1, 11, 7]]),
    ]


def test_the_other_side_may_be_built_otherwise(cli: Cli, tmp_path: Path) -> None:
    torch.save(DigitsRepVGG(width=4).state_dict(), tmp_path / "narrow.pth")
    options = ("--fused-model", "repfuse.samples:DigitsRepVGG", "--fused-model-arg", "width=4")
    done = cli("verify", STATE, tmp_path / "narrow.pth", *MODEL, *options)
    assert done.returncode == 1, done.stderr
    assert "Different." in done.stdout


def test_a_model_without_finite_output_cannot_be_told(cli: Cli, tmp_path: Path) -> None:
    model = torch.load(MODULE, weights_only=False)
    model.head.weight.data.fill_(float("nan"))
    torch.save(model, tmp_path / "nan.pt")
    done = cli("verify", tmp_path / "nan.pt", tmp_path / "nan.pt")
    assert done.returncode == 2, done.stdout
    assert "Could not tell." in done.stdout


def test_bench_measures_every_batch_size_and_thread_count(cli: Cli) -> None:
    options = ("--batch-size", "1", "--batch-size", "3", "--threads", "1", "--rounds", "5", "--seconds", "0.5")
    done = cli("bench", MODULE, MODULE, *options, "--cold", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(entry["batch_size"], entry["threads"]) for entry in found["measurements"]] == [(1, 1), (3, 1)]
    assert all(entry["low"] <= entry["speedup"] <= entry["high"] for entry in found["measurements"])
    assert found["before"] == found["after"]
    assert "no measurement of speed" in found["cold"]["note"]
