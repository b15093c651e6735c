"""ONNX files count as written once ONNX Runtime computes what the original does."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from support import exported
from torch import Tensor, nn
from torch.export import ExportedProgram

import repfuse
from repfuse import saving
from repfuse.checkpoint import onnx_file
from repfuse.errors import RepfuseError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def session(path: Path) -> Callable[..., Any]:
    made = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [slot.name for slot in made.get_inputs()]
    return lambda *given: made.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})


def close(expected: Tensor, found: Any) -> bool:
    wanted = expected.detach().numpy()
    return bool(np.abs(wanted - found).max() <= 1e-4 * np.abs(wanted).max())


def test_a_network_becomes_onnx_with_dynamic_axes_that_is_verified(cli: Cli, samples: Path, tmp_path: Path) -> None:
    source, out = samples / "repvgg_digits.pt", tmp_path / "fused.onnx"
    done = cli("convert", source, out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    verified = report["output"]["verified"]
    assert report["output"]["format"] == "onnx"
    assert verified["runtime"].startswith("ONNX Runtime")
    assert {"the example", "batch 2", "size 1x1", "size 2x3"} <= set(verified["compared"])
    assert verified["refused"] == []
    assert verified["shapes"] == ["d0x1xd1xd2"]
    assert verified["error"] <= verified["allowed"] <= 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"fused.onnx", "fused.onnx.report.json"}
    convolutions = [node for node in onnx.load(out).graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 5
    run, network = session(out), repfuse.load(source).module
    for size in ((1, 1, 8, 8), (5, 1, 11, 6)):
        given = torch.randn(size)
        assert close(network(given), run(given)[0])


def test_what_is_exported_for_no_other_size_is_written_for_the_examples(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, write, tried = repfuse.load(samples / "notebook_block.pt"), onnx_file.write, []

    def failing(program: Any, path: Path) -> None:
        tried.append(path)
        if len(tried) == 1:
            raise RepfuseError("The network cannot be exported to ONNX.", "", exit_code=1)
        write(program, path)

    monkeypatch.setattr(onnx_file, "write", failing)
    saved = repfuse.save(checkpoint, checkpoint.module, tmp_path / "out.onnx")
    assert len(tried) == 2 and saving.ONE_SIZE in saved.notes
    assert saved.verified is not None and saved.verified.shapes == ("d0x16x32x32",)


def test_a_program_with_keywords_and_nested_outputs_becomes_onnx(tmp_path: Path) -> None:
    made = exported.program()
    checkpoint = repfuse.load(exported.saved(made, tmp_path / "in.pt2"))
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    said = repfuse.save(checkpoint, result.module, tmp_path / "out.onnx")
    assert said.verified
    given, scale = torch.randn(3, 3, 9, 21), torch.randn(1)
    expected, found = made.module()(given, scale=scale), session(tmp_path / "out.onnx")(given, scale)
    assert close(expected["logits"], found[0])
    assert close(expected["maps"][0], found[1])


class Fixed(nn.Module):
    """Takes one size of image, and any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.position = exported.Block(3), nn.Parameter(torch.randn(1, 3, 12, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.position


def test_axes_that_the_network_fixes_stay_fixed(tmp_path: Path) -> None:
    network = exported.randomised(Fixed(), dtype=torch.float32)
    checkpoint = pickled(network, tmp_path)
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    said = repfuse.save(checkpoint, result.module, tmp_path / "out.onnx")
    assert said.verified
    assert said.verified.shapes == ("d0x3x12x10",)


def pickled(network: nn.Module, folder: Path) -> repfuse.loading.Checkpoint:
    torch.save(network, folder / "in.pt")
    return repfuse.load(folder / "in.pt", trust=True, input="2x3x12x10")


def test_a_wrong_weight_in_the_file_is_found_and_nothing_is_written(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = onnx_file.write

    def corrupted(program: ExportedProgram, path: Path) -> None:
        write(program, path)
        model = onnx.load(path)
        weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
        values = onnx.numpy_helper.to_array(weight).copy()
        values.flat[0] += 0.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, path)

    monkeypatch.setattr(onnx_file, "write", corrupted)
    checkpoint = repfuse.load(samples / "notebook_block.pt")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    with pytest.raises(RepfuseError, match="does not compute what the original does") as error:
        repfuse.save(checkpoint, result.module, tmp_path / "out.onnx")
    assert error.value.exit_code == 1
    assert "ONNX Runtime" in error.value.what
    assert list(tmp_path.iterdir()) == []


def test_the_original_and_not_the_fused_network_is_what_counts(samples: Path, tmp_path: Path) -> None:
    checkpoint = repfuse.load(samples / "notebook_block.pt")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    with torch.no_grad():
        next(result.module.parameters()).mul_(1.001)
    with pytest.raises(RepfuseError, match="does not compute"):
        repfuse.save(checkpoint, result.module, tmp_path / "out.onnx")


def test_without_the_extra_it_is_said_before_the_work(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    checkpoint = repfuse.load(samples / "notebook_block.pt")
    with pytest.raises(RepfuseError, match="onnxruntime") as error:
        repfuse.save(checkpoint, checkpoint.module, tmp_path / "d.onnx")
    assert "pip install 'repfuse[onnx]'" in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_too_large_for_one_file_is_refused(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    checkpoint = repfuse.load(samples / "notebook_block.pt")
    with pytest.raises(RepfuseError, match="too large"):
        repfuse.save(checkpoint, checkpoint.module, tmp_path / "out.onnx")


class Strange(nn.Module):
    """Uses an operator that ONNX has not."""

    def __init__(self) -> None:
        super().__init__()
        self.block = exported.Block(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.block(x))


def test_what_onnx_cannot_express_is_said(tmp_path: Path) -> None:
    checkpoint = pickled(exported.randomised(Strange(), dtype=torch.float32), tmp_path)
    with pytest.raises(RepfuseError, match="cannot be exported to ONNX") as error:
        repfuse.save(checkpoint, checkpoint.module, tmp_path / "out.onnx")
    assert "bessel_j0" in str(error.value)
    assert not (tmp_path / "out.onnx").exists()


def test_half_precision_is_verified_or_refused(tmp_path: Path) -> None:
    torch.save(exported.randomised(Fixed(), dtype=torch.float32).to(torch.bfloat16), tmp_path / "in.pt")
    checkpoint = repfuse.load(tmp_path / "in.pt", trust=True, input="2x3x12x10")
    with pytest.raises(RepfuseError, match="ONNX Runtime"):
        repfuse.save(checkpoint, checkpoint.module, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
