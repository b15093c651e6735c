"""What a conversion was told need not be told again: the report and the fused file say it to the commands after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES, Cli
from safetensors.torch import save_file
from support.agreement import randomised
from torch import nn
from typer.testing import CliRunner

from repfuse.cli.app import app
from repfuse.samples import DigitsRepVGG

NET = """import repfuse.samples


def build(width: int) -> repfuse.samples.DigitsRepVGG:
    print("built")
    return repfuse.samples.DigitsRepVGG(width=width)
"""


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)


class OfOneSize(nn.Sequential):
    """A network that takes images of 9x7 alone."""

    def __init__(self) -> None:
        super().__init__(Summed(), nn.Flatten(), nn.Linear(252, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> Path:
    """A network whose input must be said, and one that must be built, both converted."""
    path = tmp_path_factory.mktemp("said")
    torch.save(randomised(nn.Sequential(OfOneSize()), 0, torch.float32), path / "net.pt")
    save_file(randomised(DigitsRepVGG(width=8), 0, torch.float32).state_dict(), path / "weights.safetensors")
    said = ("--model", "repfuse.samples:DigitsRepVGG", "--model-arg", "width=8", "--quiet")
    for command in (
        ("convert", "net.pt", "fused.pt", "--input", "2x4x9x7", "--trust", "--quiet"),
        ("convert", "weights.safetensors", "fused.safetensors", *said),
        ("convert", "weights.safetensors", "fused.pt2", *said),
    ):
        done = cli(*command, cwd=path, env=HERE)
        assert done.returncode == 0, done.stderr
    return path


HERE = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}:{Path(__file__).parent / 'support'}"}


@pytest.mark.slow
def test_the_input_is_that_of_the_report(folder: Path, cli: Cli) -> None:
    done = cli("verify", "net.pt", "fused.pt", "--trust", "--json", cwd=folder, env=HERE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "same" and found["trials"][0]["shapes"] == [[2, 4, 9, 7]]
    assert "note: net.pt: the input 2x4x9x7 is that of fused.pt.report.json" in done.stderr
    assert "guess" not in done.stderr
    done = cli("bench", "net.pt", "fused.pt", "--trust", "--seconds", "0.1", "--json", cwd=folder, env=HERE)
    assert done.returncode == 0 and json.loads(done.stdout)["shapes"] == [[2, 4, 9, 7]]
    done = cli("inspect", "fused.pt", "--trust", "--json", cwd=folder, env=HERE)
    assert done.returncode == 0 and json.loads(done.stdout)["input"]["shapes"] == [[2, 4, 9, 7]]


@pytest.mark.slow
def test_what_is_given_goes_before_what_the_report_says(folder: Path, cli: Cli) -> None:
    done = cli("verify", "net.pt", "fused.pt", "--trust", "--json", "--input", "1x4x9x7", cwd=folder, env=HERE)
    assert json.loads(done.stdout)["trials"][0]["shapes"] == [[1, 4, 9, 7]]
    assert "report.json" not in done.stderr


def test_a_block_that_has_become_a_convolution_has_its_input_from_the_report(
    samples: Path, cli: Cli, tmp_path: Path
) -> None:
    """The sample says its input itself; what is written of it cannot."""
    source = samples / "notebook_block.pt"
    quick = cli("convert", source, "fused.pt", "--quick", "--json", cwd=tmp_path)
    assert quick.returncode == 0, quick.stderr
    assert json.loads(quick.stdout)["timing"] is None and "not timed" in quick.stdout
    done = cli("inspect", "fused.pt", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["input"]["shapes"] == [[1, 16, 32, 32]]
    assert "guess" not in done.stdout


@pytest.mark.parametrize(
    ("network", "size", "run_on"), [(Summed, "1x4x40x40", "size"), (OfOneSize, "1x4x9x7", "the example")]
)
def test_quick_runs_the_file_on_the_smallest_input_that_the_network_takes(
    network: Callable[[], nn.Module], size: str, run_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPFUSE_SAME_PROCESS", "1")
    torch.save(randomised(network(), 0, torch.float32).state_dict(), tmp_path / "net.pth")
    model = ("--model", f"{__file__}:{network.__name__}", "--input", size)
    run = ["convert", tmp_path / "net.pth", tmp_path / "fused.pth", *model, "--quick", "--json"]
    done = CliRunner().invoke(app, [*map(str, run)])
    (label,) = json.loads(done.stdout)["output"]["verified"]["compared"]
    assert done.exit_code == 0 and label.startswith(run_on)


@pytest.mark.slow
@pytest.mark.parametrize("fused", ["fused.safetensors", "fused.pt2"])
def test_the_model_is_that_of_the_file_or_of_its_report(fused: str, folder: Path, cli: Cli) -> None:
    done = cli("verify", "weights.safetensors", fused, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "same"
    assert "the network is repfuse.samples:DigitsRepVGG(width=8), as" in done.stderr
    assert "the input" not in done.stderr


@pytest.mark.slow
def test_what_a_file_says_without_a_report_counts_too(folder: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "fused.safetensors").write_bytes((folder / "fused.safetensors").read_bytes())
    done = cli("verify", folder / "weights.safetensors", "fused.safetensors", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "as fused.safetensors says" in done.stderr


@pytest.mark.slow
def test_a_report_of_another_original_says_nothing_of_this_one(folder: Path, cli: Cli) -> None:
    other = folder / "other.safetensors"
    save_file(randomised(DigitsRepVGG(width=8), 1, torch.float32).state_dict(), other)
    done = cli("verify", other, "fused.pt2", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "holds weights, and not the network" in done.stderr


@pytest.mark.slow
def test_code_that_a_report_names_does_not_run(folder: Path, cli: Cli, tmp_path: Path) -> None:
    """The message says the one line that works."""
    (tmp_path / "net.py").write_text(NET)
    options = ("--model", "net.py:build", "--model-arg", "width=8")
    source = folder / "weights.safetensors"
    done = cli("convert", source, "fused.pt2", *options, "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = cli("verify", source, "fused.pt2", cwd=tmp_path)
    assert done.returncode == 2 and "built" not in done.stdout
    assert "fused.pt2.report.json says that net.py:build(width=8) builds its network" in done.stderr
    assert "--model net.py:build --model-arg width=8" in done.stderr
    assert cli("verify", source, "fused.pt2", *options, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_a_plan_says_the_model_that_it_was_made_with(cli: Cli, tmp_path: Path) -> None:
    source = SAMPLES / "repvgg_digits.safetensors"
    model = ("--model", "repfuse.samples:DigitsRepVGG")
    assert cli("inspect", source, *model, "--plan", tmp_path / "plan.json", "-q").returncode == 0
    done = cli("convert", source, tmp_path / "fused.safetensors", "--plan", tmp_path / "plan.json", "--json")
    assert done.returncode == 0, done.stderr
    assert any("as the plan says" in note for note in json.loads(done.stdout)["notes"])


@pytest.mark.slow
def test_an_effort_that_makes_no_difference_is_said(cli: Cli, tmp_path: Path) -> None:
    dry = cli("convert", SAMPLES / "repvgg_digits.pt", "--dry-run", "--thorough", columns=200)
    assert dry.returncode == 0 and "--thorough makes no difference here" in dry.stdout
    torch.save(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval(), tmp_path / "in.pt")
    options = ("--input", "1x1x8x8", "--force")
    nothing = cli("convert", tmp_path / "in.pt", tmp_path / "out.pt", *options, "--quick", columns=200)
    assert nothing.returncode == 0 and "--quick makes no difference here" in nothing.stdout
    assert "leave --quick out" not in nothing.stdout
    done = cli("verify", tmp_path / "in.pt", tmp_path / "out.pt", "--json")
    assert done.returncode == 0, done.stderr
    assert "by the report out.pt.report.json beside it nothing was fused" in done.stderr


def test_arguments_of_no_network_are_an_error(cli: Cli) -> None:
    done = cli("verify", SAMPLES / "repvgg_digits.pt", SAMPLES / "repvgg_digits.pt", "--fused-model-arg", "width=3")
    assert done.returncode == 2 and "no --fused-model" in done.stderr
