"""What PyTorch's two exporters make of the project's blocks and of timm's networks merges as it does in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import CASES, conv, conv_norm, norm
from support.agreement import outputs, randomised
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from support.onnx_models import exported, fused, kinds  # noqa: E402

import repfuse  # noqa: E402

NOT_EXPORTED = (
    "windows, 1x1", "windows, 2x2", "1x1, windows, norm", "3x3, windows, norm", "1x1, norm, windows, 1x1",
    "spectral_norm", "nn.ChannelShuffle", "upsampled along one axis",
)  # fmt: skip
"""What the older exporter does not take with free sizes."""

FILLED = ("DBB", "branch alone", "in a row alone", "ECBSR", "edge filter", "RRRB")
"""Blocks that fill a border by assignment: the exporters write that as dozens of nodes with computed places."""

OTHERWISE = {
    "average with a divisor",  # which ONNX has not, and the exporter drops
    "grouped, shuffled, grouped",  # by views of computed sizes
    "tables in a batch",
    "stacked heads",
    "channels repeated",  # a Tile and views of sizes that are read in between
    "stacked and summed",  # a stack is a Concat of axes that are put in
    "weight standardisation by a norm",  # whose norm is one of the batch of weights
    "norm, unshuffle, 1x1",  # in six axes
    "unshuffle, 1x1 beside a 3x3 of stride 2",
    "3x3, depth to space by views, norm",  # whose sizes are read in between
}


def merges(name: str) -> bool:
    """Whether a block merges as it does in PyTorch."""
    return name not in OTHERWISE and not any(part in name for part in FILLED)


def convolutions(path: Path) -> tuple[int, int, int]:
    left = kinds(path)
    return left["Conv"] + left["ConvTranspose"], left["Gemm"] + left["MatMul"], left["BatchNormalization"]


SOON = {row.name for row in CASES[3::48]} - {"DBB 5x5"} | {"DBB, 1-d", "a norm of joined maps, 2-d"}
"""What every run checks: of the blocks that fill a border on one axis, which takes half of the nodes."""


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.name, marks=() if r.name in SOON else pytest.mark.slow) for r in CASES]
)
def test_block(row: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, example = randomised(row.make()), row.at(row.side)
    if any(part in row.name for part in NOT_EXPORTED):
        pytest.skip("the exporter does not take it")
    axes = {f"x{place}": {0: "n"} for place in range(len(example))}
    path = exported(net, example, tmp_path / "in.onnx", dynamic_axes=axes)
    fused(path, tmp_path / "out.onnx", ",".join("x".join(map(str, x.shape)) for x in example), policy=row.policy)
    if merges(row.name):
        assert convolutions(tmp_path / "out.onnx") == (row.convolutions, row.linears, row.norms)
    before, after = repfuse.load(path).module, repfuse.load(tmp_path / "out.onnx").module
    filled = any(part in row.name for part in FILLED)  # of one batch, whatever the file says
    for inputs in (example,) if filled else (example, row.at(row.side, seed=1, batch=3)):
        for one, other, own in zip(*(outputs(each, *inputs) for each in (before, after, net)), strict=True):
            scale = max(float(one.abs().max()), 1e-300)
            assert float((one - other).abs().max()) <= 1e-11 * scale
            assert row.name in OTHERWISE or float((one - own).abs().max()) <= 1e-8 * scale  # eps is a float32 there


def alike(net: nn.Module, example: Sequence[Tensor], folder: Path, **settings: Any) -> None:
    """Check that no more nodes of a kind are left than of the network that was fused in PyTorch."""
    folded = {"training": torch.onnx.TrainingMode.EVAL, "do_constant_folding": True, "dynamic_axes": {}}
    settings = settings or folded
    path = exported(net, example, folder / "in.onnx", **settings)
    fused(path, folder / "out.onnx")
    known = exported(repfuse.fuse(net, example).module, example, folder / "known.onnx", **settings)
    for kind in ("Conv", "BatchNormalization", "Add", "Gemm", "MatMul"):
        assert kinds(folder / "out.onnx")[kind] <= kinds(known)[kind], kind


class Stack(nn.Module):
    """A stem, blocks of several authors, and a head."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5)
        self.blocks = nn.ModuleList(next(case.make() for case in CASES if case.name == name) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x.mean((2, 3)))


class Detector(nn.Module):
    """What detectors of a YOLO kind are made of: parts of channels, pools in a row, an upsampled level, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv_norm(3, inputs=3), conv_norm(3, stride=2)
        self.three, self.one, self.skip = conv_norm(3), conv_norm(1), norm()
        self.inner, self.join = conv_norm(3, inputs=2, outputs=2), conv_norm(1, inputs=6)
        self.pooled, self.head = conv_norm(1, inputs=8), conv(1, inputs=8, outputs=6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.silu(self.stem(x))
        y = nn.functional.silu(self.down(x))
        y = nn.functional.silu(self.three(y) + self.one(y) + self.skip(y))
        one, other = y.chunk(2, 1)
        y = nn.functional.silu(self.join(torch.cat([one, other, nn.functional.silu(self.inner(other))], 1)))
        y = nn.functional.silu(self.pooled(torch.cat([y, nn.functional.max_pool2d(y, 5, 1, 2)], 1)))
        x = torch.cat([x, nn.functional.interpolate(y, scale_factor=2.0, mode="nearest")], 1)
        boxes = self.head(x)
        return boxes.flatten(2).permute(0, 2, 1), boxes.sigmoid()


NETWORKS = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repvit_m1", "ghostnetv3_050", "levit_128s")
DYNAMO: dict[str, Any] = {"dynamo": True, "external_data": False}


@pytest.mark.parametrize("dynamo", [False, True])
def test_detector(dynamo: bool, tmp_path: Path) -> None:
    net = randomised(Detector(), dtype=torch.float32)
    alike(net, [torch.randn(1, 3, 16, 16)], tmp_path, **DYNAMO if dynamo else {})


BLOCKS = ("RepVGG stride 1 groups 1", "MobileOne 4", "ACNet", "dilated union", "UniRepLKNet without the norm after")


@pytest.mark.parametrize("dynamo", [False, True])
def test_stack(dynamo: bool, tmp_path: Path) -> None:
    net = randomised(Stack(*BLOCKS), dtype=torch.float32)
    alike(net, [torch.randn(1, 3, 20, 20)], tmp_path, **DYNAMO if dynamo else {})


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_of_timm(name: str, dynamo: bool, tmp_path: Path) -> None:
    import timm

    net = randomised(timm.create_model(name), dtype=torch.float32)
    size = 256 if "fastvit" in name else 224
    alike(net, [torch.randn(1, 3, size, size)], tmp_path, **DYNAMO if dynamo else {})
