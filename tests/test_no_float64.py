"""Networks in which something has no float64 are converted all the same, and it is said what that means."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SUPPORT, Cli
from support import exported, narrow
from torch import nn

import repfuse

FOUND = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", SUPPORT)))}
INPUT = "1x4x9x8"
X = torch.randn(1, 4, 9, 8, generator=torch.Generator().manual_seed(0))


def made(network: type[nn.Module]) -> nn.Module:
    return exported.randomised(network(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("network", "where"),
    [
        (narrow.Kernel, ["kernel"]),
        pytest.param(narrow.Asserts, [], marks=pytest.mark.slow),
        pytest.param(narrow.AssertsWithin, [""], marks=pytest.mark.slow),
    ],
)
def test_the_sites_are_proven_and_the_report_says_what_ran_in_its_own_dtype(
    network: type[nn.Module], where: list[str], cli: Cli, tmp_path: Path
) -> None:
    torch.save(made(network), tmp_path / "in.pt")
    given = ("--allow", "support", "--input", INPUT)
    done = cli("convert", "in.pt", "out.pt", *given, "--json", cwd=tmp_path, env=FOUND)
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)["proof"]
    assert proof["passed"] and len(proof["sites"]) == 2
    assert all(site["error"] <= 1e-12 for site in proof["sites"])
    assert proof["network"]["narrow"] == where
    assert (proof["network"]["tolerance"] <= 1e-12) == (not where)
    verified = cli("verify", "in.pt", "out.pt", *given, "--trust", cwd=tmp_path, env=FOUND)
    assert verified.returncode == 0, verified.stdout
    assert ("no float64" in " ".join(verified.stdout.split())) == bool(where)


def test_what_has_no_float64_may_lie_in_what_has_none_either() -> None:
    outer = narrow.Kernel()
    outer.second = narrow.DoublingKernel()
    network = exported.randomised(nn.Sequential(narrow.Block(), Doubled(outer), narrow.Block()), dtype=torch.float32)
    found = repfuse.verify(network, network, (X,), effort="quick")
    assert found.verdict == "same" and any("1 ran in the stored dtype" in note for note in found.notes), found.notes


class Doubled(nn.Module):
    """Calls such a module in another, and does such a thing itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(2 * narrow.in_float32(self.inner(x)).detach().numpy())


@pytest.mark.parametrize("network", [narrow.Kernel, narrow.Asserts, narrow.AssertsWithin])
def test_a_wrong_weight_is_found_with_the_plan_and_without(network: type[nn.Module]) -> None:
    original = made(network)
    result = repfuse.fuse(original, (X,))
    with torch.no_grad():
        next(x for x in result.module.parameters() if x.dim() == 4)[0, 0, 0, 0] += 1e-2
    assert repfuse.verify(original, result.module, (X,), plan=result.plan).verdict == "different"
    assert repfuse.verify(original, result.module, (X,)).verdict == "different"


def test_what_fails_for_another_reason_is_said_as_before() -> None:
    with pytest.raises(repfuse.RepfuseError, match=r"cannot run") as error:
        repfuse.verify(made(narrow.Kernel), made(narrow.Kernel), (X[:, :3],))
    assert "float64" not in error.value.why
