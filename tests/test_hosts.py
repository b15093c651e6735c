"""Libraries that fold what is left when they run or export a network go on doing so with what repfuse made of it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from support import exported
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import repfuse

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """The layer of the YOLO family, which says its own class over a method of torch."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        self.type = "layers.Layer"  # type: ignore[assignment, method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class Host(nn.Module):
    """Folds as its library does: by the name ``bn``, whatever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(3, 4), Layer(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def fuse(self) -> Host:
        for layer in self.layers:
            conv, bn = layer.conv, layer.bn
            weights = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *weights)
            del layer.bn
            layer.forward = MethodType(type(layer).forward_fuse, layer)
        return self


class Older(Host):
    """As its older versions do, by products of matrices."""

    def fuse(self) -> Host:
        for layer in self.layers:
            conv, bn = layer.conv, layer.bn
            scale = torch.diag(bn.weight.div(torch.sqrt(bn.eps + bn.running_var)))
            shift = bn.bias - bn.weight.mul(bn.running_mean).div(torch.sqrt(bn.running_var + bn.eps))
            weight = torch.mm(scale, conv.weight.flatten(1)).view_as(conv.weight)
            conv.bias = nn.Parameter(torch.mm(scale, conv.bias[:, None])[:, 0] + shift)
            conv.weight = nn.Parameter(weight)
            del layer.bn
            layer.forward = layer.forward_fuse
        return self


@pytest.mark.parametrize("host", [Host, Older])
@torch.no_grad()
def test_a_host_folds_what_was_folded_and_nothing_changes(host: type[Host], tmp_path: Path) -> None:
    network = exported.randomised(host(), dtype=torch.float32)
    torch.save({"model": network, "ema": None}, tmp_path / "in.pt")
    checkpoint = repfuse.load(tmp_path / "in.pt", allow=[__name__], input="2x3x16x16")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    assert len(result.plan.sites) == 2
    assert result.module.state_dict().keys() == {
        f"layers.{i}.conv.{name}" for i in (0, 1) for name in ("weight", "bias")
    }
    repfuse.save(checkpoint, result.module, tmp_path / "out.pt", plan=result.plan)
    fused = repfuse.load(tmp_path / "out.pt", allow=[__name__], input="2x3x16x16").module
    before = fused(X)
    assert torch.allclose(before, network(X), atol=1e-5)
    after = copy.deepcopy(fused).fuse()
    assert not any("bn" in layer._modules for layer in after.layers)
    assert torch.equal(before, after(X))


class Plain(nn.Module):
    """Folds nothing itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def test_elsewhere_nothing_is_left_of_a_folded_normalisation() -> None:
    result = repfuse.fuse(exported.randomised(Plain(), dtype=torch.float32), (X,))
    assert type(result.module.bn) is nn.Identity and not dict(result.module.bn.named_buffers())


@pytest.mark.peers
@pytest.mark.parametrize("name", ["yolov8n", "yolov9t", "yolov10n", "yolo11n"])
def test_networks_of_ultralytics_run_and_fold_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    ultralytics: Any = pytest.importorskip("ultralytics")
    made = ultralytics.YOLO(f"{name}.yaml")
    for norm in (part for part in made.model.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.8, 1.2)
    made.save(tmp_path / "in.pt")
    checkpoint = repfuse.load(tmp_path / "in.pt", allow=["ultralytics"], input="1x3x64x64")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    assert result.plan.sites
    repfuse.save(checkpoint, result.module, tmp_path / "out.pt", plan=result.plan)
    given = torch.rand(1, 3, 64, 64)
    before, after = (ultralytics.YOLO(tmp_path / file).model.eval() for file in ("in.pt", "out.pt"))
    expected, found = before(given)[0], after.fuse(verbose=False)(given)[0]
    assert after.is_fused()
    assert torch.allclose(expected, found, rtol=1e-3, atol=1e-2 * float(expected.abs().max()))
