"""Inputs that the original refuses, tried at another size: a network that takes one size only sees every kind too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from repfuse.verifying.comparison import outcomes_in_float64, reference
from repfuse.verifying.copies import Outcome
from repfuse.verifying.inputs import Trial, Watch, unwatched


def with_fallbacks(
    original: nn.Module, trials: Sequence[Trial], watch: Watch = unwatched
) -> tuple[list[Trial], list[Outcome]]:
    """Return the trials, each replaced by the first of what may stand in its place that the original takes.

    With them come the original's outcomes in float64. A trial of which nothing is taken stays, with its error.
    ``watch`` is given what is about to be run. Raises RepfuseError where the original cannot run the first trial.
    """
    chosen, outcomes = list(trials), reference(original, watch(trials))
    waiting = {index: iter(trials[index].otherwise()) for index, outcome in enumerate(outcomes) if outcome.error}
    while nexts := {index: trial for index, others in waiting.items() if (trial := next(others, None))}:
        found = outcomes_in_float64(original, watch(list(nexts.values())))
        for (index, trial), outcome in zip(nexts.items(), found, strict=True):
            if not outcome.error:
                chosen[index], outcomes[index] = trial, outcome
                del waiting[index]
    return chosen, outcomes
