"""Many checkpoints by one command: which, where to, what is done already, and what a failure or a kill leaves."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from conftest import SAMPLES
from support.cluster import Cluster
from test_report_page import Elements
from torch import nn
from typer.testing import CliRunner

from repfuse import RepfuseError
from repfuse.cli.app import app
from repfuse.cli.many import how_far, tasks

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


def test_a_list_has_a_path_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def said(path: str) -> str:
        done = CliRunner().invoke(app, ["convert", path, "--from", "--into", "out"])
        assert done.exit_code == 2, done.output
        return done.stderr

    Path("list.txt").write_text("# all\nruns/a.pt\n\n  runs/b.pt \n")
    assert "There is no file runs/a.pt." in said("list.txt")
    tree(tmp_path, "runs/a.pt")
    assert "There is no file runs/b.pt." in said("list.txt")
    Path("empty.txt").write_text("# none\n\n")
    assert "empty.txt names no file" in said("empty.txt")
    for wrong in ("none.txt", "runs"):
        assert f"The list {wrong} cannot be read." in said(wrong)


# --- all of it ---------------------------------------------------------------------------------------------------


REPFUSE = (sys.executable, "-m", "repfuse")


def checkpoint(path: Path, seed: int, kind: type[nn.Sequential] = nn.Sequential) -> None:
    """A small network of its own weights."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(kind(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), path)


def digests(root: Path) -> dict[str, str]:
    """All files there are; reports hold times, so that of them there is only the name."""
    return {
        str(path.relative_to(root)): ""
        if path.name.endswith(".report.json")
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def whole(found: dict[str, str]) -> dict[str, str]:
    """Without what a process that was killed left half written."""
    return {name: digest for name, digest in found.items() if not name.endswith(".part")}


OPTIONS = ("--quick", "--input", "1x3x8x8")
FORKED = {"REPFUSE_FORKED": "1"}
"""For tests of other things: the command starts no server of copies, which imports torch, but copies itself."""


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
    assert "--quick" in report["command"].split()
    assert (tmp_path / "out/b/other.pt").read_bytes() == b"x" and not (tmp_path / "out/b/best.pt").exists()
    checkpoint(tmp_path / "runs/b/best.pt", 7)
    (tmp_path / "out/b/other.pt").unlink()
    tree(tmp_path / "out", "a/.best.pt.killed_0.part")
    (made := tmp_path / "out/a/best.pt.report.json").rename(tmp_path / "out/a/.best.pt.report.json.killed_1.part")
    done = cli(*asked, "--report", tmp_path / "all.md", env=FORKED)
    assert done.returncode == 0 and "2 converted, 1 done before" in done.stdout, done.stderr
    assert made.exists() and not list(made.parent.glob(".*"))
    assert f"| {tmp_path}/runs/a/best.pt | 1 merged, exact to ".replace("_", "\\_") in (tmp_path / "all.md").read_text()


def test_the_summary_is_a_page_that_links_to_the_page_of_each(cli, tmp_path):
    odd = "a#b?<img src=x onerror=alert(1)>'\"%20.pt"
    checkpoint(tmp_path / "runs" / odd, 1)
    checkpoint(tmp_path / "runs/b/best.pt", 2)
    (tmp_path / "runs/<b>broken.pt").write_bytes(b"damaged")
    asked = ("convert", str(tmp_path / "runs/**/*.pt"), "--into", tmp_path / "out", *OPTIONS)
    assert cli(*asked, "--report", tmp_path / "all.html", env=FORKED).returncode == 1
    page = Elements((tmp_path / "all.html").read_text())
    assert not page.tags & {"img", "script", "b"} and "2 converted, 1 failed" in page.text
    assert page.text.index("<b>broken.pt") < page.text.index("b/best.pt")  # those that failed first
    links = [unquote(attributes["href"] or "") for tag, attributes in page.found if tag == "a"]
    assert sorted(links) == [f"out/{odd}.report.html", "out/b/best.pt.report.html"]
    assert all("exact to" in Elements((tmp_path / link).read_text()).text for link in links)
    assert "exists already" in cli(*asked, "--report", tmp_path / "all.html").stderr


def test_with_another_plan_it_is_done_again(cli, tmp_path):
    checkpoint(tmp_path / "a.pt", 1)
    assert cli("inspect", tmp_path / "a.pt", "--input", "1x3x8x8", "--plan", tmp_path / "plan.json").returncode == 0
    asked = ("convert", tmp_path / "?.pt", "--into", tmp_path / "out", "--quick", "--plan", "plan.json")
    for said in ("1 converted in", "1 done before in"):
        assert said in cli(*asked, cwd=tmp_path, env=FORKED).stdout
    with (tmp_path / "plan.json").open("a") as file:
        file.write("\n")
    assert "1 converted in" in cli(*asked, cwd=tmp_path, env=FORKED).stdout


def test_files_that_are_elsewhere_are_fetched_and_sent(cli, tmp_path):
    for seed, name in enumerate("ab"):
        checkpoint(tmp_path / f"there/runs/{name}/best.pt", seed)
    tree(tmp_path / "there", "fused/b/best.pt")
    place = FORKED | {"FSSPEC_DIR": json.dumps({"path": str(tmp_path / "there"), "target_protocol": "file"})}
    asked = ("convert", "dir://runs/*/best.pt", "--into", "dir://fused", *OPTIONS)
    done = cli(*asked, env=place)
    assert done.returncode == 1 and "failed: dir://runs/b/best.pt: There is another file" in done.stderr
    (tmp_path / "there/fused/b/best.pt").unlink()
    done = cli(*asked, env=place)
    assert done.returncode == 0 and "1 converted, 1 done before in" in done.stdout
    files = {path for path in digests(tmp_path / "there") if path.startswith("fused")}
    assert files == {f"fused/{name}/best.pt{end}" for name in "ab" for end in ("", ".report.json")}
    report = json.loads((tmp_path / "there/fused/a/best.pt.report.json").read_text())
    assert report["input"]["path"] == "dir://runs/a/best.pt" and report["output"]["path"] == "dir://fused/a/best.pt"
    url = (tmp_path / "there/runs/a").as_uri()
    assert cli("convert", f"{url}/*.pt", "--into", tmp_path / "out", *OPTIONS, env=FORKED).returncode == 0
    here = digests(tmp_path / "out")["best.pt"]
    assert here == digests(tmp_path / "there")["fused/a/best.pt"]
    assert "cannot be listed" in cli("convert", "nosuch://x/*", "--into", "y").stderr


def test_many_that_make_no_sense(cli, tmp_path):
    for wrong in ((SAMPLE, "b.pt", "c.pt"), (SAMPLE, "--into", tmp_path, "--dry-run"), (SAMPLE, "--into", SAMPLES)):
        assert cli("convert", *wrong).returncode == 2


def test_how_long_the_others_take_is_told_by_what_was_not_skipped(tmp_path):
    (task,) = tasks([str(tree(tmp_path, "a.pt") / "a.pt")], tmp_path / "out", None)
    ended = [task.ended(status, "") for status in ("skipped", "failed", "converted")]
    assert how_far(ended[:1], 9, 4.0) == "1 of 9"
    assert how_far(ended, 9, 4.0) == "3 of 9, 1 failed, about 12.0 s left"


@pytest.mark.slow  # ten starts
def test_killed_and_resumed_at_any_moment_the_tree_is_the_same(tmp_path):
    for seed in range(6):
        checkpoint(tmp_path / f"runs/{seed}/best.pt", seed)
    asked = [*REPFUSE, "convert", str(tmp_path / "runs/*/best.pt"), "--jobs", "2", *OPTIONS, "-q", "--into"]
    began = time.monotonic()
    subprocess.run([*asked, str(tmp_path / "whole")], check=True)
    took, wanted = time.monotonic() - began, digests(tmp_path / "whole")
    assert len(wanted) == 12
    moments, groups = random.Random(17), []
    for number in range(10):
        process = subprocess.Popen([*asked, str(tmp_path / "killed")], start_new_session=True)
        groups.append(process.pid)
        time.sleep(moments.uniform(0, took))
        process.send_signal(signal.SIGINT if number % 2 else signal.SIGKILL)
        process.wait()
        assert whole(digests(tmp_path / "killed")).items() <= wanted.items()
    for group in groups:
        with suppress(ProcessLookupError):  # children of one that was killed end with it, in a moment
            os.killpg(group, signal.SIGKILL)
    subprocess.run([*asked, str(tmp_path / "killed")], check=True)
    assert digests(tmp_path / "killed") == wanted


# --- on a cluster ------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    with Cluster(tmp_path / "cluster") as made:
        yield made


def on(cluster: Cluster, *arguments: object) -> subprocess.Popen[str]:
    command = [*REPFUSE, "convert", *map(str, arguments), *OPTIONS, "--dask", cluster.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cluster.folder)


@pytest.mark.slow  # a cluster
def test_workers_that_are_killed_lose_nothing(cluster, tmp_path):
    for seed in range(8):
        checkpoint(tmp_path / f"runs/{seed}/best.pt", seed)
    (tmp_path / "runs/3/best.pt").write_bytes(b"damaged")
    process = on(cluster, tmp_path / "runs/*/best.pt", "--into", tmp_path / "out", "--json")
    _when_one_is_done(tmp_path / "out")
    cluster.workers[0].kill()
    before = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*/best.pt")}
    cluster.worker()
    printed, said = process.communicate()
    results = json.loads(printed)["results"]
    assert process.returncode == 1 and len(results) == 8, said
    assert [each["source"] for each in results if each["status"] == "failed"] == [str(tmp_path / "runs/3/best.pt")]
    assert len(whole(digests(tmp_path / "out"))) == 14
    assert before and all(path.stat().st_ino == then for path, then in before.items())  # nothing was written twice


@pytest.mark.slow
def test_a_worker_without_the_package_of_a_model_fails_for_it_alone(cluster, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mynet_of_mine.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path / "mine")
    net = importlib.import_module("mynet_of_mine").Net
    for seed in range(3):
        checkpoint(tmp_path / f"runs/{seed}/best.pt", seed, nn.Sequential if seed != 1 else net)
    options = ("--into", tmp_path / "out", "--allow", "mynet_of_mine")
    _, said = (process := on(cluster, tmp_path / "runs/*/best.pt", *options)).communicate()
    (failure,) = (line for line in said.splitlines() if line.startswith("failed: "))
    assert process.returncode == 1 and "mynet_of_mine" in failure and "runs/1/best.pt" in failure, said
    assert {path.parent.name for path in (tmp_path / "out").glob("*/best.pt")} == {"0", "2"}
    (cluster.folder / "mynet_of_mine.py").symlink_to(tmp_path / "mine/mynet_of_mine.py")  # where one stands
    _, said = (process := on(cluster, tmp_path / "runs/*/best.pt", *options)).communicate()
    assert process.returncode == 0, said


@pytest.mark.slow
def test_without_its_scheduler_the_command_ends_and_the_next_goes_on(cluster, tmp_path, cli):
    for seed in range(6):
        checkpoint(tmp_path / f"runs/{seed}/best.pt", seed)
    process = on(cluster, tmp_path / "runs/*/best.pt", "--into", tmp_path / "out")
    _when_one_is_done(tmp_path / "out")
    cluster.scheduler.kill()
    _, said = process.communicate()
    assert process.returncode == 1 and "scheduler at tcp://" in said and "is lost" in said and "Traceback" not in said
    for worker in cluster.workers:
        worker.kill()
    done = cli("convert", tmp_path / "runs/*/best.pt", "--into", tmp_path / "out", *OPTIONS, cwd=tmp_path)
    assert done.returncode == 0 and " done before in" in done.stdout and len(whole(digests(tmp_path / "out"))) == 12
    done = cli("convert", tmp_path / "runs/0/best.pt", "--into", tmp_path / "out", "--dask", cluster.address)
    assert done.returncode == 2 and "no Dask scheduler" in done.stderr


def _when_one_is_done(out: Path) -> None:
    while not any(out.glob("*/best.pt")):
        time.sleep(0.05)
