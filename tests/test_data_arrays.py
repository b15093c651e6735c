"""Real inputs from a file of tensors: every kind, every name, and what is refused (see also test_cli_bad_input)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repfuse.data import read_data
from repfuse.errors import RepfuseError

IMAGES = torch.arange(24.0).reshape(2, 3, 4)
CLASSES = torch.tensor([1, 0])


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize(("inputs", "labels"), [("inputs", "labels"), ("images", "targets"), ("x", "y")])
def test_every_kind_and_name_is_read(suffix: str, inputs: str, labels: str, tmp_path: Path) -> None:
    found = read_data(write(tmp_path / f"data{suffix}", {inputs: IMAGES, labels: CLASSES, "other": torch.ones(3)}))
    assert torch.equal(found.inputs, IMAGES)
    assert found.labels is not None
    assert torch.equal(found.labels, CLASSES)


def test_a_bare_tensor_is_inputs_without_labels(tmp_path: Path) -> None:
    torch.save(IMAGES, tmp_path / "data.pt")
    found = read_data(tmp_path / "data.pt")
    assert torch.equal(found.inputs, IMAGES)
    assert found.labels is None


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", inputs=np.array([{"a": 1}], dtype=object))
    with pytest.raises(RepfuseError, match="cannot be read"):
        read_data(tmp_path / "data.npz")


@pytest.mark.parametrize("content", [[1, 2], {"inputs": [1, 2]}, {"inputs": torch.tensor(1.0)}, {"x": IMAGES[:0]}])
def test_what_holds_no_samples_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "data.pt")
    with pytest.raises(RepfuseError, match="hold") as caught:
        read_data(tmp_path / "data.pt")
    assert "Save a dict with a tensor under" in caught.value.hint


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2,3")
    with pytest.raises(RepfuseError, match=r"\.csv cannot be read") as caught:
        read_data(tmp_path / "data.csv")
    assert ".npz" in caught.value.why


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("kept", [0, 4, 200])
def test_a_damaged_file_is_refused(suffix: str, kept: int, tmp_path: Path) -> None:
    path = write(tmp_path / f"data{suffix}", {"inputs": IMAGES.repeat(50, 1, 1)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RepfuseError, match="cannot be read"):
        read_data(path)


def test_labels_must_match_the_inputs(tmp_path: Path) -> None:
    with pytest.raises(RepfuseError, match="labels"):
        read_data(write(tmp_path / "data.npz", {"x": IMAGES, "y": torch.tensor([1])}))
