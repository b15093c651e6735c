"""First contacts from nothing: a script of the user's makes the files, then the commands are typed as a newcomer would.

A contact takes one command, or two where the message of the first names what the second adds. `repfuse` is run as the
installed program is: the folder where the user stands is not in its import path by itself.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, Cli, Done, Run

OPTION = re.compile(r"(--(?:allow|model) \S+?|--trust)(?=[.;]?(?:\s|$))")


def code(*parts: str) -> str:
    return "".join(map(textwrap.dedent, parts))


IMPORTS = "import torch\nfrom torch import nn\n"
BLOCK = """
    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.three = nn.Conv2d(channels, channels, 3, padding=1)
            self.one = nn.Conv2d(channels, channels, 1)
            self.norm = nn.BatchNorm2d(channels)

        def forward(self, x):
            return torch.relu(self.three(x) + self.one(x) + self.norm(x))
"""
NET = """
    class Net(nn.Module):
        def __init__(self, channels=4):
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, channels, 1), Block(channels)
            self.head = nn.Linear(channels, 5)

        def forward(self, x):
            return self.head(self.block(self.stem(x)).mean((2, 3)))

    def build(channels=4):
        return Net(channels)
"""
DEFINED = IMPORTS + code(BLOCK, NET)
MARK = 'open("runs.txt", "a").write("x")\n'  # how often the training ran
TRAIN = f"""
net = Net()
{MARK}
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
for x in torch.randn(5, 8, 3, 9, 9):
    net(x).sum().backward()
    optimizer.step()
"""
SAVE = """
torch.save({}, "model.pt")
x = torch.randn(2, 3, 9, 7)
torch.save([x, net.eval()(x).detach()], "expected.pt")
"""
OPERATORS = 'torch.library.Library("first_contact", "DEF").define("twice(Tensor x) -> Tensor")\n'  # once per process


def script(head: str, saved: str = "net", guard: bool = False) -> str:
    """A script that trains a network and saves it, under a guard or not."""
    work = TRAIN + SAVE.format(saved)
    return head + ('if __name__ == "__main__":\n' + textwrap.indent(work, "    ") if guard else work)


def beside(saved: str = "net") -> dict[str, str]:
    """The class in a file of its own."""
    return {"mynet.py": DEFINED, "train.py": script(IMPORTS + "from mynet import Net\n", saved)}


def repository(saved: str) -> dict[str, str]:
    return {
        "models/__init__.py": "",
        "models/blocks.py": IMPORTS + code(BLOCK),
        "models/net.py": IMPORTS + "from models.blocks import Block\n" + OPERATORS + code(NET),
        "train.py": script(IMPORTS + "from models.net import Net\n", saved),
    }


@dataclass(frozen=True)
class Contact:
    """The ``files`` of a user, of which train.py is run; what he types, and where he stands.

    ``most`` commands may be needed; ``defined`` is what the script says that uses the result.
    """

    files: dict[str, str]
    line: str
    most: int = 2
    standing: str = "."
    defined: str = ""


CHECKPOINT = "{'epoch': 3, 'model': net, 'optimizer': optimizer.state_dict()}"
STATE = "net.state_dict()"
CONTACTS = {
    "a class in a file": Contact(beside(), "convert model.pt fused.pt"),
    "a class in a file, by its name": Contact(beside(), "convert model.pt fused.pt --allow mynet", most=1),
    "a class in a file, by its path": Contact(
        beside(), "convert ../model.pt fused.pt --allow ../mynet.py", most=1, standing="sub"
    ),
    "a class in a file beside the checkpoint": Contact(beside(), "convert ../model.pt fused.pt", standing="sub"),
    "a class in the script": Contact(
        {"train.py": script(DEFINED, guard=True)}, "convert model.pt f.pt", defined=DEFINED
    ),
    "a class in one of two scripts": Contact(
        {"train.py": script(DEFINED, guard=True), "other.py": DEFINED}, "convert model.pt f.pt", defined=DEFINED
    ),
    "a class in a script that trains when it is imported": Contact(
        {"train.py": script(DEFINED)}, "convert model.pt fused.pt", defined=DEFINED
    ),
    "a training checkpoint of a script, as weights": Contact(
        {"train.py": script(DEFINED, CHECKPOINT, guard=True)}, "convert model.pt fused.safetensors"
    ),
    "a package": Contact(repository("net"), "convert model.pt fused.pt"),
    "compiled": Contact(beside("torch.compile(net)"), "convert model.pt fused.pt"),
    "compiled in part, wrapped, in a training checkpoint": Contact(
        beside("{'model': nn.DataParallel(nn.Sequential(torch.compile(net)))}"), "convert model.pt fused.pt"
    ),
    "a file that is trusted": Contact(beside(), "convert model.pt fused.pt --trust"),
    "a file of a script that is trusted": Contact(
        {"train.py": script(DEFINED)}, "convert model.pt fused.pt --trust", defined=DEFINED
    ),
    "weights and a file": Contact(repository(STATE), "convert model.pt fused.pt --model models/net.py:build", most=1),
    "weights and a module": Contact(repository(STATE), "convert model.pt fused.pt --model models.net:build", most=1),
    "weights and the script": Contact(
        {"train.py": script(DEFINED, STATE)}, "convert model.pt fused.pth --model train.py:Net", most=1
    ),
    "to weights": Contact(beside(), "convert model.pt fused.safetensors"),
    "to a program": Contact(beside(), "convert model.pt fused.pt2"),
    "to ONNX": Contact(beside(), "convert model.pt fused.onnx"),
}
FEW = ("a class in the script",)
"""What every run plays; each takes a script and up to three commands, and each of these imports torch."""


def ran(done: Done) -> str:
    assert not done.returncode, done.stderr
    return done.stdout


def made(contact: Contact, folder: Path, python: Run) -> Path:
    """Write the user's files and run his script; return where he stands."""
    for name, text in contact.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    ran(python("train.py", cwd=folder))
    standing = folder / contact.standing
    standing.mkdir(exist_ok=True)
    return standing


def typed(cli: Cli, line: str, cwd: Path) -> Done:
    fresh = {"REPFUSE_SAME_PROCESS": "0", "REPFUSE_FORKED": "1"}  # a copy of what has imported torch is fresh, too
    return cli(*line.split(), cwd=cwd, env={"PYTHONSAFEPATH": "1", **fresh}, columns=80)


def tries(cli: Cli, line: str, cwd: Path) -> int:
    """Type the command, and then with what its message names; return how many commands it took."""
    first = typed(cli, line, cwd)
    if not first.returncode:
        return 1
    assert first.returncode == 2, first.stderr
    named = OPTION.findall(first.stderr.partition(" do: ")[2].partition(" Or ")[0])
    second = typed(cli, " ".join([line, *(option for option in named if option not in line)]), cwd)
    assert not second.returncode, f"{first.stderr}\n{second.stderr}"
    return 2


def used(out: Path, contact: Contact, folder: Path, python: Run) -> float:
    """Run the lines that the report gives to use the file, and return how far its outputs are from the original's."""
    lines = json.loads(Path(f"{out}.report.json").read_text())["output"]["use"]
    before, found = {
        ".onnx": ("x = x.numpy()", "torch.tensor(outputs[0])"),
        ".pt2": ("", "model(x)"),
    }.get(out.suffix, ("", "model.eval()(x)"))
    text = [
        contact.defined,
        "import torch",
        f"x, expected = torch.load({str(folder / 'expected.pt')!r})",
        before,
        *lines,
    ]
    text.append(f"print(float(({found} - expected).abs().max() / expected.abs().max()))")
    (out.parent / "use.py").write_text("\n".join(text))
    return float(ran(python("use.py", cwd=out.parent, env={"PYTHONPATH": f"{ROOT}:{folder}"})))


def marked(name: str) -> object:
    return pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow])


@pytest.mark.parametrize("name", [marked(name) for name in CONTACTS])
def test_it_takes_one_command_or_two_where_the_first_names_the_second(
    name: str, cli: Cli, python: Run, tmp_path: Path
) -> None:
    contact = CONTACTS[name]
    standing = made(contact, tmp_path, python)
    assert tries(cli, f"{contact.line} --quick --input 2x3x9x7", standing) <= contact.most
    assert (tmp_path / "runs.txt").read_text() == "x"  # nothing was trained again
    out = standing / contact.line.split()[2]
    report = json.loads(Path(f"{out}.report.json").read_text())
    assert report["plan"]["sites"]
    assert report["output"]["verified"]["where"] == "a fresh process"
    assert used(out, contact, tmp_path, python) < 1e-5


def state_file(folder: Path, **files: str) -> Path:
    """Weights of a convolution, and the user's files around them."""
    import torch

    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def refused(cli: Cli, line: str, cwd: Path) -> str:
    done = typed(cli, line, cwd)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 4
    return done.stderr


def test_a_model_file_runs_once_in_each_process(cli: Cli, tmp_path: Path) -> None:
    """It may define operators and fill registries, which fails the second time."""
    net = f"import torch\n{OPERATORS}def build():\n    return torch.nn.Conv2d(3, 4, 1)\n"
    state_file(tmp_path, net=net)
    for command in ("verify", "bench --seconds 0.1 --rounds 8"):
        done = typed(cli, f"{command} weights.pth weights.pth --model net.py:build --input 1x3x4x4", tmp_path)
        assert not done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "spec", "said"),
    [
        ({"net": "import no_such_module"}, "net.py:build", "pip install no_such_module"),
        ({"net": "import pytorch_lightning_x, torch"}, "net:build", "net imports pytorch_lightning_x"),
        ({"net": "def build():\n    import mmseg"}, "net:build", "pip install mmsegmentation"),
        ({"net": "import sys\nsys.exit(3)"}, "net.py:build", "ends the program when it is imported (line 2)"),
        ({"net": "def f():\n    1 / 0\nf()"}, "net.py:build", "division by zero (line 2)"),
        ({}, "nets.net:build", "Python finds no such module"),
    ],
)
def test_what_is_wrong_with_the_users_code_is_said(
    files: dict[str, str], spec: str, said: str, cli: Cli, tmp_path: Path
) -> None:
    state_file(tmp_path, **files)
    assert said in refused(cli, f"inspect weights.pth --model {spec}", tmp_path)


def test_a_command_line_of_the_users_script_is_not_that_of_repfuse(cli: Cli, tmp_path: Path) -> None:
    state_file(
        tmp_path,
        net="""
        import argparse, torch
        parser = argparse.ArgumentParser()
        parser.add_argument("--width", type=int, default=4)
        args = parser.parse_args()
        def build(): return torch.nn.Conv2d(3, args.width, 1)
        """,
    )
    assert not typed(cli, "inspect weights.pth --model net.py:build --input 1x3x4x4", tmp_path).returncode


@pytest.mark.slow
def test_a_known_library_that_is_missing_is_installed_and_never_trusted(cli: Cli, tmp_path: Path) -> None:
    pickled_as(tmp_path / "model.pt", "ultralytics.nn.tasks")
    for options in ("", "--allow ultralytics"):
        message = refused(cli, f"inspect model.pt {options}", tmp_path)
        assert "pip install ultralytics" in message and "--trust" not in message


def pickled_as(path: Path, module: str) -> None:
    """A network whose class the file says is of ``module``."""
    import io
    import zipfile

    import torch

    buffer = io.BytesIO()
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), buffer)
    with zipfile.ZipFile(buffer) as held, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        for name in held.namelist():
            was = b"ctorch.nn.modules.container\nSequential"
            out.writestr(name, held.read(name).replace(was, f"c{module}\nSequential".encode()))


MINE = "from torch import nn\nopen('ran.txt', 'w')\nclass Sequential(nn.Sequential):\n    pass\n"


def test_nothing_runs_that_was_not_named(cli: Cli, tmp_path: Path) -> None:
    """Not to give advice, and not because something else was named, or lies beside."""
    for name in ("mine", "other", "script"):
        (tmp_path / f"{name}.py").write_text(MINE if name != "other" else MINE.partition("class")[0])
    for module in ("mine", "__main__"):
        pickled_as(tmp_path / "model.pt", module)
        for options in ("", "--allow other.py --allow min", "--allow torch --allow mine.nothing"):
            refused(cli, f"inspect model.pt {options}", tmp_path)
    (tmp_path / "mine.py").rename(tmp_path / "named.py")
    assert not (tmp_path / "ran.txt").exists()
    pickled_as(tmp_path / "model.pt", "named")
    assert not typed(cli, "inspect model.pt --allow named --input 1x3x4x4", tmp_path).returncode
    assert (tmp_path / "ran.txt").exists()  # so it would have been seen


def test_pipes_and_devices_are_refused_at_once(cli: Cli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for line in ("inspect pipe.pt", "verify pipe.pt pipe.pt", "inspect /dev/zero", "convert /dev/stdin out.pt"):
        assert "no regular file" in refused(cli, line, tmp_path)
    state_file(tmp_path)
    for options in ("--plan pipe.pt --dry-run", "--allow pipe.pt/../pipe.pt --dry-run"):
        refused(cli, f"convert weights.pth {options} --model torch.nn:Identity", tmp_path)


def test_a_notebook_is_to_become_a_script(cli: Cli, tmp_path: Path) -> None:
    state_file(tmp_path)
    assert "nbconvert" in refused(cli, "inspect weights.pth --allow mine.ipynb", tmp_path)
