"""Large ONNX graphs: their tensors are read one at a time, and what comes out is the same to the last bit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from bench_onnx_memory import READING, WANTED, peaks  # noqa: E402
from onnx import TensorProto  # noqa: E402
from support.onnx_models import fused, kinds, model, node, tensor, wide  # noqa: E402

import repfuse  # noqa: E402
from repfuse import memory, rewriting  # noqa: E402
from repfuse.checking.inputs import Trial, input_variants  # noqa: E402
from repfuse.checking.rounding import rounded_once  # noqa: E402
from repfuse.checking.runs import Outcome, in_float64, run, run_float64  # noqa: E402
from repfuse.checkpoint import onnx_file  # noqa: E402
from repfuse.checkpoint.onnx_graph import network  # noqa: E402
from repfuse.converting import convert  # noqa: E402
from repfuse.errors import RepfuseError  # noqa: E402

HELD = {
    "w3": tensor(1, 4, 4, 3, 3, dtype=np.float32),
    "w1": tensor(2, 4, 4, 1, 1, dtype=np.float32),
    "k": tensor(3, 4, 4, 3, 3, dtype=np.float32),
    **{name: np.abs(tensor(seed, 4, dtype=np.float32)) + 0.5 for seed, name in enumerate("gbmv", 4)},
}
NODES = [
    node("Conv", "x w3", "a", pads=[1] * 4),
    node("Cast", "w1", "half", to=TensorProto.FLOAT16),  # a rounding of weights that stays
    node("Cast", "half", "wide", to=TensorProto.FLOAT),
    node("Conv", "x wide", "c"),
    node("Add", "a c", "d"),
    node("BatchNormalization", "d g b m v", "e"),
    node("Selu", "e", "f"),  # which runs in ONNX Runtime
    node("Conv", "f k", "h"),  # of no sum, and too large for images of a pixel or two
    node("Conv", "f w3", "i"),  # which reads a tensor once more that is merged
    node("Add", "h i", "j"),
    node("Mul", "j j", "y"),
]
EXAMPLE = "1x4x9x8"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that has its weights in another."""
    made = model(NODES, HELD, dtype=np.float32)
    onnx.save(made, tmp_path / "in.onnx", save_as_external_data=True, location="in.onnx.data", size_threshold=0)
    return tmp_path / "in.onnx"


@pytest.fixture
def huge(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Take every graph for a large one."""
    with monkeypatch.context() as patched:
        patched.setattr(network, "HUGE", 0)
        patched.setattr(rewriting, "APART", 0)
        patched.setattr(network, "LARGE", 0)  # constants are computed in each call
        yield patched


def same(one: list[Outcome], other: list[Outcome]) -> bool:
    """Whether outcomes are the same to the last bit."""
    return all(
        (a.error, a.at, a.narrow, a.outputs.keys()) == (b.error, b.at, b.narrow, b.outputs.keys())
        and all(torch.equal(x, b.outputs[name]) for name, x in a.outputs.items())
        for a, b in zip(one, other, strict=True)
    )


def test_runs_are_the_same_to_the_last_bit(path: Path, huge: pytest.MonkeyPatch) -> None:
    streamed = repfuse.load(path, input=EXAMPLE)
    huge.undo()
    huge.setattr(network, "LARGE", 0)
    whole = repfuse.load(path, input=EXAMPLE)
    assert memory.is_streamed(streamed.module) and not memory.is_streamed(whole.module)
    trials = [*input_variants(whole.example_inputs), Trial("wrong", (torch.randn(1, 3, 9, 8),))]
    networks = streamed.module, whole.module
    for change in (in_float64, rounded_once(0, frozenset({"k"}))):
        found, known = (run_float64(each, trials, change) for each in networks)
        assert same(found, known)
    assert any(outcome.error for outcome in known) and not known[0].error
    assert same(*(run(each, trials, {}) for each in networks))


def test_what_is_written_is_the_same_file(path: Path, tmp_path: Path, huge: pytest.MonkeyPatch) -> None:
    def converted(name: str) -> tuple[Any, nn.Module]:
        checkpoint = repfuse.load(path, input=EXAMPLE)
        done = convert(checkpoint)
        assert done.proof is not None and done.proof.passed and done.plan.sites
        assert done.drift is not None and done.drift.passed
        (tmp_path / name).mkdir()
        saved = repfuse.save(checkpoint, done.module, tmp_path / name / "out.onnx", plan=done.plan)
        return (done.proof, done.drift, saved.verified and saved.verified.error, saved.digest), done.module

    found, streamed = converted("one")
    huge.undo()
    huge.setattr(network, "LARGE", 0)
    known, whole = converted("two")
    assert memory.is_streamed(streamed) and not memory.is_streamed(whole)
    assert found == known
    assert kinds(tmp_path / "one" / "out.onnx")["Conv"] == 2


def test_a_wrong_weight_of_a_large_graph_is_found(path: Path, tmp_path: Path, huge: pytest.MonkeyPatch) -> None:
    checkpoint = repfuse.load(path, input=EXAMPLE)
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    assert memory.is_streamed(result.module)
    with torch.no_grad():
        next(x for name, x in result.module.named_parameters() if "fused" in name and x.dim() == 4).add_(1e-3)
    checked = repfuse.verify(checkpoint.module, result.module, checkpoint.example_inputs, plan=result.plan)
    assert checked.verdict == "different"
    with pytest.raises(RepfuseError, match="does not compute in ONNX Runtime"):
        repfuse.save(checkpoint, result.module, tmp_path / "out.onnx", plan=result.plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_tensor_that_is_put_aside_stays_what_it_is(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, 2, 1).to(dtype)
    found = memory.put_aside(x)
    assert found is not x and torch.equal(found, x) and found.dtype is dtype
    found.add_(1)  # whoever changes it changes the memory of nobody else
    assert not torch.equal(found, x)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert memory.put_aside(x) is x


def test_what_is_too_large_for_one_file_is_written_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of protobuf holds 2 GB, the graph included."""
    onnx.save(model(NODES, HELD, dtype=np.float32), tmp_path / "in.onnx")
    monkeypatch.setattr(onnx_file, "LARGEST", 500)
    fused(tmp_path / "in.onnx", tmp_path / "out.onnx", EXAMPLE)
    assert {each.name for each in tmp_path.iterdir()} == {"in.onnx", "out.onnx", "out.onnx.data"}
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    assert repfuse.load(tmp_path / "out.onnx").files == (tmp_path / "out.onnx.data",)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose gigabytes do not stay."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a process holds")
def test_memory(folder: Path) -> None:
    """A process holds no more than reading takes, and 1.3 times the weights of a site."""
    path, out = folder / "in.onnx", folder / "out.onnx"
    site = wide(path, 1536, 4)
    (reading,) = peaks("-c", READING, str(path), "1x1536x4x4")
    for command in (("convert", str(path), str(out)), ("inspect", str(path)), ("verify", str(path), str(out))):
        for held in peaks("-m", "repfuse", *command, "--input", "1x1536x4x4", "--quiet"):
            assert held <= reading + WANTED * site, command


@pytest.mark.slow
def test_more_than_two_gigabytes(cli: Cli, folder: Path) -> None:
    path, out = folder / "in.onnx", folder / "out.onnx"
    wide(path, 4096, 4)
    assert path.with_name("in.onnx.data").stat().st_size > 2**31
    sized = ("--input", "1x4096x2x2")
    done = cli("convert", path, out, *sized, "--quick", "--json", timeout=3600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["plan"]["sites"]) == 4 and report["timing"] is None
    assert report["output"]["verified"]["compared"]
    assert kinds(out) == {"Conv": 4, "Relu": 4}
    onnx.checker.check_model(str(out))
    done = cli("verify", path, out, "--quick", "--json", timeout=3600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["proof"]["sites"]
