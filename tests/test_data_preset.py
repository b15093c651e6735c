"""How images become inputs: by timm's and torchvision's own transforms, and what configurations say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.models import get_model_weights
from torchvision.models.segmentation import FCN_ResNet50_Weights
from torchvision.transforms.functional import center_crop

from repfuse.checkpoint.spec import ModelSource
from repfuse.data import Wishes, prepare, read_data
from repfuse.errors import RepfuseError

TIMM = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


def image(path: Path, height: int, width: int, seed: int = 0) -> Path:
    """An image with edges, noise and gradients, written without loss."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise[: height // 2] = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    Image.fromarray(noise).save(path)
    return path


def checkpoint(module: nn.Module, *shape: int, spec: str = "", **known: Any) -> Any:
    """A network that is never run, and what else a checkpoint has that knows how its images are prepared."""
    source = ModelSource(spec) if spec else None
    usual = {"path": Path("in.pt"), "program": None, "example_inputs": (torch.zeros(1, *(shape or (3, 7, 7))),)}
    return SimpleNamespace(module=module, source=source, **usual | known)


def by_timm(config: Any, *shape: int, **known: Any) -> Any:
    """What has a configuration of timm's."""
    module = nn.Flatten()
    module.pretrained_cfg = config
    return checkpoint(module, *shape, **known)


def prepared(path: Path, given: Any) -> torch.Tensor:
    """The only image in the folder of ``path``."""
    samples, _ = prepare(read_data(path.parent), given, Wishes())
    return torch.cat(list(samples))[0]


def said(given: Any, folder: Path) -> str:
    """What is said of how images are prepared; none is looked at."""
    (folder / "image.png").touch()
    (note,) = (note for note in prepare(read_data(folder), given, Wishes())[0].notes if note.startswith("images "))
    return note


NOTHING = "images resized to cover 7x7 (bilinear), 7x7 at the centre, pixels in 0..1 (the network does not say"
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # of timm's, all but a random one
CONFIGURATIONS = st.fixed_dictionaries(
    {
        "interpolation": st.sampled_from(INTERPOLATIONS),
        "crop_mode": st.sampled_from(["center", "border", "squash"]),
        "crop_pct": st.sampled_from([0.5, 0.8, 0.875, 0.9, 0.95, 0.96, 1.0, 1.1]),
        "mean": st.sampled_from([(0.485, 0.456, 0.406), (0.5, 0.5, 0.5), (0.0, 0.1, 0.9)]),
        "std": st.sampled_from([(0.229, 0.224, 0.225), (1.0, 1.0, 1.0)]),
    }
)
EDGES = st.integers(2, 70)


@given(CONFIGURATIONS, st.tuples(EDGES, EDGES), st.tuples(EDGES, EDGES), st.booleans())
def test_the_numbers_are_those_of_timm_s_own_transform(
    tmp_path_factory: pytest.TempPathFactory,
    config: dict[str, Any],
    shape: tuple[int, int],
    size: tuple[int, int],
    square: bool,
) -> None:
    size = (size[0], size[0]) if square else size
    folder = tmp_path_factory.getbasetemp() / "images"
    folder.mkdir(exist_ok=True)
    path = image(folder / "timm.png", *shape)
    resolved = resolve_data_config({"input_size": (3, *size)}, pretrained_cfg=config)
    theirs = create_transform(**resolved, is_training=False)
    try:
        expected = theirs(Image.open(path).convert("RGB"))
    except ValueError:  # its own transform cannot resize to nothing
        reject()
    assert torch.equal(prepared(path, by_timm(config, 3, *size)), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_v2_l", "inception_v3"])
@pytest.mark.parametrize("shape", [(300, 400), (40, 33), (500, 280)])
def test_the_numbers_are_those_of_torchvision_s_own_transform(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    path, transforms = image(tmp_path / "image.png", *shape), get_model_weights(name).DEFAULT.transforms()
    given = checkpoint(nn.Flatten(), 3, *transforms.crop_size * 2, spec=f"torchvision:{name}")
    assert torch.equal(prepared(path, given), transforms(Image.open(path).convert("RGB")))


def test_one_channel_is_grey_as_timm_reads_it(tmp_path: Path) -> None:
    path = image(tmp_path / "image.png", 30, 20)
    config = {"mean": (0.3,), "std": (0.7,), "input_size": (1, 16, 16)}
    theirs = create_transform(**resolve_data_config({"in_chans": 1}, pretrained_cfg=config))
    assert torch.equal(prepared(path, by_timm(config, 1, 16, 16)), theirs(Image.open(path).convert("L")))


def test_an_image_of_the_input_s_size_is_taken_pixel_by_pixel_where_nothing_is_known(tmp_path: Path) -> None:
    path = image(tmp_path / "image.png", 9, 14)
    expected = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
    assert torch.equal(prepared(path, checkpoint(nn.Flatten(), 3, 9, 14)), expected)


def test_where_nothing_is_known_the_centre_covers_the_input(tmp_path: Path) -> None:
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[:, 20:80] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    samples, _ = prepare(read_data(tmp_path), checkpoint(nn.Flatten(), 3, 20, 20), Wishes((0.5,), (0.5,)))
    assert samples.notes[0].startswith("images resized to cover 20x20 (bilinear), 20x20 at the centre, pixels")
    assert torch.equal(torch.cat(list(samples)), torch.ones(1, 3, 20, 20))


@pytest.mark.parametrize(
    "odd",
    [
        {"mean": None},
        {"mean": (0.5, 0.5)},
        {"mean": ("a", "b", "c")},
        {"mean": [True] * 3},
        {"mean": (float("nan"),) * 3},
        {"mean": [0.5] * 1000, "std": [0.5] * 1000},
        {"std": (0.2, 0.2, 0.0)},
        {"std": {}},
        {"interpolation": "random"},
        {"interpolation": ["bilinear"]},
        {"crop_pct": 1e-6},
        {"crop_pct": -1},
        {"crop_pct": "1"},
        {"crop_pct": 10**400},
    ],
)
def test_what_makes_no_sense_is_no_answer(odd: dict[str, Any], tmp_path: Path) -> None:
    assert "timm's configuration" in said(by_timm(TIMM), tmp_path)
    assert said(by_timm(TIMM | odd), tmp_path).startswith(NOTHING)


@pytest.mark.parametrize("odd", [None, [], "mean", 3])
def test_a_configuration_is_a_mapping(odd: Any, tmp_path: Path) -> None:
    assert said(by_timm(odd), tmp_path).startswith(NOTHING)


def test_what_timm_s_configuration_leaves_out_is_timm_s_default(tmp_path: Path) -> None:
    found = said(by_timm({"mean": [0.5], "std": [0.5], "crop_pct": None}, 1, 224, 112), tmp_path)
    assert "resized to cover 256x128 (bicubic), 224x112 at the centre, pixels in 0..1, mean 0.5, std 0.5 (" in found


@pytest.mark.parametrize(("mode", "words"), [("center", "to cover"), ("border", "to fit within"), ("squash", "to")])
def test_how_timm_resizes_is_said(mode: str, words: str, tmp_path: Path) -> None:
    found = said(by_timm(TIMM | {"crop_mode": mode}), tmp_path)
    assert found.startswith(f"images resized {words} 8x8 (bicubic)")


def test_without_timm_its_numbers_are_kept_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image(tmp_path / "image.png", 30, 40)
    monkeypatch.setitem(sys.modules, "timm", None)
    timms, nothing = by_timm(TIMM, 3, 16, 16), checkpoint(nn.Flatten(), 3, 16, 16)
    assert "(bilinear), 16x16 at the centre and not as timm would" in said(timms, tmp_path)
    plain, _ = prepare(read_data(tmp_path), nothing, Wishes(TIMM["mean"], TIMM["std"]))
    assert torch.equal(prepared(path, timms), torch.cat(list(plain))[0])


def test_a_network_of_timm_knows_its_own(tmp_path: Path) -> None:
    module = timm.create_model("test_byobnet")
    means = ", ".join(f"{value:g}" for value in module.pretrained_cfg["mean"])
    found = said(checkpoint(module), tmp_path)
    assert f"mean {means}, std " in found and "(as timm's configuration of the network says)" in found


def test_a_snapshot_s_configuration_comes_before_the_network_s_own(tmp_path: Path) -> None:
    module = timm.create_model("test_byobnet")
    weights = tmp_path / "model.safetensors"
    own = {"pretrained_cfg": TIMM | {"mean": [0.1, 0.2, 0.3]}}
    for config in (own, own["pretrained_cfg"]):  # the second as timm wrote it before 1.0
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = said(checkpoint(module, path=weights), tmp_path)
        assert "mean 0.1, 0.2, 0.3, " in found and "(as config.json says)" in found
    beside_it_by_chance = said(checkpoint(module, path=tmp_path / "last.ckpt"), tmp_path)
    assert "timm's configuration" in beside_it_by_chance


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pretrained_cfg": 3}', '{"mean": [1], "mean": [2]}'])
def test_a_damaged_configuration_is_no_answer(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert said(checkpoint(nn.Flatten(), path=tmp_path / "model.safetensors"), tmp_path).startswith(NOTHING)


def test_networks_of_torchvision_are_prepared_as_for_their_usual_weights(tmp_path: Path) -> None:
    found = said(checkpoint(nn.Flatten(), 3, 224, 224, spec="torchvision:resnet50"), tmp_path)
    assert found.startswith("images resized to cover 232x232 (bilinear), 224x224 at the centre, ")
    assert "mean 0.485, 0.456, 0.406, " in found
    assert found.endswith("(as torchvision's ResNet50_Weights.IMAGENET1K_V2 says)")
    assert said(checkpoint(nn.Flatten(), spec="torchvision:fasterrcnn_resnet50_fpn"), tmp_path).startswith(NOTHING)
    assert said(checkpoint(nn.Flatten()), tmp_path).startswith(NOTHING)


@pytest.mark.parametrize("size", [(64, 64), (40, 64), (300, 500)])
def test_torchvision_prepares_inputs_of_another_size(size: tuple[int, int], tmp_path: Path) -> None:
    path, weights = image(tmp_path / "image.png", 90, 120), get_model_weights("resnet50").DEFAULT
    given = checkpoint(nn.Flatten(), 3, *size, spec="torchvision:resnet50")
    edge = max(size)
    theirs = weights.transforms(crop_size=edge, resize_size=edge * 232 // 224)(Image.open(path))
    assert torch.equal(prepared(path, given), center_crop(theirs, list(size)))


def test_torchvision_crops_nothing_off_for_segmentation_but_what_is_beyond_the_input(tmp_path: Path) -> None:
    path, weights = image(tmp_path / "image.png", 90, 120), FCN_ResNet50_Weights.DEFAULT
    given = checkpoint(nn.Flatten(), 3, 60, 60, spec="torchvision:fcn_resnet50")
    theirs = weights.transforms(resize_size=60)(Image.open(path))
    assert torch.equal(prepared(path, given), theirs[:, :, 10:70])


def test_images_in_a_folder_are_as_timm_and_torchvision_give_them(tmp_path: Path) -> None:
    path, module = image(tmp_path / "image.png", 90, 120), timm.create_model("test_byobnet").eval()
    weights = get_model_weights("resnet18").DEFAULT
    resolved = resolve_data_config({"input_size": (3, 48, 64)}, model=module)
    for size, spec, theirs in (
        ((48, 64), "", create_transform(**resolved)),
        ((224, 224), "torchvision:resnet18", weights.transforms()),
    ):
        given = checkpoint(nn.Flatten() if spec else module, 3, *size, spec=spec)
        assert torch.equal(prepared(path, given), theirs(Image.open(path)))


def from_bytes(x: torch.Tensor, given: Any, folder: Path, wishes: Wishes | None = None) -> torch.Tensor:
    torch.save(x, folder / "data.pt")
    samples, _ = prepare(read_data(folder / "data.pt"), given, wishes or Wishes())
    return torch.cat(list(samples))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalising_rounds_once(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    exact = (x.double() / 255 - 0.485) / 0.229
    given = checkpoint(nn.Flatten(), example_inputs=(torch.zeros(1, 1, 16, 16, dtype=dtype),))
    found = from_bytes(x, given, tmp_path, Wishes((0.485,), (0.229,)))
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), exact, rtol=torch.finfo(dtype).eps, atol=4e-7 if dtype != torch.float64 else 0
    )


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((5, 3, 7, 8), 3, (5, 3, 7, 8)),
        ((5, 7, 8, 3), 3, (5, 3, 7, 8)),
        ((5, 3, 8, 3), 3, (5, 3, 8, 3)),
        ((5, 7, 8), 1, (5, 1, 7, 8)),
        ((5, 7, 8, 1), 1, (5, 1, 7, 8)),
        ((5, 6, 7, 8), 6, (5, 6, 7, 8)),
    ],
)
def test_the_axes_of_bytes_are_found(
    shape: tuple[int, ...], channels: int, expected: tuple[int, ...], tmp_path: Path
) -> None:
    x = torch.zeros(shape, dtype=torch.uint8)
    assert from_bytes(x, checkpoint(nn.Flatten(), channels, 7, 8), tmp_path).shape == expected


@pytest.mark.parametrize(("shape", "channels"), [((5, 7, 8), 3), ((5, 4, 7, 8), 3), ((5,), 1), ((1, 2, 3, 4, 5), 2)])
def test_bytes_without_an_axis_of_channels_are_refused(shape: tuple[int, ...], channels: int, tmp_path: Path) -> None:
    with pytest.raises(RepfuseError, match="takes images of"):
        from_bytes(torch.zeros(shape, dtype=torch.uint8), checkpoint(nn.Flatten(), channels, 7, 8), tmp_path)
