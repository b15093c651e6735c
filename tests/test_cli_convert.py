"""`repfuse convert` as a process: what it writes, what it leaves alone, what it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import Cli
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import repfuse

MODEL = ("--model", "repfuse.samples:DigitsRepVGG")
DIGITS = {
    "repvgg_digits.pt": ("pt", "fused.pt", ()),
    "repvgg_digits_state_dict.pth": ("state-dict", "fused.pth", MODEL),
    "repvgg_digits_training.pt": ("state-dict", "fused.pt", MODEL),
    "repvgg_digits.safetensors": ("safetensors", "fused.safetensors", MODEL),
}


def digest(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if number else ()) for number, name in enumerate(DIGITS)]
)
def test_each_layout_of_the_digits_converts_and_agrees_on_real_images(
    name: str, cli: Cli, samples: Path, tmp_path: Path
) -> None:
    layout, target, options = DIGITS[name]
    before = digest(samples / name)
    done = cli("convert", samples / name, tmp_path / target, *options, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / f"{target}.report.json").read_text())
    assert (report["status"], report["input"]["format"], report["output"]["format"]) == ("converted", layout, layout)
    assert len(report["plan"]["sites"]) == 5
    assert report["plan"]["refusals"] == []
    assert report["proof"]["error"] <= 1e-12
    assert report["output"]["digest"] == digest(tmp_path / target)
    assert report["input"]["digest"] == before == digest(samples / name)
    assert {path.name for path in tmp_path.iterdir()} == {target, f"{target}.report.json"}

    fused = repfuse.load(tmp_path / target).module
    original = repfuse.load(samples / name, model=options[1] if options else None).module
    data = load_file(samples / "digits_heldout.safetensors")
    with torch.inference_mode():
        classes, expected = fused(data["inputs"]).argmax(1), original(data["inputs"]).argmax(1)
    assert torch.equal(classes, expected)
    assert (classes == data["labels"]).double().mean() >= 0.98


def test_the_commands_of_the_readme_work_without_options(cli: Cli, samples: Path, tmp_path: Path) -> None:
    source, out = samples / "repvgg_digits.pt", tmp_path / "fused.pt"
    assert cli("convert", source, out, "--quiet").returncode == 0
    done = cli("verify", source, out, "--data", samples / "digits_heldout.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "same"
    assert found["data"]["top1_agreement"] == 1.0
    assert found["data"]["accuracy_original"] == found["data"]["accuracy_fused"] >= 0.98


@pytest.mark.slow
def test_a_fused_state_dict_is_plain_tensors_and_says_how_to_build_its_network(
    cli: Cli, samples: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fused.safetensors"
    assert cli("convert", samples / "repvgg_digits.safetensors", out, *MODEL, "--quiet").returncode == 0
    state = load_file(out)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert not any("running_mean" in name for name in state)
    with safe_open(out, framework="pt") as file:
        assert "repfuse" in file.metadata()
    again = cli("inspect", out, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["plan"]["sites"] == []


@pytest.mark.slow
def test_the_suffix_of_out_and_format_choose_the_layout(cli: Cli, samples: Path, tmp_path: Path) -> None:
    source = samples / "repvgg_digits_state_dict.pth"
    assert cli("convert", source, tmp_path / "a.safetensors", *MODEL, "--quiet").returncode == 0
    assert cli("convert", source, tmp_path / "b.bin", *MODEL, "--format", "safetensors", "-q").returncode == 0
    assert load_file(tmp_path / "b.bin").keys() == load_file(tmp_path / "a.safetensors").keys()


def test_a_dry_run_writes_nothing_and_needs_no_target(cli: Cli, samples: Path, tmp_path: Path) -> None:
    done = cli("convert", samples / "notebook_block.pt", "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["status"] == "planned"
    assert list(tmp_path.iterdir()) == []


def test_without_a_target_the_usage_is_said(cli: Cli, samples: Path) -> None:
    done = cli("convert", samples / "notebook_block.pt")
    assert done.returncode == 2
    assert "OUT" in done.stderr
    assert done.stdout == ""


def test_nothing_to_fuse_writes_nothing_unless_forced(cli: Cli, tmp_path: Path) -> None:
    source, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), source)
    done = cli("convert", source, out, "--input", "1x1x8x8")
    assert done.returncode == 0, done.stderr
    why = "(no layer is next to another that it could merge with)"
    assert f"nothing to fuse {why}, nothing was written" in " ".join(done.stdout.split())
    assert "out.pt.report.json" not in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt"}
    forced = cli("convert", source, out, "--input", "1x1x8x8", "--force", "--json")
    assert forced.returncode == 0, forced.stderr
    assert json.loads(forced.stdout)["status"] == "nothing-to-fuse"
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt", "out.pt", "out.pt.report.json"}


def test_quiet_prints_nothing_and_a_training_model_is_said(cli: Cli, samples: Path, tmp_path: Path) -> None:
    model = torch.load(samples / "repvgg_digits.pt", weights_only=False).train()
    torch.save(model, tmp_path / "in.pt")
    quiet = cli("convert", tmp_path / "in.pt", tmp_path / "a.pt", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    loud = cli("convert", tmp_path / "in.pt", tmp_path / "b.pt", "--quick")
    assert "training mode" in " ".join(loud.stdout.split())


@pytest.mark.parametrize("existing", ["out.pt", "out.pt.report.json"])
def test_an_existing_file_is_replaced_only_with_force(existing: str, cli: Cli, samples: Path, tmp_path: Path) -> None:
    (tmp_path / existing).write_text("precious")
    refused = cli("convert", samples / "notebook_block.pt", tmp_path / "out.pt")
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert (tmp_path / existing).read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_force_replaces_both_files(cli: Cli, samples: Path, tmp_path: Path) -> None:
    for name in ("out.pt", "out.pt.report.json"):
        (tmp_path / name).write_text("old")
    forced = cli("convert", samples / "notebook_block.pt", tmp_path / "out.pt", "--force", "--quiet")
    assert forced.returncode == 0, forced.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out.pt", "out.pt.report.json"}
    assert all(path.read_bytes() != b"old" for path in tmp_path.iterdir())
