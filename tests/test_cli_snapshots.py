"""What people see, as a whole: a change here is a change for every user, so it has to be looked at."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import SAMPLES, Cli
from support.snapshots import check, masked
from torch import nn

DIGITS = SAMPLES / "repvgg_digits.pt"
WIDE = 300  # so that no line breaks at a place that depends on how long a path or a time is


def test_convert_and_verify(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "fused.pt"
    fresh = {"REPFUSE_SAME_PROCESS": "0", "REPFUSE_FORKED": "1"}  # a copy of what has imported torch is fresh, too
    shown = cli("convert", "sample_checkpoints/repvgg_digits.pt", out, cwd=SAMPLES.parent, columns=WIDE, env=fresh)
    assert shown.stderr == ""
    check("convert", masked(shown.stdout, tmp_path))
    again = ("convert", "sample_checkpoints/repvgg_digits.pt", out, "--force", "-v")
    check("convert_verbose", masked(cli(*again, cwd=SAMPLES.parent, columns=WIDE, env=fresh).stdout, tmp_path))
    shown = cli("verify", DIGITS, out, "--data", SAMPLES / "digits_heldout.safetensors", columns=WIDE)
    assert shown.stderr == ""
    check("verify", masked(shown.stdout, tmp_path))


def test_inspect_with_refusals(cli: Cli, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    torch.save(model.eval(), tmp_path / "in.pt")
    shown = cli("inspect", tmp_path / "in.pt", "--input", "1x1x8x8", columns=WIDE)
    check("inspect", masked(shown.stdout + shown.stderr, tmp_path))


def test_errors(cli: Cli, tmp_path: Path) -> None:
    missing = cli("convert", tmp_path / "none.pt", tmp_path / "out.pt", cwd=tmp_path)
    no_model = cli("convert", SAMPLES / "repvgg_digits_state_dict.pth", tmp_path / "out.pt", cwd=SAMPLES.parent)
    wrong = cli("convert", DIGITS, tmp_path / "out.pt", "--input", "1x3x8x8")
    errors = "".join(done.stderr for done in (missing, no_model, wrong)).replace(f"{SAMPLES}/", "")
    check("errors", masked(errors, tmp_path))


def test_explain(cli: Cli, tmp_path: Path) -> None:
    check("explain", masked(cli("explain", "padding-mode").stdout, tmp_path))
