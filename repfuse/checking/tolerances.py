"""Tolerances that the user gives, in place of what arithmetic explains.

The rule is that of torch.testing.assert_close: two outputs agree where |a - b| <= atol + rtol * |a| for each element,
with a the original's. What is not finite agrees where it is the same in both. It has to hold twice: in float64, and for
what both networks give in the dtypes they are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from repfuse.checking.evidence import Evidence
from repfuse.checking.inputs.trial import Trial
from repfuse.checking.results import ToleranceCheck, Verdict, Worst
from repfuse.checking.runs import Outcome, run
from repfuse.errors import RepfuseError
from repfuse.networks import between


@dataclass(frozen=True)
class Tolerances:
    """How far an element may be off: |a - b| <= atol + rtol * |a|."""

    rtol: float
    atol: float

    def excess(self, a: torch.Tensor, b: torch.Tensor | None) -> float:
        """Return the largest |a - b| in units of what is allowed; infinite where b is missing or of another shape."""
        if b is None or a.shape != b.shape:
            return math.inf
        a, b = a.to(torch.float64), b.to(torch.float64)
        same = (a == b) | (a.isnan() & b.isnan())
        times = (a - b).abs() / (self.atol + self.rtol * a.abs())
        times = times.nan_to_num(math.inf, math.inf).masked_fill(same, 0)  # inf / inf: only one of both is infinite
        return float(times.max()) if times.numel() else 0.0


def tolerances(rtol: float | None, atol: float | None) -> Tolerances | None:
    """Return the tolerances, one that is not given being 0; None where neither is given.

    Raises RepfuseError for a number that is negative, infinite or no number.
    """
    if rtol is None and atol is None:
        return None
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise RepfuseError(f"{name} is {value}.", "", "A tolerance is a finite number and not negative, as 1e-3.")
    return Tolerances(rtol or 0.0, atol or 0.0)


def checked(
    given: Tolerances,
    networks: tuple[nn.Module, nn.Module],
    evidence: Evidence,
    arithmetic: tuple[Verdict, str],
) -> ToleranceCheck:
    """Hold what both networks give in float64, and as they are stored, against the tolerances.

    As stored, outputs are left out that the original does not have there (its dtype does not run on this device, or
    overflows). ``arithmetic`` is the verdict without tolerances, and its reason.
    """
    (original, fused), trials, exact = networks, evidence.trials, evidence.outcomes
    before = run(original, trials, {})
    after = run(fused, trials, between(original, fused))
    in_float64 = _worst(given, trials, exact, evidence.answers)
    stored = _worst(given, trials, _sound(exact, before), after)
    return ToleranceCheck(given.rtol, given.atol, in_float64, stored, *arithmetic)


def ruling(check: ToleranceCheck) -> tuple[Verdict, str]:
    """Return the verdict by the tolerances alone, and why."""
    measured = [
        f"{worst.excess:.3g} times what they allow {where} (on {worst.trial}, {worst.name})"
        for where, worst in (("in float64", check.float64), ("as stored", check.stored))
        if worst is not None
    ]
    verdict: Verdict = "same" if check.passed else "different"
    told = f"The tolerances given decide (rtol {check.rtol:g}, atol {check.atol:g}): at most {', '.join(measured)}."
    return verdict, f"{told} Arithmetic alone says {check.arithmetic}: {check.reason}"


def _worst(
    given: Tolerances, trials: Sequence[Trial], before: Sequence[Outcome], after: Sequence[Outcome]
) -> Worst | None:
    """Return the output that is furthest off; None where there is none."""
    found = [
        Worst(trial.label, name, given.excess(a, theirs.outputs.get(name)))
        for trial, own, theirs in zip(trials, before, after, strict=True)
        for name, a in own.outputs.items()
    ]
    return max(found, key=lambda worst: worst.excess, default=None)


def _sound(exact: Sequence[Outcome], stored: Sequence[Outcome]) -> list[Outcome]:
    """Return what is stored without the outputs that are not finite where the float64 ones are."""
    return [
        Outcome({name: x for name, x in own.outputs.items() if _finite_alike(wide.outputs.get(name), x)})
        for wide, own in zip(exact, stored, strict=True)
    ]


def _finite_alike(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(torch.isfinite(a), torch.isfinite(b))
