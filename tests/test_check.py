"""`repfuse check`: the gate, on a small repository that the test makes."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES
from safetensors.torch import save_file
from support.networks import random_norms, timm_network

ROOT = SAMPLES.parent
SAMPLE = SAMPLES / "repvgg_digits.pt"


@pytest.fixture(scope="module")
def repository(cli, tmp_path_factory) -> Path:
    """A network, and what repfuse made of it."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copy(SAMPLE, root / "model.pt")
    assert cli("convert", root / "model.pt", root / "fused.pt", "--quick").returncode == 0
    return root


def test_what_could_be_fused_is_found(cli, repository):
    done = cli("check", repository / "model.pt", "--format", "github")
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"::error file={repository}/model.pt,title=repfuse could-be-fused::5 places")
    assert cli("check", repository / "model.pt", "--max-sites", "5").returncode == 0


def test_a_fused_file_passes_and_one_weight_off_by_one_spacing_does_not(cli, repository, tmp_path):
    good = cli("check", repository / "fused.pt", "--original", repository / "model.pt", "--quick")
    assert good.returncode == 0 and good.stdout.endswith("fused.pt: nothing found\n"), good.stderr
    for name in ("fused.pt", "fused.pt.report.json", "model.pt"):
        shutil.copy(repository / name, tmp_path / name)
    network = torch.load(tmp_path / "fused.pt", weights_only=False)
    weight = next(network.parameters()).data.view(-1)
    weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    torch.save(network, tmp_path / "fused.pt")
    done = cli("check", tmp_path / "fused.pt", "--original", tmp_path / "model.pt", "--quick", "--json")
    assert done.returncode == 1
    assert [finding["kind"] for finding in json.loads(done.stdout)["findings"]] == ["changed"]
    (tmp_path / "fused.pt.report.json").unlink()
    weight[3] *= 1.01
    torch.save(network, tmp_path / "fused.pt")
    asked = ("check", tmp_path / "fused.pt", "--original", tmp_path / "model.pt", "--quick", "--markdown")
    done = cli(*asked, tmp_path / "comment.md")
    assert done.returncode == 1 and "fused.pt: different: " in done.stdout
    assert (tmp_path / "comment.md").read_text().startswith("**repfuse**: 1 finding\n\n- `")
    assert "exists already" in cli(*asked, tmp_path / "comment.md").stderr


NET = """
from torch import nn, relu

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.point = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return relu(self.wide(x) + self.point(x) + x)

def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), Block(16), Block(16)).eval()
"""


@pytest.mark.parametrize("network", ["net.py:net", pytest.param("timm:mobileone_s0", marks=pytest.mark.peers)])
def test_of_a_whole_repository_one_weight_off_by_one_unit_in_the_last_place_is_found(cli, tmp_path, network):
    (tmp_path / "net.py").write_text(NET)
    source, _, name = network.partition(":")
    made = timm_network(name) if source == "timm" else random_norms(runpy.run_path(str(tmp_path / source))[name]())
    save_file({key: x.contiguous() for key, x in made.state_dict().items()}, tmp_path / "model.safetensors")
    built = () if source == "timm" else ("--input", "1x3x32x32")
    run = partial(cli, cwd=tmp_path)
    assert (
        run("convert", "model.safetensors", "fused.safetensors", "--model", network, *built, "--quick").returncode == 0
    )
    check = ("check", "fused.safetensors", "--original", "model.safetensors", "--model", network, "--json")
    good = run(*check)
    assert good.returncode == 0 and not json.loads(good.stdout)["findings"], good.stderr
    data = bytearray((fused := tmp_path / "fused.safetensors").read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")  # the header and its length come before the numbers
    data[first + 4 * 17] ^= 1
    fused.write_bytes(data)
    for found in (["changed", "different"], ["different"]):
        done = run(*check)
        assert done.returncode == 1 and [each["kind"] for each in json.loads(done.stdout)["findings"]] == found
        (tmp_path / "fused.safetensors.report.json").unlink(missing_ok=True)  # the file itself knows its plan


def test_what_got_slower_is_found(cli, repository, tmp_path):
    both = (repository / "model.pt", repository / "fused.pt")
    options = ("--threads", "1", "--rounds", "8", "--budget", "1s", "--save", tmp_path / "speed.json")
    assert cli("bench", *both, *options).returncode == 0
    data = json.loads((tmp_path / "speed.json").read_text())
    for entry in data["measurements"]:  # as if it had been ten times as fast then
        entry["fused"]["times"] = [time / 10 for time in entry["fused"]["times"]]
    (tmp_path / "speed.json").write_text(json.dumps(data))
    done = cli("check", both[1], "--original", both[0], "--baseline", tmp_path / "speed.json", "--quick")
    assert done.returncode == 1 and "slower: a call takes" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--baseline", "x.json"), "--original"),
        (("--format", "x"), "text"),
        (("b.pt", "--original", "a.pt"), "one by one"),
    ],
)
def test_what_makes_no_sense_is_bad_input(cli, options, said):
    done = cli("check", SAMPLE, *options)
    assert done.returncode == 2 and said in done.stderr


# --- what others run it by ---------------------------------------------------------------------------------------


def _bash(script: str, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a script where `repfuse` is this one."""
    folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    environment |= {name: str(value) for name, value in variables.items()}
    command = ["bash", "-c", script, "bash", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_action_and_the_hook_run_it(repository, tmp_path):
    yaml = pytest.importorskip("yaml")
    action = yaml.safe_load((ROOT / ".github/actions/check/action.yml").read_text())
    (step,) = action["runs"]["steps"]
    summary = tmp_path / "summary.md"
    known = dict.fromkeys(step["env"], "") | {"RUNNER_TEMP": tmp_path, "GITHUB_STEP_SUMMARY": summary}
    assert {value.split("inputs.")[1].split()[0] for value in step["env"].values()} == action["inputs"].keys()
    failed = _bash(step["run"], **known | {"MODEL": repository / "model.pt"})
    assert failed.returncode == 1 and failed.stdout.startswith("::error file=")
    assert summary.read_text().startswith("**repfuse**: 1 finding")
    good = {"MODEL": repository / "fused.pt", "ORIGINAL": repository / "model.pt", "OPTIONS": "--quick"}
    assert _bash(step["run"], **known | good).returncode == 0
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    entry = [*shlex.split(hook["entry"]), "--quiet"]  # and what is in `args`, before the files
    assert _bash('"$@"', *entry, repository / "fused.pt").returncode == 0
    done = _bash('"$@"', *entry, repository / "fused.pt", repository / "model.pt")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1
