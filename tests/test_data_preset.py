"""How images become inputs: the numbers of timm's and torchvision's own transforms, and what configurations say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.models import get_model_weights
from torchvision.models.segmentation import FCN_ResNet50_Weights

from repfuse.checkpoint.source import ModelSource
from repfuse.data.configurations import of_processor, of_timm, of_torchvision
from repfuse.data.known import known
from repfuse.data.pixels import pixels
from repfuse.data.preset import INTERPOLATIONS, MODES, Preset
from repfuse.data.scaling import laid_out, normalised
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


def prepared(path: Path, size: tuple[int, int], preset: Preset, channels: int = 3) -> torch.Tensor:
    each = preset.per_channel(channels)
    assert each is not None
    return normalised(pixels(path, channels, size, each)[None], each, torch.float32)[0]


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "interpolation": st.sampled_from(sorted(set(INTERPOLATIONS) - {"hamming", "box"})),
        "crop_mode": st.sampled_from(MODES),
        "crop_pct": st.sampled_from([0.5, 0.8, 0.875, 0.9, 0.95, 0.96, 1.0, 1.1]),
        "mean": st.sampled_from([(0.485, 0.456, 0.406), (0.5, 0.5, 0.5), (0.0, 0.1, 0.9)]),
        "std": st.sampled_from([(0.229, 0.224, 0.225), (1.0, 1.0, 1.0)]),
    }
)
EDGES = st.integers(2, 70)


@given(CONFIGURATIONS, st.tuples(EDGES, EDGES), st.tuples(EDGES, EDGES), st.booleans())
@settings(max_examples=100)
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
    preset = of_torchvision(transforms, "torchvision")
    assert preset is not None
    ours = prepared(path, (transforms.crop_size[0],) * 2, preset)
    assert torch.equal(ours, transforms(Image.open(path).convert("RGB")))


def test_one_channel_is_grey_as_timm_reads_it(tmp_path: Path) -> None:
    path = image(tmp_path / "image.png", 30, 20)
    config = {"mean": (0.3,), "std": (0.7,), "input_size": (1, 16, 16)}
    theirs = create_transform(**resolve_data_config({"in_chans": 1}, pretrained_cfg=config))
    preset = of_timm(config, "timm")
    assert preset is not None
    assert torch.equal(prepared(path, (16, 16), preset, channels=1), theirs(Image.open(path).convert("L")))


def test_an_image_of_the_input_s_size_is_taken_pixel_by_pixel_where_nothing_is_known(tmp_path: Path) -> None:
    path = image(tmp_path / "image.png", 9, 14)
    expected = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
    assert torch.equal(prepared(path, (9, 14), Preset("nothing")), expected)


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
        {"crop_mode": "wide"},
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
    preset = of_timm({"mean": [0.5], "std": [0.5]}, "timm")
    assert preset == Preset("timm", (0.5,), (0.5,), "bicubic", "center", 1.0, 0.875)
    assert preset.scaled((224, 112)) == (256, 128)


PROCESSOR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "resample": 3}


@pytest.mark.parametrize(
    ("config", "mode", "scaled"),
    [
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}, 0, 256),
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, 0, 256),
        ({"size": {"height": 224, "width": 224}, "do_center_crop": False}, 2, 224),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 0, 256),
    ],
)
def test_a_processor_s_configuration_is_read(config: dict[str, Any], mode: int, scaled: int) -> None:
    preset = of_processor(PROCESSOR | config, "processor")
    assert preset is not None
    assert (preset.mean, preset.std, preset.interpolation) == ((0.5, 0.4, 0.3), (0.2,) * 3, "bicubic")
    assert (preset.mode, preset.scaled((224, 224))) == (["center", "border", "squash"][mode], (scaled, scaled))


@pytest.mark.parametrize(
    "odd",
    [
        {"do_normalize": False},
        {"rescale_factor": 1.0},
        {"rescale_factor": "1"},
        {"resample": 17},
        {"resample": []},
        {"size": {"shortest_edge": []}, "crop_size": 224, "do_center_crop": True},
        {"image_mean": None},
        {"size": -256, "crop_size": -224, "do_center_crop": True},
    ],
)
def test_a_processor_that_does_something_else_is_no_answer(odd: dict[str, Any]) -> None:
    assert of_processor(PROCESSOR, "processor") is not None
    assert of_processor(PROCESSOR | odd, "processor") is None


def checkpoint(module: nn.Module, path: Path = Path("in.pt"), spec: str = "") -> Any:
    return SimpleNamespace(module=module, path=path, source=ModelSource(spec) if spec else None)


def test_a_network_of_timm_knows_its_own() -> None:
    module = timm.create_model("test_byobnet")
    found = known(checkpoint(module))
    assert found is not None
    assert found.mean == tuple(module.pretrained_cfg["mean"])
    assert found.crop == module.pretrained_cfg["crop_pct"]
    assert "timm's configuration" in found.origin


def test_a_snapshot_s_configuration_comes_before_the_network_s_own(tmp_path: Path) -> None:
    module = timm.create_model("test_byobnet")
    weights = tmp_path / "model.safetensors"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    found = known(checkpoint(module, weights))
    assert found is not None and found.origin == "preprocessor_config.json"
    own = {"pretrained_cfg": TIMM | {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    found = known(checkpoint(module, weights))
    assert found is not None and (found.origin, found.mean) == ("config.json", (0.1, 0.2, 0.3))
    (tmp_path / "config.json").write_text(json.dumps(own["pretrained_cfg"]))  # as timm wrote it before 1.0
    assert known(checkpoint(module, weights)) == found
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
    assert (found.mean, found.scaled((224, 224))) == ((0.485, 0.456, 0.406), (232, 232))
    dense = of_torchvision(FCN_ResNet50_Weights.DEFAULT.transforms(), "torchvision")
    assert dense is not None and dense.scaled((520, 520)) == (520, 520)
    assert known(checkpoint(nn.Identity(), spec="torchvision:fasterrcnn_resnet50_fpn")) is None
    assert known(checkpoint(nn.Identity())) is None


def test_a_preset_for_other_channels_is_none() -> None:
    preset = replace(Preset("a"), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert preset.per_channel(3) == preset
    assert preset.per_channel(1) is None
    assert replace(preset, mean=(0.5,)).per_channel(3) == replace(preset, mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalising_rounds_once(dtype: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    preset = Preset("a", (0.485,), (0.229,))
    exact = (x.double() / 255 - 0.485) / 0.229
    found = normalised(x, preset, dtype)
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
