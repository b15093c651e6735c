"""TorchScript archives: converted through exported programs, with trust alone."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import Cli
from support import exported
from torch import Tensor, nn

import repfuse
from repfuse.checkpoint import exported as programs
from repfuse.errors import RepfuseError

SHAPE = "1x3x12x10"


class Net(nn.Module):
    """Blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(exported.Block(3), exported.Block(3)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class Writes(nn.Module):
    """Writes a file as soon as it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.ones(1))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        self.weight = torch.ones(1)
        torch.save(torch.ones(1), self.path)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def network() -> nn.Module:
    return exported.randomised(Net(), dtype=torch.float32)


def archive(path: Path, *, traced: bool = True) -> Path:
    made = torch.jit.trace(network(), torch.randn(1, 3, 12, 10)) if traced else torch.jit.script(network())
    torch.jit.save(made, path)
    return path


def test_an_archive_becomes_a_program(cli: Cli, tmp_path: Path) -> None:
    source, out = archive(tmp_path / "in.pt"), tmp_path / "fused.pt2"
    done = cli("convert", source, out, "--trust", "--input", SHAPE, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["input"]["format"], report["output"]["format"]) == ("torchscript", "pt2")
    assert len(report["plan"]["sites"]) == 2
    given = torch.randn(3, 3, 9, 14)
    expected, found = torch.jit.load(source)(given), torch.export.load(out).module()(given)
    assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()


def test_a_scripted_archive_loads_too(tmp_path: Path) -> None:
    checkpoint = repfuse.load(archive(tmp_path / "in.pt", traced=False), trust=True, input=SHAPE)
    assert len(repfuse.plan(checkpoint.module, checkpoint.example_inputs).sites) == 2
    assert repfuse.save(checkpoint, checkpoint.module, tmp_path / "out").format == "pt2"


def test_without_trust_and_without_a_shape_it_is_refused(tmp_path: Path) -> None:
    source = archive(tmp_path / "in.pt")
    with pytest.raises(RepfuseError, match="--trust"):
        repfuse.load(source, input=SHAPE)
    with pytest.raises(RepfuseError, match="--input"):
        repfuse.load(source, trust=True)


def test_trust_is_needed_for_a_reason(tmp_path: Path) -> None:
    """TorchScript runs while it is loaded, and may write files."""
    witness = tmp_path / "witness"
    torch.jit.save(torch.jit.script(Writes(str(witness))), tmp_path / "in.pt")
    witness.unlink(missing_ok=True)
    with pytest.raises(RepfuseError, match="--trust"):
        repfuse.load(tmp_path / "in.pt", input="1x3")
    assert not witness.exists()
    torch.jit.load(tmp_path / "in.pt")
    assert witness.exists()


def test_what_the_converter_cannot_do_comes_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = archive(tmp_path / "in.pt")
    monkeypatch.setitem(__import__("sys").modules, "torch._export.converter", None)
    with pytest.raises(RepfuseError, match="cannot be converted") as error:
        repfuse.load(source, trust=True, input=SHAPE)
    assert "torch.export.save" in error.value.hint


def test_a_conversion_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = programs._convert

    def wrong(*args: object) -> torch.export.ExportedProgram:
        program = convert(*args)
        weight = program.state_dict["head.weight"].detach().clone()  # it shares its memory with the script's
        weight[0, 0] += 0.01
        program.state_dict["head.weight"] = nn.Parameter(weight)
        return program

    monkeypatch.setattr(programs, "_convert", wrong)
    with pytest.raises(RepfuseError, match="does not give the network"):
        repfuse.load(archive(tmp_path / "in.pt"), trust=True, input=SHAPE)


def test_a_spoilt_archive_is_damaged(tmp_path: Path) -> None:
    source = archive(tmp_path / "in.pt")
    with zipfile.ZipFile(source) as held:
        members = {name: held.read(name) for name in held.namelist()}
    with zipfile.ZipFile(source, "w") as spoilt:
        for name, data in members.items():
            spoilt.writestr(name, data if not name.endswith(".py") else b"def forward(")
    with pytest.raises(RepfuseError, match="damaged"):
        repfuse.load(source, trust=True, input=SHAPE)
