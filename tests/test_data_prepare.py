"""From found data to samples for one network: what is made of them, when, and what is said."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from repfuse.cli import app
from repfuse.data import Wishes, prepare, read_data
from repfuse.errors import RepfuseError

RGB = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 1.0}


class Mean(nn.Module):
    """A network whose outputs are the means of the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


def checkpoint(*shape: int, dtype: torch.dtype = torch.float32, config: Any = None) -> Any:
    module = Mean()
    if config:
        module.pretrained_cfg = config
    example = torch.zeros(shape or (1, 3, 4, 4), dtype=dtype)
    return SimpleNamespace(module=module, path=Path("in.pt"), source=None, program=None, example_inputs=(example,))


def whole(samples: Any) -> torch.Tensor:
    return torch.cat(list(samples))


def folder(path: Path, *names: str, size: int = 4) -> Any:
    """Images of one colour each: the number in its name."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        colour = int(Path(name).stem)
        Image.new("RGB", (size, size), (colour, colour + 1, colour + 2)).save(path / name)
    return read_data(path)


def arrays(path: Path, inputs: torch.Tensor, **labels: torch.Tensor) -> Any:
    """Tensors that were in a file."""
    torch.save({"inputs": inputs} | labels, path / "data.pt")
    return read_data(path / "data.pt")


def test_images_become_what_the_configuration_says(tmp_path: Path) -> None:
    found = folder(tmp_path, "a/10.png", "b/20.png", "c/30.png")
    samples, labels = prepare(found, checkpoint(config=RGB), Wishes())
    x = whole(samples)
    assert (x.shape, x.dtype) == ((3, 3, 4, 4), torch.float32)
    colours = torch.tensor([[n, n + 1, n + 2] for n in (10, 20, 30)])
    expected = (colours / 255 - torch.tensor(RGB["mean"])) / torch.tensor(RGB["std"])
    torch.testing.assert_close(x, expected[:, :, None, None].expand_as(x))
    assert labels is not None and labels.tolist() == [0, 1, 2]
    assert any("mean 0.1, 0.2, 0.3, std 0.5, 0.6, 0.7 (as timm's configuration" in note for note in samples.notes)


def test_what_the_user_says_comes_first(tmp_path: Path) -> None:
    found = folder(tmp_path, "10.png")
    half, _ = prepare(found, checkpoint(config=RGB), Wishes(mean=(0.0,)))
    torch.testing.assert_close(whole(half)[0, :, 0, 0], torch.tensor([10 / 0.5, 11 / 0.6, 12 / 0.7]) / 255)
    both, _ = prepare(found, checkpoint(), Wishes((0.0, 0.0, 1.0), (1.0,)))
    torch.testing.assert_close(whole(both)[0, :, 0, 0], torch.tensor([10, 11, 12 - 255]) / 255)
    assert any("--mean and --std as given" in note for note in both.notes)


def test_nothing_known_is_said_with_the_options_that_help(tmp_path: Path) -> None:
    found = folder(tmp_path, "10.png")
    samples, labels = prepare(found, checkpoint(), Wishes())
    assert labels is None
    assert torch.equal(whole(samples)[0, :, 0, 0], torch.tensor([10, 11, 12]) / 255)
    (note,) = [note for note in samples.notes if "pixels in 0..1 (" in note]
    assert "does not say" in note and "--mean and --std" in note
    grey, _ = prepare(found, checkpoint(1, 1, 4, 4, config=RGB), Wishes())
    assert any("is for 3 channels; --mean and --std" in note for note in grey.notes)
    assert 10 <= float(whole(grey)[0, 0, 0, 0]) * 255 <= 12


@pytest.mark.parametrize(
    "wishes",
    [
        {"mean": (0.5,)},
        {"std": (0.5,)},
        {"mean": (0.5, 0.5), "std": (0.5, 0.5)},
        {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)},
        {"mean": (0.5,), "std": (0.5, 0.0, 0.5)},
        {"limit": 0},
    ],
)
def test_wishes_that_make_no_sense_are_refused(wishes: dict[str, Any], tmp_path: Path) -> None:
    found = folder(tmp_path, "10.png")
    with pytest.raises(RepfuseError) as caught:
        prepare(found, checkpoint(), Wishes(**wishes))
    assert caught.value.hint


def verified(path: Path, *options: str) -> Any:
    """What the command says of a network of images beside itself, on an image."""
    folder(path / "images", "10.png")
    torch.save(nn.Conv2d(3, 1, 1), path / "in.pt")
    words = ("--data", path / "images", "--input", "1x3x4x4", "--quick", *options)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["verify", *map(str, [path / "in.pt"] * 2), *map(str, words)])


@pytest.mark.parametrize("text", ["", "a", "0.5,", "0.5;0.5", "nan", "0.1,inf"])
def test_numbers_are_read_strictly(text: str, tmp_path: Path) -> None:
    for names in (("--mean", "--std"), ("--std", "--mean")):
        done = verified(tmp_path, names[0], text, names[1], "1")
        assert (done.exit_code, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr and f"error: {text!r} " in done.stderr and " number" in done.stderr


def test_numbers_are_those_of_python_with_spaces_where_one_likes(tmp_path: Path) -> None:
    done = verified(tmp_path, "--mean", "0.485, 1e-1,.4", "--std", "1")
    assert done.exit_code == 0, done.stderr
    assert "mean 0.485, 0.1, 0.4, std 1, 1, 1 (--mean and --std as given)" in done.stderr


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 4, 8, 8), (1, 10), (1, 3, 4, 4, 4)])
def test_images_are_for_networks_of_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(RepfuseError, match="no input for this network"):
        prepare(folder(tmp_path, "10.png"), checkpoint(*shape), Wishes())


def test_images_are_for_floating_networks(tmp_path: Path) -> None:
    with pytest.raises(RepfuseError, match="no input for this network"):
        prepare(folder(tmp_path, "10.png"), checkpoint(dtype=torch.int64), Wishes())


def test_images_outside_of_all_folders_leave_no_labels(tmp_path: Path) -> None:
    samples, labels = prepare(folder(tmp_path, "a/1.png", "b/2.png", "c/3.png", "4.png"), checkpoint(), Wishes())
    assert labels is None
    assert any("in no folder of the first level" in note for note in samples.notes)


@pytest.mark.parametrize("module", [nn.Linear(3, 4), nn.Identity()])  # the one cannot run this: verify will say so
def test_networks_without_classes_leave_no_labels(module: nn.Module, tmp_path: Path) -> None:
    given = checkpoint()
    given.module = module
    samples, labels = prepare(folder(tmp_path, "0/1.png", "1/2.png"), given, Wishes())
    assert labels is None
    assert "no labels: the network's first output is no table of classes" in samples.notes


def test_a_limit_takes_evenly_spaced_samples_with_their_labels(tmp_path: Path) -> None:
    found = folder(tmp_path, *[f"{(index - 10) // 4}/{index}.png" for index in range(10, 22)])
    samples, labels = prepare(found, checkpoint(), Wishes(limit=3))
    assert labels is not None and labels.tolist() == [0, 1, 2]
    assert (whole(samples)[:, 0, 0, 0] * 255).round().tolist() == [10, 14, 18]
    assert samples.count == 3 and any("3 of 12 samples" in note for note in samples.notes)
    everything, _ = prepare(found, checkpoint(), Wishes(limit=99))
    assert everything.count == 12


def test_images_are_decoded_when_they_are_asked_for_and_no_sooner(tmp_path: Path) -> None:
    found = folder(tmp_path, *[f"{index}.png" for index in range(100, 170)])
    last = found.images[-1]
    last.write_bytes(b"damaged")
    samples, _ = prepare(found, checkpoint(), Wishes())
    batches = iter(samples)
    assert next(batches).shape[0] == 64
    with pytest.raises(RepfuseError, match=rf"{last.name} cannot be read"):
        next(batches)


LIMITED = """
import ctypes, resource, sys, torch
from types import SimpleNamespace
from pathlib import Path
from PIL import Image
from repfuse.data import Wishes, prepare, read_data
from repfuse.checking.agreement import agreement
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once; how much differs else
folder = Path(sys.argv[1])
Image.new("RGB", (256, 256)).save(folder / "0.png")
for index in range(1, 250):
    (folder / f"{index}.png").symlink_to(folder / "0.png")
net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
example = torch.zeros(1, 3, 256, 256)
net(example)
checkpoint = SimpleNamespace(module=net, path=Path("in.pt"), source=None, program=None, example_inputs=(example,))
samples, labels = prepare(read_data(folder), checkpoint, Wishes())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
real = agreement(net, net, samples, labels)
assert real.samples == 250
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_the_memory_does_not_grow_with_the_number_of_images(python: Run, tmp_path: Path) -> None:
    done = python("-c", LIMITED, tmp_path, bare=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 10  # kilobytes; the 250 images together would be 187 MiB


# --- tensors -----------------------------------------------------------------------------------------------------

BYTES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5), dtype=np.uint8))


@pytest.mark.parametrize("last", [False, True])
def test_bytes_are_scaled_and_normalised_like_images(last: bool, tmp_path: Path) -> None:
    inputs = BYTES.permute(0, 2, 3, 1).contiguous() if last else BYTES
    samples, labels = prepare(
        arrays(tmp_path, inputs, labels=torch.arange(6) % 3), checkpoint(config=RGB), Wishes(limit=4)
    )
    mean, std = (torch.tensor(RGB[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(whole(samples), (BYTES[[0, 1, 3, 4]] / 255 - mean) / std)
    assert labels is not None and labels.tolist() == [0, 1, 0, 1]
    note = samples.notes[0]
    assert "uint8" in note and ("height x width x channels" in note) == last and "mean 0.1" in note


def test_bytes_for_a_network_of_bytes_stay(tmp_path: Path) -> None:
    samples, _ = prepare(arrays(tmp_path, BYTES), checkpoint(dtype=torch.uint8), Wishes())
    assert torch.equal(whole(samples), BYTES)
    assert samples.notes == ()


def test_floating_tensors_are_taken_as_they_are_in_the_network_s_dtype(tmp_path: Path) -> None:
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    same, _ = prepare(arrays(tmp_path, x), checkpoint(dtype=torch.float64, config=RGB), Wishes())
    assert torch.equal(whole(same), x) and same.notes == ()
    cast, _ = prepare(arrays(tmp_path, x), checkpoint(dtype=torch.float16), Wishes())
    assert torch.equal(whole(cast), x.half())
    assert "float64" in cast.notes[0] and "float16" in cast.notes[0]
    with pytest.raises(RepfuseError, match="for images and uint8"):
        prepare(arrays(tmp_path, x), checkpoint(), Wishes(mean=(0.5,), std=(0.5,)))


def test_integers_for_a_floating_network_are_left_to_it(tmp_path: Path) -> None:
    for dtype in (torch.int64, torch.uint16):
        samples, _ = prepare(arrays(tmp_path, torch.ones(2, 3, 4, 4, dtype=dtype)), checkpoint(), Wishes())
        assert whole(samples).dtype == dtype


def test_a_large_tensor_is_walked_in_small_pieces(tmp_path: Path) -> None:
    samples, _ = prepare(arrays(tmp_path, torch.zeros(7, 3, 700, 700)), checkpoint(1, 3, 700, 700), Wishes())
    assert [len(batch) for batch in samples] == [1] * 7
    samples, _ = prepare(arrays(tmp_path, torch.zeros(150, 3, 2, 2)), checkpoint(), Wishes())
    assert [len(batch) for batch in samples] == [64, 64, 22]
