"""Where the plan is known that made a checkpoint, `verify` proves each site and each stored weight of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES, Cli
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations

import repfuse
from repfuse import RepfuseError, load

MODULE = SAMPLES / "repvgg_digits.pt"
STATE = SAMPLES / "repvgg_digits_state_dict.pth"
MODEL = "repfuse.samples:DigitsRepVGG"
LAYER = "blocks.2.fused.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, digits_fused: Path, cli: Cli) -> Path:
    """A folder with the digits classifier converted to a module and to safetensors, each with its report."""
    folder = Path(shutil.copytree(digits_fused.parent, tmp_path_factory.mktemp("made") / "made"))
    assert cli("convert", STATE, folder / "state.safetensors", "--model", MODEL, "--quick").returncode == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "made"))


def verified(cli: Cli, *args: object, code: int) -> tuple[dict, str]:
    done = cli("verify", *args, "--json")
    assert done.returncode == code, done.stderr + done.stdout
    return json.loads(done.stdout), done.stderr


def test_the_report_beside_a_file_says_what_was_merged(folder: Path, cli: Cli) -> None:
    found, said = verified(cli, MODULE, folder / "fused.pt", code=0)
    assert said == "" and found["proof"]["passed"] and found["proof"]["error"] <= 1e-12
    sites = found["proof"]["sites"]
    assert [site["path"] for site in sites] == [f"blocks.{index}.fused" for index in range(5)]
    assert all(weight["wrong"] == 0 for site in sites for weight in site["weights"])
    assert all(site["drift"]["of_bound"] <= 1 for site in sites)


@pytest.mark.slow
def test_so_does_the_file_itself_where_its_network_is_built_again(folder: Path, cli: Cli) -> None:
    (folder / "state.safetensors.report.json").unlink()
    found, _ = verified(cli, STATE, folder / "state.safetensors", "--model", MODEL, code=0)
    assert len(found["proof"]["sites"]) == 5


@pytest.mark.slow
def test_a_change_that_hides_in_the_rounding_of_the_rest_is_found(folder: Path, cli: Cli) -> None:
    """The least bit of one weight: the outputs cannot show it."""
    (folder / "state.safetensors.report.json").unlink()
    path = folder / "state.safetensors"
    wrong, clean = folder / "wrong.safetensors", load_file(path)
    clean[LAYER].view(torch.int32)[0, 0, 1, 1] ^= 2
    with_metadata(path, wrong, clean)
    found, _ = verified(cli, STATE, wrong, "--model", MODEL, code=1)
    assert found["reason"].startswith(f"{LAYER}: 1 of the stored numbers")
    place = found["first_difference"]
    assert place["path"] == "blocks.2.fused" and place["after"] == "blocks.1.fused" and place["trial"] == LAYER
    assert 1 < place["error"]["max"] < 3
    assert all(row["error"]["relative"]["max"] <= row["allowed"]["max"] for row in found["outputs"])


def with_metadata(like: Path, path: Path, state: dict[str, torch.Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(like, "pt") as file:
        save_file(state, path, file.metadata())


def test_a_report_of_another_file_never_judges_this_one(folder: Path, cli: Cli) -> None:
    """Converted again by other means, and put in the place of the first: the file is right, and so is the verdict."""
    options = ("--exclude", "blocks.1.fused", "--quiet", "--quick")
    assert cli("convert", MODULE, folder / "again.pt", *options).returncode == 0
    (folder / "again.pt").replace(folder / "fused.pt")
    found, said = verified(cli, MODULE, folder / "fused.pt", code=0)
    assert found["verdict"] == "same" and found["proof"] is None
    assert "the report fused.pt.report.json beside it is not used: it is of another file than" in said


def test_a_file_that_was_changed_since_is_judged_by_what_it_computes(folder: Path, cli: Cli) -> None:
    network = torch.load(folder / "fused.pt", weights_only=False)
    with torch.no_grad():
        network.blocks[1].fused.bias[3] *= 1.01
    torch.save(network, folder / "fused.pt")
    found, said = verified(cli, MODULE, folder / "fused.pt", code=1)
    assert found["proof"] is None and "is not used" in said


@pytest.mark.slow
def test_each_file_has_its_own_report(folder: Path, cli: Cli) -> None:
    """What was written to fused.pth, of fewer sites, says nothing of the fused.pt beside it."""
    assert cli("convert", MODULE, folder / "fused.pth", "--include", "blocks.0", "--quiet").returncode == 0
    for name, sites in (("fused.pt", 5), ("fused.pth", 1)):
        found, said = verified(cli, MODULE, folder / name, code=0)
        assert len(found["proof"]["sites"]) == sites and said == ""


def test_a_report_of_another_original_does_not_count(folder: Path, cli: Cli) -> None:
    """The other file holds the same network: no site of it is proven by itself, and its outputs are the same."""
    found, said = verified(cli, STATE, folder / "fused.pt", "--model", MODEL, "--quick", code=0)
    assert found["proof"] is None and "is not used: it is of another original" in said


@pytest.mark.slow
def test_a_plan_of_other_files_is_bad_input(folder: Path, cli: Cli) -> None:
    assert cli("inspect", STATE, "--model", MODEL, "--plan", folder / "plan.json", "-q").returncode == 0
    for plan, other in (("plan.json", "another original"), ("fused.pt.report.json", "another file")):
        (folder / "copy.pt").write_bytes((folder / "fused.pt").read_bytes() + b"\0" * (plan != "plan.json"))
        done = cli("verify", MODULE, folder / "copy.pt", "--plan", folder / plan)
        assert (done.returncode, done.stdout) == (2, "")
        assert "is not of these files" in done.stderr and other in done.stderr and "Leave --plan out" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{", '{"kind": "repfuse.conversion", "schema": 1}', "[]"])
def test_a_damaged_report_is_said_and_left_alone(folder: Path, cli: Cli, content: str) -> None:
    (folder / "fused.pt.report.json").write_text(content, encoding="utf-8")
    found, said = verified(cli, MODULE, folder / "fused.pt", code=0)
    assert "the report fused.pt.report.json beside it cannot be used" in said and found["proof"] is None


@pytest.mark.slow
def test_a_plan_may_be_given(folder: Path, cli: Cli) -> None:
    (folder / "fused.pt.report.json").rename(folder / "plan.json")
    assert verified(cli, MODULE, folder / "fused.pt", code=0)[0]["proof"] is None
    found, _ = verified(cli, MODULE, folder / "fused.pt", "--plan", folder / "plan.json", code=0)
    assert len(found["proof"]["sites"]) == 5


def test_a_plan_of_another_network_is_bad_input(folder: Path, cli: Cli) -> None:
    assert cli("inspect", MODULE, "--plan", folder / "plan.json", "-q").returncode == 0
    done = cli("verify", MODULE, MODULE, "--plan", folder / "plan.json")
    assert done.returncode == 2 and "no convolution at 'blocks.0.fused'" in done.stderr


def test_the_same_from_python() -> None:
    checkpoint = load(MODULE)
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    asked = (checkpoint.module, result.module, checkpoint.example_inputs)
    assert repfuse.verify(*asked, plan=result.plan).proof.passed
    assert repfuse.verify(*asked).proof is None
    with torch.no_grad():
        result.module.blocks[4].fused.weight[0, 0, 0, 0] = float("nan")
    found = repfuse.verify(*asked, plan=result.plan)
    assert found.verdict == "different" and "blocks.4.fused" in found.reason
    with pytest.raises(RepfuseError, match="does not fit"):
        repfuse.verify(checkpoint.module, checkpoint.module, checkpoint.example_inputs, plan=result.plan)


def test_a_weight_that_is_computed_is_not_the_one_of_the_plan() -> None:
    checkpoint = load(MODULE)
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    parametrizations.weight_norm(result.module.blocks[4].fused)
    with pytest.raises(RepfuseError, match="does not fit"):
        repfuse.verify(checkpoint.module, result.module, checkpoint.example_inputs, plan=result.plan)


def test_outputs_that_say_nothing_are_no_proof_of_the_whole() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Threshold(1e9, 0.0)).eval()
    example = (torch.randn(1, 2, 6, 6),)
    result = repfuse.fuse(model, example)
    found = repfuse.verify(model, result.module, example, plan=result.plan)
    assert found.verdict == "could-not-tell" and found.proof.passed


def test_what_rounding_makes_invisible_is_told_by_the_proof() -> None:
    """Outputs that amplify rounding beyond recognition say nothing; the plan, site by site, does."""

    class Chaotic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x) + self.b(x)
            for _ in range(12):
                y = torch.sin(3 * y) * 2
            return y

    torch.manual_seed(0)
    model, example = Chaotic().eval(), (torch.randn(1, 4, 6, 6),)
    result = repfuse.fuse(model, example)
    assert repfuse.verify(model, result.module, example).verdict == "could-not-tell"
    assert repfuse.verify(model, result.module, example, plan=result.plan).verdict == "same"
    with torch.no_grad():
        result.module.get_submodule(result.plan.sites[0].path).weight[0, 0, 0, 0] *= 1.00001
    assert repfuse.verify(model, result.module, example, plan=result.plan).verdict == "different"
