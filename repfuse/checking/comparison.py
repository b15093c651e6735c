"""Both networks in float64 on the same inputs.

Inputs that the original refuses are tried at another size: a network that takes one size only sees every kind too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from repfuse.checking.inputs.trial import Trial
from repfuse.checking.measure import mismatch, output_error
from repfuse.checking.results import Comparison, TrialComparison
from repfuse.checking.runs import Change, Outcome, Watch, in_float64, run_float64, unwatched
from repfuse.errors import RepfuseError
from repfuse.networks import why_refused

GUARD = "AssertionError: Guard failed: "
"""How the error of an exported program begins whose input is outside of what it was made for."""


def reference(original: nn.Module, trials: Sequence[Trial], watch: Watch = unwatched) -> list[Outcome]:
    """Return the original's outcomes in float64. Raises RepfuseError where it cannot run the first trial.

    ``watch`` is shown each copy before it is called.
    """
    outcomes = run_float64(original, trials, watch=watch)
    if outcomes[0].error:
        shapes = ", ".join("x".join(map(str, shape)) for shape in trials[0].shapes)
        what = f"The original network cannot run in float64 on {trials[0].label} ({shapes})."
        raise RepfuseError(what, *why_refused(original, trials[0].inputs, outcomes[0].error))
    return outcomes


def answers_in_float64(
    fused: nn.Module,
    trials: Sequence[Trial],
    expected: Sequence[Outcome],
    change: Change = in_float64,
    watch: Watch = unwatched,
) -> list[Outcome]:
    """Run the fused network in float64, its tensors as ``change`` says, on the trials that the original took.

    The others stay without outputs. ``watch`` is shown each copy before it is called.
    """
    taken = [trial for trial, outcome in zip(trials, expected, strict=True) if not outcome.error]
    answers = iter(run_float64(fused, taken, change, watch))
    return [Outcome({}, "the original does not take it") if outcome.error else next(answers) for outcome in expected]


def tabulate(
    trials: Sequence[Trial], expected: Sequence[Outcome], found: Sequence[Outcome], tolerance: float
) -> Comparison:
    """Set the outcomes of both networks side by side."""
    first, *others = zip(trials, expected, found, strict=True)
    return Comparison((_row(*first), *(_outside(*each) or _row(*each) for each in others)), tolerance)


def _outside(trial: Trial, expected: Outcome, found: Outcome) -> TrialComparison | None:
    """Return a row for an input, other than the example, that the fused network says itself it is not for.

    An exported program was made for a range of sizes, and checks its inputs.
    """
    if expected.error or not found.error.startswith(GUARD):
        return None
    broken = found.error.removeprefix(GUARD)
    return TrialComparison(trial.label, trial.shapes, skipped=f"the fused program does not take it, by {broken}")


def _row(trial: Trial, expected: Outcome, found: Outcome) -> TrialComparison:
    if expected.error:
        return TrialComparison(trial.label, trial.shapes, skipped=expected.error)
    if found.error and expected.is_empty:
        return TrialComparison(trial.label, trial.shapes, skipped="the outputs are empty")
    if found.error:
        what = f"the original runs, the fused network does not ({found.error})"
        return TrialComparison(trial.label, trial.shapes, mismatch=what)
    if what := mismatch(expected.outputs, found.outputs):
        return TrialComparison(trial.label, trial.shapes, mismatch=what)
    outputs = (output_error(name, a, found.outputs[name]) for name, a in expected.outputs.items())
    return TrialComparison(trial.label, trial.shapes, tuple(outputs))


def with_fallbacks(
    original: nn.Module, trials: Sequence[Trial], watch: Watch = unwatched
) -> tuple[list[Trial], list[Outcome]]:
    """Return the trials, each replaced by the first of what may stand in its place that the original takes.

    With them come the original's outcomes in float64. A trial of which nothing is taken stays, with its error.
    ``watch`` is shown each copy before it is called. Raises RepfuseError where the original cannot run the first trial.
    """
    chosen, outcomes = list(trials), reference(original, trials, watch)
    waiting = {index: iter(trials[index].otherwise()) for index, outcome in enumerate(outcomes) if outcome.error}
    while nexts := {index: trial for index, others in waiting.items() if (trial := next(others, None))}:
        found = run_float64(original, list(nexts.values()), watch=watch)
        for (index, trial), outcome in zip(nexts.items(), found, strict=True):
            if not outcome.error:
                chosen[index], outcomes[index] = trial, outcome
                del waiting[index]
    return chosen, outcomes
