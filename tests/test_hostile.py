"""The corpus of hostile files: nothing runs, nothing is left, and each is one message.

They are loaded in a process that they may harm (``hostile.child``), many to a process since torch takes seconds to
import.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SUPPORT, Cli, Run
from hostile.controls import CONTROLS
from hostile.corpus import CORPUS

from repfuse.data import read_data
from repfuse.errors import RepfuseError

SECONDS = 5.0  # of processor time
GROWN = 400 << 20  # bytes of memory beyond what the process has; a file may ask for 256 MiB unchecked
MESSAGE = 12_000  # characters


def outcomes(python: Run, names: list[str], folder: Path, *, trust: bool = False) -> dict[str, dict[str, Any]]:
    """Load the files, and return what the process said of each. One that is missing ended the process."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", SUPPORT)))
    trusted = "trust" if trust else "no"
    done = python("-m", "hostile.child", folder, trusted, *names, env={"PYTHONPATH": paths}, timeout=1200)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line["name"]: line for line in lines if "name" in line}
    missing = [name for name in names if name not in found]
    assert not missing, f"{missing[0]} ended the process with {done.returncode}:\n{done.stderr[-3000:]}"
    return found


def complaints(found: dict[str, Any]) -> list[str]:
    """Return what is wrong with an outcome."""
    attack, message = (CORPUS | CONTROLS)[found["name"]], found["message"]
    fine = ("refused", "loaded") if attack.may_load else ("refused",)
    checks = {
        f"it ran: {found['seen']}": found["canary"] or found["seen"],
        f"it left {found['left']}": found["left"],
        f"it {found['outcome']}: {message[-1500:]}": found["outcome"] not in fine,
        f"it took {found['seconds']:.1f} s": found["seconds"] > SECONDS,
        f"it took {found['grown'] >> 20} MiB, and has {found['size']} bytes": found["grown"] > GROWN,
        f"its message has {len(message)} characters": len(message) > MESSAGE,
        f"its message does not say what to do: {message}": found["outcome"] == "refused" and "\ndo: " not in message,
        f"its message is torch's: {message}": "Weights only load failed" in message,
        f"it is called a mistake of repfuse: {message}": "Traceback" in message,
    }
    return [f"{found['name']}: {complaint}" for complaint, bad in checks.items() if bad]


SOON = [name for number, name in enumerate(CORPUS) if number % 4 == 0 or not name.startswith("pt2: given ")]
"""But for most of those that are other attacks again, as members of an exported program."""


@pytest.mark.parametrize("names", [SOON, pytest.param(list(CORPUS), marks=pytest.mark.slow)], ids=["soon", "all"])
def test_no_attack_succeeds(names: list[str], python: Run, tmp_path: Path) -> None:
    found = outcomes(python, names, tmp_path)
    assert not [complaint for name in names for complaint in complaints(found[name])]


@pytest.mark.slow
def test_the_attacks_are_real_and_the_harness_sees_them(python: Run, tmp_path: Path) -> None:
    """The control: where the files are trusted, each touches its canary, and other harm is seen as well."""
    executes = [name for name, attack in CORPUS.items() if attack.executes and not name.startswith("recipe")]
    found = outcomes(python, [*executes, *CONTROLS], tmp_path, trust=True)
    said = {name: " ".join(complaints(outcome)) for name, outcome in found.items()}
    assert len(executes) > 60
    assert [name for name in executes if not (found[name]["canary"] and "it ran" in said[name])] == []
    assert "MiB, and has" in said["control: memory"]
    assert "it escaped" in said["control: error"]
    assert "it left ['canary2']" in said["control: file"]
    assert "it ran" in said["control: program"]
    assert "it took 6.0 s" in " ".join(complaints(found["control: file"] | {"seconds": 6.0}))


HANDFUL = {
    "pickle: opcode REDUCE": ("convert", "{path}", "{folder}/out.pt"),
    "archive: bomb: the pickle": ("verify", "{path}", "{path}"),
}


@pytest.mark.parametrize("name", HANDFUL)
def test_every_command_refuses_with_one_message(name: str, cli: Cli, tmp_path: Path) -> None:
    path, canary = tmp_path / "in.pt", tmp_path / "canary"
    path.write_bytes(CORPUS[name].make(tmp_path, canary))
    before = set(tmp_path.iterdir())
    done = cli(*(word.format(path=path, folder=tmp_path) for word in HANDFUL[name]))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr and "does not expect" not in done.stderr
    assert set(tmp_path.iterdir()) == before


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What asks for 8 GiB gets none, here as in the process of the corpus."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    "name", [name for name in CORPUS if name.startswith(("tensor: ", "archive: bomb", "pickle: call of torch"))]
)
def test_data_is_read_by_the_same_rules(name: str, little_memory: None, tmp_path: Path) -> None:
    (tmp_path / "data.pt").write_bytes(CORPUS[name].make(tmp_path, tmp_path / "canary"))
    with pytest.raises(RepfuseError):
        read_data(tmp_path / "data.pt")
    assert not (tmp_path / "canary").exists()
