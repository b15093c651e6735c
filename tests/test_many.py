"""Many checkpoints by one command: which, where to, what is done already, and what a failure or a kill leaves."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES
from torch import nn

from repfuse.cli.many import listed, tasks
from repfuse.errors import RepfuseError

SAMPLE = SAMPLES / "repvgg_digits.pt"


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def targets(root: Path, *patterns: str, form: str | None = None) -> dict[str, str]:
    found = tasks([str(root / pattern) for pattern in patterns], root / "out", form)
    return {str(task.source.relative_to(root)): str(task.target.relative_to(root / "out")) for task in found}


# --- which, and where to -----------------------------------------------------------------------------------------


def test_the_tree_below_the_common_folder_is_kept(tmp_path):
    tree(tmp_path, "runs/a/best.pt", "runs/a/last.pt", "runs/b/1/best.pt", "runs/b/best.pt.report.json")
    assert targets(tmp_path, "runs/**/best.pt*") == {"runs/a/best.pt": "a/best.pt", "runs/b/1/best.pt": "b/1/best.pt"}
    assert targets(tmp_path, "runs/a/best.pt", "runs/a/*.pt") == {
        "runs/a/best.pt": "best.pt",
        "runs/a/last.pt": "last.pt",
    }
    assert targets(tmp_path, "runs/a/*", form="onnx")["runs/a/best.pt"] == "best.onnx"
    assert targets(tmp_path, "runs/a/*", form="state-dict")["runs/a/best.pt"] == "best.pt"


@pytest.mark.parametrize(
    ("patterns", "form", "said"),
    [
        (["nothing/*.pt"], None, "no file"),
        (["a/one.pt", "a/one.pth"], "onnx", "would be"),
        (["out/kept.pt"], None, "written over"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(tmp_path, patterns, form, said):
    tree(tmp_path, "a/one.pt", "a/one.pth", "out/kept.pt")
    with pytest.raises(RepfuseError, match=said):
        targets(tmp_path, *patterns, form=form)


def test_a_list_has_a_path_a_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# all\nruns/a.pt\n\n  runs/b.pt \n")
    assert listed([str(path)]) == ["runs/a.pt", "runs/b.pt"]
    for wrong in (tmp_path / "none.txt", tree(tmp_path, "empty")):
        with pytest.raises(RepfuseError):
            listed([str(wrong)])


# --- all of it ---------------------------------------------------------------------------------------------------


def checkpoint(path: Path, seed: int) -> None:
    """A small network of its own weights."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), path)


def digests(root: Path) -> dict[str, str]:
    """All results; reports hold times."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".report.json"))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


OPTIONS = ("--quick", "--input", "1x3x8x8")


def test_many_are_converted_and_not_done_again(cli, tmp_path):
    for seed, name in enumerate(("a/best.pt", "b/best.pt", "b/other.pt")):
        checkpoint(tmp_path / "runs" / name, seed)
    (tmp_path / "runs/b/best.pt").write_bytes(b"damaged")
    tree(tmp_path / "out", "b/other.pt")
    asked = ("convert", str(tmp_path / "runs/**/*.pt"), "--into", tmp_path / "out", "--jobs", "2", *OPTIONS)
    done = cli(*asked, "--json")
    found = {
        Path(each["source"]).relative_to(tmp_path / "runs").as_posix(): each
        for each in json.loads(done.stdout)["results"]
    }
    assert done.returncode == 1 and "failed: " in done.stderr
    assert {name: each["status"] for name, each in found.items()} == {
        "a/best.pt": "converted",
        "b/best.pt": "failed",
        "b/other.pt": "failed",  # a file that repfuse did not make stands in its place
    }
    assert "not a checkpoint" in found["b/best.pt"]["said"] and "--force" in found["b/other.pt"]["said"]
    report = json.loads((tmp_path / "out/a/best.pt.report.json").read_text())
    assert report["command"].endswith("--quick") or "--quick" in report["command"].split()
    assert (tmp_path / "out/b/other.pt").read_bytes() == b"x" and not (tmp_path / "out/b/best.pt").exists()
    checkpoint(tmp_path / "runs/b/best.pt", 7)
    (tmp_path / "out/b/other.pt").unlink()
    done = cli(*asked, "--markdown")
    assert done.returncode == 0 and "2 converted, 1 done before" in done.stdout, done.stderr
    assert "| done already |" in done.stdout


def test_many_that_make_no_sense(cli, tmp_path):
    for wrong in ((SAMPLE, "b.pt", "c.pt"), (SAMPLE, "--into", tmp_path, "--dry-run"), (SAMPLE, "--into", SAMPLES)):
        assert cli("convert", *wrong).returncode == 2


@pytest.mark.slow  # ten starts
def test_killed_and_resumed_at_any_moment_the_tree_is_the_same(tmp_path):
    for seed in range(6):
        checkpoint(tmp_path / f"runs/{seed}/best.pt", seed)
    base = [sys.executable, "-m", "repfuse", "convert", str(tmp_path / "runs/*/best.pt"), "--jobs", "2", *OPTIONS, "-q"]
    whole = [*base, "--into", str(tmp_path / "whole")]
    began = time.monotonic()
    subprocess.run(whole, check=True)
    took, wanted = time.monotonic() - began, digests(tmp_path / "whole")
    assert len(wanted) == 6
    for number in range(10):
        killed = [*base, "--into", str(tmp_path / "killed")]
        process = subprocess.Popen(killed, start_new_session=True)
        time.sleep(took * (number + 1) / 12)
        process.send_signal(signal.SIGINT if number % 2 else signal.SIGKILL)
        process.wait()
        found = digests(tmp_path / "killed")
        whole_ones = {name: digest for name, digest in found.items() if not name.endswith(".part")}
        assert whole_ones.items() <= wanted.items()
    time.sleep(2)  # children of one that was killed end with it
    subprocess.run([*base, "--into", str(tmp_path / "killed")], check=True)
    left = {name: digest for name, digest in digests(tmp_path / "killed").items() if not name.endswith(".part")}
    assert left == wanted


@pytest.mark.slow  # a cluster
@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="needs repfuse[dask]")
def test_workers_that_are_killed_lose_nothing(tmp_path):
    from distributed import LocalCluster

    for seed in range(8):
        checkpoint(tmp_path / f"runs/{seed}/best.pt", seed)
    (tmp_path / "runs/3/best.pt").write_bytes(b"damaged")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        base = [sys.executable, "-m", "repfuse", "convert", str(tmp_path / "runs/*/best.pt"), *OPTIONS, "--json"]
        asked = [*base, "--into", str(tmp_path / "out"), "--dask", cluster.scheduler_address]
        process = subprocess.Popen(asked, stdout=subprocess.PIPE, text=True, env=environment)
        deadline = time.monotonic() + 300
        while not digests(tmp_path / "out") and time.monotonic() < deadline:
            time.sleep(0.2)
        worker = next(iter(cluster.workers.values()))
        os.kill(worker.process.process.pid, signal.SIGKILL)
        printed, _ = process.communicate(timeout=600)
    results = json.loads(printed)["results"]
    assert process.returncode == 1 and len(results) == 8
    assert [each["status"] for each in results].count("failed") == 1
    assert len(digests(tmp_path / "out")) == 7


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="needs repfuse[dask]")
def test_without_a_scheduler_there_is_an_end(cli, tmp_path):
    shutil.copy(SAMPLE, tmp_path / "a.pt")
    done = cli("convert", tmp_path / "a.pt", "--into", tmp_path / "out", "--dask", "tcp://127.0.0.1:9")
    assert done.returncode == 2 and "no Dask scheduler" in done.stderr
