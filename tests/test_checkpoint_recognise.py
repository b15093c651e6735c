"""Files are recognised by what is in them: their name never counts."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from repfuse.checkpoint.formats import Container, recognise
from repfuse.errors import RepfuseError

STATE = {"weight": torch.ones(2, 3)}


def torch_file(legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zipped(*members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member in members:
            archive.writestr(member, b"data")
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), buffer)
    return buffer.getvalue()


def exported() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(1),)), buffer)
    return buffer.getvalue()


def array(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "container"),
    [
        (torch_file(), Container.TORCH_ZIP),
        (torch_file(legacy=True), Container.TORCH_LEGACY),
        (save(STATE), Container.SAFETENSORS),
        (exported(), Container.EXPORTED),
        (script(), Container.TORCHSCRIPT),
        (b"\x08\x09\x12\x07pytorch" + bytes(50), Container.ONNX),
        (b"\x08\x04\x3a\x07graph..", Container.ONNX),
        (json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}).encode(), Container.SHARDED),
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.onnx", "x.txt", "x"])
def test_the_name_does_not_matter(data: bytes, container: Container, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert recognise(tmp_path / name) is container


FOREIGN = {
    "NumPy archive": array(a=np.ones(3)),
    "Keras": zipped("config.json", "model.weights.h5"),
    "no data.pkl": zipped("a.txt"),
    "GGUF": b"GGUF\x03\0\0\0" + bytes(50),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(50),
    "NumPy array": b"\x93NUMPY\x01\0" + bytes(50),
    "TensorFlow Lite": b"\x1c\0\0\0TFL3" + bytes(50),
    "plain Python pickle": pickle.dumps({"a": 1}),
    "gzip": gzip.compress(b"data"),
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
    "web page": b"\n<!doctype html><html>".strip(),
    "text": b"epoch,loss\n1,0.5\n",
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "no format that repfuse knows": bytes(range(200, 255)) * 3,
}


@pytest.mark.parametrize("said", FOREIGN)
def test_other_formats_are_named_and_come_with_advice(said: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(FOREIGN[said])
    with pytest.raises(RepfuseError) as error:
        recognise(tmp_path / "x.pt")
    assert said in str(error.value)
    assert error.value.hint
    assert error.value.exit_code == 2


def test_a_missing_file_a_folder_and_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    for path, said in ((tmp_path / "no.pt", "does not exist"), (tmp_path, "folder"), (tmp_path / "empty.pt", "empty")):
        with pytest.raises(RepfuseError, match=said):
            recognise(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.pt").write_bytes(b"data")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(RepfuseError, match="Permission denied"):
        recognise(tmp_path / "x.pt")
