"""`repfuse check`: the gate, on a small repository that the test makes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES

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
    done = cli("check", tmp_path / "fused.pt", "--original", tmp_path / "model.pt", "--quick", "--format", "markdown")
    assert done.returncode == 1 and "**different**" in done.stdout


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


@pytest.mark.parametrize(("options", "said"), [(("--baseline", "x.json"), "--original"), (("--format", "x"), "text")])
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
def test_the_action_and_the_hook_run_it(repository):
    yaml = pytest.importorskip("yaml")
    action = yaml.safe_load((ROOT / ".github/actions/check/action.yml").read_text())
    (step,) = action["runs"]["steps"]
    known = dict.fromkeys(step["env"], "")
    assert {value.split("inputs.")[1].split()[0] for value in step["env"].values()} == action["inputs"].keys()
    failed = _bash(step["run"], **known | {"MODEL": repository / "model.pt"})
    assert failed.returncode == 1 and failed.stdout.startswith("::error file=")
    good = {"MODEL": repository / "fused.pt", "ORIGINAL": repository / "model.pt", "OPTIONS": "--quick"}
    assert _bash(step["run"], **known | good).returncode == 0
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    entry = shlex.split(hook["entry"])
    assert entry[:2] == ["bash", "-c"] and _bash(entry[2], repository / "fused.pt").returncode == 0
    done = _bash(entry[2], repository / "fused.pt", repository / "model.pt")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 2
