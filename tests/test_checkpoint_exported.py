"""Exported programs (.pt2): converted with all that they promise of their inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli
from support import exported
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import repfuse
from repfuse.checkpoint import pt2_file
from repfuse.checkpoint.exported import contract_of
from repfuse.checkpoint.formats import format_for
from repfuse.errors import RepfuseError


def converted(source: Path, out: Path, **options: str) -> repfuse.saving.Saved:
    checkpoint = repfuse.load(source)
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    return repfuse.save(checkpoint, result.module, out, plan=result.plan, **options)


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-4 * one.abs().max())


def test_a_program_keeps_its_dynamic_shapes_guards_names_and_structure(cli: Cli, tmp_path: Path) -> None:
    before = exported.program()
    source, out = exported.saved(before, tmp_path / "in.pt2"), tmp_path / "fused.pt2"
    done = cli("convert", source, out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["input"]["format"], report["output"]["format"]) == ("pt2", "pt2")
    assert len(report["plan"]["sites"]) == 2
    assert report["output"]["verified"]["shapes"] == ["d0x3xd1xd2", "1"]
    after = torch.export.load(out)  # without repfuse
    assert contract_of(after) == contract_of(before)
    assert after.call_spec == before.call_spec
    assert {"stem.weight", "head.bias"} <= after.state_dict.keys()
    assert not any("norms" in name for name in after.state_dict)
    for size in ((1, 3, 8, 8), (64, 3, 9, 31), (2, 3, 12, 10)):
        given, scale = torch.randn(size), torch.randn(1)
        expected, found = before.module()(given, scale=scale), after.module()(given, scale=scale)
        assert close(expected["logits"], found["logits"])
        assert close(expected["maps"][0], found["maps"][0])
    for size in ((65, 3, 8, 8), (2, 3, 7, 8), (2, 3, 8, 1001), (2, 4, 8, 8)):
        with pytest.raises(Exception, match="Guard failed"):
            after.module()(torch.randn(size), scale=torch.ones(1))
    pair = [repfuse.load(path) for path in (source, out)]
    assert repfuse.verify(pair[0].module, pair[1].module, pair[0].example_inputs).verdict == "same"


class Halves(nn.Module):
    """Takes sizes that a multiple of two relates, and refuses others by a guard."""

    def __init__(self) -> None:
        super().__init__()
        self.block = exported.Block(3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[2] % 4 == 0:
            x = self.block(x)
        return x[:, :, ::2] + y


def test_derived_sizes_and_guards_are_kept(tmp_path: Path) -> None:
    height = Dim("height", min=4, max=64)
    network = exported.randomised(Halves(), dtype=torch.float32)
    shapes = ({2: 4 * height}, {2: 2 * height})
    before = torch.export.export(network, (torch.randn(1, 3, 32, 5), torch.randn(1, 3, 16, 5)), dynamic_shapes=shapes)
    converted(exported.saved(before, tmp_path / "in.pt2"), tmp_path / "out.pt2")
    after = torch.export.load(tmp_path / "out.pt2")
    assert contract_of(after) == contract_of(before)
    assert contract_of(after).axes[0][2] == "4*d0"
    assert after._guards_code == before._guards_code
    given = torch.randn(1, 3, 24, 5), torch.randn(1, 3, 12, 5)
    assert close(before.module()(*given), after.module()(*given))
    for first, second in ((24, 13), (26, 13), (8, 4)):
        with pytest.raises(Exception, match="Guard failed"):
            after.module()(torch.randn(1, 3, first, 5), torch.randn(1, 3, second, 5))


class AsLongAsBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(3, 3, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a(z) + self.b(z)) + torch.cat([x, y], 2)


def test_a_size_that_is_the_sum_of_two_others_stays_so(tmp_path: Path) -> None:
    network, axes = exported.randomised(AsLongAsBoth(), dtype=torch.float32), {2: Dim.AUTO}
    given = tuple(torch.randn(2, 3, size) for size in (5, 6, 11))
    before = torch.export.export(network, given, dynamic_shapes=(axes, axes, axes))
    converted(exported.saved(before, tmp_path / "in.pt2"), tmp_path / "out.pt2")
    after = torch.export.load(tmp_path / "out.pt2")
    assert contract_of(after) == contract_of(before) and "+" in str(contract_of(after).axes[2][2])
    given = tuple(torch.randn(2, 3, size) for size in (3, 9, 12))
    assert close(before.module()(*given), after.module()(*given))
    with pytest.raises(Exception, match="Guard failed"):
        after.module()(*given[:2], torch.randn(2, 3, 13))


def test_automatic_sizes_and_their_guards_are_kept(tmp_path: Path) -> None:
    network = exported.randomised(Halves(), dtype=torch.float32)
    axes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    before = torch.export.export(
        network, (torch.randn(2, 3, 32, 5), torch.randn(2, 3, 16, 5)), dynamic_shapes=(axes, axes)
    )
    assert any("%" in guard for guard in before._guards_code)
    converted(exported.saved(before, tmp_path / "in.pt2"), tmp_path / "out.pt2")
    after = torch.export.load(tmp_path / "out.pt2").module()
    after(torch.randn(3, 3, 16, 9), torch.randn(3, 3, 8, 9))
    with pytest.raises(Exception, match="Guard failed"):
        after(torch.randn(3, 3, 18, 9), torch.randn(3, 3, 9, 9))


def test_a_program_without_sample_inputs_is_given_some(tmp_path: Path) -> None:
    source = exported.saved(exported.program(), tmp_path / "in.pt2")
    exported.rewritten(source, lambda held: held.update({pt2_file.INPUTS: b""}))
    checkpoint = repfuse.load(source)
    assert [tuple(tensor.shape) for tensor in checkpoint.example_inputs] == [(2, 3, 12, 10), (1,)]
    assert converted(source, tmp_path / "out.pt2").verified


def test_a_network_becomes_a_program_with_dynamic_axes(samples: Path, tmp_path: Path) -> None:
    said = converted(samples / "repvgg_digits.pt", tmp_path / "out.pt2")
    assert said.verified
    assert said.verified.shapes == ("d0x1xd1xd2",)
    after = torch.export.load(tmp_path / "out.pt2").module()
    original = repfuse.load(samples / "repvgg_digits.pt").module
    for size in ((1, 1, 8, 8), (7, 1, 11, 8)):
        given = torch.randn(size)
        assert close(original(given), after(given))
    again = repfuse.load(tmp_path / "out.pt2")
    assert not repfuse.plan(again.module, again.example_inputs).sites


def test_a_program_as_a_pickled_network_is_said_to_have_lost_its_guards(tmp_path: Path) -> None:
    source = exported.saved(exported.program(), tmp_path / "in.pt2")
    said = converted(source, tmp_path / "out.pt")
    assert said.format == "pt"
    assert "does not check its inputs" in said.notes[0]
    assert "--trust" in said.notes[1]


@pytest.mark.parametrize(
    ("of_input", "out", "asked", "form"),
    [
        *(("pt2", "x", None, "pt2"), ("pt2", "x.pt2", None, "pt2"), ("pt2", "x.pt", None, "pt")),
        *(("pt2", "x.onnx", None, "onnx"), ("pt2", "x.onnx", "pt2", "pt2"), ("torchscript", "x", None, "pt2")),
        *(("torchscript", "x.pth", None, "pt"), ("safetensors", "x.pt2", None, "pt2"), ("pt", "x.onnx", None, "onnx")),
        *(("safetensors", "x.pt", None, "state-dict"), ("state-dict", "x.PT2", None, "pt2")),
    ],
)
def test_the_format_is_the_one_asked_for_or_the_suffixs_or_the_inputs(
    of_input: str, out: str, asked: str | None, form: str
) -> None:
    assert format_for(Path(out), asked, of_input) == form


@pytest.mark.parametrize("options", [{"out": "x.safetensors"}, {"out": "x", "format": "state-dict"}])
def test_weights_alone_of_a_program_are_refused_before_the_work(options: dict[str, str], tmp_path: Path) -> None:
    source = exported.saved(exported.program(), tmp_path / "in.pt2")
    checkpoint = repfuse.load(source)
    out = tmp_path / options.pop("out")
    with pytest.raises(RepfuseError, match="weights alone"):
        repfuse.save(checkpoint, checkpoint.module, out, **options)
    assert not out.exists()


def test_a_written_program_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported.saved(exported.program(), tmp_path / "in.pt2")
    write = pt2_file.write

    def corrupted(program: ExportedProgram, path: Path) -> None:
        program.state_dict["head.weight"].data[0, 0] += 0.01
        write(program, path)

    monkeypatch.setattr(pt2_file, "write", corrupted)
    with pytest.raises(RepfuseError, match="does not compute what the original does") as error:
        converted(source, tmp_path / "out.pt2")
    assert error.value.exit_code == 1
    assert not (tmp_path / "out.pt2").exists()


def test_a_written_program_that_reads_back_with_other_weights_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported.saved(exported.program(), tmp_path / "in.pt2")
    write = pt2_file.write

    def corrupted(program: ExportedProgram, path: Path) -> None:
        write(program, path)
        exported.rewritten(path, lambda held: held.update({"data/weights/weight_1": bytes(16)}))

    monkeypatch.setattr(pt2_file, "write", corrupted)
    with pytest.raises(RepfuseError, match="read back"):
        converted(source, tmp_path / "out.pt2")


class Counts(nn.Module):
    """Takes a number beside a tensor."""

    def forward(self, x: Tensor, times: int) -> Tensor:
        return x * times


def test_inputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    made = torch.export.export(Counts(), (torch.ones(2), 3))
    with pytest.raises(RepfuseError, match="no tensors"):
        repfuse.load(exported.saved(made, tmp_path / "in.pt2"))


@pytest.mark.slow
def test_a_network_and_its_program_are_the_same_where_the_program_is_made_for(
    cli: Cli, samples: Path, tmp_path: Path
) -> None:
    source = samples / "repvgg_digits.pt"
    assert cli("convert", source, tmp_path / "fused.pt2").returncode == 0
    done = cli("verify", source, tmp_path / "fused.pt2")
    assert done.returncode == 0 and "not both networks are for" in done.stdout
    narrow = torch.export.export(repfuse.load(source).module, (torch.zeros(2, 1, 9, 9),))
    torch.export.save(narrow, tmp_path / "narrow.pt2")
    other = cli("verify", source, tmp_path / "narrow.pt2", "--input", "2x1x8x8")
    assert other.returncode == 1 and "Guard failed" in " ".join(other.stdout.split())  # the example is not optional
