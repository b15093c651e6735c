"""What compilers leave of parallel branches, as the README says: a convolution each. `make peers`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from support.agreement import randomised
from torch import Tensor, nn

import repfuse

pytestmark = pytest.mark.peers

BLOCKS = 4
X = torch.zeros(1, 16, 32, 32)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.three = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.one = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.three(x), self.one(x), x)
        return torch.relu(sum(norm(branch) for norm, branch in zip(self.norms, branches, strict=True)))


def networks() -> dict[str, nn.Module]:
    original = randomised(nn.Sequential(*(Block(16) for _ in range(BLOCKS))), dtype=torch.float32)
    return {"original": original, "fused": repfuse.fuse(original, (X,)).module}


def onnx_runtime(network: nn.Module, folder: Path) -> Counter[str]:
    torch.onnx.export(network, (X,), folder / "in.onnx", dynamo=True, optimize=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "out.onnx")
    onnxruntime.InferenceSession(folder / "in.onnx", options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "out.onnx").graph.node)


def inductor(network: nn.Module) -> int:
    """How many convolutions torch.compile calls."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with config.patch(freezing=True), torch.no_grad():
        _, code = run_and_get_code(torch.compile(network), X)
    return sum(
        len(re.findall(r"torch\.ops\.mkldnn\._convolution\w*\.\w+\(|extern_kernels\.convolution\(", part))
        for part in code
    )


@pytest.mark.parametrize(("name", "per_block", "norms"), [("original", 2, BLOCKS), ("fused", 1, 0)])
def test_onnx_runtime_keeps_a_convolution_for_each_branch(
    name: str, per_block: int, norms: int, tmp_path: Path
) -> None:
    left = onnx_runtime(networks()[name], tmp_path)
    assert (left["Conv"] + left["FusedConv"], left["BatchNormalization"]) == (per_block * BLOCKS, norms)


@pytest.mark.parametrize(("name", "per_block"), [("original", 2), ("fused", 1)])
def test_inductor_keeps_a_convolution_for_each_branch(name: str, per_block: int) -> None:
    assert inductor(networks()[name]) == per_block * BLOCKS
