"""Two tensors against each other, and two networks in float64 on the same inputs.

Inputs that the original refuses are tried at another size: a network that takes one size only sees every kind too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from repfuse.checking.inputs import Trial
from repfuse.checking.results import Comparison, Level, OutputError, TrialComparison, quotient
from repfuse.checking.runs import Change, Outcome, in_float64, run_float64
from repfuse.errors import RepfuseError
from repfuse.networks import why_refused
from repfuse.wording import dtype_name

TOLERANCE = 1e-12
"""Relative error that separates wrong algebra (1e-3) from float64 rounding (1e-15).

Two orders of summing the same n float64 numbers differ by about sqrt(n) 2^-53 of the scale per layer: for sums of a
million products in a hundred layers in a row, that comes to 1e-12 at most.
"""


def level(reference: torch.Tensor, other: torch.Tensor) -> Level:
    """Return the relative difference of ``other`` from ``reference``, two tensors of the same shape.

    Infinite where infinities or NaNs are not in the same places; elements that are not finite in both are
    left out otherwise.
    """
    a, b, alike = _finite_pairs(reference, other)
    if not alike:
        return Level(float("inf"), float("inf"))
    difference = (a - b).abs()
    return Level(
        quotient(*(float(torch.linalg.vector_norm(x)) for x in (difference, a))),
        quotient(_largest(difference), _largest(a)),
    )


def half_the_digits(dtype: torch.dtype) -> float:
    """Return the relative error that half of the digits of a dtype allow, and wrong algebra exceeds: sqrt(eps)."""
    return math.sqrt(torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0


def output_error(name: str, reference: torch.Tensor, other: torch.Tensor) -> OutputError:
    """Return every number about one output, two tensors of the same shape with the same non-finite places."""
    difference = (reference.double() - other.double()).abs()
    difference = torch.where(torch.isfinite(difference), difference, 0)
    worst: tuple[int, ...] = ()
    if difference.numel():  # not by torch's own function, which loads sympy
        worst = tuple(map(int, np.unravel_index(int(difference.argmax()), difference.shape)))
    a, b, _ = _finite_pairs(reference, other)
    wrong = a != b
    nothing = bool((wrong & (a == 0)).any())  # of which no part is as large as the difference
    return OutputError(
        name=name,
        shape=tuple(reference.shape),
        dtype=dtype_name(reference.dtype),
        relative=level(a, b),
        max_abs=_largest(difference),
        scale=_largest(a),
        smallest_rtol=None if nothing else _largest((a[wrong] - b[wrong]).abs() / a[wrong].abs()),
        worst=worst,
        values=(float(reference[worst]), float(other[worst])) if reference.numel() else (0.0, 0.0),
        non_finite=reference.numel() - a.numel(),
    )


def mismatch(reference: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    """Say what differs between two networks' outputs that is no finite number, or return ""."""
    if reference.keys() != other.keys():
        names = [", ".join(outputs) or "nothing" for outputs in (reference, other)]
        return f"the original returns {names[0]}, the fused network {names[1]}"
    for name, a in reference.items():
        b = other[name]
        if a.shape != b.shape:
            one, two = ("x".join(map(str, x.shape)) or "a number" for x in (a, b))
            return f"{name} is {one} in the original and {two} in the fused network"
        if a.dtype != b.dtype:
            return f"{name} is {a.dtype} in the original and {b.dtype} in the fused network"
        if not _finite_pairs(a, b)[2]:
            return f"{name} is infinite or not a number in other places than in the original"
    return ""


def informative(reference: torch.Tensor) -> bool:
    """Whether the tensor has a finite element other than 0: without one there is nothing to compare."""
    wide = reference.double()
    return bool((torch.isfinite(wide) & (wide != 0)).any())


def _finite_pairs(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return the finite elements of both, flat, and whether the others are equal in both."""
    a, b = a.double().flatten(), b.double().flatten()
    finite = torch.isfinite(a)
    if bool(finite.all()) and bool(torch.isfinite(b).all()):
        return a, b, True
    both = finite & torch.isfinite(b)
    alike = torch.equal(finite, torch.isfinite(b)) and torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
    return a[both], b[both], alike


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


GUARD = "AssertionError: Guard failed: "
"""How the error of an exported program begins whose input is outside of what it was made for."""


def reference(original: nn.Module, trials: Sequence[Trial]) -> list[Outcome]:
    """Return the original's outcomes in float64. Raises RepfuseError where it cannot run the first trial."""
    outcomes = run_float64(original, trials)
    if outcomes[0].error:
        shapes = ", ".join("x".join(map(str, shape)) for shape in trials[0].shapes)
        what = f"The original network cannot run in float64 on {trials[0].label} ({shapes})."
        raise RepfuseError(what, *why_refused(original, trials[0].inputs, outcomes[0].error))
    return outcomes


def answers_in_float64(
    fused: nn.Module, trials: Sequence[Trial], expected: Sequence[Outcome], change: Change = in_float64
) -> list[Outcome]:
    """Run the fused network in float64, its tensors as ``change`` says, on the trials that the original took.

    The others stay without outputs.
    """
    taken = [trial for trial, outcome in zip(trials, expected, strict=True) if not outcome.error]
    answers = iter(run_float64(fused, taken, change))
    return [Outcome({}, "the original does not take it") if outcome.error else next(answers) for outcome in expected]


def tabulate(trials: Sequence[Trial], expected: Sequence[Outcome], found: Sequence[Outcome]) -> Comparison:
    """Set the outcomes of both networks side by side."""
    rows = enumerate(zip(trials, expected, found, strict=True))
    return Comparison(tuple(_row(*each, guards=position > 0) for position, each in rows), TOLERANCE)


def _row(trial: Trial, expected: Outcome, found: Outcome, *, guards: bool) -> TrialComparison:
    """Return a row. A fused network that ``guards`` its inputs says itself which it is not for.

    An exported program was made for a range of sizes, which has the example in it, and checks its inputs.
    """
    said = partial(TrialComparison, trial.label, trial.shapes)
    if expected.error:
        return said(skipped=expected.error)
    if guards and found.error.startswith(GUARD):
        return said(skipped=f"the fused program does not take it, by {found.error.removeprefix(GUARD)}")
    if found.error and not any(output.numel() for output in expected.outputs.values()):  # a crop may leave nothing
        return said(skipped="the outputs are empty")
    if found.error:
        return said(mismatch=f"the original runs, the fused network does not ({found.error})")
    if what := mismatch(expected.outputs, found.outputs):
        return said(mismatch=what)
    return said(tuple(output_error(name, a, found.outputs[name]) for name, a in expected.outputs.items()))


def with_fallbacks(original: nn.Module, trials: Sequence[Trial]) -> tuple[list[Trial], list[Outcome]]:
    """Return the trials, each replaced by the first of what may stand in its place that the original takes.

    With them come the original's outcomes in float64. A trial of which nothing is taken stays, with its error.
    Raises RepfuseError where the original cannot run the first trial.
    """
    chosen, outcomes = list(trials), reference(original, trials)
    waiting = {index: iter(trials[index].otherwise()) for index, outcome in enumerate(outcomes) if outcome.error}
    while nexts := {index: trial for index, others in waiting.items() if (trial := next(others, None))}:
        found = run_float64(original, list(nexts.values()))
        for (index, trial), outcome in zip(nexts.items(), found, strict=True):
            if not outcome.error:
                chosen[index], outcomes[index] = trial, outcome
                del waiting[index]
    return chosen, outcomes
