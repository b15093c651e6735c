"""Inputs that the original refuses, tried at another size: a network that takes one size only sees every kind too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from repfuse.verifying.comparison import reference
from repfuse.verifying.copies import Outcome, Watch, run_float64, unwatched
from repfuse.verifying.inputs import Trial


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
