"""What the README shows works: its Python runs, and its commands have the options that it uses."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, Cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
COMMANDS = sorted(set(re.findall(r"^repfuse .*$", SHELL, re.MULTILINE)))


def python_block(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if containing in block)


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    shutil.copy(SAMPLES / "repvgg_digits.pt", tmp_path / "model.pt")
    program = python_block("repfuse.load") + "\nassert repfuse.load('fused.pt').module is not None\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_have_their_options(command: str, cli: Cli) -> None:
    _, name, *rest = shlex.split(command, comments=True)
    options = [word for word in rest if word.startswith("--")]
    done = cli(name, "--help", columns=200)
    assert done.returncode == 0
    assert all(option in done.stdout for option in options)


def test_every_make_target_of_the_readme_exists() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    mentioned = set(re.findall(r"make ([a-z]+)", README))
    assert {"demo", "test"} <= mentioned <= set(targets)
