"""Networks that take one size become .pt2 and ONNX, and exported programs of one size stay what they are."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SUPPORT, Cli
from support import exported, one_size
from torch import nn
from torch.export import Dim

import repfuse
from repfuse.checkpoint.exported import contract_of
from repfuse.saving import Saved

FORMATS = ("pt2", *(["onnx"] if importlib.util.find_spec("onnxruntime") else []))
INPUT = "x".join(map(str, one_size.SHAPE))
FOUND = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", SUPPORT)))}


def made(network: type[nn.Module]) -> nn.Module:
    return exported.randomised(network(), dtype=torch.float32)


def saved(source: Path, out: Path, **options: object) -> Saved:
    checkpoint = repfuse.load(source, **options)
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    assert result.plan.sites
    return repfuse.save(checkpoint, result.module, out, plan=result.plan)


SOON, FIRST = one_size.NETWORKS[0], FORMATS[0]
"""Each format with the one network, and each network in the one format; the other pairs take longer."""

PAIRS = pytest.mark.parametrize(
    ("network", "form"),
    [
        pytest.param(network, form, marks=() if network is SOON or form == FIRST else pytest.mark.slow)
        for network in one_size.NETWORKS
        for form in FORMATS
    ],
)


@PAIRS
def test_a_network_of_one_size_is_written_and_every_kind_of_input_tried(
    network: type[nn.Module], form: str, tmp_path: Path
) -> None:
    torch.save(made(network), tmp_path / "in.pt")
    said = saved(tmp_path / "in.pt", tmp_path / f"out.{form}", trust=True, input=INPUT)
    assert said.verified
    assert {"large", "impulses", "frame"} <= {label.partition(" ")[0] for label in said.verified.compared}


@PAIRS
def test_a_static_program_is_written(network: type[nn.Module], form: str, tmp_path: Path) -> None:
    program = torch.export.export(made(network), (torch.randn(one_size.SHAPE),))
    said = saved(exported.saved(program, tmp_path / "in.pt2"), tmp_path / f"out.{form}")
    assert said.verified
    assert said.verified.shapes == (INPUT,)


@pytest.mark.parametrize(
    ("make", "least"), [(Dim, 0), (Dim, 1), (Dim, 3), (lambda _name, **bounds: Dim.DYNAMIC(**bounds), 2)]
)
def test_the_range_of_a_dynamic_axis_is_kept(make: object, least: int, tmp_path: Path) -> None:
    shapes = ({0: make("batch", min=least, max=64)},)  # type: ignore[operator]
    before = torch.export.export(made(one_size.Flat), (torch.randn(4, *one_size.SHAPE[1:]),), dynamic_shapes=shapes)
    assert saved(exported.saved(before, tmp_path / "in.pt2"), tmp_path / "out.pt2").verified
    assert contract_of(torch.export.load(tmp_path / "out.pt2")) == contract_of(before)


@pytest.mark.skipif("onnx" not in FORMATS, reason="needs the extra onnx")
def test_what_onnx_writes_for_one_size_takes_that_alone_and_says_so(cli: Cli, tmp_path: Path) -> None:
    torch.save(made(one_size.Pooled), tmp_path / "in.pt")
    given = ("--allow", "support", "--input", INPUT, "--json")
    done = cli("convert", "in.pt", "out.onnx", *given, cwd=tmp_path, env=FOUND)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    output = report["output"]
    assert output["verified"]["shapes"] == ["d0x4x12x12"]
    assert {"batch 2", "large"} <= set(output["verified"]["compared"])
    assert any("the size of the example alone" in note for note in report["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_static_program_is_converted_by_the_command(form: str, cli: Cli, tmp_path: Path) -> None:
    program = torch.export.export(made(one_size.Positions), (torch.randn(one_size.SHAPE),))
    exported.saved(program, tmp_path / "in.pt2")
    done = cli("convert", "in.pt2", f"out.{form}", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "converted"
