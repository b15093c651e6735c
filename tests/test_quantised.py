"""Checkpoints of int8, and those on their way there, are named as what they are, with what to do."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from conftest import Cli
from support import exported
from torch import Tensor, nn

import repfuse
from repfuse.errors import RepfuseError

X = torch.randn(1, 4, 8, 8)


class Net(nn.Module):
    """A block between the stubs of eager quantisation."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.conv, self.norm, self.head = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.quant(x)))
        return self.dequant(self.head(y.mean((2, 3))))


def prepared(*, graph: bool, training: bool) -> nn.Module:
    """A network that is being trained or calibrated for int8, in one of PyTorch's two ways."""
    from torch.ao import quantization as q
    from torch.ao.quantization import quantize_fx

    engine = torch.backends.quantized.supported_engines[-1]
    torch.backends.quantized.engine = engine
    network = (exported.Block() if graph else exported.randomised(Net(), dtype=torch.float32)).train(training)
    if graph:
        mapping = (q.get_default_qat_qconfig_mapping if training else q.get_default_qconfig_mapping)(engine)
        prepare = quantize_fx.prepare_qat_fx if training else quantize_fx.prepare_fx
        network = prepare(network, mapping, (X,))
    else:
        names = ["conv", "norm"]
        network = (q.fuse_modules_qat if training else q.fuse_modules)(network, [names])
        network.qconfig = (q.get_default_qat_qconfig if training else q.get_default_qconfig)(engine)
        (q.prepare_qat if training else q.prepare)(network, inplace=True)
    network(X)
    return network


def converted(network: nn.Module, *, graph: bool) -> nn.Module:
    """It in int8."""
    from torch.ao import quantization as q
    from torch.ao.quantization import quantize_fx

    return quantize_fx.convert_fx(network.eval()) if graph else q.convert(network.eval())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_both_are_named_in_a_state_dict_a_file_and_in_memory(*, graph: bool, training: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        network = prepared(graph=graph, training=training)
        int8 = converted(prepared(graph=graph, training=training), graph=graph)
    torch.save(network.state_dict(), tmp_path / "aware.pt")
    torch.save(int8.state_dict(), tmp_path / "int8.pt")
    files = [("aware", "quantisation-aware"), ("int8", "quantised to int8")]
    if not graph:  # PyTorch 2.13 does not pickle the other
        torch.save(int8, tmp_path / "whole.pt")
        files.append(("whole", "quantised to int8"))
    for name, said in files:
        for trust in (False, True):
            with pytest.raises(RepfuseError, match=said) as error:
                repfuse.load(tmp_path / f"{name}.pt", model="repfuse.samples:DigitsRepVGG", trust=trust)
            assert "float checkpoint" in error.value.hint
    with pytest.raises(RepfuseError, match="quantisation-aware"):
        repfuse.fuse(network, (X,))
    with pytest.raises(RepfuseError, match="quantised to int8"):
        repfuse.fuse(int8, (X,))


class Rounded(nn.Module):
    """A convolution of values that were rounded, as PyTorch exports them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.05, 0, -128, 127, torch.int8)
        return self.conv(torch.ops.quantized_decomposed.dequantize_per_tensor(codes, 0.05, 0, -128, 127, torch.int8))


@pytest.mark.parametrize("trust", [True, False])
def test_exported_programs_of_int8_are_named(*, trust: bool, tmp_path: Path) -> None:
    import torch.ao.quantization.fx._decomposed

    torch.export.save(torch.export.export(Rounded().eval(), (X,)), tmp_path / "in.pt2")
    with pytest.raises(RepfuseError, match=r"in\.pt2 is quantised to int8"):
        repfuse.load(tmp_path / "in.pt2", trust=trust)


def test_scripts_of_int8_are_named_and_not_taken_for_float(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        aware = torch.jit.trace(prepared(graph=False, training=True).eval(), X)
        int8 = torch.jit.script(converted(prepared(graph=False, training=False), graph=False))
        graph = torch.jit.trace(converted(prepared(graph=True, training=False), graph=True), X)
        torch.jit.save(aware, tmp_path / "aware.pt")
        torch.jit.save(int8, tmp_path / "int8.pt")
        torch.jit.save(graph, tmp_path / "graph.pt")
    for name, said in (("aware", "quantisation-aware"), ("int8", "quantised to int8"), ("graph", "quantised to int8")):
        with pytest.raises(RepfuseError, match=said):
            repfuse.load(tmp_path / f"{name}.pt", trust=True, input="1x4x8x8")


def test_the_command_says_so_and_a_part_that_is_dynamically_quantised_is_none(cli: Cli, tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.save(prepared(graph=False, training=True).state_dict(), tmp_path / "in.pt")
        dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(exported.Block(), nn.Linear(8, 2)), {nn.Linear})
    torch.save(dynamic.eval(), tmp_path / "dynamic.pt")
    done = cli("convert", "in.pt", "out.pt", "--model", "timm:repvgg_a0", cwd=tmp_path)
    assert done.returncode == 2
    assert "quantisation-aware" in done.stderr and "Merge first" in done.stderr
    loaded = repfuse.load(tmp_path / "dynamic.pt", trust=True, input="1x4x8x8")
    assert repfuse.plan(loaded.module, loaded.example_inputs).sites
