"""Plans as files and choosing sites, as people use them: inspect, edit, convert, verify."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from blocks import RepVGG
from conftest import SAMPLES, Cli
from support.agreement import operations, randomised
from torch import nn
from typer.testing import CliRunner, Result

import repfuse.cli.conversion as conversion
import repfuse.converting as converting
from repfuse.cli.app import app
from repfuse.plan_file import read_plan_file
from repfuse.readback.process import Reader

DIGITS, NOTEBOOK = SAMPLES / "repvgg_digits.pt", SAMPLES / "notebook_block.pt"
MODEL = ("--model", "repfuse.samples:DigitsRepVGG")
LAYOUTS = {
    "notebook_block.pt": (),
    "repvgg_digits.pt": (),
    "repvgg_digits_state_dict.pth": MODEL,
    "repvgg_digits_training.pt": MODEL,
    "repvgg_digits.safetensors": MODEL,
}


def repfuse(*args: object) -> Result:
    """Run a command in this process: quick, where the process is not what is tested."""
    return CliRunner().invoke(app, list(map(str, args)))


def plan_of(folder: Path, source: Path = DIGITS, *options: object) -> Path:
    done = repfuse("inspect", source, "--plan", folder / "plan.json", "--quiet", *options)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", ""), done.output
    return folder / "plan.json"


@cache
def digits_plan() -> str:
    """What inspect writes of the digits, for tests of what is then done with it."""
    with TemporaryDirectory() as folder:
        return plan_of(Path(folder)).read_text()


def digits_plan_in(folder: Path) -> Path:
    (folder / "plan.json").write_text(digits_plan())
    return folder / "plan.json"


def edit(path: Path, change: Callable[[dict], object]) -> Path:
    data = json.loads(path.read_text())
    change(data["plan"])
    path.write_text(json.dumps(data, indent=4))
    return path


def drop(*paths: str) -> Callable[[dict], object]:
    """An edit that drops these sites."""

    def change(plan: dict) -> None:
        plan["sites"] = [site for site in plan["sites"] if site["path"] not in paths]

    return change


@pytest.mark.slow
def test_inspect_edit_convert_verify(cli: Cli, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "fused.pt"
    inspected = cli("inspect", DIGITS, "--plan", plan)
    assert (inspected.returncode, inspected.stderr) == (0, "")
    assert "the plan was written to" in inspected.stdout and "plan.json" in inspected.stdout
    edit(plan, drop("blocks.1.fused", "blocks.3.fused"))
    converted = cli("convert", DIGITS, out, "--plan", plan, "--json")
    assert (converted.returncode, converted.stderr) == (0, "")
    report = json.loads(converted.stdout)
    assert [site["path"] for site in report["plan"]["sites"]] == [f"blocks.{i}.fused" for i in (0, 2, 4)]
    assert {(r["code"], r["where"]) for r in report["plan"]["refusals"]} == {
        ("excluded", "blocks.1.fused"),
        ("excluded", "blocks.3.fused"),
    }
    digest = f"sha256:{hashlib.sha256(plan.read_bytes()).hexdigest()}"
    assert report["chosen"] == {"plan": str(plan), "include": [], "exclude": [], "digest": digest}
    assert report["proof"]["passed"] and report == json.loads((tmp_path / "fused.pt.report.json").read_text())
    verified = cli("verify", DIGITS, out, "--data", SAMPLES / "digits_heldout.safetensors", "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["verdict"] == "same"
    fused = torch.load(out, weights_only=False)
    assert operations(fused, torch.zeros(1, 1, 8, 8))["batch_norm"] == 6  # of the two that stay, three branches each


@pytest.mark.slow
def test_the_same_plan_is_the_same_file_in_every_process(cli: Cli, tmp_path: Path) -> None:
    for seed in "12":
        done = cli("inspect", DIGITS, "--plan", tmp_path / seed, "-q", env={"PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_of_every_sample_applies_to_it_as_it_is(name: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SAMPLES / name, *LAYOUTS[name])
    plain = repfuse("inspect", SAMPLES / name, *LAYOUTS[name], "--json")
    again = repfuse("convert", SAMPLES / name, *LAYOUTS[name], "--plan", plan, "--dry-run", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["plan"] == json.loads(plain.stdout)["plan"]
    assert again.stderr == "" and json.loads(again.stdout)["notes"] == json.loads(plain.stdout)["notes"]


def test_what_inspect_prints_and_the_report_of_a_conversion_are_plans_too(tmp_path: Path) -> None:
    printed = tmp_path / "printed.json"
    printed.write_text(repfuse("inspect", DIGITS, "--json", "--exclude", "blocks.0").stdout)
    done = repfuse("convert", DIGITS, tmp_path / "a.pt", "--plan", printed, "--exclude", "*.4", "--quiet", "--quick")
    assert done.exit_code == 0, done.output
    again = repfuse("convert", DIGITS, tmp_path / "b.pt", "--plan", tmp_path / "a.pt.report.json", "--json", "--quick")
    report = json.loads(again.stdout)
    assert [site["path"] for site in report["plan"]["sites"]] == [f"blocks.{i}.fused" for i in (1, 2, 3)]
    why = {refusal["where"]: refusal["reason"] for refusal in report["plan"]["refusals"]}
    assert why == {
        "blocks.0.fused": "it is left out by 'blocks.0'",
        "blocks.4.fused": "it is left out by '*.4'",
    }
    a, b = (torch.load(tmp_path / name, weights_only=False).state_dict() for name in ("a.pt", "b.pt"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_globs_choose_sites_and_the_report_says_so(cli: Cli, tmp_path: Path) -> None:
    options = ("--include", "blocks.[0-2]", "--exclude", "blocks.1.*")
    done = cli("convert", DIGITS, tmp_path / "fused.pt", *options, "--quick", columns=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert "chosen --include blocks.[0-2] --exclude blocks.1.*" in " ".join(done.stdout.split())
    assert "not fused excluded (3)" in " ".join(done.stdout.split())
    assert "repvgg_digits: 10 → 2 operators, exact to" in done.stdout.splitlines()[-1]
    report = json.loads((tmp_path / "fused.pt.report.json").read_text())
    globs = {"include": ["blocks.[0-2]"], "exclude": ["blocks.1.*"]}
    assert report["chosen"] == {"plan": None, "digest": None, **globs}
    assert [site["path"] for site in report["plan"]["sites"]] == ["blocks.0.fused", "blocks.2.fused"]


def test_where_all_is_left_out_nothing_is_written(tmp_path: Path) -> None:
    done = repfuse("convert", NOTEBOOK, tmp_path / "out.pt", "--exclude", "*")
    assert done.exit_code == 0, done.output
    assert "nothing to fuse, nothing was written" in done.stdout and "excluded" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_a_choice_nothing_is_said_of_one(tmp_path: Path) -> None:
    done = repfuse("inspect", NOTEBOOK)
    assert "chosen" not in done.stdout and "nothing was written" in done.stdout
    assert json.loads(repfuse("inspect", NOTEBOOK, "--json").stdout)["chosen"] is None


def saved(folder: Path, name: str = "in.pt", seed: int = 0) -> Path:
    model = nn.Sequential(RepVGG(), nn.ReLU(), RepVGG())
    torch.save(randomised(model, seed, torch.float32), folder / name)
    return folder / name


def test_the_input_that_was_given_for_the_plan_is_given_with_it(tmp_path: Path) -> None:
    source = saved(tmp_path)
    plan = plan_of(tmp_path, source, "--input", "2x4x9x8", "--trust")
    trusted = ("--trust", "--dry-run", "--json")
    report = json.loads(repfuse("convert", source, "--plan", plan, *trusted).stdout)
    assert report["input"]["shapes"] == [[2, 4, 9, 8]] and "the input 2x4x9x8 is that of the plan" in report["notes"]
    other = json.loads(repfuse("convert", source, "--plan", plan, "--input", "1x4x5x5", *trusted).stdout)
    assert other["input"]["shapes"] == [[1, 4, 5, 5]] and len(other["plan"]["sites"]) == 2 and other["notes"] == []


def test_a_plan_serves_other_weights_and_that_is_said(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, saved(tmp_path), "--input", "1x4x8x8", "--trust")
    other = saved(tmp_path, "other.pt", seed=1)
    done = repfuse("convert", other, tmp_path / "out.pt", "--plan", plan, "--trust", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["status"] == "converted"
    assert any("made for another file" in note and "in.pt" in note for note in report["notes"])


def test_a_plan_is_replaced_only_with_force(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    plan.write_text("precious")
    refused = repfuse("inspect", DIGITS, "--plan", plan)
    assert refused.exit_code == 2 and "--force" in refused.stderr and plan.read_text() == "precious"
    assert plan_of(tmp_path, DIGITS, "--force").read_text() != "precious"
    assert len(read_plan_file(plan).plan.sites) == 5


BAD: dict[str, tuple[Callable[[Path], tuple[object, ...]], str]] = {
    "policy": (lambda f: ("convert", DIGITS, f / "out", "--plan", digits_plan_in(f), "--policy", "cost"), "contradict"),
    "a class to keep": (
        lambda f: ("convert", DIGITS, f / "out", "--plan", digits_plan_in(f), "--keep-class"),
        "A plan says already",
    ),
    "another model": (lambda f: ("convert", NOTEBOOK, f / "out", "--plan", digits_plan_in(f)), "another model"),
    "edited": (
        lambda f: (
            "convert",
            DIGITS,
            f / "out",
            "--plan",
            edit(digits_plan_in(f), lambda p: p["sites"][2].update(kernel="5x5")),
        ),
        "blocks.2.fused",
    ),
    "edited graph": (
        lambda f: (
            "convert",
            DIGITS,
            f / "out",
            "--plan",
            edit(digits_plan_in(f), lambda p: p["sites"][0].update(nodes=["x"])),
        ),
        "does not have, such as blocks.0.fused",
    ),
    "another policy": (
        lambda f: ("convert", DIGITS, f / "out", "--plan", edit(digits_plan_in(f), lambda p: p.update(policy="fast"))),
        "'fast'",
    ),
    "graph of another": (
        lambda f: (
            *("convert", DIGITS, f / "out", "--plan"),
            edit(digits_plan_in(f), lambda p: p.update(fingerprint="0")),
        ),
        "other modules or shapes",
    ),
    "a checkpoint": (lambda f: ("convert", DIGITS, f / "out", "--plan", DIGITS), "repvgg_digits.pt is not a plan"),
    "missing": (lambda f: ("convert", DIGITS, f / "out", "--plan", f / "none.json"), "none.json cannot be read"),
    "no such site": (lambda f: ("convert", DIGITS, f / "out", "--exclude", "block.1"), "blocks.1"),
    "no such site in the plan": (
        lambda f: (
            "convert",
            DIGITS,
            f / "out",
            "--plan",
            edit(digits_plan_in(f), drop("blocks.1.fused")),
            "--include",
            "*.1",
        ),
        "No site matches '*.1'",
    ),
    "onto the plan": (
        lambda f: ("convert", DIGITS, digits_plan_in(f), "--plan", f / "plan.json", "--force"),
        "input itself",
    ),
    "onto the input": (lambda f: ("inspect", saved(f), "--plan", f / "in.pt", "--force"), "input itself"),
    "no folder": (lambda f: ("inspect", DIGITS, "--plan", f / "no" / "plan.json"), "mkdir"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    make, said = BAD[name]
    args = make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = repfuse(*args)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("error:") == 1 and "  do: " in done.stderr
    assert said in done.stderr and "does not expect" not in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_plan_that_cannot_be_written_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    done = cli("inspect", DIGITS, "--plan", tmp_path / "plan.json", largest=1_000)
    assert done.returncode == 2 and "plan.json could not be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("busy", [False, True])
def test_a_process_that_has_a_library_to_import_has_a_core_until_the_proof(
    busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two on the same cores would wait for each other; afterwards nothing is left to share."""
    seen: dict[str, int] = {}

    def noting(name: str) -> None:
        real = getattr(converting, name)

        def note(*args: object, **kwargs: object) -> object:
            seen[name] = torch.get_num_threads()
            return real(*args, **kwargs)

        monkeypatch.setattr(converting, name, note)

    for name in ("rewrite", "prove", "drift"):
        noting(name)
    monkeypatch.setattr(conversion, "enough_threads", lambda *_: 4)
    monkeypatch.setattr(Reader, "prepare", lambda *_: busy)
    before = torch.get_num_threads()
    assert repfuse("convert", DIGITS, tmp_path / "fused.pt", "--quick", "--quiet").exit_code == 0
    assert seen == {"rewrite": 2 if busy else 4, "prove": 4, "drift": 4}
    assert torch.get_num_threads() == before
