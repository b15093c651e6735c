"""`repfuse verify --data`: the digits as images, as bytes and as numbers, and what is refused.

Most cases run in this process, since a new one takes seconds to import torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import SAMPLES, Cli
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from repfuse.cli.app import app

MODULE = SAMPLES / "repvgg_digits.pt"
HELD_OUT = load_file(SAMPLES / "digits_heldout.safetensors")
BYTES = (HELD_OUT["inputs"] * 255).round().to(torch.uint8)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*args: object) -> Done:
    """As the fixture ``cli``, in this process."""
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, args)])
    return Done(done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held-out digits as PNG files, in a folder for each class."""
    folder = tmp_path_factory.mktemp("digits")
    for index, (pixels, label) in enumerate(zip(BYTES, HELD_OUT["labels"].tolist(), strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(folder / str(label) / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def weaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits classifier, which now prefers class 0 a little."""
    path = tmp_path_factory.mktemp("weaker") / "weaker.pt"
    model = torch.load(MODULE, weights_only=False)
    with torch.no_grad():
        model.head.bias[0] += 12
    torch.save(model, path)
    return path


def data_of(done: Any) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["data"]


def test_a_folder_of_images_with_labels(images: Path, cli: Cli) -> None:
    done = cli("verify", MODULE, MODULE, "--data", images, "--json")
    found = data_of(done)
    assert (found["samples"], found["compared"]) == (360, 64)
    assert found["top1_agreement"] == found["top5_agreement"] == 1.0
    assert found["accuracy_original"] == found["accuracy_fused"] >= 0.98
    assert found["top5_accuracy_original"] == found["top5_accuracy_fused"] >= found["accuracy_original"]
    said = " ".join(found["notes"])
    assert "resized to cover 8x8 (bilinear), 8x8 at the centre, pixels in 0..1 (the network does not say" in said
    assert "labels: the numbers that the folders are named by" in said
    assert all(f"note: {images}: {note}" in done.stderr for note in found["notes"])


@pytest.mark.parametrize("suffix", ["npz", "pt", "safetensors"])
def test_bytes_are_scaled_as_images_are(suffix: str, images: Path, tmp_path: Path) -> None:
    path = tmp_path / f"data.{suffix}"
    content = {"images": BYTES[:, 0], "labels": HELD_OUT["labels"]}
    if suffix == "npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in content.items()})
    else:
        (torch.save if suffix == "pt" else save_file)(content, path)
    done = run("verify", MODULE, MODULE, "--data", path, "--json")
    found = data_of(done)
    assert found["accuracy_original"] >= 0.98
    assert "uint8, samples x height x width: pixels in 0..1" in done.stderr


def test_what_changes_class_is_counted_and_shown(images: Path, weaker: Path) -> None:
    done = run("verify", MODULE, weaker, "--data", images, "--limit", "90")
    assert done.returncode == 1, done.stderr
    shown = " ".join(done.stdout.split())
    assert "90 samples" in shown
    assert "right to wrong, 0 wrong to right); the original preferred its own by" in shown
    assert "90 of 360 samples, evenly spaced" in done.stderr


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_program_exported_for_one_sample_gets_one_at_a_time(dynamic: bool, images: Path, tmp_path: Path) -> None:
    model = torch.load(MODULE, weights_only=False)
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    example = torch.zeros(2 if dynamic else 1, 1, 8, 8)
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), tmp_path / "in.pt2")
    done = run("verify", tmp_path / "in.pt2", tmp_path / "in.pt2", "--data", images, "--limit", "70", "--json")
    found = data_of(done)
    assert (found["samples"], found["compared"], found["top1_agreement"]) == (70, 64 if dynamic else 1, 1.0)
    assert found["accuracy_original"] >= 0.95


def test_labels_never_decide_alone(images: Path, weaker: Path) -> None:
    done = run("verify", weaker, weaker, "--data", images, "--json")
    found = data_of(done)
    assert found["accuracy_original"] == found["accuracy_fused"] < 0.98
    assert json.loads(done.stdout)["verdict"] == "same"


def test_a_network_of_timm_gets_its_images_as_timm_gives_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_byobnet", num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    (tmp_path / "data").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{index}.jpg")
    source = ("--model", "timm:test_byobnet", "--model-arg", "num_classes=3")
    pair = (tmp_path / "in.safetensors",) * 2
    done = run("verify", *pair, *source, "--input", "1x3x32x40", "--data", tmp_path / "data", "--json")
    notes = data_of(done)["notes"]
    pct = model.pretrained_cfg["crop_pct"]
    scaled = f"{int(32 / pct)}x{int(40 / pct)}"
    assert f"images resized to cover {scaled} (bicubic), 32x40 at the centre" in notes[0]
    assert notes[0].endswith("(as timm's configuration of the network says)")
    assert notes[1].startswith("no labels: the images are in no folders")


def refused(done: Any, *said: str) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr and "does not expect" not in done.stderr
    assert done.stderr.count("error:") == 1
    for words in said:
        assert words in done.stderr


def test_a_damaged_image_ends_it_by_name(images: Path, tmp_path: Path) -> None:
    for index, image in enumerate(sorted(images.glob("*/*.png"))[:70]):
        (tmp_path / f"{index:02}.png").write_bytes(image.read_bytes())
    last = tmp_path / "69.png"
    last.write_bytes(last.read_bytes()[:60])
    refused(run("verify", MODULE, MODULE, "--data", tmp_path, "--quiet"), f"The image {last} cannot be read.")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mean", "0.5"), "Give --data too"),
        (("--limit", "3"), "Give --data too"),
        (("--data", "{images}", "--mean", "0.5"), "needed together"),
        (("--data", "{images}", "--mean", "0.5,0.4", "--std", "1"), "one number for each of the 1 channels"),
        (("--data", "{images}", "--mean", "128", "--std", "58"), "Divide the mean"),
        (("--data", "{images}", "--mean", "x", "--std", "1"), "no list of numbers"),
        (("--data", "{images}", "--std", "-1"), "above 0"),
        (("--data", "{images}", "--limit", "0"), "at least 1"),
        (("--data", "{images}", "--input", "1x1x8x8:int64"), "no input for this network"),
        (("--data", str(SAMPLES / "digits_heldout.safetensors"), "--mean", "0", "--std", "1"), "images and uint8"),
        (("--data", "{empty}"), "no images"),
        (("--data", "{images}/none"), "no data at"),
        (("--data", "{first}"), "folders of images"),
    ],
)
def test_bad_options_are_one_message(options: tuple[str, ...], said: str, images: Path, tmp_path: Path) -> None:
    filled = [option.format(images=images, empty=tmp_path, first=next(images.glob("*/*.png"))) for option in options]
    refused(run("verify", MODULE, MODULE, *filled), said)


def test_without_pillow_images_are_refused(images: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text("raise ImportError('there is no Pillow here')")
    hidden = {"PYTHONPATH": str(tmp_path)}
    done = cli("verify", MODULE, MODULE, "--data", images, env=hidden, bare=True)
    refused(done, "PIL is not installed", "pip install 'repfuse[images]'")
