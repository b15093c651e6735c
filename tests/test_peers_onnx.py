"""What optimisers of ONNX graphs leave of parallel branches, beside what repfuse does: `make peers`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.agreement import randomised
from support.onnx_models import exported, fused, kinds
from test_peers_compilers import BLOCKS, Block
from torch import nn

pytestmark = pytest.mark.peers


def onnx_runtime(path: Path, out: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnxsim(path: Path, out: Path) -> None:
    onnx.save(importlib.import_module("onnxsim").simplify(onnx.load(path))[0], out)


def onnxslim(path: Path, out: Path) -> None:
    onnx.save(importlib.import_module("onnxslim").slim(str(path)), out)


def onnxoptimizer(path: Path, out: Path) -> None:
    passes = ("fuse_bn_into_conv", "fuse_add_bias_into_conv", "eliminate_identity")
    onnx.save(importlib.import_module("onnxoptimizer").optimize(onnx.load(path), list(passes)), out)


def onnxscript(path: Path, out: Path) -> None:
    onnx.save(importlib.import_module("onnxscript.optimizer").optimize(onnx.load(path)), out)


def repfuse(path: Path, out: Path) -> None:
    fused(path, out)


OPTIMISERS: dict[str, tuple[Callable[[Path, Path], None], int]] = {
    "onnxruntime": (onnx_runtime, 2),
    "onnxsim": (onnxsim, 2),
    "onnxslim": (onnxslim, 2),
    "onnxoptimizer": (onnxoptimizer, 2),
    "onnxscript": (onnxscript, 2),
    "repfuse": (repfuse, 1),
}
"""Each with the convolutions that it leaves of a block."""


def error(path: Path, out: Path) -> float:
    """Of the result in ONNX Runtime against the original in float64."""
    x = np.random.default_rng(0).standard_normal((1, 16, 32, 32))
    made = onnx.load(path)
    wide = torch.load(path.with_suffix(".pt"), weights_only=False).double()(torch.from_numpy(x)).detach().numpy()
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    found = session.run(None, {made.graph.input[0].name: x.astype(np.float32)})[0]
    return float(np.abs(found - wide).max() / np.abs(wide).max())


@pytest.mark.parametrize("name", OPTIMISERS)
def test_convolutions_that_are_left(name: str, tmp_path: Path, record_property: Any) -> None:
    run, per_block = OPTIMISERS[name]
    if name not in ("onnxruntime", "repfuse"):
        pytest.importorskip(name)
    net = randomised(nn.Sequential(*(Block(16) for _ in range(BLOCKS))), dtype=torch.float32)
    torch.save(net, tmp_path / "in.pt")
    path, out = exported(net, [torch.randn(1, 16, 32, 32)], tmp_path / "in.onnx"), tmp_path / "out.onnx"
    run(path, out)
    left = kinds(out)
    off = error(path, out)
    record_property("left", {kind: left[kind] for kind in ("Conv", "BatchNormalization", "Add")} | {"error": off})
    assert left["Conv"] + left["FusedConv"] == per_block * BLOCKS
    assert off < 1e-5
    if name == "repfuse":
        assert not left["BatchNormalization"] and not left["Add"]
