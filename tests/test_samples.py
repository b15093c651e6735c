"""The sample checkpoints are what their README says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repfuse import fuse
from repfuse.samples import DigitsMobileOne, DigitsRepVGG, NotebookBlock


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def test_the_four_digits_checkpoints_hold_the_same_weights(samples: Path) -> None:
    module = torch.load(samples / "repvgg_digits.pt", weights_only=False)
    layouts = {
        "state dict": torch.load(samples / "repvgg_digits_state_dict.pth", weights_only=True),
        "training": torch.load(samples / "repvgg_digits_training.pt", weights_only=True)["model"],
        "safetensors": load_file(samples / "repvgg_digits.safetensors"),
    }
    expected = _state(module)
    for name, state in layouts.items():
        assert set(state) == set(expected), name
        assert all(torch.equal(state[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("name", ["repvgg", "mobileone"])
def test_the_classifiers_are_right_on_98_percent_of_the_held_out_digits(name: str, samples: Path) -> None:
    model = torch.load(samples / f"{name}_digits.pt", weights_only=False).eval()
    data = load_file(samples / "digits_heldout.safetensors")
    with torch.inference_mode():
        accuracy = (model(data["inputs"]).argmax(1) == data["labels"]).double().mean()
    assert data["inputs"].shape == (360, 1, 8, 8)
    assert accuracy >= 0.98


@pytest.mark.parametrize(("name", "norms"), [("repvgg", 13), ("mobileone", 29)])
def test_the_statistics_of_the_normalisations_are_trained(name: str, norms: int, samples: Path) -> None:
    # Fresh statistics (mean 0, variance 1) would hide every mistake in folding them.
    state = torch.load(samples / f"{name}_digits.pt", weights_only=False).state_dict()
    means = [value for key, value in state.items() if key.endswith("running_mean")]
    variances = [value for key, value in state.items() if key.endswith("running_var")]
    assert len(means) == norms
    assert all(mean.abs().max() > 1e-2 for mean in means)
    assert all((variance - 1).abs().max() > 1e-2 for variance in variances)


def test_the_notebook_block_has_weights_in_all_its_parameters(samples: Path) -> None:
    block = torch.load(samples / "notebook_block.pt", weights_only=False)
    assert isinstance(block, NotebookBlock)
    assert block.conv3.padding == "same"
    assert all(parameter.abs().mean() > 0.05 for parameter in block.parameters())


def test_each_layer_of_the_mobileone_becomes_one_convolution() -> None:
    model = DigitsMobileOne().eval()
    fused = fuse(model, (torch.rand(model.input_shape),)).module
    found = [module for module in fused.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [module.groups for module in found] == [1, 16, 1, 16, 1, 32, 1, 32, 1]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.parametrize(
    "model", [NotebookBlock(), DigitsRepVGG(), DigitsMobileOne()], ids=["notebook", "digits", "one"]
)
def test_each_class_runs_on_its_input_shape(model: torch.nn.Module) -> None:
    assert torch.isfinite(model.eval()(torch.ones(model.input_shape))).all()


def test_the_folder_is_small(samples: Path) -> None:
    assert sum(path.stat().st_size for path in samples.iterdir()) < 1_200_000


@pytest.mark.slow
def test_make_samples_remakes_them(samples: Path, tmp_path: Path) -> None:
    runpy.run_path(str(samples / "make_samples.py"))["main"](tmp_path)
    made, kept = (load_file(folder / "digits_heldout.safetensors") for folder in (tmp_path, samples))
    assert torch.equal(made["inputs"], kept["inputs"])
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in samples.iterdir() if path.suffix in {".pt", ".pth", ".safetensors"}
    }
