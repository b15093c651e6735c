"""What the README shows works: its Python runs, and its commands do, typed from top to bottom."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES, SUPPORT, Cli, Run
from PIL import Image
from safetensors.torch import load_file, save_file
from support.onnx_models import exported
from support.snapshots import FOLDER as SNAPSHOTS

from repfuse.explanations import TOPICS
from repfuse.samples import DigitsRepVGG

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
COMMANDS = sorted(set(re.findall(r"^repfuse .*$", SHELL, re.MULTILINE)))

SECTIONS = {
    int(number): lines for number, lines in re.findall(r"^# (\d)\. .*\n((?:repfuse .*\n)+)", SHELL, re.MULTILINE)
}
USED = re.findall(r"^\| `([\w.]+)`.* \| `([^`]*)`.* \|$", README, re.MULTILINE)
IMPORTS = "import numpy, onnxruntime, repfuse, torch; x = numpy.zeros((1, 1, 8, 8), 'float32'); "
NETWORK = """from repfuse.samples import DigitsRepVGG


def build(num_classes: int) -> DigitsRepVGG:
    assert num_classes == 10
    return DigitsRepVGG()
"""
MINE = """from repfuse.samples import DigitsRepVGG


class Net(DigitsRepVGG):
    pass
"""
TRAINING = """import torch
from mynet import Net


class Trained(Net):
    pass


torch.save(Net().eval(), "mine.pt")
torch.save(Net().state_dict(), "mine.pth")
torch.save(Trained().eval(), "trained.pt")
"""


def run(python: Run, *args: str, cwd: Path) -> None:
    done = python(*args, cwd=cwd, env={"PYTHONPATH": os.pathsep.join(map(str, (cwd, ROOT, SUPPORT)))})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_python_of_the_readme_runs(python: Run, tmp_path: Path) -> None:
    shutil.copy(SAMPLES / "repvgg_digits.pt", tmp_path / "model.pt")
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    run(python, "-c", program + "\nassert repfuse.load('fused.pt').module is not None\n", cwd=tmp_path)


def test_the_result_that_the_readme_names_is_that_of_the_demo() -> None:
    """But for what the machine decides: the snapshots are of the demo's commands."""
    shown = [(SNAPSHOTS / f"{name}.txt").read_text(encoding="utf-8") for name in ("convert", "verify")]
    words = " ".join(README.split())
    for pattern, printed in zip(
        (r"\d+ → \d+ operators, exact to", r"original [\d.]+ %, fused [\d.]+ %"), shown, strict=True
    ):
        (named,) = re.findall(pattern, words)
        assert named in printed


@pytest.mark.parametrize("topic", re.findall(r"`repfuse explain (\w+)`", README))
def test_every_topic_of_the_readme_exists(topic: str) -> None:
    assert topic in TOPICS


def test_every_file_of_the_readme_exists() -> None:
    """What the development section names in the package, and in the tests."""
    named = re.findall(r"`((?:\w+/)+[\w*]*(?:\.py)?|\w+\.py)`", README.partition("## Development")[2])
    assert len(named) > 20
    assert [name for name in named if not any([*ROOT.glob(name), *ROOT.glob(f"repfuse/{name}")])] == []


@pytest.mark.parametrize("name", sorted({command.split()[1] for command in COMMANDS}))
def test_the_commands_of_the_readme_have_their_options(name: str, cli: Cli) -> None:
    shown = [word for command in COMMANDS if command.split()[1] == name for word in shlex.split(command, comments=True)]
    done = cli(name, "--help", columns=200)
    assert done.returncode == 0
    assert [word for word in shown if word.startswith("--") and word not in done.stdout] == []


def test_every_make_target_of_the_readme_exists() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    mentioned = set(re.findall(r"make ([a-z]+)", README))
    assert {"demo", "test"} <= mentioned <= set(targets)


@pytest.fixture
def desk(python: Run, tmp_path: Path) -> Path:
    """A folder with every file that the README's commands read."""
    model, example = torch.load(SAMPLES / "repvgg_digits.pt", weights_only=False).eval(), torch.zeros(1, 1, 8, 8)
    held_out = load_file(SAMPLES / "digits_heldout.safetensors")
    shutil.copy(SAMPLES / "repvgg_digits.pt", tmp_path / "model.pt")
    torch.export.save(torch.export.export(model, (example,)), tmp_path / "model.pt2")
    exported(model, [example], tmp_path / "deployed.onnx")
    np.savez(tmp_path / "batch.npz", **{name: tensor.numpy() for name, tensor in held_out.items()})
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "net.py").write_text(NETWORK)
    (tmp_path / "path" / "to" / "train.py").write_text(TRAINING)
    (tmp_path / "mynet.py").write_text(MINE)
    run(python, "path/to/train.py", cwd=tmp_path)
    weights = model.state_dict()
    torch.save({"state_dict": DigitsRepVGG().state_dict(), "state_dict_ema": weights}, tmp_path / "last.ckpt")
    for number, (image, label) in enumerate(zip(held_out["inputs"][:20], held_out["labels"][:20], strict=True)):
        folder = tmp_path / "val" / str(int(label))
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (image[0] - image.min()) / (image.max() - image.min()) * 255
        Image.fromarray(pixels.round().to(torch.uint8).numpy(), "L").save(folder / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("number", [*(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 3, 4)), 5])
def test_each_section_works_typed_from_top_to_bottom(number: int, desk: Path, cli: Cli, python: Run) -> None:
    commands = [part for line in SECTIONS[number].splitlines() for part in line.split(" #")[0].split("&&")]
    if number == 2:
        import timm

        save_file(timm.create_model("repvgg_a0").state_dict(), desk / "weights.safetensors")
    elif number > 2:  # what the first section left
        assert cli("convert", "model.pt", "fused.pt", "--quiet", cwd=desk).returncode == 0
    for command in commands:
        program, *args = shlex.split(command)
        assert program == "repfuse"
        if not any(arg.startswith("hf-hub:") for arg in args):
            done = cli(*args, cwd=desk)
            assert done.returncode == 0, (command, done.stderr, done.stdout)
    lines = [line for name, line in USED if (desk / name).is_file()]
    assert len(lines) == {1: 3, 2: 2}.get(number, 1)
    for line in lines:
        run(python, "-c", IMPORTS + line, cwd=desk)
