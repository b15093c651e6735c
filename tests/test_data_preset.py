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
from repfuse.data import (
    INTERPOLATIONS,
    Preset,
    Wishes,
    by_pillow,
    known,
    laid_out,
    normalised,
    of_timm,
    of_torchvision,
    prepare,
    read_data,
    read_image,
)
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


def prepared(path: Path, size: tuple[int, int], preset: Preset) -> torch.Tensor:
    return read_image(path, len(preset.mean), preset.preparing(size, preset.mean, preset.std))


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
    path = image(tmp_path_factory.getbasetemp() / "timm.png", *shape)
    resolved = resolve_data_config({"input_size": (3, *size)}, pretrained_cfg=config)
    theirs = create_transform(**resolved, is_training=False)
    preset = of_timm(config, "timm")
    assert preset is not None
    try:
        expected = theirs(Image.open(path).convert("RGB"))
    except ValueError:  # its own transform cannot resize to nothing
        reject()
    assert torch.equal(prepared(path, size, preset), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_v2_l", "inception_v3"])
@pytest.mark.parametrize("shape", [(300, 400), (40, 33), (500, 280)])
def test_the_numbers_are_those_of_torchvision_s_own_transform(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    path, transforms = image(tmp_path / "image.png", *shape), get_model_weights(name).DEFAULT.transforms()
    preset = of_torchvision(name)
    assert preset is not None
    ours = prepared(path, (transforms.crop_size[0],) * 2, preset)
    assert torch.equal(ours, transforms(Image.open(path).convert("RGB")))


def test_one_channel_is_grey_as_timm_reads_it(tmp_path: Path) -> None:
    path = image(tmp_path / "image.png", 30, 20)
    config = {"mean": (0.3,), "std": (0.7,), "input_size": (1, 16, 16)}
    theirs = create_transform(**resolve_data_config({"in_chans": 1}, pretrained_cfg=config))
    preset = of_timm(config, "timm")
    assert preset is not None
    assert torch.equal(prepared(path, (16, 16), preset), theirs(Image.open(path).convert("L")))


def test_an_image_of_the_input_s_size_is_taken_pixel_by_pixel_where_nothing_is_known(tmp_path: Path) -> None:
    path = image(tmp_path / "image.png", 9, 14)
    expected = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
    assert torch.equal(read_image(path, 3, by_pillow((9, 14), (0.0,) * 3, (1.0,) * 3)), expected)


def test_where_nothing_is_known_the_centre_covers_the_input(tmp_path: Path) -> None:
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[:, 20:80] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    preparing = by_pillow((20, 20), (0.5,) * 3, (0.5,) * 3)
    assert preparing.geometry == "resized to cover 20x20 (bilinear), 20x20 at the centre"
    assert torch.equal(read_image(tmp_path / "image.png", 3, preparing), torch.ones(3, 20, 20))


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
def test_what_makes_no_sense_is_no_answer(odd: dict[str, Any]) -> None:
    assert of_timm(TIMM, "timm") is not None
    assert of_timm(TIMM | odd, "timm") is None


@pytest.mark.parametrize("odd", [None, [], "mean", 3])
def test_a_configuration_is_a_mapping(odd: Any) -> None:
    assert of_timm(odd, "timm") is None


def test_what_timm_s_configuration_leaves_out_is_timm_s_default() -> None:
    preset = of_timm({"mean": [0.5], "std": [0.5], "crop_pct": None}, "timm")
    assert preset is not None and (preset.mean, preset.std) == ((0.5,), (0.5,))
    preparing = preset.preparing((224, 112), (0.5,), (0.5,))
    assert preparing.geometry == "resized to cover 256x128 (bicubic), 224x112 at the centre"


@pytest.mark.parametrize(("mode", "words"), [("center", "to cover"), ("border", "to fit within"), ("squash", "to")])
def test_how_timm_resizes_is_said(mode: str, words: str) -> None:
    preset = of_timm(TIMM | {"crop_mode": mode}, "timm")
    assert preset is not None
    assert preset.preparing((7, 7), preset.mean, preset.std).geometry.startswith(f"resized {words} 8x8 (bicubic)")


def test_without_timm_its_numbers_are_kept_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "image.png", 30, 40)
    monkeypatch.setitem(sys.modules, "timm", None)
    preset = of_timm(TIMM, "timm")
    assert preset is not None
    preparing, plain = (by((16, 16), preset.mean, preset.std) for by in (preset.preparing, by_pillow))
    assert "(bilinear), 16x16 at the centre and not as timm would" in preparing.geometry
    assert torch.equal(*(read_image(tmp_path / "image.png", 3, by) for by in (preparing, plain)))


def checkpoint(module: nn.Module, path: Path = Path("in.pt"), spec: str = "") -> Any:
    return SimpleNamespace(module=module, path=path, source=ModelSource(spec) if spec else None)


def test_a_network_of_timm_knows_its_own() -> None:
    module = timm.create_model("test_byobnet")
    found = known(checkpoint(module))
    assert found is not None
    assert found.mean == tuple(module.pretrained_cfg["mean"])
    assert "timm's configuration" in found.origin


def test_a_snapshot_s_configuration_comes_before_the_network_s_own(tmp_path: Path) -> None:
    module = timm.create_model("test_byobnet")
    weights = tmp_path / "model.safetensors"
    own = {"pretrained_cfg": TIMM | {"mean": [0.1, 0.2, 0.3]}}
    for config in (own, own["pretrained_cfg"]):  # the second as timm wrote it before 1.0
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = known(checkpoint(module, weights))
        assert found is not None and (found.origin, found.mean) == ("config.json", (0.1, 0.2, 0.3))
    found = known(checkpoint(module, tmp_path / "last.ckpt"))  # beside it by chance
    assert found is not None and "timm's configuration" in found.origin


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pretrained_cfg": 3}', '{"mean": [1], "mean": [2]}'])
def test_a_damaged_configuration_is_no_answer(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert known(checkpoint(nn.Identity(), tmp_path / "model.safetensors")) is None


def test_networks_of_torchvision_are_prepared_as_for_their_usual_weights() -> None:
    found = known(checkpoint(nn.Identity(), spec="torchvision:resnet50"))
    assert found is not None
    assert found.origin == "torchvision's ResNet50_Weights.IMAGENET1K_V2"
    assert found.mean == (0.485, 0.456, 0.406)
    geometry = found.preparing((224, 224), found.mean, found.std).geometry
    assert geometry == "resized to cover 232x232 (bilinear), 224x224 at the centre"
    assert known(checkpoint(nn.Identity(), spec="torchvision:fasterrcnn_resnet50_fpn")) is None
    assert known(checkpoint(nn.Identity())) is None


@pytest.mark.parametrize("size", [(64, 64), (40, 64), (300, 500)])
def test_torchvision_prepares_inputs_of_another_size(size: tuple[int, int], tmp_path: Path) -> None:
    path, weights = image(tmp_path / "image.png", 90, 120), get_model_weights("resnet50").DEFAULT
    preset = of_torchvision("resnet50")
    assert preset is not None
    edge = max(size)
    theirs = weights.transforms(crop_size=edge, resize_size=edge * 232 // 224)(Image.open(path))
    assert torch.equal(prepared(path, size, preset), center_crop(theirs, list(size)))


def test_torchvision_crops_nothing_off_for_segmentation_but_what_is_beyond_the_input(tmp_path: Path) -> None:
    path, weights = image(tmp_path / "image.png", 90, 120), FCN_ResNet50_Weights.DEFAULT
    preset = of_torchvision("fcn_resnet50")
    assert preset is not None
    theirs = weights.transforms(resize_size=60)(Image.open(path))
    assert torch.equal(prepared(path, (60, 60), preset), theirs[:, :, 10:70])


def test_images_in_a_folder_are_as_timm_and_torchvision_give_them(tmp_path: Path) -> None:
    path, module = image(tmp_path / "image.png", 90, 120), timm.create_model("test_byobnet").eval()
    weights = get_model_weights("resnet18").DEFAULT
    resolved = resolve_data_config({"input_size": (3, 48, 64)}, model=module)
    for size, spec, theirs in (
        ((48, 64), "", create_transform(**resolved)),
        ((224, 224), "torchvision:resnet18", weights.transforms()),
    ):
        given = checkpoint(nn.Flatten() if spec else module, spec=spec)
        given.program, given.example_inputs = None, (torch.zeros(1, 3, *size),)
        samples, _ = prepare(read_data(tmp_path), given, Wishes())
        assert torch.equal(torch.cat(list(samples))[0], theirs(Image.open(path)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalising_rounds_once(dtype: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    exact = (x.double() / 255 - 0.485) / 0.229
    found = normalised(x, (0.485,), (0.229,), dtype)
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
def test_the_axes_of_bytes_are_found(shape: tuple[int, ...], channels: int, expected: tuple[int, ...]) -> None:
    permute, _ = laid_out(shape, channels)
    assert permute(torch.zeros(shape)).shape == expected


@pytest.mark.parametrize(("shape", "channels"), [((5, 7, 8), 3), ((5, 4, 7, 8), 3), ((5,), 1), ((1, 2, 3, 4, 5), 2)])
def test_bytes_without_an_axis_of_channels_are_refused(shape: tuple[int, ...], channels: int) -> None:
    with pytest.raises(RepfuseError, match="takes images of"):
        laid_out(shape, channels)
