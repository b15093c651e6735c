"""Tolerances that the user gives: they overrule what rounding explains, for better and for worse."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import SAMPLES, Cli
from hypothesis import given
from hypothesis import strategies as st
from support.folded import example, folded, network
from torch import nn

from repfuse.checking.verification import Tolerances, verify
from repfuse.errors import RepfuseError

numbers = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, math.inf, -math.inf, math.nan]))
pairs = st.lists(st.tuples(numbers, numbers), max_size=12)
bounds = st.one_of(st.just(0.0), st.floats(1e-6, 10))


@given(pairs, bounds, bounds)
def test_the_rule_is_that_of_torch(values, rtol, atol):
    a, b = (torch.tensor([pair[side] for pair in values], dtype=torch.float64) for side in (0, 1))
    assert (Tolerances(rtol, atol).excess(a, b) <= 1) == torch.allclose(b, a, rtol=rtol, atol=atol, equal_nan=True)


def test_it_is_relative_to_the_original():
    small, large = torch.tensor([1.0]), torch.tensor([2.5])
    assert Tolerances(1.0, 0.0).excess(small, large) == 1.5
    assert Tolerances(1.0, 0.0).excess(large, small) == 0.6


@given(pairs, bounds, bounds)
def test_equal_outputs_are_within_any_tolerance(values, rtol, atol):
    a = torch.tensor([value for value, _ in values])
    assert Tolerances(rtol, atol).excess(a, a.clone()) == 0


def test_another_shape_or_none_is_beyond_any_tolerance():
    assert Tolerances(1.0, 1.0).excess(torch.ones(2), torch.ones(2, 1)) == math.inf
    assert Tolerances(1.0, 1.0).excess(torch.ones(2), None) == math.inf


def off_by(step: float) -> tuple[nn.Module, nn.Module]:
    original = network(2)
    wrong = folded(original)
    with torch.no_grad():
        wrong[0][3].weight[2, 1, 0, 0] += step
    return original, wrong


def test_loose_tolerances_pass_what_arithmetic_does_not_and_say_so():
    original, wrong = off_by(1e-2)
    assert verify(original, wrong, example()).verdict == "different"
    verification = verify(original, wrong, example(), rtol=0.1, atol=1.0)
    assert (verification.verdict, verification.exit_code) == ("same", 0)
    assert verification.reason.startswith("The tolerances given decide (rtol 0.1, atol 1)")
    assert "Arithmetic alone says different: In float64, on " in verification.reason
    assert verification.tolerances.arithmetic == "different" and verification.tolerances.passed
    json.dumps(verification.to_dict(), allow_nan=False)


def test_tight_tolerances_fail_what_arithmetic_passes():
    original = network(2)
    verification = verify(original, folded(original), example(), rtol=0, atol=0)
    assert (verification.verdict, verification.exit_code) == ("different", 1)
    assert "Arithmetic alone says same" in verification.reason
    same = verify(original, copy.deepcopy(original), example(), rtol=0)
    assert same.verdict == "same" and same.tolerances.stored.excess == 0


def test_one_tolerance_alone_leaves_the_other_at_0():
    original, wrong = off_by(1e-2)
    assert verify(original, wrong, example(), atol=1.0).verdict == "same"
    assert verify(original, wrong, example(), rtol=1e-6).verdict == "different"
    assert verify(original, wrong, example(), rtol=1e-6).tolerances.atol == 0


class Coarse(nn.Module):
    """Rounds its output to bfloat16, but not in float64."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y if y.dtype is torch.float64 else y.to(torch.bfloat16).to(y.dtype)


def test_the_outputs_as_stored_are_held_against_them_too():
    original = network(2)
    verification = verify(original, Coarse(original), example(), rtol=1e-4, atol=1e-6)
    assert verification.verdict == "different"
    assert verification.tolerances.float64.excess == 0 < 1 < verification.tolerances.stored.excess
    assert verify(original, Coarse(original), example(), rtol=1e-2, atol=1e-6).verdict == "same"


def test_they_do_not_overrule_another_form_or_outputs_that_say_nothing():
    original = network(2)
    flat = nn.Sequential(copy.deepcopy(original), nn.Unflatten(1, (2, 5)))
    assert verify(original, flat, example(), rtol=9, atol=9).verdict == "different"
    nothing = nn.Sequential(original, nn.Threshold(math.inf, 0.0))
    assert verify(nothing, copy.deepcopy(nothing), example(), rtol=9, atol=9).verdict == "could-not-tell"


def test_an_original_that_overflows_as_stored_is_compared_where_it_does_not():
    class Overflows(nn.Module):
        def forward(self, x):
            return x * 1e30 * 1e30 / 1e30 / 1e30

    verification = verify(Overflows(), nn.Identity(), example(), rtol=1e-3)
    assert verification.verdict == "same" and verification.tolerances.stored is None


@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf])
@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_a_number_that_is_no_tolerance_is_bad_input(name, bad):
    with pytest.raises(RepfuseError, match=name) as caught:
        verify(network(1), network(1), example(), **{name: bad})
    assert caught.value.exit_code == 2 and caught.value.hint


def test_the_command_takes_tolerances_and_an_effort(cli: Cli, tmp_path):
    digits = SAMPLES / "repvgg_digits.pt"
    done = cli("verify", digits, digits, "--quick", "--rtol", "1e-3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["effort"], found["tolerances"]["rtol"], found["tolerances"]["atol"]) == ("quick", 1e-3, 0)
    assert found["tolerances"]["stored"]["excess"] == 0


@pytest.mark.slow
def test_a_quick_conversion_says_so_and_tries_less(cli: Cli, tmp_path):
    found = {}
    for name, options in (("quick", ("--quick",)), ("usual", ())):
        done = cli("convert", SAMPLES / "repvgg_digits.pt", tmp_path / f"{name}.pt", *options, "--json")
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)
    assert len(found["quick"]["proof"]["network"]["trials"]) < len(found["usual"]["proof"]["network"]["trials"])
    assert [any("--quick" in note for note in found[name]["notes"]) for name in found] == [True, False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rtol", "nan"), "rtol is nan"),
        (("--atol", "-1"), "atol is -1"),
        (("--quick", "--thorough"), "not both"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(cli: Cli, samples, options, said):
    file = samples / "notebook_block.pt"
    done = cli("verify", file, file, *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said in " ".join(done.stderr.split())
