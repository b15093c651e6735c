"""Every kind of bad input, as a process: one message with what, why and what to do; exit code 2; nothing lost."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import SAMPLES, Cli, Run
from torch import nn

MODULE = SAMPLES / "repvgg_digits.pt"
STATE = SAMPLES / "repvgg_digits_state_dict.pth"
HELD_OUT = SAMPLES / "digits_heldout.safetensors"


class Case(NamedTuple):
    """``make`` prepares a folder and returns the arguments; ``said`` are words of the message."""

    make: Callable[[Path], tuple[object, ...]]
    said: tuple[str, ...]


def file(folder: Path, content: bytes, name: str = "in.pt") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def convert(*args: object) -> Callable[[Path], tuple[object, ...]]:
    return lambda folder: ("convert", *args, folder / "out.pt")


def convert_file(content: bytes, name: str = "in.pt") -> Callable[[Path], tuple[object, ...]]:
    return lambda folder: ("convert", file(folder, content, name), folder / "out.pt")


def data(content: object) -> Callable[[Path], tuple[object, ...]]:
    def make(folder: Path) -> tuple[object, ...]:
        torch.save(content, folder / "data.pt")
        return ("verify", MODULE, MODULE, "--data", folder / "data.pt")

    return make


CASES = {
    "missing": Case(lambda folder: ("convert", folder / "none.pt", folder / "out.pt"), ("none.pt",)),
    "folder": Case(lambda folder: ("convert", folder, folder / "out.pt"), ("folder",)),
    "empty": Case(convert_file(b""), ("empty",)),
    "truncated": Case(convert_file(MODULE.read_bytes()[:20_000]), ("in.pt",)),
    "truncated safetensors": Case(
        convert_file((SAMPLES / "repvgg_digits.safetensors").read_bytes()[:9_000], "in.safetensors"),
        ("in.safetensors",),
    ),
    "text": Case(convert_file(b"hello, world\n" * 100), ("not a checkpoint",)),
    "no model": Case(convert(STATE), ("--model",)),
    "wrong architecture": Case(convert(STATE, "--model", "repfuse.samples:NotebookBlock"), ("conv3.weight",)),
    "unknown model": Case(convert(STATE, "--model", "timm:repvgg_a00"), ("repvgg_a0",)),
    "bad model argument": Case(
        convert(STATE, "--model", "repfuse.samples:DigitsRepVGG", "--model-arg", "width"), ("name=value",)
    ),
    "bad shape": Case(convert(MODULE, "--input", "1x3xbig"), ("1x3x224x224",)),
    "wrong shape": Case(
        convert(MODULE, "--input", "1x3x8x8"), ("takes 1 channel, and the input has 3", "--input 1x1x8x8, say")
    ),
    "too few axes": Case(convert(MODULE, "--input", "1x8"), ("2 axes, not 4", "--input 1x1x224x224")),
    "wrong shape of two": Case(
        lambda _: ("bench", MODULE, MODULE, "--input", "1x3x8x8"), ("takes 1 channel", "--input 1x1x8x8, say")
    ),
    "bad dtype": Case(convert(MODULE, "--input", "1x1x8x8:flot16"), ("flot16", "float16")),
    "target folder": Case(lambda folder: ("convert", MODULE, folder), ("folder",)),
    "no such folder": Case(lambda folder: ("convert", MODULE, folder / "no" / "out.pt"), ("mkdir",)),
    "format": Case(convert(MODULE, "--format", "keras"), ("safetensors",)),
    "unknown code": Case(lambda _: ("explain", "training-nrom"), ("training-norm",)),
    "unknown command": Case(lambda _: ("convrt",), ("no command convrt", "Did you mean convert?")),
    "unknown option": Case(convert(MODULE, "--polcy", "cost"), ("no option --polcy", "--policy")),
    "no value": Case(lambda _: ("convert", MODULE, "out.pt", "--model"), ("--model needs a value",)),
    "no argument": Case(lambda _: ("verify", MODULE), ("FUSED is missing", "repfuse verify ORIGINAL FUSED")),
    "too many arguments": Case(convert(MODULE, "b.pt"), ("one IN and one OUT",)),
    "no number": Case(lambda _: ("verify", MODULE, MODULE, "--rtol", "x"), ("--rtol takes a number",)),
    "no whole number": Case(lambda _: ("bench", MODULE, MODULE, "--rounds", "1.5"), ("--rounds takes a whole number",)),
    "no choice": Case(convert(MODULE, "--policy", "fast"), ("--policy takes one of cost, always, never-compose",)),
    "both": Case(convert(MODULE, "--quick", "--thorough"), ("--quick or --thorough",)),
    "data missing": Case(lambda folder: ("verify", MODULE, MODULE, "--data", folder / "none.npz"), ("none.npz",)),
    "data without inputs": Case(data({"pixels": torch.ones(2, 1, 8, 8)}), ("pixels", "inputs")),
    "data of the wrong shape": Case(data({"x": torch.ones(2, 3, 8, 8)}), ("2x3x8x8",)),
    "batch size": Case(
        lambda _: ("bench", MODULE, MODULE, "--batch-size", "0"), ("--batch-size takes a number that is at least 1",)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_nothing_is_lost(name: str, cli: Cli, tmp_path: Path) -> None:
    args = CASES[name].make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = cli(*args)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "does not expect" not in done.stderr
    message = " ".join(done.stderr.replace("│", " ").split())
    for words in CASES[name].said:
        assert words in message
    assert message.count("error:") == 1 and message.startswith("error:")
    for words in ("Usage:", "Value error", "Invalid value", "Input should", "Given groups", "pydantic"):
        assert words not in message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_input_is_never_overwritten_even_with_force(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "in.pt"
    shutil.copy(MODULE, source)
    (tmp_path / "link.pt").symlink_to(source)
    for out in (source, tmp_path / "link.pt"):
        done = cli("convert", source, out, "--force")
        assert done.returncode == 2
        assert "input itself" in done.stderr
        assert source.read_bytes() == MODULE.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that nobody can write to")
def test_an_unwritable_target_is_found_before_anything_is_read(cli: Cli, tmp_path: Path) -> None:
    done = cli("convert", tmp_path / "none.pt", "/proc/out.pt")
    assert done.returncode == 2
    assert "Nothing can be written to the folder /proc." in done.stderr
    assert "none.pt" not in done.stderr


def test_a_full_disk_leaves_nothing_behind(cli: Cli, tmp_path: Path) -> None:
    done = cli("convert", MODULE, tmp_path / "out.pt", largest=30_000)  # a write beyond it fails as on a full disk
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "out.pt could not be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_code_in_a_pickle_does_not_run(cli: Cli, tmp_path: Path) -> None:
    class Hostile(nn.Module):
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Hostile(), tmp_path / "in.pt")
    done = cli("convert", tmp_path / "in.pt", tmp_path / "out.pt")
    assert done.returncode == 2
    assert "--trust" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt"}


def test_an_error_under_json_leaves_standard_output_empty(cli: Cli, tmp_path: Path) -> None:
    done = cli("verify", MODULE, tmp_path / "none.pt", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")


def test_data_of_another_floating_dtype_is_cast_and_said(cli: Cli, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).normal(size=(4, 1, 8, 8)))
    done = cli("verify", MODULE, MODULE, "--data", tmp_path / "data.npz", "--json")
    assert done.returncode == 0, done.stderr
    assert "float64" in done.stderr
    assert "it was cast" in done.stderr
    assert json.loads(done.stdout)["data"]["samples"] == 4


def test_what_a_file_says_cannot_command_the_terminal(tmp_path: Path, cli: Cli) -> None:
    torch.save({"weight\x1b]0;owned\x07": torch.zeros(2)}, tmp_path / "in.pt")
    done = cli("convert", tmp_path / "in.pt", tmp_path / "out.pt")
    assert done.returncode == 2
    assert "\x1b" not in done.stderr and "\x07" not in done.stderr
    assert r"weight\x1b]0;owned\x07" in done.stderr


QUICK = (
    ("convert", "none.pt", "out.pt"),
    ("convert", MODULE, "out.pt", "--input", "1x3xbig"),
    ("convert", MODULE, "out.pt", "--input", "1x1x8x8:flot16"),
    ("convert", MODULE, "out.pt", "--model", "timm"),
    ("convert", MODULE, "out.pt", "--model-arg", "a=1"),
    ("convert", MODULE, "out.pt", "--plan", "none.json"),
    ("convert", MODULE, "no/out.pt"),
    ("convert", SAMPLES / "README.md", "out.pt"),
    ("inspect", "none.pt"),
    ("inspect", MODULE, "--plan", "no/plan.json"),
    ("verify", MODULE, "none.pt"),
    ("verify", MODULE, MODULE, "--input", "1x3xbig"),
    ("verify", MODULE, MODULE, "--data", "none.npz"),
    ("verify", MODULE, MODULE, "--mean", "0.5"),
    ("bench", "none.pt", MODULE),
    ("bench", MODULE, MODULE, "--batch-size", "0"),
    ("bench", MODULE, MODULE, "--fused-model-arg", "a=1"),
)


def test_a_mistake_in_the_arguments_is_said_before_torch_is_imported(python: Run, tmp_path: Path) -> None:
    """All of them in one process, which one of them would end that imported torch."""
    (tmp_path / "torch.py").write_text("import os\nos._exit(3)")
    program = f"""
import contextlib, io, sys
from repfuse.cli import main
for args in {[list(map(str, args)) for args in QUICK]!r}:
    sys.argv[1:], code = args, None
    print(*args, end=": ", flush=True)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main()
        except SystemExit as done:
            code = done.code
    print(code, said.getvalue().splitlines()[0])
"""
    here = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    done = python("-c", program, cwd=tmp_path, env=here, fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert [line for line in said if ": 2 error:" not in line] == [] and len(said) == len(QUICK), said
