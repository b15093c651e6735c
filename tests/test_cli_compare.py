"""`repfuse verify` and `repfuse bench` as processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES, Cli
from torch import nn

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


def test_the_whole_battery_is_tried_around_every_shape_that_is_asked_for(cli: Cli) -> None:
    shapes = ("--input", "1x1x8x8", "--input", "3x1x11x7")
    done = cli("verify", STATE, MODULE, *MODEL, *shapes, "--seed", "5", "--seed", "6", "--json")
    assert done.returncode == 0, done.stderr
    found = {trial["label"]: trial["shapes"] for trial in json.loads(done.stdout)["trials"]}
    plain, around = (
        {label.partition(" ")[0] for label in found if (" around " in label) == further} for further in (False, True)
    )
    assert plain == around == {"the", "random,", "size", "large", "nearly", "impulses", "frame", "batch"}
    assert found["the example"] == [[1, 1, 8, 8]] and found["the example around 3x1x11x7"] == [[3, 1, 11, 7]]
    assert found["random, seed 6 around 3x1x11x7"] == [[3, 1, 11, 7]]
    refused = cli("verify", MODULE, MODULE, "--input", "1x1x8x8", "--input", "1x3x8x8")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "The original does not take the input 1x3x8x8." in refused.stderr


def test_a_relu_and_a_relu6_differ_whatever_shape_is_asked_for(cli: Cli, tmp_path: Path) -> None:
    for name, activation in (("a.pt", nn.ReLU()), ("b.pt", nn.ReLU6())):
        torch.manual_seed(0)
        torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.Conv2d(4, 2, 1)).eval(), tmp_path / name)
    done = cli("verify", tmp_path / "a.pt", tmp_path / "b.pt", "--input", "1x3x16x16")
    assert done.returncode == 1 and "Different." in done.stdout, done.stderr


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
    options = ("--batch-size", "1", "--batch-size", "3", "--threads", "1", "--rounds", "8", "--seconds", "0.5")
    done = cli("bench", MODULE, MODULE, *options, "--cold", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(entry["batch_size"], entry["threads"]) for entry in found["measurements"]] == [(1, 1), (3, 1)]
    assert all(entry["low"] <= entry["speedup"] <= entry["high"] for entry in found["measurements"])
    assert found["before"] == found["after"]
    assert "no measurement of speed" in found["cold"]["note"]
